"""What every user's row must say, by the definition of the cache, over the raw events, in float64 and plain numpy.

Shares no code with models.cache, models.row or models.recent: no order, no batches, no merge, no window. For each
user, codeword j of head h and rate r, as of the user's newest event time T:

    mass_hjr  = sum over events with code_h = j of w exp(-ln 2 (T - t) / half-life_hr)
    total_hjr = the same terms times the value of their item and action

Shapes: N events, U users, H heads, K codewords, E entries (user, codeword) of a head that have events, R decay rates,
D value width.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import numpy as np
import pyarrow.parquet as pq
from safetensors.numpy import load_file

from feature_repo.store import RowStore
from models.checkpoint import Checkpoint
from models.row import Row, decode_row, whole_cache
from tests.faults.gitlog import GitLog

# Of the sum of the sizes of what was added: rows are float32 and were folded some three hundred times.
TOLERANCE = 1e-5
# Rows forget a mass below 1e-30, and with it how many events there were.
FORGOTTEN = 1e-29
USERS_PER_READ = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadEntries:
    """One head's entries in rising order of key = user * K + codeword.

    size_ERD sums the sizes |w v|; forgets: whether any rate decays.
    """

    key_E: np.ndarray
    events_E: np.ndarray
    mass_ER: np.ndarray
    total_ERD: np.ndarray
    size_ERD: np.ndarray
    forgets: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """Every user with an event: how many, the place of the last one, the newest time; and each head's entries."""

    user_U: np.ndarray
    events_U: np.ndarray
    partition_U: np.ndarray
    last_offset_U: np.ndarray
    newest_ms_U: np.ndarray
    heads: list[HeadEntries]

    @property
    def user_ids(self) -> list[str]:
        return [f"u{user}" for user in self.user_U.tolist()]


