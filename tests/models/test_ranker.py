from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from msgspec import structs
from torch.nn.functional import pad

from models.attention import CacheBatch, log_mass_at, read_counts
from models.cache import CacheSpec, EncodedEvents, empty, fold
from models.counts import CountedEvents, CountPlan
from models.counts import fold as fold_counts
from models.item_context import Context, Tags
from models.ranker import Ranker, Shape, VqlHistory, loss
from models.request import History, collate, collate_timelines, counted
from models.rivals import HISTORIES
from models.timelines import impressions_of, timeline_files, timelines_of
from tests.small import HOUR_MS
from tests.small_examples import CATEGORIES, ITEMS, SIZES, cell_table, feature_table, write_small_examples

LIVES: dict[int, list[list[float | None]]] = {
    1: [[float(HOUR_MS)], [24.0 * HOUR_MS], [168.0 * HOUR_MS], [None]],
    2: [[float(HOUR_MS), None], [24.0 * HOUR_MS, 1.0], [168.0 * HOUR_MS, 9e9], [None, float(HOUR_MS)]],
}

COUNTING = CountPlan(fields=["item_id", "category"], half_life_ms=[float(HOUR_MS), None])


def new_ranker(model: str = "vql", rates: int = 1, counting: CountPlan | None = None, newest: int = 0) -> Ranker:
    """newest: the events of its window."""
    torch.manual_seed(3)
    shape = Shape(
        sizes=structs.replace(SIZES, window=64, newest=newest),
        half_life_ms=LIVES[rates],
        actions=2,
        field_rows=[ITEMS + 1, CATEGORIES + 1],
        counting=counting,
    )
    cells = None if counting is None else cell_table(counting)
    ranker = Ranker(shape, torch.from_numpy(feature_table()), HISTORIES[model](shape), cells).eval()
    if isinstance(ranker.history, VqlHistory):
        keys, _ = ranker.history.grouped_keys(ranker.encoder, torch.arange(ITEMS + 1))
        ranker.history.codebook.start(keys, torch.Generator().manual_seed(0))
        torch.nn.init.normal_(ranker.history.action_value_AHD)
        torch.nn.init.normal_(ranker.history.kernel.raw_HR)
    return ranker


CONTEXT = Context(numbers={"price": [1.0, 2.0]}, tags={"tags": Tags(known=9, most=3)}, vectors={"image": 2, "text": 3})


def context_ranker(model: str = "vql") -> Ranker:
    """Whose items also have a number, up to three tags, and two vectors, or lack some of these."""
    torch.manual_seed(3)
    rng = np.random.default_rng(3)
    row_MC = np.c_[rng.integers(0, 4, ITEMS + 1), rng.integers(0, 10, (ITEMS + 1, 3))]
    row_MC[0] = 0
    shape = Shape(
        sizes=structs.replace(SIZES, window=64, newest=7),
        half_life_ms=LIVES[1],
        actions=2,
        field_rows=[ITEMS + 1, CATEGORIES + 1],
        context=CONTEXT,
    )
    ranker = Ranker(shape, torch.from_numpy(np.c_[feature_table(), row_MC]), HISTORIES[model](shape))
    vector_MP = rng.normal(size=(ITEMS + 1, 5)).astype(np.float32)
    vector_MP[[0, 5]] = np.nan
    vector_MP[9, :2] = np.nan
    ranker.encoder.vectors.hold(torch.from_numpy(vector_MP))
    ranker.encoder.vectors.standardise()
    return ranker


def impressions(folder):
    return [i for f in timeline_files(write_small_examples(folder)) for i in impressions_of(f)]


def new_spec(rates: int) -> CacheSpec:
    half_life = np.array([[np.inf if h is None else h for h in row] for row in LIVES[rates]])
    return CacheSpec(
        checkpoint_id="cd" * 16,
        groups=SIZES.groups,
        codewords=SIZES.codewords,
        value_width=SIZES.value_width,
        rate_HR=np.log(2) / half_life,
    )


