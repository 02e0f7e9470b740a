"""The protocol of labeling: plan, pieces, joined files, manifest. No model and no cluster in here.

    _mmray/plan/00000.parquet                 every input file, cut into shards; and the job it is for
    _mmray/pieces/<file>/<first>-<end>.parquet  one scored shard
    <file>                                    the joined rows of one input file, under its own relative path
    _mmray/rejected/<file>.jsonl              its rows that were labeled badly or not at all
    _mmray/manifest.json                      every file with rows, counts by status, sha256
    _SUCCESS                                  the output is whole

What is published is committed. Every name follows from the plan and every publish is atomic, so a retry, or
a worker of a job that died, only writes the same rows under the same name again.
"""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from mmray.config import differences, fingerprint
from mmray.errors import DataError, OutputError
from mmray.parquet import DataFile, Unit
from mmray.schema import REJECTED
from mmray.storage import Folder

SCHEMA_VERSION = 1
PLAN, PIECES, REJECTIONS = "_mmray/plan", "_mmray/pieces", "_mmray/rejected"
MANIFEST, SUCCESS = "_mmray/manifest.json", "_SUCCESS"
RECORD_KEY = "mmray"

_PLAN_SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("size_bytes", pa.int64()),
        ("num_rows", pa.int64()),
        ("footer_sha256", pa.string()),
        ("image_bytes", pa.int64()),
        ("units", pa.list_(pa.list_(pa.int64()))),
    ]
)


class Shard(NamedTuple):
    """A range of rows of one input file."""

    path: str
    first: int
    end: int

    @property
    def piece(self) -> str:
        """Where the scored shard is committed."""
        return f"{PIECES}/{self.path}/{self.first}-{self.end}.parquet"


class FileRecord(NamedTuple):
    """What the manifest says of one labeled file."""

    path: str
    num_rows: int
    counts: dict[str, int]
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Plan:
    """What is to be labeled, and the settings that decide what the result is."""

    files: tuple[DataFile, ...]
    settings: dict[str, Any]
    parts: int = 0

    @property
    def fingerprint(self) -> str:
        """Sum up the settings: outputs of another fingerprint are never mixed with this one's."""
        return fingerprint(self.settings)

    @property
    def num_rows(self) -> int:
        """Planned rows."""
        return sum(file.num_rows for file in self.files)

    @property
    def num_shards(self) -> int:
        """Planned shards."""
        return sum(len(file.shards) for file in self.files)

    @classmethod
    def load(cls, output: Folder) -> Plan | None:
        """Read the plan of an output; None when it has none.

        Raises:
            OutputError: it is of another schema version.
        """
        files: list[DataFile] = []
        settings: dict[str, Any] = {}
        paths = list((output / PLAN).list(".parquet"))
        for path in paths:
            table = pq.read_table(pa.BufferReader(output.read(f"{PLAN}/{path}")))
            record = json.loads(table.schema.metadata[RECORD_KEY.encode()])
            if record["schema_version"] != SCHEMA_VERSION:
                raise OutputError(
                    f"{output}: its plan has schema version {record['schema_version']}, not {SCHEMA_VERSION}"
                )
            settings = record["settings"]
            for row in table.to_pylist():
                row["units"] = tuple(map(tuple, row["units"]))
                files.append(DataFile(**row))
        return cls(tuple(files), settings, len(paths)) if paths else None

    def append(self, output: Folder, files: Iterable[DataFile]) -> Plan:
        """Publish files as a further part of the plan, and give the whole."""
        added = tuple(files)
        record = {
            "schema_version": SCHEMA_VERSION,
            "fingerprint": self.fingerprint,
            "settings": self.settings,
        }
        table = pa.Table.from_pylist([asdict(file) for file in added], schema=_PLAN_SCHEMA)
        part = io.BytesIO()
        pq.write_table(
            table.replace_schema_metadata({RECORD_KEY: json.dumps(record)}), part, compression="zstd"
        )
        output.publish(f"{PLAN}/{self.parts:05}.parquet", part.getvalue())
        return Plan(self.files + added, self.settings, self.parts + 1)

    def refuse_other(self, settings: dict[str, Any], output: Folder) -> None:
        """Refuse to go on with other settings.

        Raises:
            OutputError: says what differs.
        """
        if found := differences(self.settings, settings):
            raise OutputError(
                f"{output} was labeled with other settings ({'; '.join(found)}); "
                "take them again, or another --output"
            )

    def compare_input(self, files: dict[str, int]) -> dict[str, int]:
        """Hold the input's listing against the plan.

        Returns:
            Files that the plan does not know: path -> size.

        Raises:
            DataError: a planned file is gone or has another size.
        """
        planned = {file.path: file.size_bytes for file in self.files}
        for path, size in planned.items():
            if path not in files:
                raise DataError(
                    f"input file {path} was planned and is gone; put it back, or label to another --output"
                )
            if files[path] != size:
                raise DataError(
                    f"input file {path} has {files[path]} bytes and was planned with {size}; "
                    "put it back, or label to another --output"
                )
        return {path: size for path, size in files.items() if path not in planned}


