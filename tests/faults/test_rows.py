"""Rows that kill or hang the process which decodes them: each costs itself, its neighbours nothing."""

import pyarrow.parquet as pq
import pytest

from mmray.verify import verify_dataset

POISON = "Nr. 500"
"""What the captions of two rows end with, each in the middle of a shard of a thousand."""


@pytest.mark.faults
@pytest.mark.parametrize("place", ["beside", "pool"])
@pytest.mark.parametrize(
    ("action", "reason"),
    [
        ("exit", "decoding this row killed its process (-9)"),
        ("hang", "decoding this row took more than 30 s"),
    ],
)
def test_a_poison_row_costs_itself_alone(make_job, rows, reference, action, reason, place):
    job = make_job(options=("--decode", place))
    run = job.start(f"{action} decode *{POISON}")
    assert run.wait() == 0, run.told()
    assert "Traceback" not in run.told()
    for path in ("a.parquet", "b/empty.parquet", "b/one.parquet", "c.parquet"):
        there = pq.read_table(reference.output / path, partitioning=None).to_pylist()
        here = pq.read_table(job.output / path, partitioning=None).to_pylist()
        poisoned = [row for row, record in enumerate(there) if (record["caption"] or "").endswith(POISON)]
        assert len(poisoned) == (path in ("a.parquet", "c.parquet"))
        for row in poisoned:
            assert (here[row]["status"], here[row]["error"]) == ("failed", reason)
            assert here[row]["scores"] is None
            del there[row], here[row]
        assert [record["image_id"] for record in here] == [record["image_id"] for record in there]
        assert [record["status"] for record in here] == [record["status"] for record in there]
        for one, other in zip(there, here, strict=True):  # other rows shared their batches
            assert one["scores"] == pytest.approx(other["scores"], abs=1e-5)
    assert verify_dataset(str(rows), str(job.output)).problems == []
