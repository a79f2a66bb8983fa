"""The names of the models, without the models: so that `vql train --help` lists them and loads no torch."""

from __future__ import annotations

# Those of `models.rivals.HISTORIES`, in its order.
MODELS = ("vql", "full", "din_50", "din_50_time", "sim", "eta", "twin", "sdim", "memory", "mean", "no_history")
# After a name: the same model, its head given exact counts of the user's items and declared fields.
EXACT_COUNTS = "+counts"


def counts_exactly(model: str) -> bool:
    """Whether the model of this name is given exact counts, such as no row holds."""
    return model.endswith(EXACT_COUNTS)


def may_count(model: str) -> bool:
    """Whether the model of this name has counts at all: VQL those of its rows, a rival only exact ones."""
    return model == "vql" or counts_exactly(model)
