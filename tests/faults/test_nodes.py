"""One of two nodes dies wholly in mid-run: the job goes on with what is left, or says that it resumes."""

import random
import tempfile
import time
from pathlib import Path

import pytest
from killing import Node, hits

pytestmark = pytest.mark.faults


@pytest.fixture
def head():
    """Give a cluster that no dead node is known to yet: one is believed to live for half a minute."""
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        node = Node(Path(folder))  # a short path: it holds sockets
        try:
            yield node.wait_until_up()
        finally:
            node.kill()


@pytest.fixture
def second(head):
    node = Node(head.log.parent, head)
    try:
        yield node.wait_until_up()
    finally:
        node.kill()


@pytest.fixture
def job(make_job, head):
    return make_job(address=head.address, options=("--num-workers", "2"))


def kill_node(node):
    hit = node.kill()
    hits["node"] += hit
    return hit


@pytest.mark.parametrize(
    "moment",
    [
        "before read c.parquet *",
        "before score c.parquet *",
        "before publish _mmray/pieces/a.parquet/1-1001.parquet",
        "after publish _mmray/pieces/a.parquet/1-1001.parquet",
        "before publish a.parquet",
        "before remove _mmray/pieces/a.parquet/1-1001.parquet",
        "before publish _mmray/manifest.json",
    ],
    ids=lambda moment: moment.replace("/", "|"),
)
def test_a_node_that_dies_at_a_step_changes_nothing(job, reference, second, moment):
    run = job.start(f"pause {moment}")
    process = run.reached()
    there = second.processes()
    print("the process at the moment is on", "the second node" if process in there else "the head")
    print(f"{len(there.keys() & set(run.workers('ray::')))} workers of the job are on the second node")
    assert kill_node(second)
    run.go()
    job.finish_after(run, survived=True)
    reference.compare(job.output, same_threads=False)


def test_a_node_that_dies_at_any_time_changes_nothing(job, reference, second, node_seed):
    run = job.start()
    plan = job.output / "_mmray" / "plan" / "00000.parquet"
    while run.process.poll() is None and not plan.exists():
        time.sleep(0.01)
    deadline = time.monotonic() + random.Random(node_seed).uniform(0, reference.seconds)
    while run.process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    running = run.process.poll() is None
    hit = second.kill() and running
    hits["node"] += hit
    print(f"seed {node_seed}: the second node: {'hit' if hit else 'was too late'}")
    job.finish_after(run, survived=True)
    reference.compare(job.output, same_threads=False)
