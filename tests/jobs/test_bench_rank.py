"""`vql bench rank` on its own Redis: that it runs, checks what it measures, and gives every figure."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs.bench_load import random_history
from jobs.bench_rank_sides import ExactHistory, as_request, bench_shape, rival, scoring_checkpoint
from jobs.scoring import Asked
from models.attention import history_bias, read_history
from models.checkpoint import Sizes
from models.load import load_ranker
from tests.servers import missing


@pytest.mark.slow
def test_a_small_run_gives_every_figure(vql, tmp_path: Path) -> None:
    if shutil.which("redis-server") is None:
        missing("redis-server is not on the PATH")
    output = tmp_path / "rank.json"
    said = vql("bench", "rank", "--output", output, "--quick")
    assert said.code == 0, said.err
    figures = json.loads(output.read_text())
    assert figures["latency"].keys() == figures["flatness"].keys() == {"100", "500"}
    for sides in figures["latency"].values():
        assert sides.keys() == {"vql", "full_attention", "din_50"}
        for by_length in sides.values():
            for latency in by_length.values():
                assert 0 < latency["p50_ms"] <= latency["p99_ms"]
                assert latency["requests"] >= 2
    assert figures["row_bytes"]["1000"] > 0
    assert {"torch", "redis-server"} <= figures["versions"].keys()
    assert "full_attention, 500 candidates" in said.out


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
    assert found.numpy() == pytest.approx(wanted.numpy(), abs=1e-5)
    assert rival(ranker, vql, shape).head is ranker.head
