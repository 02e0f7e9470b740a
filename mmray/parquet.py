"""Parquet files: found, described by their footers, cut into shards, read in a stream. Without Ray.

A *shard* is a range of rows of one file, the unit that is scored and committed. A *unit* is one or more
shards that whole row groups hold, the unit that is read: a row group of 10,000 images is read once, in a
stream, and given out as ten shards.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain, pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmray.columns import holds_uris, refuse_pickles
from mmray.errors import DataError, one_line
from mmray.faults import moment
from mmray.rowgroups import DAMAGE, RowGroups, read_schema
from mmray.storage import Folder, visible

MAX_SHARD_ROWS = 1000
MAX_SHARD_BYTES = 128 << 20
FOOTER_GUESS_BYTES = 64 << 10
UNKNOWN_IMAGE_BYTES = 1 << 20
"""What an image that is named by its URI is taken for, so that a shard of large ones fits into memory too."""

Unit = tuple[int, ...]
"""Rows at which the shards of a unit begin, and the row at which the last one ends."""


@dataclass(frozen=True)
class DataFile:
    """One Parquet file, as its footer describes it."""

    path: str
    size_bytes: int
    num_rows: int
    footer_sha256: str
    image_bytes: int
    units: tuple[Unit, ...]

    @property
    def shards(self) -> list[tuple[int, int]]:
        """First and end row of each shard, in order."""
        return [bounds for unit in self.units for bounds in pairwise(unit)]

    def image_bytes_of(self, unit: Unit) -> int:
        """Estimate the bytes of encoded images in a unit."""
        return self.image_bytes * (unit[-1] - unit[0]) // max(1, self.num_rows)

    def to_json(self) -> str:
        """Write the file's description as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> DataFile:
        """Read what `to_json` wrote."""
        record = json.loads(text)
        return cls(**record | {"units": tuple(map(tuple, record["units"]))})


def find_files(uri: str) -> tuple[Folder, dict[str, int]]:
    """Find the Parquet files of an input: below a folder, or the one file that the URI names.

    Returns:
        The folder, and relative path -> size in bytes, sorted. Paths with a part that begins with `_` or `.`
        are no data.

    Raises:
        DataError: there is none, or one has a name that cannot be written down.
    """
    folder = Folder(uri)
    files = {path: size for path, size in folder.list(".parquet").items() if visible(path)}
    if not files and folder.uri.endswith(".parquet"):
        parent, _, name = folder.uri.rpartition("/")
        folder = Folder(parent or "/")
        files = {path: size for path, size in folder.list(".parquet").items() if path == name}
    if not files:
        raise DataError(f"{uri}: no .parquet file there; prepare.py makes a dataset of images and captions")
    for path in files:
        if posixpath.normpath(path) != path or any(parent in files for parent in _parents(path)):
            raise DataError(
                f"{folder}/{path}: an output cannot have a file of this path beside others; rename it"
            )
    try:
        "".join(files).encode()
    except UnicodeEncodeError as error:  # a plan and a manifest could not name it
        raise DataError(f"{uri}: the name of a file in it is not UTF-8 ({error}); rename it") from None
    return folder, files


def _parents(path: str) -> Iterator[str]:
    """Give the folders of a path that are called like files."""
    end = path.find(".parquet/")
    while end >= 0:
        yield path[: end + len(".parquet")]
        end = path.find(".parquet/", end + 1)


def describe_files(
    folder: Folder, files: dict[str, int], image_column: str, unreadable: dict[str, str] | None = None
) -> list[tuple[DataFile, pa.Schema]]:
    """Read footers, many at a time, and cut the files into shards.

    Args:
        folder: of the files.
        files: relative path -> size in bytes.
        image_column: whose bytes count for the size of a shard.
        unreadable: takes path -> reason of files whose footer is corrupt; None for refusing them.

    Raises:
        DataError: a footer is corrupt; names the file.
    """

    schemas: dict[bytes, pa.Schema] = {}  # most files have the same one, which weighs more than the rest

    def describe(item: tuple[str, int]) -> tuple[DataFile, pa.Schema] | None:
        path, size = item
        try:
            return describe_file(path, size)
        except DataError as error:
            if unreadable is None:
                raise
            unreadable[path] = str(error)
            return None

    def describe_file(path: str, size: int) -> tuple[DataFile, pa.Schema]:
        metadata, sha256 = read_footer(folder, path, size)
        with _parsing(f"{folder}/{path}"):
            groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
            counts = [group.num_rows for group in groups]
            if min(counts, default=0) < 0 or sum(counts) != metadata.num_rows:
                raise ValueError(f"{metadata.num_rows} rows, and row groups of {counts[:5]}")
            sizes = [(group.num_rows, _column_bytes(group, image_column)) for group in groups]
            schema = read_schema(metadata)
            _require_names(schema, f"{folder}/{path}")
            refuse_pickles(schema, f"{folder}/{path}")
            if image_column in schema.names and holds_uris(schema.field(image_column).type):
                sizes = [(num_rows, num_rows * UNKNOWN_IMAGE_BYTES) for num_rows, _ in sizes]
        total = sum(size for _, size in sizes)
        schema = schemas.setdefault(schema.serialize().to_pybytes(), schema)
        return DataFile(path, size, metadata.num_rows, sha256, total, cut_shards(sizes)), schema

    with ThreadPoolExecutor(32) as threads:
        return [described for described in threads.map(describe, files.items()) if described]


