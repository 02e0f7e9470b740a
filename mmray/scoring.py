"""Shards through the cluster: read by tasks, scored by an actor pool.

Ray moves shards, not rows: a row of its blocks is one shard, its rows serialised as Arrow beside their place
in the plan. So types pass through untouched, input files may differ in their columns, and however Ray bundles
or slices its blocks, a shard stays whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext, Datasource, ReadTask
from ray.data.block import BlockMetadata

from mmray.bundle import Bundle
from mmray.config import Columns, ComputeConfig, LabelConfig, Workers
from mmray.errors import ConfigError, MmrayError
from mmray.parquet import MAX_SHARD_BYTES, DataFile, Unit, read_units
from mmray.schema import KeptScores, image_bytes, output_schema, passthrough_names, prediction_fields
from mmray.shards import Shard, Work, shards_of
from mmray.storage import Folder

READ_TASK_ROWS = 1000
"""Small files are read together, up to about this many rows a task."""

BLOCK_BYTES = 8 << 20
"""Shards share a block up to this size. Ray cuts blocks between rows, and a row is a shard: none is torn."""


def score_shards(
    folder: Folder, work: Work, bundle: Bundle, columns: Columns, config: LabelConfig, pool: Pool
) -> ray.data.Dataset:
    """Read the shards of some work and score them: packed rows of labeled tables."""
    return ray.data.read_datasource(ShardSource(folder, work), num_cpus=0.5).map_batches(
        ScoreShards,
        fn_constructor_args=(bundle, columns, config, pool.num_threads),
        batch_size=1,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(min_size=pool.minimum, max_size=pool.maximum),
        num_cpus=pool.num_cpus,
        num_gpus=pool.num_gpus,
    )


class Pool(NamedTuple):
    """The actors that score: how many, and what each asks for."""

    minimum: int
    maximum: int
    num_cpus: float
    num_gpus: float
    num_threads: int

    @classmethod
    def on_cluster(cls, compute: ComputeConfig) -> Pool:
        """Size the pool for the cluster that is there.

        Raises:
            ConfigError: GPUs are asked for, and the cluster has none.
        """
        resources = ray.cluster_resources()
        cpus, gpus = resources.get("CPU", 1), int(resources.get("GPU", 0))
        use_gpu = compute.use_gpu if compute.use_gpu is not None else gpus > 0
        if use_gpu and not gpus:
            raise ConfigError("--use-gpu: the cluster has no GPU; use --no-gpu, or submit to one that has")
        num_nodes = sum(node["Alive"] and node["Resources"].get("CPU", 0) > 0 for node in ray.nodes())
        workers = Workers.parse(compute.num_workers or (gpus if use_gpu else num_nodes))
        share = cpus / workers.maximum
        if use_gpu:
            return cls(workers.minimum, workers.maximum, 1, 1, max(1, int(share)))
        # Reading and committing need a CPU beside the actors, or they would wait for one another.
        num_cpus = max(1, int(share) - 1) if share >= 2 else share / 2
        return cls(workers.minimum, workers.maximum, num_cpus, 0, max(1, int(share)))

    def settle_precision(self, config: LabelConfig) -> LabelConfig:
        """Fill in the precision that the device does best, unless one is asked for."""
        return replace(config, precision=config.precision or ("bf16" if self.num_gpus else "fp32"))


class ShardSource(Datasource):
    """Reads the units of a plan that hold uncommitted shards; gives each of these shards as one row."""

    def __init__(self, folder: Folder, work: Work) -> None:
        """Take the input's folder and what is to be done."""
        super().__init__()
        self.folder, self.work = folder, work

    def estimate_inmemory_data_size(self) -> int:
        """Estimate the bytes of encoded images that will be read."""
        return sum(file.image_bytes for file, _ in self.work.pending)

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        """Give a task for each unit; small ones share a task."""
        tasks: list[list[tuple[DataFile, Unit]]] = []
        held = 0
        for file, units in self.work.pending:
            for unit in units:
                num_rows = unit[-1] - unit[0]
                if not tasks or held + num_rows > READ_TASK_ROWS or file.image_bytes > MAX_SHARD_BYTES:
                    tasks.append([])
                    held = 0
                tasks[-1].append((file, unit))
                held += num_rows
        return [self._task(task) for task in tasks]

    def _task(self, units: list[tuple[DataFile, Unit]]) -> ReadTask:
        folder = self.folder
        committed = {shard for file, unit in units for shard in shards_of(file, [unit])} & self.work.committed

        def read() -> Iterator[pa.Table]:
            for file, unit in units:
                # A row group is read in order: only what stands behind the last wanted shard can be skipped.
                wanted = [shard for shard in shards_of(file, [unit]) if shard not in committed]
                needed = tuple(row for row in unit if row <= wanted[-1].end)
                for first, end, rows in read_units(folder, file, [needed]):
                    if Shard(file.path, first, end) in wanted:
                        yield pack(file, first, end, rows)

        num_bytes = sum(
            file.image_bytes * (unit[-1] - unit[0]) // max(1, file.num_rows) for file, unit in units
        )
        metadata = BlockMetadata(num_rows=len(units), size_bytes=num_bytes, exec_stats=None, input_files=None)
        return ReadTask(read, metadata)


