"""The training loop: the same for VQL and every rival, on one process or several, resumable at any moment.

Rivals are asked impressions, each with its newest `length` events. VQL's batches are timelines, each with a few of its
impressions: while its keys are exact it is asked these as rivals are, and from then on the timelines themselves
(models.chunked), at a cost per impression that does not grow with a history, and with all of it.

A run is a function of its `TrainPlan` alone. The state (parameters, optimisers, random generators, step) is saved
every `save_every_steps` and replaced atomically; a run that finds a state of its own plan continues from it and
ends with the same parameters as one that was never interrupted. Knows nothing of Spark, which starts it.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import nn

from models.checkpoint import Sizes
from models.counts import CountPlan
from models.errors import InputError
from models.files import replace_file
from models.item_context import Context
from models.ranker import Ranker, Shape, VqlHistory, loss
from models.request import Impression, Request, Timeline, TimelineBatch, collate, collate_timelines, counted
from models.rivals import new_history
from models.rivals.full import FullHistory
from models.stopping import Patience, auc_within
from models.timelines import (
    CELLS,
    FEATURES,
    VECTORS,
    Limits,
    batches,
    count_impressions,
    count_timeline_batches,
    timeline_batches,
    timeline_files,
)
from models.warm_start import WarmStart, take_parameters

COMMITMENT = 0.01
# Of the steps, before keys are quantised.
EXACT_SHARE = 0.3
KEY_SAMPLE = 20_000
# Items of a step that move the codewords, at most: long timelines have more, and as good a mean with these.
MOVING_ITEMS = 4_096
# Batches whose counts and masses say what is much and what is little.
COUNTED_BATCHES = 64
# Batches of held-out users that are looked at after an epoch.
HELD_OUT_BATCHES = 64


class TrainPlan(msgspec.Struct, frozen=True, kw_only=True):
    """All that decides a run. `examples` and `work` are folders; FEATURES in `examples` is the feature table, VECTORS
    the items' vectors where the context has any.

    batch: impressions of a step. events: of a step's timelines, in all; a single timeline may have more.
    patience: after so many epochs without a better GAUC of held-out users, the run ends with the parameters of the
    best. 0: all epochs, and no user is held out.
    counts: CELLS in `work` are what items are counted as.
    bfloat16: what torch's autocast says is done in it; attention, parameters and codewords stay float32.
    warm: the parent whose parameters the run begins with, if it has one.
    """

    model: str
    examples: str
    work: str
    sizes: Sizes
    half_life_ms: list[list[float | None]]
    actions: list[str]
    field_rows: list[int]
    counts: CountPlan | None = None
    category_field: int | None = None
    context: Context | None = None
    length: int = 512
    epochs: int = 1
    batch: int = 32
    events: int = 200_000
    patience: int = 0
    seed: int = 0
    device: str = "cpu"
    bfloat16: bool = False
    learning_rate: float = 6e-3
    id_learning_rate: float = 5e-3
    save_every_steps: int = 50
    warm: WarmStart | None = None


@dataclass(kw_only=True, slots=True)
class Run:
    """The live objects of one process of a run."""

    plan: TrainPlan
    ranker: Ranker
    forward: nn.Module
    optimizers: list[torch.optim.Optimizer]
    generator: torch.Generator
    steps: int
    step: int = 0
    patience: Patience = field(default_factory=Patience)


def train(plan: TrainPlan) -> Path:
    """Run to the end, or continue to it; returns the file of final parameters. One process of possibly several."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    final = Path(plan.work) / "final.pt"
    if final.exists():
        return final
    if world > 1:
        torch.distributed.init_process_group("gloo")
    run = begin(plan, world)
    _resume(run)
    log = Path(plan.work) / "loss.jsonl"
    _trim_log(log, run.step)
    started_s, shown_s, seen = time.monotonic(), 0.0, []
    step_s = started_s
    for share in _batches_from(run, rank, world):
        value, auc = step(run, share)
        seen.append(auc)
        if rank == 0:
            now_s = time.monotonic()
            elapsed_s = now_s - started_s
            with log.open("a") as file:
                file.write(f'{{"step": {run.step}, "loss": {value:.6f}, "seconds": {now_s - step_s:.6f}}}\n')
            step_s = now_s
            if elapsed_s - shown_s > 5 or run.step == run.steps:
                gauc = float(torch.tensor(seen).nanmean())
                said = f"loss {value:.4f}  gauc {gauc:.4f}  {elapsed_s:.0f} s"
                print(f"  {plan.model}: step {run.step}/{run.steps}  {said}", flush=True)
                shown_s, seen = elapsed_s, []
            if run.step % plan.save_every_steps == 0:
                _save(run, Path(plan.work) / "state.pt")
    if rank == 0:
        if plan.patience:
            run.ranker.load_state_dict(torch.load(_best(plan), weights_only=True)["model"])
        _save(run, final)
    if world > 1:
        torch.distributed.destroy_process_group()
    return final


