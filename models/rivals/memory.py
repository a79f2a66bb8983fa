"""A memory written along the history, after MIMN (arXiv 1905.09248): the history in SLOTS vectors, read by candidates.

At each event e_t a controller reads and writes the memory M of the events before (a neural Turing machine):

    h_t = GRU([e_t, r_{t-1}], h_{t-1})              gives keys k and strengths b, an erase and an add vector
    w_i = softmax_i(b cos(k, M_i))                  of the read and of the write key
    r_t = sum_i w^r_i M_i
    M_i <- M_i (1 - w^w_i erase) + w^w_i add        erase by a sigmoid, add by a tanh

Afterwards each candidate reads M by a key of its own. Left out of MIMN: memory utilisation regularisation and the
memory induction unit. Order matters, time does not enter. An event of no positive weight changes nothing.

Shapes: as in `models.ranker`; S slots, N keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from models.ranker import Shape
from models.rivals.events import item_vectors
from models.rivals.memory_kernels import Write

SLOTS = 8
# In training, a longer history is gone along once more in the backward pass, CHUNK events at a time: else the states
# of every event would be held at once.
CHUNK = 1024


class State(NamedTuple):
    """What the controller carries from event to event."""

    hidden_Bd: torch.Tensor
    read_BV: torch.Tensor
    memory_BSV: torch.Tensor


class MemoryHistory(nn.Module):
    """SLOTS vectors that a recurrent controller writes, whatever the length of the history."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width, self.values = shape.sizes.width, shape.sizes.heads * shape.sizes.value_width
        self.action = nn.Embedding(shape.actions, width)
        self.controller = nn.GRUCell(width + self.values, width)
        # Read key, write key, erase, add; the strengths of both keys.
        self.heads = nn.Linear(width, 4 * self.values + 2)
        self.first_SV = nn.Parameter(torch.randn(SLOTS, self.values) * self.values**-0.5)
        self.query = nn.Linear(width, self.values + 1)

    def user_bytes(self, length: int) -> int:
        """The controller's state as float32, whatever the length."""
        return 4 * (SLOTS * self.values + self.values + self.controller.hidden_size)

    def forward(self, candidate_BCd, encoder, request):
        history = request.history
        event_BLd = item_vectors(encoder, history.item_BL) + self.action(history.action_BL)
        memory_BSV = self._write(event_BLd, history.weight_BL > 0)
        key_BCV, strength_BC1 = self.query(candidate_BCd).split([self.values, 1], dim=-1)
        weight_BCS = _address(memory_BSV, key_BCV, strength_BC1)
        return weight_BCS @ memory_BSV, candidate_BCd.new_zeros(())

    def _write(self, event_BLd: torch.Tensor, real_BL: torch.Tensor) -> torch.Tensor:
        """The memory after the last event."""
        batch, length, width = event_BLd.shape
        state = State(
            event_BLd.new_zeros(batch, width),
            event_BLd.new_zeros(batch, self.values),
            self.first_SV.expand(batch, -1, -1),
        )
        along = self._along_compiled if event_BLd.device.type == "cpu" else self._along
        for start in range(0, length, CHUNK):
            part = event_BLd[:, start : start + CHUNK], real_BL[:, start : start + CHUNK], *state
            if start + CHUNK < length:
                state = State(*checkpoint(along, *part, use_reentrant=False, preserve_rng_state=False))
            else:
                state = along(*part)
        return state.memory_BSV

    def _along_compiled(self, event_BLd, real_BL, hidden_Bd, read_BV, memory_BSV) -> State:
        """`_along`, in one call."""
        by_event_Xd, by_read_XV = self.controller.weight_ih.split([event_BLd.shape[2], self.values], dim=1)
        input_LBX = functional.linear(event_BLd.transpose(0, 1), by_event_Xd, self.controller.bias_ih)
        weights = (
            by_read_XV.T,
            self.controller.weight_hh.T,
            self.controller.bias_hh,
            self.heads.weight.T,
            self.heads.bias,
        )
        return State(*Write.apply(input_LBX, real_BL.T, hidden_Bd, read_BV, memory_BSV, *weights))

    def _along(self, event_BLd, real_BL, hidden_Bd, read_BV, memory_BSV) -> State:
        """The state after these events."""
        state = State(hidden_Bd, read_BV, memory_BSV)
        for event_Bd, real_B in zip(event_BLd.unbind(1), real_BL.unbind(1), strict=True):
            moved = self._step(event_Bd, state)
            state = State(
                torch.where(real_B[:, None], moved.hidden_Bd, state.hidden_Bd),
                torch.where(real_B[:, None], moved.read_BV, state.read_BV),
                torch.where(real_B[:, None, None], moved.memory_BSV, state.memory_BSV),
            )
        return state

    def _step(self, event_Bd: torch.Tensor, state: State) -> State:
        hidden_Bd = self.controller(torch.cat([event_Bd, state.read_BV], dim=1), state.hidden_Bd)
        keys_B2V, erase_BV, add_BV, strength_B2 = self._heads(hidden_Bd)
        read_BS, write_BS = _address(state.memory_BSV, keys_B2V, strength_B2[..., None]).unbind(1)
        kept_BSV = state.memory_BSV * (1 - write_BS[..., None] * erase_BV[:, None, :])
        return State(
            hidden_Bd,
            torch.einsum("bs,bsv->bv", read_BS, state.memory_BSV),
            kept_BSV + write_BS[..., None] * add_BV[:, None, :],
        )

    def _heads(self, hidden_Bd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        sizes = [2 * self.values, self.values, self.values, 2]
        keys_BX, erase_BV, add_BV, strength_B2 = self.heads(hidden_Bd).split(sizes, dim=1)
        return keys_BX.unflatten(1, (2, -1)), erase_BV.sigmoid(), add_BV.tanh(), strength_B2


def _address(memory_BSV: torch.Tensor, key_BNV: torch.Tensor, strength_BN1: torch.Tensor) -> torch.Tensor:
    """How much of each slot each key takes, B N S: a softmax of cosines, sharper with 1 + softplus(strength)."""
    cosine_BNS = functional.normalize(key_BNV, dim=-1) @ functional.normalize(memory_BSV, dim=-1).transpose(1, 2)
    return torch.softmax((1 + functional.softplus(strength_BN1)) * cosine_BNS, dim=-1)
