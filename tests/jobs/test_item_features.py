"""Numbers, tags and vectors of items go the way of an event: ingest-items, train, encode-items, backfill, stream.

Items that came after the training are encoded by what it decided; what cannot be used is counted, or refused.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from feature_repo.handle import StoreHandle
from feature_repo.opened import Opened
from feature_repo.reader import Reader
from jobs.encode_items import encode_items
from jobs.examples import Vocabulary, build_vocabulary, extended
from jobs.ingest import ingest_items
from jobs.parity import compare_rows
from jobs.scoring import Asked, load_scorer
from jobs.spark import read_delta
from jobs.train import run_training
from models.checkpoint import Checkpoint, open_checkpoint
from models.errors import InputError
from models.item_context import TAGS_MAX, ContextFields
from models.item_table import UNKNOWN, ItemTable
from models.load import load_ranker, load_ranker_of
from models.ranker import Ranker
from models.request import Impression, collate
from tests.jobs.tiny import ITEMS, TRAIN_OPTIONS, USERS, Shop, items, purchases, tiny_job, write_rows
from tests.small import START_MS

pytestmark = pytest.mark.spark

CONTEXT = ContextFields(numbers=("price",), tags=("tags",), vectors=("image",))
COLUMNS = {name: name for name in ("category", *CONTEXT.names)}
OPTIONS = ["--number", "price", "--tags", "tags", "--vector", "image"]


def described(n: int) -> dict:
    """The features of item n, of which every fifth lacks some."""
    rng = np.random.default_rng(n)
    return {
        "price": None if n % 5 == 0 else float(np.round(np.exp(rng.normal()), 2)),
        "tags": None if n % 5 == 1 else "|".join(f"t{t}" for t in rng.choice(6, 1 + n % 3, replace=False)),
        "image": None if n % 5 == 2 else rng.normal(size=4).tolist(),
    }


SHELF = [row | described(n) for n, row in enumerate(items())]


def new_item(item_id: str, **features) -> dict:
    """As item i3, which has all features, but for these."""
    return SHELF[3] | {"item_id": item_id} | features


NEW = [
    new_item("twin"),
    new_item("other-price", price=0.0),
    new_item("other-tags", tags="t4|never met"),
    new_item("unknown-tags", tags="never met"),
    new_item("no-tags", tags=None),
    new_item("other-image", image=[-v for v in SHELF[3]["image"]]),
    new_item("no-image", image=None),
]


def put_items(spark, folder: Path, rows: Sequence[dict]) -> None:
    ingest_items(spark, write_rows(folder / "described.parquet", rows), "parquet", COLUMNS, folder / "log")


@pytest.fixture(scope="module")
def trained(spark, shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Shop:
    """The shop with described items, and a checkpoint that knows them. Not to be changed."""
    folder = tmp_path_factory.mktemp("features")
    shutil.copytree(shop.log, folder / "log")
    put_items(spark, folder, SHELF)
    made = run_training(spark, tiny_job(folder / "log", context=CONTEXT), folder / "work", folder / "checkpoint")
    encode_items(spark, made, folder / "log")
    return Shop(log=folder / "log", checkpoint=made.path)


@pytest.fixture
def own(trained: Shop, tmp_path: Path) -> Shop:
    """A copy to change."""
    shutil.copytree(trained.log, tmp_path / "log")
    shutil.copytree(trained.checkpoint, tmp_path / "checkpoint")
    return Shop(log=tmp_path / "log", checkpoint=tmp_path / "checkpoint")


def known(spark, log: Path) -> Vocabulary:
    """The items as a training has them."""
    events, static = read_delta(spark, log / "events"), read_delta(spark, log / "items")
    return build_vocabulary(events, static, ["category"], CONTEXT)


def item_values(checkpoint: Checkpoint, vocabulary: Vocabulary) -> torch.Tensor:
    """The values of a vocabulary's items, by its rows and vectors."""
    ranker = load_ranker(checkpoint, vocabulary.feature_MF, None, vocabulary.vector_MP)
    with torch.inference_mode():
        return ranker.history.values(ranker.encoder(torch.arange(len(vocabulary.feature_MF))))


