"""Labeling jobs from and to object storage that are killed with -9: the same command again loses no row."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from killing import Job

from mmray.storage import Folder, visible
from mmray.verify import verify_dataset

pytestmark = [pytest.mark.usefixtures("cluster"), pytest.mark.faults]
DRIVER, WORKER = "driver", "process at the moment"


@pytest.fixture
def rows(bucket, draw_rows):
    """Give a folder in a bucket: a file of three shards, and one of a single shard."""
    for path, sizes in (("a.parquet", (1, 1000, 1)), ("b/one.parquet", (20,))):
        table, target, first = draw_rows(sum(sizes), 7), pa.BufferOutputStream(), 0
        with pq.ParquetWriter(target, table.schema) as writer:
            for size in sizes:
                writer.write_table(table.slice(first, size))
                first += size
        Folder(f"{bucket}/rows").publish(path, target.getvalue().to_pybytes())
    return f"{bucket}/rows"


@pytest.fixture
def make_job(rows, bucket, bundle_uri, tmp_path):
    """Give `make(name) -> a job that labels the rows to this folder of the bucket`."""
    import ray

    jobs = []

    def make(name):
        address = ray.get_runtime_context().gcs_address
        jobs.append(Job(rows, bundle_uri, f"{bucket}/{name}", tmp_path / name, address))
        return jobs[-1]

    yield make
    for job in jobs:
        job.leave()


def labels_in(output):
    """Read all that an output's labeled files hold."""
    folder = Folder(output)
    return {
        path: pq.read_table(pa.BufferReader(folder.read(path))).to_pylist()
        for path in folder.list(".parquet")
        if visible(path)
    }


@pytest.mark.parametrize(
    ("moment", "victim"),
    [
        ("before publish _mmray/plan/*", DRIVER),
        ("before publish _mmray/pieces/a.parquet/0-1.parquet", WORKER),
        ("after publish _mmray/pieces/a.parquet/1-1001.parquet", DRIVER),
        ("before publish a.parquet", WORKER),
        ("after publish a.parquet", DRIVER),
        ("before remove _mmray/pieces/a.parquet/0-1.parquet", WORKER),
        ("before publish _mmray/manifest.json", DRIVER),
        ("before publish _SUCCESS", DRIVER),
    ],
    ids=lambda value: value.replace("/", "|"),
)
def test_a_kill_at_a_step_of_the_protocol_changes_nothing(make_job, rows, moment, victim):
    job, undisturbed = make_job("killed"), make_job("undisturbed")
    run = job.start(f"pause {moment}")
    assert run.kill(victim, run.reached())
    run.go()
    job.finish_after(run, survived=victim != DRIVER)
    assert verify_dataset(rows, job.output).problems == []
    undisturbed.finish()
    assert labels_in(job.output) == labels_in(undisturbed.output)
    left = [
        path for path in Folder(job.output).list() if path.startswith(("_mmray/pieces/", "_mmray/records/"))
    ]
    assert left == []
