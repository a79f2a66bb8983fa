"""Timelines read in chunks give what attention over each impression's own events gives, and the same gradients."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from models.attention import Kernel, read_history
from models.cache import CacheSpec, EncodedEvents, empty, fold
from models.chunked import read_timelines
from models.states import Impressions, Marks, States, Timelines, value_sums
from tests.small import HOUR_MS, START_MS

HEADS, GROUPS, CODEWORDS, KEY, VALUE, CANDIDATES = 4, 2, 6, 5, 3, 3
# Three timelines, one without impressions in the middle of it all; impressions at their ends and before any event.
LENGTHS = (200, 40, 90)
ENDS = ((200, 3, 64, 65, 127, 128, 200), (), (90, 0, 1, 7, 50))


@dataclass(frozen=True, kw_only=True)
class Case:
    """Leaves (float64, with gradients) and what is known of events and impressions."""

    key_MHE: torch.Tensor
    value_MHD: torch.Tensor
    query_BCHE: torch.Tensor
    log_weight_HR: torch.Tensor
    rate_HR: torch.Tensor
    codeword_HKE: torch.Tensor
    code_MG: torch.Tensor
    time_ms_M: torch.Tensor
    weight_M: torch.Tensor
    first_B: torch.Tensor
    end_B: torch.Tensor
    now_ms_B: torch.Tensor

    @property
    def leaves(self) -> tuple[torch.Tensor, ...]:
        return self.key_MHE, self.value_MHD, self.query_BCHE, self.log_weight_HR

    @property
    def code_MH(self) -> torch.Tensor:
        return self.code_MG.repeat_interleave(HEADS // GROUPS, dim=1)

    @property
    def straight_MHE(self) -> torch.Tensor:
        codeword = self.codeword_HKE[torch.arange(HEADS), self.code_MH]
        return self.key_MHE + (codeword - self.key_MHE).detach()

    @property
    def kernel(self) -> Kernel:
        return Kernel(log_weight_HR=self.log_weight_HR, rate_HR=self.rate_HR)


def case(rates: int, seed: int = 0, wait_ms: int = HOUR_MS) -> Case:
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    half_life = HOUR_MS * 8.0 ** np.arange(HEADS * rates).reshape(HEADS, rates)
    half_life[-1, 0] = np.inf
    first_U = np.r_[0, np.cumsum(LENGTHS)[:-1]]
    time_ms = np.concatenate([np.sort(START_MS + rng.integers(0, 300 * HOUR_MS, n)) for n in LENGTHS])
    first = np.concatenate([np.full(len(ends), f) for f, ends in zip(first_U, ENDS, strict=True)])
    end = first + np.concatenate([np.array(ends, int) for ends in ENDS])
    newest = time_ms[np.maximum(end - 1, 0)]

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    return Case(
        key_MHE=leaf(len(time_ms), HEADS, KEY),
        value_MHD=leaf(len(time_ms), HEADS, VALUE),
        query_BCHE=leaf(len(end), CANDIDATES, HEADS, KEY),
        log_weight_HR=leaf(HEADS, rates),
        rate_HR=torch.from_numpy(np.log(2) / half_life),
        codeword_HKE=torch.randn(HEADS, CODEWORDS, KEY, dtype=torch.float64),
        code_MG=torch.from_numpy(rng.integers(0, CODEWORDS, (len(time_ms), GROUPS))),
        time_ms_M=torch.from_numpy(time_ms),
        weight_M=torch.from_numpy(rng.uniform(0.5, 2, len(time_ms))),
        first_B=torch.from_numpy(first),
        end_B=torch.from_numpy(end),
        now_ms_B=torch.from_numpy(newest + wait_ms + rng.integers(0, 5 * HOUR_MS, len(end))),
    )


def chunked(of: Case, chunk: int) -> torch.Tensor:
    return read_timelines(asked(of), events(of), of.codeword_HKE, of.kernel, chunk).out_BCHD


def asked(of: Case) -> Impressions:
    return Impressions(query_BCHE=of.query_BCHE, first_B=of.first_B, end_B=of.end_B, now_ms_B=of.now_ms_B)


def events(of: Case) -> Timelines:
    return Timelines(
        key_MHE=of.straight_MHE,
        code_MH=of.code_MH,
        value_MHD=of.value_MHD,
        time_ms_M=of.time_ms_M,
        weight_M=of.weight_M,
    )


def one_by_one(of: Case) -> torch.Tensor:
    """The plain twin: each impression's attention over its own events, in float64 throughout."""
    out = []
    for b, (first, end) in enumerate(zip(of.first_B.tolist(), of.end_B.tolist(), strict=True)):
        age_L = (of.now_ms_B[b] - of.time_ms_M[first:end]).double()
        kappa_HL = (of.log_weight_HR.exp()[..., None] * torch.exp(-of.rate_HR[..., None] * age_L)).sum(dim=1)
        bias_HL = (kappa_HL * of.weight_M[first:end]).log()
        if first == end:
            out.append(torch.zeros(1, CANDIDATES, HEADS, VALUE, dtype=torch.float64))
            continue
        key, value = of.straight_MHE[None, first:end], of.value_MHD[None, first:end]
        out.append(read_history(of.query_BCHE[b : b + 1], key, value, bias_HL[None]))
    return torch.cat(out)


