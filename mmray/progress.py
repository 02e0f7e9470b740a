"""One line that tells how a job goes: live in a terminal, a plain line now and then in a log."""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

LOG_INTERVAL_S = 30.0
BEAT_S = 1.0
"""Between two looks at the clock while nothing comes: a job that waits says so, too."""


class Progress:
    """Progress towards a known total.

    Usage::

        with Progress("label", 10_000, "rows") as progress:
            progress.update(640, failed=2)
    """

    def __init__(self, title: str, total: int | None, unit: str, console: Console | None = None) -> None:
        """Say what is counted, and up to where; None until `total` is set."""
        self.title, self.total, self.unit = title, total, unit
        self.console = console or Console(stderr=True)
        self.done = 0
        self._facts: dict[str, object] = {}
        self._started = self._logged = time.monotonic()
        self._told = 0
        self._first: int | None = None
        self._bar: Bar | None = None
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._follower = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Self:
        """Show the line."""
        if self.console.is_terminal:
            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[words]}"),
                console=self.console,
            )
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=self.total, words="")
        self._follower.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the last state on the screen."""
        self._ended.set()
        self._follower.join()
        if self._bar:
            self._bar.stop()
        elif self.done != self._told:
            self._log()

    def update(self, done: int, **facts: object) -> None:
        """Say how far the job is, and further facts worth reading."""
        with self._lock:
            if self._first is None:
                self._first, self._started = done, time.monotonic()
            self.done, self._facts = done, facts
            self._tell()

    def print(self, text: str) -> None:
        """Print a line above the bar."""
        (self._bar.console if self._bar else self.console).print(text, highlight=False, soft_wrap=True)

    def _follow(self) -> None:
        while not self._ended.wait(BEAT_S):
            with self._lock:
                self._tell()

    def _tell(self) -> None:
        if self._bar:
            self._bar.update(self._task, completed=self.done, total=self.total, words=self._words())
        elif time.monotonic() - self._logged >= LOG_INTERVAL_S:
            self._log()

    def _words(self) -> str:
        """Say what is known beside the numbers: the facts, how fast it goes, and when it will be done."""
        words = [f"{name} {value}" for name, value in self._facts.items()]
        rate = (self.done - (self._first or 0)) / max(time.monotonic() - self._started, 1e-3)
        if rate and self.total is not None:
            left = timedelta(seconds=round((self.total - self.done) / rate))
            words += [f"{rate:,.{0 if rate >= 10 else 1}f} {self.unit}/s", f"{left} left"]
        return ", ".join(words)

    def _log(self) -> None:
        self._logged, self._told = time.monotonic(), self.done
        count = "starting" if self.total is None else f"{self.done:,} of {self.total:,} {self.unit}"
        self.print(", ".join(filter(None, [f"{self.title}: {count}", self._words()])))
