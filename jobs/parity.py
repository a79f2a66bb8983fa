"""An independent check of every row: the definition of cache and counts, straight from the raw log, in float64.

Shares no code with models.cache on purpose: two derivations of one formula agree, or one of them is wrong.

    mass_hj = sum over events with code_g(h) = j of w exp(-lambda_h (T - t));  mean_hj = the weighted mean value

Shapes: N events of a user, H heads, K codewords, R rates, D value width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
from deltalake import DeltaTable

from feature_repo.reader import Reader
from models.checkpoint import Checkpoint
from models.counts import CountPlan
from models.event import runs
from models.row import Fold

USERS_PER_READ = 200
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class RowParity:
    """Users compared, the largest difference of any number, users without a row, and the events in rows and log.

    max_abs_error: of masses, means and counts.
    miscounted: users whose row does not hold as many events as the log has of them.
    """

    users: int
    max_abs_error: float
    missing: int
    miscounted: int
    row_events: int
    log_events: int

    @property
    def conserved(self) -> bool:
        return self.missing == 0 and self.miscounted == 0


def compare_rows(reader: Reader, log: Path) -> RowParity:
    """Compare the row of every user of the log with the fold of the user's raw events."""
    users = missing = miscounted = row_events = log_events = 0
    worst = 0.0
    for chunk in in_chunks(raw_users(log), USERS_PER_READ):
        read = reader.read([user_id for user_id, _ in chunk])
        users += len(chunk)
        missing += len(read.missing)
        row_events += int(read.caches.count_B.sum())
        for b, (_, events) in enumerate(chunk):
            log_events += events.num_rows
            miscounted += int(read.caches.count_B[b]) != events.num_rows
            mass_HKR, mean_HKRD = fold_raw(events, reader.checkpoint, reader.fold)
            worst = max(worst, float(np.abs(read.caches.mass_BHKR[b].numpy() - mass_HKR).max()))
            worst = max(worst, float(np.abs(read.caches.mean_BHKRD[b].numpy() - mean_HKRD).max()))
            if reader.fold.counting is not None:
                counted = count_raw(events, reader.fold.counting, reader.fold)
                held = np.zeros_like(counted)
                real_N = read.caches.cell_BN[b].numpy() < len(held)
                held[read.caches.cell_BN[b].numpy()[real_N]] = read.caches.cell_mass_BNR[b].numpy()[real_N]
                worst = max(worst, float(np.abs(held - counted).max()))
    return RowParity(
        users=users,
        max_abs_error=worst,
        missing=missing,
        miscounted=miscounted,
        row_events=row_events,
        log_events=log_events,
    )


def fold_raw(events: pa.Table, checkpoint: Checkpoint, using: Fold) -> tuple[np.ndarray, np.ndarray]:
    """Masses (H K R) and means (H K R D) of raw events, as of the newest of them."""
    sizes = checkpoint.manifest.sizes
    half_life_HR = [[np.inf if h is None else h for h in head] for head in checkpoint.manifest.half_life_ms]
    item_N = using.table.lookup(events["item_id"].to_pylist())
    action_N = checkpoint.action_index(events["action"].to_pylist())
    value_NHD = using.table.value_MHD[item_N].astype(np.float64) + using.table.action_value_AHD[action_N]
    time_N = events["event_time_ms"].to_numpy()
    age_N = (time_N.max(initial=0) - time_N).astype(np.float64)
    mass_HKR = np.zeros((sizes.heads, sizes.codewords, len(half_life_HR[0])))
    mean_HKRD = np.zeros((*mass_HKR.shape, sizes.value_width))
    for h, half_lives in enumerate(half_life_HR):
        code_N = using.table.code_MG[item_N, h * sizes.groups // sizes.heads].astype(np.int64)
        for r, half_life in enumerate(half_lives):
            share_N = events["weight"].to_numpy() * 0.5 ** (age_N / half_life)
            mass_K = np.bincount(code_N, share_N, sizes.codewords)
            gross_K = np.bincount(code_N, np.abs(share_N), sizes.codewords)
            # What a retraction leaves of its event is rounding error, and a mean of that says nothing.
            held_K = np.abs(mass_K) > np.maximum(1e-6 * gross_K, 1e-30)
            mass_HKR[h, :, r] = np.where(held_K, mass_K, 0.0)
            for d in range(sizes.value_width):
                total_K = np.bincount(code_N, share_N * value_NHD[:, h, d], sizes.codewords)
                mean_HKRD[h, :, r, d] = np.divide(total_K, mass_K, out=np.zeros(sizes.codewords), where=held_K)
    return mass_HKR, mean_HKRD


def count_raw(events: pa.Table, counting: CountPlan, using: Fold) -> np.ndarray:
    """Counts of raw events by cell and rate, as of the newest of them; cell 0 is none."""
    item_N, time_N = using.table.lookup(events["item_id"].to_pylist()), events["event_time_ms"].to_numpy()
    age_N = (time_N.max(initial=0) - time_N).astype(np.float64)
    counted = np.zeros((counting.cells, len(counting.half_life_ms)))
    for r, half_life in enumerate(counting.half_life_ms):
        share_N = events["weight"].to_numpy() * 0.5 ** (age_N / (np.inf if half_life is None else half_life))
        for cell_N in using.table.cell_MQ[item_N].T:
            counted[:, r] += np.bincount(cell_N, share_N, counting.cells)
    counted[0] = 0.0
    return counted


def raw_users(log: Path) -> Iterator[tuple[str, pa.Table]]:
    """Each user of the log's epoch with the raw events that stand, one log partition in memory at a time.

    A user whose last record is a tombstone has none.
    """
    table = DeltaTable(log / "events")
    facts = table.metadata().configuration
    columns = ["user_id", "item_id", "action", "event_time_ms", "weight"]
    for partition in range(int(facts["vql.partitions"])):
        wanted = [("partition", "=", partition), ("epoch", "=", int(facts["vql.epoch"]))]
        rows = table.to_pyarrow_table(filters=wanted, columns=[*columns, "offset"])
        rows = rows.filter(rows["user_id"].is_valid())
        rows = rows.sort_by([("user_id", "ascending"), ("offset", "ascending")]).select(columns)
        users = rows["user_id"].combine_chunks().dictionary_encode()
        code_N = users.indices.to_numpy()
        for start, end in runs(code_N):
            yield users.dictionary[code_N[start]].as_py(), _standing(rows.slice(start, end - start))


def _standing(events: pa.Table) -> pa.Table:
    """What comes after a user's last tombstone, which is a row without a weight."""
    erased_N = np.flatnonzero(events["weight"].is_null())
    return events.slice(erased_N[-1] + 1) if len(erased_N) else events


def in_chunks(users: Iterator[T], size: int) -> Iterator[list[T]]:
    """Lists of `size`, the last one shorter."""
    chunk: list[T] = []
    for user in users:
        chunk.append(user)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
