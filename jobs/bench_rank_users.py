"""Who is scored in `vql bench rank`, and by what: users of given lengths in Redis, and the sides that read them.

`require_equal` holds each side against its raw form: a ranker that reads all raw events, without any short cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import redis
import torch

from feature_repo.reader import Reader
from feature_repo.store import whole_put
from jobs.bench_load import ITEMS, random_history
from jobs.bench_rank_rivals import NearestServed, SdimServed
from jobs.bench_rank_sides import ExactHistory, RawEvents, Rival, Side, Strings, rival
from jobs.scoring import Asked, Scorer
from models.errors import VqlError
from models.ranker import Ranker, Shape, VqlHistory
from models.rivals.din import WINDOW, DinHistory
from models.rivals.eta import EtaHistory
from models.rivals.sdim import SdimHistory
from models.row import advance, new_row
from models.wire import RECENT, Stamp

SIDES = ("vql", "vql_shipped", "full", "sdim", "topk", "din_50")
EPOCH, PARTITION = 1, 0
END_MS = 1_700_000_000_000
# Another user's history moves logits of random parameters by 1e-3 to 1e-1. SDIM's buckets are stored as float16.
TOLERANCE = {"sdim": 3e-5}
USUAL_TOLERANCE = 1e-5


@dataclass(frozen=True, kw_only=True, slots=True)
class RankSides:
    """The SIDES by name, and the raw form of each; `readers`, `events` and `buckets` are what they read with."""

    sides: Mapping[str, Side]
    raw: Mapping[str, RawEvents]
    readers: Mapping[str, Reader]
    events: Strings
    buckets: Strings
    sdim: SdimServed


def make_sides(scorer: Scorer, shipped: Scorer, client: redis.Redis, shape: Shape) -> RankSides:
    """VQL is the scorer itself; the others share its frame, its table and its device, but for `shipped`.

    That is VQL as `vql train` makes it unless told otherwise, with a window over the newest events and counts.
    """
    ranker, table, device = scorer.ranker, scorer.table, scorer.placement.device
    assert isinstance(ranker.history, VqlHistory)
    unquantised = deepcopy(ranker.history)
    unquantised.codebook.started.fill_(False)
    with torch.inference_mode():
        exact = ExactHistory(ranker.history, ranker.encoder(torch.arange(len(table), device=device)))
    sdim, eta, din = (rival(ranker, history(shape), shape) for history in (SdimHistory, EtaHistory, DinHistory))
    events, buckets = Strings(client=client, kind="events"), Strings(client=client, kind="buckets")

    def raw(ranker: Ranker) -> RawEvents:
        return RawEvents(ranker=ranker, table=table, device=device)

    sdim_served = SdimServed(sdim, table, device)
    return RankSides(
        sides={
            "vql": scorer,
            "vql_shipped": shipped,
            "full": Rival(fetch=events.whole, logits=raw(rival(ranker, exact, shape)).logits),
            "sdim": Rival(fetch=buckets.whole, logits=sdim_served.logits),
            "topk": Rival(fetch=events.whole, logits=NearestServed(eta, table, device).logits),
            "din_50": Rival(
                fetch=lambda user_ids: events.ends(user_ids, WINDOW * RECENT.itemsize), logits=raw(din).logits
            ),
        },
        raw={
            "vql": raw(ranker),
            "vql_shipped": raw(shipped.ranker),
            "full": raw(rival(ranker, unquantised, shape)),
            "sdim": raw(sdim),
            "topk": raw(eta),
            "din_50": raw(din),
        },
        readers={"vql": scorer.reader, "vql_shipped": shipped.reader},
        events=events,
        buckets=buckets,
        sdim=sdim_served,
    )


def user_id(length: int, user: int) -> str:
    """One of the users with so many events."""
    return f"user-{length}-{user}"


def fill_users(lengths: Sequence[int], users: int, made: RankSides) -> dict[str, float]:
    """Users of each length, as every side reads them; the mean bytes of a row of VQL's by length."""
    position = Stamp(epoch=EPOCH, partition=PARTITION, offset=-1)
    row_bytes: dict[str, float] = {}
    for length in lengths:
        rng, sizes = np.random.default_rng(length), []
        for user in range(users):
            name, events = user_id(length, user), random_history(rng, length, END_MS)
            for side, reader in made.readers.items():
                row, _ = advance(new_row(reader.fold.spec, EPOCH, PARTITION), events, position, reader.fold)
                reader.rows.put_rows(reader.fold.spec.checkpoint_id, [whole_put(name, row)])
                if side == "vql":
                    sizes.append(row.size_bytes)
            made.events.put(name, events.tobytes())
            made.buckets.put(name, made.sdim.buckets(events))
        row_bytes[str(length)] = float(np.mean(sizes))
    for reader in made.readers.values():
        # Without positions, a reader would take the store for one that was emptied.
        reader.rows.commit_positions(reader.checkpoint.checkpoint_id, EPOCH, {PARTITION: max(lengths) - 1})
    return row_bytes


def ask(rng: np.random.Generator, user: str, candidates: int) -> Asked:
    """Random candidates of the user, a moment after the newest event."""
    item_ids = [f"item-{n}" for n in rng.integers(1, ITEMS + 1, candidates)]
    return Asked(user_id=user, item_ids=item_ids, now_ms=END_MS + 1)


def require_equal(made: RankSides, asked: Sequence[Asked]) -> None:
    """Raises VqlError where a side, asked about these users together, scores them otherwise than its raw form."""
    for name, side in made.sides.items():
        found = side.score(asked).users
        for one, scored in zip(asked, found, strict=True):
            with torch.inference_mode():
                wanted_C = made.raw[name].logits(one, made.events.whole([one.user_id])[0])
            worst = float((torch.tensor(scored.scores) - wanted_C.cpu()).abs().max())
            if not worst <= TOLERANCE.get(name, USUAL_TOLERANCE):
                raise VqlError(f"{name} scores otherwise than from raw events, by {worst:g}; nothing was measured")
