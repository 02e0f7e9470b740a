"""A labeling job that is killed with -9, and the same command again. Its own Ray, as on a laptop."""

import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from mmray.plan import Plan, find_work, shards_of
from mmray.storage import Folder
from mmray.verify import verify_dataset

JOBS = Path(__file__).parents[2] / "jobs"
MARK = "MMRAY_TEST_RUN"
DEADLINE_S = 240


def traces(output):
    """Say of every labeled file and piece which it is and when it was written."""
    found = {}
    for path in output.rglob("*.parquet"):
        try:
            found[str(path.relative_to(output))] = (path.stat().st_ino, path.stat().st_mtime_ns)
        except FileNotFoundError:  # a piece that has just been joined
            continue
    return {path: trace for path, trace in found.items() if not path.startswith("_mmray/plan")}


def is_half_done(output):
    """Tell whether there are both a labeled file and a piece of another one."""
    return {path.startswith("_mmray/pieces") for path in traces(output)} == {False, True}


def relatives(mark):
    """Give the processes that inherited a mark in their environment, whoever their parent is by now."""
    entry, found = f"{MARK}={mark}".encode(), set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if entry in (process / "environ").read_bytes().split(b"\0") and state(process) != "Z":
                found.add(int(process.name))
        except OSError:  # it has just ended, or is not ours to read
            continue
    return found


def state(process):
    return (process / "stat").read_text().rpartition(")")[2].split()[0]


def poll(condition, what):
    deadline = time.monotonic() + DEADLINE_S
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {DEADLINE_S} s in vain for {what}"
        time.sleep(0.01)
    return value


@pytest.fixture
def mark():
    """Mark processes, and leave none of them behind."""
    mark = uuid.uuid4().hex
    yield mark
    for process in relatives(mark):
        os.kill(process, signal.SIGKILL)
    poll(lambda: not relatives(mark), "the end of what was started here")


@pytest.fixture
def rows(draw_rows, tmp_path):
    """Give rows that take some seconds to label: several files, some of them of several shards."""
    (tmp_path / "rows" / "year=2026").mkdir(parents=True)
    for number, num_rows in enumerate((200, 2600, 400, 3300, 500)):
        folder = tmp_path / "rows" / ("year=2026" if number % 2 else "")
        pq.write_table(draw_rows(num_rows, number), folder / f"{number}.parquet", row_group_size=1300)
    return tmp_path / "rows"


def start(rows, bundle_uri, output, mark):
    command = [sys.executable, str(JOBS / "label.py"), "--input", str(rows), "--model", bundle_uri]
    return subprocess.Popen(
        [*command, "--output", str(output), "--batch-size", "16", "--no-gpu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {MARK: mark},
        start_new_session=True,
        text=True,
    )


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")
def test_a_killed_job_goes_on_where_it_was_and_loses_and_doubles_no_row(
    cluster, rows, bundle_uri, tmp_path, mark
):
    output = tmp_path / "out"
    first = start(rows, bundle_uri, output, mark)
    poll(lambda: is_half_done(output) or first.poll() is not None, "a labeled file and a piece of another")
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    assert first.returncode == -signal.SIGKILL, "the job was over before it could be killed"
    poll(
        lambda: not relatives(mark), "the end of the killed job's Ray"
    )  # its workers may still have committed
    assert not (output / "_SUCCESS").exists()
    plan = Plan.load(Folder(str(output)))
    work = find_work(Folder(str(output)), plan)
    assert 0 < work.num_pending < plan.num_shards, "it did not die in the middle"
    committed = traces(output)
    backup = Path(shutil.copytree(output, tmp_path / "backup"))

    second = start(rows, bundle_uri, output, mark)
    told, errors = second.communicate(timeout=DEADLINE_S)
    assert second.returncode == 0, errors
    num_resumed = plan.num_shards - work.num_pending
    assert f"{num_resumed} of {plan.num_shards} shards were there" in told
    assert verify_dataset(str(rows), str(output)).problems == []
    after = traces(output)
    whole = {path for path in committed if not path.startswith("_mmray/pieces")}
    assert {path: after[path] for path in whole} == {path: committed[path] for path in whole}
    shards = [shard for file in plan.files for shard in shards_of(file, file.units)]
    for shard in shards:
        if shard.piece in committed:
            piece = pq.read_table(backup / shard.piece)
            joined = pq.read_table(output / shard.path, partitioning=None)
            assert joined.slice(shard.first, shard.end - shard.first).equals(piece)
