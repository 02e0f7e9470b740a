"""The labeling job: plan -> read -> score on actors -> commit, streamed by Ray Data."""

from __future__ import annotations

import logging
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

import ray.data

from mmray import errors
from mmray.bundle import Bundle
from mmray.cli import ONE_NOTICE_S
from mmray.committing import Tally, commit_shards, describe
from mmray.config import Columns, ComputeConfig, LabelConfig
from mmray.errors import StorageError
from mmray.lease import Lease
from mmray.parquet import find_files
from mmray.plan import Plan, Work, find_work
from mmray.planning import plan_labeling, refuse_inside
from mmray.pool import Pool
from mmray.progress import Progress
from mmray.resources import spread
from mmray.retry import Earlier
from mmray.scoring import Scorer, score_shards, streaming
from mmray.shards import Committer, Records, count_rows, finish, finished_manifest
from mmray.storage import Folder

log = logging.getLogger(__name__)

GRACE_S = 10.0
"""Time for commits that are under way when the job is told to end."""


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


def label_dataset(
    input_uri: str,
    model_uri: str,
    output_uri: str,
    columns: Columns | None = None,
    config: LabelConfig | None = None,
    compute: ComputeConfig | None = None,
    *,
    retry_failed_uri: str | None = None,
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
        retry_failed_uri: a finished output of the same settings; only its failed rows are labeled again.
        extend: also label input files that came after the plan.
        dry_run: only say what there is to do; writes nothing.
        progress: show how the run goes, on stderr.

    Raises:
        DataError: the input is unusable, or is not the one that was planned.
        BundleError: the bundle is incomplete, damaged or of another version.
        OutputError: the output belongs to another job; BudgetError: too many rows failed.
        ConfigError: a GPU is asked for, and the cluster has none; ClusterError: it has no CPU yet.
        StorageError: shards are left whose storage failed, or whose workers died; the same call resumes.
    """
    columns, config, compute = columns or Columns(), config or LabelConfig(), compute or ComputeConfig()
    started = time.monotonic()
    bundle, output = Bundle.load(model_uri), Folder(output_uri)
    pool = Pool.on_cluster(compute, config)
    earlier = Earlier.find(retry_failed_uri, "--retry-failed") if retry_failed_uri else None
    config = pool.settle(config)
    scorer = Scorer(bundle, columns, config, pool, earlier=earlier and earlier[0])
    folder, files = find_files(input_uri)
    refuse_inside(output, Folder(input_uri))
    with nullcontext() if dry_run else Lease(output) as lease:
        plan = plan_labeling(
            *(folder, files, bundle, output, columns, config),
            earlier=earlier,
            extend=extend,
            dry_run=dry_run,
        )
        score, budget = partial(score_shards, folder, scorer=scorer), config.max_failed_fraction
        return label_planned(output, plan, score, pool, lease, started, budget, progress=progress)


def label_planned(
    output: Folder,
    plan: Plan,
    score: Callable[[Work], ray.data.Dataset],
    pool: Pool,
    lease: Lease | None,
    started: float,
    max_failed_fraction: float = 1.0,
    *,
    progress: bool,
) -> LabelingResult:
    """Label what a plan still lacks, and finish the output; done before, nothing is.

    Args:
        output: of the job.
        plan: of the output.
        score: gives the labeled parcels of some work.
        pool: how many tasks commit at a time.
        lease: on the output; without, nothing is labeled.
        started: when the job was, on the monotonic clock.
        max_failed_fraction: of the planned rows; more than this end the job.
        progress: show how the run goes, on stderr.

    Raises:
        BudgetError: too many rows have failed.
        OutputError: another job has taken the output over, or a file in it is not this job's.
    """
    work = find_work(output, plan)
    num_resumed = plan.num_shards - work.num_pending
    manifest = None if work else finished_manifest(output, plan)
    if lease and not manifest:
        if num_resumed:
            log.info("resuming: %d of %d shards are committed", num_resumed, plan.num_shards)
        committer, records = Committer(output, plan.fingerprint), Records(output)
        records.forget(work.paths)
        tally = Tally(plan, committer, records, max_failed_fraction)
        with ending_gently(), _shown(work.num_rows, progress) as line:
            _run_passes(work, tally, score, pool, lease, line)
        read_back(committer, plan, records)
        finished = [records.found[file.path] for file in plan.files]
        tally.check_budget(count_rows(finished))
        lease.check()
        manifest = finish(output, plan, finished, versions())
    counts = manifest["counts"] if manifest else {}
    seconds = time.monotonic() - started
    return LabelingResult(plan.num_rows, counts, len(plan.files), plan.num_shards, num_resumed, seconds)


def _run_passes(
    work: Work,
    tally: Tally,
    score: Callable[[Work], ray.data.Dataset],
    pool: Pool,
    lease: Lease,
    line: Progress | None,
) -> None:
    """Do some work, and once more what the first pass leaves, since storage failed or all workers died.

    Raises:
        BudgetError, OutputError: as `Tally.run` does.
        StorageError: shards are left after the second pass.
    """
    output, records = tally.records.output, tally.records
    for last in (False, True):
        if not work:
            return
        if last:
            log.warning("%d shards are left; trying them again", work.num_pending)
        with (
            streaming(pool, tolerant=not last),
            closing(commit_shards(score(work), tally.committer, pool)) as outcomes,
        ):
            tally.run(outcomes if work.pending else (), work, lease, line)
        # Where every record is there, a listing would only say so again, page after page.
        work = Work([], set(), []) if work.paths <= records.found.keys() else find_work(output, tally.plan)
    if work:
        lost = StorageError(
            f"{work.num_pending} shards were lost with their workers; the same command resumes"
        )
        raise tally.errors[0] if tally.errors else lost


def read_back(committer: Committer, plan: Plan, records: Records) -> None:
    """Fill in the records of files that a run completed which was killed before it could publish them.

    Raises:
        OutputError: a file is not of this job.
    """

    missing = [file for file in plan.files if file.path not in records.found]
    for found, error in spread(partial(describe, committer), missing):
        if error:
            raise errors.from_json(error)
        for record in found:
            records.add(record)


@contextmanager
def ending_gently() -> Iterator[None]:
    """Let what is being committed be finished when SIGTERM comes, as it does before a spot machine goes."""
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield
        return

    # A signal to the thread itself: nothing less wakes it where it waits for a lock. The same signal again,
    # since the other one that ends a job, SIGINT, is ignored in what a script starts in the background.
    timer = threading.Timer(GRACE_S, signal.pthread_kill, (threading.get_ident(), signal.SIGTERM))
    timer.daemon = True

    told: list[float] = []

    def end(number: int, frame: object) -> None:
        if not told:
            told.append(time.monotonic())
            log.warning("told to end: finishing what is being committed")
            timer.start()
        elif time.monotonic() - told[0] > ONE_NOTICE_S:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        timer.cancel()
        if told:
            timer.join()  # or its signal might come when nobody here expects it any more
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def versions() -> dict[str, str]:
    """Give the versions that made an output."""
    names = ("mmray", "ray", "torch", "timm", "transformers", "pyarrow", "pillow")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def _shown(num_rows: int, progress: bool) -> Any:
    return Progress("label", num_rows, "rows") if progress else nullcontext()
