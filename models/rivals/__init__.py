"""The ways to read a history that VQL is compared with, each one small file behind the same interface."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from models.ranker import Shape, VqlHistory
from models.rivals.din import DinHistory
from models.rivals.eta import EtaHistory
from models.rivals.no_history import NoHistory
from models.rivals.sdim import SdimHistory
from models.rivals.sim import SimHistory

HISTORIES: dict[str, Callable[[Shape], nn.Module]] = {
    "vql": VqlHistory,
    "din_50": DinHistory,
    "sdim": SdimHistory,
    "sim": SimHistory,
    "eta": EtaHistory,
    "no_history": NoHistory,
}
