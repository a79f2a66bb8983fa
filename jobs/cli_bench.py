"""The commands `vql bench`: each measures one part of the product on this machine, and writes its figures as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from jobs.cli_options import choice

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Measure the product on this machine. Each command writes its figures as JSON, with the machine and versions "
    "that they depend on. Close other programs first: a figure is only as good as the machine is idle.",
)
out = Console(highlight=False)

Output = Annotated[Path, typer.Option("--output", resolve_path=True, help="The JSON file to write.")]


@app.command("stream")
def stream(
    output: Output,
    load: Annotated[
        str, typer.Option(help="skewed: 5,000 users by a power law. uniform: 500,000 users alike. both")
    ] = "both",
    events: Annotated[int | None, typer.Option(min=1, help="Events of a load to catch up with.")] = None,
    freshness_s: Annotated[
        float | None, typer.Option(min=0.0, help="Seconds at each of 10, 50 and 80 % of capacity; 0: not at all.")
    ] = None,
    soak_s: Annotated[
        float | None, typer.Option(min=0.0, help="Seconds for which memory is watched; 0: not at all.")
    ] = None,
    repeats: Annotated[
        int | None, typer.Option(min=1, help="Rounds of all sides; the median of each side counts.")
    ] = None,
    row_cache_mb: Annotated[
        int | None, typer.Option(min=0, help="As vql stream has it. Memory can only be flat once this is full.")
    ] = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="A smoke run of minutes: one round of 100,000 events, 5 s each. Figures say little."
        ),
    ] = False,
) -> None:
    """How fast, how fresh, how steady the stream is; against a plain loop that makes the same rows without safety.

    Starts its own Kafka and redis-server on free ports of 127.0.0.1, in a temporary folder; needs Java and
    redis-server. They take their share of the same cores. A default run takes about a quarter of an hour.

    [b]floor, redis, embedded[/b]: events/s by the plain loop, and by vql stream into Redis and into SQLite, from the
    first record at hand to the last put. [b]bytes_per_event[/b]: written to the store, as rows of two parts and had
    they been whole. [b]freshness[/b]: seconds from an event to the row that holds it, for a reader of Redis.
    [b]rss_mb[/b]: memory of the stream's process. [b]poison[/b]: events/s with 1 % of bad records.

    Example: vql bench stream --output build/bench/stream.json --soak-s 600
    """
    from jobs.bench import figures_table, write_figures
    from jobs.bench_figures import table_rows
    from jobs.bench_load import LOADS
    from jobs.bench_stream import StreamBench, run_stream_bench
    from pipelines.poison import poisoned

    chosen = choice("--load", load, (*LOADS, "both"))
    usual_events, usual_s, usual_repeats = (100_000, 5.0, 1) if quick else (1_000_000, 30.0, 3)
    plan = StreamBench(
        events=usual_events if events is None else events,
        loads=tuple(LOADS) if chosen == "both" else (chosen,),
        freshness_s=usual_s if freshness_s is None else freshness_s,
        soak_s=usual_s if soak_s is None else soak_s,
        poisoned=poisoned,
        repeats=usual_repeats if repeats is None else repeats,
        row_cache_mb=row_cache_mb,
    )
    figures = run_stream_bench(plan, out)
    write_figures(output, figures)
    out.print(figures_table("the stream, on this machine", plan.loads, table_rows(figures, plan.loads)))
    out.print(f"figures: {output}", soft_wrap=True)


@app.command("rank")
def rank(
    output: Output,
    seconds: Annotated[
        float, typer.Option(min=0.0, help="About how long each side is measured, at each length or number.")
    ] = 5.0,
    device: Annotated[str, typer.Option(help="Where all sides score: cpu, cuda or cuda:N")] = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="A smoke run: short histories, 0.2 s each.")] = False,
) -> None:
    """What it costs to score 500 candidates of a user who has 1,000, 10,000 or 100,000 events.

    Starts its own redis-server; every side fetches what it needs from it, and its scores are checked against those of
    raw events first. Takes about six minutes.

    [b]vql[/b]: the row, by the product's own path. [b]full[/b]: every raw event, with exact keys, by torch's fused
    attention. [b]sdim[/b]: 8 KB of hashed sums per user, made when events are written. [b]topk[/b]: every raw event,
    and attention over the 50 nearest by 64-bit hashes (ETA). [b]din_50[/b]: the newest 50.
    [b]crossover_length[/b]: below it full costs less than vql (null: nowhere). [b]concurrent[/b]: what each of 1, 8 and
    32 clients waits at 10,000 events; every side behind the batches of vql serve, without HTTP. [b]flatness[/b]: p50 at
    the longest history over the shortest. [b]few_candidates[/b]: 100 instead of 500.

    Example: vql bench rank --output build/bench/rank.json
    """
    from jobs.bench import figures_table, write_figures
    from jobs.bench_rank import RankBench, client_rows, run_rank_bench, table_rows

    plan = RankBench(seconds=seconds, device=device)
    if quick:
        plan = RankBench(
            lengths=(100, 1_000),
            ladder=(30, 300),
            clients=(1, 4),
            clients_length=1_000,
            users=2,
            rounds=2,
            seconds=0.2,
            device=device,
        )
    figures = run_rank_bench(plan, out)
    write_figures(output, figures)
    columns = [f"{length:,} events" for length in plan.lengths]
    out.print(figures_table("the ranker, on this machine", columns, table_rows(plan, figures)))
    columns = [f"{count} clients" for count in plan.clients]
    out.print(figures_table(f"{plan.clients_length:,} events, clients at once", columns, client_rows(plan, figures)))
    crossover = figures["crossover_length"]
    where = f"below {crossover:,.0f} events" if crossover else "nowhere, or at every length"
    out.print(f"full costs less than vql {where}")
    out.print(f"figures: {output}", soft_wrap=True)


@app.command("read")
def read(
    output: Output,
    users: Annotated[int, typer.Option(min=1, help="Users with a row, of 1,000 to 100,000 events each.")] = 1_000,
    calls: Annotated[int, typer.Option(min=40, help="Calls with one user; larger batches get fewer.")] = 1_000,
) -> None:
    """How long a ranker waits for caches of 1, 10, 100 and 500 users: from user ids to tensors.

    Starts its own redis-server on a free port of 127.0.0.1; needs redis-server. A default run takes about two minutes.

    [b]raw[/b]: the same bytes as plain strings, by one MGET, unchecked: the floor. [b]reader[/b]: ours, to
    tensors, with its deadline. [b]feast[/b]: get_online_features of the same rows, without tensors.
    [b]feast_to_tensors[/b]: the same, and each row decoded and folded by itself.
    [b]feature_per_codeword[/b]: a hash field for each codeword, asked for by name.

    Example: vql bench read --output build/bench/read.json
    """
    from jobs.bench import figures_table, write_figures
    from jobs.bench_read import ReadBench, run_read_bench, table_rows

    plan = ReadBench(users=users, calls=calls)
    figures = run_read_bench(plan, out)
    write_figures(output, figures)
    out.print(figures_table("reading, by users at a time", [str(b) for b in plan.batches], table_rows(figures)))
    out.print(f"figures: {output}", soft_wrap=True)


@app.command("train")
def train(
    output: Output,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
    device: Annotated[str, typer.Option(help="As vql train has it: cpu, cuda or cuda:N")] = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="A smoke run: short histories. Figures say little.")] = False,
) -> None:
    """What an impression costs to train when its user has 1,000, 3,000, 10,000 or 20,000 events, and the memory.

    Whole steps of vql train, on random users; impressions have 20 candidates. Takes a few minutes.

    [b]vql[/b]: timelines that a user's 16 impressions share, with quantised keys; 64 impressions a step.
    [b]steady[/b]: the same for users who have 16 impressions for every 1,000 events.
    [b]full[/b]: exact attention over each impression's own events; 4 impressions a step.
    [b]..._growth[/b]: the milliseconds at the longest over the shortest.

    Example: vql bench train --output build/bench/train.json
    """
    from jobs.bench import figures_table, write_figures
    from jobs.bench_train import TrainBench, curve, run_train_bench, table_rows
    from jobs.plots import png
    from models.checkpoint import Sizes
    from models.files import replace_file

    plan = TrainBench(threads=threads, device=device)
    if quick:
        plan = TrainBench(
            lengths=(50, 200),
            users=4,
            impressions=4,
            candidates=5,
            items=300,
            batch=8,
            device=device,
            sizes=Sizes(codewords=16),
        )
    figures = run_train_bench(plan, out)
    write_figures(output, figures)
    replace_file(output.with_suffix(".png"), png(curve(plan, figures)))
    columns = [f"{length:,} events" for length in plan.lengths]
    out.print(figures_table("training, on this machine", columns, table_rows(plan, figures)))
    out.print(f"figures: {output}, plot: {output.with_suffix('.png')}", soft_wrap=True)


@app.command("backfill")
def backfill(
    output: Output,
    users: Annotated[int, typer.Option(min=1, help="Users of the log that the job reads.")] = 20_000,
    events: Annotated[int, typer.Option(min=1, help="Events of each of them.")] = 100,
    executors: Annotated[int, typer.Option(min=1, help="Executors of the job, with one core each.")] = 2,
    executor_mb: Annotated[int, typer.Option(min=512, help="Memory of each one's Java.")] = 2_048,
    naive: Annotated[bool, typer.Option(help="Whether to run the naive way too, which takes longer.")] = True,
    quick: Annotated[bool, typer.Option("--quick", help="A smoke run: few events. Figures say little.")] = False,
) -> None:
    """How many events/s a core folds in a backfill, and the memory of its executors.

    Starts its own Spark cluster and redis-server on free ports of 127.0.0.1; needs Java and redis-server. A default run
    takes some two minutes.

    [b]fold[/b]: one core without Spark, for users of 100, 1,000 and 10,000 events. [b]floor[/b]: the plain numba fold
    of records in memory. [b]task[/b]: what a task does, from Arrow batches to the bytes of rows. Rows of less than two
    windows (128 events) are raw events, for which nothing is folded.
    [b]job[/b]: all of vql backfill, with scan, shuffle, sort and puts. [b]naive[/b]: groupBy and applyInPandas, without
    puts. [b]memory_mb[/b]: the most of an executor's Java, and of the Python beside it. [b]redis_us_per_row[/b]: what a
    row costs the server's core, by which --puts-per-s may be chosen.

    Example: vql bench backfill --output build/bench/backfill.json
    """
    from jobs.bench import figures_table, write_figures
    from jobs.bench_backfill import BackfillBench, run_backfill_bench, table_rows

    plan = BackfillBench(users=users, length=events, executors=executors, executor_mb=executor_mb, naive=naive)
    if quick:
        plan = BackfillBench(
            users=300, length=20, lengths=(20, 300), fold_events=3_000, rounds=1, executors=1, executor_mb=512
        )
    figures = run_backfill_bench(plan, out)
    write_figures(output, figures)
    columns = [f"{length:,} events" for length in plan.lengths]
    out.print(figures_table("folds, on this machine", columns, table_rows(figures)))
    out.print(f"figures: {output}", soft_wrap=True)
