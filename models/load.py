"""A checkpoint back to a ranker that scores."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Int64, UInt16

from models.checkpoint import Checkpoint
from models.errors import CheckpointError
from models.ranker import Ranker, Shape
from models.rivals import HISTORIES


def load_ranker(
    checkpoint: Checkpoint, feature_MF: Int64[np.ndarray, "M F"], cell_MQ: UInt16[np.ndarray, "M Q"] | None = None
) -> Ranker:
    """The trained model in evaluation mode. Raises CheckpointError when the parameters do not fit the manifest.

    feature_MF are the embedding rows of the items it will be asked about, and cell_MQ what these are counted as: the
    item table's, usually. A checkpoint that counts needs cells.
    """
    manifest = checkpoint.manifest
    tensors = {name: torch.from_numpy(array) for name, array in checkpoint.tensors().items()}
    rows = [len(tensors[f"encoder.fields.{f}.weight"]) for f in range(len(manifest.fields))]
    shape = Shape(
        sizes=manifest.sizes,
        half_life_ms=manifest.half_life_ms,
        actions=len(manifest.actions),
        field_rows=rows,
        counting=manifest.counts,
    )
    if manifest.model not in HISTORIES:
        raise CheckpointError(f"{checkpoint.path} holds a model {manifest.model!r}; known are {list(HISTORIES)}")
    ranker = Ranker(shape, torch.from_numpy(feature_MF), HISTORIES[manifest.model](shape), cell_MQ)
    try:
        ranker.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"the parameters of {checkpoint.path} do not fit its manifest: {error}") from error
    return ranker.eval()
