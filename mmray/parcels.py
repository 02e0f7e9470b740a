"""Parcels: shards as rows of Ray's blocks.

Ray moves shards, not rows: a row of its blocks is one shard, its rows serialised as Arrow beside their place
in the plan. So types pass through untouched, input files may differ in their columns, and however Ray bundles
or slices its blocks, a shard stays whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from mmray import errors, retry
from mmray.parquet import DataFile
from mmray.plan import Shard


class Parcel(NamedTuple):
    """A shard on its way through the cluster, or the error that ended its way."""

    file: DataFile
    """On its way without its units."""
    shard: Shard
    rows: pa.Table | None = None
    """Of the input, before they are scored; of the output after."""
    earlier: pa.Table | None = None
    """The same rows, as an earlier output has them."""
    error: Exception | None = None

    @property
    def is_done(self) -> bool:
        """Whether there is nothing to score, since no row failed earlier."""
        return self.earlier is not None and not retry.has_failed(self.earlier)

    def packed(self) -> pa.Table:
        """Make it one row: file, first, end, rows and earlier (Arrow streams), and error (JSON)."""
        return pa.table(
            {
                "file": [replace(self.file, units=()).to_json()],  # a large file has thousands of them
                "first": [self.shard.first],
                "end": [self.shard.end],
                "rows": _packed(self.rows),
                "earlier": _packed(self.earlier),
                "error": pa.array([self.error and errors.to_json(self.error)], pa.string()),
            }
        )


def unpack(packed: pa.Table) -> Iterator[Parcel]:
    """Give the parcels of packed rows."""
    for file_json, first, end, *contents, error in zip(*packed.columns, strict=True):
        file = DataFile.from_json(file_json.as_py())
        rows, earlier = map(_unpacked, contents)
        failure = errors.from_json(error.as_py()) if error.is_valid else None
        yield Parcel(file, Shard(file.path, first.as_py(), end.as_py()), rows, earlier, failure)


def _packed(rows: pa.Table | None) -> pa.Array:
    if rows is None:
        return pa.nulls(1, pa.large_binary())
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema) as stream:
        stream.write_table(rows)
    content = sink.getvalue()
    offsets = pa.py_buffer(np.array([0, content.size], np.int64))
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, content])  # no copy of the images


def _unpacked(content: pa.LargeBinaryScalar) -> pa.Table | None:
    return pa.ipc.open_stream(content.as_buffer()).read_all() if content.is_valid else None
