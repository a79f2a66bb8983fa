"""The commands `vql dead-letters`: what was refused, why, and how to bring it back.

What a letter holds came from anywhere, so nothing of it reaches the terminal unescaped.
"""

from __future__ import annotations

import base64
import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jobs.cli_options import MaxFuture
from jobs.letter_tables import counts_table, newest_table, place_of
from jobs.printable import plain, printable, time_words
from models.errors import InputError

if TYPE_CHECKING:
    from pipelines.dead_letters import Position, Selection
    from pipelines.replay import Decision, Replay

LEFT_OUT = 7
VALUE_BYTES = 2_000

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Records that the stream refused: look at them, and bring back those that are events after all.\n\n"
    "The stream goes on without them, so nothing here is urgent by itself. At night: [b]list[/b] says how many there "
    "are of each reason and partition, and which are the newest; [b]show[/b] 0:1234 says all about one. One producer's "
    "mistake shows as many letters of one reason: tell its owner, and leave the rest for the day.\n\n"
    "Reasons: json (not JSON, not UTF-8), schema (a field missing or of another type), length (an id that is empty or "
    "over 128 bytes), event_time (not Unix ms; often seconds), weight (0, or out of range), size (over 64 KiB), key "
    "(the record's key is not its user_id), future (its time is after that of the record).\n\n"
    "[b]replay[/b] produces letters to their topic again; without --yes it only says what it would do.",
)
out = Console(highlight=False)

Log = Annotated[Path, typer.Option(resolve_path=True, help="Folder of the log, with the table dead_letters.")]
Reasons = Annotated[list[str] | None, typer.Option("--reason", help="Only with this reason; repeatable.")]
Partitions = Annotated[
    list[int] | None, typer.Option("--partition", help="Only letters of this partition; repeatable.")
]
Since = Annotated[int | None, typer.Option("--since", help="Only at this offset or after it.")]
Json = Annotated[bool, typer.Option("--json", help="A line of JSON for each letter, for programs.")]


@app.command("list")
def list_(
    log: Log,
    reason: Reasons = None,
    partition: Partitions = None,
    since: Since = None,
    limit: Annotated[int, typer.Option(min=0, help="How many of the newest to show; --json shows all.")] = 20,
    json_: Json = False,
) -> None:
    """Count the letters by reason and partition, and show the newest.

    Example: vql dead-letters list --log build/log --reason event_time --partition 3 --since 120000
    """
    import pyarrow.compute as pc

    from pipelines.dead_letters import summaries
    from pipelines.replay import read_replays

    letters = _table(log)
    selection = _selection(reason, partition, since)
    rows = summaries(letters, selection)
    replays = read_replays(letters, selection)
    order = [(name, "descending") for name in ("epoch", "log_time_ms", "offset", "partition")]
    newest = rows.take(pc.sort_indices(rows, order))
    if json_:
        for row in newest.to_pylist():
            _print_json(row | _replayed(replays.get(place_of(row))))
        return
    if rows.num_rows == 0:
        out.print("no dead letters" + (" that match" if reason or partition or since is not None else ""))
        return
    out.print(counts_table(rows))
    if limit:
        out.print(newest_table(newest.slice(0, limit).to_pylist(), rows.num_rows, replays))