def final_parameters(plan: TrainPlan) -> dict[str, np.ndarray]:
    """The trained parameters by name."""
    state = torch.load(Path(plan.work) / "final.pt", weights_only=True, map_location="cpu")
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
        category_field=plan.category_field,
        context=plan.context,
    )
    features = torch.from_numpy(np.load(Path(plan.examples) / FEATURES))
    cell_MQ = None if plan.counts is None else np.load(Path(plan.work) / CELLS)
    ranker = Ranker(shape, features, new_history(plan.model, shape), cell_MQ)
    if ranker.encoder.vectors is not None:
        ranker.encoder.vectors.hold(torch.from_numpy(np.load(Path(plan.examples) / VECTORS)))
    return ranker


def begin(plan: TrainPlan, world: int = 1) -> Run:
    """A run before its first step."""
    torch.manual_seed(plan.seed)
    ranker = new_ranker(plan)
    if ranker.counter is not None:
        counts = [count_CX for share in _first_batches(plan) for count_CX in counted(share, ranker.counter) or []]
        ranker.standardise_counts(torch.from_numpy(np.concatenate(counts)))
    if isinstance(ranker.history, VqlHistory | FullHistory):
        ranker.history.standardise_mass(collate(share, plan.length) for share in _first_batches(plan))
    if ranker.encoder.vectors is not None:
        ranker.encoder.vectors.standardise()
    if plan.warm is not None:
        take_parameters(ranker, plan.warm)
    ranker.to(plan.device)
    return Run(
        plan=plan,
        ranker=ranker,
        forward=_in_parallel(ranker) if world > 1 else ranker,
        optimizers=_optimizers(ranker, plan),
        generator=torch.default_generator,
        steps=_count_steps(plan, ranker, world),
    )


def _first_batches(plan: TrainPlan) -> Iterator[list[Impression]]:
    """Those that say what is much and what is little."""
    return islice(batches(_train_files(plan)[:1], plan.batch, seed=plan.seed, epoch=0), COUNTED_BATCHES)


def _in_parallel(ranker: Ranker) -> nn.Module:
    """The forward pass of several processes. What each of them has read of the items is not sent with every step."""
    kept = ranker.state_dict()
    read = [name for name, _ in ranker.named_buffers() if name not in kept]
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(ranker, read)
    return nn.parallel.DistributedDataParallel(ranker)


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


