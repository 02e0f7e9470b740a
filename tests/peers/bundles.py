"""Bundles that were never trained: what they cost to run is what is measured."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mmray.bundle import Bundle, save_bundle, tokenizer_files
from mmray.captions import train_tokenizer
from mmray.config import ModelConfig
from mmray.decisions import Calibration
from mmray.model import build_model
from mmray.schema import Vocabulary
from mmray.storage import Folder
from mmray.towers import describe_encoder


def make_bundle(
    folder: Folder, config: ModelConfig, captions: Sequence[str], labels: Sequence[str | int]
) -> Bundle:
    """Make a bundle of random weights, the same each time, whose tokenizer knows these captions' words."""
    torch.manual_seed(0)
    tokenizer, vocabulary = train_tokenizer(captions), Vocabulary(tuple(labels))
    text_config = describe_encoder(config, len(tokenizer))
    return save_bundle(
        folder,
        model_config=config,
        text_config=text_config,
        vocabulary=vocabulary,
        thresholds=np.full(len(vocabulary), 0.5),
        calibration=Calibration.identity(len(vocabulary)),
        tokenizer_files=tokenizer_files(tokenizer),
        weights=build_model(config, len(vocabulary), text_config).state_dict(),
        metrics={},
        card="",
    )
