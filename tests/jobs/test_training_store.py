"""A training to a URL goes on elsewhere where it was killed, and leaves nothing but the checkpoint there."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from jobs.checkpoint_store import Remote, fetch_checkpoint
from jobs.train import run_training
from jobs.training_store import _Copies, _fetch_missing, train_to, work_of
from models.checkpoint import open_checkpoint
from models.errors import InputError
from tests.jobs.processes import kill_when, start
from tests.jobs.test_train import losses
from tests.jobs.tiny import EPOCHS, TRAIN_OPTIONS, Shop, tiny_job

LONG = 4 * EPOCHS


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VQL_CHECKPOINT_CACHE", str(tmp_path / "cache"))


@pytest.mark.spark
@pytest.mark.slow
def test_a_driver_that_was_killed_is_followed_by_one_on_a_machine_that_has_nothing(
    spark, shop: Shop, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bucket, job = tmp_path / "bucket", tiny_job(shop.log, epochs=LONG)
    undisturbed = run_training(spark, job, tmp_path / "undisturbed", tmp_path / "checkpoint")
    url = (bucket / "c").as_uri()
    work = work_of(job, tmp_path / "work", url)
    command = ["train", "--log", shop.log, *TRAIN_OPTIONS, "--epochs", LONG, "--checkpoint", url]
    killed = start([*command, "--work", tmp_path / "work"], tmp_path)
    kill_when(killed, lambda: any(bucket.glob("c.training/vql-*/state.pt")))
    assert not (bucket / "c").exists()
    assert [path.name.split("-")[0] for path in bucket.glob("c.training/*")].count("pinned") == 1
    shutil.rmtree(tmp_path / "work")
    capfd.readouterr()

    made = train_to(spark, job, work, url)

    assert "vql: resumed at step" in capfd.readouterr().out
    assert made.checkpoint_id == undisturbed.checkpoint_id
    assert losses(work) == losses(tmp_path / "undisturbed")
    assert open_checkpoint(fetch_checkpoint(url)).checkpoint_id == made.checkpoint_id
    assert [path.name for path in bucket.iterdir()] == ["c"]


@pytest.mark.spark
def test_what_is_at_the_url_already_is_found_or_refused(spark, shop: Shop, tmp_path: Path) -> None:
    url = (tmp_path / "bucket" / "c").as_uri()
    shutil.copytree(shop.checkpoint, tmp_path / "bucket" / "c")
    job = tiny_job(shop.log)
    made = train_to(spark, job, work_of(job, tmp_path / "work", url), url)
    assert made.checkpoint_id == open_checkpoint(shop.checkpoint).checkpoint_id
    other = tiny_job(shop.log, seed=1)
    with pytest.raises(InputError, match=f"{url} holds checkpoint {made.checkpoint_id} of another training"):
        train_to(spark, other, work_of(other, tmp_path / "work", url), url)


def test_a_state_is_never_there_without_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work, kept = tmp_path / "work", Remote("memory://kept/c.training")
    kept.remove()
    run = work / "vql-1"
    run.mkdir(parents=True)

    def saved(step: int) -> None:
        for name in ("loss.jsonl", "best.pt", "state.pt"):
            (run / f".{name}").write_text(f"{name} {step}")
            (run / f".{name}").replace(run / name)

    saved(1)
    copies, put, puts = _Copies(kept, work), Remote.put, []

    def trained_meanwhile(self, source: Path, name: str) -> None:
        saved(2)
        put(self, source, name)
        puts.append(name)

    with monkeypatch.context() as patch:
        patch.setattr(Remote, "put", trained_meanwhile)
        copies.copy()
    assert puts == ["vql-1/loss.jsonl", "vql-1/best.pt", "vql-1/state.pt"]
    assert {kept.read(name) for name in puts} == {b"loss.jsonl 1", b"best.pt 1", b"state.pt 1"}
    copies.copy()
    assert kept.read("vql-1/state.pt") == b"state.pt 2"
    assert sorted(path.name for path in work.rglob("*")) == ["best.pt", "loss.jsonl", "state.pt", "vql-1"]

    # Nothing new but losses, which belong to no state yet.
    with (run / "loss.jsonl").open("a") as file:
        file.write(" and more")
    copies.copy()
    assert kept.read("vql-1/loss.jsonl") == b"loss.jsonl 2"


def test_a_machine_keeps_its_own_state_and_takes_the_pinned_versions(tmp_path: Path) -> None:
    theirs, work = tmp_path / "theirs", tmp_path / "work"
    for name in ("pinned-1.json", "vql-1/state.pt", "vql-1/best.pt"):
        (theirs / name).parent.mkdir(parents=True, exist_ok=True)
        (theirs / name).write_text("theirs")
    kept = Remote(theirs.as_uri())
    (work / "vql-1").mkdir(parents=True)
    (work / "vql-1" / "state.pt").write_text("own")
    _fetch_missing(kept, kept.names(), work)
    assert (work / "pinned-1.json").read_text() == "theirs"
    assert [path.read_text() for path in (work / "vql-1").iterdir()] == ["own"]
    (work / "pinned-1.json").write_text("own")
    _fetch_missing(kept, kept.names(), work)
    assert (work / "pinned-1.json").read_text() == "own"
    _fetch_missing(kept, kept.names(), tmp_path / "new")
    assert (tmp_path / "new" / "vql-1" / "state.pt").read_text() == "theirs"
