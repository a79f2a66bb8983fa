"""Commands to a Redis server and their answers: one round trip, tried again for a moment, errors in our own words."""

from __future__ import annotations

import os
import select
import ssl
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any
from urllib.parse import urlsplit

import redis
from redis.backoff import ExponentialWithJitterBackoff, NoBackoff
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    MovedError,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)
from redis.retry import Retry

from feature_repo.redis_answers import PairAnswers
from feature_repo.redis_scripts import SCRIPTS, Script
from feature_repo.redis_settings import RedisSettings
from models.errors import StoreError, UnavailableError

BACKOFF_BASE_S, BACKOFF_MAX_S = 0.05, 1.0
# A server answers all commands that it has before it sends any of the answers. So it gets a few, as many again at once,
# so that it never waits for us, and as many again whenever it has begun to send answers to the last: its work on the
# next lies beside ours on these. A store that is further away than FAR_S gets the rest at once: turns would cost more
# than they save.
COMMANDS_TOGETHER = 16
FAR_S = 0.001
# At least; only the last part has fewer.
ANSWERS_PER_PART = 16
# What a server says while it fails over or has no quorum; it heals by itself.
_PASSING = ("MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN", "NOREPLICAS", "UNBLOCKED", "BUSY ")
_REMEDIES: tuple[tuple[type[RedisError], str], ...] = (
    (AuthenticationError, "check VQL_REDIS_USERNAME and the file VQL_REDIS_PASSWORD_FILE"),
    (AuthorizationError, "check VQL_REDIS_USERNAME and its rights"),
    (NoPermissionError, "give this user the rights that deploy/redis/users.acl of this version has for it"),
    (NoScriptError, "this user may not load the scripts: give it SCRIPT LOAD, as deploy/redis/users.acl does"),
    (MovedError, "this is one of several primaries of a cluster: use a single primary, with replicas"),
    (OutOfMemoryError, "raise its maxmemory, or erase a checkpoint that is not served any more"),
)


