"""The compiled form of `models.rivals.memory`'s writing, and its derivative: for CPUs, where an event is too little
work for torch's calls. The formulas are stated in `models.rivals.memory`; tests compare both, gradients included.

Shapes: L events, B users, d the controller's state, S slots, V their width. X = 3 d: what enters the gates reset,
update, new of the GRU. Y = 4 d: the three gates, and what the state gives the new one. Z = 4 V + 2: read key, write
key, erase, add before their non-linearities; the strengths of both keys.
"""

from __future__ import annotations

from inspect import unwrap

import numba
import numpy as np
import torch

# As torch.nn.functional.normalize has it.
LEAST_NORM = 1e-12


class Write(torch.autograd.Function):
    """(input_LBX, real_LB, hidden_Bd, read_BV, memory_BSV, by_read_VX, by_hidden_dX, bias_X, heads_dZ, bias_Z) ->
    the state after the last event: hidden_Bd, read_BV, memory_BSV. All float32 on a CPU."""

    @staticmethod
    def forward(
        ctx, input_LBX, real_LB, hidden_Bd, read_BV, memory_BSV, by_read_VX, by_hidden_dX, bias_X, heads_dZ, bias_Z
    ):
        length, batch, _ = input_LBX.shape
        states = tuple(_states(length, first) for first in (hidden_Bd, read_BV, memory_BSV))
        gates_LBY = input_LBX.new_empty(length, batch, 4 * hidden_Bd.shape[1])
        out_LBZ = input_LBX.new_empty(length, batch, bias_Z.shape[0])
        weights = _arrays(by_read_VX, by_hidden_dX, bias_X, heads_dZ, bias_Z)
        _write_kernel(*_arrays(input_LBX, real_LB), *weights, *_arrays(*states, gates_LBY, out_LBZ))
        ctx.save_for_backward(real_LB, by_read_VX, by_hidden_dX, heads_dZ, *states, gates_LBY, out_LBZ)
        return tuple(state[-1].clone() for state in states)

    @staticmethod
    def backward(ctx, *grads):
        real_LB, by_read_VX, by_hidden_dX, heads_dZ, hidden_LBd, read_LBV, memory_LBSV, gates_LBY, out_LBZ = (
            ctx.saved_tensors
        )
        firsts = tuple(grad.clone().contiguous() for grad in grads)
        d_input_LBX = gates_LBY.new_zeros(*real_LB.shape, by_read_VX.shape[1])
        d_state_LBX, d_out_LBZ = torch.zeros_like(d_input_LBX), torch.zeros_like(out_LBZ)
        transposed = _arrays(by_read_VX.T, by_hidden_dX.T, heads_dZ.T)
        saved = _arrays(real_LB, hidden_LBd, read_LBV, memory_LBSV, gates_LBY, out_LBZ)
        _gradient_kernel(*saved, *transposed, *_arrays(*firsts, d_input_LBX, d_state_LBX, d_out_LBZ))
        flat_input, flat_state, flat_out = (d.flatten(0, 1) for d in (d_input_LBX, d_state_LBX, d_out_LBZ))
        return (
            d_input_LBX,
            None,
            *firsts,
            read_LBV[:-1].flatten(0, 1).T @ flat_input,
            hidden_LBd[:-1].flatten(0, 1).T @ flat_state,
            flat_state.sum(0),
            hidden_LBd[1:].flatten(0, 1).T @ flat_out,
            flat_out.sum(0),
        )


def _states(length: int, first: torch.Tensor) -> torch.Tensor:
    """Room for the state before the first event, which is filled in, and after each."""
    states = first.new_empty(length + 1, *first.shape)
    states[0] = first
    return states


def _arrays(*tensors: torch.Tensor) -> tuple[np.ndarray, ...]:
    return tuple(tensor.detach().contiguous().numpy() for tensor in tensors)


def _sigmoid_of(x):
    return np.float32(1) / (np.float32(1) + np.exp(-x))