def scores(ranker: Ranker, candidate_C: np.ndarray, item_L: np.ndarray) -> torch.Tensor:
    """Of candidates, for a user who has viewed these items, by raw attention."""
    one = Impression(
        user_id="",
        now_ms=START_MS + 1000,
        candidate_C=candidate_C,
        label_C=np.zeros(len(candidate_C)),
        item_L=item_L,
        action_L=np.ones(len(item_L), np.int64),
        time_ms_L=START_MS + np.arange(len(item_L)),
        weight_L=np.ones(len(item_L), np.float32),
    )
    with torch.inference_mode():
        return ranker(collate([one]))[0][0]


def test_a_checkpoint_says_which_features_it_needs_and_has_trained_them(vql, trained: Shop) -> None:
    checkpoint = open_checkpoint(trained.checkpoint)
    context = checkpoint.manifest.context
    assert context.names == CONTEXT.names
    assert (context.tags["tags"].most, context.vectors) == (3, {"image": 4})
    assert checkpoint.vocabulary("tags") == [f"t{t}" for t in range(context.tags["tags"].known)]
    tensors = checkpoint.tensors()
    assert tensors["encoder.fields.2.weight"].shape[0] == len(context.numbers["price"]) + 2
    images = np.array([row["image"] for row in SHELF if row["image"]], np.float32)
    np.testing.assert_allclose(tensors["encoder.vectors.centre_P"], images.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(1 / tensors["encoder.vectors.scale_P"], images.std(axis=0), rtol=1e-4)
    shown = vql("inspect", trained.checkpoint).out
    for said in ("price", "tags 6, 3 of an item", "image 4"):
        assert said in shown


def test_the_item_table_has_what_training_made_of_each_item(spark, trained: Shop) -> None:
    checkpoint = open_checkpoint(trained.checkpoint)
    table, vocabulary = checkpoint.fold().table, known(spark, trained.log)
    row_M = np.r_[UNKNOWN, table.lookup(vocabulary.fields["item_id"])]
    assert len(np.unique(row_M)) == 1 + ITEMS
    np.testing.assert_array_equal(table.feature_MF[row_M], vocabulary.feature_MF)
    np.testing.assert_allclose(table.value_MHD[row_M], item_values(checkpoint, vocabulary), atol=1e-6)
    # Of the unknown item, and of one without an image.
    absent = table.index[next(row["item_id"] for row in SHELF if row["image"] is None)]
    assert not table.vector_Md[[UNKNOWN, absent]].any()
    # As a candidate and in a history alike.
    item = np.arange(1, 1 + ITEMS)
    of_table, of_training = (
        load_ranker_of(checkpoint, table),
        load_ranker(checkpoint, vocabulary.feature_MF, None, vocabulary.vector_MP),
    )
    wanted = scores(of_training, item, item[::3])
    assert wanted.std() > 1e-3
    torch.testing.assert_close(scores(of_table, row_M[item], row_M[item[::3]]), wanted, atol=1e-5, rtol=0)


def test_a_new_item_is_what_its_features_say(spark, own: Shop, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(own.checkpoint)
    before = checkpoint.fold().table
    put_items(spark, tmp_path, SHELF + NEW)
    assert encode_items(spark, checkpoint, own.log) == (len(NEW), 1 + ITEMS + len(NEW))
    table = checkpoint.fold().table
    for name in ("code_MG", "value_MHD", "feature_MF", "vector_Md"):
        np.testing.assert_array_equal(getattr(table, name)[: len(before)], getattr(before, name))

    row = {item["item_id"]: table.index[item["item_id"]] for item in NEW}
    i3 = table.index["i3"]
    # What it has of i3 is i3's, but the id, which no training has met.
    assert table.feature_MF[row["twin"]].tolist() == [0, *table.feature_MF[i3, 1:]]
    np.testing.assert_allclose(table.vector_Md[row["twin"]], table.vector_Md[i3], atol=1e-6)
    t4 = checkpoint.vocabulary("tags").index("t4") + 1
    assert table.feature_MF[row["other-tags"], 3:].tolist() == [t4, 0, 0]
    assert table.feature_MF[row["unknown-tags"], 3:].tolist() == [0, 0, 0]
    assert table.feature_MF[row["other-price"], 2] == 1 < table.feature_MF[i3, 2]
    np.testing.assert_allclose(table.vector_Md[row["other-image"]], -_mirrored(checkpoint, table, i3), atol=1e-5)
    assert not table.vector_Md[row["no-image"]].any()

    # And each of them decides the item's score, and what it is worth in a history.
    ranker, some = load_ranker_of(checkpoint, table), np.array([1, 5, 9])
    alone = dict(zip(row, scores(ranker, np.array(list(row.values())), some).tolist(), strict=True))
    met = {name: scores(ranker, some, np.array([at])) for name, at in row.items()}
    for name in ("other-price", "other-tags", "other-image", "no-image"):
        assert abs(alone[name] - alone["twin"]) > 1e-4, name
        assert (met[name] - met["twin"]).abs().max() > 1e-4, name
    assert alone["unknown-tags"] == pytest.approx(alone["no-tags"], abs=1e-6)

    # An evaluation has the same of items that came after its training.
    events = read_delta(spark, own.log / "events").select("item_id")
    later = events.union(spark.createDataFrame([(name,) for name in row], "item_id string"))
    more = extended(known(spark, own.log), later, read_delta(spark, own.log / "items"))
    row_M = np.r_[UNKNOWN, table.lookup(more.fields["item_id"])]
    np.testing.assert_array_equal(table.feature_MF[row_M], more.feature_MF)
    np.testing.assert_allclose(table.value_MHD[row_M], item_values(checkpoint, more), atol=1e-6)


def _mirrored(checkpoint: Checkpoint, table: ItemTable, item: int) -> np.ndarray:
    """What the item's vector, mirrored at zero, adds with its sign changed: v P - 2 (centre scale) P less it."""
    tensors = checkpoint.tensors()
    centre_d = tensors["encoder.vectors.projection.weight"] @ (
        tensors["encoder.vectors.centre_P"] * tensors["encoder.vectors.scale_P"]
    )
    return table.vector_Md[item] + 2 * centre_d


def test_what_is_no_feature_is_left_out_and_counted(spark, own: Shop, tmp_path: Path, caplog) -> None:
    every = [f"t{t}" for t in range(6)]
    odd = [
        new_item("nan", price=float("nan"), image=[float("nan"), 0.0, 0.0, 0.0]),
        new_item("inf", price=float("-inf"), image=[0.0, float("inf"), 0.0, 0.0]),
        new_item("huge", image=[1e300, 0.0, 0.0, 0.0]),
        new_item("empty", tags="", image=[]),
        new_item("many", tags="|".join([*(f"x{n}" for n in range(10_000)), *every])),
    ]
    put_items(spark, tmp_path, SHELF + odd)
    checkpoint = open_checkpoint(own.checkpoint)
    with caplog.at_level(logging.WARNING):
        assert encode_items(spark, checkpoint, own.log)[0] == len(odd)
    (said,) = [record.message for record in caplog.records if "left out" in record.message]
    assert said == (
        "left out of the items' features: 2 numbers of price that are none, or not finite, "
        "3 tags of tags beyond the first 3 of an item, 3 vectors of image that are not finite"
    )
    table = checkpoint.fold().table
    for name in ("nan", "inf"):
        assert table.feature_MF[table.index[name], 2] == 0
    for name in ("nan", "inf", "huge", "empty"):
        assert not table.vector_Md[table.index[name]].any()
    assert table.feature_MF[table.index["empty"], 3:].tolist() == [0, 0, 0]
    assert np.isfinite(table.value_MHD).all()


def test_items_that_cannot_be_encoded_are_refused_with_the_remedy(spark, own: Shop, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(own.checkpoint)
    before = checkpoint.fold().table
    put_items(spark, tmp_path, [*SHELF, new_item("wide", image=[1.0] * 5)])
    with pytest.raises(InputError, match="vector 'image' of item 'wide' has 5 numbers, others have 4"):
        encode_items(spark, checkpoint, own.log)
    bare = write_rows(tmp_path / "bare.parquet", SHELF)
    ingest_items(spark, bare, "parquet", {"category": "category", "tags": "tags"}, own.log)
    with pytest.raises(
        InputError, match=r"no columns \['price', 'image'\], with which .* give them to vql ingest-items"
    ):
        encode_items(spark, checkpoint, own.log)
    assert checkpoint.fold().table.index == before.index
    with pytest.raises(InputError, match=r"no columns \['price', 'image'\]; they have .* vql ingest-items --column"):
        known(spark, own.log)
    ingest_items(spark, bare, "parquet", COLUMNS | {"image": "category"}, own.log)
    with pytest.raises(InputError, match="the items' 'image' are string, not lists of numbers"):
        known(spark, own.log)


@pytest.mark.beam
def test_the_way_of_an_event(vql, spark, shop: Shop, trained: Shop, tmp_path: Path) -> None:
    """By commands, from a CSV file: the parameters are those that the jobs make, and cached scores are raw ones."""
    log, state, path = tmp_path / "log", tmp_path / "state", tmp_path / "checkpoint"
    shutil.copytree(shop.log, log)
    csv = tmp_path / "items.csv"
    lines = ["item_id,category,price,tags,image"]
    for row in SHELF:
        image = "" if row["image"] is None else f'"{row["image"]}"'
        lines.append(f"{row['item_id']},{row['category']},{row['price'] or ''},{row['tags'] or ''},{image}")
    csv.write_text("\n".join(lines) + "\n")
    columns = ["--column", "image=from_json(image, 'array<double>')"]
    for name in ("category", "price", "tags"):
        columns += ["--column", f"{name}={name}"]
    assert vql("ingest-items", "--input", csv, "--format", "csv", *columns, "--log", log).code == 0
    train = ["train", "--log", log, "--checkpoint", path, "--work", tmp_path / "work", *TRAIN_OPTIONS, *OPTIONS]
    said = vql(*train)
    assert said.code == 0, said.err
    checkpoint = open_checkpoint(path)
    wanted = open_checkpoint(trained.checkpoint).tensors()
    assert {name: a.tobytes() for name, a in checkpoint.tensors().items()} == {
        name: a.tobytes() for name, a in wanted.items()
    }

    of = ["--checkpoint", path, "--log", log]
    assert vql("encode-items", *of).code == 0
    assert vql("backfill", *of, "--state", state).code == 0
    more = [
        row | {"event_id": f"n{n}", "item_id": f"i{n % ITEMS}", "event_time_ms": START_MS + 10**9 + n}
        for n, row in enumerate(purchases(range(1)))
    ]
    assert vql("ingest", "--input", write_rows(tmp_path / "more.parquet", more), "--log", log).code == 0
    assert vql("stream", *of, "--state", state, "--until", "end").code == 0
    reader = Reader(StoreHandle(state=state).open(), Opened(checkpoint))
    found = compare_rows(reader, log)
    assert (found.users, found.conserved) == (USERS, True)
    assert found.max_abs_error < 1e-4

    now_ms = START_MS + 2 * 10**9
    scorer = load_scorer(checkpoint, reader.fold, reader)
    asked = [Asked(user_id=f"u{u}", item_ids=[f"i{n}" for n in range(ITEMS)], now_ms=now_ms) for u in range(4)]
    vocabulary = known(spark, log)
    ranker = load_ranker(checkpoint, vocabulary.feature_MF, None, vocabulary.vector_MP)
    for one, scored in zip(asked, scorer.score(asked).users, strict=True):
        raw = _raw(one, vocabulary, checkpoint, [*purchases(), *more])
        with torch.inference_mode():
            assert scored.scores == pytest.approx(ranker(collate([raw]))[0][0].tolist(), abs=1e-5)


def _raw(asked: Asked, vocabulary: Vocabulary, checkpoint: Checkpoint, events: Sequence[dict]) -> Impression:
    """The user's events, oldest first; of one time, as ingest orders them."""
    own = [event for event in events if event["user_id"] == asked.user_id]
    own.sort(key=lambda event: (event["event_time_ms"], event["event_id"]))
    row = {item_id: n + 1 for n, item_id in enumerate(vocabulary.fields["item_id"])}
    return Impression(
        user_id=asked.user_id,
        now_ms=asked.now_ms,
        candidate_C=np.array([row[item_id] for item_id in asked.item_ids]),
        label_C=np.zeros(len(asked.item_ids)),
        item_L=np.array([row[event["item_id"]] for event in own]),
        action_L=checkpoint.action_index([event["action"] for event in own]),
        time_ms_L=np.array([event["event_time_ms"] for event in own]),
        weight_L=np.ones(len(own), np.float32),
    )


def test_ten_thousand_tags_of_an_item_of_the_training_are_cut_too(spark, own: Shop, tmp_path: Path, caplog) -> None:
    many = "|".join(f"t{n}" for n in range(10_000))
    put_items(spark, tmp_path, [*SHELF[:-2], SHELF[-2] | {"tags": many}, SHELF[-1] | {"tags": "t9998|t9999"}])
    with caplog.at_level(logging.WARNING):
        vocabulary = known(spark, own.log)
    assert vocabulary.context.tags["tags"].most == TAGS_MAX
    assert set(vocabulary.tags["tags"]) == {*(f"t{n}" for n in range(TAGS_MAX)), "t9998", "t9999"}
    assert "2 tags of tags beyond the first 16 of an item" in caplog.text
