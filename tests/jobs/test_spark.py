"""The session: what it says of bad tables and of errors that were raised in other processes."""

from __future__ import annotations

from pathlib import Path

import pytest
from pyspark.errors import PySparkException

from jobs.spark import errors_of_workers, open_spark, read_delta, said_by, table_version
from models.errors import InputError, MachineError, StoreError


@pytest.mark.spark
def test_the_session_is_opened_once(spark) -> None:
    assert open_spark().sparkContext is spark.sparkContext
    assert spark.conf.get("spark.sql.session.timeZone") == "UTC"


def test_without_java_there_is_no_session(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("JAVA_HOME", raising=False)
    with pytest.raises(MachineError, match="put java on PATH"):
        open_spark()


@pytest.mark.spark
def test_a_cell_that_an_expression_cannot_read_is_null(spark) -> None:
    cells = spark.range(1).selectExpr("to_timestamp('soon')", "CAST('x' AS BIGINT)", "array(1)[5]").first()
    assert list(cells) == [None, None, None]


@pytest.mark.spark
def test_a_delta_table_is_read_now_or_as_of_a_version(spark, tmp_path: Path) -> None:
    path = tmp_path / "table"
    for n in range(2):
        spark.range(n + 1).write.format("delta").mode("overwrite").save(str(path))
    assert table_version(spark, path) == 1
    assert read_delta(spark, path).count() == 2
    assert read_delta(spark, path, 0).count() == 1
    with pytest.raises(InputError, match=f"{path} is not a Delta table.* 9"):
        read_delta(spark, path, 9)


@pytest.mark.spark
def test_what_is_no_delta_table_is_refused_with_its_path(spark, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "absent", tmp_path / "empty"):
        with pytest.raises(InputError, match=f"{path} is not a Delta table of this product.*run: vql ingest") as error:
            read_delta(spark, path).count()
        assert "\n" not in str(error.value)


@pytest.mark.spark
def test_an_error_of_this_product_in_a_worker_is_raised_as_what_it_was(spark) -> None:
    def refuse(batches):
        raise StoreError("the store is gone; restore it")
        yield from batches

    with pytest.raises(StoreError, match=r"^the store is gone; restore it$"), errors_of_workers():
        spark.range(3).mapInArrow(refuse, "id long").collect()


@pytest.mark.spark
def test_any_other_error_in_a_worker_stays_what_it_is(spark) -> None:
    def fail(batches):
        yield from (1 / 0 for _ in batches)

    with pytest.raises(PySparkException, match="ZeroDivisionError"), errors_of_workers():
        spark.range(3).mapInArrow(fail, "id long").collect()


@pytest.mark.spark
def test_the_sentence_of_a_spark_error_has_no_stack(spark, tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_text("no parquet")
    said = []
    for query in (lambda: spark.read.parquet(str(tmp_path / "x.parquet")), lambda: spark.sql("SELECT nothing")):
        with pytest.raises(Exception, match=r".") as error:
            query()
        said.append(said_by(error.value))
    assert "x.parquet" in said[0]
    assert "`nothing` cannot be resolved" in said[1]
    assert not any("\n" in sentence for sentence in said)


def test_a_full_disk_under_spark_or_torchrun_is_said_plainly() -> None:
    with pytest.raises(MachineError, match=r"no space left on a disk that Spark .*; free some"), errors_of_workers():
        raise RuntimeError("torchrun failed\nOSError: [Errno 28] No space left on device\nmore")
    with pytest.raises(MachineError, match=r"no space left to write final\.pt; free some"), errors_of_workers():
        raise RuntimeError("tail:\n[rank0]: models.errors.MachineError: no space left to write final.pt; free some\n")
    with pytest.raises(RuntimeError, match="something else"), errors_of_workers():
        raise RuntimeError("something else")
