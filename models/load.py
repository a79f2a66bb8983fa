"""A checkpoint back to a ranker that scores."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt16

from models.checkpoint import Checkpoint
from models.counts import exact_cells
from models.errors import CheckpointError
from models.item_table import ItemTable
from models.model_names import counts_exactly
from models.ranker import Ranker, Shape
from models.rivals import HISTORIES, new_history


def load_ranker_of(checkpoint: Checkpoint, table: ItemTable) -> Ranker:
    """The trained model in evaluation mode, to be asked about the items of its table. Raises as `load_ranker`."""
    ranker = load_ranker(checkpoint, table.feature_MF, table.cell_MQ)
    if ranker.encoder.vectors is not None and table.vector_Md is not None:
        ranker.encoder.vectors.hold_projected(torch.from_numpy(table.vector_Md))
    return ranker


def load_ranker(
    checkpoint: Checkpoint,
    feature_MF: Int64[np.ndarray, "M F"],
    cell_MQ: UInt16[np.ndarray, "M Q"] | None = None,
    vector_MP: Float32[np.ndarray, "M P"] | None = None,
) -> Ranker:
    """The trained model in evaluation mode. Raises CheckpointError when the parameters do not fit the manifest.

    feature_MF are the embedding rows of the items it will be asked about, cell_MQ what these are counted as, and
    vector_MP their vectors. A checkpoint that counts in its rows needs cells, one that reads vectors these.
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
        category_field=manifest.category_field,
        context=manifest.context or None,
    )
    try:
        history = new_history(manifest.model, shape)
    except KeyError as error:
        raise CheckpointError(
            f"{checkpoint.path} holds a model {manifest.model!r}; known are {list(HISTORIES)}"
        ) from error
    if manifest.counts is not None and counts_exactly(manifest.model):
        cell_MQ = exact_cells(feature_MF, manifest.fields, manifest.counts)
    ranker = Ranker(shape, torch.from_numpy(feature_MF), history, cell_MQ)
    if ranker.encoder.vectors is not None and vector_MP is not None:
        ranker.encoder.vectors.hold(torch.from_numpy(vector_MP))
    try:
        ranker.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"the parameters of {checkpoint.path} do not fit its manifest: {error}") from error
    return ranker.eval()
