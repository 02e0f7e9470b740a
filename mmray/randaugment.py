"""RandAugment: a few drawn operations on a picture, all of one magnitude.

What is drawn is data, so that applying it is a pure function; timm's and torchvision's draw as they go, from
global state, and bring torch into every process that decodes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

NUM_OPERATIONS = 2
MAX_MAGNITUDE = 10

Operation = tuple[str, float]
"""Name, and strength in [-1, 1]; operations that have no direction look at its size alone."""


def draw_operations(generator: np.random.Generator, magnitude: float) -> tuple[Operation, ...]:
    """Draw operations, each in a random direction.

    Args:
        generator: where chance comes from.
        magnitude: 0 to 10.

    Returns:
        `NUM_OPERATIONS` of `OPERATIONS`, with repetition.

    Source: Cubuk et al. 2019 (arXiv 1909.13719), with their N of 2, their operations, and the ranges of
    AutoAugment that they name. Ours: enhancements go either way too, posterizing and solarizing grow with the
    magnitude, and what comes into view at the edges has the picture's mean colour.
    """
    names = generator.choice(list(OPERATIONS), NUM_OPERATIONS)
    signs = generator.choice([-1.0, 1.0], NUM_OPERATIONS)
    return tuple(
        (str(name), float(sign) * magnitude / MAX_MAGNITUDE) for name, sign in zip(names, signs, strict=True)
    )


def apply_operations(image: Image.Image, operations: tuple[Operation, ...]) -> Image.Image:
    """Apply drawn operations, in order, to an RGB image; its size stays."""
    for name, strength in operations:
        image = OPERATIONS[name](image, strength)
    return image


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=_mean(image)
    )


def _mean(image: Image.Image) -> Any:
    return image.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))


def _sheared(x: float, y: float) -> Callable[[Image.Image, float], Image.Image]:
    def shear(image: Image.Image, strength: float) -> Image.Image:
        across, down = strength * x, strength * y  # the middle stays where it is
        return _affine(image, 1, across, -across * image.height / 2, down, 1, -down * image.width / 2)

    return shear


def _translated(x: float, y: float) -> Callable[[Image.Image, float], Image.Image]:
    def translate(image: Image.Image, strength: float) -> Image.Image:
        return _affine(image, 1, 0, strength * x * image.width, 0, 1, strength * y * image.height)

    return translate


def _enhanced(kind: Callable[[Image.Image], Any]) -> Callable[[Image.Image, float], Image.Image]:
    return lambda image, strength: kind(image).enhance(1 + 0.9 * strength)


OPERATIONS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "identity": lambda image, strength: image,
    "shear-x": _sheared(0.3, 0),
    "shear-y": _sheared(0, 0.3),
    "translate-x": _translated(150 / 331, 0),
    "translate-y": _translated(0, 150 / 331),
    "rotate": lambda image, strength: image.rotate(
        30 * strength, Image.Resampling.BILINEAR, fillcolor=_mean(image)
    ),
    "brightness": _enhanced(ImageEnhance.Brightness),
    "colour": _enhanced(ImageEnhance.Color),
    "contrast": _enhanced(ImageEnhance.Contrast),
    "sharpness": _enhanced(ImageEnhance.Sharpness),
    "posterize": lambda image, strength: ImageOps.posterize(image, 8 - round(4 * abs(strength))),
    "solarize": lambda image, strength: ImageOps.solarize(image, round(256 * (1 - abs(strength)))),
    "autocontrast": lambda image, strength: ImageOps.autocontrast(image),
    "equalize": lambda image, strength: ImageOps.equalize(image),
}
"""By name."""
