"""The ways to read a history that VQL is compared with, each one small file behind the same interface."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from models.ranker import Shape, VqlHistory
from models.rivals.din import DinHistory
from models.rivals.no_history import NoHistory

HISTORIES: dict[str, Callable[[Shape], nn.Module]] = {
    "vql": VqlHistory,
    "din_50": DinHistory,
    "no_history": NoHistory,
}
