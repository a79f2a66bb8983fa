"""`vql bench rank` on its own Redis: that it runs, checks what it measures, and gives every figure."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from feature_repo.handle import StoreHandle
from feature_repo.opened import Opened
from feature_repo.reader import Reader
from jobs.bench_load import random_history
from jobs.bench_rank import crossover_length
from jobs.bench_rank_sides import (
    ExactHistory,
    Strings,
    as_request,
    bench_shape,
    rival,
    scoring_checkpoint,
    shipped_shape,
)
from jobs.bench_rank_timing import from_clients, one_at_a_time, sent_bytes
from jobs.bench_rank_users import SIDES, ask, fill_users, make_sides, require_equal, user_id
from jobs.local_servers import running_redis
from jobs.scoring import Asked, load_scorer
from models.attention import history_bias, read_history
from models.checkpoint import Sizes
from models.errors import VqlError
from models.load import load_ranker
from tests.servers import missing

LENGTH = 300


@pytest.fixture(scope="module")
def redis(tmp_path_factory):
    if shutil.which("redis-server") is None:
        missing("redis-server is not on the PATH")
    with running_redis(tmp_path_factory.mktemp("redis")) as server, server.client() as client:
        yield client


@pytest.fixture(scope="module")
def made(redis, tmp_path_factory):
    """All sides, with two users of LENGTH events."""
    folder, shapes = tmp_path_factory.mktemp("rank"), [of(Sizes(codewords=16)) for of in (bench_shape, shipped_shape)]
    opened = [Opened(scoring_checkpoint(folder / str(n), shape)) for n, shape in enumerate(shapes)]
    readers = [Reader(StoreHandle(state=folder).open(), each) for each in opened]
    scorers = [load_scorer(r.checkpoint, r.fold, r) for r in readers]
    sides = make_sides(*scorers, redis, shapes[0])
    fill_users([LENGTH], 2, sides)
    yield sides
    for reader in readers:
        reader.close()


def asked(users: int = 2, candidates: int = 20) -> list[Asked]:
    return [ask(np.random.default_rng(user), user_id(LENGTH, user), candidates) for user in range(users)]


@pytest.mark.slow
def test_a_small_run_gives_every_figure(vql, tmp_path: Path) -> None:
    if shutil.which("redis-server") is None:
        missing("redis-server is not on the PATH")
    output = tmp_path / "rank.json"
    said = vql("bench", "rank", "--output", output, "--quick")
    assert said.code == 0, said.err
    figures = json.loads(output.read_text())
    assert set(SIDES) == {"vql", "vql_shipped", "full", "sdim", "topk", "din_50"}
    for by_side in (figures, figures["few_candidates"]):
        for name in SIDES:
            assert by_side[name].keys() == {"100", "1000"}
            for latency in by_side[name].values():
                assert 0 < latency["p50_ms"] <= latency["p99_ms"]
                assert latency["requests"] >= 2
    assert figures["vql"]["1000"]["bytes"] == pytest.approx(figures["row_bytes"]["1000"], rel=0.05)
    assert figures["full"]["1000"]["bytes"] == pytest.approx(24_000, rel=0.05)
    assert figures["sdim"]["1000"]["bytes"] == pytest.approx(8_192, rel=0.05)
    assert figures["crossover_p50_ms"]["full"].keys() == {"30", "100", "300", "1000"}
    assert figures["crossover_length"] is None or 30 <= figures["crossover_length"] <= 1000
    assert figures["flatness"].keys() == figures["concurrent"].keys() == set(SIDES)
    for by_count in figures["concurrent"].values():
        assert by_count.keys() == {"1", "4"}
        assert all(0 < load["p50_ms"] <= load["p99_ms"] for load in by_count.values())
    assert {"torch", "redis-server"} <= figures["versions"].keys()
    assert "full, 500 candidates" in said.out
    assert "full costs less than vql" in said.out


def test_every_side_scores_as_its_raw_form(made) -> None:
    require_equal(made, asked())


@pytest.mark.parametrize("name", SIDES)
def test_a_side_that_reads_another_user_is_found_out(made, name) -> None:
    class Mistaken:
        def score(self, asked):
            return made.sides[name].score(asked[::-1])

    one, other = asked()
    mistaken = replace(made, sides={name: Mistaken()})
    with pytest.raises(VqlError, match=f"{name} scores otherwise than from raw events"):
        require_equal(mistaken, [one, replace(other, item_ids=one.item_ids)])


def test_vql_as_shipped_has_a_window_and_counts_and_vql_beside_rivals_has_neither(made) -> None:
    rankers = {name: made.sides[name].ranker for name in ("vql", "vql_shipped")}
    assert {name: (r.history.window is not None, r.counter is not None) for name, r in rankers.items()} == {
        "vql": (False, False),
        "vql_shipped": (True, True),
    }


def test_latencies_are_of_every_side_and_length(made, redis) -> None:
    chosen = {name: made.sides[name] for name in ("full", "sdim")}
    found = one_at_a_time(chosen, [LENGTH], lambda rng, n: ask(rng, user_id(n, 0), 3), redis, 0.02, 2)
    assert found.keys() == chosen.keys()
    for by_length in found.values():
        assert by_length[str(LENGTH)].p50_ms > 0
    assert found["full"][str(LENGTH)].bytes == pytest.approx(24 * LENGTH, rel=0.05)


def test_bytes_are_those_that_the_server_sent(redis) -> None:
    strings = Strings(client=redis, kind="test")
    strings.put("u", b"x" * 10_000)
    # Of a string, the protocol adds its length and two line ends.
    assert sent_bytes(redis, lambda: strings.whole(["u"])) == pytest.approx(10_000, abs=40)
    assert sent_bytes(redis, lambda: strings.ends(["u"], 50)) == pytest.approx(50, abs=40)
    assert strings.ends(["u", "u"], 3) == [b"xxx"] * 2


@pytest.mark.parametrize("clients", [1, 4])
def test_so_many_clients_ask_at_once_and_share_batches(made, clients) -> None:
    batches = []

    class Watched:
        def score(self, asked):
            batches.append(len(asked))
            return made.sides["topk"].score(asked)

    found = from_clients({"topk": Watched()}, [clients], lambda rng: asked(1, 500)[0], 0.1)["topk"][str(clients)]
    assert found.requests == sum(batches) >= 2 * clients
    assert clients // 2 < max(batches) <= clients


@pytest.mark.parametrize(
    ("raw_ms", "wanted"),
    [
        ([1.0, 2.0, 8.0], 100.0),
        ([1.0, 1.0, 4.0], 10 * 10**1.5),
        ([2.0, 1.0, 4.0], 10 * 10**1.5),
        ([3.0, 4.0, 5.0], None),
        ([1.0, 1.0, 1.0], None),
    ],
)
def test_the_crossover_is_between_the_last_length_that_is_cheaper_and_the_next(raw_ms, wanted) -> None:
    assert crossover_length([10, 100, 1000], raw_ms, [2.0, 2.0, 2.0]) == pytest.approx(wanted)


def test_the_fused_rival_is_plain_attention_over_exact_keys(tmp_path: Path) -> None:
    shape = bench_shape(Sizes(codewords=16))
    checkpoint = scoring_checkpoint(tmp_path / "checkpoint", shape)
    table = checkpoint.fold().table
    ranker = load_ranker(checkpoint, table.feature_MF)
    vql = ranker.history
    events = random_history(np.random.default_rng(0), 200, 1_700_000_000_000)
    request = as_request(Asked(user_id="", item_ids=["item-1", "item-2"], now_ms=1_700_000_000_001), events, table)
    with torch.inference_mode():
        x_Md = ranker.encoder(torch.arange(len(table)))
        x_BCd, history = x_Md[request.candidate_BC], request.history
        found, _ = ExactHistory(vql, x_Md)(x_BCd, ranker.encoder, request)
        item_BL = history.item_BL
        wanted = read_history(
            vql.queries(x_BCd),
            vql.keys(x_Md)[item_BL],
            vql.values(x_Md)[item_BL] + vql.action_value_AHD[history.action_BL],
            history_bias(vql.kernel(), history.time_ms_BL, history.weight_BL, request.now_ms_B),
        ).flatten(2)
    assert found[..., : wanted.shape[-1]].numpy() == pytest.approx(wanted.numpy(), abs=1e-5)
    assert rival(ranker, vql, shape).head is ranker.head
