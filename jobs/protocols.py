"""What is asked of a log: impressions, each a user's candidates at a time, with the events strictly before it.

The items of a basket are the positives, and nothing of the basket is in the history, nor of the time for which the
plan says that a ranker lags behind. Three protocols say what stands
beside the positives:

    raw          items drawn by their popularity in the period. Whether the user has touched the very item before then
                 decides much, as it does when candidates come from everywhere.
    fair         every positive has the same number of negatives that are as familiar as it is: for a repeat, items of
                 the user's own history, each as likely; for a novel item, items by popularity that the user has not
                 touched until then. So "seen before" alone has an AUC of exactly 0.5, over all and for each user. A
                 positive for which there are not enough negatives is left out.
    impressions  nothing is drawn: what was shown in a session, and which of it was clicked.

Negatives may be kept within the group of the positives (ExamplePlan.within): the files of one repository, say. They
differ from one another and from all items of the basket. Draws depend on (seed, user, basket) alone. Training
examples and evaluation are made by this one code.

Shapes: N events, I impressions, C candidates of all impressions, A actions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from jobs.baskets import Baskets, Events, ExamplePlan, Touches, choose, find_baskets, find_sessions, history_ends
from jobs.sampling import SAMPLED, Candidates, Items, find_positives
from models.errors import InputError
from models.request import Impression

BASKETS_AT_ONCE = 8192
PROTOCOLS = ("raw", "fair", "impressions")


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """Impressions by column, in the order of the events.

    user_I: place in user_ids. history_I: the events of the user before this place are the history. Impression i has
    the candidates bound_I[i]:bound_I[i + 1].
    """

    user_I: np.ndarray
    history_I: np.ndarray
    now_ms_I: np.ndarray
    bound_I: np.ndarray
    candidate_C: np.ndarray
    label_C: np.ndarray

    def where(self, kept_I: np.ndarray) -> Drawn:
        """The impressions that are kept, with their candidates."""
        size_I = np.diff(self.bound_I)
        kept_C = np.repeat(kept_I, size_I)
        return Drawn(
            user_I=self.user_I[kept_I],
            history_I=self.history_I[kept_I],
            now_ms_I=self.now_ms_I[kept_I],
            bound_I=np.r_[0, np.cumsum(size_I[kept_I])],
            candidate_C=self.candidate_C[kept_C],
            label_C=self.label_C[kept_C],
        )


def draw(events: Events, items: Items, plan: ExamplePlan, actions: Sequence[str]) -> Drawn:
    """The impressions that the plan asks for; actions are the names by index. Raises InputError as check_plan."""
    check_plan(plan)
    if plan.protocol == "impressions":
        return _impressions(events, plan, actions)
    touches = Touches.of(events, items.group_M)
    found = find_baskets(events)
    chosen = found.where(choose(found, events, plan))
    parts = []
    for at in range(0, len(chosen), BASKETS_AT_ONCE):
        some = chosen.where(slice(at, at + BASKETS_AT_ONCE))
        made = SAMPLED[plan.protocol](find_positives(events, some, touches, plan), touches, items, plan)
        parts.append(replace(made, basket_C=made.basket_C + at))
    return _drawn(chosen, history_ends(chosen, events, plan), Candidates.joined(parts))


def check_plan(plan: ExamplePlan) -> None:
    """Raises InputError for an unknown protocol, for one that lacks what it needs, and for a negative delay."""
    if plan.protocol not in PROTOCOLS:
        raise InputError(f"protocol {plan.protocol!r} is none of {', '.join(PROTOCOLS)}")
    if plan.serving_delay_ms < 0:
        raise InputError(f"a serving delay of {plan.serving_delay_ms} ms would show what has not happened yet")
    if plan.protocol == "impressions" and not plan.clicked:
        raise InputError("protocol impressions needs the actions that are clicks; data without impressions has none")
    if plan.protocol == "fair" and plan.negatives < plan.positives:
        raise InputError(f"protocol fair needs a negative for each positive: {plan.negatives} for {plan.positives}")


def remember(events: Events, drawn: Drawn, plan: ExamplePlan, actions: Sequence[str]) -> tuple[Events, Drawn]:
    """The events that histories are made of, and the impressions that have one of them before."""
    if not plan.remembered:
        return events, drawn
    kept_N = np.isin(actions, plan.remembered)[events.action_N]
    events = events.where(kept_N)
    drawn = replace(drawn, history_I=np.r_[0, np.cumsum(kept_N)][drawn.history_I])
    return events, drawn.where(drawn.history_I > np.searchsorted(events.user_N, drawn.user_I))


def to_impressions(events: Events, drawn: Drawn) -> list[Impression]:
    """The impressions as a ranker is asked them; those of one user share the arrays of events."""
    first_U = np.searchsorted(events.user_N, np.arange(len(events.user_ids)))
    made = []
    for i, (user, until) in enumerate(zip(drawn.user_I.tolist(), drawn.history_I.tolist(), strict=True)):
        history = slice(int(first_U[user]), until)
        candidates = slice(int(drawn.bound_I[i]), int(drawn.bound_I[i + 1]))
        made.append(
            Impression(
                user_id=events.user_ids[user],
                now_ms=int(drawn.now_ms_I[i]),
                candidate_C=drawn.candidate_C[candidates],
                label_C=drawn.label_C[candidates],
                item_L=events.item_N[history],
                action_L=events.action_N[history],
                time_ms_L=events.time_ms_N[history],
                weight_L=events.weight_N[history],
            )
        )
    return made


def seen_before(impression: Impression) -> np.ndarray:
    """Which candidates the user has touched before the impression."""
    return np.isin(impression.candidate_C, impression.item_L)


def slices(protocol: str, seen_C: np.ndarray, label_C: np.ndarray) -> dict[str, np.ndarray]:
    """Which candidates make the slices `repeat` and `novel`.

    The positives of a slice are those that were seen before, or were not. Beside them stand the negatives that are as
    familiar; in `raw`, where negatives are drawn for all positives alike, all negatives.
    """
    beside_C = (label_C == 0) if protocol == "raw" else np.zeros(len(label_C), bool)
    return {"repeat": seen_C | beside_C, "novel": ~seen_C | beside_C}


def _impressions(events: Events, plan: ExamplePlan, actions: Sequence[str]) -> Drawn:
    """Sessions of what was shown; a candidate is an item of the session, positive if it was clicked in it."""
    clicked_A = np.isin(actions, plan.clicked)
    shown_N = (np.isin(actions, plan.shown) | clicked_A)[events.action_N]
    place_S = np.flatnonzero(shown_N & (events.item_N > 0))
    sessions, session_S = find_sessions(events, place_S, plan.session_ms)
    chosen = choose(sessions, events, plan)
    kept_S = np.isin(session_S, chosen)
    basket, item = np.searchsorted(chosen, session_S[kept_S]), events.item_N[place_S[kept_S]].astype(np.int64)
    size = int(item.max(initial=0)) + 1
    pair_C, at = np.unique(basket * size + item, return_inverse=True)
    label_C = np.zeros(len(pair_C), np.int64)
    np.maximum.at(label_C, at, clicked_A[events.action_N[place_S[kept_S]]])
    found = Candidates(basket_C=pair_C // size, item_C=pair_C % size, label_C=label_C)
    asked = sessions.where(chosen)
    return _drawn(asked, history_ends(asked, events, plan), Candidates.joined([found]))


def _drawn(of: Baskets, history_B: np.ndarray, found: Candidates) -> Drawn:
    """The candidates by impression; a basket without any is none."""
    kept_I, first_I = np.unique(found.basket_C, return_index=True)
    return Drawn(
        user_I=of.user_B[kept_I],
        history_I=history_B[kept_I],
        now_ms_I=of.now_ms_B[kept_I],
        bound_I=np.r_[first_I, len(found.basket_C)],
        candidate_C=found.item_C,
        label_C=found.label_C,
    )
