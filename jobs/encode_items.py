"""`vql encode-items`: the item table of a checkpoint, made by Spark and only ever appended to.

Every item of the log and of the items table that the item table does not hold yet is encoded from its static
context: the embedding rows of its features (0 for values the checkpoint was not trained with), then the code of each
group and the value of each head. Segments are Parquet files written by the executors; the index names them last,
so a killed run leaves no half table.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pyspark import Accumulator
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema

from jobs.event_log import read_events
from jobs.spark import errors_of_workers, read_delta
from models.checkpoint import Checkpoint, open_checkpoint
from models.errors import CheckpointError, InputError
from models.files import locked
from models.item_context import Context, context_of, tag_index, told
from models.item_table import SEGMENT, append_segments, read_index, segment_table
from models.load import load_ranker
from models.ranker import Ranker, VqlHistory

_log = logging.getLogger(__name__)


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
    manifest = checkpoint.manifest
    context = manifest.context or Context()
    items = _items(spark, log, manifest.fields[1:], context)
    if known:
        encoded = spark.read.parquet(*(str(folder / name) for name in known))
        items = items.join(encoded.select("item_id"), "item_id", "left_anti")
    # What a killed run left is named by no index, and its name may come again.
    run = folder / f"run-{len(known):05d}"
    shutil.rmtree(run, ignore_errors=True)
    # One sort by id, so that the same items get the same indices on any cluster.
    left_out = {name: spark.sparkContext.accumulator(0) for name in context.names}
    encoder = _encoder(str(checkpoint.path), left_out)
    items.orderBy("item_id").mapInArrow(encoder, from_arrow_schema(SEGMENT)).write.parquet(str(run))
    if missed := told(context, {name: counted.value for name, counted in left_out.items()}):
        _log.warning("left out of the items' features: %s", missed)
    files = [f for f in sorted(run.glob("*.parquet")) if pq.ParquetFile(f).metadata.num_rows]
    if not known:
        files.insert(0, _unknown_segment(checkpoint, folder))
    before = sum(s.items for s in read_index(folder).segments) if known else 0
    index = append_segments(folder, checkpoint.checkpoint_id, files)
    after = sum(s.items for s in index.segments)
    return after - before, after


def encode_table(
    ranker: Ranker,
    item_ids: list[str],
    feature_NF: np.ndarray,
    cell_NQ: np.ndarray | None = None,
    vector_NP: np.ndarray | None = None,
) -> pa.Table:
    """Items with their embedding rows, what they are counted as, and their vectors, to a segment's columns."""
    assert isinstance(ranker.history, VqlHistory)
    vectors, vector_Nd = ranker.encoder.vectors, None
    with torch.inference_mode():
        feature = torch.from_numpy(feature_NF)
        x_Nd = ranker.encoder.of_rows(feature)
        if vectors is not None:
            assert vector_NP is not None
            vector_Nd = vectors.project(torch.from_numpy(vector_NP))
            x_Nd = x_Nd + vector_Nd
        code_NG = ranker.history.codes(x_Nd, feature).numpy()
        value_NV = ranker.history.values(x_Nd).flatten(1).numpy()
    return segment_table(
        item_ids, code_NG, value_NV, feature_NF, cell_NQ, None if vector_Nd is None else vector_Nd.numpy()
    )


def _known_segments(folder: Path, checkpoint_id: str) -> list[str]:
    if not (folder / "items.json").exists():
        return []
    index = read_index(folder)
    if index.checkpoint_id != checkpoint_id:
        raise CheckpointError(f"{folder} is the item table of {index.checkpoint_id}")
    return [s.name for s in index.segments]


def _items(spark: SparkSession, log: Path, fields: list[str], context: Context) -> DataFrame:
    """Every item id of the log and of the items table, with its fields as strings and its context (null: not known)."""
    ids = read_events(spark, log).select("item_id").distinct()
    if not fields and not context.names:
        return ids
    static = read_delta(spark, log / "items")
    if missing := [f for f in (*fields, *context.names) if f not in static.columns]:
        raise InputError(
            f"{log / 'items'} has no columns {missing}, with which the checkpoint was trained: give them to "
            "vql ingest-items, by --column if the file has none of that name"
        )
    known = (F.col(f).cast("string").alias(f) for f in fields)
    return static.select("item_id", *known, *context.names).join(ids, "item_id", "outer")


def _encoder(
    path: str, left_out: Mapping[str, Accumulator[int]]
) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    def encode(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        checkpoint = open_checkpoint(Path(path))
        fields, context = checkpoint.manifest.fields, checkpoint.manifest.context or Context()
        indices = [{v: i + 1 for i, v in enumerate(checkpoint.vocabulary(f))} for f in fields]
        tags = tag_index({name: checkpoint.vocabulary(name) for name in context.tags})
        ranker = _unaware_ranker(checkpoint)
        for batch in batches:
            columns = [batch[f].to_pylist() for f in fields]
            feature_NF = np.array(
                [[index.get(v, 0) for v in column] for index, column in zip(indices, columns, strict=True)], np.int64
            ).T
            cell_NQ = _cells(checkpoint, dict(zip(fields, zip(columns, feature_NF.T, strict=True), strict=True)))
            of = context_of(pa.Table.from_batches([batch]), context, tags)
            for name, count in of.left_out.items():
                left_out[name].add(count)
            feature_NF = np.ascontiguousarray(np.concatenate([feature_NF, of.row_NC], axis=1))
            yield from encode_table(ranker, columns[0], feature_NF, cell_NQ, of.vector_NP).to_batches()

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
    fields, context = checkpoint.manifest.fields, checkpoint.manifest.context or Context()
    feature = np.zeros((1, len(fields) + context.columns), np.int64)
    nothing = np.full((1, context.vector_width), np.nan, np.float32)
    cells = _cells(checkpoint, {field: ([""], feature[:, f]) for f, field in enumerate(fields)})
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "unknown.parquet"
    pq.write_table(encode_table(_unaware_ranker(checkpoint), [""], feature, cells, nothing), path)
    return path
