"""The Java side's needs: a Java of at least 17, and Delta's jars, resolved once and kept.

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
from pathlib import Path

import pyspark

from models.errors import MachineError

JAVA_MIN = 17
# The rest of what Ivy brings (Hadoop, Parquet, Jackson, ...) is in the pyspark wheel already, in Spark's versions.
NEEDED = ("delta-", "unitycatalog-")


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
    folder = cache_folder() / f"delta-{version}-spark-{pyspark.__version__}"
    if not folder.exists():
        _fetch(version, folder)
    return sorted(folder.glob("*.jar"))


def cache_folder() -> Path:
    """Where jars are kept between runs: $VQL_JARS, else the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vql" / "jars"
    return Path(os.environ.get("VQL_JARS", default))


def _fetch(version: str, folder: Path) -> None:
    java = require_java()
    spark = ".".join(pyspark.__version__.split(".")[:2])
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        command = [
            *(java, "-cp", str(Path(pyspark.__file__).parent / "jars" / "*"), "org.apache.ivy.Main", "-warn"),
            *("-dependency", "io.delta", f"delta-spark_{spark}_2.13", version, "-confs", "default"),
            *("-retrieve", f"{scratch}/[artifact]-[revision].[ext]"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        jars = [jar for jar in Path(scratch).glob("*.jar") if jar.name.startswith(NEEDED)]
        if done.returncode or not any(jar.name.startswith("delta-spark") for jar in jars):
            reason = "\n".join((done.stdout + done.stderr).strip().splitlines()[-3:])
            raise MachineError(f"the jars of delta-spark {version} could not be fetched: {reason}")
        whole = Path(tempfile.mkdtemp(dir=folder.parent))
        for jar in jars:
            shutil.move(jar, whole / jar.name)
        whole.chmod(0o755)
        # Two processes may fetch at once: the first rename wins, and both results are the same.
        try:
            whole.rename(folder)
        except OSError:
            shutil.rmtree(whole)

