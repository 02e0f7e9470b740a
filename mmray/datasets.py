"""Parquet datasets: footers, cuts into shards, streamed reading; and what training asks of its rows.

A *shard* is a range of rows of one file, the unit that is scored and committed. A *unit* is one or more
shards that whole row groups hold, the unit that is read: a row group of 10,000 images is read once, in a
stream, and given out as ten shards.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
from ray.data import DataContext, Datasource, ReadTask
from ray.data.block import BlockMetadata

from mmray.config import Columns
from mmray.errors import DataError
from mmray.schema import Label, Vocabulary, image_bytes, require_columns, require_kinds
from mmray.storage import Folder, visible

MAX_SHARD_ROWS = 1000
MAX_SHARD_BYTES = 128 << 20
FOOTER_GUESS_BYTES = 64 << 10
READ_BUFFER_BYTES = 8 << 20

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
        DataError: there is none.
    """
    folder = Folder(uri)
    files = {path: size for path, size in folder.list(".parquet").items() if visible(path)}
    if not files and folder.uri.endswith(".parquet"):
        parent, _, name = folder.uri.rpartition("/")
        folder = Folder(parent or "/")
        files = {path: size for path, size in folder.list(".parquet").items() if path == name}
    if not files:
        raise DataError(f"{uri}: no .parquet file there; prepare.py makes a dataset of images and captions")
    return folder, files


def describe_files(
    folder: Folder, files: dict[str, int], image_column: str
) -> list[tuple[DataFile, pa.Schema]]:
    """Read footers, many at a time, and cut the files into shards.

    Raises:
        DataError: a footer is corrupt; names the file.
    """

    def describe(item: tuple[str, int]) -> tuple[DataFile, pa.Schema]:
        path, size = item
        metadata, sha256 = read_footer(folder, path, size)
        with _parsing(f"{folder}/{path}"):
            groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
            sizes = [(group.num_rows, _column_bytes(group, image_column)) for group in groups]
            schema = metadata.schema.to_arrow_schema()
        total = sum(size for _, size in sizes)
        return DataFile(path, size, metadata.num_rows, sha256, total, cut_shards(sizes)), schema

    with ThreadPoolExecutor(32) as threads:
        return list(threads.map(describe, files.items()))


