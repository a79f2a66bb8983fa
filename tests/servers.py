"""What the tests of servers share: what a server answers, and what becomes of a test whose server is not installed."""

from __future__ import annotations

import os
from typing import NoReturn
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest


def get(url: str) -> tuple[int, str]:
    """The status and the body, whatever the status."""
    try:
        with urlopen(url, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except HTTPError as error:
        with error:
            return error.code, error.read().decode()


def missing(reason: str) -> NoReturn:
    """Skip the test, saying why; fail it where VQL_REQUIRE_SERVERS=1 says that every server has to be here."""
    if os.environ.get("VQL_REQUIRE_SERVERS") == "1":
        pytest.fail(reason)
    pytest.skip(reason)