def cut_to(files: Iterable[DataFile], limit: int | None) -> tuple[DataFile, ...]:
    """Keep the first `limit` rows of the files; None keeps all."""
    if limit is None:
        return tuple(files)
    kept: list[DataFile] = []
    for file in files:
        if limit <= 0:
            break
        units = tuple(_cut_unit(unit, limit) for unit in file.units if unit[0] < limit or file.num_rows == 0)
        kept.append(replace(file, num_rows=min(file.num_rows, limit), units=units))
        limit -= file.num_rows
    return tuple(kept)


def _cut_unit(unit: Unit, end: int) -> Unit:
    inside = tuple(row for row in unit if row < end)
    return inside if len(inside) == len(unit) else (*inside, min(end, unit[len(inside)]))


class Work(NamedTuple):
    """What a run still has to do."""

    pending: list[tuple[DataFile, list[Unit]]]
    """Files with shards that are not committed, and the units that hold these."""
    committed: set[Shard]
    """Shards of those units that are committed: not to be scored again."""
    unjoined: list[DataFile]
    """Files whose pieces are all there."""
    done: list[DataFile]

    def shards(self) -> Iterator[Shard]:
        """Give the shards that are not committed."""
        for file, units in self.pending:
            yield from (shard for shard in shards_of(file, units) if shard not in self.committed)

    @property
    def num_pending(self) -> int:
        """Shards that are not committed."""
        return sum(1 for _ in self.shards())

    @property
    def num_rows(self) -> int:
        """Rows of the shards that are not committed."""
        return sum(shard.end - shard.first for shard in self.shards())


def shards_of(file: DataFile, units: Iterable[Unit]) -> list[Shard]:
    """Give the shards of some of a file's units, in order."""
    return [Shard(file.path, *bounds) for unit in units for bounds in pairwise(unit)]


def find_work(output: Folder, plan: Plan) -> Work:
    """Hold the output's listing against the plan: no request but LISTs, a thousand keys each."""
    present = output.list(".parquet")
    work = Work([], set(), [], [])
    for file in plan.files:
        if file.path in present:
            work.done.append(file)
            continue
        missing = [
            unit
            for unit in file.units
            if any(shard.piece not in present for shard in shards_of(file, [unit]))
        ]
        if not missing and len(file.shards) > 1:
            work.unjoined.append(file)
            continue
        work.pending.append((file, missing))
        work.committed.update(shard for shard in shards_of(file, missing) if shard.piece in present)
    return work


