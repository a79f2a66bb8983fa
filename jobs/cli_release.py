"""The commands `vql release`: a checkpoint's way to rankers, back, and out of use."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jobs.cli_options import LOCAL, Log, Master, State, choice, resolved_checkpoint_path
from models.errors import InputError, StoreError

if TYPE_CHECKING:
    from jobs.releases.overview import Overview
    from jobs.releases.states import Entry
    from jobs.releases.steps import Operation

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Releases: which checkpoint rankers read, which were before it, and which may come after it.\n\n"
    "A checkpoint's way: [b]add[/b] (it is known: trained), [b]gate[/b] (judged against the live one), [b]backfill[/b] "
    "(its rows are there; start its stream), [b]shadow[/b] (its stream runs), [b]promote[/b] (rankers follow within "
    "seconds; the old one stands by), and [b]rollback[/b] if it was a mistake: one flip, because the old one's stream "
    "runs on. [b]retire[/b] ends a release and deletes its rows; end its stream first.\n\n"
    "Rankers follow the table itself: vql serve --checkpoint build/releases. Each step is one commit to it, so every "
    "command may be killed, or given twice or by two people at once, and be given again: what is done already is not "
    "done again. --dry-run says what a step would do.\n\n"
    "RELEASE is a checkpoint's id, the beginning of it, or the folder that it was added from.",
)
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

Releases = Annotated[
    Path, typer.Option("--releases", envvar="VQL_RELEASES", resolve_path=True, help="Folder of the table of releases.")
]
Release = Annotated[str, typer.Argument(metavar="RELEASE", help="A checkpoint's id, its beginning, or its folder.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")]
Why = Annotated[str, typer.Option("--note", help="Why, for those who read the table later.")]


@app.command("list")
def list_(
    releases: Releases,
    state: Annotated[
        Path | None,
        typer.Option(envvar="VQL_STATE", resolve_path=True, help="Folder of the online store: shows rows and lag too."),
    ] = None,
    history: Annotated[bool, typer.Option("--history", help="Every step, and not only where each release is.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="A line of JSON for each, for programs.")] = False,
) -> None:
    """Show each release: its state, since when, by whom and why; with --state its rows, and how far they are behind.

    Behind: events that the rows of another release include and its own do not. If that grows, its stream stands.

    Example: vql release list --releases build/releases --state build/state
    """
    import msgspec

    from feature_repo.handle import StoreHandle
    from jobs.releases.overview import overview
    from jobs.releases.table import read_releases

    now = read_releases(releases)
    try:
        shown = overview(now, None if state is None else StoreHandle(state=state).open())
    except StoreError as error:
        # Whatever the store is like, the releases can be seen.
        err.print(Text(f"the store cannot be asked: {error}"), soft_wrap=True)
        shown = overview(now, None)
    if json_:
        for each in now.entries if history else shown:
            typer.echo(msgspec.json.encode(each))
        return
    if not shown:
        out.print("no releases: vql release add makes a checkpoint one")
        return
    out.print(_history(now.entries) if history else _table(shown))


@app.command()
def add(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            parser=resolved_checkpoint_path, metavar="PATH|URL", help="A checkpoint directory, made by vql train."
        ),
    ],
    releases: Releases,
    dry_run: DryRun = False,
) -> None:
    """Make a checkpoint a release, in the state trained. The folder has to stay where it is; a URL's is in
    $VQL_CHECKPOINT_CACHE, which rankers, streams and jobs have to share then.

    Example: vql release add build/second --releases build/releases
    """
    from jobs.releases.steps import add as run

    operation = _operation(releases, dry_run)
    _say(operation, run(operation, checkpoint), str(checkpoint))


@app.command()
def gate(
    release: Release,
    releases: Releases,
    log: Log,
    work: Annotated[Path, typer.Option(resolve_path=True, help="Folder for what was asked and scored; resumed from.")],
    margin: Annotated[
        float | None, typer.Option(min=0.0, help="GAUC that a candidate may at most be worse. Absent: 0.01.")
    ] = None,
    force: Annotated[
        str | None, typer.Option(metavar="REASON", help="Let it pass although it is refused; recorded with the reason.")
    ] = None,
    protocol: Annotated[
        str, typer.Option(help="raw (negatives by popularity) or fair (as familiar as positives)")
    ] = "raw",
    users: Annotated[int, typer.Option(min=2, help="Held-out users at most, chosen by a hash.")] = 10_000,
    per_user: Annotated[int, typer.Option(min=1, help="Impressions of each at most.")] = 4,
    length: Annotated[int, typer.Option(min=1, help="Newest events of a history that are looked at.")] = 1_000,
    master: Master = LOCAL,
    dry_run: DryRun = False,
) -> None:
    """Judge a candidate against the live release, on what neither was trained on: GAUC, AUC, log loss, codebook, rows.

    Held out is what the log has since the training of the later of the two ended: train with --before-ms, or wait for a
    day of new events. Items are encoded by each one's own table: run vql encode-items before.

    Refused is a candidate whose GAUC may be worse by more than --margin: the interval of the difference (95 %, users
    drawn again) reaches below it. The default, 0.01, is more than seeds of one training mostly differ by, so an equal
    model passes. Refused too: no better than chance, or a collapsed codebook; for the first release, with nothing live
    to compare with, that is all. The report is a JSON file in the table's folder, _reports. Judged once, a candidate
    needs no other judgement until another release is live.

    Exit codes: 0 it passed, or had; 8 refused, with the figures; others as ever.

    Example: vql release gate build/second --releases build/releases --log build/log --work build/gate
    """
    from jobs.releases.gate import MARGIN, Judgement, compare, judge
    from jobs.releases.held_out import Question
    from jobs.releases.steps import gate as run
    from jobs.spark import open_spark
    from models.checkpoint import Checkpoint

    if force is not None and not force.strip():
        raise InputError("--force needs a reason, which is recorded")
    asked = Question(
        protocol=choice("--protocol", protocol, ("raw", "fair")), per_user=per_user, users=users, length=length
    )

    def judged(candidate: Checkpoint, live: Checkpoint | None) -> Judgement:
        report = compare(open_spark(master), candidate, live, log, asked, work)
        return judge(report, MARGIN if margin is None else margin, force)

    operation = _operation(releases, dry_run)
    added = run(operation, release, judged)
    _say(operation, added, release)
    now = operation.read()
    out.print(Text(f"report: {operation.report_path(now.named(release).checkpoint_id, now.live_id)}"), soft_wrap=True)


@app.command()
def backfill(
    release: Release, releases: Releases, log: Log, state: State, master: Master = LOCAL, dry_run: DryRun = False
) -> None:
    """Write the rows of every user, as vql backfill does, and then start the release's stream: it goes on at the cut.

    Example: vql release backfill 0f3c --releases build/releases --log build/log --state build/state
    """
    from feature_repo.handle import StoreHandle
    from feature_repo.repo import open_repo, register
    from feature_repo.store import Backfill
    from jobs.backfill import backfill as fill
    from jobs.releases.steps import backfill as run
    from jobs.spark import open_spark
    from models.checkpoint import Checkpoint

    store, operation = StoreHandle(state=state), _operation(releases, dry_run)

    def filled(checkpoint: Checkpoint) -> Backfill:
        register(open_repo(state), checkpoint.checkpoint_id)
        return fill(open_spark(master), checkpoint, log, store)

    _say(operation, run(operation, release, store, filled), release)


@app.command()
def shadow(release: Release, releases: Releases, state: State, dry_run: DryRun = False) -> None:
    """Say that the release's rows are there and its stream runs: from now on it may be promoted.

    Example: vql release shadow 0f3c --releases build/releases --state build/state
    """
    from feature_repo.handle import StoreHandle
    from jobs.releases.steps import shadow as run

    operation = _operation(releases, dry_run)
    _say(operation, run(operation, release, StoreHandle(state=state).open()), release)


@app.command()
def promote(release: Release, releases: Releases, state: State, note: Why = "", dry_run: DryRun = False) -> None:
    """Make the release live: rankers follow within seconds, each request answered wholly by one of the two.

    The release that was live stands by; leave its stream running as long as a rollback may be wanted.

    Example: vql release promote 0f3c --releases build/releases --state build/state
    """
    from feature_repo.handle import StoreHandle
    from jobs.releases.steps import promote as run

    operation = _operation(releases, dry_run)
    _say(operation, run(operation, release, StoreHandle(state=state).open(), note), release)


@app.command()
def rollback(
    release: Annotated[str, typer.Argument(metavar="RELEASE", help="The live release, which is to be left.")],
    releases: Releases,
    note: Why = "",
    dry_run: DryRun = False,
) -> None:
    """Leave the live release for the one that was live before it: one flip, which needs nothing but the table.

    It is the live one that is named, so the same command again does not flip back.

    Example: vql release rollback 0f3c --releases build/releases --note "clicks are down"
    """
    from jobs.releases.steps import rollback as run

    operation = _operation(releases, dry_run)
    _say(operation, run(operation, release, note), release)


@app.command()
def retire(
    release: Release,
    releases: Releases,
    state: State,
    idle_s: Annotated[
        float, typer.Option(min=0.0, help="Refused if it was live so many seconds ago: rankers need some to follow.")
    ] = 300.0,
    dry_run: DryRun = False,
) -> None:
    """End a release for ever, and delete its rows, gently. End its stream before: it would write some of them again.

    Killed while it deletes, the same command deletes the rest.

    Example: vql release retire 9e1d --releases build/releases --state build/state
    """
    from feature_repo.handle import StoreHandle
    from jobs.releases.steps import retire as run

    operation = _operation(releases, dry_run)
    added, rows = run(operation, release, StoreHandle(state=state).open(), idle_s)
    _say(operation, added, release)
    out.print(f"{rows:,} rows {'would be ' if dry_run else ''}deleted")


def _operation(releases: Path, dry_run: bool) -> Operation:
    from jobs.releases.steps import Operation

    return Operation(table=releases, dry_run=dry_run)


def _say(operation: Operation, added: Sequence[Entry], name: str) -> None:
    """What a step added to the table, or that it had nothing to add."""
    if not added:
        entry = operation.read().named(name)
        out.print(Text(f"nothing to do: release {entry.checkpoint_id} is {entry.state}"), soft_wrap=True)
    for entry in added:
        would = "would be" if operation.dry_run else "is"
        out.print(
            Text(f"release {entry.checkpoint_id} {would} {entry.state}" + (f": {entry.note}" if entry.note else "")),
            soft_wrap=True,
        )


def _table(shown: Sequence[Overview]) -> Table:
    table = Table()
    # What a command needs is whole however narrow the terminal is.
    for name in ("release", "state"):
        table.add_column(name, no_wrap=True)
    for name in ("since", "by"):
        table.add_column(name)
    table.add_column("rows", justify="right")
    table.add_column("behind", justify="right")
    table.add_column("checkpoint", overflow="fold")
    table.add_column("note", overflow="fold")
    for each in shown:
        # Text, because a note may hold what the console takes for markup.
        table.add_row(
            each.checkpoint_id[:12],
            Text(each.state, style="bold" if each.state == "live" else ""),
            _time(each.at_ms),
            Text(each.by),
            "" if each.rows is None else f"{each.rows:,}",
            "" if each.behind is None else f"{each.behind:,}",
            Text(each.path),
            Text(each.note),
        )
    return table


def _history(entries: Sequence[Entry]) -> Table:
    table = Table()
    for name in ("time", "release", "state", "by"):
        table.add_column(name, no_wrap=name in ("release", "state"))
    table.add_column("note", overflow="fold")
    for entry in entries:
        table.add_row(_time(entry.at_ms), entry.checkpoint_id[:12], entry.state, Text(entry.by), Text(entry.note))
    return table


def _time(at_ms: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(at_ms / 1000))
