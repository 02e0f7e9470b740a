"""A disk that is full, or read-only, from some moment on: told in a line, and resumed once it is well."""

import subprocess
from contextlib import suppress

import pyarrow.parquet as pq
import pytest
from killing import files_of, is_leftover

pytestmark = pytest.mark.faults

MOMENTS = [
    "before publish _mmray/plan/*",
    "before publish _mmray/pieces/a.parquet/1-1001.parquet",
    "before publish _mmray/rejected/a.parquet.jsonl",
    "before publish a.parquet",
    "before publish _mmray/manifest.json",
]


def mount(*arguments):
    return subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture
def disk(tmp_path):
    """Give a small file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if (done := mount("-t", "tmpfs", "-o", "size=8m", "mmray-faults", folder)).returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def job(disk, make_job):
    """Give a job on this disk. Its processes end before the disk goes."""
    return make_job(disk / "out")


def fill(disk):
    with suppress(OSError), open(disk / "ballast", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def assert_stopped(job, run, said):
    assert run.wait() == 3, run.told()
    assert said in run.told()
    assert "Traceback" not in run.told()
    assert (run.folder / "stderr").read_text().count("mmray: ") == 1
    assert not (job.output / "_SUCCESS").exists()
    for path in files_of(job.output):
        if path.endswith(".parquet"):
            pq.read_table(job.output / path, partitioning=None)  # a file under its own name is whole


@pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: moment.replace("/", "|"))
def test_a_full_disk_stops_the_job_and_room_lets_it_go_on(job, reference, disk, moment):
    run = job.start(f"pause {moment}")
    run.reached()
    fill(disk)
    run.go()
    assert_stopped(job, run, "No space left on device")
    assert not [path for path in files_of(disk) if is_leftover(path)], "what could not be written lies about"
    (disk / "ballast").unlink()
    job.finish()
    reference.compare(job.output)


@pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: moment.replace("/", "|"))
def test_an_output_that_turns_read_only_stops_the_job_and_it_goes_on_later(job, reference, disk, moment):
    run = job.start(f"pause {moment}")
    run.reached()
    assert mount("-o", "remount,ro", disk).returncode == 0
    run.go()
    try:
        assert_stopped(job, run, "Read-only file system")
    finally:
        assert mount("-o", "remount,rw", disk).returncode == 0
    job.finish()
    reference.compare(job.output)
