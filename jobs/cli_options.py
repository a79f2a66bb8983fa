"""What several commands of the command line share: options of one meaning, and how their texts are read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from msgspec import UNSET, UnsetType

from models.errors import InputError

if TYPE_CHECKING:
    from models.item_context import ContextFields

# Absolute, because executors and workers have working folders of their own.
Log = Annotated[
    Path, typer.Option(resolve_path=True, help="Folder of the log: Delta tables events, items, quarantine.")
]
State = Annotated[
    Path, typer.Option(envvar="VQL_STATE", resolve_path=True, help="Folder of the online store and Feast's registry.")
]


def is_url(text: str) -> bool:
    return "://" in text


def path_or_url(text: str) -> Path | str:
    """An absolute path, or the URL as it is."""
    return text.rstrip("/") if is_url(text) else Path(text).resolve()


def checkpoint_path(text: str) -> Path:
    """The path as it is; of a URL, where its checkpoint is in this machine's cache by now."""
    if not is_url(text):
        return Path(text)
    from jobs.checkpoint_store import fetch_checkpoint

    return fetch_checkpoint(text)


def resolved_checkpoint_path(text: str) -> Path:
    return checkpoint_path(text).resolve()


CheckpointPath = Annotated[
    Path,
    typer.Option(
        "--checkpoint",
        parser=resolved_checkpoint_path,
        metavar="PATH|URL",
        help="A checkpoint directory, made by vql train; a URL's is fetched once (to $VQL_CHECKPOINT_CACHE).",
    ),
]

Master = Annotated[str, typer.Option(help="Spark master: local[2], spark://host:7077, ...")]
LOCAL = "local[2]"

# What decides a training, for `vql train` and for every training of `vql evaluate`.
HalfLives = Annotated[
    list[str], typer.Option(help="One per head: 12h, 7d or never; commas for several rates of a head.")
]
ItemsVersion = Annotated[
    int | None, typer.Option(help="Delta version of the log's items to read; newest if absent, as of the log.")
]
WarmStart = Annotated[
    Path | None,
    typer.Option(
        parser=resolved_checkpoint_path,
        metavar="PATH|URL",
        help="A checkpoint whose parameters the training begins with; of a table of releases, the live one.",
    ),
]
Codebook = Annotated[
    str,
    typer.Option(
        help="What becomes of its codebook: relearn (as a first training does), or freeze (it stays as it is)."
    ),
]
Number = Annotated[list[str], typer.Option(help="A numeric item feature to use, from vql ingest-items; repeatable.")]
Tags = Annotated[list[str], typer.Option(help="An item feature of tags, with | between or in an array; repeatable.")]
Vector = Annotated[
    list[str], typer.Option(help="A precomputed vector of items to use, an array of numbers; repeatable.")
]
Counted = Annotated[
    list[str],
    typer.Option(
        help="item_id or a field, counted for each user by its values; repeatable. Absent: item_id and every field."
    ),
]
NoCounts = Annotated[bool, typer.Option("--no-counts", help="Count nothing.")]
CountHalfLives = Annotated[str, typer.Option(help="Half-lives of the counts, with commas between.")]
HALF_LIVES, COUNT_HALF_LIVES = ["1d", "7d", "28d", "never"], "28d,never"

# One setting for all three programs that judge records: else the table of events would not be what the stream folds.
MaxFuture = Annotated[
    float,
    typer.Option(
        envvar="VQL_MAX_FUTURE_S",
        min=0,
        help="Seconds that an event's time may lie after its record's own; the same for ingest, stream and replay.",
    ),
]


def declared(number: list[str], tags: list[str], vector: list[str]) -> ContextFields | UnsetType:
    """The item features beside the fields; unset where none are declared."""
    from models.item_context import ContextFields

    fields = ContextFields(numbers=tuple(number), tags=tuple(tags), vectors=tuple(vector))
    return fields if fields.names else UNSET


def pairs(texts: list[str], shape: str = "--column: FIELD=EXPRESSION") -> dict[str, str]:
    """FIELD=VALUE texts. Raises InputError for another shape."""
    found = [text.partition("=") for text in texts]
    if bad := [text for text, (key, equals, value) in zip(texts, found, strict=True) if not (key and equals and value)]:
        raise InputError(f"{bad[0]!r} is not as in {shape}")
    return {key: value for key, _, value in found}


def offsets(option: str, text: str) -> dict[int, int]:
    """PARTITION=OFFSET,... Raises InputError for another shape."""
    return {
        integer(option, p): integer(option, o)
        for p, o in pairs(text.split(","), f"{option}: PARTITION=OFFSET,...").items()
    }


def integer(option: str, text: str) -> int:
    """Raises InputError naming the option."""
    try:
        return int(text)
    except ValueError as error:
        raise InputError(f"{option}: {text!r} is not a whole number") from error


def choice(option: str, text: str, choices: tuple[str, ...]) -> Any:
    """The text if it is one of the choices. Raises InputError naming them."""
    if text in choices:
        return text
    raise InputError(f"{option}: {text!r} is none of {', '.join(choices)}")
