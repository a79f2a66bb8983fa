"""What a public data set is to the jobs: its files as published, and how their rows become events and items.

One file per data set says only that. Finding the files, checking that they are the right ones, and writing the log is
here, by the one ingest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.baskets import ExamplePlan
from jobs.ingest import EventSource, IngestReport, NewLog, ingest, read_files, replace_items
from models.errors import InputError

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

# The rows of one of the data set's files, named by its role.
Read = Callable[[str], "DataFrame"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFile:
    """A published file: its name, and the columns that are read (none: those that the expressions name)."""

    name: str
    columns: tuple[str, ...] = ()
    format: str = "csv"


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSet:
    """One data set.

    about, terms: a line each on what is in it and under which terms. files: by role. events, items: the rows of
    which `columns` and `item_columns` make events and items by SQL expressions. fields: the item columns that models
    are trained with; tags are values with "|" between. within: the field within whose value negatives are drawn.
    shown, clicked: the actions of what was shown, and of what of that was clicked; without them there is only sampling.
    remembered: the actions that histories are made of, none for all.
    folder: where the files are when no path is given, None when one has to be.
    """

    name: str
    about: str
    terms: str
    files: Mapping[str, SourceFile]
    events: Callable[[Read], DataFrame]
    columns: Mapping[str, str]
    items: Callable[[Read], DataFrame]
    item_columns: Mapping[str, str]
    fields: tuple[str, ...]
    within: str | None = None
    shown: tuple[str, ...] = ()
    clicked: tuple[str, ...] = ()
    remembered: tuple[str, ...] = ()
    folder: Callable[[], Path] | None = None

    @property
    def protocols(self) -> tuple[str, ...]:
        """Which ways to evaluate make sense: real impressions where there are clicks, else sampled ones."""
        return ("impressions",) if self.clicked else ("raw", "fair")

    def plan(self, protocol: str) -> ExamplePlan:
        """A plan of this protocol with what it needs to know of the data. Raises InputError for one of no sense."""
        if protocol not in self.protocols:
            raise InputError(f"{self.name} is evaluated by {' or '.join(self.protocols)}, not by {protocol!r}")
        return ExamplePlan(
            protocol=protocol,
            within=self.within,
            shown=self.shown,
            clicked=self.clicked,
            remembered=self.remembered,
        )

    def altered(self, names: Mapping[str, str], columns: Mapping[str, str], items: Mapping[str, str]) -> DataSet:
        """With other names of files (by role) and other expressions. Raises InputError for an unknown role."""
        if unknown := sorted(set(names) - set(self.files)):
            raise InputError(f"--file {unknown[0]}=...: {self.name} has the files {', '.join(self.files)}")
        files = {role: replace(file, name=names.get(role, file.name)) for role, file in self.files.items()}
        return replace(
            self, files=files, columns={**self.columns, **columns}, item_columns={**self.item_columns, **items}
        )

    def find(self, path: Path | None) -> Path:
        """The folder that holds every file: the path, or `data` in it as the archives have it. Raises InputError."""
        if path is None and self.folder is None:
            raise InputError(f"{self.name} has to be fetched by yourself ({self.terms}); give --path its folder")
        root = self.folder() if path is None and self.folder is not None else path
        assert root is not None
        names = [file.name for file in self.files.values()]
        for folder in (root, root / "data"):
            missing = [name for name in names if not (folder / name).exists()]
            if not missing:
                return folder
        here = [name for name in names if not (root / name).exists()]
        raise InputError(
            f"{root} has no {' and no '.join(here)}: {self.name} needs {', '.join(names)} as published; give --path "
            "the folder they are in, or --file ROLE=NAME where one has another name"
        )

    def read(self, spark: SparkSession, folder: Path, role: str) -> DataFrame:
        """The rows of one file. Raises InputError when it lacks a column."""
        file = self.files[role]
        rows = read_files(spark, folder / file.name, file.format)
        if missing := [column for column in file.columns if column not in rows.columns]:
            raise InputError(
                f"{folder / file.name} has no columns {missing} (its columns: {', '.join(rows.columns)}); is it the "
                f"file of {self.name} as published?"
            )
        return rows


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """What `prepare` wrote: events, and the items that were described."""

    events: IngestReport
    items: int


def prepare(
    spark: SparkSession, data: DataSet, path: Path | None, log: Path, where: str = "true", new: NewLog = NewLog()
) -> Prepared:
    """The data set's events and items to a log. Again, it appends nothing twice. Raises InputError."""
    folder = data.find(path)
    read = partial(data.read, spark, folder)
    # Items first: their files are small, and looked at before the log is begun.
    rows = data.items(read)
    source = EventSource(path=folder, format="", columns=data.columns, where=where, rows=lambda _: data.events(read))
    events = ingest(spark, source, log, new)
    return Prepared(events=events, items=replace_items(spark, rows, data.item_columns, folder, log))
