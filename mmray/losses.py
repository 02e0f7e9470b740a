"""Losses: pure functions of (logits, targets)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from mmray.errors import DataError

MIN_CLASS_WEIGHT = 0.5
MAX_CLASS_WEIGHT = 5.0


def class_weights(num_rows: int, positives: Sequence[int] | Tensor) -> Tensor:
    """Weigh the positives of each label by log(1 + negatives / positives), clamped to [0.5, 5.0].

    Args:
        num_rows: Rows counted.
        positives: int (L,), how many of them carry each label. A label without any gets the upper clamp.

    Returns:
        pos_weight: float32 (L,).

    Raises:
        DataError: A label is carried by fewer than 0 or more than num_rows rows.

    Source: arXiv 2501.01611 uses log-based class weights; the formula is our reading of it, for
    `1 + log(neg/pos)` goes negative where most rows carry the label.
    """
    counts = torch.as_tensor(positives, dtype=torch.float64)
    if bool(((counts < 0) | (counts > num_rows)).any()):
        raise DataError(f"positives must lie between 0 and num_rows = {num_rows}, not {counts.tolist()}")
    weights = torch.log1p((num_rows - counts) / counts).clamp(MIN_CLASS_WEIGHT, MAX_CLASS_WEIGHT)
    return weights.where(counts > 0, MAX_CLASS_WEIGHT).float()


def binary_cross_entropy(
    logits: Tensor, targets: Tensor, pos_weight: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """Compute the mean binary cross-entropy over rows and labels, in float32 whatever the logits' dtype.

    Args:
        logits: float (B, L).
        targets: bool, int or float (B, L), multi-hot; finite where masked, too.
        pos_weight: float32 (L,), weight of each label's positives.
        mask: bool or float (B, L); entries of 0 are left out, and the mean is over what is left.

    Returns:
        loss: float32 scalar; 0, with a gradient of 0, if nothing is left.
    """
    weight = (torch.ones_like(logits) if mask is None else mask.expand_as(logits)).float()
    total = functional.binary_cross_entropy_with_logits(
        logits.float(), targets.float(), weight=weight, pos_weight=pos_weight, reduction="sum"
    )
    return total / weight.sum().clamp(min=1)