def pack(file: DataFile, first: int, end: int, rows: pa.Table) -> pa.Table:
    """Make one row of a shard: file: string, first and end: int64, rows: large_binary, an Arrow stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema) as stream:
        stream.write_table(rows)
    content = sink.getvalue()
    offsets = pa.py_buffer(np.array([0, content.size], np.int64))
    packed = pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, content])  # no copy of the images
    return pa.table({"file": [file.to_json()], "first": [first], "end": [end], "rows": packed})


def unpack(packed: pa.Table) -> Iterator[tuple[DataFile, Shard, pa.Table]]:
    """Give the shards of packed rows."""
    for file_json, first, end, content in zip(*(packed[name] for name in packed.column_names), strict=True):
        file = DataFile.from_json(file_json.as_py())
        rows = pa.ipc.open_stream(content.as_buffer()).read_all()
        yield file, Shard(file.path, first.as_py(), end.as_py()), rows


class ScoreShards:
    """An actor of the pool: the model is loaded once, shards come and go."""

    def __init__(self, bundle: Bundle, columns: Columns, config: LabelConfig, num_threads: int) -> None:
        """Load the model."""
        import torch

        from mmray.labeler import Labeler

        torch.set_num_threads(num_threads)  # Ray sets one thread for each CPU that was asked for
        self.columns, self.kept = columns, KeptScores.parse(config.scores)
        self.bundle, self.fingerprint = bundle, bundle.fingerprint
        assert config.precision is not None
        self.refusal: MmrayError | None = None
        try:
            self.labeler = Labeler(
                bundle, batch_size=config.batch_size, precision=config.precision, num_threads=num_threads
            )
        except MmrayError as error:  # damaged weights; raised here, Ray would pass on no more than its text
            self.refusal = error

    def __call__(self, packed: pa.Table) -> Iterator[pa.Table]:
        """Score shards.

        Raises:
            BundleError: the weights are damaged or belong to another model.
        """
        if self.refusal:
            raise self.refusal
        for file, shard, rows in unpack(packed):
            yield pack(file, shard.first, shard.end, self.label(rows))

    def label(self, rows: pa.Table) -> pa.Table:
        """Replace the image column by the predictions."""
        labeled = self.labeler(image_bytes(rows[self.columns.image]), rows[self.columns.caption].to_pylist())
        vocabulary, valid = self.bundle.vocabulary, labeled.valid
        fields = prediction_fields(vocabulary, self.kept)
        predictions = {
            "predicted_labels": vocabulary.decode(labeled.decided, valid),
            "status": pa.array([str(status) for status in labeled.statuses], pa.string()),
            "error": pa.array(labeled.errors, pa.string()),
            "model": pa.array([self.fingerprint] * rows.num_rows, pa.string()),
        }
        if self.kept.top != 0:
            predictions["scores"] = self.kept.array(labeled.scores, valid, vocabulary)
        passed = [rows[name] for name in passthrough_names(rows.schema, self.columns.image)]
        columns = [*passed, *(predictions[field.name] for field in fields)]
        return pa.Table.from_arrays(columns, schema=output_schema(rows.schema, self.columns.image, fields))


@contextmanager
def small_blocks() -> Iterator[None]:
    """Let blocks be small: tiny shards share one, a large shard has its own and moves on once it is read."""
    context = DataContext.get_current()
    before = context.target_max_block_size
    context.target_max_block_size = BLOCK_BYTES
    try:
        yield
    finally:
        context.target_max_block_size = before
