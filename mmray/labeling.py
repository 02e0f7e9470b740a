"""The labeling job: plan -> read -> score on actors -> commit, streamed by Ray Data.

Ray moves shards, not rows: a row of its blocks is one shard, its rows serialised as Arrow beside their place
in the plan. So types pass through untouched, input files may differ in their columns, and however Ray bundles
or slices its blocks, a shard stays whole.
"""

from __future__ import annotations

import json
import logging
import platform
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from threading import Event, Thread
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext, Datasink, Datasource, ReadTask
from ray.data.block import Block, BlockMetadata

from mmray.bundle import Bundle
from mmray.config import Columns, ComputeConfig, LabelConfig, Workers
from mmray.datasets import (
    MAX_SHARD_BYTES,
    MAX_SHARD_ROWS,
    DataFile,
    Unit,
    describe_files,
    find_files,
    read_units,
)
from mmray.errors import BudgetError, ConfigError, OutputError
from mmray.images import DECODER
from mmray.progress import Progress
from mmray.schema import (
    KeptScores,
    Status,
    image_bytes,
    output_schema,
    passthrough_names,
    prediction_fields,
    require_columns,
    require_kinds,
)
from mmray.shards import (
    MANIFEST,
    SUCCESS,
    Committer,
    FileRecord,
    Plan,
    Shard,
    Work,
    cut_to,
    find_work,
    finish,
    shards_of,
)
from mmray.storage import Folder, visible

log = logging.getLogger(__name__)

READ_TASK_ROWS = 1000
"""Small files are read together, up to about this many rows a task."""

BLOCK_BYTES = 8 << 20
"""Shards share a block up to this size. Ray cuts blocks between rows, and a row is a shard: none is torn."""


@dataclass(frozen=True)
class LabelingResult:
    """What a labeling run did."""

    num_rows: int
    counts: dict[str, int]
    num_files: int
    num_shards: int
    num_resumed: int
    """Shards that an earlier run had committed."""
    seconds: float

    def summary(self) -> str:
        """Say it in a line."""
        rows = ", ".join(f"{count:,} {status}" for status, count in self.counts.items())
        line = f"{self.num_rows:,} rows labeled ({rows}) in {self.num_files:,} files, {self.seconds:.0f} s"
        if self.num_resumed:
            line += f"; {self.num_resumed:,} of {self.num_shards:,} shards were there"
        return line


def plan_labeling(
    input_uri: str,
    bundle: Bundle,
    output: Folder,
    columns: Columns,
    config: LabelConfig,
    *,
    extend: bool = False,
    dry_run: bool = False,
) -> tuple[Folder, Plan]:
    """Find the output's plan, or make and publish it.

    Returns:
        The input's folder, and the plan.

    Raises:
        DataError: the input is unusable, or is not the one that was planned.
        OutputError: the output belongs to another job.
    """
    folder, files = find_files(input_uri)
    settings = labeling_settings(bundle, columns, config)
    plan = Plan.load(output)
    if plan is None:
        if strays := [path for path in output.list(".parquet") if visible(path)]:
            raise OutputError(f"{output} holds {strays[0]}, which no plan knows; choose an empty --output")
        plan, added = Plan((), settings), files
    else:
        plan.refuse_other(settings, output)
        added = plan.compare_input(files)
        if added and not extend:
            if config.limit is None:
                log.warning("%d input files came after the plan; --extend labels them too", len(added))
            return folder, plan
    if not added:
        return folder, plan
    described = describe_files(folder, added, columns.image)
    for file, schema in described:
        needed = {"--image-column": columns.image, "--caption-column": columns.caption}
        require_columns(schema, needed, f"{folder}/{file.path}")
        require_kinds(schema, columns.image, columns.caption, f"{folder}/{file.path}")
        passthrough_names(schema, columns.image)
    left = None if config.limit is None else config.limit - plan.num_rows
    new = cut_to((file for file, _ in described), left)
    if dry_run or not new:  # the latter: the limit was reached before these files
        return folder, replace(plan, files=plan.files + new)
    output.remove([SUCCESS, MANIFEST] if plan.parts else [])
    return folder, plan.append(output, new)


