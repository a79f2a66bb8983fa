"""The gate refuses what is worse, with its numbers, lets pass what is not, and asks both the same."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields, replace
from pathlib import Path

import msgspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from jobs.encode_items import encode_table
from jobs.evaluate import Quality, Scores, quality
from jobs.event_log import trained_until_ms
from jobs.releases.gate import MARGIN, Bytes, Gaps, Report, Side, compare, judge
from jobs.releases.held_out import Question, held_out, in_words_of
from jobs.releases.states import State
from jobs.releases.table import read_releases
from jobs.study.compare import Difference, difference_of_auc, difference_of_logloss
from jobs.train import DAY_MS
from models.checkpoint import Checkpoint, open_checkpoint, write_checkpoint
from models.diagnostics import Usage
from models.errors import CheckpointError, InputError
from models.item_table import append_segments
from models.load import load_ranker
from tests.jobs.commands import assert_one_line
from tests.jobs.releases.way import take_live
from tests.jobs.tiny import DAYS, ITEMS, USERS, Shop, purchases, take
from tests.small import START_MS
from tests.small_ranker import scoring_checkpoint

NEW_DAYS = 3
# The newest event of the training, and what is after it.
CUT_MS = START_MS + (DAYS - 1) * int(DAY_MS) + (USERS - 1) * 1000 + 1


def side(name: str = "a", low: float = 0.1, perplexity: float = 7.0) -> Side:
    return Side(
        checkpoint_id=name,
        path=f"/{name}",
        quality=Quality(auc=0.7, gauc=0.7, logloss=0.5),
        above_chance=Difference(mean=0.2, low=low, high=0.3),
        usage=[Usage(used=8, perplexity=perplexity), Usage(used=8, perplexity=7.0)],
        row_bytes=Bytes(mean=1.0, p50=1.0, p99=1.0, max=1.0),
        unknown_items=0.0,
    )


def report(candidate: Side, gauc: Difference | None = None) -> Report:
    gaps = None if gauc is None else Gaps(gauc=gauc, auc=gauc, logloss=gauc)
    return Report(
        candidate=candidate,
        live=None if gauc is None else side("live"),
        gaps=gaps,
        log="/log",
        log_version=3,
        from_ms=1,
        until_ms=2,
        question=Question(),
        impressions=20,
        users=10,
    )


@pytest.mark.parametrize(
    ("mean", "half", "passes"),
    [
        (0.0, 0.003, True),
        (-0.0065, 0.003, True),
        (-0.008, 0.003, False),
        (-0.02, 0.003, False),
        # So few users that nothing can be told; and the same of one that is better.
        (0.0, 0.05, False),
        (0.06, 0.05, True),
    ],
)
def test_what_may_be_worse_by_more_than_the_margin_is_refused(mean: float, half: float, passes: bool) -> None:
    gap = Difference(mean=mean, low=mean - half, high=mean + half)
    found = judge(report(side(), gap), MARGIN)
    assert found.passed == passes
    if not passes:
        assert f"GAUC 0.7000 is {mean:+.4f} ({mean - half:+.4f} to {mean + half:+.4f})" in found.verdict
        assert "live release's 0.7000" in found.verdict
        assert "margin of 0.01" in found.verdict
        assert judge(report(side(), gap), margin=0.1).passed


def test_a_collapsed_codebook_and_chance_are_refused_whatever_is_live() -> None:
    same = Difference(mean=0.0, low=-0.001, high=0.001)
    for gap in (None, same):
        assert judge(report(side(), gap), MARGIN).passed
        assert "group 0 of the codebook has collapsed: a perplexity of 1.20" in (
            judge(report(side(perplexity=1.2), gap), MARGIN).verdict
        )
        assert "no better than chance" in judge(report(side(low=-0.01), gap), MARGIN).verdict


def test_a_reason_is_recorded_only_where_it_was_needed() -> None:
    assert judge(report(side()), MARGIN, "because").forced is None
    forced = judge(report(side(low=-0.01)), MARGIN, "because")
    assert (forced.passed, forced.forced) == (True, "because")
    assert forced.verdict.startswith("forced (because) although GAUC")


def random_scores(seed: int, shift: float = 0.0) -> Scores:
    """Of 40 users with 10 candidates each, some scores equal."""
    label_N = np.random.default_rng(0).integers(0, 2, 400)
    rng = np.random.default_rng(seed)
    logit_N = np.round(rng.normal(size=400) + shift * label_N, 1).astype(np.float32)
    return Scores(logit_N=logit_N, label_N=label_N, user_N=np.repeat(np.arange(40), 10), seen_N=np.zeros(400, bool))


def test_differences_of_auc_and_logloss_are_those_of_the_figures_with_an_interval_around() -> None:
    better, worse = random_scores(1, 1.0), random_scores(2, 0.2)
    auc, loss = difference_of_auc(better, worse), difference_of_logloss(better, worse)
    assert auc.mean == pytest.approx(
        roc_auc_score(better.label_N, better.logit_N) - roc_auc_score(worse.label_N, worse.logit_N)
    )
    probability = [1 / (1 + np.exp(-s.logit_N.astype(float))) for s in (better, worse)]
    assert loss.mean == pytest.approx(
        log_loss(better.label_N, probability[0]) - log_loss(worse.label_N, probability[1])
    )
    # Of a logit that no float64 can tell from certainty, as the figure has it.
    sure = replace(worse, logit_N=worse.logit_N * 2000)
    found = difference_of_logloss(sure, worse).mean
    assert found == pytest.approx(quality(sure).logloss - quality(worse).logloss)
    for gap in (auc, loss):
        assert gap.low < gap.mean < gap.high
        assert 0.02 < gap.high - gap.low < 0.4
    for differ in (difference_of_auc, difference_of_logloss):
        back = differ(worse, better)
        found = differ(better, worse)
        assert (back.mean, back.low, back.high) == pytest.approx((-found.mean, -found.high, -found.low))
        assert differ(better, better) == Difference(mean=0.0, low=0.0, high=0.0)


def test_the_interval_of_auc_is_that_of_users_drawn_again() -> None:
    """Against drawing users one by one and computing anew."""
    better, worse = random_scores(1, 1.0), random_scores(2, 0.2)
    found = difference_of_auc(better, worse)
    rng = np.random.default_rng(9)
    gaps = []
    for _ in range(400):
        drawn = (rng.integers(0, 40, 40)[:, None] * 10 + np.arange(10)).ravel()
        a, b = better.where(drawn), worse.where(drawn)
        gaps.append(roc_auc_score(a.label_N, a.logit_N) - roc_auc_score(b.label_N, b.logit_N))
    assert np.percentile(gaps, [2.5, 97.5]) == pytest.approx([found.low, found.high], abs=0.02)


# With Spark: the tiny shop, whose checkpoint was trained on twelve days; then three more came.


@pytest.fixture(scope="module")
def shops(spark, shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The log and three checkpoints: the trained one, one beside it that scores nearly alike, and noise."""
    folder = tmp_path_factory.mktemp("gate")
    shutil.copytree(shop.log, folder / "log")
    shutil.copytree(shop.checkpoint, folder / "live")
    take(spark, purchases(range(DAYS, DAYS + NEW_DAYS)), folder / "log")
    live = open_checkpoint(folder / "live")
    rng = np.random.default_rng(0)
    learned = {name: a for name, a in live.tensors().items() if a.dtype == np.float32 and a.ndim}
    noise = {name: rng.normal(size=a.shape).astype(a.dtype) for name, a in learned.items()}
    near = {name: a + (0.01 * a.std() * noise[name]).astype(a.dtype) for name, a in learned.items()}
    for name, tensors in (("near", near), ("noise", noise)):
        encode_alike(beside(live, folder / name, tensors), live)
    return {name: folder / name for name in ("log", "work", "live", "near", "noise")}


