"""A consumer that waits for whole batches, so that what a fault meets does not hang on how much was fetched."""

from __future__ import annotations

import time

from confluent_kafka import Consumer, Message

WAIT_S = 2.0


class FullBatches(Consumer):
    """Gives fewer messages than asked for only at a partition's end, or where no more come."""

    def consume(self, num_messages: int = 1, timeout: float = -1) -> list[Message]:
        found: list[Message] = []
        deadline_s = time.monotonic() + WAIT_S
        while len(found) < num_messages and time.monotonic() < deadline_s:
            more = super().consume(num_messages - len(found), 0.1)
            found += more
            if any(message.error() is not None for message in more):
                break
        return found
