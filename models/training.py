"""The training loop: the same for VQL and every rival, on one process or several, resumable at any moment.

A run is a function of its `TrainPlan` alone. The state (parameters, optimisers, random generators, step) is saved
every `save_every_steps` and replaced atomically; a run that finds a state of its own plan continues from it and
ends with the same parameters as one that was never interrupted. Knows nothing of Spark, which starts it.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import nn

from models.checkpoint import Sizes
from models.counts import Counter, CountPlan
from models.files import replace_file
from models.ranker import Ranker, Shape, VqlHistory, loss
from models.request import Impression, Request, collate
from models.rivals import new_history
from models.timelines import CELLS, FEATURES, batches, count_impressions, timeline_files

COMMITMENT = 0.01
KEY_SAMPLE = 20_000


class TrainPlan(msgspec.Struct, frozen=True, kw_only=True):
    """All that decides a run. `examples` and `work` are folders; FEATURES in `examples` is the feature table.

    A plan that counts has CELLS in `work`.
    """

    model: str
    examples: str
    work: str
    sizes: Sizes
    half_life_ms: list[list[float | None]]
    actions: list[str]
    field_rows: list[int]
    counts: CountPlan | None = None
    length: int = 512
    epochs: int = 1
    batch: int = 32
    seed: int = 0
    learning_rate: float = 6e-3
    id_learning_rate: float = 2e-2
    save_every_steps: int = 50


@dataclass(kw_only=True, slots=True)
class _Run:
    """The live objects of one process of a run."""

    plan: TrainPlan
    ranker: Ranker
    forward: nn.Module
    optimizers: list[torch.optim.Optimizer]
    generator: torch.Generator
    steps: int
    counter: Counter | None
    step: int = 0


def train(plan: TrainPlan) -> Path:
    """Run to the end, or continue to it; returns the file of final parameters. One process of possibly several."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    final = Path(plan.work) / "final.pt"
    if final.exists():
        return final
    if world > 1:
        torch.distributed.init_process_group("gloo")
    run = _begin(plan, world)
    _resume(run)
    log = Path(plan.work) / "loss.jsonl"
    _trim_log(log, run.step)
    started_s, shown_s = time.monotonic(), 0.0
    step_s = started_s
    for impressions in _batches_from(run, rank, world):
        value = _step(run, collate(impressions, plan.length, run.counter))
        if rank == 0:
            now_s = time.monotonic()
            elapsed_s = now_s - started_s
            with log.open("a") as file:
                file.write(f'{{"step": {run.step}, "loss": {value:.6f}, "seconds": {now_s - step_s:.6f}}}\n')
            step_s = now_s
            if elapsed_s - shown_s > 5 or run.step == run.steps:
                print(f"  {plan.model}: step {run.step}/{run.steps}  loss {value:.4f}  {elapsed_s:.0f} s", flush=True)
                shown_s = elapsed_s
            if run.step % plan.save_every_steps == 0:
                _save(run, Path(plan.work) / "state.pt")
    if rank == 0:
        _save(run, final)
    if world > 1:
        torch.distributed.destroy_process_group()
    return final


def final_parameters(plan: TrainPlan) -> dict[str, np.ndarray]:
    """The trained parameters by name."""
    state = torch.load(Path(plan.work) / "final.pt", weights_only=True)
    return {name: tensor.numpy() for name, tensor in state["model"].items()}


def trained_ranker(plan: TrainPlan) -> Ranker:
    """The model of a plan that has run, in evaluation mode."""
    ranker = new_ranker(plan)
    ranker.load_state_dict({name: torch.from_numpy(array) for name, array in final_parameters(plan).items()})
    return ranker.eval()


def new_ranker(plan: TrainPlan) -> Ranker:
    """The model of a plan, untrained."""
    shape = Shape(
        sizes=plan.sizes,
        half_life_ms=plan.half_life_ms,
        actions=len(plan.actions),
        field_rows=plan.field_rows,
        counting=plan.counts,
    )
    features = torch.from_numpy(np.load(Path(plan.examples) / FEATURES))
    cell_MQ = None if plan.counts is None else np.load(Path(plan.work) / CELLS)
    return Ranker(shape, features, new_history(plan.model, shape), cell_MQ)


