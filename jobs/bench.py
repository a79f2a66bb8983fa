"""What all benchmarks share: what they ran on, and how their figures are kept and shown."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import psutil
from rich.table import Table

from jobs.jars import KAFKA_VERSION, require_java
from models.files import replace_file

PACKAGES = (
    "vql-cache",
    "apache-beam",
    "pyspark",
    "delta-spark",
    "confluent-kafka",
    "redis",
    "hiredis",
    "numpy",
    "numba",
    "msgspec",
    "feast",
    "torch",
)


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """What a figure depends on. load_average: of the minute before the benchmark, 0 where nobody else was at work."""

    system: str
    processor: str
    cores: int
    memory_gb: float
    load_average: float


def machine() -> Machine:
    return Machine(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        processor=_processor(),
        cores=len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else os.cpu_count() or 1,
        memory_gb=round(psutil.virtual_memory().total / 2**30, 1),
        load_average=round(psutil.getloadavg()[0], 2),
    )


def versions(**servers: str) -> dict[str, str]:
    """Of Python, the packages that a benchmark measures, and these servers."""
    packages = {package: importlib.metadata.version(package) for package in PACKAGES}
    return {"python": platform.python_version()} | packages | servers


def java_and_kafka() -> dict[str, str]:
    """The versions of the Java that is found, and of the broker that it runs."""
    said = subprocess.run([require_java(), "-version"], capture_output=True, text=True, check=False).stderr
    found = re.search(r'version "([^"]+)"', said)
    return {"java": found[1] if found else "unknown", "kafka": KAFKA_VERSION}


def write_figures(path: Path, figures: Mapping[str, Any]) -> None:
    """The figures as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, msgspec.json.format(msgspec.json.encode(figures), indent=2) + b"\n")


def figures_table(title: str, columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> Table:
    """A row of figures for each name."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    for name, figures in rows.items():
        table.add_row(name, *figures)
    return table


def _processor() -> str:
    """The processor's name where the system tells it."""
    try:
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor() or "unknown"
