"""The protocol of labeling: pieces, joined files, manifest. No model and no cluster in here.

    _mmray/plan/00000.parquet                 every input file, cut into shards; and the job it is for
    _mmray/pieces/<file>/<first>-<end>.parquet  one scored shard
    <file>                                    the joined rows of one input file, under its own relative path
    _mmray/rejected/<file>.jsonl              its rows that were labeled badly or not at all
    _mmray/records/<number>.json              what the manifest will say of files that are done
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
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from mmray.errors import OutputError
from mmray.parquet import DataFile
from mmray.plan import PIECES, RECORD_KEY, SCHEMA_VERSION, Plan, Shard, shards_of
from mmray.schema import REJECTED
from mmray.storage import Folder

REJECTIONS, RECORDS = "_mmray/rejected", "_mmray/records"
MANIFEST, SUCCESS = "_mmray/manifest.json", "_SUCCESS"


class FileRecord(NamedTuple):
    """What the manifest says of one labeled file."""

    path: str
    num_rows: int
    counts: dict[str, int]
    size_bytes: int
    sha256: str


class Committer:
    """Publishes scored shards, and joins the pieces of a file."""

    def __init__(self, output: Folder, job_fingerprint: str) -> None:
        """Take the place, and the fingerprint that each file's footer shall bear."""
        self.output = output
        self.fingerprint = job_fingerprint

    def commit(self, shard: Shard, rows: pa.Table, file: DataFile) -> FileRecord | None:
        """Commit one shard: as the file itself when it is its only one, else as a piece.

        Returns:
            The file's record, if this completed it; a file of several shards is complete when it is joined.
        """
        assert rows.num_rows == shard.end - shard.first, f"{shard} came with {rows.num_rows} rows"
        if shard == (file.path, 0, file.num_rows):
            return self._publish_file(file, [rows])
        piece = io.BytesIO()
        self._write([rows], piece, file)
        self.output.publish(shard.piece, piece.getvalue())
        return None

    def join(self, file: DataFile) -> FileRecord | None:
        """Join a file's pieces, if they are all there, in order, streaming; then remove them.

        Two workers may do this at once: both publish the same bytes, and who comes late finds it done.
        """
        shards = shards_of(file, file.units)
        if len((self.output / f"{PIECES}/{file.path}").list(".parquet")) < len(shards):
            return None
        try:
            record = self._publish_file(file, (self._read_piece(file, shard) for shard in shards))
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
        if not self._is_ours(record, file, file.num_rows):
            raise OutputError(
                f"{self.output}/{file.path} is not of this job: remove it, or label to another --output"
            )
        return FileRecord(
            file.path, file.num_rows, record["counts"], len(data), hashlib.sha256(data).hexdigest()
        )

    def _read_piece(self, file: DataFile, shard: Shard) -> pa.Table:
        data = pa.BufferReader(self.output.read(shard.piece))
        if not self._is_ours(read_record(pq.read_metadata(data)), file, shard.end - shard.first):
            # Of a worker of another job that wrote here, or of another input: label it again.
            self.output.remove([shard.piece])
            raise FileNotFoundError(shard.piece)
        return pq.read_table(data)

    def _is_ours(self, record: dict[str, Any], file: DataFile, num_rows: int) -> bool:
        wanted = {"fingerprint": self.fingerprint, "input": file.footer_sha256, "num_rows": num_rows}
        return record.items() >= wanted.items()

    def _publish_file(self, file: DataFile, tables: Iterable[pa.Table]) -> FileRecord:
        path = file.path
        with tempfile.NamedTemporaryFile(suffix=".parquet") as scratch:
            counts, rejected = self._write(tables, scratch.file, file)
            if rejected:  # before the file: once that exists, nobody comes by here again
                lines = (json.dumps({"file": path, **row}, ensure_ascii=False) + "\n" for row in rejected)
                self.output.publish(f"{REJECTIONS}/{path}.jsonl", "".join(lines).encode())
            scratch.seek(0)
            sha256 = hashlib.file_digest(scratch, "sha256").hexdigest()
            size = scratch.tell()
            self.output.publish(path, Path(scratch.name))
        return FileRecord(path, sum(counts.values()), counts, size, sha256)

    def _write(
        self, tables: Iterable[pa.Table], target: IO[bytes], file: DataFile
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
                writer.write_table(table.combine_chunks())  # or the bytes would tell how it was put together
                counts.update(table["status"].to_pylist())
                rejected += _rejected_rows(table, num_rows)
                num_rows += table.num_rows
            assert writer is not None, "a file has at least one shard"
            ordered = dict(sorted(counts.items()))
            record = {
                "fingerprint": self.fingerprint,
                "input": file.footer_sha256,
                "num_rows": num_rows,
                "counts": ordered,
            }
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


class Records:
    """What is known of files that are done, kept on storage: reading them all back would cost their bytes.

    A run that is killed loses what it had not published yet; those files are read back then.
    """

    def __init__(self, output: Folder) -> None:
        """Read what earlier runs have published."""
        self.output = output
        self._unpublished: list[str] = []
        self._manifest = output.read_json(MANIFEST)
        self.found: dict[str, FileRecord] = {}
        self._take((self._manifest or {}).get("files", ()))
        parts = [f"{RECORDS}/{part}" for part in (output / RECORDS).list(".json")]
        self._parts = {part: self._take(output.read_json(part) or ()) for part in parts}

    def _take(self, listed: Iterable[dict[str, Any]]) -> list[str]:
        """Take published records, and give their paths."""
        found = {record["path"]: FileRecord(**record) for record in listed}
        self.found |= found
        return [*found]

    def add(self, record: FileRecord) -> None:
        """Take the record of a file that is done now."""
        self.found[record.path] = record
        self._unpublished.append(record.path)

    def forget(self, paths: Iterable[str]) -> None:
        """Drop files that are to be labeled, on storage too; and what says that the output is whole."""
        gone = {*paths}
        if not gone or not (self._manifest or self.found.keys() & gone):
            return
        self.found = {path: record for path, record in self.found.items() if path not in gone}
        self._replace([*self._parts], [*self.found])
        for mark in (SUCCESS, MANIFEST) if self._manifest else ():
            self.output.remove([mark])
        self._manifest = None

    def publish(self) -> None:
        """Publish what came since the last time.

        In one part with those before it that are not much larger. So however long a run takes, each part is
        more than twice as large as the next, and who resumes reads some ten of them; a request each.
        """
        if not self._unpublished:
            return
        small: list[str] = []
        paths = self._unpublished
        for part, listed in reversed(self._parts.items()):
            if len(listed) > 2 * len(paths):
                break
            small.append(part)
            paths = listed + paths
        self._replace(small, [*dict.fromkeys(paths)])

    def _replace(self, parts: list[str], paths: list[str]) -> None:
        """Publish the records of some files as one part, and remove others that it takes the place of."""
        number = 1 + max((int(Path(part).stem) for part in self._parts), default=-1)
        if paths:
            part = f"{RECORDS}/{number:08}.json"
            self.output.publish_json(part, [self.found[path]._asdict() for path in paths])
            self._parts[part] = paths
        self.output.remove(parts)
        for part in parts:
            del self._parts[part]
        self._unpublished = []


def count_rows(records: Iterable[FileRecord]) -> Counter[str]:
    """Count the rows of some files by status."""
    counts: Counter[str] = Counter()
    for record in records:
        counts.update(record.counts)
    return counts


def finished_manifest(output: Folder, plan: Plan) -> dict[str, Any] | None:
    """Read the manifest of an output that is whole; None if it is not."""
    manifest: dict[str, Any] | None = output.read_json(MANIFEST)
    if manifest is None or output.read_or_none(SUCCESS) is None:
        return None
    planned = {"num_rows": plan.num_rows, "skipped": plan.skipped}
    return manifest if manifest.items() >= planned.items() else None


def finish(
    output: Folder, plan: Plan, records: Iterable[FileRecord], versions: dict[str, str]
) -> dict[str, Any]:
    """Publish the manifest, remove what a finished output does not need, and publish `_SUCCESS`.

    Returns:
        The manifest.
    """
    files = sorted(records)
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "fingerprint": plan.fingerprint,
        "settings": plan.settings,
        "versions": versions,
        "num_rows": plan.num_rows,
        "counts": dict(sorted(count_rows(files).items())),
        "skipped": plan.skipped,
        "files": [record._asdict() for record in files],
    }
    output.publish_json(MANIFEST, manifest)
    output.remove(f"{place}/{path}" for place in (PIECES, RECORDS) for path in (output / place).list())
    sound = {f"{record.path}.jsonl" for record in files if not record.counts.keys() & {*REJECTED}}
    stale = (output / REJECTIONS).list(".jsonl").keys() & sound  # of files that were labeled twice
    output.remove(f"{REJECTIONS}/{path}" for path in stale)
    output.publish(SUCCESS, b"")
    return manifest