def _begin(plan: TrainPlan, world: int) -> _Run:
    torch.manual_seed(plan.seed)
    ranker = new_ranker(plan)
    files = timeline_files(Path(plan.examples))
    per_epoch = -(-count_impressions(files) // (plan.batch * world))
    return _Run(
        plan=plan,
        ranker=ranker,
        forward=nn.parallel.DistributedDataParallel(ranker) if world > 1 else ranker,
        optimizers=_optimizers(ranker, plan),
        generator=torch.default_generator,
        steps=per_epoch * plan.epochs,
        counter=ranker.counter,
    )


def _optimizers(ranker: Ranker, plan: TrainPlan) -> list[torch.optim.Optimizer]:
    """Adam for all, faster on kernel and temperature; sparse Adam for the item ids, of which a batch touches few."""
    ids = list(ranker.encoder.fields[0].parameters())
    quick = [p for n, p in ranker.named_parameters() if "kernel" in n or "temperature" in n]
    rest = [p for p in ranker.parameters() if not any(p is q for q in (*ids, *quick))]
    groups = [{"params": rest}, {"params": quick, "lr": 5 * plan.learning_rate}] if quick else [{"params": rest}]
    return [
        torch.optim.Adam(groups, lr=plan.learning_rate),
        torch.optim.SparseAdam(ids, lr=plan.id_learning_rate),
    ]


def _batches_from(run: _Run, rank: int, world: int) -> Iterator[list[Impression]]:
    """This process's share of the batches after the step already done; `run.step` counts along."""
    files, done, at = timeline_files(Path(run.plan.examples)), run.step, 0
    for epoch in range(run.plan.epochs):
        for whole in batches(files, run.plan.batch * world, seed=run.plan.seed, epoch=epoch):
            at += 1
            if at > done:
                run.step = at
                # A short last batch may leave a process without impressions; it repeats the first then.
                yield whole[rank::world] or whole[:1]


def _step(run: _Run, request: Request) -> float:
    """One optimisation step; returns the loss."""
    history = run.ranker.history
    if isinstance(history, VqlHistory) and not history.codebook.started and run.step > run.steps // 2:
        _start_codebook(run)
    for optimizer in run.optimizers:
        optimizer.zero_grad(set_to_none=True)
    logit_BC, commitment = run.forward(request)
    error = loss(logit_BC, request.label_BC)
    (error + COMMITMENT * commitment).backward()
    warmth = min(1.0, run.step / max(1, run.steps // 20)) * (1.0 if run.step < 0.8 * run.steps else 0.3)
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group.setdefault("full_lr", group["lr"])
            group["lr"] = group["full_lr"] * warmth
        optimizer.step()
    if isinstance(run.ranker.history, VqlHistory):
        _move_codebook(run.ranker, run.ranker.history, request, run.generator)
    return float(error.detach())


@torch.no_grad()
def _start_codebook(run: _Run) -> None:
    """Exact keys until here: place the codewords on a sample of the items' keys."""
    ranker = run.ranker
    history = ranker.history
    assert isinstance(history, VqlHistory)
    items = torch.randperm(len(ranker.encoder.feature_MF), generator=run.generator)[:KEY_SAMPLE]
    keys = history.keys(ranker.encoder(items))
    history.codebook.start(keys.reshape(len(keys), history.sizes.groups, -1), run.generator)


@torch.no_grad()
def _move_codebook(ranker: Ranker, history: VqlHistory, request: Request, generator: torch.Generator) -> None:
    """The EMA step towards the batch's keys, each item counted by its events."""
    real_BL = request.history.weight_BL > 0
    items, counts = torch.unique(request.history.item_BL[real_BL], return_counts=True)
    if len(items):
        keys = history.keys(ranker.encoder(items))
        history.codebook.update(keys.reshape(len(keys), history.sizes.groups, -1), counts.float(), generator)


def _resume(run: _Run) -> None:
    path = Path(run.plan.work) / "state.pt"
    if not path.exists():
        return
    state = torch.load(path, weights_only=True)
    run.ranker.load_state_dict(state["model"])
    for optimizer, saved in zip(run.optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    run.generator.set_state(state["generator"])
    run.step = state["step"]
    print(f"  {run.plan.model}: resumed at step {run.step}/{run.steps}", flush=True)


def _save(run: _Run, path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(
        {
            "model": run.ranker.state_dict(),
            "optimizers": [o.state_dict() for o in run.optimizers],
            "generator": run.generator.get_state(),
            "step": run.step,
        },
        buffer,
    )
    replace_file(path, buffer.getvalue())


def _trim_log(path: Path, step: int) -> None:
    """Losses after the step that is resumed from will be written again."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    replace_file(path, b"".join(lines[:step]))