_FAST = {"reassoc", "contract", "nsz"}
_sigmoid = numba.njit(inline="always")(unwrap(_sigmoid_of))


def _address_slots(key_V, strength, memory_SV, unit_V, norm_S, cosine_S, weight_S):
    """Into unit_V, cosine_S, weight_S: the key made a unit, its cosines, its softmax. Gives the key's norm."""
    slots, width = memory_SV.shape
    norm = np.float32(0)
    for v in range(width):
        norm += key_V[v] * key_V[v]
    norm = max(np.sqrt(norm), np.float32(LEAST_NORM))
    for v in range(width):
        unit_V[v] = key_V[v] / norm
    sharpness = np.float32(1) + max(strength, np.float32(0)) + np.log1p(np.exp(-abs(strength)))
    most = np.float32(-np.inf)
    for s in range(slots):
        dot = np.float32(0)
        for v in range(width):
            dot += unit_V[v] * memory_SV[s, v]
        cosine_S[s] = dot / norm_S[s]
        weight_S[s] = sharpness * cosine_S[s]
        most = max(most, weight_S[s])
    total = np.float32(0)
    for s in range(slots):
        weight_S[s] = np.exp(weight_S[s] - most)
        total += weight_S[s]
    for s in range(slots):
        weight_S[s] /= total
    return norm


_address = numba.njit(fastmath=_FAST)(unwrap(_address_slots))


def _norms_of(memory_SV, norm_S):
    for s in range(memory_SV.shape[0]):
        total = np.float32(0)
        for v in range(memory_SV.shape[1]):
            total += memory_SV[s, v] * memory_SV[s, v]
        norm_S[s] = max(np.sqrt(total), np.float32(LEAST_NORM))


_norms = numba.njit(fastmath=_FAST)(unwrap(_norms_of))


def _write_loop(
    input_LBX, real_LB, by_read_VX, by_hidden_dX, bias_X, heads_dZ, bias_Z,
    hidden_LBd, read_LBV, memory_LBSV, gates_LBY, out_LBZ,
):  # fmt: skip
    length, batch, gates = input_LBX.shape
    d, (slots, width) = gates // 3, memory_LBSV.shape[2:]
    from_read_BX, from_hidden_BX = np.empty((batch, gates), np.float32), np.empty((batch, gates), np.float32)
    unit_V, norm_S, cosine_S = np.empty(width, np.float32), np.empty(slots, np.float32), np.empty(slots, np.float32)
    reads_S, writes_S = np.empty(slots, np.float32), np.empty(slots, np.float32)
    for t in range(length):
        np.dot(read_LBV[t], by_read_VX, from_read_BX)
        np.dot(hidden_LBd[t], by_hidden_dX, from_hidden_BX)
        for b in range(batch):
            if not real_LB[t, b]:
                hidden_LBd[t + 1, b] = hidden_LBd[t, b]
                continue
            for k in range(d):
                reset = _sigmoid(input_LBX[t, b, k] + from_read_BX[b, k] + from_hidden_BX[b, k] + bias_X[k])
                j = d + k
                update = _sigmoid(input_LBX[t, b, j] + from_read_BX[b, j] + from_hidden_BX[b, j] + bias_X[j])
                j += d
                by_state = from_hidden_BX[b, j] + bias_X[j]
                new = np.tanh(input_LBX[t, b, j] + from_read_BX[b, j] + reset * by_state)
                hidden_LBd[t + 1, b, k] = new + update * (hidden_LBd[t, b, k] - new)
                gates_LBY[t, b, k], gates_LBY[t, b, d + k] = reset, update
                gates_LBY[t, b, 2 * d + k], gates_LBY[t, b, 3 * d + k] = new, by_state
        np.dot(hidden_LBd[t + 1], heads_dZ, out_LBZ[t])
        for b in range(batch):
            memory_SV, after_SV, read_V = memory_LBSV[t, b], memory_LBSV[t + 1, b], read_LBV[t + 1, b]
            if not real_LB[t, b]:
                read_V[:], after_SV[:] = read_LBV[t, b], memory_SV
                continue
            out_Z = out_LBZ[t, b]
            for z in range(len(out_Z)):
                out_Z[z] += bias_Z[z]
            _norms(memory_SV, norm_S)
            _address(out_Z[:width], out_Z[4 * width], memory_SV, unit_V, norm_S, cosine_S, reads_S)
            _address(out_Z[width : 2 * width], out_Z[4 * width + 1], memory_SV, unit_V, norm_S, cosine_S, writes_S)
            for v in range(2 * width, 3 * width):
                out_Z[v] = _sigmoid(out_Z[v])
            for v in range(3 * width, 4 * width):
                out_Z[v] = np.tanh(out_Z[v])
            read_V[:] = 0
            for s in range(slots):
                for v in range(width):
                    held = memory_SV[s, v]
                    read_V[v] += reads_S[s] * held
                    after_SV[s, v] = held + writes_S[s] * (out_Z[3 * width + v] - held * out_Z[2 * width + v])


