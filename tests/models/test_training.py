import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from jobs.evaluate import quality, score_raw
from models import training
from models.counts import CountPlan
from models.errors import InputError
from models.request import collate
from models.rivals import HISTORIES
from models.stopping import auc_within
from models.timelines import impressions_of, timeline_files
from models.training import begin, final_parameters, new_ranker, train, trained_ranker
from tests.small import HOUR_MS
from tests.small_examples import CATEGORIES, SIZES, repeating_user, small_plan, write_small_examples

RUN = """
import sys, msgspec, torch
from models.training import TrainPlan, train
torch.set_num_threads(1)
train(msgspec.json.decode(sys.stdin.buffer.read(), type=TrainPlan))
"""


def losses(plan) -> list[float]:
    return [json.loads(line)["loss"] for line in (Path(plan.work) / "loss.jsonl").read_text().splitlines()]


def stopped_after(last: int):
    """A step that fails from this one on, as a power cut does."""
    real = training.step

    def step(run, share):
        if run.step > last:
            raise KeyboardInterrupt
        return real(run, share)

    return step


def go_on_after(monkeypatch, plan, *lasts: int) -> None:
    """Train to the end, stopped after each of these steps."""
    for last in lasts:
        with monkeypatch.context() as patch:
            patch.setattr(training, "step", stopped_after(last))
            with pytest.raises(KeyboardInterrupt):
                train(plan)
    train(plan)


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


COUNTS = CountPlan(fields=["item_id", "category"], half_life_ms=[24.0 * HOUR_MS, None])


def trained_gauc(plan, examples: Path | None = None) -> float:
    """How well the plan's model ranks these examples, or those that it was trained on."""
    train(plan)
    ranker = new_ranker(plan)
    ranker.load_state_dict({name: torch.from_numpy(a) for name, a in final_parameters(plan).items()})
    impressions = [i for f in timeline_files(examples or Path(plan.examples)) for i in impressions_of(f)]
    return quality(score_raw(ranker.eval(), impressions)).gauc


@pytest.mark.parametrize("model", HISTORIES)
def test_the_loss_falls_and_every_step_is_logged(tmp_path, model):
    plan = small_plan(tmp_path, model)
    train(plan)
    found = losses(plan)
    assert len(found) == 60
    assert np.mean(found[-10:]) < np.mean(found[:10])


def test_products_in_bfloat16_train_the_same_model_nearly(tmp_path):
    plan = small_plan(tmp_path, epochs=12, counts=COUNTS)
    half = small_plan(tmp_path, epochs=12, counts=COUNTS, bfloat16=True, work=str(tmp_path / "half"))
    whole_gauc, half_gauc = trained_gauc(plan), trained_gauc(half)
    whole, halved = final_parameters(plan), final_parameters(half)
    assert not same(whole, halved)
    assert {name: a.dtype for name, a in whole.items()} == {name: a.dtype for name, a in halved.items()}
    assert abs(whole_gauc - half_gauc) < 0.03
    # Of three digits, and those of attention whole: the first losses are the same to two.
    np.testing.assert_allclose(losses(half)[:5], losses(plan)[:5], rtol=0.02)


def test_vql_learns_what_no_history_cannot(tmp_path):
    gauc = {model: trained_gauc(small_plan(tmp_path, model, epochs=12)) for model in ("vql", "no_history")}
    assert gauc["vql"] > gauc["no_history"] + 0.1


def test_counts_alone_learn_what_no_history_cannot(tmp_path):
    without, counted = (
        trained_gauc(small_plan(tmp_path, "no_history", epochs=12, counts=counts, work=str(tmp_path / f"work-{n}")))
        for n, counts in enumerate((None, COUNTS))
    )
    assert counted > without + 0.1


