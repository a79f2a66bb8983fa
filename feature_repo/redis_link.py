"""Commands to a Redis server and their answers: one round trip, tried again for a moment, errors in our own words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

from feature_repo.redis_scripts import SCRIPTS, Script
from feature_repo.redis_settings import RedisSettings
from models.errors import StoreError, UnavailableError

BACKOFF_BASE_S, BACKOFF_MAX_S = 0.05, 1.0
# A part costs a twentieth of a millisecond, wherever it is taken.
ANSWERS_PER_PART = 50
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
        self._retry = Retry(ExponentialWithJitterBackoff(cap=BACKOFF_MAX_S, base=BACKOFF_BASE_S), settings.retries)
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

    def fetch(self, commands: Sequence[tuple[Any, ...]], take: Callable[[int, list[Any]], None]) -> list[Any]:
        """`run` for commands whose answers are taken as they come (GET, MGET, HMGET): redis-py's pipeline costs more
        Python per command than its row costs the server.

        `take` gets the answers in parts, each with the number of its first, while the server sends the next. A try
        that failed is made again from the first.
        """
        try:
            return self._retry.call_with_retry(lambda: self._exchange(commands, take), lambda _: None, _may_pass)
        except (RedisError, OSError) as error:
            raise self._explained(error) from error

    def close(self) -> None:
        """Give the connections back; a later call makes new ones."""
        self._client.close()
        self._client.connection_pool.disconnect()

    def _send_patiently(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        return self._retry.call_with_retry(lambda: self._send(commands), lambda _: None, _may_pass)

    def _send(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        pipeline = self._client.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)
        return pipeline.execute(raise_on_error=False)

    def _exchange(self, commands: Sequence[tuple[Any, ...]], take: Callable[[int, list[Any]], None]) -> list[Any]:
        pool = self._client.connection_pool
        connection = pool.get_connection()
        try:
            connection.send_packed_command(connection.pack_commands(commands))
            answers: list[Any] = []
            for first in range(0, len(commands), ANSWERS_PER_PART):
                part = [connection.read_response() for _ in commands[first : first + ANSWERS_PER_PART]]
                answers += part
                take(first, part)
            return answers
        except BaseException:
            # Answers left unread would be taken for the next commands'.
            connection.disconnect()
            raise
        finally:
            pool.release(connection)

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


def _may_pass(error: Exception) -> bool:
    return not isinstance(error, AuthenticationError | AuthorizationError)