def read_footer(folder: Folder, path: str, size_bytes: int) -> tuple[pq.FileMetaData, str]:
    """Read a file's footer, mostly in one request.

    Returns:
        The metadata, and the sha256 of the footer's bytes.

    Raises:
        DataError: the file is no Parquet, is cut short, or is gone.
    """
    try:
        tail = folder.tail(path, size_bytes, FOOTER_GUESS_BYTES)
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
    except (pa.ArrowException, OSError, ValueError) as error:  # Thrift and text complain in their own kinds
        reason = " ".join(str(error).split())
        raise DataError(f"{file}: the Parquet footer is damaged ({reason})") from None


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
        parts = max(-(-num_rows // MAX_SHARD_ROWS), -(-num_bytes // MAX_SHARD_BYTES))
        if parts > 1:
            parts = min(parts, num_rows)
            units.append(tuple(end + num_rows * part // parts for part in range(parts + 1)))
            first, shared_bytes = end + num_rows, -num_bytes
        end += num_rows
        shared_bytes += num_bytes
    if end > first or not units:
        units.append((first, end))
    return tuple(units)


def read_units(
    folder: Folder, file: DataFile, units: Iterable[Unit], columns: Sequence[str] | None = None
) -> Iterator[tuple[int, int, pa.Table]]:
    """Read units of one file, shard by shard.

    Args:
        folder: of the file.
        file: what its footer said when it was planned.
        units: of the file.
        columns: to read; None reads all.

    Yields:
        First row, end row, and the rows between as a table, in the file's own types.

    Raises:
        DataError: the file is not the one that was planned.
    """
    metadata, sha256 = read_footer(folder, file.path, file.size_bytes)
    if sha256 != file.footer_sha256:
        raise DataError(f"{folder}/{file.path} has changed since it was planned; label it as a new dataset")
    starts = np.cumsum([0] + [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)])
    with folder.open(file.path) as source:
        # Without pre_buffer a large row group is read as it is decoded, not held as a whole.
        parquet = pq.ParquetFile(source, metadata=metadata, pre_buffer=False, buffer_size=READ_BUFFER_BYTES)
        schema = parquet.schema_arrow
        if columns is not None:
            schema = pa.schema([schema.field(name) for name in columns], metadata=schema.metadata)
        for unit in units:
            groups = [
                index
                for index in range(metadata.num_row_groups)
                if starts[index] < unit[-1] and starts[index + 1] > unit[0]
            ]
            batches = parquet.iter_batches(
                batch_size=min(MAX_SHARD_ROWS, max(1, unit[1] - unit[0])), row_groups=groups, columns=columns
            )
            yield from _regroup(batches, unit, schema)


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
        column.total_uncompressed_size for column in columns if column.path_in_schema.split(".")[0] == name
    )


@dataclass(frozen=True)
class Rows:
    """Labeled rows for training and evaluation: where they are and how their columns are called."""

    folder: Folder
    files: tuple[DataFile, ...]
    columns: Columns

    @classmethod
    def find(cls, uri: str, columns: Columns, needs: Sequence[str] = ("image", "caption", "labels")) -> Rows:
        """Find a dataset, and check the columns that it needs.

        Raises:
            DataError: no file, no row, or a column is missing.
        """
        folder, files = find_files(uri)
        described = describe_files(folder, files, columns.image)
        flags = {field.name: field.metadata["flag"] for field in fields(Columns)}
        needed = {flags[name]: getattr(columns, name) for name in needs}
        for file, schema in described:
            require_columns(schema, needed, f"{folder}/{file.path}")
            if "image" in needs:
                require_kinds(schema, columns.image, columns.caption, f"{folder}/{file.path}")
        rows = cls(folder, tuple(file for file, _ in described if file.num_rows), columns)
        if not rows.files:
            raise DataError(f"{uri}: its {len(files)} files hold no row")
        return rows

    @property
    def num_rows(self) -> int:
        """Rows in all files."""
        return sum(file.num_rows for file in self.files)

    def identity(self) -> list[tuple[str, str]]:
        """Say which rows these are: path and footer sum of each file."""
        return [(file.path, file.footer_sha256) for file in self.files]

    def dataset(self, columns: Sequence[str], seed: tuple[int, ...] | None = None) -> ray.data.Dataset:
        """Stream the rows with Ray Data, a block for each shard.

        Args:
            columns: of `image`, `caption` and `labels`, under these names whatever the files call them.
            seed: shuffles the units anew each time the dataset is executed, that is each epoch, and adds a
                column `draw`: uint64, another number for each row and epoch. None keeps the files' order.
        """
        return ray.data.read_datasource(RowSource(self, tuple(columns), seed))


class RowSource(Datasource):
    """Ray's view of `Rows`: a read task for each unit."""

    def __init__(self, rows: Rows, columns: tuple[str, ...], seed: tuple[int, ...] | None) -> None:
        """Hold what is to be read."""
        super().__init__()
        self.rows, self.columns, self.seed = rows, columns, seed
        self.executions = 0

    def estimate_inmemory_data_size(self) -> int:
        """Estimate bytes: the images, as far as they are asked for."""
        return sum(file.image_bytes for file in self.rows.files) if "image" in self.columns else 0

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        """Give the tasks of one execution; Ray asks anew for each, which is what shuffles the next epoch."""
        units = [(file, unit) for file in self.rows.files for unit in file.units]
        draws: list[int | None] = [None] * len(units)
        if self.seed is not None:
            generator = np.random.default_rng((*self.seed, self.executions))
            units = [units[index] for index in generator.permutation(len(units))]
            draws = [int(draw) for draw in generator.integers(2**63, size=len(units))]
            self.executions += 1
        return [self._task(file, unit, draw) for (file, unit), draw in zip(units, draws, strict=True)]

    def _task(self, file: DataFile, unit: Unit, draw: int | None) -> ReadTask:
        folder, columns = self.rows.folder, self.columns
        names = {column: getattr(self.rows.columns, column) for column in columns}

        def read() -> Iterator[pa.Table]:
            for first, _, table in read_units(folder, file, [unit], list(names.values())):
                block = {column: table[name] for column, name in names.items()}
                if "image" in block:
                    block["image"] = pa.array(image_bytes(block["image"]), pa.large_binary())
                if draw is not None:
                    block["draw"] = pa.array(
                        np.arange(table.num_rows, dtype=np.uint64) + np.uint64(draw + first)
                    )
                yield pa.table(block)

        num_rows = unit[-1] - unit[0]
        size = file.image_bytes * num_rows // max(1, file.num_rows)
        return ReadTask(
            read, BlockMetadata(num_rows=num_rows, size_bytes=size, exec_stats=None, input_files=None)
        )


def count_labels(rows: Rows) -> tuple[Vocabulary, np.ndarray]:
    """Count the rows that bear each label.

    Returns:
        The vocabulary, and positives: int64 (L,).

    Raises:
        DataError: no label, or labels of mixed types.
    """

    def count(block: pa.Table) -> pa.Table:
        counts: Counter[Label] = Counter()
        for labels in block["labels"].to_pylist():
            counts.update(set(labels or ()))
        return pa.table({"counts": [json.dumps(list(counts.items()))]})

    total: Counter[Label] = Counter()
    counted = rows.dataset(["labels"]).map_batches(count, batch_size=None, batch_format="pyarrow")
    for row in counted.iter_rows():
        total.update(dict(json.loads(row["counts"])))
    vocabulary = Vocabulary.of(total)
    return vocabulary, np.array([total[label] for label in vocabulary.labels], np.int64)


def sample_captions(rows: Rows, limit: int) -> list[str]:
    """Give the captions of the first `limit` rows that have one."""
    captions: list[str] = []
    for batch in rows.dataset(["caption"]).iter_batches(batch_size=None, batch_format="pyarrow"):
        captions += [caption for caption in batch["caption"].to_pylist() if caption]
        if len(captions) >= limit:
            break
    return captions[:limit]
