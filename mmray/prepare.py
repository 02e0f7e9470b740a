"""Raw layouts (Kaggle's CSV, COCO's JSON, a folder of images) to the canonical dataset of Parquet files.

The driver parses the table, lists the images once and cuts the rows into parts. A part is one task, which
fetches images and publishes one file, under a name that a retry writes again. A row whose image is missing or
unreadable stays, and is listed in `_prepare/rejected.jsonl`.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray.data

from mmray.errors import DataError, OutputError
from mmray.files import read_text
from mmray.images import decode_image
from mmray.layouts import EXTENSIONS, Row, coco_rows, csv_rows, kaggle_rows
from mmray.options import require_range
from mmray.schema import CANONICAL_SCHEMA, Label
from mmray.storage import Folder

PART_BYTES, PART_ROWS = 256 * 2**20, 100_000  # what one task and its file hold at most
GROUP_BYTES, GROUP_ROWS = 64 * 2**20, 1_000  # what a row group, and so a task in memory, holds at most
REJECTED_PATH = "_prepare/rejected.jsonl"
_IMAGE = re.compile(rf"\.({EXTENSIONS})$", re.IGNORECASE)
_OUTSIDE = re.compile(r"(^|/)\.\.(/|$)|^/|^[A-Za-z]:|\\|://")  # also by a drive, a Windows separator, a URL
_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,17}")  # fits int64 and is written the same way again, unlike 007


@dataclass(frozen=True)
class Prepared:
    """What was written, and what was wrong with it."""

    num_rows: int  # all rows of the source
    num_with_image: int  # rows that hold the bytes of an image, readable or not
    num_missing: int  # rows without one, since the folder has none at their path
    num_unreadable: int  # rows whose image cannot be decoded
    num_duplicates: int  # rows whose image_id an earlier row has
    num_left_out: int  # images in the folder that no row names
    num_files: int
    num_bytes: int  # of the files
    labels: dict[Label, int]  # label -> rows that have it, in the order of the labels
    rejected_uri: str  # JSON lines with image_id and reason, of the missing and the unreadable


def prepare_kaggle(csv_uri: str, images_uri: str, output_uri: str, val_fraction: float = 0.0) -> Prepared:
    """Prepare the layout of the COMP5329 Kaggle set, as `kaggle_rows` reads it.

    Raises:
        DataError: the CSV has another layout, or names an image outside the folder.
        ConfigError: the validation fraction is none.
        OutputError: the output holds other Parquet files.
    """
    rows = kaggle_rows(read_text(csv_uri), csv_uri)
    return _prepare(rows, csv_uri, Folder(images_uri), Folder(output_uri), val_fraction)


def prepare_coco(
    instances_uri: str, captions_uri: str, images_uri: str, output_uri: str, val_fraction: float = 0.0
) -> Prepared:
    """Prepare COCO's annotations, as `coco_rows` reads them. Raises as `prepare_kaggle` does."""
    source = f"{instances_uri} with {captions_uri}"
    rows = coco_rows(read_text(instances_uri), read_text(captions_uri), source)
    return _prepare(rows, source, Folder(images_uri), Folder(output_uri), val_fraction)


def prepare_folder(
    images_uri: str, output_uri: str, csv_uri: str | None = None, val_fraction: float = 0.0
) -> Prepared:
    """Prepare the images that a CSV names (see `csv_rows`), or all. Raises as `prepare_kaggle` does."""
    rows = csv_rows(read_text(csv_uri), csv_uri) if csv_uri else None
    return _prepare(rows, csv_uri or images_uri, Folder(images_uri), Folder(output_uri), val_fraction)


def cut(sizes: Sequence[int], most_bytes: int, most_rows: int) -> Iterator[slice]:
    """Cut consecutive rows into runs that keep both limits; a row above `most_bytes` is a run of its own."""
    first, total = 0, 0
    for row, size in enumerate([*sizes, most_bytes + 1]):  # the last of which closes the last run
        if row > first and (total + size > most_bytes or row - first == most_rows):
            yield slice(first, row)
            first, total = row, 0
        total += size


def _prepare(
    found: Iterable[Row] | None, source: str, images: Folder, output: Folder, val_fraction: float
) -> Prepared:
    """Write the rows that were found in the source, or without any one row for each image."""
    require_range("--val-fraction", val_fraction, 0, 1)
    sizes = images.list()
    in_folder = [path for path in sizes if _IMAGE.search(path)]
    if not in_folder:
        raise DataError(f"{images}: no images there; check --images")
    found = (Row(path, path) for path in in_folder) if found is None else found
    rows = [_checked(row, f"{source} record {number}", sizes) for number, row in enumerate(found, 1)]
    labels = Counter(label for row in rows for label in set(row.labels or ()))
    kind: Callable[[str], Label] = int if all(map(_INTEGER.fullmatch, labels)) else str
    parts = {
        (file := f"{folder}part-{number:05d}.parquet"): _table(file, members[run], sizes, kind)
        for folder, members in _divided(rows, source, val_fraction).items()
        for number, run in enumerate(cut([sizes.get(row.path, 0) for row in members], PART_BYTES, PART_ROWS))
    }
    rejected = _write_parts(parts, images, output)
    num_missing = sum(row["missing"] for row in rejected)
    files = output.list(".parquet")
    return Prepared(
        num_rows=len(rows),
        num_with_image=len(rows) - num_missing,
        num_missing=num_missing,
        num_unreadable=len(rejected) - num_missing,
        num_duplicates=len(rows) - len({row.image_id for row in rows}),
        num_left_out=len(set(in_folder) - {row.path for row in rows}),
        num_files=len(files),
        num_bytes=sum(files.values()),
        labels={kind(label): labels[label] for label in sorted(labels, key=kind)},
        rejected_uri=f"{output}/{REJECTED_PATH}",
    )


