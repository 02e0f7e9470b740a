"""What all engines share: how an image is decoded and a batch is scored. They differ in what feeds it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
import torch

from mmray.bundle import Bundle
from mmray.captions import tokenize
from mmray.images import decode_image
from mmray.labeler import make_inputs

BATCH_ROWS = 64

arguments = [
    click.option("--input", "input_path", required=True, type=Path),
    click.option("--model", "model_path", required=True, type=str),
    click.option("--output", "output_path", required=True, type=Path),
    click.option("--idiom", is_flag=True, help="Decode as the engine's documentation does."),
]


def engine(main):
    """Make a command of an engine's main function."""
    for argument in reversed(arguments):
        main = argument(main)
    return click.command()(main)


class Model:
    """A bundle's model on one thread."""

    def __init__(self, uri: str) -> None:
        torch.set_num_threads(1)
        bundle = Bundle.load(uri)
        self.config, self.calibration = bundle.model_config, bundle.calibration
        self.model, self.tokenizer = bundle.model(), bundle.tokenizer()
        self.num_labels = len(bundle.vocabulary)

    @torch.inference_mode()
    def __call__(self, pixels: Sequence[np.ndarray], captions: Sequence[str]) -> np.ndarray:
        """Score B images, uint8 (S, S, 3), and their captions: float32 (B, L)."""
        inputs = make_inputs(
            pixels,
            *tokenize(self.tokenizer, list(captions), self.config.max_tokens),
            has_caption=[True] * len(pixels),
            size_px=self.config.image_size,
        )
        return self.calibration.scores(self.model(inputs).numpy())


def side_px(uri: str) -> int:
    """Tell the side of the square that a bundle's model sees."""
    return Bundle.load(uri).model_config.image_size


decode = decode_image
"""As mmray does: (bytes, S) -> uint8 (S, S, 3)."""


def decode_by_pillow(data: bytes, size_px: int) -> np.ndarray:
    """Decode as most documentation does: all pixels, then a resize."""
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB").resize((size_px, size_px)))
