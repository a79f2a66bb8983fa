import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.attention import CacheBatch, Kernel, history_bias, read, read_history
from models.cache import CacheSpec, EncodedEvents, delta, fold
from tests.small import HOUR_MS, START_MS

DAY_MS = 24 * HOUR_MS


def spec_of(groups: int, heads: int, rates: int) -> CacheSpec:
    half_life = HOUR_MS * 4.0 ** np.arange(heads * rates).reshape(heads, rates)
    half_life[-1, 0] = np.inf
    return CacheSpec(checkpoint_id="ab" * 16, groups=groups, codewords=6, value_width=3, rate_HR=np.log(2) / half_life)


def random_history(spec: CacheSpec, count: int, seed: int, span_ms: int = 30 * DAY_MS) -> EncodedEvents:
    rng = np.random.default_rng(seed)
    return EncodedEvents(
        code_NG=rng.integers(0, spec.codewords, (count, spec.groups)).astype(np.uint16),
        value_NHD=rng.normal(size=(count, spec.heads, spec.value_width)).astype(np.float32),
        time_ms_N=START_MS + rng.integers(0, span_ms, count),
        weight_N=rng.uniform(0.5, 2, count).astype(np.float32),
    )


def both_ways(
    spec: CacheSpec, events: EncodedEvents, now_ms: int, seed: int = 0, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(read from the cache, attention over the raw history) for four candidates of one user."""
    torch.manual_seed(seed)
    heads, width, per_group = spec.heads, 5, spec.heads // spec.groups
    query = temperature * torch.randn(1, 4, heads, width)
    codeword = torch.randn(heads, spec.codewords, width)
    kernel = Kernel(log_weight_HR=torch.randn(heads, spec.rates), rate_HR=torch.from_numpy(spec.rate_HR))
    now = torch.tensor([now_ms])
    cached = read(query, codeword, CacheBatch.of(spec, [delta(spec, events)]), kernel, now)
    head_code = torch.from_numpy(events.code_NG.astype(np.int64)).repeat_interleave(per_group, dim=1)
    key = codeword[torch.arange(heads), head_code][None]
    bias = history_bias(kernel, torch.from_numpy(events.time_ms_N)[None], torch.from_numpy(events.weight_N)[None], now)
    return cached, read_history(query, key, torch.from_numpy(events.value_NHD)[None], bias)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from([(1, 1, 1), (1, 4, 1), (2, 4, 1), (4, 4, 1), (2, 4, 3), (4, 4, 2)]),
    count=st.integers(1, 200),
    wait_days=st.integers(0, 4000),
    seed=st.integers(0, 2**20),
)
def test_the_cache_reads_as_attention_over_the_raw_history(shape, count, wait_days, seed):
    spec = spec_of(*shape)
    events = random_history(spec, count, seed)
    cached, raw = both_ways(spec, events, int(events.time_ms_N.max()) + wait_days * DAY_MS, seed)
    torch.testing.assert_close(cached, raw, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("temperature", [6.0, 100.0])
@pytest.mark.parametrize("seed", range(10))
def test_logits_beyond_the_reach_of_a_plain_exponential_read_alike(temperature, seed):
    spec = spec_of(2, 4, 1)
    # Nothing vanishes from the cache in an hour: logits of hundreds would raise it again in the raw history.
    events = random_history(spec, 100, seed, span_ms=HOUR_MS)
    cached, raw = both_ways(spec, events, START_MS + HOUR_MS, seed, temperature)
    # float32 resolves 3e-5 in a logit of 500.
    torch.testing.assert_close(cached, raw, atol=2e-6 * temperature, rtol=0)


def test_the_comparison_can_fail():
    spec = spec_of(2, 4, 1)
    events = random_history(spec, 50, 1)
    cached, _ = both_ways(spec, events, START_MS + 40 * DAY_MS)
    other = EncodedEvents(
        code_NG=events.code_NG[:-1],
        value_NHD=events.value_NHD[:-1],
        time_ms_N=events.time_ms_N[:-1],
        weight_N=events.weight_N[:-1],
    )
    _, raw = both_ways(spec, other, START_MS + 40 * DAY_MS)
    assert (cached - raw).abs().max() > 1e-3


def test_waiting_changes_nothing_where_each_head_has_one_rate():
    spec = spec_of(2, 4, 1)
    events = random_history(spec, 80, 2)
    soon, _ = both_ways(spec, events, START_MS + 31 * DAY_MS)
    late, _ = both_ways(spec, events, START_MS + 9000 * DAY_MS)
    torch.testing.assert_close(soon, late, atol=1e-6, rtol=1e-6)


def test_an_event_a_hundred_half_lives_old_neither_overflows_nor_disturbs():
    spec = spec_of(4, 4, 1)
    events = random_history(spec, 40, 3, span_ms=20_000 * DAY_MS)
    cached, raw = both_ways(spec, events, int(events.time_ms_N.max()))
    assert torch.isfinite(cached).all()
    torch.testing.assert_close(cached, raw, atol=1e-5, rtol=1e-5)


def test_an_absent_user_reads_zeros_and_does_not_disturb_the_others():
    spec = spec_of(2, 4, 1)
    caches = [delta(spec, random_history(spec, 30, s)) for s in (1, 2)]
    query, codeword = torch.randn(3, 2, 4, 5), torch.randn(4, 6, 5)
    kernel = Kernel(log_weight_HR=torch.zeros(4, 1), rate_HR=torch.from_numpy(spec.rate_HR))
    now = torch.full((3,), START_MS + 40 * DAY_MS)
    out = read(query, codeword, CacheBatch.of(spec, [caches[0], None, caches[1]]), kernel, now)
    alone = read(query[2:], codeword, CacheBatch.of(spec, [caches[1]]), kernel, now[2:])
    assert out[1].abs().max() == 0
    assert torch.equal(out[2], alone[0])


def test_a_retracted_event_is_as_if_it_never_was():
    spec = spec_of(2, 4, 1)
    kept, gone = random_history(spec, 20, 4), random_history(spec, 1, 5)
    undone = EncodedEvents(
        code_NG=gone.code_NG, value_NHD=gone.value_NHD, time_ms_N=gone.time_ms_N, weight_N=-gone.weight_N
    )
    cache = fold(fold(delta(spec, kept), gone), undone)
    kernel = Kernel(log_weight_HR=torch.zeros(4, 1), rate_HR=torch.from_numpy(spec.rate_HR))
    query, codeword = torch.randn(1, 2, 4, 5), torch.randn(4, 6, 5)
    now = torch.tensor([START_MS + 60 * DAY_MS])
    after = read(query, codeword, CacheBatch.of(spec, [cache]), kernel, now)
    before = read(query, codeword, CacheBatch.of(spec, [delta(spec, kept)]), kernel, now)
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)


def test_an_unmatched_retraction_reads_as_an_empty_codeword():
    spec = spec_of(2, 4, 1)
    lone = random_history(spec, 1, 6)
    negative = EncodedEvents(
        code_NG=lone.code_NG, value_NHD=lone.value_NHD, time_ms_N=lone.time_ms_N, weight_N=-lone.weight_N
    )
    kernel = Kernel(log_weight_HR=torch.zeros(4, 1), rate_HR=torch.from_numpy(spec.rate_HR))
    batch = CacheBatch.of(spec, [delta(spec, negative)])
    out = read(torch.randn(1, 2, 4, 5), torch.randn(4, 6, 5), batch, kernel, torch.tensor([START_MS]))
    assert out.abs().max() == 0


@pytest.mark.parametrize("rates", [1, 3])
def test_gradients_reach_the_kernel(rates):
    spec = spec_of(2, 4, rates)
    events = random_history(spec, 30, 7)
    log_weight = torch.zeros(4, rates, requires_grad=True)
    kernel = Kernel(log_weight_HR=log_weight, rate_HR=torch.from_numpy(spec.rate_HR))
    bias = history_bias(
        kernel,
        torch.from_numpy(events.time_ms_N)[None],
        torch.from_numpy(events.weight_N)[None],
        torch.tensor([START_MS + 31 * DAY_MS]),
    )
    read_history(torch.randn(1, 2, 4, 5), torch.randn(1, 30, 4, 5), torch.randn(1, 30, 4, 3), bias).sum().backward()
    gradient = log_weight.grad
    assert gradient is not None
    assert torch.isfinite(gradient).all()
    # With one rate the weight cancels in the softmax; with several, their mix is learned.
    assert (gradient.abs().max() > 1e-6) == (rates > 1)
