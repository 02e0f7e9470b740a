"""Proof of a finished output against its input: files, rows, passthrough values, bytes."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmray.errors import DataError, OutputError, one_line
from mmray.fingerprints import differences
from mmray.parquet import DataFile, find_files, read_footer, read_units
from mmray.plan import SCHEMA_VERSION, Plan
from mmray.resources import spread
from mmray.rowgroups import read_schema
from mmray.schema import KeptScores, Status, Vocabulary, output_schema, passthrough_names, prediction_fields
from mmray.shards import MANIFEST, SUCCESS, FileRecord
from mmray.storage import Folder, visible


@dataclass(frozen=True)
class Verification:
    """What was checked, and what is wrong."""

    num_files: int
    num_rows: int
    problems: list[str]
    """A line for each: the file, the row where the input shows it, and what is wrong."""
    num_skipped: int
    """Files that --skip-unreadable-files left out."""


@dataclass(frozen=True)
class Expected:
    """What the output must hold beside the input's values."""

    image_column: str
    vocabulary: Vocabulary
    kept: KeptScores
    bundle: str

    @classmethod
    def of(cls, settings: dict[str, Any]) -> Expected:
        """Take it from the settings of a plan."""
        vocabulary = Vocabulary(tuple(settings["labels"]))
        kept = KeptScores.parse(settings["scores"])
        return cls(settings["columns"]["image"], vocabulary, kept, settings["bundle"])


def verify_dataset(input_uri: str, output_uri: str) -> Verification:
    """Check a labeled output, file by file on the cluster, against the input that it was made of.

    Raises:
        OutputError: the output was never planned, or is not finished.
        DataError: the input cannot be read.
    """
    output = Folder(output_uri)
    plan = Plan.of_output(output)
    manifest, present = output.read_json(MANIFEST), output.list()
    if manifest is None or SUCCESS not in present:
        raise OutputError(f"{output_uri} is not finished; run label.py again, it resumes")
    source, files = find_files(input_uri)
    labeled = {path for path in present if visible(path) and path.endswith(".parquet")}
    problems = list(_compare_lists(plan, manifest, files, labeled))
    checkable = [file for file in plan.files if file.path in labeled and file.path in files]
    listed = {file["path"]: file for file in manifest["files"]}
    expected = Expected.of(plan.settings)

    def check(files: Sequence[tuple[DataFile, dict[str, Any]]]) -> list[str]:
        return [
            problem for file, entry in files for problem in check_file(source, output, file, entry, expected)
        ]

    entries = [(file, listed.get(file.path, {})) for file in checkable]
    problems += chain.from_iterable(spread(check, entries))
    return Verification(len(plan.files), plan.num_rows, sorted(problems), len(plan.skipped))


def _compare_lists(
    plan: Plan, manifest: dict[str, Any], files: dict[str, int], labeled: set[str]
) -> Iterator[str]:
    planned = {file.path: file for file in plan.files}
    for path in sorted(set(planned) - labeled):
        yield f"{path}: missing from the output"
    for path in sorted(labeled - set(planned)):
        yield f"{path}: added to the output, no input file has this path"
    for path in sorted(set(planned) - set(files)):
        yield f"{path}: gone from the input"
    if plan.settings["limit"] is None:
        for path in sorted(set(files) - set(planned) - set(plan.skipped)):
            yield f"{path}: came to the input after the plan; label.py --extend labels it"
    for path in sorted(set(planned) ^ {file["path"] for file in manifest["files"]}):
        yield f"{path}: stands in only one of the plan and {MANIFEST}"
    totals = sum((Counter(file["counts"]) for file in manifest["files"]), Counter[str]())
    wanted = {
        "schema_version": SCHEMA_VERSION,
        "fingerprint": plan.fingerprint,
        "settings": plan.settings,
        "num_rows": plan.num_rows,
        "counts": dict(totals),
        "skipped": plan.skipped,
    }
    for difference in differences(wanted, {name: manifest.get(name) for name in wanted}):
        yield f"{MANIFEST}: other than the plan and the files say: {difference}"


def check_file(
    source: Folder, output: Folder, file: DataFile, listed: dict[str, Any], expected: Expected
) -> Iterator[str]:
    """Check one labeled file against the input, the manifest and the rules; yields its problems."""
    data = output.read(file.path)
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 != listed.get("sha256"):
        yield f"{file.path}: its bytes are not those of the manifest"
    try:
        labeled = pq.read_table(pa.BufferReader(data))
    except (pa.ArrowException, OSError) as error:  # a damaged page comes as OSError
        yield f"{file.path}: cannot be read ({one_line(error)})"
        return
    try:
        metadata, _ = read_footer(source, file.path, file.size_bytes)
        schema = read_schema(metadata)
    except (pa.ArrowException, DataError) as error:
        yield f"{file.path}: its input cannot be read ({one_line(error)})"
        return
    wanted = output_schema(
        schema, expected.image_column, prediction_fields(expected.vocabulary, expected.kept)
    )
    if labeled.schema.remove_metadata() != wanted:
        found, missing = set(labeled.schema.names), set(wanted.names)
        yield f"{file.path}: other columns than the input's and the predictions' ({sorted(found ^ missing)})"
        return
    if labeled.num_rows != file.num_rows:
        yield f"{file.path}: {labeled.num_rows} rows, the plan has {file.num_rows}"
    if sha256 == listed.get("sha256"):
        counts = dict(Counter(labeled["status"].to_pylist()))
        record = FileRecord(file.path, labeled.num_rows, counts, len(data), sha256)
        for difference in differences(record._asdict(), listed):
            yield f"{file.path}: {MANIFEST} says otherwise: {difference}"
    yield from _compare_rows(source, file, labeled, passthrough_names(schema, expected.image_column))
    yield from _check_predictions(file.path, labeled, expected)


