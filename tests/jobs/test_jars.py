"""What is missing on the Java side is said in one line, and Delta's jars are fetched once, whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.jars import cache_folder, delta_jars, kafka_source_jars, require_java
from models.errors import MachineError

# In Ivy's place: it puts jars where -retrieve says.
IVY = """
for argument; do case "$argument" in *'[artifact]'*) folder=$(dirname "$argument");; esac; done
jars="delta-spark_4.2_2.13-4.4.0 delta-storage-4.4.0 hadoop-client-3.4"
case "$*" in *spark-sql-kafka*) jars="spark-sql-kafka-0-10_2.13-4.2.0 kafka-clients-3.9.2 scala-library-2.13.18";; esac
for name in $jars; do echo jar > "$folder/$name.jar"; done
echo fetched >> "$CALLS"
"""


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder; the file that a fetch writes a line to."""
    monkeypatch.setenv("VQL_JARS", str(tmp_path / "jars"))
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    return tmp_path / "calls"


def fake_java(home: Path, version: str, otherwise: str = "exit 1") -> Path:
    java = home / "bin" / "java"
    java.parent.mkdir(parents=True)
    java.write_text(f'#!/bin/sh\nif [ "$1" = -version ]; then echo \'openjdk version "{version}"\' >&2; exit 0; fi\n')
    with java.open("a") as script:
        script.write(otherwise)
    java.chmod(0o755)
    return java


@pytest.mark.parametrize("home", [None, "/no/java/here"])
def test_a_machine_without_java_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch, home: str | None) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("JAVA_HOME", raising=False)
    if home:
        monkeypatch.setenv("JAVA_HOME", home)
    with pytest.raises(MachineError, match="Java 17 or newer is needed: install a JRE") as error:
        require_java()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("version", "said"), [("11.0.2", "11"), ("1.8.0_402", "1"), ("", r"\?")])
def test_a_java_that_is_too_old_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, said: str
) -> None:
    java = fake_java(tmp_path, version)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(MachineError, match=f"{java} is Java {said}; Java 17 or newer is needed"):
        require_java()


def test_java_is_found_by_home_before_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_home, by_path = fake_java(tmp_path / "home", "21.0.1"), fake_java(tmp_path / "path", "17")
    monkeypatch.setenv("PATH", str(by_path.parent), prepend=":")
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "home"))
    assert require_java() == str(by_home)
    monkeypatch.delenv("JAVA_HOME")
    assert require_java() == str(by_path)


def test_jars_are_fetched_once_and_only_those_that_pyspark_lacks(
    tmp_path: Path, calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_java(tmp_path, "17", IVY)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    jars = delta_jars()
    assert [jar.name for jar in jars] == ["delta-spark_4.2_2.13-4.4.0.jar", "delta-storage-4.4.0.jar"]
    assert delta_jars() == jars
    assert calls.read_text() == "fetched\n"
    assert [path.name for path in cache_folder().iterdir()] == [jars[0].parent.name]


def test_the_jars_of_the_kafka_reader_are_fetched_apart(
    tmp_path: Path, calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_java(tmp_path, "17", IVY)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    delta_jars()
    assert calls.read_text() == "fetched\n"
    jars = kafka_source_jars()
    assert [jar.name for jar in jars] == ["kafka-clients-3.9.2.jar", "spark-sql-kafka-0-10_2.13-4.2.0.jar"]
    assert kafka_source_jars() == jars
    assert calls.read_text() == "fetched\nfetched\n"


def test_a_fetch_that_fails_leaves_nothing_and_says_why(
    tmp_path: Path, calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_java(tmp_path, "17", "echo 'unresolved dependency: no network' >&2; exit 1")
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(MachineError, match="could not be fetched: unresolved dependency: no network"):
        delta_jars()
    assert list(cache_folder().iterdir()) == []


def test_jars_are_kept_in_the_users_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VQL_JARS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "vql" / "jars"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "vql" / "jars"
