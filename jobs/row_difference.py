"""How a stored row differs from the one that the log gives, if it does: what must be equal is, and numbers nearly.

Which events a row holds is a matter of the log alone: stamp, number of events, where its folded part ends, the recent
events' bytes. Its masses and means are sums of float32, which where folds were cut decides how to round; so they are
compared as numbers:

* of users without a retraction, whose masses are sums of positive terms: masses relative to their own size, means as
  they are. So an entry that is nearly forgotten counts as much as a fresh one.
* of others, where a small mass may be the rounding error of a large one that was taken back: masses, and masses times
  means, relative to 1 where they are smaller.

Revisions are not of the log, and not compared.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from models.cache import Cache
from models.errors import ForeignRowError, WireError
from models.item_table import UNKNOWN
from models.row import Fold, Row, RowBytes, decode_row
from models.wire import Stamp, decode_counts

AGREES, LATER_ITEMS = "agrees", "later_items"
STAMP, FOLDED, RECENT, ENTRIES, COUNTS = "stamp", "folded", "recent", "entries", "counts"
DAMAGED, FOREIGN = "damaged", "foreign"
# Below it, masses are of what was forgotten: a part of one that falls below 1e-30 between two folds is let go.
MASS_MIN = 1e-25


class Difference(NamedTuple):
    """What differs first, or AGREES, or LATER_ITEMS; the largest error of the entries, 0 if these were not reached."""

    what: str
    error: float = 0.0


def difference(
    found: RowBytes, wanted: RowBytes, using: Fold, tolerance: float, *, later_items: bool = False
) -> Difference:
    """Compare a row with the one that the same events give.

    later_items: some of these events may have been folded before their item was in the item table, as the unknown item.
    Such a row is right, and cannot be made anew. It is LATER_ITEMS if it agrees in all that does not depend on items.
    """
    try:
        row = decode_row(found, using.spec)
        folded, counts = row.folded, _counts(row, using)
    except ForeignRowError:
        return Difference(FOREIGN)
    except WireError:
        return Difference(DAMAGED)
    other = decode_row(wanted, using.spec)
    if _place(row.stamp) != _place(other.stamp):
        return Difference(STAMP)
    whole = other.folded
    if (_place(row.folded_stamp), row.folded_count, folded.reference_ms) != (
        _place(other.folded_stamp),
        other.folded_count,
        whole.reference_ms,
    ):
        return Difference(FOLDED)
    same_items = row.recent_data == other.recent_data
    if not same_items and not (later_items and _same_but_unknown(row.recent, other.recent)):
        return Difference(RECENT)
    plain = _is_plain(whole)
    error = _error(folded, whole, plain)
    error_of_counts = 0.0 if counts is None else _error(counts, _counts(other, using), plain)
    worst = max(error, error_of_counts)
    if same_items and worst <= tolerance:
        return Difference(AGREES, worst)
    if later_items:
        error = _error_of_totals(folded, whole)
        return Difference(LATER_ITEMS if error <= tolerance else ENTRIES, error)
    return Difference(ENTRIES if error > tolerance else COUNTS, worst)


def _place(stamp: Stamp) -> tuple[int, int, int]:
    return stamp.epoch, stamp.partition, stamp.offset


def _counts(row: Row, using: Fold) -> Cache | None:
    return None if using.count_spec is None else decode_counts(row.folded_data, using.count_spec)


def _same_but_unknown(found: np.ndarray, wanted: np.ndarray) -> bool:
    """Whether these are the same events, some of whose items were not known."""
    if len(found) != len(wanted):
        return False
    same = all((found[name] == wanted[name]).all() for name in ("position", "time", "weight"))
    return bool(same and ((found["item"] == wanted["item"]) | (found["item"] == UNKNOWN)).all())


def _is_plain(cache: Cache) -> bool:
    """Whether nothing was taken back, and nothing forgotten wholly: every group has every event, once."""
    group_N = cache.code_N.astype(np.int64) // cache.spec.codewords
    return bool((np.bincount(group_N, cache.net_N, cache.spec.groups) == cache.count).all())


def _error(found: Cache, wanted: Cache, plain: bool) -> float:
    """The largest error of an entry, as the module says; infinite for a net count that cannot be."""
    code_U = np.union1d(found.code_N, wanted.code_N)
    net_U, mass_UPR, mean_UPRD = _spread(found, code_U)
    wanted_net_U, wanted_mass_UPR, wanted_mean_UPRD = _spread(wanted, code_U)
    if plain:
        # An entry that was forgotten wholly between two folds has begun its count anew.
        if (net_U > wanted_net_U).any() or (net_U[np.abs(mass_UPR).max(axis=(1, 2), initial=0) > MASS_MIN] < 1).any():
            return np.inf
        both_UPR = np.minimum(np.abs(mass_UPR), np.abs(wanted_mass_UPR)) > MASS_MIN
        return max(
            _worst(mass_UPR, wanted_mass_UPR, MASS_MIN), _worst(mean_UPRD[both_UPR], wanted_mean_UPRD[both_UPR], 1.0)
        )
    moment_UPRD, wanted_UPRD = mass_UPR[..., None] * mean_UPRD, wanted_mass_UPR[..., None] * wanted_mean_UPRD
    return max(_worst(mass_UPR, wanted_mass_UPR, 1.0), _worst(moment_UPRD, wanted_UPRD, 1.0))


def _error_of_totals(found: Cache, wanted: Cache) -> float:
    """The error of each head's mass over all codewords, whatever these are."""
    return _worst(_totals(found), _totals(wanted), 1.0)


def _totals(cache: Cache) -> np.ndarray:
    group_N = cache.code_N.astype(np.int64) // cache.spec.codewords
    total_GPR = np.zeros((cache.spec.groups, *cache.mass_NPR.shape[1:]))
    np.add.at(total_GPR, group_N, cache.mass_NPR.astype(np.float64))
    return total_GPR


def _spread(cache: Cache, code_U: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Net counts, masses and means at these codes; 0 where the cache has no entry."""
    at_N = np.searchsorted(code_U, cache.code_N)
    net_U = np.zeros(len(code_U), np.int64)
    mass_UPR = np.zeros((len(code_U), *cache.mass_NPR.shape[1:]))
    mean_UPRD = np.zeros((len(code_U), *cache.mean_NPRD.shape[1:]))
    net_U[at_N], mass_UPR[at_N], mean_UPRD[at_N] = cache.net_N, cache.mass_NPR, cache.mean_NPRD
    return net_U, mass_UPR, mean_UPRD


def _worst(found: np.ndarray, wanted: np.ndarray, least: float) -> float:
    """The largest error relative to what is wanted, or to `least` if that is more; infinite for what is no number."""
    error = np.abs(found - wanted) / np.maximum(np.abs(wanted), least)
    return float(np.nan_to_num(error, nan=np.inf).max(initial=0.0))
