"""Kills at every step of the protocol, and at random: no row is lost, doubled or labeled otherwise."""

import random
import re
import signal
import time

import pytest
from killing import poll

from mmray.verify import verify_dataset

DRIVER, WORKER, ACTOR, ANY = "driver", "process at the moment", "actor", "worker"

OF_THE_DRIVER = (
    "before publish _mmray/plan/*",
    "after publish _mmray/plan/*",
    "before publish _mmray/manifest.json",
    "after publish _mmray/manifest.json",
    "before publish _SUCCESS",
    "after publish _SUCCESS",
)
OF_A_WORKER = (
    "before read a.parquet *",
    "before read c.parquet *",
    "before score a.parquet 0-1",
    "before score c.parquet *",
    "before publish _mmray/pieces/a.parquet/0-1.parquet",
    "after publish _mmray/pieces/a.parquet/0-1.parquet",
    "before publish _mmray/pieces/a.parquet/1-1001.parquet",
    "after publish _mmray/pieces/a.parquet/1-1001.parquet",
    "before publish _mmray/rejected/a.parquet.jsonl",
    "after publish _mmray/rejected/a.parquet.jsonl",
    "before publish a.parquet",
    "after publish a.parquet",
    "before publish b/one.parquet",
    "after publish b/one.parquet",
    "before remove _mmray/pieces/a.parquet/0-1.parquet",
    "before remove _mmray/pieces/a.parquet/1-1001.parquet",
    "before remove _mmray/pieces/a.parquet/1001-1002.parquet",
)
RISKIEST = {
    ("after publish _mmray/pieces/a.parquet/1-1001.parquet", WORKER),
    ("before publish _SUCCESS", DRIVER),
}
KILLS = [
    *((moment, DRIVER) for moment in OF_THE_DRIVER),
    *((moment, victim) for moment in OF_A_WORKER for victim in (DRIVER, WORKER, ACTOR)),
]


def cases():
    for moment, victim in KILLS:
        marks = () if (moment, victim) in RISKIEST else pytest.mark.faults
        yield pytest.param(moment, victim, marks=marks, id=f"{victim}, {moment}".replace("/", "|"))


@pytest.mark.parametrize(("moment", "victim"), list(cases()))
def test_a_kill_at_a_step_of_the_protocol_changes_nothing(job, reference, moment, victim):
    run = job.start(f"pause {moment}")
    process = run.reached()
    assert (process == run.process.pid) == (moment in OF_THE_DRIVER)
    hit = run.kill(victim, process)
    run.go()
    if not hit:
        assert victim == ACTOR, "only actors may be gone already"
    job.finish_after(run, survived=victim != DRIVER)
    reference.compare(job.output)
    if not hit:
        pytest.skip("no actor was left at this moment; the output is as it must be")


@pytest.mark.faults
def test_a_job_with_a_ray_of_its_own_keeps_what_it_committed(make_job, rows):
    """As on a laptop, where Ray dies with the driver."""
    job = make_job(address=None)
    run = job.start("pause before publish a.parquet")
    run.reached()
    poll(lambda: (job.output / "b" / "one.parquet").exists(), run.told)
    assert run.kill(DRIVER)
    run.go()
    assert run.wait() == -signal.SIGKILL
    run.wait_for_workers()
    committed = traces(job.output)
    assert job.output / "b" / "one.parquet" in committed
    assert re.search(r"[1-9] of 7 shards were there", job.finish().told())
    assert verify_dataset(str(rows), str(job.output)).problems == []
    assert committed == {path: trace for path, trace in traces(job.output).items() if path in committed}


def traces(output):
    """Say of each labeled file which it is and when it was written."""
    files = [path for path in output.rglob("*.parquet") if "_mmray" not in path.parts]
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


@pytest.mark.faults
def test_random_kills_change_nothing(job, reference, seed):
    """Kill after kill on one output: of the first run as long as it lives, and of two that resume."""
    generator = random.Random(seed)
    for _ in range(3):
        run = job.start()
        plan = job.output / "_mmray" / "plan" / "00000.parquet"
        while run.process.poll() is None and not plan.exists():
            time.sleep(0.01)
        victim = kill_at_random(run, generator, reference.seconds, seed)
        status = run.wait()
        assert status in ((0, 3, -9) if victim == DRIVER else (0, 3)), run.told()
        if status == 0:
            break
    job.finish()
    leftovers = reference.compare(job.output)
    print(f"seed {seed}: {len(leftovers)} temporary files were left by killed writers")


def kill_at_random(run, generator, seconds, seed):
    """Kill processes of a run until it ends or its driver was hit; give the last victim."""
    while True:
        victim, delay = generator.choice((DRIVER, ACTOR, ANY)), generator.uniform(0, seconds)
        deadline = time.monotonic() + delay
        while run.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        if run.process.poll() is not None:
            return None
        hit = run.kill(victim)
        print(f"seed {seed}: {victim} after {delay:.2f} s: {'hit' if hit else 'was not there'}")
        if hit and victim == DRIVER:
            return victim
