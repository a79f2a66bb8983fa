"""Where tensors are: the device that an option names."""

from __future__ import annotations

import torch

from models.errors import InputError


def usable_device(name: str) -> torch.device:
    """The device, by torch's name for it. Raises InputError for one that cannot be used here."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device: {name!r} cannot be used here ({reason}); cpu always can") from error
    return device
