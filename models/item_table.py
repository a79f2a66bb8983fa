"""The item table of a checkpoint: item id -> a code per group and a value per head.

Keys depend on static item context alone, so a code is a function of the item and the stream runs no model: it
looks items up here. Row 0 is the unknown item, which stands for every item the table does not hold. Rows are
only ever appended (`encode-items`), so an index written into a row of the cache stays valid.

On disk: <checkpoint>/items/items.json names the segments in order, with their sizes and hashes; a segment is a
Parquet file with columns item_id, code (G x int32), value (H * D x float32), feature (F x int32, the embedding
rows of each item field, number and tag, with which a ranker encodes candidates) and, where the checkpoint counts, cell
(Q x int32, what `models.counts` counts the item as); where it reads vectors of items, vector (d x float32, what its
projection makes of them). The file items.json is replaced atomically, after its segments are complete.

Shapes: M items, F columns of embedding rows, Q counted fields, A actions, G groups, H heads, D value width per head, d
model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float32, Int64, UInt16

from models.errors import CheckpointError, MismatchError
from models.files import replace_file, sha256_file

UNKNOWN = 0
# Spark has no unsigned integers: codes travel as int32 and are narrowed when the table is loaded.
SEGMENT = pa.schema(
    [
        ("item_id", pa.string()),
        ("code", pa.list_(pa.int32())),
        ("value", pa.list_(pa.float32())),
        ("feature", pa.list_(pa.int32())),
        ("cell", pa.list_(pa.int32())),
        ("vector", pa.list_(pa.float32())),
    ]
)


class Segment(msgspec.Struct, frozen=True, kw_only=True):
    """One Parquet file of the table."""

    name: str
    items: int
    sha256: str


class TableIndex(msgspec.Struct, frozen=True, kw_only=True):
    """items.json: which segments make the table of which checkpoint, in order."""

    checkpoint_id: str
    segments: list[Segment]


@dataclass(frozen=True, kw_only=True, slots=True)
class ItemTable:
    """Codes, values and cells by item index, and the index by item id. vector_Md: None where no vectors are read."""

    checkpoint_id: str
    index: dict[str, int]
    code_MG: UInt16[np.ndarray, "M G"]
    feature_MF: Int64[np.ndarray, "M F"]
    cell_MQ: UInt16[np.ndarray, "M Q"]
    value_MHD: Float32[np.ndarray, "M H D"]
    action_value_AHD: Float32[np.ndarray, "A H D"]
    vector_Md: Float32[np.ndarray, "M d"] | None = None

    def __len__(self) -> int:
        return len(self.code_MG)

    def lookup(self, item_ids: Sequence[str]) -> Int64[np.ndarray, "N"]:
        """Indices of the items; UNKNOWN (0) for those the table does not hold."""
        return np.fromiter(map(self.index.get, item_ids, repeat(UNKNOWN)), np.int64, len(item_ids))


def read_index(folder: Path) -> TableIndex:
    """Raises CheckpointError when the table was never made or its index is damaged."""
    path = folder / "items.json"
    try:
        return decode_index(path.read_bytes(), path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} holds no item table; run: vql encode-items") from error


def decode_index(raw: bytes, where: Path | str) -> TableIndex:
    """An index from the bytes of its file. Raises CheckpointError for one that is damaged."""
    try:
        return msgspec.json.decode(raw, type=TableIndex)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{where} is damaged ({error}); restore it from a copy") from error


def segment_table(
    item_ids: Sequence[str],
    code_NG: np.ndarray,
    value_NV: np.ndarray,
    feature_NF: np.ndarray,
    cell_NQ: np.ndarray | None = None,
    vector_Nd: np.ndarray | None = None,
) -> pa.Table:
    """Items as the columns of a segment; V = H * D. None for a checkpoint that does not count, or reads no vectors."""
    nothing = np.empty((len(item_ids), 0))
    cell_NQ, vector_Nd = nothing if cell_NQ is None else cell_NQ, nothing if vector_Nd is None else vector_Nd
    return pa.table(
        {
            "item_id": item_ids,
            "code": pa.array(list(code_NG.astype(np.int32)), pa.list_(pa.int32())),
            "value": pa.array(list(value_NV.astype(np.float32)), pa.list_(pa.float32())),
            "feature": pa.array(list(feature_NF.astype(np.int32)), pa.list_(pa.int32())),
            "cell": pa.array(list(cell_NQ.astype(np.int32)), pa.list_(pa.int32())),
            "vector": pa.array(list(vector_Nd.astype(np.float32)), pa.list_(pa.float32())),
        },
        schema=SEGMENT,
    )


def append_segments(folder: Path, checkpoint_id: str, files: Sequence[Path]) -> TableIndex:
    """Add finished Parquet files under `folder` to the table, in this order. Files already named are skipped.

    Raises MismatchError for the table of another checkpoint.
    """
    index = read_index(folder) if (folder / "items.json").exists() else None
    if index is not None and index.checkpoint_id != checkpoint_id:
        raise MismatchError(f"{folder} is the item table of {index.checkpoint_id}, not of {checkpoint_id}")
    segments = list(index.segments) if index else []
    named = {segment.name for segment in segments}
    for file in files:
        name = str(file.relative_to(folder))
        if name not in named:
            rows = pq.ParquetFile(file).metadata.num_rows
            segments.append(Segment(name=name, items=rows, sha256=sha256_file(file)))
    index = TableIndex(checkpoint_id=checkpoint_id, segments=segments)
    replace_file(folder / "items.json", msgspec.json.encode(index))
    return index


@dataclass(frozen=True, kw_only=True, slots=True)
class Widths:
    """Of the columns, as the checkpoint has them: G, Q, and d of what it makes of vectors. 0: it has no such column."""

    groups: int
    counted: int = 0
    projected: int = 0


def load_table(
    folder: Path, checkpoint_id: str, action_value_AHD: Float32[np.ndarray, "A H D"], widths: Widths
) -> ItemTable:
    """Read and verify every segment. Raises CheckpointError for a missing, damaged or foreign table."""
    index = read_index(folder)
    if index.checkpoint_id != checkpoint_id:
        raise CheckpointError(f"{folder} is the item table of {index.checkpoint_id}, not of {checkpoint_id}")
    if not index.segments:
        raise CheckpointError(f"{folder} holds an item table without items; restore it from a copy")
    columns = ["item_id", "code", "value", "feature"]
    columns += [name for name, width in (("cell", widths.counted), ("vector", widths.projected)) if width]
    tables = [_read_segment(folder / s.name, s, columns) for s in index.segments]
    table = pa.concat_tables(tables).combine_chunks()
    _, heads, width = action_value_AHD.shape
    item_ids = table["item_id"].to_pylist()
    cell_MQ = _matrix(table["cell"], widths.counted) if widths.counted else np.empty((len(item_ids), 0))
    return ItemTable(
        checkpoint_id=checkpoint_id,
        # Backwards, so that an item that occurs twice keeps its first index, which rows may hold.
        index={item_ids[i]: i for i in range(len(item_ids) - 1, UNKNOWN, -1)},
        code_MG=_matrix(table["code"], widths.groups).astype(np.uint16),
        feature_MF=_matrix(table["feature"], len(table["feature"][0])).astype(np.int64),
        cell_MQ=cell_MQ.astype(np.uint16),
        value_MHD=_matrix(table["value"], heads * width).astype(np.float32).reshape(-1, heads, width),
        action_value_AHD=action_value_AHD,
        vector_Md=_matrix(table["vector"], widths.projected).astype(np.float32) if widths.projected else None,
    )


def _read_segment(path: Path, segment: Segment, columns: list[str]) -> pa.Table:
    if not path.exists():
        raise CheckpointError(f"{path} is missing; restore it from a copy: rows hold its indices")
    if sha256_file(path) != segment.sha256:
        raise CheckpointError(f"{path} does not match its hash; restore it from a copy: rows hold its indices")
    return pq.read_table(path, columns=columns)


def _matrix(column: pa.ChunkedArray, width: int) -> np.ndarray:
    flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(-1, width)
