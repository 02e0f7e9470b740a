"""An earlier output that another is made of: its failed rows labeled again, or all of them decided again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmray.damage import reading_labels
from mmray.errors import OutputError
from mmray.fingerprints import differences
from mmray.parquet import DataFile
from mmray.plan import Plan, Shard
from mmray.schema import Status
from mmray.shards import MANIFEST, SUCCESS, read_record
from mmray.storage import Folder


class Earlier(NamedTuple):
    """A finished output that another is made of."""

    folder: Folder
    option: str
    """That it was given by."""
    fingerprint: str
    """Of its plan; its files bear it."""
    manifest_sha256: str

    @classmethod
    def find(cls, uri: str, option: str) -> tuple[Earlier, Plan]:
        """Look an output up; gives it and its plan.

        Raises:
            OutputError: it is not finished.
        """
        folder = Folder(uri)
        plan, manifest = Plan.load(folder), folder.read_or_none(MANIFEST)
        if plan is None or manifest is None or folder.read_or_none(SUCCESS) is None:
            raise OutputError(f"{option} {folder}: it is not finished; run the job that makes it to its end")
        return cls(folder, option, plan.fingerprint, hashlib.sha256(manifest).hexdigest()), plan

    def __str__(self) -> str:
        return f"{self.option} {self.folder}"


def require_same_settings(earlier: Earlier, before: Plan, settings: dict[str, Any]) -> None:
    """Check that an output was labeled with these settings.

    Raises:
        OutputError: says what differs.
    """
    if found := differences({**before.settings, "retry_of": None}, settings):
        raise OutputError(
            f"{earlier}: it was labeled with other settings ({'; '.join(found)}); take them again"
        )


def require_same_files(earlier: Earlier, before: Plan, plan: Plan) -> None:
    """Check that a plan is for the files that an output was made of.

    Raises:
        OutputError: it is not; names a file.
    """
    known = {file.path: file for file in before.files}
    for file in plan.files:
        if known.pop(file.path, None) != file:
            raise OutputError(f"{earlier}: it was not made of {file.path} as it is now")
    for path in known:
        raise OutputError(f"{earlier}: {path}, which it was made of, is not in the input")


def read_shards(earlier: Earlier, file: DataFile, shards: Sequence[Shard]) -> Iterator[pa.Table]:
    """Read what shards of a file were given: row groups of the output file, as they were committed.

    Args:
        earlier: the output.
        file: of the input.
        shards: of the file.

    Raises:
        OutputError: the file is gone, damaged, or not what its plan says.
    """
    where = f"{earlier}/{file.path}"
    wanted = {"fingerprint": earlier.fingerprint, "input": file.footer_sha256, "num_rows": file.num_rows}
    with reading_labels(where), earlier.folder.open(file.path) as source:
        parquet = pq.ParquetFile(source, pre_buffer=True)
        if not read_record(parquet.metadata).items() >= wanted.items():
            raise OutputError(f"{where} is not what its plan says; verify.py says more")
        row_groups = {bounds: number for number, bounds in enumerate(file.shards)}
        for shard in shards:
            whole = not file.num_rows
            row_group = row_groups[shard.first, shard.end]
            yield parquet.read() if whole else parquet.read_row_group(row_group)


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
