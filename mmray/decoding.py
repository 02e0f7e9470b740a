"""From a row to what the model sees of it, and what was wrong with it. Without torch, as is `isolation`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mmray.captions import is_blank
from mmray.config import towers_of
from mmray.errors import DataError, SpoiltError
from mmray.faults import moment
from mmray.images import View, decode_image
from mmray.schema import Status
from mmray.uris import UnfetchedError

if TYPE_CHECKING:
    from torch import Tensor

DECODE_TIMEOUT_S = 30.0
"""A row that takes longer hangs; the largest image that is decoded takes some seconds."""

TURN_S = 5.0
"""And for each thread so long, since large images are decoded one by one: a row may have to wait its turn."""


class HungError(SpoiltError):
    """Decoding a row did not end: its thread cannot be stopped."""


class Row(NamedTuple):
    """One row, decoded: what the model sees of it, and what was wrong with it."""

    pixels: np.ndarray | Tensor | None
    """uint8 (S, S, 3); a tensor where a GPU decoded it, which holds it."""
    caption: str | None
    status: Status
    error: str | None


Image = bytes | UnfetchedError | None
"""An encoded image, why one that has a URI could not be had, or None where a row has none."""

Decode = Callable[[Image, str | None, str, int], Row]
"""Decodes (image, caption, fusion, size_px), as `decode_row` does."""


def decode_row(image: Image, caption: str | None, fusion: str, size_px: int, view: View | None = None) -> Row:
    """Decode what a fusion needs of one row, and say how it may be labeled. Never raises for bad data.

    Args:
        image: encoded, or why there is none.
        caption: or None.
        fusion: of the model.
        size_px: side of the square.
        view: what augmentation drew, in training.
    """
    moment("decode", caption or "")
    pixels, status, error = None, Status.OK, None
    if "image" in towers_of(fusion):
        try:
            if image is None:
                raise UnfetchedError("image is null", Status.NO_IMAGE)
            if isinstance(image, UnfetchedError):
                raise image
            pixels = decode_image(image, size_px, view)
        except UnfetchedError as reason:
            status, error = reason.status, str(reason)
        except DataError as reason:
            status, error = Status.BAD_IMAGE, str(reason)
    return described(pixels, caption, fusion, status, error)


def described(
    pixels: np.ndarray | Tensor | None,
    caption: str | None,
    fusion: str,
    status: Status = Status.OK,
    error: str | None = None,
) -> Row:
    """Say how a row may be labeled, of which so much is known by its image.

    Args:
        pixels: of its image, or None.
        caption: or None.
        fusion: of the model.
        status: by the image alone.
        error: why there are no pixels.
    """
    wanted = "caption" in towers_of(fusion)
    readable = wanted and not is_blank(caption)
    if wanted and not readable:
        missing = "caption is null" if caption is None else "caption is empty"
        error = f"{error}; {missing}" if error else missing
        status = Status.NO_CAPTION if status is Status.OK else Status.FAILED
    if pixels is None and not readable:
        status = Status.FAILED
    return Row(pixels, caption if readable else None, status, error)


Waiting = Callable[[], list[Row]]
"""Waits for rows that are being decoded, and gives them."""


class RowDecoder:
    """Decodes rows in threads, which several callers may share. A row that hangs is told of."""

    def __init__(self, fusion: str, size_px: int, num_threads: int, decode: Decode | None = None) -> None:
        """Take what `decode_row` wants to know.

        Args:
            fusion: of the model.
            size_px: side of the square.
            num_threads: rows at a time.
            decode: what decodes a row, and keeps its own time [default: `decode_row`].
        """
        self.fusion, self.size_px = fusion, size_px
        self.decode = decode or decode_row
        self.timeout_s = None if decode else max(DECODE_TIMEOUT_S, TURN_S * num_threads)
        self.num_threads = num_threads
        self.threads, self.replacing = ThreadPoolExecutor(num_threads, "decode"), threading.Lock()

    def submit(self, images: Sequence[Image | Row], captions: Sequence[str | None]) -> Waiting:
        """Begin to decode some rows; what has been decoded before stays as it is.

        Returns:
            A function that waits for them, and raises HungError where one of them, or of those that
            another caller waits for, hung its thread.
        """
        with self.replacing:
            threads = self.threads
            rows = [
                image
                if isinstance(image, Row)
                else threads.submit(self.decode, image, caption, self.fusion, self.size_px)
                for image, caption in zip(images, captions, strict=True)
            ]
        return lambda: [row if isinstance(row, Row) else self._result(row, threads) for row in rows]

    def _result(self, row: Future[Row], threads: ThreadPoolExecutor) -> Row:
        while True:
            # A row that only waits for a thread, behind another caller's, hangs nothing.
            decoding = row.running()
            try:
                return row.result(self.timeout_s)
            except CancelledError:
                raise HungError("a row was given up, since another one hung") from None
            except TimeoutError:
                if decoding:
                    self._replace(threads)
                    raise HungError(f"a row was not decoded within {self.timeout_s:.0f} s") from None

    def _replace(self, hung: ThreadPoolExecutor) -> None:
        """Let others begin anew, in threads that nothing holds; of two callers whose rows hang, one does."""
        with self.replacing:
            if self.threads is hung:
                self.threads = ThreadPoolExecutor(self.num_threads, "decode")
                hung.shutdown(wait=False, cancel_futures=True)
