"""One line that tells how a job goes: live in a terminal, a plain line now and then in a log."""

from __future__ import annotations

import time
from datetime import timedelta
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

LOG_INTERVAL_S = 30.0


class Progress:
    """Progress towards a known total.

    Usage::

        with Progress("label", 10_000, "rows") as progress:
            progress.update(640, failed=2)
    """

    def __init__(self, title: str, total: int, unit: str, console: Console | None = None) -> None:
        """Say what is counted, and up to where."""
        self.title, self.total, self.unit = title, total, unit
        self.console = console or Console(stderr=True)
        self.done, self.facts, self._left = 0, "", ""
        self._started = self._logged = time.monotonic()
        self._told = 0
        self._first: int | None = None
        self._bar: Bar | None = None

    def __enter__(self) -> Self:
        """Show the line."""
        if self.console.is_terminal:
            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[facts]}"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=self.total, facts="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the last state on the screen."""
        if self._bar:
            self._bar.stop()
        elif self.done != self._told:
            self._log()

    def update(self, done: int, **facts: object) -> None:
        """Say how far the job is, and further facts worth reading."""
        if self._first is None:
            self._first, self._started = done, time.monotonic()
        self.done = done
        rate = (done - self._first) / max(time.monotonic() - self._started, 1e-3)
        told = [f"{name} {value}" for name, value in facts.items()]
        self.facts = ", ".join([*told, f"{rate:,.{0 if rate >= 10 else 1}f} {self.unit}/s"] if rate else told)
        left = timedelta(seconds=round((self.total - done) / rate)) if rate else None
        self._left = f", {left} left" if left else ""
        if self._bar:
            self._bar.update(self._task, completed=done, total=self.total, facts=self.facts)
        elif time.monotonic() - self._logged >= LOG_INTERVAL_S:
            self._log()

    def print(self, text: str) -> None:
        """Print a line above the bar."""
        (self._bar.console if self._bar else self.console).print(text, highlight=False, soft_wrap=True)

    def _log(self) -> None:
        self._logged, self._told = time.monotonic(), self.done
        self.print(f"{self.title}: {self.done:,} of {self.total:,} {self.unit}, {self.facts}{self._left}")