def _require_names(schema: pa.Schema, where: str) -> None:
    twice = [name for name, count in Counter(schema.names).items() if count > 1]
    if twice:
        raise DataError(f"{where}: more than one column is called {twice[0]!r}; rename all but one")
    if DAMAGE in schema.names:
        raise DataError(f"{where}: column {DAMAGE!r} has a name that is used here; rename it")


def read_footer(folder: Folder, path: str, size_bytes: int) -> tuple[pq.FileMetaData, str]:
    """Read a file's footer, mostly in one request.

    Returns:
        The metadata, and the sha256 of the footer's bytes.

    Raises:
        DataError: the file is no Parquet, is cut short, or is gone.
    """
    try:
        tail = folder.tail(path, size_bytes, FOOTER_GUESS_BYTES)
        if tail[-4:] == b"PARE":
            raise DataError(f"{folder}/{path}: its Parquet footer is encrypted; write the file in plain")
        length = int.from_bytes(tail[-8:-4], "little") + 8
        if tail[-4:] != b"PAR1" or length > size_bytes:
            raise DataError(f"{folder}/{path}: no Parquet footer; the file is damaged or of another format")
        if length > len(tail):
            tail = folder.tail(path, size_bytes, length)
    except FileNotFoundError:
        raise DataError(f"{folder}/{path}: the file is gone") from None
    footer = tail[-length:]
    with _parsing(f"{folder}/{path}"):
        metadata = pq.read_metadata(pa.BufferReader(b"PAR1" + footer))
    return metadata, hashlib.sha256(footer).hexdigest()


@contextmanager
def _parsing(file: str) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # Thrift, text and extension types complain in their own kinds
        raise DataError(f"{file}: the Parquet footer is damaged ({one_line(error)})") from None


def cut_shards(row_groups: Sequence[tuple[int, int]]) -> tuple[Unit, ...]:
    """Cut a file into units of shards.

    Small row groups that follow one another share a shard; a large one becomes several shards of one unit.

    Args:
        row_groups: number of rows and of encoded image bytes of each.
    """
    units: list[Unit] = []
    first, shared_bytes = 0, 0
    end = 0
    for num_rows, num_bytes in row_groups:
        fits = end + num_rows - first <= MAX_SHARD_ROWS and shared_bytes + num_bytes <= MAX_SHARD_BYTES
        if not fits and end > first:
            units.append((first, end))
            first, shared_bytes = end, 0
        parts = min(num_rows, max(-(-num_rows // MAX_SHARD_ROWS), -(-num_bytes // MAX_SHARD_BYTES)))
        if parts > 1:
            units.append(tuple(end + num_rows * part // parts for part in range(parts + 1)))
            first, shared_bytes = end + num_rows, -num_bytes
        end += num_rows
        shared_bytes += num_bytes
    if end > first or not units:
        units.append((first, end))
    return tuple(units)


def read_units(
    folder: Folder,
    file: DataFile,
    units: Iterable[Unit],
    columns: Sequence[str] | None = None,
    *,
    salvage: bool = False,
) -> Iterator[tuple[int, int, pa.Table]]:
    """Read units of one file, shard by shard.

    Args:
        folder: of the file.
        file: what its footer said when it was planned.
        units: of the file.
        columns: to read; None reads all.
        salvage: give the rows of a damaged row group too, those of its columns that can be read and nulls,
            and a last column `DAMAGE`: string, the reason, null in every sound row.

    Yields:
        First row, end row, and the rows between as a table, in the file's own types.

    Raises:
        DataError: the file is not the one that was planned, or a row group is damaged and not salvaged.
    """

    def check() -> pq.FileMetaData:
        metadata, sha256 = read_footer(folder, file.path, file.size_bytes)
        if sha256 != file.footer_sha256:
            raise DataError(
                f"{folder}/{file.path} has changed since it was planned; label it as a new dataset"
            )
        return metadata

    metadata = check()
    ends = np.cumsum([metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)])
    with RowGroups(folder, file.path, file.size_bytes, metadata, columns, salvage, check) as row_groups:
        for unit in units:
            moment("before read", f"{file.path} {unit[0]}-{unit[-1]}")
            inside = [index for index in range(len(ends)) if _overlaps(unit, ends, index)]
            batch_size = min(MAX_SHARD_ROWS, max(1, unit[1] - unit[0]))
            batches = chain.from_iterable(row_groups.batches(index, batch_size) for index in inside)
            yield from _regroup(batches, unit, row_groups.schema)


def _overlaps(unit: Unit, ends: np.ndarray, index: int) -> bool:
    first = ends[index - 1] if index else 0
    return bool(first < unit[-1] and ends[index] > unit[0])


def _regroup(
    batches: Iterator[pa.RecordBatch], unit: Unit, schema: pa.Schema
) -> Iterator[tuple[int, int, pa.Table]]:
    held: list[pa.RecordBatch] = []
    for first, end in pairwise(unit):
        while (num_held := sum(batch.num_rows for batch in held)) < end - first:
            held.append(next(batches))
        table = pa.Table.from_batches(held, schema=schema)
        yield first, end, table.slice(0, end - first)
        held = table.slice(end - first).to_batches() if num_held > end - first else []


def _column_bytes(group: Any, name: str) -> int:
    columns = (group.column(index) for index in range(group.num_columns))
    return sum(
        column.total_uncompressed_size
        for column in columns
        if f"{column.path_in_schema}.".startswith(f"{name}.")
    )
