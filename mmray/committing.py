"""Scored shards into the output: tasks commit them, the driver counts and has complete files joined.

What tasks did comes back to the driver as data, a row for each shard. So the budget, the progress line and
the joins need no actor of their own, and a run that must stop just stops asking for more.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import ray
import ray.data

from mmray import errors
from mmray.errors import BudgetError, MmrayError, StorageError
from mmray.lease import Lease
from mmray.parcels import Parcel, unpack
from mmray.parquet import DataFile
from mmray.plan import Plan, Shard, Work
from mmray.pool import Pool
from mmray.progress import Progress
from mmray.schema import Status
from mmray.shards import Committer, FileRecord, Records

OUTCOME = pa.schema(
    [
        ("path", pa.string()),
        ("first", pa.int64()),
        ("end", pa.int64()),
        ("counts", pa.string()),  # JSON, rows by status; null with an error
        ("record", pa.string()),  # JSON, of the file that this shard completed; else null
        ("error", pa.string()),  # JSON, see mmray.errors; null without
    ]
)
"""What became of a shard."""

RECORDS_INTERVAL_S = 10.0
TOLERATED_ERRORS = 20
"""Shards that may fail in passing, for the next pass to take up, before the run is given up."""


def commit_shards(scored: ray.data.Dataset, committer: Committer, pool: Pool) -> Generator[dict[str, Any]]:
    """Commit parcels as they come; gives an `OUTCOME` for each. To be closed: only that ends its actors."""

    def commit(packed: pa.Table) -> Iterator[pa.Table]:
        for parcel in unpack(packed):
            outcome = _commit(committer, parcel)
            yield pa.Table.from_pylist([outcome], OUTCOME)

    committed = scored.map_batches(commit, batch_size=1, batch_format="pyarrow", **pool.tasks())
    for batch in committed.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield from batch.to_pylist()


def _commit(committer: Committer, parcel: Parcel) -> dict[str, Any]:
    outcome: dict[str, Any] = dict(parcel.shard._asdict())
    try:
        if parcel.error:
            raise parcel.error
        assert parcel.rows is not None
        record = committer.commit(parcel.shard, parcel.rows, parcel.file)
        counts = Counter(parcel.rows["status"].to_pylist())
        return outcome | {"counts": json.dumps(counts), "record": record and json.dumps(record._asdict())}
    except Exception as error:
        return outcome | {"error": errors.to_json(error)}


def describe(committer: Committer, files: Sequence[DataFile]) -> tuple[list[FileRecord], str | None]:
    """Read back files that an earlier run completed; gives their records, or an error as JSON."""
    try:
        return [committer.describe(file) for file in files], None
    except Exception as error:
        return [], errors.to_json(error)


@ray.remote(num_cpus=0.5)
def _join(committer: Committer, file: DataFile) -> tuple[str | None, str | None]:
    try:
        record = committer.join(file)
        return record and json.dumps(record._asdict()), None
    except Exception as error:
        return None, errors.to_json(error)


class Tally:
    """What a run has done: rows by status, files that are complete, errors that may pass."""

    def __init__(
        self, plan: Plan, committer: Committer, records: Records, max_failed_fraction: float
    ) -> None:
        """Take what earlier runs have done."""
        self.plan, self.committer, self.records = plan, committer, records
        self.max_failed_fraction = max_failed_fraction
        self.counts: Counter[str] = Counter()
        self.shards: set[Shard] = set()
        self.errors: list[Exception] = []
        self._files: dict[str, DataFile] = {}
        self._missing: Counter[str] = Counter()
        self._joins: list[ray.ObjectRef] = []
        self._published = time.monotonic()

    def run(
        self, outcomes: Iterable[dict[str, Any]], work: Work, lease: Lease, progress: Progress | None
    ) -> None:
        """Follow a pass over some work, and the joins of the files that it completes, to the end.

        Raises:
            BudgetError: too many rows have failed. What is committed stays.
            OutputError: another job has taken the output over.
        """
        self.errors.clear()
        self._files = {file.path: file for file, _ in work.pending}
        self._missing = Counter(shard.path for shard in work.shards())
        for outcome in outcomes:
            lease.check()
            self._add(outcome)
            self._finish_joins(wait=False)
            if progress:
                failed = self.counts[Status.FAILED]
                progress.update(sum(self.counts.values()), shards=len(self.shards), failed=failed)
        # Last, by workers that are there: at first theirs would start beside the model's, and hold that up.
        for file in work.unjoined:
            self._start_join(file)
        self._finish_joins(wait=True)
        self.records.publish()

    def _add(self, outcome: dict[str, Any]) -> None:
        """Note what became of a shard; one that a retry commits again counts once."""
        if outcome["error"]:
            self._note(errors.from_json(outcome["error"]))
            return
        shard = Shard(outcome["path"], outcome["first"], outcome["end"])
        if shard in self.shards:
            return
        self.shards.add(shard)
        self.counts.update(json.loads(outcome["counts"]))
        self.check_budget(self.counts)
        self._missing[shard.path] -= 1
        if outcome["record"]:
            self._keep(outcome["record"])
        elif not self._missing[shard.path]:
            self._start_join(self._files[shard.path])

    def _note(self, error: Exception) -> None:
        """Raise what a user must mend; remember what may pass, unless it is too much."""
        self.errors.append(error)
        users = isinstance(error, MmrayError) and not isinstance(error, StorageError)
        if users or len(self.errors) > TOLERATED_ERRORS:
            raise error

    def _start_join(self, file: DataFile) -> None:
        self._joins.append(_join.remote(self.committer, file))

    def _finish_joins(self, *, wait: bool) -> None:
        while self._joins:
            ready, self._joins = ray.wait(self._joins, timeout=None if wait else 0)
            if not ready:
                break
            record, error = ray.get(ready[0])
            if error:
                self._note(errors.from_json(error))
            elif record:
                self._keep(record)

    def _keep(self, record: str) -> None:
        self.records.add(FileRecord(**json.loads(record)))
        if time.monotonic() - self._published > RECORDS_INTERVAL_S:
            self.records.publish()
            self._published = time.monotonic()

    def check_budget(self, counts: Counter[str]) -> None:
        """Hold the failed rows against the budget.

        Raises:
            BudgetError: they are above it.
        """
        failed = counts[Status.FAILED]
        if failed > self.max_failed_fraction * self.plan.num_rows:
            raise BudgetError(
                f"{failed} of {self.plan.num_rows} rows failed, above --max-failed-fraction "
                f"{self.max_failed_fraction}; the reasons stand in the output's error column and, for joined "
                "files, in _mmray/rejected/"
            )
