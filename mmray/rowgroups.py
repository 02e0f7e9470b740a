"""Row groups of one Parquet file: read in a stream, salvaged where they are damaged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO, Self

import pyarrow as pa
import pyarrow.parquet as pq

from mmray.columns import refuse_pickles
from mmray.errors import DataError, one_line
from mmray.storage import Folder

READ_BUFFER_BYTES = 8 << 20
INT96_UNIT = "us"
"""Of timestamps as Spark writes them: nanoseconds in 64 bits reach from 1677 to 2262, and others wrap."""

DAMAGE = "_mmray_damage"
"""Column of salvaged rows: string, the reason why their row group could not be read, null in sound rows."""


class RowGroups:
    """The row groups of one file, each read in a stream, and once more, column by column, if that fails."""

    def __init__(
        self,
        folder: Folder,
        path: str,
        size: int,
        metadata: pq.FileMetaData,
        columns: Sequence[str] | None,
        salvage: bool,
        check: Callable[[], object],
    ) -> None:
        """Open the file; see `read_units`. `check` raises where it is another one by now."""
        self.check = check
        self.folder, self.path, self.size = folder, path, size
        self.metadata, self.salvage = metadata, salvage
        self.source, self.parquet = self._open()
        whole = self.parquet.schema_arrow
        refuse_pickles(whole, f"{folder}/{path}")
        fields = list(whole) if columns is None else [whole.field(name) for name in columns]
        self.names = [field.name for field in fields]
        if salvage:
            fields.append(pa.field(DAMAGE, pa.string()))
        # A column that may not hold nulls must, where a row group is damaged.
        self.schema = pa.schema([field.with_nullable(True) for field in fields], metadata=whole.metadata)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.source.close()

    def batches(self, index: int, batch_size: int) -> Iterator[pa.RecordBatch]:
        """Read one row group.

        Raises:
            DataError: it is damaged, and is not to be salvaged.
        """
        num_rows, given = self.metadata.row_group(index).num_rows, 0
        try:
            for batch in self.parquet.iter_batches(batch_size, row_groups=[index], columns=self.names):
                yield self._batch(batch.columns, batch.num_rows)
                given += batch.num_rows
            if given == num_rows:
                return
        except Exception as error:
            if not _is_damage(error):
                raise
        yield from self._salvaged(index, given, num_rows, batch_size)

    def _salvaged(self, index: int, first: int, end: int, batch_size: int) -> Iterator[pa.RecordBatch]:
        """Read the rest of a row group anew, each column for itself: what failed in passing is whole now."""
        columns: list[pa.Array] = []
        reasons: list[str] = []
        source, parquet = self._open()
        with source:
            for name in self.names:
                column, reason = self._column(parquet, index, name, end)
                columns.append(column.slice(first))
                reasons += [f"column {name}: {reason}"] if reason else []
        self.check()  # the row groups of another file look damaged, too
        reason = f"row group {index} is damaged ({'; '.join(reasons)})" if reasons else None
        if reason and not self.salvage:
            raise DataError(f"{self.folder}/{self.path}: {reason}")
        for start in range(0, end - first, batch_size):
            part = [column.slice(start, batch_size) for column in columns]
            yield self._batch(part, min(batch_size, end - first - start), reason)

    def _column(
        self, parquet: pq.ParquetFile, index: int, name: str, num_rows: int
    ) -> tuple[pa.Array, str | None]:
        reason = f"not the {num_rows} rows of its footer"
        try:
            column = parquet.read_row_group(index, columns=[name])[name].combine_chunks()
            if len(column) == num_rows:
                return column, None
        except Exception as error:
            if not _is_damage(error):
                raise
            reason = one_line(error, 200)
        return _nulls(num_rows, self.schema.field(name).type), reason

    def _batch(self, columns: list[pa.Array], num_rows: int, damage: str | None = None) -> pa.RecordBatch:
        reasons = [pa.array([damage] * num_rows, pa.string())] if self.salvage else []
        return pa.RecordBatch.from_arrays([*columns, *reasons], schema=self.schema)

    def _open(self) -> tuple[BinaryIO, pq.ParquetFile]:
        source = self.folder.open(self.path, self.size)
        # Without pre_buffer a large row group is read as it is decoded, not held as a whole.
        return source, pq.ParquetFile(
            source,
            metadata=self.metadata,
            pre_buffer=False,
            buffer_size=READ_BUFFER_BYTES,
            coerce_int96_timestamp_unit=INT96_UNIT,
        )


def read_schema(metadata: pq.FileMetaData) -> pa.Schema:
    """Give the schema in which the rows of a file are read."""
    nothing = pa.BufferReader(b"PAR1")
    return pq.ParquetFile(nothing, metadata=metadata, coerce_int96_timestamp_unit=INT96_UNIT).schema_arrow


def _nulls(num_rows: int, kind: pa.DataType) -> pa.Array:
    """Give rows of nulls: pa.nulls() would put some into a struct's children that may hold none."""
    return pa.array([None] * num_rows, kind) if _has_required(kind) else pa.nulls(num_rows, kind)


def _has_required(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) and any(not field.nullable or _has_required(field.type) for field in kind)


def _is_damage(error: Exception) -> bool:
    """Tell damaged content, of which Arrow complains in its own kinds or by a bare OSError, from storage."""
    if isinstance(error, pa.ArrowMemoryError):
        return False
    return isinstance(error, pa.ArrowException) or (type(error) is OSError and error.errno is None)
