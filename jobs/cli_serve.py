"""The command `vql serve`: its options, and from them the plan of a server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.cli_options import State, checkpoint_path, choice

# Not resolved: the path itself is watched, and what it names may change.
LiveCheckpoint = Annotated[
    Path,
    typer.Option(
        "--checkpoint",
        parser=checkpoint_path,
        metavar="PATH|URL",
        help="A table of releases (the live one), a checkpoint directory, a link to one, or a file that names one; "
        "followed when it changes. Or a checkpoint's URL, which is not followed.",
    ),
]


def serve(
    checkpoint: LiveCheckpoint,
    state: State,
    shadow: Annotated[
        Path | None,
        typer.Option(
            help="A table of releases (the newest in the state shadow), or a checkpoint: asked too after the answer is "
            "given, and compared in the metrics vql_shadow_*."
        ),
    ] = None,
    shadow_share: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="Share of the requests that the shadow is asked, by a hash of users."),
    ] = 0.01,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for callers outside.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free port, which is logged.")] = 8000,
    batch_users: Annotated[int, typer.Option(min=1, help="Users of a batch, at most.")] = 32,
    batch_wait_ms: Annotated[
        float, typer.Option(min=0.0, help="How long a request may wait for others while the model is idle.")
    ] = 0.0,
    threads: Annotated[int, typer.Option(min=1, help="Batches scored at the same time, each on one core.")] = 1,
    deadline_ms: Annotated[
        float,
        typer.Option(min=0.1, help="A batch's wait for the store; then rows read last, flagged, or none."),
    ] = 50.0,
    kept_mb: Annotated[int, typer.Option(min=0, help="Memory for the rows read last, MiB.")] = 256,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N")] = "cpu",
    means: Annotated[
        str, typer.Option(help="float32, or float16 or bfloat16: half of the bytes that a GPU is sent for a user.")
    ] = "float32",
    linger: Annotated[
        float, typer.Option(min=0.0, help="Seconds of SIGTERM in which it still listens: /readyz says 503 meanwhile.")
    ] = 2.0,
    drain: Annotated[float, typer.Option(min=0.1, help="Seconds after that for what is being answered.")] = 30.0,
    read_log: Annotated[
        Path | None,
        typer.Option(
            resolve_path=True,
            help="Log a share of the reads to this Delta table, for vql audit; needs a key, see there.",
        ),
    ] = None,
    read_log_share: Annotated[
        float, typer.Option(min=1e-9, max=1.0, help="Of all users and minutes, how many are logged.")
    ] = 0.001,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error")] = "info",
) -> None:
    """Score candidates over HTTP: POST /rank. Described by /openapi.json; watched by /healthz, /readyz and /metrics.

    Logs JSON lines on standard error. Follows the live checkpoint without a restart: a new one is loaded beside the
    old one, and each answer names the one that made it. While the store does not answer in time, users are scored from
    their rows read last, or without history, and flagged. SIGTERM ends it when all is answered.

    Example: vql serve --checkpoint build/demo/live --state build/demo/state --port 8000
    """
    from jobs.logs import configure_logs

    configure_logs(log_level)
    from feature_repo.handle import StoreHandle
    from feature_repo.reader import ReadLimits
    from jobs.scoring import MEANS, placed
    from jobs.serving.batches import BatchRules
    from jobs.serving.server import Sampling, ServePlan, run_server
    from jobs.serving.shadow import ShadowPlan
    from models.user_hash import chosen_key_file, user_hash_key

    sampling = None
    if read_log is not None:
        sampling = Sampling(path=read_log, share=read_log_share, key=user_hash_key(chosen_key_file()))

    run_server(
        ServePlan(
            checkpoint_path=checkpoint.absolute(),
            store=StoreHandle(state=state).for_reader(deadline_ms / 1000),
            host=host,
            port=port,
            rules=BatchRules(users_max=batch_users, wait_s=batch_wait_ms / 1000, at_once=threads),
            placement=placed(device, choice("--means", means, tuple(MEANS))),
            limits=ReadLimits(deadline_s=deadline_ms / 1000, kept_bytes=kept_mb << 20),
            linger_s=linger,
            drain_s=drain,
            sampling=sampling,
            shadow=None if shadow is None else ShadowPlan(path=shadow.absolute(), share=shadow_share),
        )
    )