def fold_log(log: GitLog, checkpoint_path: Path) -> Reference:
    """The reference for the rows of these events, with the codes and values that lie in the checkpoint's folder."""
    good = GitLog(**{name: getattr(log, name)[~log.bad_N] for name in GitLog.__dataclass_fields__})
    manifest = json.loads((checkpoint_path / "manifest.json").read_text())
    sizes, half_life_HR = manifest["sizes"], manifest["half_life_ms"]
    items = pq.read_table(checkpoint_path / "items" / "items-00000.parquet")
    row_of = {item_id: row for row, item_id in enumerate(items["item_id"].to_pylist()) if row}
    item_N = np.array([row_of.get(f"i{item}", 0) for item in good.item_N.tolist()])
    action_of = {action: n for n, action in enumerate(manifest["actions"])}
    action_N = np.array([action_of.get(action, 0) for action in good.action_N.tolist()])
    weight_N = good.weight_N.astype(np.float32).astype(np.float64)
    _refuse_repeats(good, item_N, action_N)

    code_MG = items["code"].combine_chunks().flatten().to_numpy().reshape(len(items), -1)
    value_MHD = items["value"].combine_chunks().flatten().to_numpy()
    value_MHD = value_MHD.reshape(len(items), sizes["heads"], -1).astype(np.float64)
    action_value_AHD = load_file(checkpoint_path / "model.safetensors")["history.action_value_AHD"].astype(np.float64)

    user_U, place_N, events_U = np.unique(good.user_N, return_inverse=True, return_counts=True)
    newest_ms_U, last_offset_U, partition_U = (np.zeros(len(user_U), np.int64) for _ in range(3))
    np.maximum.at(newest_ms_U, place_N, good.time_ms_N)
    np.maximum.at(last_offset_U, place_N, good.offset_N)
    partition_U[place_N] = good.partition_N
    age_N = (newest_ms_U[place_N] - good.time_ms_N).astype(np.float64)
    heads = []
    for h, half_life_R in enumerate(half_life_HR):
        key_N = place_N * sizes["codewords"] + code_MG[item_N, h * sizes["groups"] // sizes["heads"]]
        share_NR = np.stack([weight_N * (1.0 if each is None else 0.5 ** (age_N / each)) for each in half_life_R], 1)
        heads.append(_entries(key_N, share_NR, value_MHD[item_N, h] + action_value_AHD[action_N, h], half_life_R))
    return Reference(
        user_U=user_U,
        events_U=events_U,
        partition_U=partition_U,
        last_offset_U=last_offset_U,
        newest_ms_U=newest_ms_U,
        heads=heads,
    )


def _refuse_repeats(good: GitLog, item_N: np.ndarray, action_N: np.ndarray) -> None:
    """Two events that a row would take for one sent twice are not in this data: no rule about them is needed here."""
    hash_N = np.array([crc32(each.encode()) & 0xFFFFFF for each in good.event_ids()])
    fields = np.stack([good.user_N, good.time_ms_N, item_N, action_N, hash_N], 1)
    assert len(np.unique(fields, axis=0)) == len(fields), "the data has events that look like repeats"


def _entries(
    key_N: np.ndarray, share_NR: np.ndarray, value_ND: np.ndarray, half_life_R: Sequence[float | None]
) -> HeadEntries:
    key_E, entry_N, events_E = np.unique(key_N, return_inverse=True, return_counts=True)

    def total(term_N: np.ndarray) -> np.ndarray:
        return np.bincount(entry_N, term_N, len(key_E))

    rates, width = range(share_NR.shape[1]), range(value_ND.shape[1])
    terms = [[share_NR[:, r] * value_ND[:, d] for d in width] for r in rates]
    return HeadEntries(
        key_E=key_E,
        events_E=events_E,
        mass_ER=np.stack([total(share_NR[:, r]) for r in rates], 1),
        total_ERD=np.stack([np.stack([total(term_N) for term_N in of_rate], 1) for of_rate in terms], 1),
        size_ERD=np.stack([np.stack([total(np.abs(term_N)) for term_N in of_rate], 1) for of_rate in terms], 1),
        forgets=any(each is not None for each in half_life_R),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Differences:
    """Users whose row is not what the reference says, by what is wrong, and the largest error of those that are right.

    missing: without a row. lost, doubled: with fewer events than the log has, or more. misplaced: stamped or dated
    otherwise. wrong: whose numbers differ. strangers: how many rows there are of users beyond the reference's.
    """

    missing: frozenset[str]
    lost: frozenset[str]
    doubled: frozenset[str]
    misplaced: frozenset[str]
    wrong: frozenset[str]
    strangers: int
    worst: float
    users: int
    events: int

    @property
    def who(self) -> frozenset[str]:
        return self.missing | self.lost | self.doubled | self.misplaced | self.wrong

    def __str__(self) -> str:
        return (
            f"{len(self.who)} of {self.users} users differ: {len(self.missing)} missing, {len(self.lost)} lost events, "
            f"{len(self.doubled)} doubled events, {len(self.misplaced)} misplaced, {len(self.wrong)} wrong; "
            f"{self.strangers} strangers; {self.events:,} events in rows; the others' largest relative error is "
            f"{self.worst:.1e}"
        )


def differences(rows: RowStore, checkpoint: Checkpoint, wanted: Reference) -> Differences:
    """Compare the stored row of every user: counts, stamps and times exactly, numbers to TOLERANCE."""
    using, sizes = checkpoint.fold(), checkpoint.manifest.sizes
    group_heads = sizes.heads // sizes.groups
    missing, lost, doubled, misplaced, events = [], [], [], [], 0
    parts: list[list[tuple[np.ndarray, ...]]] = [[] for _ in range(sizes.heads)]
    for place, user_id, row in _stored(rows, checkpoint, wanted.user_ids):
        if row is None:
            missing.append(user_id)
            continue
        cache, stamp = whole_cache(row, using), row.stamp
        events += cache.count
        if cache.count != wanted.events_U[place]:
            (lost if cache.count < wanted.events_U[place] else doubled).append(user_id)
        is_at = (stamp.epoch, stamp.partition, stamp.offset, cache.reference_ms)
        if is_at != (1, wanted.partition_U[place], wanted.last_offset_U[place], wanted.newest_ms_U[place]):
            misplaced.append(user_id)
        code_N = cache.code_N.astype(np.int64)
        for h in range(sizes.heads):
            mine_N = code_N // sizes.codewords == h // group_heads
            key_N = place * sizes.codewords + code_N[mine_N] % sizes.codewords
            mass_NR, mean_NRD = cache.mass_NPR[mine_N, h % group_heads], cache.mean_NPRD[mine_N, h % group_heads]
            parts[h].append((key_N, cache.net_N[mine_N], mass_NR, mean_NRD))
    error_U = np.zeros(len(wanted.user_U))
    for entries, found in zip(wanted.heads, parts, strict=True):
        if found:
            key_N, net_N, mass_NR, mean_NRD = (np.concatenate(column) for column in zip(*found, strict=True))
            _add_errors(error_U, entries, key_N, net_N, mass_NR.astype(np.float64), mean_NRD, sizes.codewords)
    user_ids = np.array(wanted.user_ids)
    wrong_U = error_U > TOLERANCE
    # Of a missing user nothing was compared.
    return Differences(
        missing=frozenset(missing),
        lost=frozenset(lost),
        doubled=frozenset(doubled),
        misplaced=frozenset(misplaced),
        wrong=frozenset(user_ids[wrong_U].tolist()) - frozenset(missing),
        strangers=rows.count_rows(checkpoint.checkpoint_id) - (len(user_ids) - len(missing)),
        worst=float(error_U[~wrong_U].max(initial=0.0)),
        users=len(user_ids),
        events=events,
    )


def _stored(rows: RowStore, checkpoint: Checkpoint, user_ids: Sequence[str]) -> Iterator[tuple[int, str, Row | None]]:
    for start in range(0, len(user_ids), USERS_PER_READ):
        chunk = user_ids[start : start + USERS_PER_READ]
        for n, data in enumerate(rows.get_rows(checkpoint.checkpoint_id, chunk)):
            yield start + n, chunk[n], None if data is None else decode_row(data, checkpoint.spec)


def _add_errors(
    error_U: np.ndarray,
    wanted: HeadEntries,
    key_N: np.ndarray,
    net_N: np.ndarray,
    mass_NR: np.ndarray,
    mean_NRD: np.ndarray,
    codewords: int,
) -> None:
    """Raise each user's error to the largest of this head's entries; 1 where one is there that must not be."""
    at_N = np.minimum(np.searchsorted(wanted.key_E, key_N), len(wanted.key_E) - 1)
    known_N = wanted.key_E[at_N] == key_N
    np.maximum.at(error_U, key_N[~known_N] // codewords, 1.0)
    mass_ER, total_ERD = np.zeros_like(wanted.mass_ER), np.zeros_like(wanted.total_ERD)
    mass_ER[at_N[known_N]] = mass_NR[known_N]
    total_ERD[at_N[known_N]] = mass_NR[known_N, :, None] * mean_NRD[known_N]
    user_E = wanted.key_E // codewords
    for found, should_be, size in (
        (mass_ER, wanted.mass_ER, wanted.mass_ER),
        (total_ERD, wanted.total_ERD, wanted.size_ERD),
    ):
        remembered = (wanted.mass_ER > FORGOTTEN).reshape(wanted.mass_ER.shape + (1,) * (found.ndim - 2))
        error = np.where(remembered, np.abs(found - should_be) / np.maximum(size, 1e-300), 0.0)
        np.maximum.at(error_U, user_E, error.reshape(len(user_E), -1).max(1))
    if not wanted.forgets:
        net_E = np.zeros(len(user_E), np.int64)
        net_E[at_N[known_N]] = net_N[known_N]
        np.maximum.at(error_U, user_E, (net_E != wanted.events_E).astype(float))
