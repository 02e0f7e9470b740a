"""The plan of a labeling job: input files cut into shards, and what of them is still to be done.

The plan is written before the first row is read, and is only ever added to. Every name in the output follows
from it, so that a listing of the output says what is committed.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmray.errors import ConfigError, DataError, OutputError
from mmray.fingerprints import differences, fingerprint
from mmray.parquet import DataFile, Unit
from mmray.schema import Vocabulary
from mmray.storage import Folder

SCHEMA_VERSION = 1
PLAN, PIECES = "_mmray/plan", "_mmray/pieces"
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


@dataclass(frozen=True)
class Plan:
    """What is to be labeled, and the settings that decide what the result is."""

    files: tuple[DataFile, ...]
    settings: dict[str, Any]
    parts: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    """Input files that cannot be read, and why; left out because the user said so."""

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

    @property
    def vocabulary(self) -> Vocabulary:
        """The labels that the model knows."""
        return Vocabulary(tuple(self.settings["labels"]))

    @property
    def thresholds(self) -> np.ndarray:
        """float64 (L,), that decided."""
        return np.array(self.settings["thresholds"], float)

    @property
    def scored(self) -> bool:
        """Whether all scores are kept."""
        return bool(self.settings["scores"] == "all")

    def require_scores(self, output: object) -> None:
        """Refuse an output, by what it is called, that keeps fewer.

        Raises:
            ConfigError: it does.
        """
        if not self.scored:
            raise ConfigError(f"{output} was labeled with --scores {self.settings['scores']}: needs all")

    @classmethod
    def of_output(cls, output: Folder) -> Plan:
        """Read the plan of an output.

        Raises:
            OutputError: it has none, or one of another schema version.
        """
        plan = cls.load(output)
        if plan is None:
            raise OutputError(f"{output} has no plan: it is no output of label.py")
        return plan

    @classmethod
    def load(cls, output: Folder) -> Plan | None:
        """Read the plan of an output; None when it has none.

        Raises:
            OutputError: it is of another schema version.
        """
        files: list[DataFile] = []
        settings: dict[str, Any] = {}
        skipped: dict[str, str] = {}
        paths = list((output / PLAN).list(".parquet"))
        for path in paths:
            table = pq.read_table(pa.BufferReader(output.read(f"{PLAN}/{path}")))
            record = json.loads(table.schema.metadata[RECORD_KEY.encode()])
            if record["schema_version"] != SCHEMA_VERSION:
                raise OutputError(
                    f"{output}: its plan has schema version {record['schema_version']}, not {SCHEMA_VERSION}"
                )
            settings = record["settings"]
            skipped |= record["skipped"]
            *columns, cuts = (table[name].to_pylist() for name in _PLAN_SCHEMA.names)
            files += map(DataFile, *columns, (tuple(map(tuple, units)) for units in cuts))
        return cls(tuple(files), settings, len(paths), _without(skipped, files)) if paths else None

    def append(
        self, output: Folder, files: Iterable[DataFile], skipped: dict[str, str] | None = None
    ) -> Plan:
        """Publish files, and others that are skipped, as a further part of the plan, and give the whole.

        Raises:
            OutputError: another job, which took this one's lease over, has planned in the meantime.
        """
        added = tuple(files)
        record = {
            "schema_version": SCHEMA_VERSION,
            "fingerprint": self.fingerprint,
            "settings": self.settings,
            "skipped": skipped or {},
        }
        table = pa.Table.from_pylist([asdict(file) for file in added], schema=_PLAN_SCHEMA)
        part = io.BytesIO()
        pq.write_table(
            table.replace_schema_metadata({RECORD_KEY: json.dumps(record)}), part, compression="zstd"
        )
        if not output.create(f"{PLAN}/{self.parts:05}.parquet", part.getvalue()):
            raise OutputError(f"{output} was planned by another job meanwhile; run the same command again")
        left_out = _without(self.skipped, added) | (skipped or {})
        return Plan(self.files + added, self.settings, self.parts + 1, left_out)

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
            Files that the plan does not know, or skips: path -> size.

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


def _without(skipped: dict[str, str], files: Iterable[DataFile]) -> dict[str, str]:
    """Leave out files that could be read later."""
    read = {file.path for file in files}
    return {path: reason for path, reason in skipped.items() if path not in read}


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

    def __bool__(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.pending or self.unjoined)

    @property
    def paths(self) -> set[str]:
        """The files that the output lacks."""
        return {file.path for file in (*(file for file, _ in self.pending), *self.unjoined)}

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
    work = Work([], set(), [])
    for file in plan.files:
        if file.path in present:
            continue
        pieces = present if len(file.shards) > 1 else {}  # one shard is the file itself
        missing = [
            unit for unit in file.units if any(shard.piece not in pieces for shard in shards_of(file, [unit]))
        ]
        if not missing:
            work.unjoined.append(file)
            continue
        work.pending.append((file, missing))
        work.committed.update(shard for shard in shards_of(file, missing) if shard.piece in pieces)
    return work
