"""A page: one HTML file that needs nothing else, with words, tables, charts, and rows to look at."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import NamedTuple

from mmray.charts import Chart


class Cell(NamedTuple):
    """A cell of a table that also shows its share, as a bar or a shade."""

    text: str
    share: float
    """0 to 1."""


@dataclass(frozen=True)
class Table:
    """Rows of text; the first column names them."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    shaded: bool = False
    """Whether shares are shades of the cells: a matrix. Else they are bars."""


class Score(NamedTuple):
    """What the model says of one label of one row."""

    label: str
    score: float | None
    """None where the output did not keep it."""
    decided: bool


@dataclass(frozen=True)
class Card:
    """One labeled row, to be looked at."""

    kind: str
    """Why it is shown."""
    where: str
    """File and row."""
    caption: str
    status: str
    error: str
    scores: Sequence[Score]
    labels: Sequence[int]
    """Decided, by their place in the vocabulary."""
    thumbnail: bytes | None = None
    """JPEG."""
    remark: str = ""

    @property
    def source(self) -> str:
        """Give the thumbnail as the page takes it."""
        return "data:image/jpeg;base64," + base64.b64encode(self.thumbnail or b"").decode()


@dataclass(frozen=True)
class Section:
    """A part of a page."""

    title: str
    words: str = ""
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()
    cards: Sequence[Card] = ()


@dataclass(frozen=True)
class Page:
    """All of it."""

    title: str
    facts: Sequence[tuple[str, str]]
    """What a reader sees first: name and value."""
    sections: Sequence[Section]
    labels: Sequence[str] = ()
    """The vocabulary, by which cards are filtered."""
    made_by: str = field(default="mmray")

    def html(self) -> str:
        """Write the page; whatever a row holds is text in it."""
        from jinja2 import Environment, StrictUndefined

        template = files("mmray").joinpath("page.html").read_text(encoding="utf-8")
        environment = Environment(
            autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
        )
        return environment.from_string(template).render(page=self)