def caches_of(ranker: Ranker, batch, rates: int) -> CacheBatch:
    """The caches of the impressions' histories, through the item table's arithmetic."""
    history, spec = ranker.history, new_spec(rates)
    caches, counts = [], []
    for i in batch:
        item_L = torch.from_numpy(i.item_L.astype(np.int64))
        x = ranker.encoder(item_L)
        value = history.values(x) + history.action_value_AHD[torch.from_numpy(i.action_L.astype(np.int64))]
        events = EncodedEvents(
            code_NG=history.codes(x, ranker.encoder.feature_MF[item_L]).numpy().astype(np.uint16),
            value_NHD=value.numpy(),
            time_ms_N=i.time_ms_L,
            weight_N=i.weight_L,
        )
        caches.append(fold(empty(spec), events))
        if ranker.counting is not None:
            counted = CountedEvents(
                cell_NQ=cell_table(ranker.counting)[i.item_L], time_ms_N=i.time_ms_L, weight_N=i.weight_L
            )
            counts.append(fold_counts(empty(ranker.counting.spec(spec.checkpoint_id)), counted))
    newest = collate(batch, history.sizes.newest).history if history.sizes.newest else None
    return CacheBatch.of(spec, caches, counts or None, newest and widened(newest, history.sizes.newest))


def widened(history: History, length: int) -> History:
    """With so many columns, by more padding on the left."""
    columns = {field.name: getattr(history, field.name) for field in fields(history)}
    return History(**{name: pad(column, (length - column.shape[1], 0)) for name, column in columns.items()})