class RedisLink:
    """A pool of connections to one server. Safe to share between threads; opened anew in a forked child by its owner.

    Every call raises UnavailableError when the server does not answer within the settings' time and tries, or answers
    that it is loading, failing over or read-only; StoreError with a remedy for any other refusal.
    """

    def __init__(self, settings: RedisSettings) -> None:
        # The address without its path names the server in messages; it can hold no password.
        self.name = urlsplit(settings.url).netloc or settings.url
        self._tls = settings.url.startswith("rediss:")
        self._timeout_s, self._retries = settings.timeout_s, settings.retries
        self._backoff = ExponentialWithJitterBackoff(cap=BACKOFF_MAX_S, base=BACKOFF_BASE_S)
        self._retry = Retry(self._backoff, settings.retries)
        # Connections on which all was taken, for the next `fetch`: it then knows that it need not connect.
        self._idle: list[redis.Connection] = []
        # Retries are made here, for the whole round trip: within redis-py they would multiply at each level.
        self._client = redis.Redis.from_url(settings.url, **settings.client(), retry=Retry(NoBackoff(), 0))

    def run(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """The answers to these commands, in order, in one round trip (two when the server lacks a script)."""
        try:
            answers = self._send_patiently(commands)
            lacking = [n for n, answer in enumerate(answers) if isinstance(answer, NoScriptError)]
            if lacking:
                loads = [("SCRIPT LOAD", script.text) for script in SCRIPTS]
                again = self._send_patiently([*loads, *(commands[n] for n in lacking)])
                for n, answer in zip(lacking, again[len(loads) :], strict=True):
                    answers[n] = answer
            for answer in answers:
                if isinstance(answer, RedisError):
                    raise answer
        except (RedisError, OSError) as error:
            raise self._explained(error) from error
        return answers

    def fetch(
        self,
        count: int,
        commands: Callable[[int, int], list[bytes]],
        take: Callable[[int, int, PairAnswers], None],
        until_s: float | None,
    ) -> Generator[None, None, PairAnswers]:
        """The answers to so many commands that each ask for two strings (HMGET, MGET), in one read.

        `commands` gives those from which one on to which one without it, each as it is sent (`packed`). It is asked for
        a few first, and for the rest when the store is at work on these.

        `take` gets them in parts as they come: from which one on to which one without it. A try that failed is made
        again from the first. Yields where it may take long from here on: it has no connection yet, or lost it, or
        until_s (by time.monotonic) has come; the rest may be another thread's.
        """
        failures = 0
        while True:
            try:
                connection = self._warm()
                if connection is None:
                    yield
                    connection = self._client.connection_pool.get_connection()
                return (yield from self._exchange(connection, count, commands, take, until_s))
            except (RedisError, OSError) as error:
                failures += 1
                passing = isinstance(error, redis.ConnectionError | redis.TimeoutError | OSError) and _may_pass(error)
                if not passing or failures > self._retries:
                    raise self._explained(error) from error
            yield
            time.sleep(self._backoff.compute(failures))

    def _warm(self) -> redis.Connection | None:
        """A connection that answers were taken from before, if one is free and as it was left."""
        while self._idle:
            try:
                connection = self._idle.pop()
            except IndexError:  # another thread took it
                return None
            try:
                if _is_quiet(connection):
                    return connection
            except (RedisError, OSError):
                pass
            self._drop(connection)
        return None

    def _drop(self, connection: redis.Connection) -> None:
        """Answers left unread would be taken for the next commands'."""
        connection.disconnect()
        self._client.connection_pool.release(connection)

    def _exchange(
        self,
        connection: redis.Connection,
        count: int,
        commands: Callable[[int, int], list[bytes]],
        take: Callable[[int, int, PairAnswers], None],
        until_s: float | None,
    ) -> Generator[None, None, PairAnswers]:
        answers, taken, sent, send_at, asked_s = PairAnswers(count), 0, 0, 0, 0.0
        made = commands(0, min(COMMANDS_TOGETHER, count))
        # redis-py connects, authenticates and speaks TLS; of these answers its own parser sees nothing.
        socket, descriptor = connection._sock, None
        try:
            if not isinstance(socket, ssl.SSLSocket):
                # Our own: another thread may close the connection, and what is opened next would have its number.
                descriptor = os.dup(socket.fileno())
            while taken < count:
                now_s = time.monotonic()
                end_s = now_s + self._timeout_s if until_s is None else until_s
                if end_s <= now_s:
                    until_s = None
                    yield
                    continue
                while send_at <= len(answers) and sent < count:
                    far = sent == 2 * COMMANDS_TOGETHER and now_s - asked_s > FAR_S
                    last = count if far or count - sent < 1.5 * COMMANDS_TOGETHER else sent + COMMANDS_TOGETHER
                    if last > len(made):
                        made += commands(len(made), count)
                    socket.settimeout(end_s - now_s)
                    socket.sendall(b"".join(made[sent:last]))
                    if sent == 0:
                        asked_s = now_s
                        take(0, 0, answers)
                    sent, send_at = last, sent + 1 if sent else 0
                wanted = min(taken + ANSWERS_PER_PART, count, send_at if sent < count else count)
                try:
                    _receive(answers, socket, descriptor, wanted, end_s)
                except TimeoutError:
                    if until_s is None:
                        raise
                    continue
                there = len(answers)
                if there - taken >= ANSWERS_PER_PART or there == count:
                    take(taken, there, answers)
                    taken = there
        except BaseException:
            self._drop(connection)
            raise
        finally:
            if descriptor is not None:
                os.close(descriptor)
        self._idle.append(connection)
        return answers

    def close(self) -> None:
        """Give the connections back; a later call makes new ones."""
        while (connection := self._warm()) is not None:
            self._drop(connection)
        self._client.close()
        self._client.connection_pool.disconnect()

    def _send_patiently(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        return self._retry.call_with_retry(lambda: self._send(commands), lambda _: None, _may_pass)

    def _send(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        pipeline = self._client.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)
        return pipeline.execute(raise_on_error=False)

    def _explained(self, error: RedisError | OSError) -> StoreError:
        for kind, remedy in _REMEDIES:
            if isinstance(error, kind):
                return StoreError(f"online store {self.name}: {error}; {remedy}")
        if not isinstance(error, ResponseError) or isinstance(error, ReadOnlyError) or str(error).startswith(_PASSING):
            remedy = "start it, or try again later"
            # What a server that speaks TLS does to a plain caller; a server that is just ending does the same.
            if not self._tls and any(words in str(error) for words in ("closed by server", "reset by peer")):
                remedy += "; if it speaks TLS, its address begins with rediss://"
            return UnavailableError(f"online store {self.name} does not answer: {error}; {remedy}")
        return StoreError(f"online store {self.name}: {error}; look at the server's log")


def run_script(script: Script, keys: Sequence[bytes], arguments: Sequence[bytes | str | int]) -> tuple[Any, ...]:
    """The command that runs a script."""
    return ("EVALSHA", script.sha, len(keys), *keys, *arguments)


def _receive(answers: PairAnswers, socket: Any, descriptor: int | None, wanted: int, end_s: float) -> None:
    """Receive until so many answers are there, or some of them and no more in time. Raises TimeoutError for none."""
    if descriptor is not None and answers.receive(descriptor, wanted, end_s - time.monotonic()):
        return
    # TLS; or nothing came, and why is for Python's own receive to say.
    socket.settimeout(max(end_s - time.monotonic(), 0.001))
    size_bytes = socket.recv_into(answers.room())
    if size_bytes == 0:
        raise redis.ConnectionError("connection closed by server")
    answers.received(size_bytes)


def _is_quiet(connection: redis.Connection) -> bool:
    """Whether it is open, and nothing came on it since all was taken."""
    socket = connection._sock
    if socket is None or isinstance(socket, ssl.SSLSocket):
        # What comes on a TLS connection may be for TLS itself.
        return socket is not None and not connection.can_read()
    # redis-py's own way takes ten times longer: it tries to read.
    poll = select.poll()
    poll.register(socket, select.POLLIN)
    return not poll.poll(0)


def _may_pass(error: Exception) -> bool:
    return not isinstance(error, AuthenticationError | AuthorizationError)
