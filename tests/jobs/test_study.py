"""A study asks every model the same about what came after its training, and its figures follow from the scores."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier
from typing import Any

import msgspec
import numpy as np
import pytest
from rich.console import Console

from jobs.bench import write_figures
from jobs.datasets.dataset import DataSet, SourceFile
from jobs.evaluate import Scores
from jobs.examples import Vocabulary, extended
from jobs.study.compare import difference, over, worth, worth_by_slice
from jobs.study.plan import ABLATIONS, Study, check_study, variants
from jobs.study.report import markdown, write_html
from jobs.study.run import cut_of, run_study
from jobs.train import DAY_MS, TrainJob
from models.checkpoint import Sizes, open_checkpoint
from models.counts import CountPlan
from models.errors import InputError
from models.item_context import ContextFields
from tests.jobs.tiny import DAYS, SIZES, USERS, items, logged, purchases, take, write_rows
from tests.small import START_MS

SHOP = DataSet(
    name="shop",
    about="the tiny shop",
    terms="none",
    files={
        "events": SourceFile(name="events.parquet", format="parquet"),
        "items": SourceFile(name="items.parquet", format="parquet"),
    },
    events=lambda read: read("events"),
    columns={},
    items=lambda read: read("items"),
    item_columns={"item_id": "item_id", "category": "category"},
    fields=("category",),
)
STUDY = Study(
    data="shop",
    models=("vql", "no_history", "no_history+counts"),
    protocol="raw",
    length=16,
    counts=CountPlan(fields=["item_id", "category"], half_life_ms=[7 * DAY_MS, None]),
    seeds=2,
    ladder=(2,),
    holdout=0.25,
    sizes=SIZES,
    epochs=2,
)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shop")
    write_rows(folder / "events.parquet", purchases())
    write_rows(folder / "items.parquet", items())
    return folder


@pytest.mark.spark
def test_a_study_says_what_each_model_is_worth_and_costs(spark, files: Path, tmp_path: Path) -> None:
    found = run_study(spark, STUDY, SHOP, files, tmp_path / "work", Console(quiet=True))

    made = [open_checkpoint(path.parent) for path in (tmp_path / "work/checkpoints").glob("*/manifest.json")]
    assert {checkpoint.manifest.trained_before_ms for checkpoint in made} == {found["cut_ms"]}
    results = found["results"]
    assert list(results) == ["vql", "no_history", "no_history+counts"]
    # 25 % of the events are the last three of twelve days, of which each has a basket of every user.
    assert (found["impressions"], found["users"]) == (3 * USERS, USERS)
    assert found["cut_ms"] <= START_MS + (DAYS - 3) * 86_400_000 < found["cut_ms"] + 3_600_000
    for figures in results.values():
        assert 0 < figures.gauc.mean < 1
        assert figures.train_s.mean > 0 < figures.ms_per_500
        assert set(figures.by_length) == {"2", "16"}
    assert results["vql"].against_reference is None
    gap = results["no_history"].against_reference
    assert gap.mean == pytest.approx(results["no_history"].gauc.mean - results["vql"].gauc.mean)
    assert gap.low <= gap.mean <= gap.high
    # What a model has less of costs less.
    assert results["no_history"].bytes_per_user == 0 < results["vql"].bytes_per_user
    assert results["no_history"].parameters < results["vql"].parameters
    # Exact counts are a number and two sums for each value that the user met: of 24 items at most, and 3 categories.
    assert 0 < results["no_history+counts"].bytes_per_user <= (24 + 3) * 12
    # A model without a history answers alike whatever the length, and counts are of all events.
    for name in ("no_history", "no_history+counts"):
        assert results[name].by_length["2"] == results[name].by_length["16"]
    assert results["no_history+counts"].gauc != results["no_history"].gauc
    assert results["vql"].by_length["2"] != results["vql"].by_length["16"]

    write_figures(tmp_path / "out.json", found)
    written = msgspec.json.decode((tmp_path / "out.json").read_bytes())
    assert {"data", "protocol", "length", "seeds", "results"} <= set(written)
    assert {"auc", "gauc", "logloss", "bytes_per_user", "train_s", "ms_per_500"} <= set(written["results"]["vql"])
    assert set(written["results"]["vql"]["gauc"]) == {"mean", "spread"}
    write_html(tmp_path / "out.html", found)
    page = (tmp_path / "out.html").read_text()
    assert page.count("data:image/png") == 3
    assert "no_history" in page
    assert len(markdown(found).splitlines()) == 2 + 3

    # Again: nothing is trained or asked twice, and the figures are the same.
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*") if path.suffix in (".npz", ".pt")}
    more = run_study(spark, STUDY, SHOP, files, tmp_path / "work", Console(quiet=True))
    assert {path: path.stat().st_mtime_ns for path in made} == made
    # Of each seed: a training of all models, scores of vql at two lengths, of the others at the one that they see.
    assert sorted(path.name for path in made if path.name == "final.pt") == ["final.pt"] * 6
    assert sum(path.suffix == ".npz" for path in made) == 2 * (2 + 1 + 1)
    for name in results:
        assert more["results"][name].gauc == results[name].gauc

    shutil.rmtree(tmp_path / "work/training")
    with pytest.raises(InputError, match=r"loss.jsonl is gone.* remove .*checkpoints"):
        run_study(spark, STUDY, SHOP, files, tmp_path / "work", Console(quiet=True))


@pytest.mark.spark
def test_two_studies_may_begin_at_once_in_one_folder(spark, files: Path, tmp_path: Path) -> None:
    study = msgspec.structs.replace(STUDY, models=("no_history",), reference="no_history", seeds=1, ladder=())
    begin = Barrier(2)

    def run(_: int) -> Any:
        begin.wait()
        return run_study(spark, study, SHOP, files, tmp_path / "work", Console(quiet=True))["results"]

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(run, range(2))

    assert one["no_history"].gauc == other["no_history"].gauc
    # Each thing was made once: a log of a single ingest, a single training.
    assert len(list(tmp_path.glob("work/log-*/events/_delta_log/*.json"))) == 2
    assert len(list(tmp_path.glob("work/training/*/final.pt"))) == 1


@pytest.mark.spark
def test_models_can_be_given_numbers_tags_and_vectors_of_items(spark, files: Path, tmp_path: Path) -> None:
    columns = {
        **SHOP.item_columns,
        "size": "length(item_id)",
        "tags": "concat(category, '|', item_id)",
        "image": "array(ascii(item_id), length(category))",
    }
    context = ContextFields(numbers=("size",), tags=("tags",), vectors=("image",))
    study = msgspec.structs.replace(
        STUDY, models=("vql", "din_50"), ablate=("context",), seeds=1, ladder=(), epochs=1, counts=None, context=context
    )
    found = run_study(spark, study, replace(SHOP, item_columns=columns), files, tmp_path / "work", Console(quiet=True))
    vql, bare = found["results"]["vql"], found["results"]["vql without context"]
    # The category's rows; three of size; a row for each tag; four to project from 2; and the unknown one of each.
    width, added = SIZES.width, 4 + 3 + (1 + 24 + 3) + 2
    assert vql.parameters - bare.parameters == added * width
    for figures in found["results"].values():
        assert 0 < figures.gauc.mean < 1
    assert vql.gauc != bare.gauc


@pytest.mark.spark
def test_what_came_after_the_training_is_known_by_its_fields_alone(spark, tmp_path: Path) -> None:
    events = spark.createDataFrame([("i1",), ("i3",), ("new",), ("odd",)], "item_id string")
    static = spark.createDataFrame(
        [("i1", "c0"), ("i3", "c1"), ("new", "c1"), ("odd", "c9")], "item_id string, category string"
    )
    known = Vocabulary(
        fields={"item_id": ["i1", "i3"], "category": ["c0", "c1"]}, feature_MF=np.array([[0, 0], [1, 1], [2, 2]])
    )

    more = extended(known, events, static)

    assert more.fields["item_id"] == ["i1", "i3", "new", "odd"]
    assert more.feature_MF.tolist() == [[0, 0], [1, 1], [2, 2], [0, 2], [0, 0]]
    assert more.fields["category"] == known.fields["category"]


@pytest.mark.spark
def test_the_training_sees_nothing_of_what_is_held_out(spark, shop_log: Path) -> None:
    cut_ms = cut_of(spark, shop_log, 0.25)
    times = np.array([row["event_time_ms"] for row in logged(shop_log)])
    assert (times >= cut_ms).mean() == pytest.approx(0.25)
    with pytest.raises(InputError, match="held out"):
        cut_of(spark, shop_log, 0.999)


@pytest.fixture
def shop_log(spark, tmp_path: Path) -> Path:
    take(spark, purchases(), tmp_path / "log")
    return tmp_path / "log"


def scores(logit: list[float]) -> Scores:
    """Four users with a positive and a negative each; the first two have seen both before."""
    return Scores(
        logit_N=np.array(logit),
        label_N=np.tile([1, 0], 4),
        user_N=np.repeat(np.arange(4), 2),
        seen_N=np.repeat([True, True, False, False], 2),
    )


RIGHT, WRONG, HALF = scores([1, 0] * 4), scores([0, 1] * 4), scores([1, 0, 1, 0, 0, 1, 0, 1])


def test_a_figure_over_seeds_has_its_mean_and_its_standard_deviation() -> None:
    assert over([0.5]).spread == 0.0
    found = over([0.5, 0.6, 0.7])
    assert (found.mean, found.spread) == (pytest.approx(0.6), pytest.approx(0.1))
    assert over([0.5, float("nan")]) is None


def test_slices_are_what_was_seen_before_and_what_not() -> None:
    found = worth_by_slice([HALF], "fair")
    assert (found["repeat"].gauc.mean, found["novel"].gauc.mean) == (1.0, 0.0)
    assert worth([HALF]).gauc.mean == 0.5
    # Negatives of raw are drawn for all positives alike.
    assert set(worth_by_slice([HALF], "raw")) == {"repeat", "novel"}


def test_a_difference_that_every_user_shows_has_no_width() -> None:
    gap = difference([RIGHT, RIGHT], [WRONG, WRONG])
    assert (gap.mean, gap.low, gap.high) == (1.0, 1.0, 1.0)


def test_a_difference_that_half_of_the_users_show_is_uncertain() -> None:
    gap = difference([HALF], [WRONG])
    assert gap.mean == pytest.approx(0.5)
    assert gap.low < 0.2 < 0.8 < gap.high


def test_a_difference_is_paired_by_user() -> None:
    """The same answers differ by nothing, whoever is drawn."""
    gap = difference([HALF], [HALF])
    assert (gap.mean, gap.low, gap.high) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"models": ("vql", "dni")}, "'dni'"),
        ({"models": ("vql", "vql")}, "once"),
        ({"models": ("mean",)}, "reference 'vql'"),
        ({"models": ("mean",), "reference": "mean", "ablate": ("kernel",)}, "not among"),
        ({"ablate": ("salt",)}, "'salt'"),
        ({"holdout": 1.0}, "share of 1"),
        ({"counts": None}, "need --count"),
        ({"sizes": Sizes(newest=0), "ablate": ("window",)}, "no window"),
        ({"models": ("vql",), "counts": None, "ablate": ("counts",)}, "need --count"),
        ({"models": ("vql", "dni+counts")}, "'dni.counts'"),
    ],
)
def test_a_study_that_cannot_be_is_refused(changes: dict, says: str) -> None:
    with pytest.raises(InputError, match=says):
        check_study(msgspec.structs.replace(STUDY, **changes))


def test_an_ablation_changes_what_it_says_and_nothing_else() -> None:
    study = msgspec.structs.replace(STUDY, models=("vql",), ablate=tuple(ABLATIONS))
    plain, *ablated = variants(study, TrainJob(log="log", fields=("category",)))
    assert plain.job.model == "vql"
    for variant in ablated:
        assert variant.job.model == ("vql+counts" if variant.name == "vql with exact counts" else "vql")
        changed = [
            name for name in TrainJob.__struct_fields__ if getattr(variant.job, name) != getattr(plain.job, name)
        ]
        # Without context there is no category to count.
        assert changed == ["fields", "counts"] if variant.name == "vql without context" else len(changed) == 1
    (without,) = (variant.job for variant in ablated if variant.name == "vql without window")
    assert without.sizes == msgspec.structs.replace(plain.job.sizes, newest=0)


def test_vql_counts_and_rivals_do_when_they_are_named_so() -> None:
    study = msgspec.structs.replace(STUDY, models=("vql", "din_50", "din_50+counts", "vql+counts"), length=1000)
    made = variants(study, TrainJob(log="log", fields=("category",)))
    assert [variant.job.counts for variant in made] == [STUDY.counts, None, STUDY.counts, STUDY.counts]
    assert [variant.length for variant in made] == [1000, 50, 50, 1000]
    assert (
        variants(msgspec.structs.replace(STUDY, models=("vql",), counts=None), TrainJob(log=""))[0].job.counts is None
    )


def test_a_model_that_looks_at_few_events_is_given_no_more() -> None:
    study = msgspec.structs.replace(STUDY, models=("vql", "din_50", "no_history"), length=1000)
    assert [variant.length for variant in variants(study, TrainJob(log="log"))] == [1000, 50, 1]
