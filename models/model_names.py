"""The names of the models, without the models: so that `vql train --help` lists them and loads no torch."""

from __future__ import annotations

# Those of `models.rivals.HISTORIES`, in its order.
MODELS = ("vql", "full", "din_50", "din_50_time", "sim", "eta", "twin", "sdim", "memory", "mean", "no_history")
