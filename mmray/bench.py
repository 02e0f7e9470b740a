"""What will limit a labeling job, and how long it will take: its stages measured apart, on this cluster."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from tempfile import TemporaryDirectory
from typing import TypeVar

import pyarrow as pa
import ray
from rich.table import Table

from mmray.bundle import Bundle
from mmray.columns import text_values
from mmray.config import Columns, ComputeConfig, LabelConfig, ScoringConfig
from mmray.datasets import Rows
from mmray.decoding import Image, Row, RowDecoder
from mmray.fetch import fetch_images, image_values
from mmray.options import make
from mmray.parquet import DataFile, Unit, read_units
from mmray.plan import Shard
from mmray.pool import Pool
from mmray.resources import Resources
from mmray.schema import KeptScores
from mmray.scoring import load_labeler
from mmray.shards import Committer
from mmray.storage import Folder

SAMPLE_ROWS = 1000
"""Rows that are measured, about: shards of files from all over the input."""

SAMPLE_FILES = 8
MODEL_REPEATS = 2
"""The better one counts: first batches are slow."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class Costs:
    """What one row costs one worker, in seconds."""

    read: float
    """Of a CPU; while a task waits for storage others go on."""
    decode: float
    """In one thread; 0 where the GPU decodes, as a part of what the model takes."""
    model: float
    """In all threads of the worker, or on its GPU."""
    write: float
    """Of a CPU, too."""
    read_wall: float
    """Of a task, with what it waits for storage."""
    write_wall: float
    start: float
    """Not a row's: until a worker has its model."""


@dataclass(frozen=True)
class Forecast:
    """How a labeling job will go."""

    num_rows: int
    costs: Costs
    rates: dict[str, float]
    """Rows a second that the cluster's stages could do, each had it the whole cluster to itself."""
    rows_per_s: float
    """That all of them do together."""
    limit: str
    """The stage that takes most."""

    @property
    def seconds(self) -> float:
        """The whole job, its start included."""
        return self.costs.start + self.num_rows / self.rows_per_s


def forecast(
    input_uri: str,
    model_uri: str,
    columns: Columns | None = None,
    scoring: ScoringConfig | None = None,
    compute: ComputeConfig | None = None,
    scratch_uri: str | None = None,
) -> Forecast:
    """Measure reading, decoding, the model and writing on a sample, in a worker as labeling has them.

    Args:
        input_uri: Parquet rows.
        model_uri: the bundle.
        columns: names of the input's columns.
        scoring: how the model computes.
        compute: where the work will run.
        scratch_uri: a folder to write to, such as one beside the output [default: a local one].

    Raises:
        DataError: the rows are unusable.
        BundleError: the bundle is incomplete or damaged.
        ConfigError: a GPU is asked for, and this machine has none.
        ClusterError: the cluster has no CPU yet, or not the GPU that is asked for.
    """
    columns, scoring, bundle = columns or Columns(), scoring or ScoringConfig(), Bundle.load(model_uri)
    rows = Rows.find(input_uri, columns, needs=("image", "caption"))
    pool = Pool.on_cluster(compute or ComputeConfig(), scoring)
    config = pool.settle(make(LabelConfig, vars(scoring)))
    worker = ray.remote(num_cpus=pool.num_cpus, num_gpus=pool.num_gpus)(measure)
    task = worker.remote(rows.folder, sample(rows), bundle, columns, config, pool, scratch_uri)
    return predict(ray.get(task), pool, Resources.of_cluster(), rows.num_rows)


