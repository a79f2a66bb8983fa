"""A user's rows in the online store, of all checkpoints: emptied at once, and gone when nobody can bring them back.

An empty row at the tombstone's position refuses every writer that is behind it. It is keyed by the user's id, so it
goes once each checkpoint's stream has passed the position; from then on the list of forgotten users keeps older events
out of a new row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from feature_repo.store import RowPut, RowStore
from models.errors import WireError
from models.forgotten import Request
from models.row import erased_row
from models.wire import RECENT_MAGIC, Stamp, read_header


def partitions_of_rows(rows: RowStore, user_id: str, epoch: int) -> list[int]:
    """The partitions that the user's rows of this epoch are stamped with."""
    return sorted({stamp.partition for _, stamp in _stamps(rows, user_id) if stamp.epoch == epoch})


def empty_rows(rows: RowStore, user_id: str, request: Request) -> int:
    """Empty every row that is behind the request; how many were. One that is beyond it holds only what came after."""
    emptied = 0
    for checkpoint_id, stored in _stamps(rows, user_id):
        if _is_behind(stored, request):
            stamp = _stamp(request)
            data = erased_row(checkpoint_id, stamp)
            put = RowPut(user_id=user_id, stamp=stamp, recent=data.recent, folded=data.folded)
            emptied += sum(rows.put_rows(checkpoint_id, [put]))
    return emptied


def drop_empty_rows(rows: RowStore, user_id: str, request: Request, streamed: bool) -> tuple[int, list[str]]:
    """Erase the empty rows at the request; how many, and the checkpoints whose stream is not past it yet.

    streamed: older events of the user are still where a stream may read them.
    """
    dropped, waiting, stamps = 0, [], dict(_stamps(rows, user_id))
    for checkpoint_id in rows.checkpoint_ids():
        # Where there is no row, what a killed run left of one, or one that expired, is still to go.
        stored = stamps.get(checkpoint_id, _stamp(request))
        if _at(stored) != _at(request):
            continue
        if checkpoint_id in stamps and streamed and not _passed(rows, checkpoint_id, request):
            waiting.append(checkpoint_id)
            continue
        dropped += rows.delete_row(checkpoint_id, user_id, stored)
    return dropped, waiting


def behind(rows: RowStore, user_id: str, requests: Sequence[Request]) -> int:
    """How many rows still are behind a request: its history."""
    return sum(any(_is_behind(stored, r) for r in requests) for _, stored in _stamps(rows, user_id))


def _passed(rows: RowStore, checkpoint_id: str, request: Request) -> bool:
    progress = rows.progress(checkpoint_id)
    committed = progress.positions.get(request.partition, (-1, -1))
    record = progress.backfill
    cut = (-1, -1) if record is None else (record.epoch, record.cut.get(request.partition, -1))
    return max(committed, cut) >= (request.epoch, request.offset)


def _stamps(rows: RowStore, user_id: str) -> Iterator[tuple[str, Stamp]]:
    for checkpoint_id in rows.checkpoint_ids():
        (data,) = rows.get_rows(checkpoint_id, [user_id])
        if data is None:
            continue
        try:
            yield checkpoint_id, read_header(data.recent, RECENT_MAGIC, checkpoint_id).stamp
        except WireError:
            # What it includes cannot be told: it is behind every request, and the fence knows better.
            yield checkpoint_id, Stamp(epoch=0, partition=0, offset=-1)


def _is_behind(stored: Stamp, request: Request) -> bool:
    return request.covers(stored.epoch, stored.partition, stored.offset) and _at(stored) != _at(request)


def _stamp(request: Request) -> Stamp:
    """Of the empty row at a request."""
    return Stamp(epoch=request.epoch, partition=request.partition, offset=request.offset)


def _at(place: Stamp | Request) -> tuple[int, int, int]:
    return place.epoch, place.partition, place.offset