class Committer:
    """Publishes scored shards, and joins a file when its last piece is there."""

    def __init__(self, output: Folder, job_fingerprint: str) -> None:
        """Take the place, and the fingerprint that each file's footer shall bear."""
        self.output = output
        self.fingerprint = job_fingerprint

    def commit(self, shard: Shard, rows: pa.Table, file: DataFile) -> FileRecord | None:
        """Commit one shard: as the file itself when it is its only one, else as a piece.

        Returns:
            The file's record, if this completed it.
        """
        assert rows.num_rows == shard.end - shard.first, f"{shard} came with {rows.num_rows} rows"
        if len(file.shards) == 1:
            return self._publish_file(shard.path, [rows])
        piece = io.BytesIO()
        self._write([rows], piece)
        self.output.publish(shard.piece, piece.getvalue())
        return self.join(file)

    def join(self, file: DataFile) -> FileRecord | None:
        """Join a file's pieces, if they are all there, in order, streaming; then remove them.

        Two workers may do this at once: both publish the same bytes, and who comes late finds it done.
        """
        shards = shards_of(file, file.units)
        if len((self.output / f"{PIECES}/{file.path}").list(".parquet")) < len(shards):
            return None
        try:
            record = self._publish_file(file.path, map(self._read_piece, shards))
        except FileNotFoundError:  # another worker has joined the file and removed its pieces
            return None
        self.output.remove(shard.piece for shard in shards)
        return record

    def describe(self, file: DataFile) -> FileRecord:
        """Read back a file that an earlier run completed.

        Raises:
            OutputError: it is not this job's.
        """
        data = self.output.read(file.path)
        record = read_record(pq.read_metadata(pa.BufferReader(data)))
        if record.get("fingerprint") != self.fingerprint or record.get("num_rows") != file.num_rows:
            raise OutputError(
                f"{self.output}/{file.path} is not of this job: remove it, or label to another --output"
            )
        return FileRecord(
            file.path, file.num_rows, record["counts"], len(data), hashlib.sha256(data).hexdigest()
        )

    def _read_piece(self, shard: Shard) -> pa.Table:
        data = pa.BufferReader(self.output.read(shard.piece))
        record = read_record(pq.read_metadata(data))
        if (
            record.get("fingerprint") != self.fingerprint
        ):  # a worker of another job that wrote here: label again
            self.output.remove([shard.piece])
            raise FileNotFoundError(shard.piece)
        return pq.read_table(data)

    def _publish_file(self, path: str, tables: Iterable[pa.Table]) -> FileRecord:
        with tempfile.NamedTemporaryFile(suffix=".parquet") as scratch:
            counts, rejected = self._write(tables, scratch.file)
            if rejected:  # before the file: once that exists, nobody comes by here again
                lines = (json.dumps({"file": path, **row}, ensure_ascii=False) + "\n" for row in rejected)
                self.output.publish(f"{REJECTIONS}/{path}.jsonl", "".join(lines).encode())
            scratch.seek(0)
            sha256 = hashlib.file_digest(scratch, "sha256").hexdigest()
            size = scratch.tell()
            self.output.publish(path, Path(scratch.name))
        return FileRecord(path, sum(counts.values()), counts, size, sha256)

    def _write(
        self, tables: Iterable[pa.Table], target: IO[bytes]
    ) -> tuple[dict[str, int], list[dict[str, Any]]]:
        """Write tables as one Parquet file; the same tables give the same bytes."""
        counts: Counter[str] = Counter()
        rejected: list[dict[str, Any]] = []
        writer: pq.ParquetWriter | None = None
        num_rows = 0
        with ExitStack() as stack:  # an unclosed writer would still write when it is collected
            for table in tables:
                writer = writer or stack.enter_context(
                    pq.ParquetWriter(target, table.schema, compression="zstd")
                )
                writer.write_table(table)
                counts.update(table["status"].to_pylist())
                rejected += _rejected_rows(table, num_rows)
                num_rows += table.num_rows
            assert writer is not None, "a file has at least one shard"
            ordered = dict(sorted(counts.items()))
            record = {"fingerprint": self.fingerprint, "num_rows": num_rows, "counts": ordered}
            writer.add_key_value_metadata({RECORD_KEY: json.dumps(record)})
        return ordered, rejected


def read_record(metadata: pq.FileMetaData) -> dict[str, Any]:
    """Read what the protocol wrote into a file's footer; empty for a file of other origin."""
    record: dict[str, Any] = json.loads((metadata.metadata or {}).get(RECORD_KEY.encode(), b"{}"))
    return record


def _rejected_rows(table: pa.Table, first: int) -> Iterator[dict[str, Any]]:
    for row, (status, error) in enumerate(
        zip(table["status"].to_pylist(), table["error"].to_pylist(), strict=True)
    ):
        if status in REJECTED:
            yield {"row": first + row, "status": status, "reason": error}


def finished_manifest(output: Folder, plan: Plan) -> dict[str, Any] | None:
    """Read the manifest of an output that is whole; None if it is not."""
    manifest: dict[str, Any] | None = output.read_json(MANIFEST)
    if manifest is None or output.read_or_none(SUCCESS) is None or manifest["num_rows"] != plan.num_rows:
        return None
    return manifest


def finish(
    output: Folder, plan: Plan, records: Iterable[FileRecord], versions: dict[str, str]
) -> dict[str, Any]:
    """Remove stray pieces, publish the manifest, then `_SUCCESS`.

    Returns:
        The manifest.
    """
    strays = output.list(".parquet")
    output.remove(path for path in strays if path.startswith(f"{PIECES}/"))
    files = sorted(records)
    totals: Counter[str] = Counter()
    for record in files:
        totals.update(record.counts)
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "fingerprint": plan.fingerprint,
        "settings": plan.settings,
        "versions": versions,
        "num_rows": plan.num_rows,
        "counts": dict(sorted(totals.items())),
        "files": [record._asdict() for record in files],
    }
    output.publish_json(MANIFEST, manifest)
    output.publish(SUCCESS, b"")
    return manifest
