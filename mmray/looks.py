"""Picked rows of a labeled output, read back with small versions of their images."""

from __future__ import annotations

import io
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from PIL import ExifTags, Image

from mmray.columns import refuse_pickles, text_values
from mmray.damage import reading_labels
from mmray.decoding import Decode
from mmray.fetch import fetch_images, image_values
from mmray.images import FORMATS
from mmray.isolation import IsolatedDecoder
from mmray.parquet import DataFile, read_units
from mmray.picking import RANDOM, Pick
from mmray.schema import Status, Vocabulary, output_name, score_matrix
from mmray.storage import Folder

THUMBNAIL_PX = 160
_TURNED = range(5, 9)
"""Orientations of EXIF that swap width and height."""


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
    """float32 (L,); (0,) where not all were kept."""
    thumbnail: bytes | None = None
    """JPEG, where the row has a sound image."""
    square: bytes | None = None
    """PNG of the same as the model sees it, if that is asked for."""


@dataclass(frozen=True)
class Reader:
    """Reads rows of an output, and their images of the input that it was made of."""

    output: Folder
    settings: dict[str, Any]
    """Of the output's plan."""
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
        return Vocabulary(tuple(self.settings["labels"]))

    def read_all(self, files: Iterable[DataFile], picks: Sequence[Pick]) -> list[Look]:
        """Read rows, file by file on the cluster; gives them in the order of the picks.

        Args:
            files: of the plan.
            picks: of their rows.

        Raises:
            DataError: the input is not what was labeled.
            OutputError: a labeled file is gone or damaged.
        """
        by_path = defaultdict[str, list[Pick]](list)
        for pick in picks:
            by_path[pick.path].append(pick)
        read = ray.remote(num_cpus=0.5)(Reader.read)
        picked = [file for file in files if file.path in by_path]
        tasks = [read.remote(self, file, by_path[file.path]) for file in picked]
        by_pick = {look.pick: look for looks in ray.get(tasks) for look in looks}
        return [by_pick[pick] for pick in picks]

    def read(self, file: DataFile, picks: Sequence[Pick]) -> list[Look]:
        """Read rows of one file."""
        rows = sorted({pick.row for pick in picks})
        with reading_labels(f"{self.output}/{file.path}"):
            labeled = self._labeled(file.path, rows)
            decided = self.vocabulary.encode(labeled["predicted_labels"]).astype(bool)
            scores = np.zeros((len(rows), 0), np.float32)
            if "scores" in labeled.schema.names:
                scores, _ = score_matrix(labeled["scores"], len(self.vocabulary))
        captions = text_values(labeled[self._caption])
        statuses, errors = labeled["status"].to_pylist(), labeled["error"].to_pylist()
        sound = (Status.OK, Status.NO_CAPTION)
        with_image = [row for row, status in zip(rows, statuses, strict=True) if status in sound]
        at_random = {pick.row for pick in picks if pick.kind == RANDOM}
        images = dict(self._images(file, with_image, at_random)) if self.source else {}
        places = {row: place for place, row in enumerate(rows)}

        def look(pick: Pick) -> Look:
            place = places[pick.row]
            known = (captions[place], statuses[place], errors[place], decided[place], scores[place])
            return Look(pick, *known, *images.get(pick.row, (None, None)))

        return [look(pick) for pick in picks]

    @property
    def _caption(self) -> str:
        return output_name(self.settings["columns"]["caption"])

    def _labeled(self, path: str, rows: list[int]) -> pa.Table:
        """Read labeled rows, of a file's row groups those that hold them."""
        columns = ["predicted_labels", "status", "error", self._caption]
        columns += ["scores"] * (self.settings["scores"] == "all")
        found, first = [], 0
        with self.output.open(path) as source:
            parquet = pq.ParquetFile(source)
            refuse_pickles(parquet.schema_arrow, f"{self.output}/{path}")
            for group in range(parquet.num_row_groups):
                end = first + parquet.metadata.row_group(group).num_rows
                if inside := between(rows, first, end):
                    table = parquet.read_row_group(group, columns=columns)
                    found += [table.slice(row - first, 1) for row in inside]
                first = end
        return pa.concat_tables(found)

    def _images(
        self, file: DataFile, rows: list[int], at_random: set[int]
    ) -> Iterator[tuple[int, tuple[bytes | None, bytes | None]]]:
        """Give rows with thumbnail and square; of one shard at a time the images are held as they are."""
        assert self.source is not None
        column, decoder = self.settings["columns"]["image"], IsolatedDecoder()
        units = [unit for unit in file.units if between(rows, unit[0], unit[-1])]
        for first, end, table in read_units(self.source, file, units, [column], salvage=True):
            if wanted := between(rows, first, end):
                taken = pa.concat_tables(table.slice(row - first, 1) for row in wanted)
                images = image_values(fetch_images(taken, column, self.prefixes)[column])
                for row, image in zip(wanted, images, strict=True):
                    if isinstance(image, bytes):
                        square_px = self.square_px if row in at_random else None
                        square = as_png(decoder, image, square_px) if square_px else None
                        yield row, (thumbnail(decoder, image, self.thumbnail_px), square)


def between(rows: list[int], first: int, end: int) -> list[int]:
    """Give those of sorted rows that lie from `first` up to `end`."""
    return rows[bisect_left(rows, first) : bisect_left(rows, end)]


def thumbnail(decoder: Decode, data: bytes, side_px: int) -> bytes | None:
    """Make a small JPEG of an image, in its own proportions and no larger; None of what is none.

    Decoded by another process: a model of captions alone called rows sound whose image may be anything.
    """
    pixels = decoder(data, None, "image", side_px).pixels
    if pixels is None:
        return None
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        # Pillow turns a TIFF itself, and says so in its size.
        turned = image.format != "TIFF" and image.getexif().get(ExifTags.Base.Orientation) in _TURNED
        width, height = image.size[::-1] if turned else image.size
    shrunk = min(1.0, side_px / max(width, height))
    size = max(1, round(width * shrunk)), max(1, round(height * shrunk))
    file = io.BytesIO()
    Image.fromarray(np.asarray(pixels)).resize(size).save(file, "JPEG", quality=75)
    return file.getvalue()


def as_png(decoder: Decode, data: bytes, size_px: int) -> bytes | None:
    """Write what the model sees of an image, so that it sees just that again; None of what is none."""
    pixels = decoder(data, None, "image", size_px).pixels
    if pixels is None:
        return None
    file = io.BytesIO()
    Image.fromarray(np.asarray(pixels)).save(file, "PNG", compress_level=1)
    return file.getvalue()
