"""The Java side's needs: a Java of at least 17, and the jars of Delta and Kafka, resolved once and kept.

Resolving through `spark.jars.packages` asks the resolver at every start of every session; keeping the few jars
that pyspark does not ship in a cache folder halves the start-up and lets a machine without network run.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pyspark

from models.errors import MachineError

JAVA_MIN = 17
KAFKA_VERSION = "4.3.1"
SPARK_KAFKA = "spark-sql-kafka-0-10"


@dataclass(frozen=True, kw_only=True, slots=True)
class Artifact:
    """A Maven module to fetch with what it depends on. `kept`: the beginnings of the names of the jars to keep."""

    organisation: str
    module: str
    version: str
    kept: tuple[str, ...] = ("",)


def require_java() -> str:
    """The java to run. Raises MachineError when there is none or it is too old."""
    home = os.environ.get("JAVA_HOME")
    java = str(Path(home) / "bin" / "java") if home else shutil.which("java")
    if java is None or not Path(java).exists():
        raise MachineError(f"Java {JAVA_MIN} or newer is needed: install a JRE and put java on PATH or set JAVA_HOME")
    said = subprocess.run([java, "-version"], capture_output=True, text=True, check=False).stderr
    found = re.search(r'version "(\d+)', said)
    if not found or int(found[1]) < JAVA_MIN:
        raise MachineError(f"{java} is Java {found[1] if found else '?'}; Java {JAVA_MIN} or newer is needed")
    return java


def delta_jars() -> list[Path]:
    """Delta's jars, fetched on first use (about a minute). Raises MachineError when they cannot be fetched."""
    version = importlib.metadata.version("delta-spark")
    spark = ".".join(pyspark.__version__.split(".")[:2])
    # The rest of what Ivy brings (Hadoop, Parquet, Jackson, ...) is in the pyspark wheel already, in Spark's versions.
    kept = ("delta-", "unitycatalog-")
    delta = Artifact(organisation="io.delta", module=f"delta-spark_{spark}_2.13", version=version, kept=kept)
    return _kept_jars(delta, f"delta-{version}-spark-{pyspark.__version__}")


def kafka_source_jars() -> list[Path]:
    """What Spark needs to read Kafka, as `delta_jars`; only an ingest from Kafka asks for them."""
    kept = ("spark-sql-kafka-", "spark-token-provider-kafka-", "kafka-clients-", "commons-pool2-")
    version = pyspark.__version__
    source = Artifact(organisation="org.apache.spark", module=f"{SPARK_KAFKA}_2.13", version=version, kept=kept)
    return _kept_jars(source, f"{SPARK_KAFKA}-{version}")


def kafka_jars() -> list[Path]:
    """The jars of a Kafka broker, as `delta_jars`."""
    kafka = Artifact(organisation="org.apache.kafka", module="kafka_2.13", version=KAFKA_VERSION)
    return _kept_jars(kafka, f"kafka-{KAFKA_VERSION}")


def cache_folder() -> Path:
    """Where jars are kept between runs: $VQL_JARS, else the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vql" / "jars"
    return Path(os.environ.get("VQL_JARS", default))


def _kept_jars(artifact: Artifact, name: str) -> list[Path]:
    folder = cache_folder() / name
    if not folder.exists():
        _fetch(artifact, folder)
    return sorted(folder.glob("*.jar"))


def _fetch(artifact: Artifact, folder: Path) -> None:
    java = require_java()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        command = [
            *(java, "-cp", str(Path(pyspark.__file__).parent / "jars" / "*"), "org.apache.ivy.Main", "-warn"),
            *("-dependency", artifact.organisation, artifact.module, artifact.version, "-confs", "default"),
            *("-retrieve", f"{scratch}/[artifact]-[revision].[ext]"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        jars = [jar for jar in Path(scratch).glob("*.jar") if jar.name.startswith(artifact.kept)]
        if done.returncode or not any(jar.name.startswith(artifact.module) for jar in jars):
            reason = "\n".join((done.stdout + done.stderr).strip().splitlines()[-3:])
            raise MachineError(f"the jars of {artifact.module} {artifact.version} could not be fetched: {reason}")
        whole = Path(tempfile.mkdtemp(dir=folder.parent))
        for jar in jars:
            shutil.move(jar, whole / jar.name)
        whole.chmod(0o755)
        # Two processes may fetch at once: the first rename wins, and both results are the same.
        try:
            whole.rename(folder)
        except OSError:
            shutil.rmtree(whole)
