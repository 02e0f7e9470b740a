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
from mmray.label_studio import Answer, read_answers
from mmray.parquet import DataFile, describe_files, find_files, read_units
from mmray.prepare import INTEGER
from mmray.schema import CANONICAL_SCHEMA, Label
from mmray.storage import Folder, read_text

PART_BYTES = 64 << 20


class Answered(NamedTuple):
    """What was written."""

    num_rows: int
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
    folder, files = find_files(input_uri)
    if strange := sorted(answers.keys() - files.keys()):
        raise DataError(
            f"{answers_uri}: {strange[0]} is no file of {input_uri}; were other rows asked about?"
        )
    if present := list(output.list(".parquet")):
        raise OutputError(f"{output} holds {present[0]}; choose an empty --output")
    counts = Counter(label for rows in answers.values() for each in rows.values() for label in each.labels)
    kind = int if all(map(INTEGER.fullmatch, counts)) else str
    asked = describe_files(folder, {path: files[path] for path in sorted(answers)}, columns.image)
    found = (rows for file, _ in asked for rows in _answered(folder, file, answers[file.path], columns, kind))
    num_rows = sum(_publish(output, part, rows) for part, rows in enumerate(_parts(found)))
    return Answered(num_rows, {kind(label): counts[label] for label in sorted(counts, key=kind)})


def _answered(
    folder: Folder, file: DataFile, answers: dict[int, Answer], columns: Columns, kind: type
) -> Iterator[pa.Table]:
    """Read the rows of one file that were answered, as canonical tables.

    Raises:
        DataError: the file has no such row.
    """
    if beyond := [row for row in answers if not 0 <= row < file.num_rows]:
        raise DataError(f"{folder}/{file.path} has no row {beyond[0]}: the answers are of other rows")
    units = [unit for unit in file.units if any(unit[0] <= row < unit[-1] for row in answers)]
    for first, end, table in read_units(folder, file, units):
        wanted = [row for row in sorted(answers) if first <= row < end]
        if not wanted:
            continue
        rows = pa.concat_tables(table.slice(row - first, 1) for row in wanted)
        rows = fetch_images(rows, columns.image, columns.image_prefixes)
        images = [image if isinstance(image, bytes) else None for image in image_values(rows[columns.image])]
        ids = [f"{file.path}:{row}" for row in wanted]
        if columns.id in rows.schema.names:
            ids = rows[columns.id].cast(pa.string()).to_pylist()
        lists = [[kind(label) for label in answers[row].labels] for row in wanted]
        labels = pa.array(lists, pa.list_(pa.int64() if kind is int else pa.string()))
        values = (ids, images, text_values(rows[columns.caption]))
        canonical = pa.Table.from_arrays(
            [pa.array(value, field.type) for value, field in zip(values, CANONICAL_SCHEMA, strict=True)],
            schema=CANONICAL_SCHEMA,
        )
        yield canonical.append_column("labels", labels)


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


def _publish(output: Folder, part: int, rows: pa.Table) -> int:
    file = io.BytesIO()
    pq.write_table(rows, file, compression="zstd", use_dictionary=False)
    output.publish(f"part-{part:05}.parquet", file.getvalue())
    return rows.num_rows