def sample(rows: Rows) -> list[tuple[DataFile, Unit]]:
    """Choose first shards of units, from files all over the input in turns, until they hold enough rows."""
    spread = rows.files[:: -(-len(rows.files) // SAMPLE_FILES)]
    chosen: list[tuple[DataFile, Unit]] = []
    for turn in zip_longest(*(file.units for file in spread)):
        for file, unit in zip(spread, turn, strict=True):
            if unit and sum(taken[-1] - taken[0] for _, taken in chosen) < SAMPLE_ROWS:
                chosen.append((file, unit[:2]))
    return chosen


def measure(
    folder: Folder,
    units: Sequence[tuple[DataFile, Unit]],
    bundle: Bundle,
    columns: Columns,
    config: LabelConfig,
    pool: Pool,
    scratch_uri: str | None,
) -> Costs:
    """Measure the stages apart, in this process: a worker of the cluster."""
    started = time.perf_counter()
    from mmray.tables import TableLabeler

    labeler = load_labeler(bundle, config, pool)
    start_s = time.perf_counter() - started
    tables, read_wall_s, read_s = _timed(lambda: _read(folder, units, columns))
    images = [image for table in tables for image in image_values(table[columns.image])]
    captions = [caption for table in tables for caption in text_values(table[columns.caption])]
    labeled = TableLabeler(labeler, columns, KeptScores.parse(config.scores))(tables[0])
    shown: Sequence[Image | Row] = images
    decode_s, num_threads = 0.0, 0
    if config.decode != "gpu":
        # Beside the model threads decode, in a pool processes: what a CPU gets done is not the same.
        num_threads = pool.num_threads if config.decode == "beside" else 1
        decoder = RowDecoder(bundle.model_config.fusion, bundle.model_config.image_size, num_threads)
        shown, decode_s, _ = _timed(lambda: decoder.submit(images, captions)())
    model_s = min(_timed(lambda: labeler(shown, captions))[1] for _ in range(MODEL_REPEATS))
    num_rows = len(images)
    write_s, write_wall_s = _write(labeled, units[0][0], scratch_uri)
    return Costs(
        read=read_s / num_rows,
        decode=decode_s * num_threads / num_rows,
        model=model_s / num_rows,
        write=write_s / labeled.num_rows,
        read_wall=read_wall_s / num_rows,
        write_wall=write_wall_s / labeled.num_rows,
        start=start_s,
    )


def _read(folder: Folder, units: Sequence[tuple[DataFile, Unit]], columns: Columns) -> list[pa.Table]:
    """Read units as a job reads them, images that rows name by URI included."""
    return [
        fetch_images(rows, columns.image, columns.image_prefixes)
        for file, unit in units
        for _, _, rows in read_units(folder, file, [unit], salvage=True)
    ]


def _write(labeled: pa.Table, file: DataFile, scratch_uri: str | None) -> tuple[float, float]:
    """Commit a shard, and take it away again; gives the seconds that the commit took: of a CPU, and in all.

    Where files have several shards, each row is written twice, by other tasks: in its piece, and as the piece
    is joined.
    """
    alone = replace(file, path="_bench.parquet", num_rows=labeled.num_rows, units=((0, labeled.num_rows),))
    with TemporaryDirectory() as local:
        scratch = Folder(scratch_uri or local)
        committer = Committer(scratch, "bench")
        shard = Shard(alone.path, 0, alone.num_rows)
        _, wall_s, cpu_s = _timed(lambda: committer.commit(shard, labeled, alone))
        scratch.remove(path for path in scratch.list() if "_bench.parquet" in path)
    return cpu_s * (2 if len(file.shards) > 1 else 1), wall_s


def predict(costs: Costs, pool: Pool, there: Resources, num_rows: int) -> Forecast:
    """Put the costs of the stages together.

    Without GPUs the stages share the CPUs, and their costs add up. With them the model has its GPUs to
    itself. Tasks that wait for storage need no CPU, but there are only so many. The job goes as fast as the
    slowest of these. Of actors that share a GPU one was measured, alone; together they do more.
    """
    workers = min(pool.maximum * pool.num_gpus, there.gpus) if pool.num_gpus else pool.maximum
    cpus = there.cpus if pool.num_gpus else min(there.cpus, workers * pool.num_threads)
    on_cpus = {"read": costs.read, "decode": costs.decode, "write": costs.write}
    if not pool.num_gpus:
        on_cpus["model"] = costs.model * pool.num_threads
    rates = {stage: cpus / cost for stage, cost in on_cpus.items() if cost}
    rates["read"] = min(rates["read"], pool.num_tasks / costs.read_wall)
    rates["write"] = min(rates["write"], pool.num_tasks / costs.write_wall)
    if pool.num_gpus:
        rates["model"] = workers / costs.model
    together, slowest = cpus / sum(on_cpus.values()), min(rates, key=lambda stage: rates[stage])
    if rates[slowest] < together:
        return Forecast(num_rows, costs, rates, rates[slowest], slowest)
    return Forecast(num_rows, costs, rates, together, max(on_cpus, key=lambda stage: on_cpus[stage]))


def as_table(found: Forecast) -> Table:
    """Lay a forecast out for people."""
    table = Table(title=f"{found.num_rows:,} rows: {found.rows_per_s:,.0f} a second")
    for name in ("stage", "ms a row, one worker", "with waiting", "rows/s, if it had the cluster to itself"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    waiting = {"read": found.costs.read_wall, "write": found.costs.write_wall}
    for stage, rate in found.rates.items():
        mark = " (the limit)" if stage == found.limit else ""
        wall = f"{1000 * waiting[stage]:.3f}" if stage in waiting else ""
        table.add_row(f"{stage}{mark}", f"{1000 * getattr(found.costs, stage):.3f}", wall, f"{rate:,.0f}")
    return table


def _timed(work: Callable[[], Result]) -> tuple[Result, float, float]:
    """Do some work; gives its result, and its seconds: in all, and of CPUs."""
    started, cpu_started = time.perf_counter(), time.process_time()
    done = work()
    return done, time.perf_counter() - started, time.process_time() - cpu_started