@app.command()
def show(
    position: Annotated[str, typer.Argument(help="PARTITION:OFFSET, or EPOCH:PARTITION:OFFSET.")],
    log: Log,
    whole: Annotated[bool, typer.Option("--whole", help="Print a long record whole.")] = False,
    save: Annotated[Path | None, typer.Option(help="Write the original bytes to this new file.")] = None,
    json_: Json = False,
) -> None:
    """Show all about one letter: where and when it was, why it was refused, whether it still would be, its bytes.

    Bytes that are no printable text are escaped. Without an epoch, the newest epoch's letter at the position is meant.

    Example: vql dead-letters show 3:120417 --log build/log
    """
    from pipelines.dead_letters import read_dead_letters, words
    from pipelines.replay import read_replays, refusal

    letters = _table(log)
    (place,) = _places(letters, [position])
    selection = _selection(None, None, None, [place])
    (letter,) = read_dead_letters(letters, selection)
    replay = read_replays(letters, selection).get(place)
    now = refusal(letter, _now_ms())
    if save is not None:
        _write_new(save, letter.value or b"")
    if json_:
        names = ("epoch", "partition", "offset", "reason", "detail", "log_time_ms")
        _print_json(
            {name: getattr(letter, name) for name in names}
            | {"value_base64": _base64(letter.value), "key_base64": _base64(letter.key), "refused_now": now}
            | _replayed(replay)
        )
        return
    facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    facts.add_row("position", f"{words(place)} (epoch, partition, offset)")
    facts.add_row("log time", time_words(letter.log_time_ms))
    facts.add_row("reason", plain(letter.reason))
    facts.add_row("detail", plain(letter.detail))
    facts.add_row("key", plain("none" if letter.key is None else printable(letter.key, VALUE_BYTES)))
    facts.add_row("size", f"{len(letter.value or b''):,} bytes")
    facts.add_row("replayed", "no" if replay is None else plain(f"to {replay.topic}, {replay.words}"))
    facts.add_row("now", plain("it would be taken: replay it" if now is None else f"still refused, {now}"))
    out.print(facts)
    shown = (
        "(no value: a tombstone)"
        if letter.value is None
        else printable(letter.value, len(letter.value) if whole else VALUE_BYTES)
    )
    out.print(Text("\n" + shown), soft_wrap=True)


@app.command()
def replay(
    log: Log,
    topic: Annotated[str, typer.Option(help="The topic to produce to, at VQL_KAFKA_BOOTSTRAP_SERVERS.")],
    positions: Annotated[
        list[str] | None, typer.Argument(help="PARTITION:OFFSET ... of letters; or choose by the options.")
    ] = None,
    reason: Reasons = None,
    partition: Partitions = None,
    since: Since = None,
    all_: Annotated[bool, typer.Option("--all", help="Every letter; needed where nothing else chooses.")] = False,
    epoch: Annotated[int, typer.Option(min=1, help="The topic's epoch, as for vql stream.")] = 1,
    yes: Annotated[bool, typer.Option("--yes", help="Do it; else only what would be done is said.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Also letters that were replayed: they count twice.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Also letters that would be refused once more.")] = False,
    max_future: MaxFuture = 600.0,
) -> None:
    """Produce the original bytes of letters to their topic again, each to the partition it came from.

    For letters that are events by now: the contract was widened, or their time, once in the future, has come. A
    record that its producer has mended is the producer's to send.

    Each letter is marked, and a second replay of it refused. The marks know nothing of other ways back: a backfill
    after the contract was widened reads the originals from the log, so replay or backfill, not both.

    Exit codes: 0 every chosen letter was (without --yes: would be) replayed; 7 some were left out, and why is said;
    2 a letter, option or topic that does not exist, or Kafka does not answer; 5 letters may not have reached the topic.

    Example: vql dead-letters replay --log build/log --topic events --reason future --yes
    """
    from feature_repo.forgotten import FORGOTTEN, ForgottenRef, read_forgotten
    from models.user_hash import chosen_key_file
    from pipelines.dead_letters import summaries
    from pipelines.kafka_settings import kafka_settings
    from pipelines.kafka_topic import KafkaLog, open_topic
    from pipelines.replay import Rules, plan_turn, replay_turn, turns

    if not (positions or reason or partition or since is not None or all_):
        raise InputError(
            "which letters? name their positions, choose by --reason, --partition or --since, or say --all"
        )
    letters = _table(log)
    selection = _selection(reason, partition, since, _places(letters, positions) if positions else ())
    rows = summaries(letters, selection).to_pylist()
    sizes = [(place_of(row), row["size_bytes"]) for row in rows]
    target = open_topic(KafkaLog(kafka=kafka_settings(), topic=topic, epoch=epoch))
    forgotten = read_forgotten(ForgottenRef(path=log / FORGOTTEN, key_file=chosen_key_file()))
    rules = Rules(
        now_ms=_now_ms(), again=again, force=force, future_ms_max=round(max_future * 1000), forgotten=forgotten
    )
    turn_done = replay_turn if yes else plan_turn
    decisions = [decision for turn in turns(sizes) for decision in turn_done(letters, turn, target, rules)]
    left_out = [decision for decision in decisions if decision.left_out is not None]
    _print_left_out(left_out)
    done = len(decisions) - len(left_out)
    out.print(
        f"{done:,} letters {'replayed' if yes else 'would be replayed'} to {topic}, {len(left_out):,} left out"
        + ("" if yes or not done else "; --yes replays them"),
        soft_wrap=True,
    )
    if left_out:
        raise typer.Exit(LEFT_OUT)


