"""The labeling job: plan -> read -> score on actors -> commit, streamed by Ray Data."""

from __future__ import annotations

import gc
import json
import logging
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from threading import Event, Thread
from typing import Any, TypeVar

import ray
import ray.data
from ray.data import Datasink
from ray.data.block import Block
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mmray.bundle import Bundle
from mmray.config import Columns, ComputeConfig, LabelConfig
from mmray.errors import BudgetError, OutputError, find_error
from mmray.images import DECODER
from mmray.parquet import (
    MAX_SHARD_BYTES,
    MAX_SHARD_ROWS,
    DataFile,
    describe_files,
    find_files,
)
from mmray.progress import Progress
from mmray.schema import (
    Status,
    passthrough_names,
    require_columns,
    require_kinds,
)
from mmray.scoring import Pool, score_shards, small_blocks, unpack
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
    finished_manifest,
)
from mmray.storage import Folder, visible

log = logging.getLogger(__name__)

Result = TypeVar("Result")


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
    if f"{output}/".startswith(f"{Folder(input_uri)}/"):
        raise OutputError(f"{output} lies in the input {folder}: the next run would label its own labels")
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
    renamed: dict[str, str] = {}
    for file, schema in described:
        needed = {"--image-column": columns.image, "--caption-column": columns.caption}
        require_columns(schema, needed, f"{folder}/{file.path}")
        require_kinds(schema, columns.image, columns.caption, f"{folder}/{file.path}")
        names = passthrough_names(schema, columns.image)
        renamed |= {before: after for before, after in names.items() if before != after}
    for before, after in renamed.items():
        log.info("the input has a column %s: it becomes %s in the output", before, after)
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
    manifest = finished_manifest(output, plan)
    if manifest and not work.pending and not work.unjoined:
        return LabelingResult(
            plan.num_rows, manifest["counts"], len(plan.files), plan.num_shards, plan.num_shards, 0
        )
    num_resumed = plan.num_shards - work.num_pending
    if num_resumed:
        log.info("resuming: %d of %d shards are committed", num_resumed, plan.num_shards)
    ledger = start_ledger(plan, config)
    committer = Committer(output, plan.fingerprint)
    if work.pending:
        with small_blocks(), watched(ledger, work if progress else None):
            executed(
                lambda: score_shards(folder, work, bundle, columns, config, pool).write_datasink(
                    ShardSink(committer, ledger), ray_remote_args={"num_cpus": 0.25}
                )
            )
    records = complete(committer, plan, ray.get(ledger.records.remote()))
    totals = sum((Counter(record.counts) for record in records), Counter[str]())
    check_budget(totals, plan.num_rows, config.max_failed_fraction)
    manifest = finish(output, plan, records, versions())
    seconds = time.monotonic() - started
    return LabelingResult(
        plan.num_rows, manifest["counts"], len(records), plan.num_shards, num_resumed, seconds
    )


def executed(run: Callable[[], Result]) -> Result:
    """Run something on Ray Data, and raise users' errors as they were raised, without Ray's around them."""
    try:
        return run()
    except Exception as error:
        known = find_error(error)
        if known is None:
            raise
    # Ray's error holds its frames, these hold the actors, and actors hold CPUs that the next run waits for.
    gc.collect()
    raise known


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
        self.shards: set[Shard] = set()
        self.files: dict[str, FileRecord] = {}
        self.counts: Counter[str] = Counter()

    def add(self, shard: Shard, counts: dict[str, int], record: FileRecord | None) -> None:
        """Note a committed shard; one that a retry commits again counts once.

        Raises:
            BudgetError: too many rows have failed.
        """
        if shard not in self.shards:
            self.shards.add(shard)
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


def start_ledger(plan: Plan, config: LabelConfig) -> Any:
    """Start the ledger on the driver's own node: it must not be lost with a node that comes and goes."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(num_cpus=0, scheduling_strategy=here)(Ledger)
    return actor.remote(plan.num_rows, config.max_failed_fraction)


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
    found = executed(lambda: ray.data.from_items(missing).map(read_back, num_cpus=0.5).take_all())
    return [*records.values(), *(FileRecord(*json.loads(row["record"])) for row in found)]


def versions() -> dict[str, str]:
    """Give the versions that made an output."""
    names = ("mmray", "ray", "torch", "timm", "transformers", "pyarrow", "pillow")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


@contextmanager
def watched(ledger: Any, work: Work | None) -> Iterator[None]:
    """Show, twice a second, what the ledger counts of some work; nothing for None."""
    if work is None:
        yield
        return
    stop = Event()

    num_pending = work.num_pending

    def watch(progress: Progress) -> None:
        stopping = False
        while not stopping:
            stopping = stop.wait(0.5)
            with suppress(ray.exceptions.RayError):  # the job itself says what is wrong
                num_shards, counts = ray.get(ledger.state.remote())
                shards = f"{num_shards}/{num_pending}"
                progress.update(sum(counts.values()), shards=shards, failed=counts.get(Status.FAILED, 0))

    with Progress("label", work.num_rows, "rows") as progress:
        thread = Thread(target=watch, args=(progress,), name="progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
