"""An auxiliary task of training: from the image alone, tell which words its caption has.

A few labels teach an image tower little that is seen; a caption names much more of it. The head that tells
words is no part of the model, and is not kept.

Source: Joulin et al. 2016, "Learning visual features from large weakly supervised data": words of captions as
targets of an image network. Ours: as a task beside the labels, and by independent sigmoids.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from mmray.captions import tokenize
from mmray.fusions import Inputs, OneHead
from mmray.model import MultimodalModel


class WithWords(nn.Module):
    """A model with a head that tells words."""

    def __init__(self, model: MultimodalModel, rates: Tensor) -> None:
        """Stand a new head on the model's image tower, for V words of known frequency: float32 (V,).

        A head that knew nothing of it would send the tower a gradient that drowns the labels' for an epoch.
        """
        super().__init__()
        assert model.image is not None
        self.model = model
        self.num_words = len(rates)
        self.head = OneHead(model.image.width, self.num_words, dropout=0.0)
        self.head.expect(rates)

    def forward(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Turn a batch into logits of labels (B, L) and of words (B, V)."""
        image, caption = self.model.towers(inputs)
        assert image is not None
        return self.model.fuse(image, caption, inputs), self.head(image.mean(1))


def word_rates(tokenizer: Any, captions: Sequence[str], num_words: int, max_tokens: int) -> np.ndarray:
    """Give the share of captions that have each word, as `words_of` finds it: float64 (V,), never 0."""
    counts, special = np.full(num_words, 0.5), tokenizer.all_special_ids
    for first in range(0, len(captions), 1000):
        ids, mask = tokenize(tokenizer, captions[first : first + 1000], max_tokens)
        has = np.zeros((len(ids), num_words), bool)
        rows, places = np.nonzero(mask)
        has[rows, ids[rows, places]] = True
        has[:, special] = False  # these `words_of` never gives
        counts += has.sum(0)
    return counts / (len(captions) + 1)


def words_of(inputs: Inputs, num_words: int, special_ids: list[int]) -> Tensor:
    """Tell which words the captions have: float32 (B, V); all 0 for a row without image or words."""
    ids = inputs.input_ids
    real = inputs.attention_mask.bool() & ~torch.isin(ids, torch.tensor(special_ids, device=ids.device))
    real &= inputs.has_image[:, None]
    words = torch.zeros(len(ids), num_words, device=ids.device)
    return words.scatter_reduce(1, ids, real.float(), "amax")


def word_loss(logits: Tensor, words: Tensor) -> Tensor:
    """Sum the binary cross-entropy over the words; mean over the rows that have any.

    Args:
        logits: (B, V).
        words: float32 (B, V), as `words_of` gives them.

    Returns:
        loss: float32, 0 for a batch without words.
    """
    told = words.any(1)
    by_row = functional.binary_cross_entropy_with_logits(logits.float(), words, reduction="none").sum(1)
    return (by_row * told).sum() / told.sum().clamp(min=1)
