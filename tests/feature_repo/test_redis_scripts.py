"""The scripts' own assumptions: stamps compare as text, and all keys of a call have one slot of a cluster."""

from __future__ import annotations

import itertools
import time

import pytest

from feature_repo.redis_scripts import ORDERED_DIGITS, SCRIPTS
from feature_repo.redis_settings import RedisSettings
from feature_repo.redis_store import RedisRows, packed_stamp
from feature_repo.store import Backfill
from jobs.local_servers import free_port
from tests.feature_repo.subjects import A, B, bytes_of, get, partial, stamp, whole
from tests.redis_server import MEMORY_ONLY, running_redis

EDGES = (0, 1, 9, 10, 2**32 - 1)
OFFSETS = (-1, 0, 9, 10, 2**48 - 1, 2**63 - 2)


def test_packed_stamps_are_ordered_as_stamps_are():
    stamps = [stamp(o, epoch=e, revision=r) for e, o, r in itertools.product(EDGES, OFFSETS, EDGES)]
    assert sorted(stamps, key=packed_stamp) == sorted(stamps, key=lambda s: s.order)
    assert len({packed_stamp(s) for s in stamps}) == len(stamps)
    assert {len(packed_stamp(s)) for s in stamps} == {ORDERED_DIGITS + 10}
    assert all(packed_stamp(s).isdigit() for s in stamps)


def test_the_partition_is_no_part_of_the_order_and_tells_stamps_apart():
    one, other = packed_stamp(stamp(3)), packed_stamp(stamp(3, partition=1))
    assert one != other
    assert one[:ORDERED_DIGITS] == other[:ORDERED_DIGITS]


def test_the_server_knows_each_script_by_the_name_that_is_computed_here(redis_server):
    with redis_server.client() as client:
        assert [client.script_load(script.text) for script in SCRIPTS] == [script.sha for script in SCRIPTS]


@pytest.mark.parametrize("user", ["u", "{}", "}{0}", "{meta}"])
def test_no_command_touches_two_slots_of_a_cluster(tmp_path, user):
    options = (*MEMORY_ONLY, "--cluster-enabled", "yes", "--cluster-port", str(free_port()))
    with running_redis(tmp_path, options) as server:
        with server.client() as client:
            client.execute_command("CLUSTER ADDSLOTS", *range(16384))
            while client.execute_command("CLUSTER INFO")["cluster_state"] != "ok":
                time.sleep(0.05)
        rows = RedisRows(RedisSettings(url=server.url, ttl_s=60))
        for checkpoint_id in (A, B):
            puts = [whole(user, stamp(1)), *(whole(f"u{n}", stamp(1)) for n in range(500))]
            assert all(rows.put_rows(checkpoint_id, puts))
        assert rows.put_rows(A, [partial(user, stamp(2), follows=stamp(1))]) == [True]
        assert get(rows, user, B) == bytes_of(whole(user, stamp(1)))
        rows.commit_positions(A, 0, {0: 2})
        rows.record_backfill(A, Backfill(epoch=0, cut={}, users=0, events=0, log="l"))
        assert (rows.positions(A), rows.backfill(A).log) == ({0: (0, 2)}, "l")
        assert (rows.delete_user(user), rows.count_rows(A), rows.delete_checkpoint(A)) == (2, 500, 500)
        rows.remove()
        rows.close()
