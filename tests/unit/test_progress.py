"""The line that tells how a job goes, as a log has it."""

import io
import time

import pytest
from rich.console import Console

from mmray import progress as module
from mmray.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """Give a clock that a test sets."""
    time = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: time[0])
    return time


def test_a_log_has_a_line_every_half_minute_with_rate_and_rest(clock):
    text = io.StringIO()
    with Progress("label", 10_000, "rows", Console(file=text, width=200)) as line:
        for clock[0], done in [(0, 400), (10, 900), (20, 1400), (35, 2150), (50, 2900), (70, 3900)]:
            line.update(done, shards=done // 100, failed=2)
    assert text.getvalue().splitlines() == [
        "label: 2,150 of 10,000 rows, shards 21, failed 2, 50 rows/s, 0:02:37 left",
        "label: 3,900 of 10,000 rows, shards 39, failed 2, 50 rows/s, 0:02:02 left",
    ]


@pytest.mark.parametrize(("total", "line"), [(10_000, "0 of 10,000 rows"), (None, "starting")])
def test_a_job_that_waits_says_so(monkeypatch, total, line):
    monkeypatch.setattr(module, "LOG_INTERVAL_S", 0.05)
    monkeypatch.setattr(module, "BEAT_S", 0.01)
    text, deadline = io.StringIO(), time.monotonic() + 30
    with Progress("label", total, "rows", Console(file=text, width=200)):
        while len(text.getvalue().splitlines()) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
    lines = text.getvalue().splitlines()
    assert len(lines) >= 3 and set(lines) == {f"label: {line}"}


def test_a_terminal_tells_the_rest_also_when_rows_come_seldom(clock):
    text = io.StringIO()
    console = Console(file=text, width=200, force_terminal=True, color_system=None)
    with Progress("label", 10_000, "rows", console) as line:
        for clock[0], done in [(0, 0), (100, 1000), (200, 2000)]:
            line.update(done, failed=2)
    assert "2000/10000 failed 2, 10 rows/s, 0:13:20 left" in text.getvalue()


def test_rows_that_an_earlier_run_labeled_do_not_count_as_speed(clock):
    text = io.StringIO()
    with Progress("label", 10_000, "rows", Console(file=text, width=200)) as line:
        line.update(5000)
        clock[0] = 40
        line.update(5040)
    assert "1.0 rows/s" in text.getvalue()
