"""`vql demo`: the whole way on a real purchase log, with a check of every part against an independent one.

The log of completejourney is split in time. The history trains three models and is backfilled; the next weeks are
streamed; each household's next basket after that is held out, and ranked. Rows are compared with a fold of the raw
log that shares no code with the cache, scores with attention over the raw history.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import numpy as np
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from rich.console import Console
from rich.table import Table

from feature_repo.handle import StoreHandle
from feature_repo.opened import Opened
from feature_repo.reader import Reader
from feature_repo.repo import open_repo, register
from jobs.backfill import backfill
from jobs.baskets import ExamplePlan
from jobs.datasets.completejourney import CUT, END, FIELDS, ITEM_COLUMNS, data_file, purchases
from jobs.encode_items import encode_items
from jobs.evaluate import Scores, score_cached, score_raw
from jobs.examples import Vocabulary, write_examples
from jobs.ingest import ingest, ingest_items
from jobs.parity import compare_rows, in_chunks, raw_users
from jobs.rank import Ranked, rank_user
from jobs.report import Evidence, Report, StreamFacts, write_report
from jobs.spark import open_spark, read_delta
from jobs.train import TrainJob, run_training
from models.checkpoint import OTHER_ACTION, Checkpoint
from models.errors import InputError, VqlError
from models.load import load_ranker, load_ranker_of
from models.request import Impression
from models.row import Fold, decode_row
from models.timelines import impressions_of, timeline_files
from pipelines.stream import StreamPlan, StreamReport, run

MODELS = ("vql", "din_50", "no_history")
PARITY_MAX = 1e-4
MARK = ".vql-demo"


@dataclass(kw_only=True, slots=True)
class Demo:
    """The folders of a demo, its session, and the seconds of each stage."""

    folder: Path
    console: Console
    spark: SparkSession
    stage_s: dict[str, float] = field(default_factory=dict)

    @property
    def log(self) -> Path:
        return self.folder / "log"

    @property
    def state(self) -> Path:
        return self.folder / "state"

    def checkpoint_path(self, model: str) -> Path:
        return self.folder / "checkpoints" / model

    @contextmanager
    def stage(self, name: str, what: str) -> Iterator[None]:
        """Announce, time and record one stage."""
        self.console.print(f"[bold]{name}[/bold]  {what}")
        started_s = time.monotonic()
        yield
        self.stage_s[name] = round(time.monotonic() - started_s, 1)
        self.console.print(f"  {self.stage_s[name]:.0f} s", style="dim")


def run_demo(folder: Path, console: Console) -> None:
    """Run every stage and write report.json and report.html. Raises VqlError when a check fails."""
    folder = folder.absolute()
    _fresh(folder)
    started_s = time.monotonic()
    demo = Demo(folder=folder, console=console, spark=open_spark(name="vql-demo"))
    demo.stage_s["start"] = round(time.monotonic() - started_s, 1)
    with demo.stage("ingest", f"purchases before {CUT} and all products to Delta"):
        history = ingest(demo.spark, purchases(f"transaction_timestamp < '{CUT}'"), demo.log)
        ingest_items(demo.spark, data_file("products"), "parquet", ITEM_COLUMNS, demo.log)
    checkpoints = _train(demo)
    vql = checkpoints["vql"]
    with demo.stage("encode-items", "codes and values of every product"):
        encode_items(demo.spark, vql, demo.log)
    with demo.stage("backfill", "a row for every household at the cut"):
        register(open_repo(demo.state), vql.checkpoint_id)
        backfill(demo.spark, vql, demo.log, StoreHandle(state=demo.state))
    with demo.stage("arrive", f"purchases from {CUT} to {END} are appended to the log"):
        arrived = ingest(
            demo.spark, purchases(f"transaction_timestamp >= '{CUT}' AND transaction_timestamp < '{END}'"), demo.log
        )
        encode_items(demo.spark, vql, demo.log)
    streamed, again = _stream(demo, vql)
    reader = Reader(StoreHandle(state=demo.state).open(), Opened(vql))
    using = reader.fold
    with demo.stage("parity", "every row against an independent fold of the raw log"):
        rows = compare_rows(reader, demo.log)
    heldout, scores = _evaluate(demo, checkpoints, reader, using)
    ids = {index: item_id for item_id, index in using.table.index.items()}
    one = heldout[0]
    example = rank_user(one.user_id, [ids[c] for c in one.candidate_C], vql.path, demo.state, one.now_ms)
    row_bytes, row_events = _row_facts(reader, demo.log)
    evidence = Evidence(
        history=history,
        arrived=arrived,
        streamed=_facts(streamed),
        redelivered=_facts(again),
        rows=rows,
        scores=scores,
        impressions=len(heldout),
        row_bytes_U=row_bytes,
        row_events_U=row_events,
        usage_GK=_codeword_usage(using),
        losses={m: _losses(demo, m) for m in MODELS},
        stage_s=demo.stage_s,
    )
    report = write_report(demo.folder, evidence)
    demo.spark.stop()
    _show(console, report, example, demo.folder)
    _require(report)


def _fresh(folder: Path) -> None:
    """An empty folder; what an earlier demo left is removed, anything else is not."""
    if folder.exists() and any(folder.iterdir()) and not (folder / MARK).exists():
        raise InputError(f"{folder} is not empty and no earlier demo; give --folder another path")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / MARK).touch()


def _train(demo: Demo) -> dict[str, Checkpoint]:
    made = {}
    for model in MODELS:
        with demo.stage(f"train {model}", "point-in-time baskets, negatives by popularity"):
            job = TrainJob(
                log=str(demo.log),
                fields=FIELDS,
                model=model,
                examples=ExamplePlan(per_user=10),
                length=1 if model == "no_history" else 50 if model == "din_50" else 512,
            )
            made[model] = run_training(demo.spark, job, demo.folder / "work", demo.checkpoint_path(model))
    return made


def _stream(demo: Demo, vql: Checkpoint) -> tuple[StreamReport, StreamReport]:
    """Stream what arrived; then deliver the whole log again, of which nothing may be folded twice."""
    plan = StreamPlan(
        log_path=demo.log / "events",
        checkpoint_path=vql.path,
        store=StoreHandle(state=demo.state),
        dead_letters_path=demo.log / "dead_letters",
    )
    with demo.stage("stream", "Beam folds them into the rows"):
        streamed = run(plan)
    with demo.stage("redeliver", "the whole log once more: every event must be skipped"):
        again = run(replace(plan, start="earliest"))
    return streamed, again


def _evaluate(
    demo: Demo, checkpoints: dict[str, Checkpoint], reader: Reader, using: Fold
) -> tuple[list[Impression], dict[str, Scores]]:
    """Each household's next basket after the stream's end, scored by every model."""
    with demo.stage("held-out", f"each household's next basket after {END}"):
        ingest(demo.spark, purchases(f"transaction_timestamp >= '{END}'"), demo.folder / "heldout")
        later = read_delta(demo.spark, demo.folder / "heldout" / "events")
        impressions = _impressions(demo, later, using)
    with demo.stage("score", "from rows, and from raw histories"):
        vql = load_ranker_of(checkpoints["vql"], using.table)
        scores = {
            "vql": score_cached(vql, reader, impressions),
            "vql_raw": score_raw(vql, impressions),
        }
        for model, length in (("din_50", 50), ("no_history", 1)):
            ranker = load_ranker(checkpoints[model], using.table.feature_MF, using.table.cell_MQ)
            scores[model] = score_raw(ranker, impressions, length)
    return impressions, scores


def _impressions(demo: Demo, later: DataFrame, using: Fold) -> list[Impression]:
    first = later.groupBy("user_id").agg(F.min("event_time_ms").alias("event_time_ms"))
    baskets = later.join(first, ["user_id", "event_time_ms"])
    log = read_delta(demo.spark, demo.log / "events")
    from_ms = log.agg(F.max("event_time_ms")).collect()[0][0] + 1
    ids = sorted(using.table.index, key=using.table.index.__getitem__)
    vocabulary = Vocabulary(fields={"item_id": ids}, feature_MF=using.table.feature_MF)
    out = demo.folder / "work" / "heldout"
    plan = ExamplePlan(from_ms=from_ms, per_user=1, seed=1)
    write_examples(demo.spark, log.unionByName(baskets), vocabulary, [OTHER_ACTION, "purchase"], plan, out)
    return [i for file in timeline_files(out) for i in impressions_of(file)]


def _facts(report: StreamReport) -> StreamFacts:
    return StreamFacts(
        events_folded=report.events_folded,
        events_skipped=report.events_skipped,
        dead_letters=report.dead_letters,
        seconds=report.seconds,
    )


def _row_facts(reader: Reader, log: Path) -> tuple[np.ndarray, np.ndarray]:
    """Bytes and events of every row."""
    sizes, counts = [], []
    for user_ids in in_chunks((user_id for user_id, _ in raw_users(log)), 500):
        for data in reader.rows.get_rows(reader.checkpoint.checkpoint_id, user_ids):
            if data is not None:
                sizes.append(data.size_bytes)
                counts.append(decode_row(data, reader.fold.spec).count)
    return np.array(sizes), np.array(counts)


def _codeword_usage(using: Fold) -> np.ndarray:
    """Items by codeword of each group (G x K)."""
    groups = using.spec.groups
    return np.stack([np.bincount(using.table.code_MG[1:, g], minlength=using.spec.codewords) for g in range(groups)])


def _losses(demo: Demo, model: str) -> list[float]:
    """The training losses of a model, by step."""
    (path,) = (demo.folder / "work").glob(f"{model}-*/loss.jsonl")
    return [msgspec.json.decode(line)["loss"] for line in path.read_bytes().splitlines()]


def _show(console: Console, report: Report, example: Ranked, folder: Path) -> None:
    """The short table at the end."""
    table = Table(title="held-out baskets: candidates = purchased items, and negatives by the period's popularity")
    for column in ("model", "GAUC", "AUC", "log loss"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for model, q in report.quality.items():
        table.add_row(model, f"{q.gauc:.4f}", f"{q.auc:.4f}", f"{q.logloss:.4f}")
    console.print(table)
    console.print(report.verdict)
    console.print(
        f"parity: {report.parity.users_compared:,} users, rows differ by {report.parity.row_max_abs_error:.1e} at "
        f"most, scores by {report.parity.score_max_abs_error:.1e}; stream {report.stream.events_per_s:,.0f} events/s; "
        f"redelivered and skipped {report.events.duplicates_skipped:,}"
    )
    best = ", ".join(f"{item} ({score:+.2f})" for item, score, _ in example.candidates[:5])
    console.print(f"the first household's best of {len(example.candidates)}: {best}")
    console.print(f"report: {folder / 'report.html'} and {folder / 'report.json'}")


def _require(report: Report) -> None:
    """The demo's own checks. Raises VqlError naming the figure that fails."""
    parity, gauc = report.parity, {model: q.gauc for model, q in report.quality.items()}
    row_error, score_error = parity.row_max_abs_error, parity.score_max_abs_error
    checks = {
        f"rows differ from the independent fold by {row_error:.2e}": row_error > PARITY_MAX,
        f"cached scores differ from raw ones by {score_error:.2e}": score_error > PARITY_MAX,
        "the rows do not hold every event of the log once": not parity.count_conservation,
        "vql ranks no better than no history": gauc["vql"] <= gauc["no_history"],
    }
    for sentence, failed in checks.items():
        if failed:
            raise VqlError(sentence)