def beside(checkpoint: Checkpoint, path: Path, tensors: dict[str, np.ndarray]) -> Checkpoint:
    """Another one of the same training, with these parameters in place of its own, and no item table."""
    vocabularies = {field: checkpoint.vocabulary(field) for field in checkpoint.manifest.fields}
    return write_checkpoint(path, checkpoint.manifest, checkpoint.tensors() | tensors, vocabularies)


def encode_alike(checkpoint: Checkpoint, other: Checkpoint) -> None:
    """An item table of the items of the other's."""
    table = other.fold().table
    ranker = load_ranker(checkpoint, table.feature_MF, table.cell_MQ)
    checkpoint.items_path.mkdir()
    segment = checkpoint.items_path / "all.parquet"
    item_ids = ["", *sorted(table.index, key=lambda item_id: table.index[item_id])]
    pq.write_table(encode_table(ranker, item_ids, table.feature_MF), segment)
    append_segments(checkpoint.items_path, checkpoint.checkpoint_id, [segment])


pytest_spark = pytest.mark.spark


@pytest_spark
def test_a_worse_one_is_refused_with_its_numbers_and_a_fine_one_passes_once(
    vql, spark, shops: dict[str, Path], table: Path
) -> None:
    live, near, noise = (open_checkpoint(shops[name]) for name in ("live", "near", "noise"))
    take_live(table, live.checkpoint_id, live.path)
    options = ["--releases", table, "--log", shops["log"], "--work", shops["work"], "--margin", MARGIN]
    for each in (near, noise):
        assert vql("release", "add", each.path, "--releases", table).code == 0

    said = vql("release", "gate", noise.path, *options)
    assert_one_line(
        said, 8, "GateError", noise.checkpoint_id, "may be worse by more than the margin of 0.01", "GAUC 0."
    )
    assert read_releases(table).current[noise.checkpoint_id].state == State.TRAINED
    path = table / f"_reports/gate-{noise.checkpoint_id}-{live.checkpoint_id}.json"
    written = json.loads(path.read_text())
    assert written["refusals"]
    figures = written["report"]
    assert f"{figures['candidate']['quality']['gauc']:.4f}" in said.err
    assert figures["gaps"]["gauc"]["high"] < 0
    assert figures["gaps"]["auc"]["mean"] < 0 < figures["gaps"]["logloss"]["mean"]
    # Three days with a basket of every shopper.
    assert (figures["impressions"], figures["users"]) == (NEW_DAYS * USERS, USERS)
    assert figures["from_ms"] == CUT_MS
    assert [len(figures[each]["usage"]) for each in ("candidate", "live")] == [2, 2]
    assert figures["candidate"]["row_bytes"]["max"] >= figures["candidate"]["row_bytes"]["p50"] > 100

    said = vql("release", "gate", near.path, *options)
    assert said.code == 0, said
    assert f"release {near.checkpoint_id} is gated: GAUC 0." in said.out
    entry = read_releases(table).current[near.checkpoint_id]
    assert (entry.state, entry.against) == (State.GATED, live.checkpoint_id)
    before = read_releases(table)
    said = vql("release", "gate", near.path, *options)
    assert (said.code, "nothing to do" in said.out) == (0, True)
    assert read_releases(table) == before

    said = vql("release", "gate", noise.path, *options, "--force", "a drill")
    assert said.code == 0, said
    entry = read_releases(table).current[noise.checkpoint_id]
    assert entry.state == State.GATED
    assert entry.note.startswith("forced (a drill) although GAUC 0.")
    written = json.loads(path.read_text())
    assert (written["forced"], bool(written["refusals"])) == ("a drill", True)