def _table(log: Path) -> Path:
    if not log.is_dir():
        raise InputError(f"there is no log at {log}; --log names the folder given to vql stream")
    return log / "dead_letters"


def _selection(
    reasons: list[str] | None, partitions: list[int] | None, since: int | None, positions: Sequence[Position] = ()
) -> Selection:
    from models.event import REASONS
    from pipelines.dead_letters import Selection

    if unknown := [reason for reason in reasons or () if reason not in REASONS]:
        raise InputError(f"--reason: {unknown[0]!r} is none of {', '.join(REASONS)}")
    return Selection(
        reasons=tuple(reasons or ()),
        partitions=tuple(partitions or ()),
        since_offset=since,
        positions=tuple(positions),
    )


def _places(letters: Path, texts: list[str]) -> list[Position]:
    """The positions of the letters that are meant. Raises InputError for one without a letter."""
    from pipelines.dead_letters import Selection, summaries

    asked = [_numbers(text) for text in texts]
    selection = Selection(partitions=tuple({numbers[-2] for numbers in asked}))
    rows = summaries(letters, selection).select(["epoch", "partition", "offset"]).to_pylist()
    there = sorted(tuple(row.values()) for row in rows)
    newest = {place[1:]: place for place in there} | {place: place for place in there}
    if absent := [text for text, numbers in zip(texts, asked, strict=True) if numbers not in newest]:
        raise InputError(f"no dead letter is at {absent[0]} in {letters}; vql dead-letters list shows them")
    return [newest[numbers] for numbers in asked]


def _numbers(text: str) -> tuple[int, ...]:
    numbers = text.split(":")
    if len(numbers) not in (2, 3) or not all(number.isdecimal() for number in numbers):
        raise InputError(f"{text!r} is no position: PARTITION:OFFSET or EPOCH:PARTITION:OFFSET")
    return tuple(map(int, numbers))


def _print_left_out(left_out: list[Decision]) -> None:
    from pipelines.dead_letters import words

    for decision in left_out[:20]:
        out.print(plain(f"{words(decision.letter)}: {decision.left_out}"), soft_wrap=True)
    kinds = Counter(decision.left_out.split(":")[0].split(";")[0] for decision in left_out[20:])
    for kind, count in kinds.most_common():
        out.print(plain(f"... and {count:,} more {kind}"), soft_wrap=True)


def _replayed(replay: Replay | None) -> dict[str, Any]:
    return {
        "replayed": replay is not None,
        "replayed_to": None if replay is None else replay.topic,
        "replayed_offset": None if replay is None else replay.new_offset,
    }


def _print_json(row: dict[str, Any]) -> None:
    # ASCII alone, so that a terminal cannot be steered by it.
    typer.echo(json.dumps(row))


def _base64(data: bytes | None) -> str | None:
    return None if data is None else base64.b64encode(data).decode()


def _write_new(path: Path, data: bytes) -> None:
    try:
        with path.open("xb") as file:
            file.write(data)
    except OSError as error:
        raise InputError(f"--save: {path} cannot be written: {error.strerror}; name a new file") from error


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
