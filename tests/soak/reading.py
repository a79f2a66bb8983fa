"""Who asks the rankers all the time, over HTTP, and remembers every answer."""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jobs.serving.client import RankClient

CLIENTS, USERS_MAX = 4, 4
TIMEOUT_S = 20.0
AWAY_S = 0.2
FOLLOW_WAIT_S = 180.0
# Made from rows, and not because something was away.
FRESH = "fresh"


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One request's answer: which ranker gave it, from when it was asked to when it came, of which checkpoint.

    histories, score_UC: of each user, what the scores were made from, and the scores.
    """

    ranker: int
    sent_s: float
    received_s: float
    checkpoint_id: str
    users: Sequence[str]
    histories: Sequence[str]
    score_UC: np.ndarray


class Reading:
    """Several clients that ask rankers about one to four users at a time, from `start` to `end`."""

    def __init__(
        self,
        ports: Sequence[int],
        questions: Mapping[str, Sequence[str]],
        now_ms: int,
        seed: int,
        pause_s: float = 0.0,
    ) -> None:
        self.answers: list[Answer] = []
        self.refused: Counter[str] = Counter()
        self.ports, self.questions = ports, questions
        self._now_ms, self._pause_s = now_ms, pause_s
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._threads = [
            threading.Thread(target=self._run, args=(random.Random(seed + n),), name=f"client {n}")
            for n in range(CLIENTS)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        self._stop.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()

    def check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def wait_for(self, answers: int) -> None:
        """Until there are so many in all."""
        while len(self.answers) < answers:
            self.check()
            time.sleep(0.05)

    def wait_until_all_follow(self, checkpoint_id: str) -> float:
        """Until every ranker has answered by this checkpoint something that is asked from now on; the seconds."""
        start_s, seen, following = time.monotonic(), len(self.answers), set()
        while len(following) < len(self.ports):
            self.check()
            assert time.monotonic() < start_s + FOLLOW_WAIT_S, f"only {following} follow"
            time.sleep(0.05)
            fresh, seen = self.answers[seen:], len(self.answers)
            following |= {a.ranker for a in fresh if a.sent_s > start_s and a.checkpoint_id == checkpoint_id}
        return time.monotonic() - start_s

    def _run(self, rng: random.Random) -> None:
        clients = [RankClient(f"http://127.0.0.1:{port}", TIMEOUT_S) for port in self.ports]
        users = list(self.questions)
        try:
            while not self._stop.is_set():
                self._ask(clients, rng.randrange(len(clients)), rng.sample(users, rng.randint(1, USERS_MAX)))
                time.sleep(self._pause_s)
        except BaseException as error:
            self._failure = error
        finally:
            for client in clients:
                client.close()

    def _ask(self, clients: Sequence[RankClient], ranker: int, users: Sequence[str]) -> None:
        asked = [{"user_id": user_id, "candidates": self.questions[user_id]} for user_id in users]
        body = json.dumps({"users": asked, "now_ms": self._now_ms}).encode()
        sent_s = time.monotonic()
        try:
            status, said = clients[ranker].post(body)
        except (OSError, http.client.HTTPException) as error:
            # Killed, or not there again yet.
            self.refused[type(error).__name__] += 1
            clients[ranker].close()
            time.sleep(AWAY_S)
            return
        received_s = time.monotonic()
        answer = json.loads(said)
        if status != http.client.OK:
            assert status == http.client.SERVICE_UNAVAILABLE, f"{status}: {answer}"
            self.refused[answer["error"]] += 1
            time.sleep(AWAY_S)
            return
        assert [one["user_id"] for one in answer["users"]] == users
        self.answers.append(
            Answer(
                ranker=ranker,
                sent_s=sent_s,
                received_s=received_s,
                checkpoint_id=answer["checkpoint_id"],
                users=users,
                histories=[one["history"] for one in answer["users"]],
                score_UC=np.array([one["scores"] for one in answer["users"]], np.float32),
            )
        )
