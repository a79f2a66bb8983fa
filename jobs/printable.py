"""What came from anywhere, as text that cannot steer a terminal: everything that is no printable letter is escaped."""

from __future__ import annotations

from datetime import UTC, datetime

from rich.text import Text

TIME_MS_END = 253_402_300_800_000


def printable(data: bytes, limit: int) -> str:
    r"""Bytes as text of printable letters, all else escaped; at most `limit` bytes of them.

    >>> printable(b"a\x1b[2J\xff\xc2\x9b", 100)
    'a\\x1b[2J\\xff\\x9b'
    """
    shown = escaped(data[:limit].decode("utf-8", "backslashreplace"))
    return shown if len(data) <= limit else f"{shown} ... ({len(data) - limit:,} more bytes)"


def escaped(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def plain(text: str) -> Text:
    """Escaped, and no markup of the console's either."""
    return Text(escaped(text))


def time_words(time_ms: int) -> str:
    """A time of Unix ms in UTC; "unknown" where it is none.

    >>> time_words(1_600_000_000_123), time_words(-1)
    ('2020-09-13 12:26:40.123+00:00', 'unknown')
    """
    known = 0 <= time_ms < TIME_MS_END
    return datetime.fromtimestamp(time_ms / 1000, UTC).isoformat(" ", "milliseconds") if known else "unknown"
