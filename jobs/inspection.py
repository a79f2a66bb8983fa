"""A checkpoint drawn: its temporal kernels, and what quantisation does to attention; and how large its rows can be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jobs.plots import png
from models.attention import log_weights
from models.cache import Cache
from models.checkpoint import Checkpoint
from models.files import replace_file
from models.row import Row, encode_row
from models.temporal import TemporalKernel
from models.wire import RECENT, Stamp, encode_folded

# The learned weights of the kernel's exponentials, before softplus (models.temporal.TemporalKernel).
KERNEL = "history.kernel.raw_HR"
DAY_MS = 86_400_000
AGES_DAYS = np.geomspace(1 / 1440, 365, 200)


def largest_row_bytes(checkpoint: Checkpoint) -> int:
    """Of a row whose user has events of every codeword, and the most recent events that a row keeps; less its counts.

    A user's counts take what the distinct values that they met take: no number of codewords bounds them.
    """
    spec, heads = checkpoint.spec, checkpoint.spec.heads // checkpoint.spec.groups
    entries = spec.groups * spec.codewords
    mass_NPR = np.ones((entries, heads, spec.rates), np.float32)
    full = Cache(
        spec=spec,
        reference_ms=0,
        count=entries,
        code_N=np.arange(entries, dtype=np.uint16),
        net_N=np.ones(entries, np.int32),
        mass_NPR=mass_NPR,
        mean_NPRD=np.ones((*mass_NPR.shape, spec.value_width), np.float32),
    )
    at = Stamp(epoch=0, partition=0, offset=0)
    row = Row(
        spec=spec,
        folded_data=encode_folded(full, at),
        folded_stamp=at,
        folded_count=entries,
        recent_data=bytes(2 * checkpoint.manifest.sizes.window * RECENT.itemsize),
        stamp=at,
    )
    return encode_row(row).size_bytes


def draw(checkpoint: Checkpoint, path: Path) -> None:
    """The kernels of a model that has them, and its diagnostics if there are any, as one PNG."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    kernels, attention = figure.subplots(1, 2)
    _kernels(checkpoint, kernels)
    _attention(checkpoint, attention)
    replace_file(path, png(figure))


def _kernels(checkpoint: Checkpoint, axes: Axes) -> None:
    """kappa_h(age), each head's relative to its value at age 0."""
    axes.set(xlabel="age, days", ylabel="temporal kernel", xscale="log")
    tensors = checkpoint.tensors()
    if KERNEL not in tensors:
        axes.set_title(f"{checkpoint.manifest.model} has no temporal kernel")
        return
    half_life_ms = checkpoint.manifest.half_life_ms
    kernel = TemporalKernel(half_life_ms)
    kernel.load_state_dict({"raw_HR": torch.from_numpy(tensors[KERNEL])})
    age_ms_1A = torch.from_numpy(np.append(0, AGES_DAYS * DAY_MS).astype(np.int64))[None]
    with torch.inference_mode():
        log_kappa_HA = log_weights(
            kernel(), -age_ms_1A, torch.ones(age_ms_1A.shape), torch.zeros(1, dtype=torch.int64)
        )[0]
    kappa_HA = (log_kappa_HA - log_kappa_HA[:, :1]).exp().numpy()
    for h, half_lives in enumerate(half_life_ms):
        named = ", ".join("never" if life is None else f"{life / DAY_MS:.3g} d" for life in half_lives)
        axes.plot(AGES_DAYS, kappa_HA[h, 1:], label=f"head {h}: {named}")
    axes.legend(fontsize="small")


def _attention(checkpoint: Checkpoint, axes: Axes) -> None:
    axes.set(xlabel="events", ylabel="sum |p - p'|", xscale="log")
    found = checkpoint.manifest.diagnostics
    if found is None:
        axes.set_title("no diagnostics: no codebook")
        return
    lengths = [each.length for each in found.attention]
    for name in ("mean", "p99", "bound"):
        axes.plot(lengths, [getattr(each, name) for each in found.attention], marker=".", label=name)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")
