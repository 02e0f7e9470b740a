"""What people answered, with the rows that they were asked about, as a dataset to train on."""

from __future__ import annotations

import io
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from mmray.columns import text_values
from mmray.config import Columns
from mmray.errors import DataError, OutputError
from mmray.fetch import fetch_images, image_values
from mmray.files import read_text
from mmray.fingerprints import fingerprint
from mmray.label_studio import Answer, read_answers
from mmray.parquet import DataFile, describe_files, find_files, read_units
from mmray.schema import CANONICAL_SCHEMA, Label
from mmray.storage import Folder

PART_BYTES = 64 << 20
RECORD = "_prepare/answers.json"
"""Sums up what the output is made of, so that the same command writes the same files again."""

OTHER_ROWS = "were people asked about other rows?"


class Answered(NamedTuple):
    """What was written."""

    num_rows: int
    num_without_image: int
    """Rows whose image is not there, or could not be fetched."""
    labels: dict[Label, int]
    """Label -> rows that have it, in the order of the labels."""


def prepare_answers(
    answers_uri: str, input_uri: str, output_uri: str, columns: Columns | None = None
) -> Answered:
    """Write rows that people have labeled as a canonical dataset, image and caption as they were.

    Args:
        answers_uri: what Label Studio exports, as JSON, of the tasks of `export_label_studio`.
        input_uri: the rows that the model had labeled.
        output_uri: folder for the dataset.
        columns: names of the input's columns.

    Raises:
        DataError: the answers are none, or of rows that the input does not have.
        OutputError: the output holds other files.
    """
    columns, output = columns or Columns(), Folder(output_uri)
    answers = defaultdict[str, dict[int, Answer]](dict)
    for answer in read_answers(read_text(answers_uri), answers_uri):
        answers[answer.file][answer.row] = answer
    if not answers:
        raise DataError(f"{answers_uri}: nobody has answered yet; export the tasks that are done")
    every = [each for rows in answers.values() for each in rows.values()]
    if len({each.integers for each in every}) > 1:
        raise DataError(f"{answers_uri}: answers to two models, of which one has integers as labels")
    folder, files = find_files(input_uri)
    if strange := sorted(answers.keys() - files.keys()):
        raise DataError(f"{answers_uri}: {strange[0]} is no file of {input_uri}; {OTHER_ROWS}")
    asked = describe_files(folder, {path: files[path] for path in sorted(answers)}, columns.image)
    for file, schema in asked:
        _require_asked(folder, file, schema, answers[file.path], columns)
    _take(output, fingerprint([[file.footer_sha256 for file, _ in asked], [list(each) for each in every]]))
    found = (
        rows
        for file, schema in asked
        for rows in _answered(folder, file, schema, answers[file.path], columns)
    )
    num_rows = num_without = 0
    for part, rows in enumerate(_parts(found)):
        _publish(output, part, rows)
        num_rows, num_without = num_rows + rows.num_rows, num_without + rows["image"].null_count
    counts = Counter(label for each in every for label in each.labels)
    return Answered(num_rows, num_without, {label: counts[label] for label in sorted(counts)})


def _require_asked(
    folder: Folder, file: DataFile, schema: pa.Schema, answers: dict[int, Answer], columns: Columns
) -> None:
    """Check that a file is the one whose rows people were asked about, and that its columns are usable.

    Raises:
        DataError: it is not.
    """
    where = f"{folder}/{file.path}"
    columns.require(schema, where)
    for row, answer in answers.items():
        if answer.footer_sha256 != file.footer_sha256 or not 0 <= row < file.num_rows:
            raise DataError(f"{where}: row {row} is not the one of the tasks; {OTHER_ROWS}")


def _take(output: Folder, record: str) -> None:
    """Take an output, or go on with it.

    Raises:
        OutputError: it holds other files.
    """
    if output.read_json(RECORD) != record:
        if present := list(output.list(".parquet")):
            raise OutputError(
                f"{output} holds {present[0]}, which is not of this run; choose another --output"
            )
        output.publish_json(RECORD, record)


def _answered(
    folder: Folder, file: DataFile, schema: pa.Schema, answers: dict[int, Answer], columns: Columns
) -> Iterator[pa.Table]:
    """Read the rows of one file that were answered, as canonical tables."""
    names = [name for name in (columns.image, columns.caption, columns.id) if name in schema.names]
    units = [unit for unit in file.units if any(unit[0] <= row < unit[-1] for row in answers)]
    for first, end, table in read_units(folder, file, units, names):
        wanted = [row for row in sorted(answers) if first <= row < end]
        if not wanted:
            continue
        rows = pa.concat_tables(table.slice(row - first, 1) for row in wanted)
        rows = fetch_images(rows, columns.image, columns.image_prefixes)
        images = [image if isinstance(image, bytes) else None for image in image_values(rows[columns.image])]
        ids = [f"{file.path}:{row}" for row in wanted]
        if columns.id in names:
            ids = rows[columns.id].cast(pa.string()).to_pylist()
        kind = pa.int64() if answers[wanted[0]].integers else pa.string()
        values = (ids, images, text_values(rows[columns.caption]), [answers[row].labels for row in wanted])
        schema_with_labels = CANONICAL_SCHEMA.append(pa.field("labels", pa.list_(kind)))
        yield pa.Table.from_arrays(
            [pa.array(value, field.type) for value, field in zip(values, schema_with_labels, strict=True)],
            schema=schema_with_labels,
        )


def _parts(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Put tables together until they fill a file."""
    held: list[pa.Table] = []
    for table in tables:
        held.append(table)
        if sum(each.nbytes for each in held) > PART_BYTES:
            yield pa.concat_tables(held)
            held = []
    if held:
        yield pa.concat_tables(held)


def _publish(output: Folder, part: int, rows: pa.Table) -> None:
    file = io.BytesIO()
    pq.write_table(rows, file, compression="zstd", use_dictionary=False)
    output.publish(f"part-{part:05}.parquet", file.getvalue())
