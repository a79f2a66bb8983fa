"""Dead letters on their way into the table, and the positions that have to wait for them. One per process.

A commit of the table for each bundle would be several a second, each a file, for as long as bad records come. So
letters are gathered over some bundles, and a position is committed only up to the record before the first letter that
is not kept yet: a stream that dies in between reads those records again, skips what the rows hold and meets the same
letters. Nothing waits in the rows themselves.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from functools import lru_cache

from pipelines.dead_letters import DeadLetter

HELD_S = 2.0
# A stream of nothing but bad records must not fill the memory.
LETTERS_HELD = 50_000
BYTES_HELD = 64 << 20


class HeldLetters:
    """The letters that are not kept yet. Safe to share between threads."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._turn = threading.Lock()
        self._keeping = threading.Lock()
        self._letters: list[DeadLetter] = []
        self._size_bytes = 0
        self._since_s = 0.0
        self._first: dict[int, int] = {}
        self._waiting: dict[int, tuple[Callable[[int, int], None], int]] = {}

    def hold(self, letters: Iterable[DeadLetter]) -> None:
        """Take letters, each of which holds back the positions from its own on."""
        with self._turn:
            for letter in letters:
                if not self._letters:
                    self._since_s = self._clock()
                self._note(letter)

    def _note(self, letter: DeadLetter) -> None:
        self._letters.append(letter)
        self._size_bytes += letter.size_bytes
        self._first[letter.partition] = min(letter.offset, self._first.get(letter.partition, letter.offset))

    @property
    def full(self) -> bool:
        return len(self._letters) >= LETTERS_HELD or self._size_bytes >= BYTES_HELD

    def due(self, held_s: float) -> bool:
        """Whether the oldest has waited that long."""
        return bool(self._letters) and self._clock() - self._since_s >= held_s

    def commit(self, partition: int, offset: int, commit: Callable[[int, int], None]) -> None:
        """Commit a position as far as letters allow; the rest of it follows when they are kept."""
        with self._turn:
            first = self._first.get(partition)
            if first is not None and first <= offset:
                self._waiting[partition] = (commit, offset)
                offset = first - 1
        commit(partition, offset)

    def keep(self, write: Callable[[list[DeadLetter]], None]) -> None:
        """Write what is held, then commit what waited for it. When it cannot be written, it is held on."""
        with self._keeping:
            with self._turn:
                letters = list(self._letters)
            if not letters:
                return
            write(letters)
            with self._turn:
                came_meanwhile = self._letters[len(letters) :]
                self._letters, self._size_bytes, self._first, self._since_s = [], 0, {}, self._clock()
                for letter in came_meanwhile:
                    self._note(letter)
                waiting, self._waiting = self._waiting, {}
            for partition, (commit, offset) in waiting.items():
                self.commit(partition, offset, commit)


@lru_cache(maxsize=1)
def held_letters() -> HeldLetters:
    """Those of this process."""
    return HeldLetters()
