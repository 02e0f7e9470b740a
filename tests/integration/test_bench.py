"""The forecast of a labeling job: its stages measured on real rows, and put together rightly."""

from dataclasses import asdict, replace

import pytest

from mmray.bench import SAMPLE_ROWS, Costs, forecast, predict, sample
from mmray.config import Columns
from mmray.datasets import Rows
from mmray.pool import Pool
from mmray.resources import Node, Resources

COSTS = Costs(
    read=0.001, decode=0.004, model=0.002, write=0.001, read_wall=0.001, write_wall=0.001, start=9.0
)


def test_on_cpus_the_costs_of_the_stages_add_up():
    pool = Pool(minimum=1, maximum=2, num_cpus=1, num_gpus=0, num_threads=4, num_tasks=8, num_decoders=1)
    found = predict(COSTS, pool, Resources({"a": Node(8)}), 100_000)
    assert found.rows_per_s == pytest.approx(8 / (0.001 + 0.004 + 4 * 0.002 + 0.001))
    assert found.limit == "model"
    assert found.rates == pytest.approx({"read": 8000, "decode": 2000, "write": 8000, "model": 1000})
    assert found.seconds == pytest.approx(9 + 100_000 / found.rows_per_s)


def test_fewer_workers_than_the_cluster_has_room_for_leave_cpus_idle():
    pool = Pool(minimum=1, maximum=1, num_cpus=1, num_gpus=0, num_threads=2, num_tasks=4, num_decoders=1)
    found = predict(COSTS, pool, Resources({"a": Node(8)}), 1000)
    assert found.rows_per_s == pytest.approx(2 / (0.006 + 2 * 0.002))


@pytest.mark.parametrize(
    ("cpus", "maximum", "num_gpus", "limit", "rate"),
    [(32, 8, 1, "model", 1000), (3, 8, 1, "decode", 500), (32, 2, 0.5, "model", 500)],
)
def test_with_gpus_the_slower_of_cpus_and_gpus_is_the_limit(cpus, maximum, num_gpus, limit, rate):
    sizes = {"minimum": 1, "maximum": maximum, "num_cpus": 1, "num_gpus": num_gpus, "num_threads": 4}
    pool = Pool(**sizes, num_tasks=4, num_decoders=1)
    found = predict(COSTS, pool, Resources({"a": Node(cpus, 2)}), 1000)
    assert (found.limit, found.rows_per_s) == (limit, pytest.approx(rate))


def test_tasks_that_wait_for_storage_take_no_cpu_but_there_are_only_so_many():
    pool = Pool(minimum=1, maximum=2, num_cpus=1, num_gpus=0, num_threads=4, num_tasks=6, num_decoders=1)
    there, quick = Resources({"a": Node(8)}), predict(COSTS, pool, Resources({"a": Node(8)}), 1000)
    assert predict(replace(COSTS, read_wall=0.006), pool, there, 1000).rows_per_s == quick.rows_per_s
    slow = predict(replace(COSTS, read_wall=0.06), pool, there, 1000)
    assert (slow.limit, slow.rows_per_s, slow.rates["read"]) == ("read", *[pytest.approx(100)] * 2)


def test_the_sample_takes_files_in_turns_until_it_holds_enough_rows(archive):
    small = Rows.find(str(archive.folder / "country=at"), Columns())
    assert {file.path for file, _ in sample(small)} == {file.path for file in small.files}
    chosen = sample(Rows.find(str(archive.folder), Columns()))
    assert sum(unit[-1] - unit[0] for _, unit in chosen) >= SAMPLE_ROWS
    assert sum(unit[-1] - unit[0] for _, unit in chosen[:-1]) < SAMPLE_ROWS


def test_of_a_large_row_group_the_sample_takes_a_part(archive):
    rows = Rows.find(str(archive.folder), Columns())
    large = replace(rows.files[0], num_rows=10_000, units=(tuple(range(0, 10_001, 500)),))
    many = replace(rows, files=(large, *(replace(large, path=f"{number}.parquet") for number in range(3))))
    assert [(file.path, unit) for file, unit in sample(many)] == [
        (large.path, (0, 500)),
        ("0.parquet", (0, 500)),
    ]


@pytest.mark.usefixtures("cluster")
def test_every_stage_is_measured_and_nothing_is_left(archive, bundle_uri, tmp_path):
    found = forecast(str(archive.folder), bundle_uri, scratch_uri=str(tmp_path))
    assert found.num_rows == archive.num_rows
    assert set(found.rates) == {"read", "decode", "model", "write"}
    assert all(cost > 0 for cost in asdict(found.costs).values())
    assert found.rows_per_s <= min(found.rates.values())
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
