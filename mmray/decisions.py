"""From scores to labels."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmray.errors import ConfigError


def decide(
    scores: NDArray[np.floating[Any]],
    thresholds: NDArray[np.floating[Any]],
    *,
    fallback: bool = True,
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Decide every label whose score reaches its threshold; if none does, the top label.

    Args:
        scores: float (B, L) in [0, 1].
        thresholds: float (L,).
        fallback: Whether a row that reaches no threshold gets its top label, of ties the lowest index.

    Returns:
        decided: bool (B, L).
        fell_back: bool (B,), rows where the fallback spoke.

    Raises:
        ConfigError: The shapes do not belong together, or scores are not floats.

    Source: arXiv 2501.01611 assigns labels by a rule that avoids empty predictions; this rule is our reading.
    """
    if scores.ndim != 2 or scores.dtype.kind != "f" or thresholds.shape != scores.shape[1:]:
        raise ConfigError(
            f"scores {scores.dtype} {scores.shape} and thresholds {thresholds.shape} must be floats of shape "
            "(B, L) and (L,): a threshold for each label"
        )
    # float32(0.7) is less than the float64 0.7 that a JSON file holds: compared as float32, it reaches it.
    decided = scores >= thresholds.astype(scores.dtype)
    fell_back = np.logical_not(decided.any(axis=1)) & fallback
    decided[fell_back, scores[fell_back].argmax(axis=1)] = True
    return decided, fell_back