@pytest.mark.parametrize("rates", [1, 2])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_the_mass_is_that_of_all_events_before(chunk, rates):
    of = case(rates)
    found = read_timelines(asked(of), events(of), of.codeword_HKE, of.kernel, chunk).log_mass_BH
    assert not found.requires_grad
    for b, (first, end) in enumerate(zip(of.first_B.tolist(), of.end_B.tolist(), strict=True)):
        age_L = (of.now_ms_B[b] - of.time_ms_M[first:end]).double()
        kappa_HL = (of.log_weight_HR.exp()[..., None] * torch.exp(-of.rate_HR[..., None] * age_L)).sum(dim=1)
        wanted_H = (kappa_HL * of.weight_M[first:end]).sum(dim=1).detach()
        torch.testing.assert_close(found[b].exp(), wanted_H, rtol=1e-9, atol=1e-12)


def gradients(of: Case, out: torch.Tensor) -> list[torch.Tensor]:
    target = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(9))
    return list(torch.autograd.grad((out * target).sum() + out.square().sum(), of.leaves))


@pytest.mark.parametrize("rates", [1, 2])
@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_values_and_gradients_are_those_of_attention_over_the_raw_events(chunk, rates):
    of = case(rates)
    found, wanted = chunked(of, chunk), one_by_one(of)
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-10)
    for name, a, b in zip(
        ("key", "value", "query", "kernel"), gradients(of, found), gradients(of, wanted), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-9, msg=name)
        # With one rate the kernel's weight cancels in the softmax.
        assert b.abs().max() > 1e-3 or (name, rates) == ("kernel", 1)


def test_keys_deep_in_the_past_have_a_gradient_of_their_own():
    of = case(1)
    key, *_ = gradients(of, chunked(of, 64))
    assert key[:60].abs().amax(dim=(1, 2)).min() > 0
    # No impression sees the second timeline.
    assert key[200:240].abs().max() == 0


def test_events_that_no_impression_sees_change_nothing():
    of = case(2)
    last = replace(of, end_B=of.end_B - (of.end_B == 200).long() * 20)
    other = replace(last, value_MHD=of.value_MHD.detach().index_fill(0, torch.arange(180, 240), 1e6).requires_grad_())
    assert torch.equal(chunked(last, 64), chunked(other, 64))
    assert not torch.equal(chunked(of, 64), chunked(replace(of, value_MHD=other.value_MHD), 64))


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_years_of_silence_neither_overflow_nor_disturb(chunk):
    of = case(2, wait_ms=50_000 * 24 * HOUR_MS)
    found, far = chunked(of, chunk), chunked(of, 1000)
    # The logs are a million in size: so many digits are gone.
    torch.testing.assert_close(found, far, atol=1e-9, rtol=1e-8)
    assert all(g.isfinite().all() for g in gradients(of, found))


@pytest.mark.parametrize("rates", [1, 2])
def test_a_kept_state_is_the_cache_of_the_events_before_it(rates):
    of = case(rates)
    marks = Marks.of(asked(of), 7)
    with torch.no_grad():
        states = States.of(events(of), marks, of.rate_HR, CODEWORDS)
        sums = value_sums(of.value_MHD.float(), states)
    spec = CacheSpec(
        checkpoint_id="ab" * 16, groups=GROUPS, codewords=CODEWORDS, value_width=VALUE, rate_HR=of.rate_HR.numpy()
    )
    starts = np.r_[0, np.cumsum(LENGTHS)[:-1]]
    for p, place in enumerate(marks.place_P.tolist()):
        seen = slice(int(starts[starts < place].max()), place)
        cache = fold(
            empty(spec),
            EncodedEvents(
                code_NG=of.code_MG[seen].numpy().astype(np.uint16),
                value_NHD=of.value_MHD[seen].detach().numpy().astype(np.float32),
                time_ms_N=of.time_ms_M[seen].numpy(),
                weight_N=of.weight_M[seen].numpy().astype(np.float32),
            ),
        )
        assert cache.reference_ms == states.time_ms_P[p]
        code_N = cache.code_N.astype(int)
        mass_NPR = states.mass_PHKR[p].unflatten(0, (GROUPS, -1)).transpose(1, 2).flatten(0, 1)[code_N]
        sum_NPRD = sums[p].unflatten(0, (GROUPS, -1)).transpose(1, 2).flatten(0, 1)[code_N]
        np.testing.assert_allclose(mass_NPR.numpy(), cache.mass_NPR, rtol=1e-6)
        np.testing.assert_allclose((sum_NPRD / mass_NPR[..., None]).numpy(), cache.mean_NPRD, rtol=1e-4, atol=1e-5)
        assert int((states.mass_PHKR[p] > 0).sum()) == int((cache.mass_NPR > 0).sum())