def test_counts_are_standardised_before_the_first_step_and_as_trained_in_the_checkpoint(tmp_path):
    plan = small_plan(tmp_path, counts=COUNTS)
    run = begin(plan)
    impressions = [i for f in timeline_files(Path(plan.examples)) for i in impressions_of(f)]
    count_NX = np.concatenate([c for i in impressions for c in i.counts(run.ranker.counter)])
    # Of the first file only: another sample of the same users' kind.
    np.testing.assert_allclose(run.ranker.count_centre_X, np.log1p(count_NX).mean(axis=0), atol=0.2)
    np.testing.assert_allclose(1 / run.ranker.count_scale_X, np.log1p(count_NX).std(axis=0), rtol=0.3)
    train(plan)
    assert np.array_equal(final_parameters(plan)["count_scale_X"], run.ranker.count_scale_X)


@pytest.mark.parametrize("model", ["vql", "full"])
def test_masses_are_standardised_before_the_first_step_and_as_trained_in_the_checkpoint(tmp_path, model):
    plan = small_plan(tmp_path, model)
    history = begin(plan).ranker.history
    centre_H = (history if model == "vql" else history.attention).mass_centre_H
    # Of 5 to 29 events, by the head that never forgets.
    assert 2 < float(centre_H[-1]) < 3.2
    train(plan)
    found = final_parameters(plan)["history.mass_centre_H" if model == "vql" else "history.attention.mass_centre_H"]
    assert np.array_equal(found, centre_H)


def test_where_a_repeat_decides_counts_tell_it_from_a_likeness(tmp_path):
    write_small_examples(tmp_path / "examples", user=repeating_user)
    others = write_small_examples(tmp_path / "others", user=repeating_user, seed=1)
    gauc = {}
    for name, counts in (("without", None), ("counted", COUNTS)):
        plan = small_plan(tmp_path, epochs=12, counts=counts, work=str(tmp_path / name))
        gauc[name] = trained_gauc(plan, others)
        found = losses(plan)
        assert np.mean(found[-10:]) < np.mean(found[:10])
    assert gauc["counted"] > 0.95
    assert gauc["counted"] > gauc["without"] + 0.05


def test_every_part_of_the_window_over_the_newest_events_is_trained(tmp_path):
    sizes = msgspec.structs.replace(SIZES, newest=3)
    # With seed 0 the unit's last bias is back where it began when the training ends.
    plan = small_plan(tmp_path, sizes=sizes, epochs=2, seed=1)
    begun = begin(plan).ranker.state_dict()
    train(plan)
    trained = final_parameters(plan)
    parts = [name for name in begun if name.startswith("history.window.")]
    assert len(parts) == 8
    for name in parts:
        assert np.abs(trained[name] - begun[name].numpy()).max() > 1e-3, name


def test_the_same_plan_gives_the_same_parameters(tmp_path):
    first, second = small_plan(tmp_path / "a"), small_plan(tmp_path / "b")
    train(first)
    train(second)
    assert same(final_parameters(first), final_parameters(second))


def test_another_seed_gives_others(tmp_path):
    first, second = (
        small_plan(tmp_path, work=str(tmp_path / "1")),
        small_plan(tmp_path, work=str(tmp_path / "2"), seed=1),
    )
    train(first)
    train(second)
    assert not same(final_parameters(first), final_parameters(second))


def test_a_category_as_code_has_the_mean_of_its_keys_also_where_the_training_was_resumed(tmp_path, monkeypatch):
    whole = small_plan(tmp_path, work=str(tmp_path / "whole"), category_field=1)
    parted = msgspec.structs.replace(whole, work=str(tmp_path / "parted"))
    train(whole)
    ranker = trained_ranker(whole)
    feature, history = ranker.encoder.feature_MF, ranker.history
    with torch.no_grad():
        x = ranker.encoder.encode(feature)
        keys, given = history.grouped_keys(ranker.encoder, torch.arange(len(feature)))
    assert torch.equal(history.codes(x, feature)[:, 0], feature[:, 1])
    assert torch.equal(given, feature[:, 1])
    assert len(history.codes(x, feature)[:, 1].unique()) > CATEGORIES
    mean = torch.stack([keys[feature[:, 1] == row, 0].mean(dim=0) for row in range(CATEGORIES + 1)])
    nearest = torch.cdist(history.codebook.codeword_GKF[0, : CATEGORIES + 1], mean).argmin(dim=1)
    assert torch.equal(nearest, torch.arange(CATEGORIES + 1))

    # Once the codebook has started.
    go_on_after(monkeypatch, parted, 44)
    assert same(final_parameters(whole), final_parameters(parted))
    assert losses(whole) == losses(parted)


