"""`vql encode-items`: the item table of a checkpoint, made by Spark and only ever appended to.

Every item of the log and of the items table that the item table does not hold yet is encoded from its static
context: the embedding rows of its fields (0 for values the checkpoint was not trained with), then the code of each
group and the value of each head. Segments are Parquet files written by the executors; the index names them last,
so a killed run leaves no half table.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema

from jobs.event_log import read_events
from jobs.spark import errors_of_workers, read_delta
from models.checkpoint import Checkpoint, open_checkpoint
from models.errors import CheckpointError, InputError
from models.files import locked
from models.item_table import SEGMENT, append_segments, read_index, segment_table
from models.load import load_ranker
from models.ranker import Ranker, VqlHistory


@errors_of_workers()
def encode_items(spark: SparkSession, checkpoint: Checkpoint, log: Path) -> tuple[int, int]:
    """Append the new items, one run at a time; returns (items added, items in the table)."""
    folder = checkpoint.items_path
    if checkpoint.manifest.model != "vql":
        raise InputError(f"{checkpoint.path} is a {checkpoint.manifest.model} model: it has no codes for items")
    with locked(folder):
        return _append(spark, checkpoint, log)


def _append(spark: SparkSession, checkpoint: Checkpoint, log: Path) -> tuple[int, int]:
    folder = checkpoint.items_path
    known = _known_segments(folder, checkpoint.checkpoint_id)
    items = _items(spark, log, checkpoint.manifest.fields[1:])
    if known:
        encoded = spark.read.parquet(*(str(folder / name) for name in known))
        items = items.join(encoded.select("item_id"), "item_id", "left_anti")
    # What a killed run left is named by no index, and its name may come again.
    run = folder / f"run-{len(known):05d}"
    shutil.rmtree(run, ignore_errors=True)
    # One sort by id, so that the same items get the same indices on any cluster.
    encoded = items.orderBy("item_id").mapInArrow(_encoder(str(checkpoint.path)), from_arrow_schema(SEGMENT))
    encoded.write.parquet(str(run))
    files = [f for f in sorted(run.glob("*.parquet")) if pq.ParquetFile(f).metadata.num_rows]
    if not known:
        files.insert(0, _unknown_segment(checkpoint, folder))
    before = sum(s.items for s in read_index(folder).segments) if known else 0
    index = append_segments(folder, checkpoint.checkpoint_id, files)
    after = sum(s.items for s in index.segments)
    return after - before, after


def encode_table(
    ranker: Ranker, item_ids: list[str], feature_NF: np.ndarray, cell_NQ: np.ndarray | None = None
) -> pa.Table:
    """Items with their embedding rows, and what they are counted as, to a segment's columns."""
    assert isinstance(ranker.history, VqlHistory)
    with torch.inference_mode():
        feature = torch.from_numpy(feature_NF)
        x_Nd = ranker.encoder.encode(feature)
        code_NG = ranker.history.codes(x_Nd, feature).numpy()
        value_NV = ranker.history.values(x_Nd).flatten(1).numpy()
    return segment_table(item_ids, code_NG, value_NV, feature_NF, cell_NQ)


def _known_segments(folder: Path, checkpoint_id: str) -> list[str]:
    if not (folder / "items.json").exists():
        return []
    index = read_index(folder)
    if index.checkpoint_id != checkpoint_id:
        raise CheckpointError(f"{folder} is the item table of {index.checkpoint_id}")
    return [s.name for s in index.segments]


def _items(spark: SparkSession, log: Path, fields: list[str]) -> DataFrame:
    """Every item id of the log and of the items table, with its fields as strings (null: not known)."""
    ids = read_events(spark, log).select("item_id").distinct()
    if not fields:
        return ids
    static = read_delta(spark, log / "items")
    if missing := [f for f in fields if f not in static.columns]:
        raise InputError(f"{log / 'items'} has no columns {missing}, with which the checkpoint was trained")
    return static.select("item_id", *(F.col(f).cast("string").alias(f) for f in fields)).join(ids, "item_id", "outer")


def _encoder(path: str) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    def encode(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        checkpoint = open_checkpoint(Path(path))
        fields = checkpoint.manifest.fields
        indices = [{v: i + 1 for i, v in enumerate(checkpoint.vocabulary(f))} for f in fields]
        ranker = _unaware_ranker(checkpoint)
        for batch in batches:
            columns = [batch[f].to_pylist() for f in fields]
            feature_NF = np.array(
                [[index.get(v, 0) for v in column] for index, column in zip(indices, columns, strict=True)], np.int64
            ).T
            cell_NQ = _cells(checkpoint, dict(zip(fields, zip(columns, feature_NF.T, strict=True), strict=True)))
            yield from encode_table(ranker, columns[0], np.ascontiguousarray(feature_NF), cell_NQ).to_batches()

    return encode


def _unaware_ranker(checkpoint: Checkpoint) -> Ranker:
    """The ranker without a table of items: it encodes those it is given."""
    counts = checkpoint.manifest.counts
    cell_MQ = None if counts is None else np.zeros((1, len(counts.fields)), np.uint16)
    return load_ranker(checkpoint, np.zeros((1, len(checkpoint.manifest.fields)), np.int64), cell_MQ)


def _cells(checkpoint: Checkpoint, columns: Mapping[str, tuple[list[str | None], np.ndarray]]) -> np.ndarray | None:
    """What items are counted as (N Q), from their fields' values and embedding rows: also by values without a row."""
    counts = checkpoint.manifest.counts
    return None if counts is None else np.stack([counts.cells_of(f, *columns[f]) for f in counts.fields], axis=1)


def _unknown_segment(checkpoint: Checkpoint, folder: Path) -> Path:
    """Row 0: the item of which nothing is known."""
    fields = checkpoint.manifest.fields
    feature = np.zeros((1, len(fields)), np.int64)
    cells = _cells(checkpoint, {field: ([""], feature[:, f]) for f, field in enumerate(fields)})
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "unknown.parquet"
    pq.write_table(encode_table(_unaware_ranker(checkpoint), [""], feature, cells), path)
    return path