def labeling_settings(bundle: Bundle, columns: Columns, config: LabelConfig) -> dict[str, Any]:
    """Give all that the labels depend on. Workers, batch size, device and budget are not among it."""
    return {
        "bundle": bundle.fingerprint,
        "labels": list(bundle.vocabulary.labels),
        "thresholds": bundle.thresholds.tolist(),
        "columns": {"image": columns.image, "caption": columns.caption},
        "image_size": bundle.model_config.image_size,
        "decoder": DECODER,
        "precision": config.precision,
        "scores": config.scores,
        "limit": config.limit,
        "shards": {"rows": MAX_SHARD_ROWS, "bytes": MAX_SHARD_BYTES},
    }


def label_dataset(
    input_uri: str,
    model_uri: str,
    output_uri: str,
    columns: Columns | None = None,
    config: LabelConfig | None = None,
    compute: ComputeConfig | None = None,
    *,
    extend: bool = False,
    dry_run: bool = False,
    progress: bool = False,
) -> LabelingResult:
    """Label a Parquet dataset of images and captions, or go on where an earlier run stopped.

    Args:
        input_uri: folder of Parquet files, or one file.
        model_uri: the bundle.
        output_uri: folder for one labeled file for each input file.
        columns: names of the input's columns.
        config: what is written.
        compute: where the work runs.
        extend: also label input files that came after the plan.
        dry_run: only say what there is to do; writes nothing.
        progress: show how the run goes, on stderr.

    Raises:
        DataError: the input is unusable, or is not the one that was planned.
        BundleError: the bundle is incomplete, damaged or of another version.
        OutputError: the output belongs to another job; BudgetError: too many rows failed.
    """
    columns, config, compute = columns or Columns(), config or LabelConfig(), compute or ComputeConfig()
    started = time.monotonic()
    bundle, output = Bundle.load(model_uri), Folder(output_uri)
    pool = Pool.on_cluster(compute)
    config = pool.settle_precision(config)
    folder, plan = plan_labeling(input_uri, bundle, output, columns, config, extend=extend, dry_run=dry_run)
    work = find_work(output, plan)
    if dry_run:
        return LabelingResult(
            plan.num_rows, {}, len(plan.files), plan.num_shards, plan.num_shards - work.num_pending, 0
        )
    num_resumed = plan.num_shards - work.num_pending
    if num_resumed:
        log.info("resuming: %d of %d shards are committed", num_resumed, plan.num_shards)
    ledger = ray.remote(num_cpus=0)(Ledger).remote(plan.num_rows, config.max_failed_fraction)
    committer = Committer(output, plan.fingerprint)
    if work.pending:
        with small_blocks(), watched(ledger, work if progress else None):
            score_shards(folder, work, bundle, columns, config, pool).write_datasink(
                ShardSink(committer, ledger), ray_remote_args={"num_cpus": 0.25}
            )
    records = complete(committer, plan, ray.get(ledger.records.remote()))
    totals = sum((Counter(record.counts) for record in records), Counter[str]())
    check_budget(totals, plan.num_rows, config.max_failed_fraction)
    manifest = finish(output, plan, records, versions())
    seconds = time.monotonic() - started
    return LabelingResult(
        plan.num_rows, manifest["counts"], len(records), plan.num_shards, num_resumed, seconds
    )


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
        held = READ_TASK_ROWS
        for file, units in self.work.pending:
            for unit in units:
                num_rows = unit[-1] - unit[0]
                if held + num_rows > READ_TASK_ROWS or file.image_bytes > MAX_SHARD_BYTES:
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
                for first, end, rows in read_units(folder, file, [unit]):
                    if Shard(file.path, first, end) not in committed:
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
        self.labeler = Labeler(
            bundle, batch_size=config.batch_size, precision=config.precision, num_threads=num_threads
        )

    def __call__(self, packed: pa.Table) -> Iterator[pa.Table]:
        """Score shards."""
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