def _divided(rows: list[Row], source: str, val_fraction: float) -> dict[str, list[Row]]:
    """Put rows into the folders of training and validation, if there are to be such.

    Raises:
        DataError: there are no rows, or none for one of them.
    """
    folders = defaultdict[str, list[Row]](list)
    for row in rows:
        # From the image_id alone, so that it is the same in every run and on every machine.
        share = int.from_bytes(hashlib.sha256(row.image_id.encode()).digest()[:8]) / 2**64
        folders[("val/" if share < val_fraction else "train/") if val_fraction else ""].append(row)
    if len(folders) < (2 if val_fraction else 1):
        empty_side = f"--val-fraction {val_fraction} puts all {len(rows)} rows on one side; change it"
        raise DataError(f"{source}: {empty_side if rows else 'it has no rows'}")
    return folders


def _write_parts(parts: dict[str, pa.Table], images: Folder, output: Folder) -> list[dict[str, Any]]:
    """Write a file for each part, on the cluster, and the list of rows that are rejected; gives these.

    Raises:
        OutputError: the output holds files of another run.
    """
    if others := sorted(output.list(".parquet").keys() - parts.keys()):
        raise OutputError(f"{output} holds {others[0]}, which is not of this run; empty it or choose another")
    write = partial(write_part, images=images, output=output)  # whole blocks: one part, one task, one file
    reports = (
        ray.data.from_arrow(list(parts.values()))
        .map_batches(write, batch_size=None, batch_format="pyarrow", num_cpus=0.5)
        .iter_rows()
    )
    rejected = sorted(reports, key=lambda row: row["file"])
    lines = [{"image_id": row["image_id"], "reason": row["reason"]} for row in rejected]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    output.publish(REJECTED_PATH, text.encode())
    return rejected


def _checked(row: Row, where: str, sizes: dict[str, int]) -> Row:
    """Write the path as a listing does; refuse one that leads out of the folder, and text that is none."""
    if row.path not in sizes and _OUTSIDE.search(row.path):
        raise DataError(f"{where}: {row.path!r} leads out of --images; write a path relative to it")
    try:
        "".join((row.image_id, row.caption or "", *(row.labels or ()))).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: {error.object[:80]!r} is not valid Unicode; rename it") from None
    return row._replace(path=str(PurePosixPath(row.path)))


def _table(file: str, rows: list[Row], sizes: dict[str, int], kind: Callable[[str], Label]) -> pa.Table:
    """Lay a part out as `write_part` takes it."""
    added = [("file", pa.string()), ("path", pa.string()), ("size", pa.int64())]
    records = [row._asdict() | {"file": file, "size": sizes.get(row.path)} for row in rows]
    part = pa.Table.from_pylist(records, pa.schema([*CANONICAL_SCHEMA, *added]))
    labels = pa.array([row.labels for row in rows], pa.list_(pa.string()))
    labels = labels.cast(pa.list_(pa.int64() if kind is int else pa.string()))
    return part if rows[0].labels is None else part.append_column("labels", labels)


def write_part(part: pa.Table, images: Folder, output: Folder) -> pa.Table:
    """Fetch the images of a part, publish its file, and give the rows that are to be listed as rejected.

    A part has the file's columns, images still null, and file (its path in the output, the same in all rows),
    path and size (of the image, null where there is none). A rejected row: file, image_id, reason, missing.
    """
    (file,) = part["file"].unique().to_pylist()
    paths, sizes = part["path"].to_pylist(), part["size"].to_pylist()
    rows = part.drop_columns(["file", "path", "size"])
    missing, reasons = [], []
    with tempfile.NamedTemporaryFile() as local, ThreadPoolExecutor(16) as pool:
        # A dictionary of images, each there once, would only cost time.
        with pq.ParquetWriter(local.name, rows.schema, compression="zstd", use_dictionary=False) as writer:
            for group in cut([size or 0 for size in sizes], GROUP_BYTES, GROUP_ROWS):
                fetched = list(pool.map(partial(_fetch, images), paths[group], sizes[group]))
                encoded = pa.array([image for image, _ in fetched], pa.binary())
                writer.write_table(rows[group].set_column(1, CANONICAL_SCHEMA.field("image"), encoded))
                missing += [image is None for image, _ in fetched]
                reasons += [reason for _, reason in fetched]
        output.publish(file, Path(local.name))
    report = part.select(["file", "image_id"]).append_column("reason", pa.array(reasons, pa.string()))
    return report.append_column("missing", pa.array(missing)).drop_null()


def _fetch(images: Folder, path: str, size: int | None) -> tuple[bytes | None, str | None]:
    """Give the encoded image, if any, and the reason why it is rejected, if it is."""
    data = None
    try:
        if size is not None:
            data = images.read(path)
            decode_image(data, size_px=32)
    except (DataError, FileNotFoundError) as error:  # the latter: gone since it was listed, or a broken link
        return data, f"{path}: {error}"
    return data, f"{path}: no such image" if data is None else None
