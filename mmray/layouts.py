"""Raw layouts as rows: the CSV of Kaggle's set, COCO's JSON, and a CSV beside a folder of images."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from mmray.errors import DataError

EXTENSIONS = "jpg|jpeg|png|webp|gif|bmp|tif|tiff|avif"
_RECORD = re.compile(rf'^([^,"\r\n]+\.(?:{EXTENSIONS})),', re.IGNORECASE | re.MULTILINE)


class Row(NamedTuple):
    """A row of a raw layout. `path` is relative to the images; `labels` is None where the source has none."""

    image_id: str
    path: str
    caption: str | None = None
    labels: tuple[str, ...] | None = None


def kaggle_rows(text: str, source: str) -> Iterator[Row]:
    """Read `ImageID,Labels,Caption` or `ImageID,Caption`, whose quotes are not escaped.

    A record begins at a line that starts with `<name>.<image extension>,`. What follows up to the next such
    line is its caption: white space around it and one pair of outer quotes fall away, and all between the
    quotes stays as it is, line breaks included. image_id is the name; spaces separate the labels.

    Raises:
        DataError: another header, text before the first record, or a record without its labels.
    """
    header, _, body = text.partition("\n")
    columns = header.strip().split(",")
    if columns not in (["ImageID", "Labels", "Caption"], ["ImageID", "Caption"]):
        raise DataError(f"{source}: expected ImageID,Labels,Caption or ImageID,Caption, not {header[:80]!r}")
    before, *pieces = _RECORD.split(body)
    if lost := before.strip()[:80]:
        raise DataError(f"{source} line 2: {lost!r} begins no record; expected one such as 0.jpg,...")
    for name, caption in zip(pieces[::2], pieces[1::2], strict=True):
        labels = None
        if "Labels" in columns:
            field, _, caption = caption.partition(",")
            if '"' in field or "\n" in field.strip():
                raise DataError(f"{source}: the record of {name!r} has no labels; expected {header.strip()}")
            labels = tuple(field.split())
        caption = caption.strip()
        if len(caption) > 1 and caption[0] == caption[-1] == '"':
            caption = caption[1:-1]
        yield Row(name.strip(), name.strip(), caption or None, labels)


def coco_rows(instances_json: str, captions_json: str, source: str) -> list[Row]:
    """Join COCO's instances and captions: one row per image, in the order of the instances' `images`.

    image_id is the image's id; labels are the names of its categories, sorted and unique, none where it has
    no annotation; the caption is the first that the captions give for it. Another layout is a DataError.
    """
    try:
        instances, captions = json.loads(instances_json), json.loads(captions_json)
        names = {category["id"]: str(category["name"]) for category in instances["categories"]}
        labels = defaultdict(set)
        for annotation in instances["annotations"]:
            labels[annotation["image_id"]].add(names[annotation["category_id"]])
        backwards = reversed(captions["annotations"])  # so that the first stays
        first = {annotation["image_id"]: str(annotation["caption"] or "") for annotation in backwards}
        images = [(image["id"], str(image["file_name"])) for image in instances["images"]]
    except (KeyError, TypeError, ValueError) as error:
        layout = "images: id, file_name; annotations: image_id, category_id or caption; categories: id, name"
        raise DataError(f"{source}: expected COCO's {layout}; found {error!r}") from None
    return [Row(str(i), path, first.get(i) or None, tuple(sorted(labels[i]))) for i, path in images]


def csv_rows(text: str, source: str) -> Iterator[Row]:
    """Read a CSV with the column `image` (a path, and the image_id) and, if wanted, `caption` and `labels`.

    Labels are separated by `|` where the cell has one, else by spaces: `traffic light|dog`, `10 18`. Other
    columns, broken quotes, and lines with more or fewer fields than the first are a DataError.
    """
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = list(reader.fieldnames or [])
        if "image" not in columns or not {*columns} <= {"image", "caption", "labels"}:
            raise DataError(f"{source}: expected the columns image, caption, labels, not {columns}")
        for row in reader:
            if None in row or None in row.values():
                raise DataError(f"{source} line {reader.line_num}: expected {len(columns)} fields, {columns}")
            cell = row.get("labels", "")
            labels = tuple(filter(None, map(str.strip, cell.split("|" if "|" in cell else None))))
            path, caption = row["image"], row.get("caption") or None
            yield Row(path, path, caption, labels if "labels" in row else None)
    except csv.Error as error:
        raise DataError(f"{source} after line {reader.line_num}: {error}; quote as RFC 4180 says") from None
