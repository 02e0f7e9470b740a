"""Moments at which a process stops or dies: there, then, and nowhere else."""

import os
import signal
import subprocess
import sys
import time

import pytest

SCRIPT = """
from mmray.faults import moment
for index in range(4):
    moment("before publish", f"rows/{index}.parquet")
    print(index, flush=True)
"""


def start(fault, folder):
    environment = os.environ | {"MMRAY_FAULT": fault, "MMRAY_FAULT_FOLDER": str(folder)}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, text=True, env=environment
    )


@pytest.mark.parametrize("fault", ["exit after publish *", "exit before publish rows/7*", "hang elsewhere*"])
def test_other_moments_pass(tmp_path, fault):
    process = start(fault, tmp_path)
    assert process.communicate(timeout=60)[0].split() == ["0", "1", "2", "3"]
    assert process.returncode == 0


def test_a_process_dies_where_it_should(tmp_path):
    process = start("exit before publish rows/2*", tmp_path)
    assert process.communicate(timeout=60)[0].split() == ["0", "1"]
    assert process.returncode == -signal.SIGKILL


def test_a_pause_at_the_second_moment_ends_when_it_is_told_to(tmp_path):
    process = start("pause:1 before publish *", tmp_path)
    assert process.stdout.readline() == "0\n"
    while not (tmp_path / "reached-1").exists():
        time.sleep(0.01)
    assert (tmp_path / "reached-1").read_text() in ("", str(process.pid))
    time.sleep(0.2)
    assert process.poll() is None
    (tmp_path / "go").touch()
    assert process.communicate(timeout=60)[0].split() == ["1", "2", "3"]


def test_a_hanging_process_does_not_come_back(tmp_path):
    process = start("hang before publish rows/1*", tmp_path)
    assert process.stdout.readline() == "0\n"
    with pytest.raises(subprocess.TimeoutExpired):
        process.communicate(timeout=0.5)
    process.kill()
    process.communicate()
