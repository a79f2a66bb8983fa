"""The ways to read a history that VQL is compared with, each one small file behind the same interface."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from models.model_names import EXACT_COUNTS
from models.ranker import Shape, VqlHistory
from models.rivals.din import DinHistory, din_with_time
from models.rivals.eta import EtaHistory
from models.rivals.full import FullHistory
from models.rivals.mean import MeanHistory
from models.rivals.memory import MemoryHistory
from models.rivals.no_history import NoHistory
from models.rivals.sdim import SdimHistory
from models.rivals.sim import SimHistory
from models.rivals.twin import TwinHistory

HISTORIES: dict[str, Callable[[Shape], nn.Module]] = {
    "vql": VqlHistory,
    "full": FullHistory,
    "din_50": DinHistory,
    "din_50_time": din_with_time,
    "sim": SimHistory,
    "eta": EtaHistory,
    "twin": TwinHistory,
    "sdim": SdimHistory,
    "memory": MemoryHistory,
    "mean": MeanHistory,
    "no_history": NoHistory,
}


def new_history(model: str, shape: Shape) -> nn.Module:
    """The way the model of this name reads a history. Raises KeyError for an unknown name."""
    return HISTORIES[model.removesuffix(EXACT_COUNTS)](shape)
