"""What a running server answers: scores, flags, limits in one sentence, and what its watchers ask."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jobs.rank import rank_user
from jobs.serving.messages import BODY_BYTES_MAX, CANDIDATES_MAX, USERS_MAX
from models.checkpoint import Checkpoint
from tests.jobs.serving.processes import Server
from tests.jobs.serving.shop import CANDIDATES, NOW_MS, bodies, request, user_ids

pytestmark = pytest.mark.slow


def test_scores_are_those_of_the_command_for_one_user(server: Server, serving_folder: Path, checkpoint: Checkpoint):
    for user_id in user_ids()[:3]:
        answer = server.rank({user_id: CANDIDATES}, NOW_MS)
        (user,) = answer["users"]
        ranked = rank_user(user_id, CANDIDATES, serving_folder / "checkpoint", serving_folder / "state", NOW_MS)
        wanted = {item: score for item, score, _ in ranked.candidates}
        assert dict(zip(CANDIDATES, user["scores"], strict=True)) == pytest.approx(wanted, abs=1e-5)
        assert len(set(user["scores"])) == len(CANDIDATES)
        assert (user["user_id"], user["history"]) == (user_id, "fresh")
        assert user["unknown_candidates"] == [CANDIDATES.index("nothing")]
        assert (answer["checkpoint_id"], answer["now_ms"]) == (checkpoint.checkpoint_id, NOW_MS)


def test_users_of_a_request_come_in_its_order_each_with_its_own_scores(server: Server):
    asked = {user_id: CANDIDATES[n : n + 1 + 3 * n] for n, user_id in enumerate([*user_ids(), "nobody"])}
    answer = server.rank(asked, NOW_MS)
    assert [user["user_id"] for user in answer["users"]] == list(asked)
    assert [user["history"] for user in answer["users"]] == ["fresh"] * len(user_ids()) + ["absent"]
    for user, (user_id, items) in zip(answer["users"], asked.items(), strict=True):
        (alone,) = server.rank({user_id: items}, NOW_MS)["users"]
        assert user["scores"] == pytest.approx(alone["scores"], abs=1e-5)


def test_requests_at_the_same_time_share_batches_and_get_their_own_scores(server: Server):
    wanted = [server.post(body)[1]["users"] for body in bodies()]
    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(server.post, bodies() * 10))
    assert {status for status, _ in answers} == {200}
    for n, (_, answer) in enumerate(answers):
        expected = wanted[n % len(wanted)]
        assert answer["users"][0]["user_id"] == expected[0]["user_id"]
        assert answer["users"][0]["scores"] == pytest.approx(expected[0]["scores"], abs=1e-5)
    assert max(answer["timing"]["batch_users"] for _, answer in answers) > 1


def test_an_absent_user_has_the_scores_of_no_history(server: Server):
    answer = server.rank({"nobody": CANDIDATES, "never seen": CANDIDATES}, NOW_MS)
    first, second = answer["users"]
    assert first["history"] == second["history"] == "absent"
    assert first["scores"] == pytest.approx(second["scores"], abs=1e-6)


@pytest.mark.parametrize(
    ("body", "status", "sentence"),
    [
        (b"", 422, "body: field required"),
        (b"{", 422, "the body is not JSON at character 1: Expecting"),
        (b"[]", 422, "the body is no JSON object; send one"),
        (b'{"users": []}', 422, "users: list should have at least 1 item after validation, not 0"),
        (b'{"users": [{"user_id": "u", "candidates": []}]}', 422, "users[0].candidates: list should have at least"),
        (
            b'{"users": [{"user_id": "u", "candidates": ["i"]}], "now_ms": "5"}',
            422,
            "now_ms: input should be a valid int",
        ),
        (b'{"users": [{"user_id": "u", "candidates": ["i"]}], "now": 5}', 422, "now: extra inputs are not permitted"),
        (request({"u": ["i"] * (CANDIDATES_MAX + 1)}), 422, "users[0].candidates: list should have at most 2000 items"),
        (request({f"u{n}": ["i"] for n in range(USERS_MAX + 1)}), 422, "users: list should have at most 64 items"),
        (request({f"u{n}": ["i"] * 2000 for n in range(6)}), 422, "a request has at most 10,000 candidates in all"),
        (b" " * (BODY_BYTES_MAX + 1), 413, "the body has more than 1,048,576 bytes"),
        (b"[" * 100_000, 400, "the body cannot be parsed as JSON"),
    ],
    ids=lambda value: None if isinstance(value, bytes) else str(value)[:20],
)
def test_a_wrong_request_is_told_so_in_one_sentence(server: Server, body: bytes, status: int, sentence: str):
    code, answer = server.post(body)
    assert (code, answer.keys()) == (status, {"error"})
    assert sentence in answer["error"]
    assert "\n" not in answer["error"]


def test_other_paths_and_methods_are_refused_in_one_sentence(server: Server):
    assert server.get("/nothing") == (404, '{"error":"there is POST /rank; see /openapi.json"}')
    assert server.get("/rank")[0] == 405


def test_the_schema_teaches_and_its_examples_are_answered(server: Server):
    schema = json.loads(server.get("/openapi.json")[1])
    operation = schema["paths"]["/rank"]["post"]
    examples = operation["requestBody"]["content"]["application/json"]["examples"]
    for example in examples.values():
        assert server.post(json.dumps(example["value"]).encode())[0] == 200
    assert {"200", "413", "422", "503"} <= operation["responses"].keys()
    candidates = schema["components"]["schemas"]["UserCandidates"]["properties"]["candidates"]
    assert candidates["maxItems"] == CANDIDATES_MAX


def test_watchers_learn_what_it_does(server: Server, checkpoint: Checkpoint):
    server.rank({"u0": CANDIDATES, "nobody": ["i1"]}, NOW_MS)
    for path in ("/healthz", "/readyz"):
        status, said = server.get(path)
        assert (status, json.loads(said)["checkpoint_id"]) == (200, checkpoint.checkpoint_id)
    metrics = server.get("/metrics")[1]
    assert f'vql_rank_checkpoint_info{{checkpoint_id="{checkpoint.checkpoint_id}"}} 1.0' in metrics
    for series in (
        'vql_rank_requests_total{status="200"}',
        'vql_rank_users_total{history="fresh"}',
        'vql_rank_users_total{history="absent"}',
        'vql_rank_candidates_total{known="no"}',
        'vql_rank_seconds_count{stage="read"}',
        "vql_rank_batch_users_count",
    ):
        (line,) = [line for line in metrics.splitlines() if line.startswith(series)]
        assert float(line.split()[-1]) > 0
