"""An output that is decided again, killed at steps of the protocol: it comes out as if nothing had been."""

import pytest
from killing import Deciding, Reference

KILLS = {
    "before score a.parquet 1-1001": "process at the moment",
    "after publish _mmray/pieces/a.parquet/1-1001.parquet": "process at the moment",
    "before publish a.parquet": "driver",
    "after publish c.parquet": "driver",
    "before publish _SUCCESS": "driver",
}
RISKIEST = "before publish a.parquet"


@pytest.fixture(scope="module")
def make_deciding(reference, address):
    """Give `make(folder) -> Deciding`, of what the undisturbed run labeled."""
    jobs = []

    def make(folder):
        jobs.append(
            Deciding(reference.rows, "", folder / "out", folder, address, predictions=reference.output)
        )
        return jobs[-1]

    yield make
    for job in jobs:
        job.leave()


@pytest.fixture(scope="module")
def decided(make_deciding, reference, tmp_path_factory):
    """Give what an undisturbed run decides."""
    job = make_deciding(tmp_path_factory.mktemp("decided"))
    job.finish()
    return Reference(reference.rows, job.output, 0)


@pytest.mark.parametrize(
    ("moment", "victim"),
    [
        pytest.param(
            *kill, marks=() if kill[0] == RISKIEST else pytest.mark.faults, id=kill[0].replace("/", "|")
        )
        for kill in KILLS.items()
    ],
)
def test_a_kill_changes_nothing(make_deciding, decided, tmp_path, moment, victim):
    job = make_deciding(tmp_path)
    run = job.start(f"pause {moment}")
    process = run.reached()
    assert run.kill(victim, process)
    run.go()
    job.finish_after(run, survived=victim != "driver")
    decided.compare(job.output)
