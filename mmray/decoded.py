"""Decoded rows as a column: how pixels travel from the CPUs that decode to the actor that has the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmray.decoding import Row
from mmray.schema import Status

DECODED = pa.struct(
    [
        ("pixels", pa.large_binary()),  # uint8 (S, S, 3)
        ("readable", pa.bool_()),  # the caption, which stands in a column of its own
        ("status", pa.string()),
        ("error", pa.string()),
    ]
)
"""Stands in the place of the encoded images."""


def to_column(rows: Sequence[Row]) -> pa.StructArray:
    """Put B rows into a column of type `DECODED`."""
    shown = [row.pixels for row in rows if row.pixels is not None]
    offsets = np.cumsum([0, *(0 if row.pixels is None else row.pixels.size for row in rows)])
    valid = np.packbits(np.array([row.pixels is not None for row in rows], bool), bitorder="little")
    pixels = np.concatenate([image.ravel() for image in shown]) if shown else np.zeros(0, np.uint8)
    buffers = [pa.py_buffer(part) for part in (valid, offsets.astype(np.int64), pixels)]
    return pa.StructArray.from_arrays(
        [
            pa.Array.from_buffers(pa.large_binary(), len(rows), buffers),
            pa.array([row.caption is not None for row in rows], pa.bool_()),
            pa.array([str(row.status) for row in rows], pa.string()),
            pa.array([row.error for row in rows], pa.string()),
        ],
        fields=[*DECODED],
    )


def from_column(column: pa.ChunkedArray, captions: Sequence[str | None], size_px: int) -> list[Row]:
    """Take B rows out of a column of type `DECODED`; their pixels are views of it.

    Args:
        column: of any number of chunks.
        captions: B captions.
        size_px: S.
    """
    pixels = [image for chunk in column.chunks for image in _pixels(chunk, size_px)]
    others = (pc.struct_field(column, name).to_pylist() for name in ("readable", "status", "error"))
    return [
        Row(image, caption if readable else None, Status(status), error)
        for image, caption, readable, status, error in zip(pixels, captions, *others, strict=True)
    ]


def _pixels(chunk: pa.StructArray, size_px: int) -> Iterator[np.ndarray | None]:
    images = pc.struct_field(chunk, "pixels")
    _, offsets, values = images.buffers()
    starts = np.frombuffer(offsets, np.int64)[images.offset :]
    flat = np.frombuffer(values, np.uint8) if values else np.zeros(0, np.uint8)
    for row, valid in enumerate(images.is_valid().to_pylist()):
        yield flat[starts[row] : starts[row + 1]].reshape(size_px, size_px, 3) if valid else None
