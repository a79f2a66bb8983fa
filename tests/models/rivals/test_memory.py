import numpy as np
import torch

from models.request import collate
from models.rivals import memory
from tests.models.rivals.small_rival import asked, parameters, sigmoid, softmax, vectors
from tests.models.test_ranker import impressions, new_ranker


def address(slots: np.ndarray, key: np.ndarray, strength: float) -> np.ndarray:
    cosine = slots @ key / np.linalg.norm(slots, axis=1) / np.linalg.norm(key)
    return softmax((1 + np.log1p(np.exp(strength))) * cosine)


def gru(p: dict[str, np.ndarray], x: np.ndarray, h: np.ndarray) -> np.ndarray:
    """torch.nn.GRUCell, by its documentation."""
    by_input = np.split(p["controller.weight_ih"] @ x + p["controller.bias_ih"], 3)
    by_state = np.split(p["controller.weight_hh"] @ h + p["controller.bias_hh"], 3)
    reset, update = sigmoid(by_input[0] + by_state[0]), sigmoid(by_input[1] + by_state[1])
    return (1 - update) * np.tanh(by_input[2] + reset * by_state[2]) + update * h


def test_the_memory_is_written_and_read_as_a_turing_machine(tmp_path):
    """M_i <- M_i (1 - w_i erase) + w_i add after each event; a candidate reads sum_i w_i M_i."""
    ranker, one, seen = asked(tmp_path, "memory")
    p = parameters(ranker)
    slots, read, hidden = p["first_SV"], np.zeros(16), np.zeros(8)
    for x, action in zip(vectors(ranker, one.item_L), one.action_L, strict=True):
        hidden = gru(p, np.concatenate([x + p["action.weight"][action], read]), hidden)
        out = p["heads.weight"] @ hidden + p["heads.bias"]
        read_key, write_key, erase, add, strengths = np.split(out, [16, 32, 48, 64])
        read = address(slots, read_key, strengths[0]) @ slots
        written = address(slots, write_key, strengths[1])
        slots = slots * (1 - np.outer(written, sigmoid(erase))) + np.outer(written, np.tanh(add))
    for c, target in enumerate(vectors(ranker, one.candidate_C)):
        key = p["query.weight"] @ target + p["query.bias"]
        np.testing.assert_allclose(seen[c], address(slots, key[:16], key[16]) @ slots, atol=1e-5)


def test_chunks_change_neither_what_is_read_nor_the_gradients(tmp_path, monkeypatch):
    found = []
    for chunk in (512, 4):
        monkeypatch.setattr(memory, "CHUNK", chunk)
        ranker, request = new_ranker("memory"), collate(impressions(tmp_path)[:6])
        seen, _ = ranker.history(ranker.encoder(request.candidate_BC), ranker.encoder, request)
        seen.square().sum().backward()
        found.append([seen.detach(), *(parameter.grad for parameter in ranker.history.parameters())])
    assert request.history.item_BL.shape[1] > 8
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(whole, parts)


def test_the_compiled_writing_and_its_gradients_are_the_plain_ones():
    history = new_ranker("memory").history
    batch, length, width = 5, 40, history.controller.hidden_size
    sizes = [(batch, length, width), (batch, width), (batch, history.values), (batch, memory.SLOTS, history.values)]
    real_BL = torch.rand(batch, length) > 0.2
    found = []
    for along in (history._along, history._along_compiled):
        torch.manual_seed(1)
        event_BLd, *state = (torch.randn(size, requires_grad=True) for size in sizes)
        history.zero_grad()
        after = along(event_BLd, real_BL, *state)
        sum((n + 1) * part.square().sum() for n, part in enumerate(after)).backward()
        written = [*history.controller.parameters(), *history.heads.parameters()]
        found.append([*after, *(part.grad for part in (event_BLd, *state, *written))])
    for plain, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-4)
