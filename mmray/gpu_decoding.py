"""JPEGs decoded on the GPU, a batch at a time; all other images by threads beside it.

The GPU's pixels differ a little from Pillow's: it enlarges colours, which JPEGs hold at half the size, in
another way, and it always decodes at full size.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torch.nn import functional
from torchvision.io import ImageReadMode, decode_jpeg

from mmray.config import towers_of
from mmray.decoding import Image, Row, RowDecoder, Waiting, described
from mmray.errors import ConfigError
from mmray.images import LARGE_PIXELS
from mmray.jpeg import plain_size
from mmray.predictor import DeviceError

log = logging.getLogger(__name__)

PIXELS_AT_ONCE = 2 * LARGE_PIXELS
"""Of images that are decoded together: 96 MB on the GPU, and 768 more at most while they are resized."""

Encoded = tuple[bytes, int]
"""An image, and how many pixels it has."""


class GpuDecoder:
    """Decodes rows as `RowDecoder` does, to which it leaves all but plain JPEGs, and what the GPU refuses."""

    def __init__(self, rows: RowDecoder, device: torch.device) -> None:
        """Take what decodes the others, and a GPU; tests take a CPU.

        Raises:
            ConfigError: torchvision cannot decode on it.
        """
        self.rows, self.device = rows, device
        self.thread = ThreadPoolExecutor(1, "decode on the GPU")
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.has_warned = False
        try:
            decode_jpeg([_as_tensor(_smallest())], ImageReadMode.RGB, device)
        except RuntimeError as error:
            raise ConfigError(f"--decode gpu: torchvision decodes no JPEG on {device}: {error}") from None

    def submit(self, images: Sequence[Image | Row], captions: Sequence[str | None]) -> Waiting:
        """Begin to decode some rows; what has been decoded before stays as it is.

        Returns:
            A function that waits for them, and raises HungError as `RowDecoder`'s does; DeviceError where
            the GPU fails for good.
        """
        plain = _plain(images) if "image" in towers_of(self.rows.fusion) else {}
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
            decoded = decode_jpeg([*map(_as_tensor, images)], ImageReadMode.RGB, self.device)
            squares: list[Tensor | None] = [*self._resized(decoded)]
            self._synchronize()
            return squares
        except torch.AcceleratorError as error:
            raise DeviceError(str(error)) from error
        except RuntimeError as error:  # names none of the images; or they do not fit into the GPU's memory
            reason = str(error)  # not the error, which holds what was decoded
        self._synchronize()
        if len(images) == 1:
            self._warn(reason)
            return [None]
        half = len(images) // 2
        return self._squares(images[:half]) + self._squares(images[half:])

    def _synchronize(self) -> None:
        """Wait for the GPU: torchvision takes memory that this stream freed, whatever still works on it.

        Source: https://github.com/pytorch/vision/pull/9606.
        """
        if self.stream:
            try:
                self.stream.synchronize()
            except torch.AcceleratorError as error:
                raise DeviceError(str(error)) from error

    def _warn(self, reason: str) -> None:
        if not self.has_warned:
            log.warning("the GPU refuses an image, which is decoded beside it, as others may be: %s", reason)
        self.has_warned = True

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


def on_device(pixels: Sequence[np.ndarray | Tensor | None], size_px: int, device: torch.device) -> Tensor:
    """Put squares together on the GPU that decoded some of them: uint8 (B, S, S, 3).

    Whoever gave them holds them until the result has been used, or their memory might be taken before.

    Raises:
        torch.OutOfMemoryError: they do not fit once more into the GPU's memory.
        DeviceError: the GPU fails for good.
    """
    # Not by an index of places, whose copy to the GPU makes the host wait for all that is under way.
    others = [each for each in pixels if isinstance(each, np.ndarray)]
    try:
        host = torch.from_numpy(np.stack(others)) if others else torch.empty(0)
        pinned = host.pin_memory() if device.type == "cuda" else host
        sent = iter(pinned.to(device, non_blocking=True))
        black = torch.zeros(size_px, size_px, 3, dtype=torch.uint8, device=device)
        return torch.stack(
            [each if isinstance(each, Tensor) else black if each is None else next(sent) for each in pixels]
        )
    except torch.AcceleratorError as error:
        raise DeviceError(str(error)) from error


def _as_tensor(image: bytes) -> Tensor:
    return torch.frombuffer(bytearray(image), dtype=torch.uint8)


def _smallest() -> bytes:
    file = io.BytesIO()
    PIL.Image.new("RGB", (8, 8)).save(file, "JPEG")
    return file.getvalue()


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
