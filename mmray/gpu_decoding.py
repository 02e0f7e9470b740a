"""JPEGs decoded on the GPU, a batch at a time; all other images by threads beside it.

The GPU's pixels differ a little from Pillow's: it enlarges colours, which JPEGs hold at half the size, in
another way, and it always decodes at full size.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.io import ImageReadMode, decode_jpeg

from mmray.decoding import Image, Row, RowDecoder, Waiting, described
from mmray.images import LARGE_PIXELS
from mmray.jpeg import plain_size
from mmray.predictor import DeviceError

log = logging.getLogger(__name__)

PIXELS_AT_ONCE = 2 * LARGE_PIXELS
"""Of images that are decoded together: 96 MB on the GPU, and 768 at most while they are resized."""

Encoded = tuple[bytes, int]
"""An image, and how many pixels it has."""


class GpuDecoder:
    """Decodes rows as `RowDecoder` does, to which it leaves all but plain JPEGs, and what the GPU refuses."""

    def __init__(self, rows: RowDecoder, device: torch.device) -> None:
        """Take what decodes the others, and a GPU; tests take a CPU."""
        self.rows, self.device = rows, device
        self.thread = ThreadPoolExecutor(1, "decode on the GPU")
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def submit(self, images: Sequence[Image | Row], captions: Sequence[str | None]) -> Waiting:
        """Begin to decode some rows; what has been decoded before stays as it is.

        Returns:
            A function that waits for them, and raises HungError as `RowDecoder`'s does; DeviceError where
            the GPU fails for good.
        """
        plain = {} if self.rows.fusion == "text" else _plain(images)
        decoding = self.thread.submit(self._decode, [*plain.values()])
        others = [row for row in range(len(images)) if row not in plain]
        waiting = self.rows.submit([images[row] for row in others], [captions[row] for row in others])

        def wait() -> list[Row]:
            found = dict(zip(others, waiting(), strict=True))
            refused = []
            for row, square in zip(plain, decoding.result(), strict=True):
                if square is None:
                    refused.append(row)
                else:
                    found[row] = described(square, captions[row], self.rows.fusion)
            if refused:
                again = self.rows.submit([images[row] for row in refused], [captions[row] for row in refused])
                found |= zip(refused, again(), strict=True)
            return [found[row] for row in range(len(images))]

        return wait

    def _decode(self, encoded: list[Encoded]) -> list[Tensor | None]:
        """Decode plain JPEGs to squares, uint8 (S, S, 3); None stands for one that the GPU refuses."""
        squares: list[Tensor | None] = []
        with torch.cuda.stream(self.stream):
            for part in _parts(encoded, self.rows.size_px**2):
                squares += self._squares(part)
        return squares

    def _squares(self, images: list[bytes]) -> list[Tensor | None]:
        try:
            bytes_of = [torch.frombuffer(bytearray(image), dtype=torch.uint8) for image in images]
            squares = self._resized(decode_jpeg(bytes_of, ImageReadMode.RGB, self.device))
            # torchvision takes memory that this stream freed, and does not wait for what still reads it.
            if self.stream:
                self.stream.synchronize()
            return list(squares)
        except torch.AcceleratorError as error:
            raise DeviceError(str(error)) from error
        except RuntimeError as error:  # names none of the images; or they do not fit into the GPU's memory
            reason = error
        if len(images) == 1:
            log.debug("an image is decoded beside the GPU: %s", reason)
            return [None]
        half = len(images) // 2
        return self._squares(images[:half]) + self._squares(images[half:])

    def _resized(self, images: Sequence[Tensor]) -> Tensor:
        """Squeeze images, uint8 (3, H, W), to squares, uint8 (B, S, S, 3), as `decode_image` does."""
        size = self.rows.size_px, self.rows.size_px
        squares = torch.cat(
            [
                functional.interpolate(image[None].float(), size, mode="bicubic", antialias=True)
                for image in images
            ]
        )
        return squares.round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _plain(images: Sequence[Image | Row]) -> dict[int, Encoded]:
    """Give the images that the GPU is asked for, by their places."""
    plain = {}
    for row, image in enumerate(images):
        if isinstance(image, bytes) and (size := plain_size(image)):
            pixels = size[0] * size[1]
            if pixels <= LARGE_PIXELS:
                plain[row] = image, pixels
    return plain


def _parts(encoded: list[Encoded], square: int) -> Iterator[list[bytes]]:
    """Cut images into parts that fit into memory, encoded, decoded and as squares of so many pixels."""
    part: list[bytes] = []
    held = 0
    for image, pixels in encoded:
        if part and held + max(pixels, square) > PIXELS_AT_ONCE:
            yield part
            part, held = [], 0
        part.append(image)
        held += max(pixels, square)
    if part:
        yield part
