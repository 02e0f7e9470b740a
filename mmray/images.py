"""Encoded bytes to uint8 pixels: the one decode, for training and labeling alike; and augmentation.

An image is squeezed to a square rather than cropped to one, since a label may sit at its edge. Pixels leave
as uint8; the model normalises on its device.
"""

from __future__ import annotations

import io
import threading
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from mmray.errors import DataError, one_line
from mmray.randaugment import Operation, apply_operations, draw_operations

DECODER = "pillow-1"
"""Names the pixels that `decode_image` gives. Part of the fingerprint: change it when they change."""

GPU_DECODER = "nvjpeg-1"
"""Names those that `mmray.gpu_decoding` gives: the GPU's of most JPEGs, and Pillow's of all else;
Pillow's, too, where the successor of a worker that died decodes."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")
"""What web archives hold. Pillow knows more, some of it by calling other programs."""

MAX_PIXELS = 89_478_485
"""Larger images are refused before they are decoded: Pillow's own limit against decompression bombs."""

LARGE_PIXELS = 16_000_000
"""What comes out larger is decoded one at a time: on their way to RGB images take up to 20 bytes a pixel."""

ONE_LARGE = threading.Lock()

Box = tuple[float, float, float, float]

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class View(NamedTuple):
    """One random look at an image: where it is cropped, whether it is mirrored, what becomes of it then."""

    box: Box = (0.0, 0.0, 1.0, 1.0)
    mirrored: bool = False
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    operations: tuple[Operation, ...] = ()


@dataclass(frozen=True)
class Augmentation:
    """Random crop, mirror, colour and RandAugment for training."""

    crop: float
    colour: float
    magnitude: float = 0
    """Of RandAugment, 0 to 10; 0 is off."""

    def draw(self, generator: np.random.Generator) -> View:
        """Draw a view.

        The crop keeps a share of the area between `crop` and 1; its aspect is 3/4 to 4/3 of the image's,
        or nearer to it where the crop is nearly all.
        """
        area = generator.uniform(self.crop, 1)
        aspect = np.exp(generator.uniform(-1, 1) * np.log(4 / 3))
        width = min(
            1.0, max(area, np.sqrt(area * aspect))
        )  # a crop as wide or high as the image is less oblong
        height = area / width
        left, top = generator.uniform(0, 1 - width), generator.uniform(0, 1 - height)
        factors = 1 + generator.uniform(-self.colour, self.colour, 3)
        box = (float(left), float(top), float(left + width), float(top + height))
        mirrored = bool(generator.random() < 0.5)
        operations = draw_operations(generator, self.magnitude) if self.magnitude else ()
        brightness, contrast, saturation = map(float, factors)
        return View(box, mirrored, brightness, contrast, saturation, operations)


def decode_image(data: bytes, size_px: int, view: View | None = None) -> np.ndarray:
    """Decode an image to a square.

    Args:
        data: the encoded image.
        size_px: side of the square.
        view: what augmentation drew; None shows the whole image as it is.

    Returns:
        pixels: uint8 (size_px, size_px, 3), RGB.

    Raises:
        DataError: the bytes are no image of a known format, are damaged, or hold more than `MAX_PIXELS`.
    """
    if not data:
        raise DataError("image has no bytes")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(
                    f"image of {image.width}x{image.height} pixels is above the limit of {MAX_PIXELS}"
                )
            box = view.box if view else (0.0, 0.0, 1.0, 1.0)
            whole = image.width * image.height
            _draft(image, size_px, box)
            # Of a progressive JPEG libjpeg holds every coefficient, at whatever size it comes out.
            held = whole if image.info.get("progressive") else image.width * image.height
            with ONE_LARGE if held > LARGE_PIXELS else nullcontext():
                square = _squeeze(image, size_px, box)
            # Asked once the pixels are there: Pillow turns a TIFF itself as it loads, and drops the tag.
            turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except DataError:
        raise
    except Exception as error:  # Pillow's readers raise whatever the damage makes them stumble over
        raise DataError(f"image cannot be decoded: {_reason(error)}") from None
    if turn is not None:
        square = square.transpose(turn)
    pixels = np.asarray(square)
    return _look(pixels, view) if view else pixels


def _draft(image: Image.Image, size_px: int, box: Box) -> None:
    """Let libjpeg decode at 1/2, 1/4 or 1/8 where that still has the pixels that the crop needs."""
    left, top, right, bottom = box
    image.draft("RGB", (int(size_px / (right - left)) + 1, int(size_px / (bottom - top)) + 1))


def _squeeze(image: Image.Image, size_px: int, box: Box) -> Image.Image:
    left, top, right, bottom = box
    pixels = (left * image.width, top * image.height, right * image.width, bottom * image.height)
    return _as_rgb(image).resize((size_px, size_px), Image.Resampling.BICUBIC, box=pixels)


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode in (
        "I",
        "F",
        "I;16",
        "I;16B",
        "I;16L",
    ):  # 16 bits a pixel, which convert() would clip at 255
        values = np.asarray(image, np.float32)
        deep = values.max(initial=0) > 255
        return Image.fromarray((values / 257 if deep else values).clip(0, 255).astype(np.uint8)).convert(
            "RGB"
        )
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def _look(pixels: np.ndarray, view: View) -> np.ndarray:
    if view.mirrored:
        pixels = pixels[:, ::-1]
    if view.operations:
        pixels = np.asarray(apply_operations(Image.fromarray(pixels), view.operations))
    if view.brightness == view.contrast == view.saturation == 1:
        return np.ascontiguousarray(pixels)
    colours = pixels.astype(np.float32) * view.brightness
    grey = colours @ np.array([0.299, 0.587, 0.114], np.float32)
    colours = grey[..., None] + view.saturation * (colours - grey[..., None])
    mean = grey.mean()
    return (mean + view.contrast * (colours - mean)).clip(0, 255).astype(np.uint8)


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image of a known format"
    if isinstance(error, Image.DecompressionBombError):  # names twice the limit, where Pillow itself stops
        return f"it has more pixels than the limit of {MAX_PIXELS}"
    return one_line(f"{type(error).__name__}: {error}", 200)
