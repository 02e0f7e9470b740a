"""Charts as SVG that stands in a page: text stays text, and ink takes the page's colour, light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from html import escape
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

COLOURS = ("#3584c7", "#d9822b", "#3a9a5b", "#b4559c")
"""Of the series of a chart, in order; legible on white and on black."""

_INK = "#010203"  # stands for the page's own colour until the SVG is written
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "mmray",
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _INK,
    "grid.alpha": 0.15,
    "legend.frameon": False,
    **{f"{part}.color": _INK for part in ("text", "xtick", "ytick")},
    **{f"axes.{part}color": _INK for part in ("label", "edge")},
}
_LARGEST_MARKED = 20  # points of a line that are few enough to be seen one by one


class Series(NamedTuple):
    """Points of one kind."""

    x: ArrayLike
    y: ArrayLike
    name: str = ""
    kind: Literal["line", "steps"] = "line"
    """`steps` are bars that touch: of x there is one more than of y."""


class Chart(NamedTuple):
    """What is drawn. The title is the page's to write: it may hold any script."""

    title: str
    series: Sequence[Series]
    x_label: str
    y_label: str
    unit_square: bool = False
    """Whether both axes go from 0 to 1."""
    mark: float | None = None
    """Where a vertical line stands."""
    log: bool = False
    """Whether y is drawn by its logarithm."""

    @property
    def words(self) -> str:
        """Say what it shows, for those who do not see it."""
        names = " and ".join(series.name for series in self.series if series.name)
        return f"{self.title}: {self.y_label} by {self.x_label}{', of ' if names else ''}{names}"

    def svg(self) -> str:
        """Draw it, as an SVG element that takes the size of its place."""
        import matplotlib
        from matplotlib.figure import Figure

        with matplotlib.rc_context(_STYLE):
            figure = Figure(figsize=(3.4, 2.4), layout="constrained")
            self._draw(figure.subplots())
            file = io.StringIO()
            metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
            figure.savefig(file, format="svg", transparent=True, metadata=metadata)
        svg = re.sub(r'<g id="[^"]*">', "<g>", file.getvalue())  # many charts share a page
        svg = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", svg, count=1)
        svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
        return svg.replace("<svg", f'<svg role="img" aria-label="{escape(self.words)}"', 1)

    def _draw(self, axes: Any) -> None:
        for series, colour in zip(self.series, COLOURS, strict=False):
            x, y, name = np.asarray(series.x), np.asarray(series.y), series.name or None
            if series.kind == "steps":
                axes.stairs(y, x, fill=True, alpha=0.6, color=colour, label=name)
            else:
                marker = "o" if len(x) <= _LARGEST_MARKED else None
                axes.plot(x, y, color=colour, marker=marker, markersize=3, label=name)
        if self.unit_square:
            axes.set(xlim=(0, 1), ylim=(0, 1.02))
        if self.mark is not None:
            axes.axvline(self.mark, color=_INK, linestyle=":", linewidth=1)
        if self.log:
            axes.set_yscale("symlog", linthresh=1)
        axes.set(xlabel=self.x_label, ylabel=self.y_label)
        if len(self.series) > 1:
            axes.legend()
