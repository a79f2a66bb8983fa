"""The command `vql evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from jobs.cli_options import (
    COUNT_HALF_LIVES,
    HALF_LIVES,
    LOCAL,
    Counted,
    CountHalfLives,
    HalfLives,
    Master,
    NoCounts,
    Number,
    Tags,
    Vector,
    choice,
    declared,
    integer,
)
from models.model_names import MODELS

out = Console(highlight=False)


def evaluate(
    data: Annotated[str, typer.Option(help="A data set of vql data list.")],
    output: Annotated[Path, typer.Option(resolve_path=True, help="The JSON file to write; a page with plots beside.")],
    work: Annotated[Path, typer.Option(resolve_path=True, help="Folder of logs, trainings and scores; resumed from.")],
    path: Annotated[
        Path | None, typer.Option(resolve_path=True, help="The folder with the data set's files, if it needs one.")
    ] = None,
    models: Annotated[
        str, typer.Option(help=f"With commas between: {','.join(MODELS)}; or one of these with +counts")
    ] = ",".join(MODELS),
    protocol: Annotated[
        str | None, typer.Option(help="raw or fair; impressions where the data has clicks. Absent: the data's first.")
    ] = None,
    length: Annotated[int, typer.Option(min=1, help="Newest events that a model looks at.")] = 1_000,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each model.")] = 3,
    reference: Annotated[str, typer.Option(help="The model that differences are taken from.")] = "vql",
    ablate: Annotated[
        str,
        typer.Option(
            help="Also vql with less: groups,codewords,kernel,counts,context,window; or with category, where it is the "
            "code of a group; commas between."
        ),
    ] = "",
    ladder: Annotated[
        str, typer.Option(help="Ask the trained models at these lengths too, as 20,200,2000; commas between.")
    ] = "",
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training impressions.")] = 1,
    per_user: Annotated[int, typer.Option(min=1, help="Training impressions per user at most.")] = 16,
    test_per_user: Annotated[int, typer.Option(min=1, help="Held-out impressions per user at most.")] = 4,
    holdout: Annotated[float, typer.Option(help="The newest share of the events, on which nothing is trained.")] = 0.15,
    half_life: HalfLives = HALF_LIVES,
    newest: Annotated[int, typer.Option(min=0, max=64, help="As vql train has it; 0: no window over the newest.")] = 50,
    number: Number = [],
    tags: Tags = [],
    vector: Vector = [],
    count: Counted = [],
    no_counts: NoCounts = False,
    count_half_life: CountHalfLives = COUNT_HALF_LIVES,
    master: Master = LOCAL,
) -> None:
    """Train models alike on a public data set, and show what each is worth on what came later, and what it costs.

    Takes minutes for each model and seed. What was made is kept in --work: a run that was ended goes on there, and
    one with more models or seeds makes only those.

    [b]raw[/b]: negatives by their popularity of the time, as if candidates came from everywhere. [b]fair[/b]:
    negatives as familiar to the user as the positive is. Both are shown on repeats and on novel items too. vql counts
    in its rows, a model with +counts exactly.

    Example: vql evaluate --data completejourney --models vql,full,din_50,mean --protocol fair --seeds 3
    --work build/study --output build/study/completejourney-fair.json
    """
    from jobs.bench import write_figures
    from jobs.datasets import DATASETS
    from jobs.spark import open_spark
    from jobs.study.plan import Study, check_study
    from jobs.study.report import markdown, title, write_html
    from jobs.study.run import run_study
    from jobs.train import counted_fields, parse_counts, parse_half_lives
    from models.checkpoint import Sizes

    half_lives = parse_half_lives(half_life)
    published = DATASETS[choice("--data", data, tuple(DATASETS))]
    study = Study(
        data=data,
        models=tuple(name for name in models.split(",") if name),
        protocol=published.protocols[0] if protocol is None else protocol,
        length=length,
        seeds=seeds,
        reference=reference,
        ablate=tuple(name for name in ablate.split(",") if name),
        ladder=tuple(integer("--ladder", text) for text in ladder.split(",") if text),
        holdout=holdout,
        per_user=per_user,
        test_per_user=test_per_user,
        epochs=epochs,
        sizes=Sizes(newest=newest),
        half_life_ms=half_lives,
        counts=None if no_counts else parse_counts(counted_fields("vql", count, published.fields), count_half_life),
        context=declared(number, tags, vector),
    )
    check_study(study)
    published.plan(study.protocol)
    published.find(path)
    figures = run_study(open_spark(master), study, published, path, work, out)
    write_figures(output, figures)
    write_html(output.with_suffix(".html"), figures)
    out.print(title(figures), style="bold", soft_wrap=True)
    out.print(markdown(figures), markup=False, soft_wrap=True)
    out.print(f"figures: {output}, page: {output.with_suffix('.html')}", soft_wrap=True)
