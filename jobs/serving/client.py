"""An example client of `vql serve`: one connection, kept open, and made anew where the server closed it.

python -m jobs.serving.client http://127.0.0.1:8000 USER ITEM,ITEM,...
"""

from __future__ import annotations

import http.client
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit


class RankClient:
    """For one thread. Scoring changes nothing, so a request on a connection that was closed meanwhile is sent again."""

    def __init__(self, url: str, timeout_s: float = 1.0) -> None:
        self._connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=timeout_s)

    def rank(self, candidates: Mapping[str, Sequence[str]], now_ms: int | None = None) -> dict[str, Any]:
        """The answer for these users' candidates, as /openapi.json describes it. Raises RuntimeError for a refusal."""
        users = [{"user_id": user_id, "candidates": list(items)} for user_id, items in candidates.items()]
        status, body = self.post(json.dumps({"users": users, "now_ms": now_ms}).encode())
        answer = json.loads(body)
        if status != http.client.OK:
            raise RuntimeError(f"{status}: {answer['error']}")
        return answer

    def post(self, body: bytes) -> tuple[int, bytes]:
        """Status and body of the answer. Raises OSError or HTTPException when there is none."""
        kept_open = self._connection.sock is not None
        try:
            return self._post(body)
        except (http.client.HTTPException, ConnectionError):
            self._connection.close()
            if not kept_open:
                raise
            return self._post(body)

    def close(self) -> None:
        self._connection.close()

    def _post(self, body: bytes) -> tuple[int, bytes]:
        self._connection.request("POST", "/rank", body, {"Content-Type": "application/json"})
        answer = self._connection.getresponse()
        return answer.status, answer.read()


def main() -> None:
    url, user_id, items = sys.argv[1:]
    answer = RankClient(url).rank({user_id: items.split(",")})
    (user,) = answer["users"]
    for item_id, score in sorted(zip(items.split(","), user["scores"], strict=True), key=lambda pair: -pair[1]):
        print(f"{score:+.4f}  {item_id}")
    print(f"history: {user['history']}, checkpoint: {answer['checkpoint_id']}", file=sys.stderr)


if __name__ == "__main__":
    main()
