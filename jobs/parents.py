"""The checkpoint that a training begins with: what of it has to be the same, and what it passes on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from jobs.examples import Vocabulary
from models.checkpoint import Checkpoint, Manifest, Sizes, open_checkpoint
from models.errors import InputError

if TYPE_CHECKING:
    from jobs.train import TrainJob

# Actions are small integers, in which "other" is one.
ACTIONS_MAX = 256


class Parent(msgspec.Struct, frozen=True, kw_only=True):
    """checkpoint_id decides the training, path only where it lies. freeze: its codebook stays as it is."""

    checkpoint_id: str
    path: str
    freeze: bool


def parent_of(path: Path, freeze: bool) -> Parent:
    """Raises CheckpointError as `open_checkpoint`."""
    return Parent(checkpoint_id=open_checkpoint(path).checkpoint_id, path=str(path), freeze=freeze)


def opened(parent: Parent) -> Checkpoint:
    """Raises CheckpointError as `open_checkpoint`, and InputError for another checkpoint than the one meant."""
    found = open_checkpoint(Path(parent.path))
    if found.checkpoint_id != parent.checkpoint_id:
        raise InputError(
            f"{parent.path} holds checkpoint {found.checkpoint_id} by now; the training began with "
            f"{parent.checkpoint_id}: put that back, or give --checkpoint another path"
        )
    return found


def check_parent(job: TrainJob, parent: Parent) -> None:
    """Raises InputError for settings that give parameters of the same name another shape or meaning."""
    manifest = opened(parent).manifest
    theirs = _settings(manifest, manifest.fields[1:], parent.freeze)
    ours = _settings(job, list(job.fields), parent.freeze)
    for name, value in ours.items():
        if value != theirs[name]:
            raise InputError(
                f"{parent.path} was trained with {name} {_shown(theirs[name])}, this training has {_shown(value)}; "
                "a training that begins with it needs the same"
            )
    if parent.freeze and manifest.model != "vql":
        raise InputError(f"{parent.path} is a {manifest.model}, which has no codebook to freeze")


def check_times(events: DataFrame, parent: Checkpoint, trained_until_ms: int, before_ms: int | None) -> None:
    """Raises InputError where the parent has seen what this training is not to: a gate would ask what it knows."""
    until_ms = before_ms
    if until_ms is None:
        newest_ms = events.agg(F.max("event_time_ms")).collect()[0][0]
        until_ms = 0 if newest_ms is None else newest_ms + 1
    if trained_until_ms > until_ms:
        raise InputError(
            f"{parent.path} was trained on events up to {trained_until_ms}, this training ends at {until_ms}; "
            "begin with a checkpoint that has not seen more"
        )


def known_by(parent: Checkpoint) -> Vocabulary:
    """The parent's values of fields and its tags, in the order of their rows; without items."""
    context = parent.manifest.context or None
    return Vocabulary(
        fields={field: parent.vocabulary(field) for field in parent.manifest.fields},
        feature_MF=np.zeros((0, 0), np.int64),
        context=context,
        tags={} if context is None else {name: parent.vocabulary(name) for name in context.tags},
    )


def all_actions(parent: Checkpoint, actions: list[str]) -> list[str]:
    """The parent's in their places, and those that it did not have; more than fit are "other"."""
    known = parent.manifest.actions
    return [*known, *(action for action in actions if action not in known)][:ACTIONS_MAX]


def _settings(of: Manifest | TrainJob, fields: list[str], freeze: bool) -> dict[str, object]:
    """What a job and the manifest of its checkpoint call by the same names, but for the fields."""
    context = of.context
    return {
        "model": of.model,
        "fields": fields,
        "numbers, tags, vectors": [list(names) for names in (context.numbers, context.tags, context.vectors)]
        if context
        else [],
        "half-lives": [list(head) for head in of.half_life_ms],
        "counts": of.counts and msgspec.structs.replace(of.counts, known=msgspec.UNSET),
        "category code": of.category_code or None,
        "sizes": _compared(of.sizes, freeze),
    }


def _compared(sizes: Sizes, freeze: bool) -> dict[str, int]:
    """Without those that no parameter depends on: how much of a window there is, codewords that are placed anew."""
    free = {"window", "newest"} if freeze else {"window", "newest", "codewords"}
    return {name: size for name, size in msgspec.structs.asdict(sizes).items() if name not in free}


def _shown(value: object) -> str:
    return msgspec.json.encode(value).decode()