@pytest_spark
def test_where_nothing_is_live_noise_is_refused_and_a_trained_one_passes(
    vql, spark, shops: dict[str, Path], table: Path
) -> None:
    live, noise = (open_checkpoint(shops[name]) for name in ("live", "noise"))
    options = ["--releases", table, "--log", shops["log"], "--work", shops["work"]]
    for each in (live, noise):
        assert vql("release", "add", each.path, "--releases", table).code == 0
    assert_one_line(vql("release", "gate", noise.path, *options), 8, "GateError", "no better than chance")
    said = vql("release", "gate", live.path, *options, "--dry-run")
    assert f"release {live.checkpoint_id} would be gated: nothing is live: GAUC 0." in said.out
    assert read_releases(table).current[live.checkpoint_id].state == State.TRAINED
    said = vql("release", "gate", live.path, *options)
    assert f"release {live.checkpoint_id} is gated: nothing is live: GAUC 0." in said.out
    assert (table / f"_reports/gate-{live.checkpoint_id}-no-live.json").exists()


@pytest_spark
def test_both_are_asked_the_same_each_in_its_own_words(spark, shops: dict[str, Path], tmp_path: Path) -> None:
    asked = held_out(spark, shops["log"], CUT_MS, Question(), shops["work"])
    names = [["", *asked.item_ids][i] for one in asked.impressions for i in one.candidate_C]
    actions = [asked.actions[a] for one in asked.impressions for a in one.action_L]
    assert set(names) <= {f"i{i}" for i in range(ITEMS)}
    # A checkpoint of other items, in another order, with other actions.
    other = scoring_checkpoint(tmp_path / "other")
    for checkpoint in (open_checkpoint(shops["live"]), other):
        table = checkpoint.fold().table
        said = in_words_of(checkpoint, table, asked)
        id_of = dict(zip(table.index.values(), table.index, strict=True)) | {0: ""}
        candidates = [id_of[i] for one in said for i in one.candidate_C]
        assert candidates == [name if name in table.index else "" for name in names]
        known = checkpoint.manifest.actions
        assert [known[a] for one in said for a in one.action_L] == [a if a in known else "other" for a in actions]
    assert [len(one.item_L) for one in said] == [len(one.item_L) for one in asked.impressions]
    assert all((one.time_ms_L < one.now_ms).all() and one.now_ms >= CUT_MS for one in said)


