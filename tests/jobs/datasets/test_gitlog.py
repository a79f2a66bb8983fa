"""gitlog as a data set is what the fault tests put on their topic, and the protocols hold on its million events."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable

from jobs.baskets import Events, ExamplePlan
from jobs.datasets import DATASETS
from jobs.datasets.gitlog import EVENTS_FILE, ITEMS_FILE
from jobs.popularity import count_popularity
from jobs.protocols import draw, seen_before, to_impressions
from jobs.sampling import Items
from tests.faults.gitlog import read_gitlog
from tests.jobs.datasets.published import items, prepared
from tests.shared_data import shared_file


@pytest.mark.spark
def test_its_events_are_those_of_the_fault_tests(spark, tmp_path: Path) -> None:
    folder = shared_file(EVENTS_FILE).parent
    done = prepared(spark, "gitlog", folder, tmp_path / "log", where="user_id % 500 = 3")
    assert done.items == pq.ParquetFile(folder / ITEMS_FILE).metadata.num_rows
    assert done.events.appended > 500
    whole = read_gitlog(pq.ParquetFile(folder / EVENTS_FILE).metadata.num_rows)
    mine = whole.user_N % 500 == 3
    wanted = {
        event_id: (f"u{user}", f"i{item}", action, time_ms, weight)
        for event_id, user, item, action, time_ms, weight in zip(
            pa.array(whole.event_ids()).filter(pa.array(mine)).to_pylist(),
            *(
                getattr(whole, name)[mine].tolist()
                for name in ("user_N", "item_N", "action_N", "time_ms_N", "weight_N")
            ),
            strict=True,
        )
    }
    log = DeltaTable(tmp_path / "log" / "events").to_pyarrow_table()
    names = ("user_id", "item_id", "action", "event_time_ms", "weight")
    found = dict(zip(log["event_id"].to_pylist(), zip(*(log[n].to_pylist() for n in names), strict=True), strict=True))
    assert found.keys() == wanted.keys()
    assert all(found[event][:4] == wanted[event][:4] for event in wanted)
    assert max(abs(found[event][4] - wanted[event][4]) for event in wanted) < 1e-6
    described = items(tmp_path / "log")
    assert set(described["i0"]) == {*DATASETS["gitlog"].fields, "tags"}
    assert described["i1"]["category"] == "HypothesisWorks+hypothesis:hypothesis/docs"
    assert described["i1"]["tags"] == "hypothesis|docs"


def test_the_fair_protocol_is_fair_on_a_million_commits_within_their_repositories() -> None:
    events, known = whole_log()
    plan = ExamplePlan(protocol="fair", within="repo", per_user=4)
    drawn = draw(events, known, plan, [])
    assert len(drawn.user_I) > 10_000
    assert drawn.label_C.mean() == pytest.approx(1 / 5)
    repository_C = known.group_M[drawn.candidate_C]
    whole = np.flatnonzero(np.diff(drawn.bound_I))
    first_I = repository_C[drawn.bound_I[whole]]
    same = repository_C == np.repeat(first_I, np.diff(drawn.bound_I))
    # Only a basket of two repositories has candidates of two.
    assert same.mean() > 0.999
    some = to_impressions(events, drawn)[::10]
    label_C, seen_C = np.concatenate([i.label_C for i in some]), np.concatenate([seen_before(i) for i in some])
    assert seen_C[label_C == 1].mean() == seen_C[label_C == 0].mean()
    assert 0.2 < seen_C.mean() < 0.8
    assert all((i.time_ms_L < i.now_ms).all() for i in some)


def whole_log() -> tuple[Events, Items]:
    """Every event, in the file's own numbers; items from 1 on."""
    table = pq.read_table(
        shared_file(EVENTS_FILE), columns=["user_id", "item_id", "ts", "action", "commit_files", "repo"]
    )
    table = table.sort_by([("user_id", "ascending"), ("ts", "ascending")])
    user, item, time_ms, action, files, repo = (table[name].to_numpy() for name in table.column_names)
    item = item.astype(np.int64) + 1
    group_M = np.zeros(int(item.max()) + 1, np.int64)
    group_M[item] = repo
    period_ms = ExamplePlan().period_ms
    counts = (
        pa.table({"period": time_ms // period_ms, "item": item})
        .group_by(["period", "item"])
        .aggregate([([], "count_all")])
    )
    popularity = count_popularity(*(counts[c].to_numpy() for c in ("period", "item", "count_all")), group_M, period_ms)
    events = Events(
        user_ids=[f"u{n}" for n in range(int(pc.max(table["user_id"]).as_py()) + 1)],
        user_N=user.astype(np.int64),
        item_N=item,
        action_N=action.astype(np.int64),
        time_ms_N=time_ms,
        weight_N=(1.0 / files).astype(np.float32),
    )
    return events, Items(popularity=popularity, group_M=group_M)
