"""What is asked and answered over HTTP. /openapi.json shows these models, with their limits and examples."""

from __future__ import annotations

from typing import Annotated, Any, Self

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, StrictInt, model_validator

BODY_BYTES_MAX = 1 << 20
USERS_MAX, CANDIDATES_MAX, CANDIDATES_IN_ALL_MAX = 64, 2_000, 10_000
# Times in rows have 48 bits.
NOW_MS_MAX = (1 << 48) - 1
_SHOWN_MAX = 200


def _integral(value: Any) -> Any:
    """In JSON, 2.0 is an integer too."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Id = Annotated[str, Field(min_length=1, max_length=128)]


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid")


class UserCandidates(_Message):
    """A user, and the items to score for that user."""

    user_id: Id
    candidates: Annotated[list[Id], Field(min_length=1, max_length=CANDIDATES_MAX), FailFast()]


class RankRequest(_Message):
    """Users with their candidates; all are answered by one checkpoint."""

    users: Annotated[list[UserCandidates], Field(min_length=1, max_length=USERS_MAX), FailFast()]
    now_ms: Annotated[
        Annotated[StrictInt, Field(ge=0, le=NOW_MS_MAX), BeforeValidator(_integral)] | None,
        Field(description="The time to score as of, Unix ms; the server's clock if absent."),
    ] = None

    @model_validator(mode="after")
    def _not_too_many_in_all(self) -> Self:
        if sum(len(user.candidates) for user in self.users) > CANDIDATES_IN_ALL_MAX:
            raise ValueError(f"a request has at most {CANDIDATES_IN_ALL_MAX:,} candidates in all; send several")
        return self


class RankedUser(_Message):
    """Scores (logits) in the order of the candidates; the higher, the better."""

    user_id: str
    scores: list[float]
    history: Annotated[
        str,
        Field(
            description="fresh; stale_late or stale_regressed: scored from the row that was read last, because the "
            "store did not answer in time, or with an older one; or why the scores know nothing of the user: absent "
            "(no row), damaged, foreign (a row of another checkpoint), late (the store did not answer in time)."
        ),
    ]
    unknown_candidates: Annotated[
        list[int], Field(description="Places of candidates that the checkpoint does not know; their scores are alike.")
    ]


class Timing(_Message):
    """Milliseconds in the server: waiting for a batch; reading the caches, and scoring, of the whole batch."""

    wait_ms: float
    read_ms: float
    score_ms: float
    batch_users: int


class RankAnswer(_Message):
    """The users in the order asked."""

    checkpoint_id: str
    now_ms: int
    users: list[RankedUser]
    timing: Timing


class Problem(_Message):
    """Why there is no answer, in one sentence."""

    error: str


ASKED_EXAMPLES: dict[str, Any] = {
    "one user": {
        "summary": "One user, three candidates, now",
        "value": {"users": [{"user_id": "u1", "candidates": ["i1", "i2", "i3"]}]},
    },
    "two users": {
        "summary": "Two users, as of a given time",
        "value": {
            "users": [
                {"user_id": "u1", "candidates": ["i1", "i2"]},
                {"user_id": "u2", "candidates": ["i3"]},
            ],
            "now_ms": 1_700_000_000_000,
        },
    },
}
ANSWER_EXAMPLE: dict[str, Any] = {
    "checkpoint_id": "0f3c5a8e9d1b47f28c6a7e5d4b3c2a19",
    "now_ms": 1_700_000_000_000,
    "users": [
        {"user_id": "u1", "scores": [0.71, -1.32], "history": "fresh", "unknown_candidates": []},
        {"user_id": "u2", "scores": [-0.48], "history": "absent", "unknown_candidates": [0]},
    ],
    "timing": {"wait_ms": 0.1, "read_ms": 0.9, "score_ms": 2.3, "batch_users": 2},
}


def sentence(error: RequestValidationError) -> str:
    """The first thing that is wrong with a request, and where. ASCII, whatever was sent."""
    first = error.errors()[0]
    place, *inside = first["loc"]
    if first["type"] == "json_invalid":
        text = f"the body is not JSON at character {inside[0]}: {first['ctx']['error']}"
    elif not inside and first["type"] == "model_attributes_type":
        text = "the body is no JSON object; send one, as application/json"
    else:
        where = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in inside).lstrip(".")
        message = first["msg"].removeprefix("Value error, ")
        text = f"{where or place}: {message[:1].lower()}{message[1:]}"
    return text.encode("ascii", "backslashreplace").decode()[:_SHOWN_MAX]