_write_kernel = numba.njit(cache=True, nogil=True, fastmath=_FAST)(unwrap(_write_loop))


def _address_gradient(d_weight_S, weight_S, cosine_S, norm_S, memory_SV, unit_V, norm, strength, d_memory_SV, d_key_V):
    """Adds what comes through one key's weights to d_memory_SV, and fills d_key_V. Gives that of the strength."""
    slots, width = memory_SV.shape
    sharpness = np.float32(1) + max(strength, np.float32(0)) + np.log1p(np.exp(-abs(strength)))
    mean = np.float32(0)
    for s in range(slots):
        mean += weight_S[s] * d_weight_S[s]
    d_key_V[:] = 0
    along, d_sharpness = np.float32(0), np.float32(0)
    for s in range(slots):
        d_logit = weight_S[s] * (d_weight_S[s] - mean)
        d_sharpness += d_logit * cosine_S[s]
        d_cosine = sharpness * d_logit
        along += d_cosine * cosine_S[s]
        by_norm = d_cosine / norm_S[s]
        back = by_norm * cosine_S[s] / norm_S[s]
        for v in range(width):
            d_key_V[v] += by_norm * memory_SV[s, v]
            d_memory_SV[s, v] += by_norm * unit_V[v] - back * memory_SV[s, v]
    for v in range(width):
        d_key_V[v] = (d_key_V[v] - unit_V[v] * along) / norm
    return d_sharpness * _sigmoid(strength)


_address_back = numba.njit(fastmath=_FAST)(unwrap(_address_gradient))


