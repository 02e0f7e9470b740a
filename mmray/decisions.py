"""From logits to scores that mean what they say, and from scores to labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmray.errors import ConfigError
from mmray.metrics import THRESHOLDS, Counts, macro_f1_by_threshold, sum_f1_by_threshold

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

CALIBRATION_PRIOR = 4.0
"""How strongly a label's calibration holds to doing nothing; some rows of evidence outweigh it."""

LEAST_SCALE = 0.01
"""A label whose logits say so little about it stays as it is: calibration must not turn its order round."""

SHRINKAGES = (np.inf, 1000.0, 300.0, 100.0, 30.0, 10.0, 0.0)
"""How many rows with a label the one threshold for all of them weighs as much as."""

NUM_FOLDS = 5

NEAR = 0.001
"""Sample F1 that a single threshold gives up for macro F1: less than it is with other rows of the kind."""

ROUNDING = 1e-9
"""Means that are equal differ by less, in their last digits."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """A line for each label that its logits are put on before they become scores.

    Source: Platt 1999, fitted by Newton's method; that it is held to the identity by a prior is ours.
    """

    scales: Array
    """float64 (L,), positive, so that no two rows change places."""
    offsets: Array
    """float64 (L,)."""

    @classmethod
    def identity(cls, num_labels: int) -> Calibration:
        """Leave logits as they are."""
        return cls(np.ones(num_labels), np.zeros(num_labels))

    @classmethod
    def fit(cls, logits: NDArray[np.floating[Any]], targets: Mask) -> Calibration:
        """Fit logits to what was true.

        Args:
            logits: float (B, L), of rows that did not train the model.
            targets: bool (B, L).
        """
        x, y = logits.astype(np.float64), targets.astype(np.float64)
        line, best = np.stack([np.ones(x.shape[1]), np.zeros(x.shape[1])]), _penalised(x, y, 1.0, 0.0)
        for _ in range(50):
            step = _newton_step(x, y, *line)
            for _ in range(20):  # a full step may overshoot
                loss = _penalised(x, y, *(line - step))
                worse = loss > best
                if not worse.any():
                    break
                step = np.where(worse, step / 2, step)
            step = np.where(loss <= best, step, 0)
            line, best = line - step, np.minimum(loss, best)
            if np.abs(step).max(initial=0) < 1e-9:
                break
        kept = line[0] > LEAST_SCALE
        return cls(np.where(kept, line[0], 1.0), np.where(kept, line[1], 0.0))

    def scores(self, logits: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
        """Turn logits, float (B, L), into scores: float32 (B, L) in [0, 1]."""
        return np.exp(-np.logaddexp(0, -(self.scales * logits + self.offsets))).astype(np.float32)


def _penalised(x: Array, y: Array, scale: Any, offset: Any) -> Array:
    """Give each label's negative log likelihood and what the prior adds: (L,)."""
    z = scale * x + offset
    loss: Array = (np.logaddexp(0, z) - y * z).sum(axis=0)
    return loss + CALIBRATION_PRIOR / 2 * ((scale - 1) ** 2 + offset**2)


def _newton_step(x: Array, y: Array, scale: Array, offset: Array) -> Array:
    score = np.exp(-np.logaddexp(0, -(scale * x + offset)))
    error, weight = score - y, score * (1 - score)
    by_scale = (error * x).sum(axis=0) + CALIBRATION_PRIOR * (scale - 1)
    by_offset = error.sum(axis=0) + CALIBRATION_PRIOR * offset
    curve = (weight * x**2).sum(axis=0) + CALIBRATION_PRIOR
    mixed, flat = (weight * x).sum(axis=0), weight.sum(axis=0) + CALIBRATION_PRIOR
    determinant = curve * flat - mixed**2
    return np.stack([flat * by_scale - mixed * by_offset, curve * by_offset - mixed * by_scale]) / determinant


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


