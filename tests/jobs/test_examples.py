"""Examples know nothing of their basket nor of what came later, and a log and a seed give the same ones anywhere."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pytest

from jobs.baskets import ExamplePlan
from jobs.examples import Vocabulary, build_vocabulary, timelines, write_examples
from jobs.popularity import count_popularity
from jobs.sampling import Items
from jobs.spark import read_delta
from models.errors import InputError
from models.timelines import FEATURES, SCHEMA, impressions_of, timeline_files
from tests.jobs.tiny import CATEGORIES, ITEMS, Shop

PERIOD_MS = 1000
# Items 1 to 40, item n counted n times in period 1; in period 2 only items 1 and 2. All are of one group.
ONE_GROUP = np.zeros(41, np.int64)
SHOP = Items(
    popularity=count_popularity(
        np.repeat([1, 2], [40, 2]), np.r_[1:41, 1:3], np.r_[1:41, 1, 1], group_M=ONE_GROUP, period_ms=PERIOD_MS
    ),
    group_M=ONE_GROUP,
)
PLAN = ExamplePlan(per_user=100, positives=4, negatives=6, period_ms=PERIOD_MS)


def user(*events: tuple[int, int, float], user_id: str = "u") -> pa.Table:
    """Events (time_ms, item, weight) in log order."""
    return pa.table(
        {
            "user_id": [user_id] * len(events),
            "item": pa.array([e[1] for e in events], pa.int32()),
            "action": pa.array([0] * len(events), pa.int32()),
            "time_ms": pa.array([e[0] for e in events], pa.int64()),
            "weight": pa.array([e[2] for e in events], pa.float32()),
            "offset": pa.array(range(len(events)), pa.int64()),
        }
    )


def shopper(baskets: int = 30, per_basket: int = 3, seed: int = 0, user_id: str = "u") -> pa.Table:
    """Baskets ten ms apart in the period 1, in a shuffled log."""
    rng = np.random.default_rng(seed)
    events = [(1000 + 10 * b, int(rng.integers(1, 41)), 1.0) for b in range(baskets) for _ in range(per_basket)]
    return user(*(events[i] for i in rng.permutation(len(events))), user_id=user_id)


def rows(table: pa.Table, plan: ExamplePlan = PLAN) -> pa.Table:
    return timelines(table, SHOP, plan, ["other"])


def made(table: pa.Table, plan: ExamplePlan = PLAN) -> dict:
    (row,) = rows(table, plan).to_pylist()
    return row


def test_the_history_is_what_was_strictly_before_the_basket() -> None:
    row = made(shopper())
    assert row["time_ms"] == sorted(row["time_ms"])
    assert len(row["now_ms"]) == 29
    for now_ms, end in zip(row["now_ms"], row["end"], strict=True):
        assert all(t < now_ms for t in row["time_ms"][:end])
        assert all(t >= now_ms for t in row["time_ms"][end:])


def test_events_of_one_time_are_in_log_order() -> None:
    row = made(user((1010, 7, 1.0), (1000, 5, 1.0), (1010, 6, 1.0), (1000, 9, 1.0)))
    assert row["item"] == [5, 9, 7, 6]


def test_positives_are_of_the_basket_and_negatives_never() -> None:
    table = shopper(per_basket=7)
    row = made(table)
    baskets: dict[int, set[int]] = {}
    for t, item in zip(table["time_ms"].to_pylist(), table["item"].to_pylist(), strict=True):
        baskets.setdefault(t, set()).add(item)
    for now_ms, candidate, label in zip(row["now_ms"], row["candidate"], row["label"], strict=True):
        positives = [c for c, y in zip(candidate, label, strict=True) if y]
        negatives = [c for c, y in zip(candidate, label, strict=True) if not y]
        assert set(positives) <= baskets[now_ms]
        assert len(set(positives)) == len(positives) == min(PLAN.positives, len(baskets[now_ms]))
        assert len(negatives) == len(set(negatives)) == PLAN.negatives
        assert not set(negatives) & baskets[now_ms]
        assert 0 not in candidate


def test_the_first_basket_has_no_history_and_makes_no_example() -> None:
    assert rows(user((1000, 1, 1.0), (1000, 2, 1.0))).num_rows == 0
    assert made(user((1000, 1, 1.0), (1010, 2, 1.0)))["now_ms"] == [1010]


def test_unknown_items_are_no_positives_but_stay_in_the_history() -> None:
    row = made(user((1000, 1, 1.0), (1020, 0, 1.0), (1030, 3, 1.0), (1030, 0, 1.0)))
    assert row["now_ms"] == [1030]
    assert [c for c, y in zip(row["candidate"][0], row["label"][0], strict=True) if y] == [3]
    assert row["item"] == [1, 0, 3, 0]


def test_what_was_retracted_never_happened() -> None:
    """One of the two equal events is taken back; the retraction without an event is dropped."""
    row = made(user((1000, 1, 1.0), (1010, 2, 1.0), (1010, 2, 1.0), (1010, 2, -1.0), (1020, 4, -1.0), (1030, 3, 1.0)))
    assert row["item"] == [1, 2, 3]
    assert row["weight"] == [1, 1, 1]


def test_draws_depend_on_seed_user_and_basket_alone() -> None:
    row = made(shopper())
    assert made(shopper()) == row
    assert made(shopper(), msgspec.structs.replace(PLAN, seed=1))["candidate"] != row["candidate"]
    assert made(shopper(user_id="v"))["candidate"] != row["candidate"]
    # The first ten baskets alone draw what they drew among thirty.
    early = shopper().filter(pa.compute.less(shopper()["time_ms"], 1100))
    assert made(early)["candidate"] == row["candidate"][:9]


def test_a_user_has_at_most_per_user_examples_in_order() -> None:
    row = made(shopper(), msgspec.structs.replace(PLAN, per_user=5))
    assert len(row["now_ms"]) == 5
    assert row["now_ms"] == sorted(row["now_ms"])
    # Some of all baskets, not the first ones.
    assert row["now_ms"] != [1010, 1020, 1030, 1040, 1050]


def test_examples_lie_in_the_period_asked_for_and_still_see_what_was_before() -> None:
    row = made(shopper(), msgspec.structs.replace(PLAN, from_ms=1100, until_ms=1200))
    assert row["now_ms"] == list(range(1100, 1200, 10))
    assert row["end"][0] == 30
    assert rows(shopper(), msgspec.structs.replace(PLAN, from_ms=5000)).num_rows == 0


def test_a_basket_of_the_only_items_of_its_period_makes_no_example() -> None:
    table = user((1000, 9, 1.0), (2000, 1, 1.0), (2000, 2, 1.0))
    assert rows(table).num_rows == 0
    assert made(user((1000, 9, 1.0), (2000, 1, 1.0)))["candidate"][0][1:] == [2]


def test_a_timeline_has_the_schema_of_the_files() -> None:
    assert rows(shopper()).schema == SCHEMA


def test_users_together_are_the_users_alone() -> None:
    tables = [shopper(seed=n, user_id=f"u{n}") for n in range(5)] + [user((1000, 1, 1.0), user_id="one basket")]
    together = rows(pa.concat_tables(reversed(tables)))
    assert together.to_pylist() == [row for table in tables for row in rows(table).to_pylist()]
    assert together.num_rows == 5


def test_a_user_of_whom_everything_was_retracted_has_no_timeline() -> None:
    assert rows(user((1000, 1, 1.0), (1000, 1, -1.0))).num_rows == 0


def test_negatives_are_within_a_field_that_is_used() -> None:
    vocabulary = Vocabulary(
        fields={"item_id": ["a", "b"], "repo": ["r"]}, feature_MF=np.array([[0, 0], [1, 1], [2, 1]])
    )
    assert vocabulary.groups("repo").tolist() == [0, 1, 1]
    assert vocabulary.groups(None).tolist() == [0, 0, 0]
    with pytest.raises(InputError, match=r"within 'brand'.* only \['item_id', 'repo'\]"):
        vocabulary.groups("brand")


@pytest.mark.spark
def test_a_vocabulary_is_every_item_of_the_log_with_its_fields(spark, shop: Shop) -> None:
    events = read_delta(spark, shop.log / "events")
    static = read_delta(spark, shop.log / "items")
    vocabulary = build_vocabulary(events, static, ["category"])
    assert vocabulary.fields["item_id"] == sorted(f"i{n}" for n in range(ITEMS))
    assert vocabulary.fields["category"] == [f"c{n}" for n in range(CATEGORIES)]
    assert vocabulary.feature_MF[0].tolist() == [0, 0]
    for row, item_id in enumerate(vocabulary.fields["item_id"], 1):
        assert vocabulary.feature_MF[row].tolist() == [row, int(item_id[1:]) % CATEGORIES + 1]
    with pytest.raises(InputError, match=r"have no columns \['brand'\]; they have \['item_id', 'category'\]"):
        build_vocabulary(events, static, ["brand"])
    with pytest.raises(InputError, match="the log holds no events"):
        build_vocabulary(events.where("false"), None, [])


@pytest.mark.spark
def test_the_same_log_gives_the_same_examples_on_any_cluster(spark, shop: Shop, tmp_path: Path, monkeypatch) -> None:
    events = read_delta(spark, shop.log / "events")
    items = sorted(f"i{n}" for n in range(ITEMS))
    vocabulary = Vocabulary(fields={"item_id": items}, feature_MF=np.arange(ITEMS + 1)[:, None])
    found = {}
    for partitions in (1, 5):
        spark.conf.set("spark.sql.shuffle.partitions", partitions)
        out = tmp_path / str(partitions)
        # A folder that a killed run left.
        out.mkdir()
        (out / "part-00000-half.parquet").write_bytes(b"half a file")
        try:
            write_examples(spark, events.repartition(partitions), vocabulary, ["other", "view"], ExamplePlan(), out)
        finally:
            spark.conf.set("spark.sql.shuffle.partitions", 4)
        found[partitions] = examples(out)
    assert len(found[1]) > 100
    assert found[1] == found[5]
    assert np.array_equal(np.load(tmp_path / "1" / FEATURES), vocabulary.feature_MF)
    # A whole folder is kept as it is.
    write_examples(spark, events.where("false"), vocabulary, ["other", "view"], ExamplePlan(), tmp_path / "1")
    assert examples(tmp_path / "1") == found[5]


def examples(folder: Path) -> list[tuple]:
    return sorted(
        (
            i.user_id,
            i.now_ms,
            *(tuple(a.tolist()) for a in (i.candidate_C, i.label_C, i.item_L, i.action_L, i.weight_L)),
        )
        for file in timeline_files(folder)
        for i in impressions_of(file)
    )