@pytest.mark.parametrize("newest", [7, 50])
@pytest.mark.parametrize("chunk", [1, 3, 64])
@torch.inference_mode()
def test_with_two_rates_a_head_the_serving_form_scores_as_training_does(tmp_path, monkeypatch, chunk, newest):
    """As `tests/jobs/test_ablation_parity.py` shows of all that a study trains: one rate a head."""
    monkeypatch.setattr("models.ranker.CHUNK", chunk)
    ranker = new_ranker(rates=2, counting=COUNTING, newest=newest)
    timelines = timelines_of(timeline_files(write_small_examples(tmp_path))[0])
    shared = collate_timelines(timelines, counted(timelines, ranker.counter))
    trained, _ = ranker(shared)
    apart = [i for t in timelines for i in t.impressions()]
    cached = ranker.from_cache(shared.candidate_BC, caches_of(ranker, apart, 2), shared.now_ms_B)
    raw, _ = ranker(collate(apart, counts=counted(apart, ranker.counter)))
    torch.testing.assert_close(cached, trained, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(cached, raw, atol=1e-5, rtol=1e-5)
    one_short, _ = ranker(replace(shared, end_B=shared.end_B - 1))
    assert (one_short - cached).abs().max() > 1e-4


@pytest.mark.parametrize("newest", [0, 7])
@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_timelines_have_the_gradients_of_raw_histories(tmp_path, monkeypatch, chunk, newest):
    monkeypatch.setattr("models.ranker.CHUNK", chunk)
    timelines = timelines_of(timeline_files(write_small_examples(tmp_path))[0])
    found = []
    for request in (collate_timelines(timelines), collate([i for t in timelines for i in t.impressions()])):
        ranker = new_ranker(rates=2, newest=newest)
        logit, _ = ranker(request)
        loss(logit, request.label_BC).backward()
        found.append({name: p.grad.to_dense() for name, p in ranker.named_parameters() if p.grad is not None})
    shared, alone = found
    assert shared.keys() == alone.keys() >= {"history.key.weight", "history.kernel.raw_HR", "encoder.fields.0.weight"}
    for name, gradient in alone.items():
        torch.testing.assert_close(shared[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


@torch.inference_mode()
def test_counts_of_rows_are_those_of_histories_of_any_length(tmp_path):
    ranker, batch = new_ranker(counting=COUNTING), impressions(tmp_path)[:50]
    request = collate(batch, 3, counted(batch, ranker.counter))
    cells = ranker.cell_MQ[request.candidate_BC]
    found = read_counts(cells, caches_of(ranker, batch, 1), ranker.count_rate_R, request.now_ms_B)
    torch.testing.assert_close(found, request.count_BCX, rtol=1e-6, atol=0)
    assert (found > 0).any(dim=1).any(dim=0).all()
    assert (found[..., 1] == 0).any()


@torch.inference_mode()
def test_a_score_depends_on_the_counts_and_is_not_given_without_them(tmp_path):
    batch = impressions(tmp_path)[:8]
    for model in HISTORIES:
        ranker = new_ranker(model, counting=COUNTING)
        request = collate(batch, counts=counted(batch, ranker.counter))
        more = replace(request, count_BCX=request.count_BCX + 1)
        assert (ranker(request)[0] - ranker(more)[0]).abs().max() > 1e-4
        with pytest.raises(ValueError, match="0 counts for a head of 4"):
            ranker(collate(batch))
    assert new_ranker().counter is None


@torch.inference_mode()
def test_the_head_sees_logs_of_counts_of_mean_0_and_deviation_1():
    ranker = new_ranker(counting=COUNTING)
    rng = np.random.default_rng(0)
    count_NX = torch.from_numpy(rng.gamma(0.5, [0.1, 3.0, 50.0, 1.0], (400, 4)).astype(np.float32))
    count_NX[:, 3] = 2.0
    ranker.standardise_counts(count_NX)
    seen: list[torch.Tensor] = []
    ranker.head.register_forward_pre_hook(lambda _, given: seen.append(given[0][..., -4:]))
    width = SIZES.heads * (SIZES.value_width + 1)
    ranker.logits(torch.zeros(1, 400, SIZES.width), torch.zeros(1, 400, width), count_NX[None])
    np.testing.assert_allclose(seen[0][0].mean(dim=0), 0, atol=1e-5)
    np.testing.assert_allclose(seen[0][0, :, :3].std(dim=0, correction=0), 1, rtol=1e-4)
    # What is the same of all candidates stays so, and finite.
    np.testing.assert_allclose(seen[0][0, :, 3], 0, atol=1e-5)


@pytest.mark.parametrize("model", ["vql", "full"])
@torch.inference_mode()
def test_the_head_is_told_how_much_there_was_to_see(tmp_path, model):
    """Twice the same history looks the same to a softmax."""
    ranker, request = new_ranker(model), collate(impressions(tmp_path)[:20])
    twice = replace(request, history=replace(request.history, weight_BL=2 * request.history.weight_BL))
    x_BCd, width = ranker.encoder(request.candidate_BC), SIZES.heads * SIZES.value_width
    once, more = (ranker.history(x_BCd, ranker.encoder, each)[0] for each in (request, twice))
    torch.testing.assert_close(more[..., :width], once[..., :width], atol=1e-6, rtol=1e-5)
    # The last head never forgets.
    kernel = (ranker.history if model == "vql" else ranker.history.attention).kernel()
    mass_B = kernel.log_weight_HR[-1, 0].exp() * request.history.weight_BL.sum(dim=1)
    torch.testing.assert_close(once[:, 0, -1], mass_B.log1p())
    torch.testing.assert_close(more[:, 0, -1], (2 * mass_B).log1p())
    assert (ranker(twice)[0] - ranker(request)[0]).abs().max() > 1e-3


@torch.inference_mode()
def test_masses_have_mean_0_and_deviation_1_in_the_requests_that_say_so(tmp_path):
    ranker = new_ranker()
    requests = [collate(impressions(tmp_path)[at : at + 20]) for at in range(0, 160, 20)]
    ranker.history.standardise_mass(requests)
    told = [
        ranker.history(ranker.encoder(r.candidate_BC), ranker.encoder, r)[0][:, 0, -SIZES.heads :] for r in requests
    ]
    np.testing.assert_allclose(torch.cat(told).mean(dim=0), 0, atol=1e-4)
    np.testing.assert_allclose(torch.cat(told).std(dim=0, correction=0), 1, rtol=1e-3)


@pytest.mark.parametrize("rates", [1, 2])
@torch.inference_mode()
def test_the_mass_of_nobody_and_of_a_long_silence_is_none_and_before_the_last_event_finite(tmp_path, rates):
    ranker, batch = new_ranker(rates=rates), impressions(tmp_path)[:8]
    caches, kernel = caches_of(ranker, batch, rates), ranker.history.kernel()
    caches.mass_BHKR[0] = 0
    asked = ranker.encoder(collate(batch).candidate_BC), ranker.encoder, caches
    for wait_ms in (0, 10**13, -(10**11)):
        seen = ranker.history.from_cache(*asked, caches.reference_ms_B + wait_ms)
        assert seen.isfinite().all()
        assert not seen[0].any()
    mass_BH = log_mass_at(caches, kernel, caches.reference_ms_B + 10**13).exp()
    # Two heads have forgotten all at any of their rates; the last never forgets all.
    assert (mass_BH[1:, 1:3] == 0).all()
    assert (mass_BH[1:, 3] > 1).all()


@torch.inference_mode()
def test_a_batch_of_users_of_whom_nothing_is_counted_reads_zeros():
    nobody = CacheBatch.of(new_spec(1), [None, None])
    found = read_counts(torch.ones(2, 3, 2, dtype=torch.int32), nobody, torch.zeros(2).double(), torch.zeros(2).long())
    assert found.shape == (2, 3, 4)
    assert not found.any()


@torch.inference_mode()
def test_scores_depend_on_the_history_and_not_on_its_order(tmp_path):
    ranker, (one, other, *_) = new_ranker(), impressions(tmp_path)
    backwards = np.arange(len(one.item_L))[::-1].copy()
    names = ("item_L", "action_L", "time_ms_L", "weight_L")
    fields = {name: getattr(one, name) for name in one.__slots__}
    shuffled = type(one)(**(fields | {name: fields[name][backwards] for name in names}))
    swapped = type(one)(**(fields | {name: getattr(other, name) for name in names}))
    a, b, c = (ranker(collate([x]))[0] for x in (one, shuffled, swapped))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert (a - c).abs().max() > 1e-4


@torch.inference_mode()
def test_padding_changes_no_score(tmp_path):
    for model in HISTORIES:
        ranker, batch = new_ranker(model, newest=7), impressions(tmp_path)[:8]
        together = ranker(collate(batch))[0]
        alone = torch.cat([ranker(collate([i]))[0] for i in batch])
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_gradients_reach_every_parameter_of_both_branches(tmp_path):
    ranker = new_ranker(rates=2, newest=7).train()
    request = collate(impressions(tmp_path)[:32])
    logit, commitment = ranker(request)
    (loss(logit, request.label_BC) + commitment).backward()
    for name, parameter in ranker.history.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_a_rival_has_no_cache_to_read(tmp_path):
    ranker, batch = new_ranker("din_50"), impressions(tmp_path)[:2]
    request = collate(batch)
    caches = caches_of(new_ranker().requires_grad_(False), batch, 1)
    with pytest.raises(TypeError, match="DinHistory cannot be read from a cache"):
        ranker.from_cache(request.candidate_BC, caches, request.now_ms_B)


def test_an_unknown_id_keeps_its_category():
    encoder = new_ranker().encoder
    item, category = encoder.fields
    vector = encoder.encode(torch.tensor([[0, 2]]))
    torch.testing.assert_close(vector[0], item.weight[0] + category.weight[2])


CONTEXT_PARTS = ("encoder.fields.2.weight", "encoder.tags.0.tag.weight", "encoder.vectors.projection.weight")


@pytest.mark.parametrize("model", HISTORIES)
def test_numbers_tags_and_vectors_learn_whatever_reads_the_history(tmp_path, model):
    ranker, batch = context_ranker(model).train(), impressions(tmp_path)[:6]
    request = collate(batch)
    error = loss(ranker(request)[0], request.label_BC)
    error.backward()
    learned = dict(ranker.named_parameters())
    for name in CONTEXT_PARTS:
        assert learned[name].grad.abs().max() > 0, name


@pytest.mark.parametrize("model", [model for model in HISTORIES if model != "no_history"])
@torch.no_grad()
def test_numbers_tags_and_vectors_decide_what_is_seen_of_the_history(tmp_path, model):
    """Those of its items alone: the candidate is none of them, and stays as it is."""
    apart = [replace(i, candidate_C=np.full(4, ITEMS), item_L=i.item_L % 30 + 1) for i in impressions(tmp_path)]
    request, candidate = collate(apart), torch.tensor([ITEMS])
    plain = context_ranker(model).eval()
    for feature in ("price", "tags", "image"):
        other = context_ranker(model).eval()
        of_price, of_tags = (other.encoder.feature_MF[:31, columns] for columns in (slice(2, 3), slice(3, 6)))
        if feature == "image":
            other.encoder.vectors.table_MP[:31] *= -1
        else:
            changed = of_price if feature == "price" else of_tags
            changed.copy_((changed + 1) % 4)
        assert torch.equal(other.encoder(candidate), plain.encoder(candidate))
        assert (other(request)[0] - plain(request)[0]).abs().max() > 1e-4, feature


def test_all_that_is_known_of_an_item_is_hidden_at_once(monkeypatch):
    monkeypatch.setattr("models.ranker.UNKNOWN_SHARE", 1.0)
    encoder = context_ranker().encoder.train()
    torch.manual_seed(0)
    item = torch.arange(ITEMS + 1)
    feature = encoder.features(item)
    hidden = (feature == 0).all(dim=1)
    assert (feature[:, 0] == 0).all()
    assert 10 < hidden.sum() < 31
    # Of the others all is there, the vectors included.
    assert torch.equal(feature[~hidden, 1:-1], encoder.feature_MF[~hidden, 1:])
    assert torch.equal(feature[~hidden, -1], item[~hidden])
    unknown = encoder.eval()(torch.tensor([0]))[0]
    torch.testing.assert_close(encoder.encode(feature)[hidden], unknown.expand(int(hidden.sum()), -1))
    # To the unknown item, a vector adds nothing.
    torch.testing.assert_close(unknown, encoder.of_rows(torch.zeros(1, 6, dtype=torch.int64))[0])