def tune_thresholds(scores: NDArray[np.floating[Any]], targets: Mask) -> Array:
    """Find a threshold for each label.

    The threshold of a label is the one of its best F1, drawn towards the one that is best for all of them
    together: a label that few rows bear says little about its own. How strongly is decided by
    cross-validation: of what is within a standard error of the best, most strongly.

    Args:
        scores: float (B, L) in [0, 1], of rows that did not train the model.
        targets: bool (B, L).

    Returns:
        thresholds: float64 (L,); by sample F1 on these rows never worse than 0.5 for all.

    Source: Breiman et al. 1984, the rule of one standard error. Quality is the sum of sample F1 and macro F1.
    """
    order = np.lexsort(scores.T)  # whatever order the rows came in, the folds are the same
    scores, targets = scores[order], targets[order]
    folds = np.arange(len(scores)) % NUM_FOLDS
    quality = np.zeros((NUM_FOLDS, len(SHRINKAGES)))
    for fold in range(NUM_FOLDS):
        fitted, held_out = folds != fold, folds == fold
        for place, thresholds in enumerate(_candidates(scores[fitted], targets[fitted])):
            found = _measure(scores[held_out], targets[held_out], thresholds)
            quality[fold, place] = found["sample_f1"] + found["macro_f1"]
    behind = quality[:, [quality.mean(axis=0).argmax()]] - quality
    standard_error = behind.std(axis=0, ddof=1) / np.sqrt(NUM_FOLDS)
    candidates = _candidates(scores, targets)
    single, best = candidates[0], candidates[int((behind.mean(axis=0) <= standard_error).argmax())]
    f1_of_single, f1_of_best = (_measure(scores, targets, each)["sample_f1"] for each in (single, best))
    return best if f1_of_best >= f1_of_single else single


def tune_single_threshold(scores: NDArray[np.floating[Any]], targets: Mask) -> float:
    """Find the one of THRESHOLDS that is best for all labels.

    Sample F1 has peaks at thresholds that are good for a few rows by chance. Of thresholds that come near
    the highest, and are no worse than 0.5, it is that of the best macro F1; of ties, the nearest to 0.5.
    """
    sample_f1 = sum_f1_by_threshold(scores, targets) / max(len(scores), 1)
    least = max(sample_f1.max() - NEAR, sample_f1[THRESHOLDS == 0.5].item()) - ROUNDING
    macro_f1 = np.where(sample_f1 >= least, macro_f1_by_threshold(scores, targets), -1)
    ties = THRESHOLDS[macro_f1 >= macro_f1.max() - ROUNDING]
    return float(ties[np.argmin(np.abs(ties - 0.5))])


def _candidates(scores: NDArray[np.floating[Any]], targets: Mask) -> list[Array]:
    """Give thresholds (L,) for each of SHRINKAGES; the first are all the same."""
    single = tune_single_threshold(scores, targets)
    own, positives = _thresholds_of_best_f1(scores, targets), targets.sum(axis=0)
    found = [np.full(scores.shape[1], single)]
    for rows in SHRINKAGES[1:]:
        weight = positives / np.maximum(positives + rows, 1)
        drawn = weight * _logit(own) + (1 - weight) * _logit(np.array(single))
        found.append(1 / (1 + np.exp(-drawn)))
    return found


def _thresholds_of_best_f1(scores: NDArray[np.floating[Any]], targets: Mask) -> Array:
    """Give each label the threshold (L,) of its best F1, midway between two scores; 0.5 if none bears it."""
    thresholds = np.full(scores.shape[1], 0.5)
    for label, (column, truth) in enumerate(zip(scores.T.astype(np.float64), targets.T, strict=True)):
        if not truth.any():
            continue
        order = np.argsort(-column, kind="stable")
        ranked, hits = column[order], truth[order].cumsum()
        f1 = 2 * hits / (np.arange(1, len(ranked) + 1) + truth.sum())
        below = np.append(ranked[1:], 0.0)
        f1[ranked == below] = 0  # equal scores cannot be told apart
        best = int(f1.argmax())
        thresholds[label] = (ranked[best] + below[best]) / 2
    return thresholds


def _logit(score: Array) -> Array:
    clipped = np.clip(score, 1e-6, 1 - 1e-6)
    return np.log(clipped) - np.log1p(-clipped)


def _measure(scores: NDArray[np.floating[Any]], targets: Mask, thresholds: Array) -> dict[str, Any]:
    decided, fell_back = decide(scores, thresholds)
    return Counts.of(scores, targets, decided, fell_back).summary(range(scores.shape[1]))