def _compare_rows(source: Folder, file: DataFile, labeled: pa.Table, names: dict[str, str]) -> Iterator[str]:
    """Hold the passthrough columns against the input; yields the first row that differs."""
    try:
        for first, end, rows in read_units(source, file, file.units, list(names), salvage=True):
            there = labeled.slice(first, end - first)
            found = [
                (row, old, new)
                for old, new in names.items()
                if (row := _first_difference(rows[old], there[new])) is not None
            ]
            if found:
                row, old, new = min(found)
                before = _shown(rows[old], row)
                after = _shown(there[new], row) if row < there.num_rows else "no row"
                yield f"{file.path}: row {first + row}: column {new} holds {after}, the input {before}"
                return
    except DataError as error:
        yield f"{file.path}: {error}"
    if labeled.num_rows > file.num_rows:
        yield f"{file.path}: row {file.num_rows}: the input ends before it"


def _first_difference(before: pa.ChunkedArray, after: pa.ChunkedArray) -> int | None:
    if before.equals(after):
        return None
    try:
        old, new = before.to_pylist(), after.to_pylist()
    except UnicodeDecodeError:  # somewhere in either
        old, new = _as_bytes(before).to_pylist(), _as_bytes(after).to_pylist()
    for row, (one, other) in enumerate(zip(old, new, strict=False)):
        if one != other and repr(one) != repr(other):  # NaN equals nothing, its text does
            return row
    return min(len(old), len(new)) if len(old) != len(new) else None


def _shown(column: pa.ChunkedArray, row: int) -> str:
    value = column.slice(row, 1)
    try:
        text = repr(value[0].as_py())
    except UnicodeDecodeError:
        text = repr(_as_bytes(value)[0].as_py())
    return text if len(text) <= 60 else f"{text[:57]}..."


def _as_bytes(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Turn text, also inside of lists and structs, into bytes: Arrow gives out no text that is not UTF-8."""
    return column.cast(_bytes_type(column.type))


def _bytes_type(kind: Any) -> Any:
    types = pa.types
    if types.is_dictionary(kind):
        return _bytes_type(kind.value_type)
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return pa.large_binary()
    if types.is_struct(kind):
        return pa.struct([(field.name, _bytes_type(field.type)) for field in kind])
    if types.is_map(kind):
        return pa.map_(_bytes_type(kind.key_type), _bytes_type(kind.item_type))
    if types.is_fixed_size_list(kind):
        return pa.list_(_bytes_type(kind.value_type), kind.list_size)
    if any(test(kind) for test in (types.is_list, types.is_large_list, types.is_list_view)):
        return pa.large_list(_bytes_type(kind.value_type))
    return kind


def _check_predictions(path: str, labeled: pa.Table, expected: Expected) -> Iterator[str]:
    """Check what the predictions must be whatever the model says; yields the first row that breaks a rule."""
    statuses = labeled["status"]
    failed = pc.equal(statuses, str(Status.FAILED))
    labels = labeled["predicted_labels"]
    rules = {
        "an unknown status": pc.is_in(statuses, pa.array([str(status) for status in Status])),
        "another model": pc.equal(labeled["model"], expected.bundle),
        "labels though it failed, or none though it did not": pc.equal(pc.is_null(labels), failed),
        "an error though it is ok, or none though it is not": pc.equal(
            pc.is_null(labeled["error"]), pc.equal(statuses, str(Status.OK))
        ),
    }
    if "scores" in labeled.column_names:
        scores = labeled["scores"]
        rules["scores though it failed, or none though it did not"] = pc.equal(pc.is_null(scores), failed)
        rules["a score outside 0 to 1"] = pa.array(_within_bounds(scores))
    known = pc.is_in(
        pc.list_flatten(labels), pa.array(expected.vocabulary.labels, expected.vocabulary.arrow_type)
    )
    if not pc.all(known, min_count=0).as_py():
        yield f"{path}: predicted labels that the model does not know"
    for what, holds in rules.items():
        row = pc.index(pc.fill_null(holds, False), False).as_py()
        if row >= 0:
            yield f"{path}: row {row}: has {what}"


def _within_bounds(scores: pa.ChunkedArray) -> np.ndarray:
    flat = pc.list_flatten(scores)
    values = pc.struct_field(flat, "score") if pa.types.is_struct(flat.type) else flat
    inside = np.asarray(
        pc.and_(pc.greater_equal(values, 0), pc.less_equal(values, 1)).combine_chunks()
    ).astype(bool)
    rows = np.asarray(pc.list_parent_indices(scores).combine_chunks())
    good = np.ones(len(scores), bool)
    good[rows[~inside]] = False
    return good