@pytest_spark
def test_what_is_held_out_begins_where_the_later_training_ended(spark, shops: dict[str, Path], tmp_path: Path) -> None:
    log, live = shops["log"], open_checkpoint(shops["live"])
    # Trained on all of a version of the log: after that version's newest event.
    assert trained_until_ms(spark, log, live) == CUT_MS
    manifest = msgspec.structs.replace(live.manifest, trained_before_ms=CUT_MS - 5)
    assert trained_until_ms(spark, log, replace(live, manifest=manifest)) == CUT_MS - 5
    later = replace(live, manifest=msgspec.structs.replace(live.manifest, trained_before_ms=CUT_MS + int(DAY_MS)))
    for candidate, beside_it in ((live, later), (later, live)):
        found = compare(spark, candidate, beside_it, log, Question(), shops["work"])
        assert found.from_ms == CUT_MS + DAY_MS
        assert found.impressions == (NEW_DAYS - 1) * USERS
    manifest = msgspec.structs.replace(live.manifest, training={})
    with pytest.raises(InputError, match="does not say what it was trained on"):
        trained_until_ms(spark, log, replace(live, manifest=manifest))
    with pytest.raises(InputError, match="ingest newer ones, or hold some out: vql train --before-ms"):
        held_out(spark, log, CUT_MS + NEW_DAYS * int(DAY_MS), Question(), tmp_path)


@pytest_spark
def test_users_beyond_the_limit_are_left_out_by_a_hash(spark, shops: dict[str, Path], tmp_path: Path) -> None:
    def users(limit: int) -> set[str]:
        asked = held_out(spark, shops["log"], CUT_MS, Question(users=limit), tmp_path / str(limit))
        return {one.user_id for one in asked.impressions}

    few, more = users(8), users(20)
    assert 2 <= len(few) <= 16
    assert few < more
    assert len(users(USERS)) == USERS


@pytest_spark
def test_what_was_scored_is_kept(spark, shops: dict[str, Path], tmp_path: Path) -> None:
    live = open_checkpoint(shops["live"])
    found = compare(spark, live, None, shops["log"], Question(), tmp_path)
    (file,) = (tmp_path / "scores").glob("*.npz")
    with np.load(file) as kept:
        scores = Scores(**kept)
    assert found.candidate.quality == quality(scores)
    # What is kept is what is taken the next time.
    np.savez(file, **{f.name: getattr(scores, f.name) for f in fields(scores)} | {"logit_N": -scores.logit_N})
    turned = compare(spark, live, None, shops["log"], Question(), tmp_path).candidate.quality
    assert turned.auc == pytest.approx(1 - found.candidate.quality.auc)


@pytest_spark
def test_a_checkpoint_without_an_item_table_is_named(spark, shops: dict[str, Path], tmp_path: Path) -> None:
    live = open_checkpoint(shops["live"])
    bare = beside(live, tmp_path / "bare", {})
    with pytest.raises(CheckpointError, match="holds no item table; run: vql encode-items"):
        compare(spark, bare, None, shops["log"], Question(), shops["work"])
