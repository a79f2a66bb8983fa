"""Pages with plots, as one self-contained file: how figures and templates become HTML."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from models.files import replace_file


def new_figure() -> tuple[Figure, Axes]:
    """A figure of the width of a page, and its axes."""
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    return figure, figure.subplots()


def bars(values: Mapping[str, float], unit: str) -> Figure:
    """A bar for each name."""
    figure, axes = new_figure()
    axes.barh(list(values), list(values.values()))
    axes.invert_yaxis()
    axes.set(xlabel=unit)
    return figure


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def data_uri(figure: Figure) -> str:
    """The figure as a PNG within the page."""
    return "data:image/png;base64," + base64.b64encode(png(figure)).decode()


def write_page(path: Path, template: str, figures: Mapping[str, Figure], **values: object) -> None:
    """Render a template of jobs/ with `plots`, (caption, URI) of each figure, and these values; whole or not at all."""
    environment = Environment(loader=PackageLoader("jobs", "."), autoescape=True, undefined=StrictUndefined)
    plots = [(caption, data_uri(figure)) for caption, figure in figures.items()]
    replace_file(path, environment.get_template(template).render(plots=plots, **values).encode())
