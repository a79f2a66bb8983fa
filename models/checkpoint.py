"""A checkpoint: the one directory that training, stream and ranker share, so that no two of them can disagree.

    manifest.json         sizes, rates, window, actions, item fields, training facts, metrics, hash of every file
    model.safetensors     the parameters
    vocabulary/F.parquet  the values of item field, or the tags, F in embedding order (row 0 is "unknown")
    items/                the item table, grown by `encode-items`; not part of the checkpoint's identity

The id of a checkpoint is the start of the SHA-256 of its manifest, which holds the hashes of the files: two
checkpoints with one id are the same bytes. A directory is written under another name and renamed when whole.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from models.cache import CacheSpec, decay_rates
from models.counts import CountPlan
from models.diagnostics import Diagnostics
from models.errors import CheckpointError
from models.files import disk_error, sha256_file
from models.item_context import Context
from models.item_table import Widths, load_table
from models.row import Fold

FORMAT_VERSION = 1
OTHER_ACTION = "other"
# The one parameter that the stream reads: values are item value + action value.
ACTION_VALUES = "history.action_value_AHD"


class Sizes(msgspec.Struct, frozen=True, kw_only=True):
    """The integers of the model; see models.ranker for the letters.

    window: W, the recent events that a row keeps as they are. newest: of these, how many VQL also attends one by one.
    """

    width: int = 32
    heads: int = 4
    groups: int = 4
    codewords: int = 256
    key_width: int = 8
    value_width: int = 8
    window: int = 64
    newest: int = 0

    def __post_init__(self) -> None:
        sizes = msgspec.structs.asdict(self)
        if wrong := {name: size for name, size in sizes.items() if size < (name not in ("window", "newest"))}:
            raise ValueError(f"sizes must be positive: {wrong}")
        if self.newest > self.window:
            raise ValueError(f"the newest {self.newest} events are not in rows that keep {self.window} (window)")
        if self.heads % self.groups:
            raise ValueError(f"heads {self.heads} do not divide into {self.groups} groups")
        if self.groups * self.codewords > 2**16:
            raise ValueError(f"{self.groups} x {self.codewords} codewords do not fit in 16 bits")


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """manifest.json. half_life_ms is H x R with null for "never"; actions[0] is "other"; diagnostics: of vql alone.

    counts: null where none are kept. category_code: the item field whose value is the code of group 0; absent where
    all are learned.
    trained_before_ms: events from then on are not in its training; absent where all of the log's version are.
    context: the item features beside the fields; absent where there are none. items_version: the Delta version of the
    items table that was read, as training's log_version is that of the events; absent where no items were read.
    """

    model: str
    sizes: Sizes
    half_life_ms: list[list[float | None]]
    actions: list[str]
    fields: list[str]
    training: dict[str, str | int | float]
    metrics: dict[str, float]
    files: dict[str, str]
    counts: CountPlan | None = None
    diagnostics: Diagnostics | None = None
    format_version: int = FORMAT_VERSION
    category_code: str | msgspec.UnsetType = msgspec.UNSET
    trained_before_ms: int | msgspec.UnsetType = msgspec.UNSET
    context: Context | msgspec.UnsetType = msgspec.UNSET
    items_version: int | msgspec.UnsetType = msgspec.UNSET

    @property
    def category_field(self) -> int | None:
        """The place of category_code among the fields. Raises CheckpointError for one that is none of them."""
        if self.category_code is msgspec.UNSET:
            return None
        if self.category_code not in self.fields:
            raise CheckpointError(f"the codes of {self.category_code!r} are those of none of the fields {self.fields}")
        return self.fields.index(self.category_code)


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """An opened, verified checkpoint directory."""

    path: Path
    manifest: Manifest
    checkpoint_id: str

    @property
    def spec(self) -> CacheSpec:
        """Sizes and decay rates (1/ms) as the cache needs them."""
        return CacheSpec(
            checkpoint_id=self.checkpoint_id,
            groups=self.manifest.sizes.groups,
            codewords=self.manifest.sizes.codewords,
            value_width=self.manifest.sizes.value_width,
            rate_HR=decay_rates(self.manifest.half_life_ms),
        )

    @property
    def items_path(self) -> Path:
        return self.path / "items"

    def fold(self) -> Fold:
        """What a writer of rows needs; reads the item table. Raises CheckpointError when it was never made."""
        action_value_AHD = self.tensors([ACTION_VALUES])[ACTION_VALUES]
        counting, sizes, context = self.manifest.counts, self.manifest.sizes, self.manifest.context
        widths = Widths(
            groups=sizes.groups,
            counted=0 if counting is None else len(counting.fields),
            projected=sizes.width if context and context.vectors else 0,
        )
        table = load_table(self.items_path, self.checkpoint_id, action_value_AHD, widths)
        return Fold(spec=self.spec, window=sizes.window, newest=sizes.newest, table=table, counting=counting)

    def action_index(self, actions: Sequence[str]) -> np.ndarray:
        """Indices of the actions; 0 ("other") for those the checkpoint was not trained with."""
        index = {action: i for i, action in enumerate(self.manifest.actions)}
        return np.fromiter((index.get(a, 0) for a in actions), np.int64, len(actions))

    def tensors(self, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """The named parameters, or all, as numpy arrays."""
        path = self.path / "model.safetensors"
        try:
            with safe_open(path, framework="numpy") as file:
                return {name: file.get_tensor(name) for name in (names or file.keys())}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}); train again or restore it") from error

    def vocabulary(self, field: str) -> list[str]:
        """The values of an item field, or its tags; value i has embedding row i + 1."""
        return pq.read_table(self.path / "vocabulary" / f"{field}.parquet")["value"].to_pylist()


def open_checkpoint(path: Path) -> Checkpoint:
    """Read and verify. Raises CheckpointError: no checkpoint, an unknown version, a missing or altered file."""
    manifest_path = path / "manifest.json"
    if not manifest_path.is_file():
        raise CheckpointError(f"{path} is no checkpoint: it has no manifest.json (vql train makes one)")
    raw = manifest_path.read_bytes()
    try:
        version = msgspec.json.decode(raw, type=dict).get("format_version")
        if version != FORMAT_VERSION:
            raise CheckpointError(f"{path} has checkpoint format {version!r}; this program knows {FORMAT_VERSION}")
        manifest = msgspec.json.decode(raw, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{manifest_path} is damaged: {error}") from error
    for name, digest in manifest.files.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing; restore it or train again")
        if sha256_file(file) != digest:
            raise CheckpointError(f"{file} does not match its hash in the manifest; restore it or train again")
    return Checkpoint(path=path, manifest=manifest, checkpoint_id=identify(raw))


def identify(manifest: bytes) -> str:
    """The id (32 hex digits) of the checkpoint with these manifest bytes."""
    return hashlib.sha256(manifest).hexdigest()[:32]


def write_checkpoint(
    path: Path, manifest: Manifest, tensors: Mapping[str, np.ndarray], vocabularies: Mapping[str, Sequence[str]]
) -> Checkpoint:
    """Write the directory whole or not at all; `manifest.files` is filled in here.

    An existing checkpoint at `path` is replaced. Raises MachineError when the disk is full.
    """
    partial, old = path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "vocabulary").mkdir(parents=True)
        (partial / "model.safetensors").write_bytes(save(dict(tensors)))
        for field, values in vocabularies.items():
            pq.write_table(pa.table({"value": pa.array(values, pa.string())}), partial / f"vocabulary/{field}.parquet")
        names = sorted(str(p.relative_to(partial)) for p in partial.rglob("*") if p.is_file())
        manifest = msgspec.structs.replace(manifest, files={n: sha256_file(partial / n) for n in names})
        (partial / "manifest.json").write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=2))
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            path.replace(old)
        partial.replace(path)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        if old.exists() and not path.exists():
            old.replace(path)
        raise disk_error(error, path) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return open_checkpoint(path)