class ShardSink(Datasink[None]):
    """Commits scored shards, and joins the files that they complete."""

    def __init__(self, committer: Committer, ledger: Any) -> None:
        """Take who commits and who counts."""
        self.committer, self.ledger = committer, ledger

    def write(self, blocks: Iterable[Block], ctx: Any) -> None:
        """Commit the shards of some blocks.

        Raises:
            BudgetError: too many rows have failed. What is committed stays.
        """
        for block in blocks:
            for file, shard, rows in unpack(block):
                record = self.committer.commit(shard, rows, file)
                ray.get(self.ledger.add.remote(shard, Counter(rows["status"].to_pylist()), record))


class Ledger:
    """Counts what this run has committed, for the progress line, the budget and the manifest."""

    def __init__(self, num_rows: int, max_failed_fraction: float) -> None:
        """Take the budget."""
        self.num_rows, self.max_failed_fraction = num_rows, max_failed_fraction
        self.shards: dict[Shard, dict[str, int]] = {}
        self.files: dict[str, FileRecord] = {}
        self.counts: Counter[str] = Counter()

    def add(self, shard: Shard, counts: dict[str, int], record: FileRecord | None) -> None:
        """Note a committed shard; one that a retry commits again counts once.

        Raises:
            BudgetError: too many rows have failed.
        """
        if shard not in self.shards:
            self.shards[shard] = counts
            self.counts.update(counts)
        if record:
            self.files[record.path] = record
        check_budget(self.counts, self.num_rows, self.max_failed_fraction)

    def state(self) -> tuple[int, dict[str, int]]:
        """Give the shards that were committed, and the rows by status."""
        return len(self.shards), self.counts

    def records(self) -> dict[str, FileRecord]:
        """Give the files that were completed."""
        return self.files


def check_budget(counts: Mapping[str, int], num_rows: int, max_failed_fraction: float) -> None:
    """Hold the failed rows against the budget.

    Raises:
        BudgetError: they are above it.
    """
    failed = counts.get(Status.FAILED, 0)
    if failed > max_failed_fraction * num_rows:
        raise BudgetError(
            f"{failed} of {num_rows} rows failed, above --max-failed-fraction {max_failed_fraction}; "
            f"the reasons stand in the output's error column and, for joined files, in _mmray/rejected/"
        )


def complete(committer: Committer, plan: Plan, records: dict[str, FileRecord]) -> list[FileRecord]:
    """Join what is left to join, and read back the files that earlier runs completed.

    Raises:
        OutputError: a file is not of this job, or shards are still missing.
    """

    def read_back(row: dict[str, Any]) -> dict[str, Any]:
        file = DataFile.from_json(row["item"])
        record = committer.join(file) if len(file.shards) > 1 else None
        return {"record": json.dumps(record or committer.describe(file))}

    missing = [file.to_json() for file in plan.files if file.path not in records]
    if not missing:
        return list(records.values())
    found = ray.data.from_items(missing).map(read_back, num_cpus=0.5).take_all()
    return [*records.values(), *(FileRecord(*json.loads(row["record"])) for row in found)]


def versions() -> dict[str, str]:
    """Give the versions that made an output."""
    names = ("mmray", "ray", "torch", "timm", "transformers", "pyarrow", "pillow")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


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


@contextmanager
def watched(ledger: Any, work: Work | None) -> Iterator[None]:
    """Show, twice a second, what the ledger counts of some work; nothing for None."""
    if work is None:
        yield
        return
    stop = Event()

    def watch(progress: Progress) -> None:
        stopping = False
        while not stopping:
            stopping = stop.wait(0.5)
            with suppress(ray.exceptions.RayError):  # the job itself says what is wrong
                num_shards, counts = ray.get(ledger.state.remote())
                shards = f"{num_shards}/{work.num_pending}"
                progress.update(sum(counts.values()), shards=shards, failed=counts.get(Status.FAILED, 0))

    with Progress("label", work.num_rows, "rows") as progress:
        thread = Thread(target=watch, args=(progress,), name="progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
