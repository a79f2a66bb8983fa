"""What a study compares: models and ablations, each as the training that makes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from jobs.train import TrainJob
from models.checkpoint import Sizes
from models.counts import CountPlan
from models.errors import InputError
from models.item_context import ContextFields
from models.model_names import EXACT_COUNTS, MODELS, counts_exactly, may_count
from models.rivals.din import WINDOW

# The newest events that a model looks at; all others look at as many as the study says.
SEES = {"no_history": 1, "din_50": WINDOW, "din_50_time": WINDOW}

Change = Callable[[TrainJob], TrainJob]


def _sizes(**changes: int) -> Change:
    return lambda job: msgspec.structs.replace(job, sizes=msgspec.structs.replace(job.sizes, **changes))


def _without_kernel(job: TrainJob) -> TrainJob:
    """The cache never forgets; ages of the newest are still seen."""
    return msgspec.structs.replace(job, half_life_ms=tuple((None,) for _ in job.half_life_ms))


def _without_context(job: TrainJob) -> TrainJob:
    """Counts are not context: those of items stay."""
    counts = job.counts
    if counts is not None:
        fields = [field for field in counts.fields if field == "item_id"]
        counts = msgspec.structs.replace(counts, fields=fields) if fields else None
    return msgspec.structs.replace(job, fields=(), context=msgspec.UNSET, counts=counts)


# VQL with one thing taken away, or less of it, or made otherwise.
ABLATIONS: Mapping[str, Mapping[str, Change]] = {
    "groups": {"vql groups=1": _sizes(groups=1), "vql groups=2": _sizes(groups=2)},
    "codewords": {"vql codewords=32": _sizes(codewords=32), "vql codewords=64": _sizes(codewords=64)},
    "kernel": {"vql without kernel": _without_kernel},
    "counts": {
        "vql without counts": lambda job: msgspec.structs.replace(job, counts=None),
        "vql with exact counts": lambda job: msgspec.structs.replace(job, model=f"vql{EXACT_COUNTS}"),
    },
    "context": {"vql without context": _without_context},
    "window": {"vql without window": _sizes(newest=0)},
    # The first field of every data set, as for SIM.
    "category": {"vql category as code": lambda job: msgspec.structs.replace(job, category_code=job.fields[0])},
}


class Study(msgspec.Struct, frozen=True, kw_only=True):
    """What decides a study's figures.

    The newest `holdout` share of the events, by time, is what models are asked about; they are trained on what was
    before. per_user, test_per_user: impressions of a user at most. length: newest events that a model looks at.
    ladder: other lengths at which the trained models are asked again. reference: the model that differences are from.
    counts: what vql counts in its rows, and models with EXACT_COUNTS exactly; all others count nothing. context: item
    features that all are given beside the data's fields; unset, none.
    """

    data: str
    models: tuple[str, ...]
    protocol: str
    length: int = 1_000
    seeds: int = 3
    reference: str = "vql"
    ablate: tuple[str, ...] = ()
    ladder: tuple[int, ...] = ()
    holdout: float = 0.15
    per_user: int = 16
    test_per_user: int = 4
    epochs: int = 1
    sizes: Sizes = TrainJob(log="").sizes
    half_life_ms: tuple[tuple[float | None, ...], ...] = TrainJob(log="").half_life_ms
    counts: CountPlan | None = None
    context: ContextFields | msgspec.UnsetType = msgspec.UNSET


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """A row of the study's table: the training that makes it, but for the seed. length: the events it looks at."""

    name: str
    job: TrainJob
    length: int


def check_study(study: Study) -> None:
    """Raises InputError for what no study can be of."""
    if unknown := [model for model in study.models if model.removesuffix(EXACT_COUNTS) not in MODELS]:
        raise InputError(f"model {unknown[0]!r} is none of {', '.join(MODELS)}, nor one of these with {EXACT_COUNTS}")
    if study.counts is None and ("counts" in study.ablate or any(map(counts_exactly, study.models))):
        raise InputError(f"nothing is counted: models with {EXACT_COUNTS}, and the ablation of counts, need --count")
    if "window" in study.ablate and not study.sizes.newest:
        raise InputError("vql has no window over the newest events that could be taken away; give --newest")
    if len(set(study.models)) != len(study.models) or not study.models:
        raise InputError(f"models {', '.join(study.models) or 'none'}: give each once, and at least one")
    if study.reference not in study.models:
        raise InputError(f"reference {study.reference!r} is none of the models {', '.join(study.models)}")
    if unknown := [name for name in study.ablate if name not in ABLATIONS]:
        raise InputError(f"ablation {unknown[0]!r} is none of {', '.join(ABLATIONS)}")
    if study.ablate and "vql" not in study.models:
        raise InputError("ablations take something from vql, which is not among the models")
    if not 0 < study.holdout < 1:
        raise InputError(f"a share of {study.holdout:g} of the events cannot be held out; give more than 0, under 1")


def variants(study: Study, job: TrainJob) -> list[Variant]:
    """The rows of the table, models first, from a training that has the data and the budget of all of them."""
    changes: list[tuple[str, str, Change]] = [(model, model, lambda same: same) for model in study.models]
    changes += [(name, "vql", change) for what in study.ablate for name, change in ABLATIONS[what].items()]
    made = []
    for name, model, change in changes:
        length = seen(model, study.length)
        counts = study.counts if may_count(model) else None
        whole = msgspec.structs.replace(job, model=model, length=length, counts=counts)
        made.append(Variant(name=name, job=change(whole), length=length))
    return made


def seen(model: str, length: int) -> int:
    """How many of so many newest events the model looks at."""
    return min(length, SEES.get(model.removesuffix(EXACT_COUNTS), length))


def lengths(study: Study) -> Sequence[int]:
    """All lengths at which the models are asked."""
    return sorted({*study.ladder, study.length})
