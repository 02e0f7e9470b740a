"""Drivers that are told to stop, that meet another one, or that died and left something behind."""

import json
import os
import signal
import time

import pyarrow.parquet as pq
import pytest
from killing import files_of, is_leftover, poll

from mmray.lease import LEASE
from mmray.plan import PIECES, Plan, shards_of
from mmray.shards import Committer
from mmray.storage import Folder

NOTICE_S = 30
"""What a spot machine leaves between its notice and its end, and then some."""


def end(run, how):
    """Send a signal; give the exit status and how long it took."""
    started = time.monotonic()
    tell = os.killpg if how == signal.SIGINT else os.kill  # a terminal tells all that runs in it
    tell(run.process.pid, how)
    return run.wait(), time.monotonic() - started


@pytest.mark.parametrize(
    ("how", "under"),
    [
        pytest.param(signal.SIGTERM, (), id="SIGTERM"),
        # As in a terminal, also where these tests themselves run in the background.
        pytest.param(signal.SIGINT, ("env", "--default-signal=INT"), id="Ctrl-C"),
        # As in what a script starts with `&`.
        pytest.param(
            signal.SIGTERM, ("env", "--ignore-signal=INT"), marks=pytest.mark.faults, id="in the background"
        ),
    ],
)
def test_a_signal_ends_a_job_in_time_and_the_same_command_resumes(make_job, reference, how, under):
    """One shard is never committed, so that the job cannot come to its end in the time that it has left."""
    job = make_job(under=under)
    run = job.start("pause before publish _mmray/pieces/a.parquet/1-1001.parquet")
    run.reached()
    status, seconds = end(run, how)
    assert status == 3, run.told()
    assert seconds < NOTICE_S
    errors = (run.folder / "stderr").read_text()
    assert "Traceback" not in errors
    assert errors.count("mmray: ") == 1
    assert not (job.output / "_SUCCESS").exists()
    job.finish()
    reference.compare(job.output)


@pytest.mark.faults
def test_sigterm_lets_finish_what_is_being_committed(job, reference):
    piece = "_mmray/pieces/a.parquet/1-1001.parquet"
    run = job.start(f"pause before publish {piece}")
    run.reached()
    run.process.send_signal(signal.SIGTERM)
    run.go()
    assert run.wait() in (0, 3), run.told()
    assert (job.output / piece).exists() or (job.output / "a.parquet").exists()
    job.finish()
    reference.compare(job.output)


@pytest.mark.faults
def test_sigterm_while_the_manifest_is_written_ends_the_job_and_it_resumes(job, reference):
    run = job.start("pause before publish _mmray/manifest.json")
    run.reached()
    run.process.send_signal(signal.SIGTERM)
    run.go()
    assert run.wait() in (0, 3), run.told()
    job.finish()
    reference.compare(job.output)


@pytest.mark.faults
def test_a_second_driver_on_one_output_refuses_and_leaves_the_first_undisturbed(make_job, reference):
    first, second = make_job(), make_job()
    run = first.start("pause before publish _mmray/pieces/a.parquet/1-1001.parquet")
    run.reached()
    poll(lambda: all_but_one_shard_is_done(first.output), run.told)
    there = contents_of(first.output)
    other = second.start()
    assert other.wait(90) == 2, other.told()
    errors = (other.folder / "stderr").read_text()
    assert errors.count("mmray: ") == 1
    assert str(first.output) in errors
    assert "Traceback" not in errors
    here = contents_of(first.output)
    assert {path: here.get(path) for path in there} == there
    run.go()
    assert run.wait() == 0, run.told()
    reference.compare(first.output)


def all_but_one_shard_is_done(output):
    """Tell whether a job that is stopped before the second piece of a.parquet has done all else."""
    pieces = {path for path in files_of(output) if path.startswith(f"{PIECES}/") and not is_leftover(path)}
    return pieces == {f"{PIECES}/a.parquet/{rows}.parquet" for rows in ("0-1", "1001-1002")} and all(
        (output / path).exists() for path in ("b/empty.parquet", "b/one.parquet", "c.parquet")
    )


def contents_of(output):
    """Read all files of an output; of its lease, which is renewed, the owner."""
    files = {path: (output / path).read_bytes() for path in files_of(output) if not is_leftover(path)}
    return files | {LEASE: json.loads(files[LEASE])["owner"]}


def write_again(output, reference):
    """Do what the workers of a dead driver may do at any time: commit each shard of the plan once more."""
    plan = Plan.load(Folder(str(output)))
    committer = Committer(Folder(str(output)), plan.fingerprint)
    for file in plan.files:
        rows = pq.read_table(reference.output / file.path, partitioning=None)
        for shard in shards_of(file, file.units):
            yield lambda shard=shard, rows=rows, file=file: committer.commit(
                shard, rows.slice(shard.first, shard.end - shard.first), file
            )


@pytest.mark.faults
@pytest.mark.parametrize(
    "moment",
    [
        "before read a.parquet *",
        "before score c.parquet *",
        "before publish _mmray/pieces/a.parquet/1-1001.parquet",
        "before publish a.parquet",
        "before publish b/one.parquet",
        "before remove _mmray/pieces/a.parquet/1-1001.parquet",
        "before publish _mmray/manifest.json",
        "before publish _SUCCESS",
    ],
    ids=lambda moment: moment.replace("/", "|"),
)
def test_a_worker_of_a_dead_driver_that_writes_into_a_run_changes_nothing(job, reference, moment):
    run = job.start(f"pause {moment}")
    run.reached()
    for write in write_again(job.output, reference):
        write()
    run.go()
    status = run.wait()
    assert status in (0, 3), run.told()
    if status:
        job.finish()
    if moment == "before publish _SUCCESS":
        remove_strays(job.output)
    reference.compare(job.output)


@pytest.mark.faults
@pytest.mark.parametrize("num_written", [1, 4, None])
def test_a_worker_of_a_dead_driver_that_writes_late_changes_nothing(job, reference, num_written):
    job.finish()
    for write in list(write_again(job.output, reference))[:num_written]:
        write()
    remove_strays(job.output)
    reference.compare(job.output)


def remove_strays(output):
    """Remove the pieces that are left after the last look for them: no reader sees them."""
    for path in (output / "_mmray" / "pieces").rglob("*-*.parquet"):
        path.unlink()
