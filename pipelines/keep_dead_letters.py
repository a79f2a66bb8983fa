"""The step that keeps what is no event: in the table of dead letters, on a topic, or both.

The letters are there before the offsets of the bundle that handed them out are committed; when they cannot be, the
bundle fails. A letter that the topic's broker refuses for its size is kept in the table, and counted.
"""

from __future__ import annotations

from pathlib import Path

import apache_beam as beam
import structlog
from apache_beam.metrics import Metrics

from pipelines.dead_letter_topic import DeadLetterTopic, LetterSender
from pipelines.dead_letters import DeadLetter, words, write_dead_letters

# A stream of nothing but bad records must not fill the memory of its bundle.
LETTERS_PER_WRITE = 50_000
BYTES_PER_WRITE = 64 << 20


class KeepDeadLetters(beam.DoFn):
    """Keeps a bundle's letters in its end. `source` is what the topic's readers are told: the topic or log read."""

    def __init__(self, table: Path, topic: DeadLetterTopic | None = None, source: str = "") -> None:
        self._table = table
        self._topic = topic
        self._source = source
        self._new = Metrics.counter("vql", "dead_letters")
        self._sent = Metrics.counter("vql", "dead_letters_sent")
        self._too_large = Metrics.counter("vql", "dead_letters_too_large")

    def setup(self) -> None:
        # Opened by the first letter: most streams meet none for long.
        self._sender: LetterSender | None = None

    def start_bundle(self) -> None:
        self._letters: list[DeadLetter] = []
        self._size_bytes = 0

    def process(self, letters: list[DeadLetter]) -> None:
        self._letters += letters
        self._size_bytes += sum(letter.size_bytes for letter in letters)
        if len(self._letters) >= LETTERS_PER_WRITE or self._size_bytes >= BYTES_PER_WRITE:
            self.finish_bundle()

    def finish_bundle(self) -> None:
        if self._letters:
            refused = self._send()
            alone = self._topic is not None and self._topic.alone
            self._new.inc(write_dead_letters(self._table, refused if alone else self._letters))
        self.start_bundle()

    def _send(self) -> list[DeadLetter]:
        """Send the letters when there is a topic; those that are too large for it."""
        if self._topic is None:
            return []
        if self._sender is None:
            self._sender = LetterSender(self._topic, self._source)
        refused = self._sender.send(self._letters)
        self._sent.inc(len(self._letters) - len(refused))
        self._too_large.inc(len(refused))
        if refused:
            structlog.get_logger().warning(
                "dead letters too large for their topic are kept in the table only",
                topic=self._topic.topic,
                letters=len(refused),
                first=words(refused[0].position),
                bytes=refused[0].size_bytes,
            )
        return refused
