"""Losses: pure functions of (logits, targets)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from mmray.errors import DataError

MIN_CLASS_WEIGHT = 0.5
MAX_CLASS_WEIGHT = 5.0
FOCAL_GAMMA = 2.0
ASYMMETRIC_GAMMA = 4.0
ASYMMETRIC_MARGIN = 0.05


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
    losses = functional.binary_cross_entropy_with_logits(
        logits.float(), targets.float(), pos_weight=pos_weight, reduction="none"
    )
    return _mean(losses, mask)


def focal(logits: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute the mean focal loss, which turns away from entries that are right already.

    Args:
        logits: float (B, L).
        targets: bool, int or float (B, L), multi-hot or soft.
        mask: bool or float (B, L), as in `binary_cross_entropy`.

    Returns:
        loss: float32 scalar.

    Source: Lin et al. 2017 (arXiv 1708.02002), equation 4, with their gamma of 2 and without alpha. For soft
    targets, ours: positives and negatives are mixed by the target.
    """
    logits, targets = logits.float(), targets.float()
    score = logits.sigmoid()
    positive = (1 - score) ** FOCAL_GAMMA * functional.logsigmoid(logits)
    negative = score**FOCAL_GAMMA * functional.logsigmoid(-logits)
    return _mean(-(targets * positive + (1 - targets) * negative), mask)


def asymmetric(logits: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute the mean asymmetric loss: easy negatives, of which there are most, hardly count.

    Args:
        logits: float (B, L).
        targets: bool, int or float (B, L), multi-hot or soft.
        mask: bool or float (B, L), as in `binary_cross_entropy`.

    Returns:
        loss: float32 scalar.

    Source: Ben-Baruch et al. 2021 (arXiv 2009.14119), equation 7, with their gamma of 0 for positives, 4 for
    negatives, and margin of 0.05. Deviations: the mean over rows and labels, where they and timm sum; soft
    targets mix positives and negatives.
    """
    logits, targets = logits.float(), targets.float()
    shifted = (logits.sigmoid() - ASYMMETRIC_MARGIN).clamp(min=0)
    negative = shifted**ASYMMETRIC_GAMMA * torch.log1p(-shifted)
    return _mean(-(targets * functional.logsigmoid(logits) + (1 - targets) * negative), mask)


def _mean(losses: Tensor, mask: Tensor | None) -> Tensor:
    """Average losses (B, L) where the mask is not 0; over nothing it is 0, with a gradient of 0."""
    weight = torch.ones_like(losses) if mask is None else mask.expand_as(losses).float()
    return (losses * weight).sum() / weight.sum().clamp(min=1)
