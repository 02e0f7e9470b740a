"""The script that runs a job again, by real processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "cluster" / "again.sh"


@pytest.fixture
def start(tmp_path):
    """Start a job under the script: Python that finds the times it has been run before in `times`."""

    def start(program, delay_s=0, **settings):
        counted = (
            "import pathlib, signal, sys, time; log = pathlib.Path('log'); log.touch();"
            "times = len(log.read_text()); log.write_text('x' * (times + 1));"
        )
        return subprocess.Popen(
            ["bash", SCRIPT, sys.executable, "-c", counted + program],
            cwd=tmp_path,
            env=os.environ | {"AGAIN_DELAY_S": str(delay_s)},
            stderr=subprocess.PIPE,
            text=True,
            **settings,
        )

    return start


def num_runs(tmp_path):
    return len((tmp_path / "log").read_text())


def test_a_job_that_was_killed_for_want_of_memory_runs_again(start, tmp_path):
    job = start("import os; os.kill(os.getpid(), signal.SIGKILL) if times < 1 else sys.exit(0)")
    assert job.wait(30) == 0
    assert num_runs(tmp_path) == 2


@pytest.mark.parametrize("status", [0, 1, 2])
def test_a_job_that_is_done_or_bad_runs_once(start, tmp_path, status):
    assert start(f"sys.exit({status})").wait(30) == status
    assert num_runs(tmp_path) == 1


def test_a_job_that_was_interrupted_runs_again(start, tmp_path):
    job = start("sys.exit(3 if times < 2 else 1)")
    _, told = job.communicate(timeout=30)
    assert job.returncode == 1
    assert num_runs(tmp_path) == 3
    assert told.count("again.sh: ended with 3") == 2


def test_a_job_that_is_always_interrupted_is_given_up(start, tmp_path):
    assert start("sys.exit(3)").wait(60) == 3
    assert num_runs(tmp_path) == 10


def test_a_job_that_is_told_to_stop_is_not_started_again(start, tmp_path):
    """It may take its time, and its status is the script's."""
    job = start(
        "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(1), sys.exit(3)));"
        "pathlib.Path('ready').touch(); time.sleep(60)"
    )
    while not (tmp_path / "ready").exists():
        time.sleep(0.05)
    began = time.monotonic()
    job.send_signal(signal.SIGTERM)
    assert job.wait(30) == 3
    assert time.monotonic() - began >= 1
    assert num_runs(tmp_path) == 1


def test_a_stop_in_the_pause_between_two_runs_is_the_end(start, tmp_path):
    job = start("sys.exit(3)", delay_s=60)
    while "again in" not in (told := job.stderr.readline()):
        assert told, "it ended"
    job.send_signal(signal.SIGTERM)
    assert job.wait(10) == 3
    assert num_runs(tmp_path) == 1


def test_a_stop_that_reaches_the_job_twice_is_the_end(start, tmp_path):
    """As from a scheduler that tells every process of a job."""
    job = start(
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(3));pathlib.Path('ready').touch(); time.sleep(60)",
        start_new_session=True,
    )
    while not (tmp_path / "ready").exists():
        time.sleep(0.05)
    os.killpg(job.pid, signal.SIGTERM)
    assert job.wait(30) == 3
    assert num_runs(tmp_path) == 1