def test_more_categories_than_codewords_share_them(tmp_path):
    sizes = msgspec.structs.replace(SIZES, codewords=3)
    ranker = new_ranker(small_plan(tmp_path, sizes=sizes, category_field=1))
    feature = ranker.encoder.feature_MF
    with torch.no_grad():
        code = ranker.history.codes(ranker.encoder.encode(feature), feature)
    assert torch.equal(code[:, 0], feature[:, 1] % 3)


@pytest.mark.slow
def test_a_training_killed_twice_ends_with_the_parameters_of_one_that_was_not(tmp_path):
    whole = small_plan(tmp_path, work=str(tmp_path / "whole"), epochs=15)
    killed = small_plan(tmp_path, work=str(tmp_path / "killed"), epochs=15)
    _run(whole)
    for step in (20, 90):
        _run(killed, kill_at_step=step)
    resumed = _run(killed)
    assert "resumed at step" in resumed
    assert same(final_parameters(whole), final_parameters(killed))
    assert losses(whole) == losses(killed)


@pytest.mark.parametrize("model", ["vql", "mean"])
def test_an_impatient_training_ends_with_the_parameters_of_its_best_epoch(tmp_path, model, capsys):
    plan = small_plan(tmp_path, model, epochs=30, patience=1, batch=8)
    train(plan)
    said = re.findall(r"epoch (\d+)/30  held-out gauc (\S+), the best (\S+)", capsys.readouterr().out)
    *_, (last, gauc, best) = said
    assert int(last) < 30
    assert float(gauc) <= float(best) == max(float(seen) for _, seen, _ in said)
    ranker = new_ranker(plan)
    ranker.load_state_dict({name: torch.from_numpy(a) for name, a in final_parameters(plan).items()})
    held_out = impressions_of(timeline_files(Path(plan.examples))[-1])
    length = None if model == "vql" else plan.length
    with torch.no_grad():
        request = collate(held_out, length)
        found = auc_within(ranker.eval()(request)[0], request.label_BC).nanmean()
    assert float(found) == pytest.approx(float(best), abs=1e-3)


def test_an_impatient_training_that_was_resumed_ends_as_one_that_was_not(tmp_path, monkeypatch):
    whole = small_plan(tmp_path, work=str(tmp_path / "whole"), epochs=30, patience=2)
    parted = msgspec.structs.replace(whole, work=str(tmp_path / "parted"))
    train(whole)

    # While keys are exact; after an epoch that was the best, whose state is older; and in one that was none.
    go_on_after(monkeypatch, parted, 32, 67, 72)
    assert same(final_parameters(whole), final_parameters(parted))
    assert losses(whole) == losses(parted)


def test_one_file_of_users_holds_out_none(tmp_path):
    plan = small_plan(tmp_path, patience=1)
    timeline_files(Path(plan.examples))[0].unlink()
    with pytest.raises(InputError, match="one file of users"):
        train(plan)


def test_a_folder_without_examples_is_refused_by_name(tmp_path):
    plan = small_plan(tmp_path)
    for file in timeline_files(Path(plan.examples)):
        file.unlink()
    with pytest.raises(InputError, match="holds no examples"):
        train(plan)


def _run(plan, kill_at_step: int | None = None) -> str:
    """Train in a process of its own; kill -9 it once it has logged a step."""
    process = subprocess.Popen([sys.executable, "-c", RUN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=False)
    assert process.stdin is not None
    process.stdin.write(msgspec.json.encode(plan))
    process.stdin.close()
    log = Path(plan.work) / "loss.jsonl"
    while kill_at_step is not None and process.poll() is None:
        if log.exists() and log.read_bytes().count(b"\n") >= kill_at_step:
            os.kill(process.pid, signal.SIGKILL)
        time.sleep(0.005)
    assert process.stdout is not None
    said = process.stdout.read().decode()
    process.stdout.close()
    assert process.wait() == (0 if kill_at_step is None else -signal.SIGKILL)
    return said
