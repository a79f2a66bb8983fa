"""The command `vql forget`: erases a user everywhere, or shows what is left of one."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from jobs.cli_options import Log, State
from models.errors import InputError

if TYPE_CHECKING:
    from jobs.forget import Outcome, Places
    from pipelines.tombstones import TopicOfUsers

LEFT = 7
out = Console(highlight=False)


def forget(
    user: Annotated[str, typer.Argument(help="The user id; - reads it from standard input, so that no one sees it.")],
    log: Log,
    state: State,
    topic: Annotated[
        str | None, typer.Option(help="The Kafka topic that the log is the copy of, at VQL_KAFKA_BOOTSTRAP_SERVERS.")
    ] = None,
    epoch: Annotated[int, typer.Option(min=1, help="The topic's epoch, as for vql stream.")] = 1,
    read_log: Annotated[
        Path | None, typer.Option(resolve_path=True, help="Where rankers log their reads (vql serve --read-log).")
    ] = None,
    retain: Annotated[
        int,
        typer.Option(
            min=0,
            help="Hours for which running readers and writers may need old files and the fence of the empty row. "
            "0 only where none runs that began before.",
        ),
    ] = 168,
    again: Annotated[
        bool, typer.Option("--again", help="Ask anew: the user came back after an earlier request.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what there is; nothing is changed.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Search every store byte by byte, and fail if anything is left.")
    ] = False,
    also: Annotated[
        list[Path], typer.Option(resolve_path=True, help="With --verify: a further folder (--work of vql train).")
    ] = [],
    also_topic: Annotated[list[str], typer.Option(help="With --verify: a further topic, as of dead letters.")] = [],
) -> None:
    """Erase a user from the log, its tables, dead letters, logged reads and the rows of every checkpoint; keep it so.

    Everything at or below the position of a tombstone is forgotten: ingest, stream, backfill and replays leave it out
    from now on, known by a keyed hash (VQL_USER_HASH_KEY_FILE: a file of 16 to 64 random bytes, never to be lost).
    What the user does afterwards is a new beginning. What others may still be reading goes with the first run after
    --retain hours; a second run goes on with the same request. Kill it at will.

    Exit codes: 0 done, or --verify found nothing; 7 something is left, which is said with its remedy.

    Example: vql forget - --log build/log --state build/state --topic events < id.txt
    """
    from jobs.forget import forget as run
    from jobs.forget import plan

    user_id = _read_id(user)
    places = replace(_places(log, state, topic, epoch), read_log=read_log, folders=also, topics=_topics(also_topic))
    if verify:
        _show_left(places, user_id)
        return
    outcome = plan(places, user_id) if dry_run else run(places, user_id, retain * 3600.0, again)
    _show(outcome, dry_run)
    if outcome.remains:
        raise typer.Exit(LEFT)


def _read_id(user: str) -> str:
    user_id = sys.stdin.read().rstrip("\r\n") if user == "-" else user
    if not user_id:
        raise InputError("no user id was given")
    return user_id


def _places(log: Path, state: Path, topic: str | None, epoch: int) -> Places:
    from feature_repo.handle import StoreHandle
    from jobs.forget import Places
    from models.user_hash import chosen_key_file, user_hash_key

    user_hash_key(key_file := chosen_key_file())
    opened = None if topic is None else _topics([topic], epoch)[0]
    return Places(log=log, state=state, rows=StoreHandle(state=state).open(), key_file=key_file, topic=opened)


def _topics(names: list[str], epoch: int = 1) -> list[TopicOfUsers]:
    from pipelines.kafka_settings import kafka_settings
    from pipelines.kafka_topic import KafkaLog
    from pipelines.tombstones import TopicOfUsers

    return [TopicOfUsers(source=KafkaLog(kafka=kafka_settings(), topic=name, epoch=epoch)) for name in names]


def _show(outcome: Outcome, dry_run: bool) -> None:
    for request in outcome.requests:
        out.print(f"forgotten up to {request.epoch}:{request.partition}:{request.offset} (epoch, partition, offset)")
    found = ", ".join(f"{count:,} {name}" for name, count in outcome.counts.items() if count) or "nothing"
    out.print(f"{'there is' if dry_run else 'done'}: {found}", soft_wrap=True)
    for each in outcome.remains:
        out.print(f"remains: {each}", soft_wrap=True)


def _show_left(places: Places, user_id: str) -> None:
    from jobs.forget import verify

    left = 0
    for found in verify(places, user_id):
        left += 1
        # Text, because names of files and keys may hold what the console takes for markup.
        out.print(Text(f"left: {found.where}: {found.what}; {found.remedy}"), soft_wrap=True)
    if left:
        raise typer.Exit(LEFT)
    out.print("nothing is left")
