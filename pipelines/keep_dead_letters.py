"""The step that keeps what is no event: in the table of dead letters, on a topic, or both.

No offset is committed before the letters up to it are kept (`held_letters`); when they cannot be, the bundle fails. A
letter that the topic's broker refuses for its size is kept in the table, and counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import apache_beam as beam
import structlog
from apache_beam.metrics import Metrics

from feature_repo.forgotten import ForgottenRef
from models.forgotten import NOBODY_FORGOTTEN
from pipelines.dead_letter_topic import DeadLetterTopic, LetterSender
from pipelines.dead_letters import DeadLetter, words, write_dead_letters
from pipelines.held_letters import held_letters
from pipelines.worker import opened_forgotten


@dataclass(kw_only=True, slots=True)
class Kept:
    """What became of letters: new to the table, taken by the topic, refused by it for their size."""

    dead_letters: int = 0
    dead_letters_sent: int = 0
    dead_letters_too_large: int = 0


class LetterKeeper:
    """Writes letters to the table, to the topic, or to both. `source`: the topic or log that they come from.

    Of a forgotten user only the place and the reason are kept.
    """

    def __init__(
        self, table: Path, topic: DeadLetterTopic | None = None, source: str = "", forgotten: ForgottenRef | None = None
    ) -> None:
        self._table = table
        self._forgotten = None if forgotten is None else opened_forgotten(forgotten)
        self._topic = topic
        self._source = source
        # Opened by the first letter: most streams meet none for long.
        self._sender: LetterSender | None = None

    def keep_held(self) -> Kept:
        """Keep what this process holds. Raises StoreError, and holds it on."""
        kept = Kept()
        held_letters().keep(lambda letters: self._keep(letters, kept))
        return kept

    def _keep(self, letters: list[DeadLetter], kept: Kept) -> None:
        known = NOBODY_FORGOTTEN if self._forgotten is None else self._forgotten.known
        letters = [letter.erased() if letter.is_forgotten(known) else letter for letter in letters]
        refused = self._send(letters, kept)
        alone = self._topic is not None and self._topic.alone
        kept.dead_letters += write_dead_letters(self._table, refused if alone else letters)

    def _send(self, letters: list[DeadLetter], kept: Kept) -> list[DeadLetter]:
        """Send the letters when there is a topic; those that are too large for it."""
        if self._topic is None:
            return []
        if self._sender is None:
            self._sender = LetterSender(self._topic, self._source)
        refused = self._sender.send(letters)
        kept.dead_letters_sent += len(letters) - len(refused)
        kept.dead_letters_too_large += len(refused)
        if refused:
            structlog.get_logger().warning(
                "dead letters too large for their topic are kept in the table only",
                topic=self._topic.topic,
                letters=len(refused),
                first=words(refused[0].position),
                bytes=refused[0].size_bytes,
            )
        return refused


class KeepDeadLetters(beam.DoFn):
    """Keeps letters at the end of the first bundle that ends held_s after them."""

    def __init__(
        self,
        table: Path,
        topic: DeadLetterTopic | None = None,
        source: str = "",
        held_s: float = 0.0,
        forgotten: ForgottenRef | None = None,
    ) -> None:
        self._made = (table, topic, source, forgotten)
        self._held_s = held_s
        self._counters = {name: Metrics.counter("vql", name) for name in Kept.__dataclass_fields__}

    def setup(self) -> None:
        self._keeper = LetterKeeper(*self._made)
        self._held = held_letters()

    def process(self, letters: list[DeadLetter]) -> None:
        self._held.hold(letters)
        if self._held.full:
            self._keep()

    def finish_bundle(self) -> None:
        if self._held.due(self._held_s):
            self._keep()

    def _keep(self) -> None:
        kept = self._keeper.keep_held()
        for name, counter in self._counters.items():
            counter.inc(getattr(kept, name))
