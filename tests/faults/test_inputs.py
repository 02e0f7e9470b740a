"""Input that is no longer what was planned: refused in one line that names the file."""

import shutil

import pyarrow.parquet as pq
import pytest


def vanish(path):
    path.unlink()


def change(path):
    rows = pq.read_table(path, partitioning=None)
    pq.write_table(rows.slice(1), path)


def swap_rows(path):
    """Other rows under the same number and the same size of file would be caught by nobody but the footer."""
    rows = pq.read_table(path, partitioning=None)
    order = list(range(rows.num_rows))[::-1]
    pq.write_table(rows.take(order), path)


@pytest.mark.faults
@pytest.mark.parametrize(
    "harm",
    [vanish, change, swap_rows],
    ids=lambda harm: harm.__name__,
)
def test_input_that_is_not_what_was_planned_is_refused(make_job, rows, reference, tmp_path, harm):
    mine = tmp_path / "rows"
    shutil.copytree(rows, mine)
    job = make_job(rows=mine)
    run = job.start("pause after publish _mmray/plan/*")
    run.reached()
    harm(mine / "c.parquet")
    run.go()
    assert run.wait() == 2, run.told()
    errors = (run.folder / "stderr").read_text()
    lines = [line for line in errors.splitlines() if line.startswith("mmray: ")]
    assert len(lines) == 1, errors
    assert "c.parquet" in lines[0]
    assert "Traceback" not in errors
    assert not (job.output / "_SUCCESS").exists()
    assert not (job.output / "c.parquet").exists()
    shutil.copy(rows / "c.parquet", mine / "c.parquet")
    job.finish()
    reference.compare(job.output)
