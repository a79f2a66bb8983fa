"""A training that begins with another checkpoint's parameters, its parent's.

Parameters are taken by name. What a vocabulary decides (rows of item values, of actions) may have grown: known values
keep their rows, which come first, and new ones begin as in any training. All else has to have the same shape.

The codebook is frozen (codewords, and what moves them, stay as they are; keys are quantised from the first step on), or
learned again, as a first training does it: exact keys at first, then codewords placed anew.
"""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import torch

from models.checkpoint import open_checkpoint
from models.errors import InputError
from models.ranker import Ranker, VqlHistory

GROWS = re.compile(r"encoder\.fields\.\d+\.weight|history\.(window\.)?action(_value_AHD|\.weight)")
_CODEBOOK = "history.codebook."


class WarmStart(msgspec.Struct, frozen=True, kw_only=True):
    """checkpoint: the parent's directory. freeze: its codebook stays as it is; else it is learned again."""

    checkpoint: str
    freeze: bool


@torch.no_grad()
def take_parameters(ranker: Ranker, warm: WarmStart) -> None:
    """Give an untrained ranker its parent's parameters.

    Raises InputError for names or shapes that do not fit and for a codebook that is not there to be frozen,
    CheckpointError as `open_checkpoint`.
    """
    parent = open_checkpoint(Path(warm.checkpoint)).tensors()
    own = ranker.state_dict()
    if missing := sorted(own.keys() ^ parent.keys()):
        raise InputError(f"{warm.checkpoint} and this training do not have the same parameters: {missing[:5]}")
    if warm.freeze and not isinstance(ranker.history, VqlHistory):
        raise InputError(f"a {type(ranker.history).__name__} has no codebook to freeze")
    for name, into in own.items():
        if name.startswith(_CODEBOOK) and not warm.freeze:
            continue
        taken = torch.from_numpy(parent[name])
        grows = GROWS.fullmatch(name) and into.ndim == taken.ndim and len(into) >= len(taken)
        if (into.shape[1:] if grows else into.shape) != (taken.shape[1:] if grows else taken.shape):
            raise InputError(
                f"{warm.checkpoint} has {name} of {tuple(taken.shape)}, this training of {tuple(into.shape)}; give the "
                "options that it was trained with"
            )
        if grows:
            into[: len(taken)] = taken
        else:
            into.copy_(taken)
    if warm.freeze and isinstance(ranker.history, VqlHistory) and not ranker.history.codebook.started:
        raise InputError(f"{warm.checkpoint} has no codewords yet; give --codebook relearn")