def _count_steps(plan: TrainPlan, ranker: Ranker, world: int) -> int:
    files = _train_files(plan)
    if _reads_timelines(ranker):
        return count_timeline_batches(files, _limits(plan, world), seed=plan.seed, epochs=plan.epochs)
    return -(-count_impressions(files) // (plan.batch * world)) * plan.epochs


def _train_files(plan: TrainPlan) -> list[Path]:
    """All files; with patience all but the last, whose users are held out."""
    files = timeline_files(Path(plan.examples))
    if plan.patience and len(files) == 1:
        raise InputError(f"{plan.examples} has one file of users: none can be held out, train without patience")
    return files[:-1] if plan.patience else files


def _batches_from(run: Run, rank: int, world: int) -> Iterator[list[Impression] | list[Timeline]]:
    """This process's share of the batches after the step already done; `run.step` counts along."""
    done, at = run.step, 0
    for epoch in range(run.plan.epochs):
        for whole in _epoch_batches(run, _train_files(run.plan), epoch, world):
            at += 1
            if at > done:
                run.step = at
                # A small batch may leave a process without any; it repeats the first then.
                yield whole[rank::world] or whole[:1]
        if run.plan.patience and at >= done and _is_over(run, epoch, rank, world):
            return


def _epoch_batches(
    run: Run, files: Sequence[Path], epoch: int, world: int
) -> Iterator[list[Impression]] | Iterator[list[Timeline]]:
    if _reads_timelines(run.ranker):
        return timeline_batches(files, _limits(run.plan, world), seed=run.plan.seed, epoch=epoch)
    return batches(files, run.plan.batch * world, seed=run.plan.seed, epoch=epoch)


def _is_over(run: Run, epoch: int, rank: int, world: int) -> bool:
    """Look at the held-out users after an epoch, and keep the parameters if they are the best so far."""
    history = run.ranker.history
    if isinstance(history, VqlHistory) and not history.codebook.started:
        return False
    if rank == 0:
        gauc = _held_out_gauc(run)
        if run.patience.look(gauc):
            _save(run, _best(run.plan))
        told = f"held-out gauc {gauc:.4f}, the best {run.patience.best:.4f}"
        print(f"  {run.plan.model}: epoch {epoch + 1}/{run.plan.epochs}  {told}", flush=True)
    over = torch.tensor(run.patience.waited >= run.plan.patience)
    if world > 1:
        torch.distributed.broadcast(over, 0)
    return bool(over)


@torch.no_grad()
def _held_out_gauc(run: Run) -> float:
    """The mean AUC within the impressions of held-out users. Raises InputError when none has both classes."""
    last = timeline_files(Path(run.plan.examples))[-1:]
    run.ranker.eval()
    requests = (_request(run, share) for share in islice(_epoch_batches(run, last, 0, 1), HELD_OUT_BATCHES))
    found = [auc_within(run.ranker(request)[0], request.label_BC) for request in requests]
    run.ranker.train()
    gauc = float(torch.cat(found).nanmean()) if found else float("nan")
    if gauc != gauc:
        raise InputError(f"{last[0]} has no impression with both classes to hold out; train without patience")
    return gauc


def _best(plan: TrainPlan) -> Path:
    return Path(plan.work) / "best.pt"


def _limits(plan: TrainPlan, world: int) -> Limits:
    return Limits(impressions=plan.batch * world, events=plan.events * world)


def _reads_timelines(ranker: Ranker) -> bool:
    return isinstance(ranker.history, VqlHistory)


def _request(run: Run, share: Sequence[Impression] | Sequence[Timeline]) -> Request | TimelineBatch:
    """What the model is asked about a share of a batch."""
    history, device = run.ranker.history, torch.device(run.plan.device)
    counts = counted(share, run.ranker.counter)
    timelines = [one for one in share if isinstance(one, Timeline)]
    if isinstance(history, VqlHistory) and history.codebook.started:
        return collate_timelines(timelines, counts).to(device)
    impressions = [one for one in share if isinstance(one, Impression)]
    apart = [*impressions, *(i for timeline in timelines for i in timeline.impressions())]
    return collate(apart, run.plan.length, counts).to(device)


def step(run: Run, share: Sequence[Impression] | Sequence[Timeline]) -> tuple[float, float]:
    """One optimisation step; returns the loss and the mean AUC within impressions, both from before the step."""
    history = run.ranker.history
    if isinstance(history, VqlHistory) and not history.codebook.started and run.step > EXACT_SHARE * run.steps:
        start_codebook(run)
    request = _request(run, share)
    for optimizer in run.optimizers:
        optimizer.zero_grad(set_to_none=True)
    with torch.autocast(torch.device(run.plan.device).type, torch.bfloat16, enabled=run.plan.bfloat16):
        logit_BC, commitment = run.forward(request)
    logit_BC = logit_BC.float()
    error = loss(logit_BC, request.label_BC)
    (error + COMMITMENT * commitment).backward()
    warmth = _warmth(run.step / run.steps)
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group.setdefault("full_lr", group["lr"])
            group["lr"] = group["full_lr"] * warmth
        optimizer.step()
    frozen = run.plan.warm is not None and run.plan.warm.freeze
    if isinstance(run.ranker.history, VqlHistory) and not frozen:
        _move_codebook(run.ranker, run.ranker.history, request, run.generator)
    return float(error.detach()), float(auc_within(logit_BC.detach(), request.label_BC).nanmean())


def _warmth(done: float) -> float:
    """The share of the learning rates: up in the first twentieth, whole until half, then down to zero in a line."""
    return min(1.0, 20 * done, 2 * (1 - done))


@torch.no_grad()
def start_codebook(run: Run) -> None:
    """Exact keys until here: place the codewords on a sample of the items' keys."""
    ranker = run.ranker
    history = ranker.history
    assert isinstance(history, VqlHistory)
    items = torch.randperm(len(ranker.encoder.feature_MF), generator=run.generator)[:KEY_SAMPLE].to(run.plan.device)
    keys, given = history.grouped_keys(ranker.encoder, items)
    history.codebook.start(keys, run.generator, given_N=given)


@torch.no_grad()
def _move_codebook(
    ranker: Ranker, history: VqlHistory, request: Request | TimelineBatch, generator: torch.Generator
) -> None:
    """The EMA step towards the batch's keys, each item counted by its events."""
    items, counts = request.items()
    if len(items) > MOVING_ITEMS:
        some = torch.randperm(len(items), generator=generator)[:MOVING_ITEMS]
        items, counts = items[some], counts[some]
    if history.codebook.started and len(items):
        keys, given = history.grouped_keys(ranker.encoder, items)
        history.codebook.update(keys, counts.float(), generator, given)


def _resume(run: Run) -> None:
    path = Path(run.plan.work) / "state.pt"
    if not path.exists():
        return
    state = torch.load(path, weights_only=True, map_location="cpu")
    run.ranker.load_state_dict(state["model"])
    for optimizer, saved in zip(run.optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    run.generator.set_state(state["generator"])
    run.step = state["step"]
    run.patience = Patience(**state["patience"])
    print(f"  {run.plan.model}: resumed at step {run.step}/{run.steps}", flush=True)


def _save(run: Run, path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(
        {
            "model": run.ranker.state_dict(),
            "optimizers": [o.state_dict() for o in run.optimizers],
            "generator": run.generator.get_state(),
            "step": run.step,
            "patience": asdict(run.patience),
        },
        buffer,
    )
    replace_file(path, buffer.getvalue())


def _trim_log(path: Path, step: int) -> None:
    """Losses after the step that is resumed from will be written again."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    replace_file(path, b"".join(lines[:step]))
