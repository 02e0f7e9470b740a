"""An archive that passes every step of the protocol and is small enough to be labeled a hundred times."""

import io
import os
import random
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from killing import Job, Reference, hits, poll

# In the environment, so that all processes which share the tests out draw the same kills.
SEED = int(os.environ.setdefault("MMRAY_FAULT_SEED", str(random.SystemRandom().randrange(1_000_000))))
NUM_KILLS = 100
ROUNDS = int(os.environ.get("MMRAY_FAULT_ROUNDS") or 16)


def pytest_collection_modifyitems(items):
    """Where processes cannot be found by their environment, these tests would kill nobody."""
    if not Path("/proc/self/environ").exists():
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="finds processes in /proc"))


def pytest_generate_tests(metafunc):
    """Give tests of random kills their seeds: MMRAY_FAULT_ROUNDS of them, from MMRAY_FAULT_SEED on."""
    if "seed" in metafunc.fixturenames:
        metafunc.parametrize("seed", range(SEED, SEED + ROUNDS))
    if "node_seed" in metafunc.fixturenames:
        metafunc.parametrize("node_seed", range(SEED, SEED + ROUNDS // 6))


def runs_all(config):
    """Tell whether this is `make test-faults`, or a part that somebody picked."""
    return "or faults" in config.option.markexpr and not config.option.keyword


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """Add up what the processes have hit that share the tests out."""
    hits.update(getattr(node, "workeroutput", {}).get("hits", {}))


def pytest_sessionfinish(session, exitstatus):
    """Hold `make test-faults` to what it promises: at least a hundred kills that hit."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["hits"] = dict(hits)
    elif runs_all(session.config) and exitstatus == 0 and sum(hits.values()) < NUM_KILLS:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    """Say how many kills hit."""
    if hits:
        by_victim = ", ".join(f"{count} {victim}" for victim, count in sorted(hits.items()))
        terminalreporter.write_line(f"{sum(hits.values())} kills hit: {by_victim}; seeds from {SEED}")
        if runs_all(terminalreporter.config) and sum(hits.values()) < NUM_KILLS:
            terminalreporter.write_line(f"FAILED: these are fewer than {NUM_KILLS}")


@pytest.fixture(scope="session")
def rows(spoil, tmp_path_factory):
    """Give three files of one to three shards, an empty one, and rows that are bad at the shards' borders."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("faults") / "rows"
    generator = np.random.default_rng(0)

    def draw():
        file = io.BytesIO()
        Image.fromarray(generator.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(file, "PNG")
        return file.getvalue()

    images = [draw() for _ in range(50)]

    def write(path, row_groups, damages):
        num_rows = sum(row_groups)
        table = pa.table(
            {
                "image_id": pa.array([f"{path} {row}" for row in range(num_rows)], pa.string()),
                "image": pa.array([images[row % 50] for row in range(num_rows)], pa.binary()),
                "caption": pa.array(
                    [f"seen from the city, Nr. {row}" for row in range(num_rows)], pa.string()
                ),
                "weight": pa.array([float("nan") if row % 7 == 0 else row / 3 for row in range(num_rows)]),
            }
        )
        table, _ = spoil(table, damages)
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        with pq.ParquetWriter(folder / path, table.schema) as writer:
            first = 0
            for size in row_groups:
                writer.write_table(table.slice(first, size), row_group_size=size)
                first += size

    # A shard takes whole row groups of up to 1,000 rows together: here three shards of 1, 1,000 and 1 row.
    write(
        "a.parquet", (1, 1000, 1), {0: "bad image", 1: "null caption", 1000: "null image", 1001: "bad image"}
    )
    write("b/empty.parquet", (), {})
    write("b/one.parquet", (20, 20), {3: "bad image, null caption", 39: "blank caption"})
    write("c.parquet", (1000, 1), {999: "null image, blank caption", 1000: "empty image"})
    return folder


@pytest.fixture(scope="session")
def address(cluster):
    """Give the address of the session's Ray cluster: jobs join it, which saves each the start of its own."""
    import ray

    return ray.get_runtime_context().gcs_address


@pytest.fixture
def make_job(rows, bundle_uri, address, tmp_path):
    """Give `make(output, rows=..., address=..., options=()) -> Job`; what it starts ends with the test."""
    jobs = []

    def make(output=None, **settings):
        settings = {"rows": rows, "address": address} | settings
        jobs.append(
            Job(bundle_uri=bundle_uri, output=output or tmp_path / "out", scratch=tmp_path, **settings)
        )
        return jobs[-1]

    yield make
    for job in jobs:
        job.leave()


@pytest.fixture
def job(make_job):
    """Give a job on the session's cluster."""
    return make_job()


@pytest.fixture(scope="session")
def reference(rows, bundle_uri, address, tmp_path_factory):
    """Give what an undisturbed run makes of the rows."""
    scratch = tmp_path_factory.mktemp("reference")
    job = Job(rows, bundle_uri, scratch / "out", scratch, address)
    run = job.start()
    plan = job.output / "_mmray" / "plan" / "00000.parquet"
    poll(lambda: plan.exists() or run.process.poll() is not None, run.told)
    started = time.monotonic()
    assert run.wait() == 0, run.told()
    job.leave()
    return Reference(rows, job.output, time.monotonic() - started)
