"""Picked rows of a labeled output, read back with small versions of their images."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from PIL import Image

from mmray.columns import text_values
from mmray.errors import DataError
from mmray.fetch import fetch_images, image_values
from mmray.images import decode_image
from mmray.parquet import DataFile, read_units
from mmray.picking import RANDOM, Pick
from mmray.plan import Plan
from mmray.schema import Status, Vocabulary, output_name, score_matrix
from mmray.storage import Folder

THUMBNAIL_PX = 160
_TURNED = range(5, 9)  # EXIF orientations that swap width and height


@dataclass(frozen=True)
class Look:
    """A picked row, read back."""

    pick: Pick
    caption: str | None
    status: str
    error: str | None
    decided: np.ndarray
    """bool (L,)."""
    scores: np.ndarray
    """float32 (L,); zeros where none were kept."""
    thumbnail: bytes | None = None
    """JPEG, where the row has a sound image."""
    square: bytes | None = None
    """PNG of the same as the model sees it, if that is asked for."""


@dataclass(frozen=True)
class Reader:
    """Reads rows of an output, and their images of the input that it was made of."""

    output: Folder
    plan: Plan
    source: Folder | None
    prefixes: tuple[str, ...] = ()
    """Below which images that rows name by URI may be fetched."""
    thumbnail_px: int = THUMBNAIL_PX
    """Their longer side."""
    square_px: int | None = None
    """Side of the squares that the model sees, of rows picked at random."""

    @property
    def vocabulary(self) -> Vocabulary:
        """The labels."""
        return Vocabulary(tuple(self.plan.settings["labels"]))

    def read_all(self, picks: Sequence[Pick]) -> list[Look]:
        """Read rows, file by file on the cluster; gives them in the order of the picks.

        Raises:
            DataError: the input is not what was labeled.
        """
        by_path = defaultdict[str, list[Pick]](list)
        for pick in picks:
            by_path[pick.path].append(pick)
        read = ray.remote(num_cpus=0.5)(Reader.read)
        files = [file for file in self.plan.files if file.path in by_path]
        tasks = [read.remote(self, file, by_path[file.path]) for file in files]
        by_pick = {look.pick: look for looks in ray.get(tasks) for look in looks}
        return [by_pick[pick] for pick in picks]

    def read(self, file: DataFile, picks: Sequence[Pick]) -> list[Look]:
        """Read rows of one file."""
        rows = sorted({pick.row for pick in picks})
        labeled = self._labeled(file.path, rows)
        decided = self.vocabulary.encode(labeled["predicted_labels"]).astype(bool)
        scores = np.zeros(decided.shape, np.float32)
        if "scores" in labeled.schema.names:
            scores, _ = score_matrix(labeled["scores"], len(self.vocabulary))
        captions = text_values(labeled[self._caption])
        statuses, errors = labeled["status"].to_pylist(), labeled["error"].to_pylist()
        sound = (Status.OK, Status.NO_CAPTION)  # what could not be decoded then may kill this process now
        with_image = [row for row, status in zip(rows, statuses, strict=True) if status in sound]
        images = dict(self._images(file, with_image)) if self.source else {}

        def look(pick: Pick) -> Look:
            place, image = rows.index(pick.row), images.get(pick.row)
            known = (captions[place], statuses[place], errors[place], decided[place], scores[place])
            square_px = self.square_px if pick.kind == RANDOM else None
            square = as_png(image, square_px) if image and square_px else None
            return Look(pick, *known, thumbnail(image, self.thumbnail_px) if image else None, square)

        return [look(pick) for pick in picks]

    @property
    def _caption(self) -> str:
        return output_name(self.plan.settings["columns"]["caption"])

    def _labeled(self, path: str, rows: list[int]) -> pa.Table:
        """Read labeled rows, of a file's row groups those that hold them."""
        columns = ["predicted_labels", "status", "error", self._caption]
        columns += ["scores"] * (self.plan.settings["scores"] == "all")
        found, first = [], 0
        with self.output.open(path) as source:
            parquet = pq.ParquetFile(source)
            for group in range(parquet.num_row_groups):
                end = first + parquet.metadata.row_group(group).num_rows
                if inside := [row - first for row in rows if first <= row < end]:
                    table = parquet.read_row_group(group, columns=columns)
                    found += [table.slice(row, 1) for row in inside]
                first = end
        return pa.concat_tables(found)

    def _images(self, file: DataFile, rows: list[int]) -> Iterator[tuple[int, bytes]]:
        """Read the encoded images of rows, of those that have one; gives each with its row."""
        assert self.source is not None
        column = self.plan.settings["columns"]["image"]
        units = [unit for unit in file.units if any(unit[0] <= row < unit[-1] for row in rows)]
        for first, end, table in read_units(self.source, file, units, [column], salvage=True):
            if wanted := [row for row in rows if first <= row < end]:
                taken = pa.concat_tables(table.slice(row - first, 1) for row in wanted)
                images = image_values(fetch_images(taken, column, self.prefixes)[column])
                yield from (
                    (row, image)
                    for row, image in zip(wanted, images, strict=True)
                    if isinstance(image, bytes)
                )


def thumbnail(data: bytes, side_px: int) -> bytes | None:
    """Make a small JPEG of an image, in its own proportions and no larger; None of what is none."""
    try:
        pixels = Image.fromarray(decode_image(data, side_px))
    except DataError:
        return None
    with Image.open(io.BytesIO(data)) as image:
        turned = image.getexif().get(0x0112) in _TURNED
        width, height = image.size[::-1] if turned else image.size
    shrunk = min(1.0, side_px / max(width, height))
    size = max(1, round(width * shrunk)), max(1, round(height * shrunk))
    file = io.BytesIO()
    pixels.resize(size).save(file, "JPEG", quality=75)
    return file.getvalue()


def as_png(data: bytes, size_px: int) -> bytes | None:
    """Write what the model sees of an image, so that it sees just that again; None of what is none."""
    try:
        pixels = decode_image(data, size_px)
    except DataError:
        return None
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()
