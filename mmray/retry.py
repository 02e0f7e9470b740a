"""The failed rows of a finished output, labeled again: into a new output that takes all other rows over."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmray.config import differences
from mmray.errors import OutputError
from mmray.parquet import DataFile
from mmray.plan import Plan, Shard
from mmray.schema import Status
from mmray.shards import require_finished
from mmray.storage import Folder


def identify(earlier: Folder, settings: dict[str, Any]) -> str:
    """Check that an output can be retried with some settings, and give the sha256 of its manifest.

    Raises:
        OutputError: it is not finished, or was labeled with other settings.
    """
    plan, manifest_sha256 = require_finished(earlier, "--retry-failed")
    same = {**plan.settings, "retry_of": None}
    if found := differences(same, settings):
        raise OutputError(
            f"--retry-failed {earlier}: it was labeled with other settings ({'; '.join(found)}); "
            "take them again"
        )
    return manifest_sha256


def require_same_files(earlier: Folder, plan: Plan) -> None:
    """Check that a plan is for the files that an earlier output was made of.

    Raises:
        OutputError: it is not; names a file.
    """
    before = Plan.load(earlier)
    known = {file.path: file for file in before.files} if before else {}
    for file in plan.files:
        if known.pop(file.path, None) != file:
            raise OutputError(f"--retry-failed {earlier}: it was not made of {file.path} as it is now")
    for path in known:
        raise OutputError(f"--retry-failed {earlier}: {path}, which it was made of, is not in the input")


def read_shard(earlier: Folder, file: DataFile, shard: Shard) -> pa.Table:
    """Read what a shard was given: a row group of the output file, as it was committed."""
    with earlier.open(file.path) as source:
        parquet = pq.ParquetFile(source)
        if not file.num_rows:
            return parquet.read()
        return parquet.read_row_group(file.shards.index((shard.first, shard.end)))


def has_failed(labeled: pa.Table) -> bool:
    """Tell whether any row has failed."""
    return bool(pc.any(pc.equal(labeled["status"], str(Status.FAILED)), min_count=0).as_py())


def relabel(label: Callable[[pa.Table], pa.Table], rows: pa.Table, earlier: pa.Table) -> pa.Table:
    """Label the failed rows of a shard, and keep the others as they are.

    Args:
        label: turns input rows into labeled ones.
        rows: of the input.
        earlier: the same rows, labeled.
    """
    failed = pc.equal(earlier["status"], str(Status.FAILED)).to_numpy()
    runs = [*pairwise([0, *(1 + np.flatnonzero(np.diff(failed))), len(failed)])]
    # By slices: Arrow neither filters nor takes the rows of string_view and binary_view.
    again = label(pa.concat_tables(rows.slice(first, end - first) for first, end in runs if failed[first]))
    kept, parts, num_again = earlier.cast(again.schema), [], 0
    for first, end in runs:
        if failed[first]:
            parts.append(again.slice(num_again, end - first))
            num_again += end - first
        else:
            parts.append(kept.slice(first, end - first))
    return pa.concat_tables(parts)