def _gradient_loop(
    real_LB, hidden_LBd, read_LBV, memory_LBSV, gates_LBY, out_LBZ, by_read_XV, by_hidden_Xd, heads_Zd,
    d_hidden_Bd, d_read_BV, d_memory_BSV, d_input_LBX, d_state_LBX, d_out_LBZ,
):  # fmt: skip
    """From the last event back. d_hidden_Bd, d_read_BV, d_memory_BSV: of the state after it, made that of the first."""
    length, batch = real_LB.shape
    d, (slots, width) = hidden_LBd.shape[2], memory_LBSV.shape[2:]
    by_heads_Bd, by_read_BV = np.empty((batch, d), np.float32), np.empty((batch, width), np.float32)
    by_state_Bd = np.empty((batch, d), np.float32)
    norm_S, d_weight_S = np.empty(slots, np.float32), np.empty(slots, np.float32)
    unit_2V, cosine_2S = np.empty((2, width), np.float32), np.empty((2, slots), np.float32)
    weight_2S, d_before_SV = np.empty((2, slots), np.float32), np.empty((slots, width), np.float32)
    for t in range(length - 1, -1, -1):
        for b in range(batch):
            if not real_LB[t, b]:
                continue
            memory_SV, out_Z, d_out_Z = memory_LBSV[t, b], out_LBZ[t, b], d_out_LBZ[t, b]
            d_read_V, d_after_SV = d_read_BV[b], d_memory_BSV[b]
            _norms(memory_SV, norm_S)
            read_norm = _address(
                out_Z[:width], out_Z[4 * width], memory_SV, unit_2V[0], norm_S, cosine_2S[0], weight_2S[0]
            )
            write_norm = _address(
                out_Z[width : 2 * width],
                out_Z[4 * width + 1],
                memory_SV,
                unit_2V[1],
                norm_S,
                cosine_2S[1],
                weight_2S[1],
            )
            erase_V, add_V = out_Z[2 * width : 3 * width], out_Z[3 * width : 4 * width]
            d_erase_V, d_add_V = d_out_Z[2 * width : 3 * width], d_out_Z[3 * width : 4 * width]
            for s in range(slots):
                writes, reads = weight_2S[1, s], weight_2S[0, s]
                d_writes = np.float32(0)
                for v in range(width):
                    held, d_after = memory_SV[s, v], d_after_SV[s, v]
                    d_writes += d_after * (add_V[v] - held * erase_V[v])
                    d_add_V[v] += writes * d_after
                    d_erase_V[v] -= writes * held * d_after
                    d_before_SV[s, v] = d_after * (np.float32(1) - writes * erase_V[v]) + reads * d_read_V[v]
                d_weight_S[s] = d_writes
            d_out_Z[4 * width + 1] = _address_back(
                d_weight_S, weight_2S[1], cosine_2S[1], norm_S, memory_SV, unit_2V[1], write_norm, out_Z[4 * width + 1],
                d_before_SV, d_out_Z[width : 2 * width],
            )  # fmt: skip
            for s in range(slots):
                d_reads = np.float32(0)
                for v in range(width):
                    d_reads += d_read_V[v] * memory_SV[s, v]
                d_weight_S[s] = d_reads
            d_out_Z[4 * width] = _address_back(
                d_weight_S, weight_2S[0], cosine_2S[0], norm_S, memory_SV, unit_2V[0], read_norm, out_Z[4 * width],
                d_before_SV, d_out_Z[:width],
            )  # fmt: skip
            for v in range(width):
                d_erase_V[v] *= erase_V[v] * (np.float32(1) - erase_V[v])
                d_add_V[v] *= np.float32(1) - add_V[v] * add_V[v]
            d_after_SV[:] = d_before_SV
        np.dot(d_out_LBZ[t], heads_Zd, by_heads_Bd)
        for b in range(batch):
            if not real_LB[t, b]:
                continue
            for k in range(d):
                reset, update = gates_LBY[t, b, k], gates_LBY[t, b, d + k]
                new, by_state = gates_LBY[t, b, 2 * d + k], gates_LBY[t, b, 3 * d + k]
                d_hidden = d_hidden_Bd[b, k] + by_heads_Bd[b, k]
                d_new = d_hidden * (np.float32(1) - update) * (np.float32(1) - new * new)
                d_update = d_hidden * (hidden_LBd[t, b, k] - new) * update * (np.float32(1) - update)
                d_reset = d_new * by_state * reset * (np.float32(1) - reset)
                d_hidden_Bd[b, k] = d_hidden * update
                d_input_LBX[t, b, k], d_state_LBX[t, b, k] = d_reset, d_reset
                d_input_LBX[t, b, d + k], d_state_LBX[t, b, d + k] = d_update, d_update
                d_input_LBX[t, b, 2 * d + k], d_state_LBX[t, b, 2 * d + k] = d_new, d_new * reset
        np.dot(d_input_LBX[t], by_read_XV, by_read_BV)
        np.dot(d_state_LBX[t], by_hidden_Xd, by_state_Bd)
        for b in range(batch):
            if not real_LB[t, b]:
                continue
            for v in range(width):
                d_read_BV[b, v] = by_read_BV[b, v]
            for k in range(d):
                d_hidden_Bd[b, k] += by_state_Bd[b, k]


_gradient_kernel = numba.njit(cache=True, nogil=True, fastmath=_FAST)(unwrap(_gradient_loop))
