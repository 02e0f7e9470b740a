"""Multi-label metrics as counts that add up: every worker counts its rows, the sum is summarised once.

A mean of means over workers of unequal size is wrong, so nothing is divided before `Counts.summary`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mmray.errors import ConfigError, DataError

NUM_BINS = 4096  # of the histogram behind AP; equal in logit, for a trained model's scores crowd at 0 and 1
MAX_LOGIT = 12.0  # the outermost bins also hold what lies beyond: scores below 6e-6 and above 1 - 6e-6
NUM_CALIBRATION_BINS = 15  # equal in score
THRESHOLDS = np.arange(1, 100) / 100  # where one global threshold is sought

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
Scores = NDArray[np.floating[Any]]


@dataclass(frozen=True, eq=False)
class Counts:
    """What a set of rows adds to every metric. All is float64, in which whole numbers add up exactly."""

    num_rows: Array  # ()
    num_empty: Array  # (), rows for which no label was decided
    num_fallback: Array  # (), rows where the top-label fallback spoke
    sum_f1: Array  # (), F1 of each row; a row with neither targets nor labels is right, hence 1.0
    sum_f1_by_threshold: Array  # (99,), the same, were labels decided at each of THRESHOLDS with fallback
    true_positives: Array  # (L,)
    false_positives: Array  # (L,)
    false_negatives: Array  # (L,)
    histogram: Array  # (2, L, NUM_BINS), scores of the negatives [0] and of the positives [1]
    calibration: Array  # (3, NUM_CALIBRATION_BINS), over (row, label): number, sum of scores, of targets

    @classmethod
    def zero(cls, num_labels: int) -> Counts:
        """Count no rows: the start of a sum."""
        nothing = np.zeros((0, num_labels), dtype=bool)
        return cls.of(nothing.astype(np.float32), nothing, nothing)

    @classmethod
    def of(
        cls, scores: Scores, targets: Mask | NDArray[np.uint8], decided: Mask, fallback: Mask | None = None
    ) -> Counts:
        """Count a batch.

        Args:
            scores: float (B, L) in [0, 1].
            targets: bool or uint8 (B, L), multi-hot.
            decided: bool (B, L), the labels decided.
            fallback: bool (B,), rows where the top-label fallback spoke; None for nowhere.

        Raises:
            ConfigError: The shapes do not belong together, or scores are not floats.
            DataError: A score is NaN or outside [0, 1].
        """
        fell_back = np.zeros(len(scores), dtype=bool) if fallback is None else fallback
        shapes_agree = scores.shape == targets.shape == decided.shape and fell_back.shape == scores.shape[:1]
        if scores.ndim != 2 or scores.dtype.kind != "f" or not shapes_agree:
            raise ConfigError(
                f"scores {scores.dtype} {scores.shape}, targets {targets.shape}, decided {decided.shape} and "
                f"fallback {fell_back.shape} must be floats (B, L), (B, L), (B, L) and (B,)"
            )
        if not np.all((scores >= 0) & (scores <= 1)):
            raise DataError("a score is NaN or outside [0, 1]: pass what the sigmoid made of finite logits")
        positive, decided = targets.astype(bool), decided.astype(bool)
        hits = decided & positive
        num_marks = decided.sum(axis=1) + positive.sum(axis=1)
        counts: dict[str, ArrayLike] = {
            "num_rows": len(scores),
            "num_empty": np.count_nonzero(~decided.any(axis=1)),
            "num_fallback": np.count_nonzero(fell_back),
            "sum_f1": np.where(num_marks == 0, 1.0, _ratio(2 * hits.sum(axis=1), num_marks)).sum(),
            "sum_f1_by_threshold": sum_f1_by_threshold(scores, positive),
            "true_positives": hits.sum(axis=0),
            "false_positives": (decided & ~positive).sum(axis=0),
            "false_negatives": (positive & ~decided).sum(axis=0),
            "histogram": histogram(scores, positive),
            "calibration": _calibration(scores, positive),
        }
        return cls(**{name: np.asarray(count, dtype=np.float64) for name, count in counts.items()})

    def __add__(self, other: Counts) -> Counts:
        """Count the rows of both."""
        return Counts.from_vector(self.to_vector() + other.to_vector(), len(self.true_positives))

    def to_vector(self) -> Array:
        """Lay everything out as one float64 (N,) vector, so that a single all_reduce sums it."""
        return np.concatenate([np.ravel(array) for array in vars(self).values()])

    @classmethod
    def from_vector(cls, vector: Array, num_labels: int) -> Counts:
        """Undo `to_vector`.

        Raises:
            ConfigError: The vector is not one of so many labels.
        """
        shapes = [array.shape for array in vars(cls.zero(num_labels)).values()]
        *ends, size = np.cumsum([int(np.prod(shape)) for shape in shapes])
        if vector.shape != (size,):
            raise ConfigError(f"counts of {num_labels} labels are a vector of {size}, not {vector.shape}")
        parts = np.split(vector.astype(np.float64), ends)
        return cls(*(part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)))

    def summary(self, labels: Sequence[int | str]) -> dict[str, Any]:
        """Summarise in Python numbers, as `jobs/evaluate.py --json` writes it.

        `labels` is the vocabulary, in the order of the columns counted. Nothing over nothing is 0.0, as in
        scikit-learn. `macro_f1` is a mean over all labels, `map` over those with support (else `ap` is None).
        """
        hits, errors = self.true_positives, self.false_positives + self.false_negatives
        support = hits + self.false_negatives
        precision, recall = _ratio(hits, hits + self.false_positives), _ratio(hits, support)
        f1, ap = _ratio(2 * hits, 2 * hits + errors), _average_precision(self.histogram)
        number, score, target = self.calibration
        columns = (column.tolist() for column in (precision, recall, f1, ap, support))
        return {
            "num_rows": int(self.num_rows),
            "sample_f1": float(_ratio(self.sum_f1, self.num_rows)),
            "micro_f1": float(_ratio(2 * hits.sum(), (2 * hits + errors).sum())),
            "macro_f1": float(f1.mean()),
            "map": float(_ratio(ap.sum(), np.count_nonzero(support))),
            "ece": float(_ratio(np.abs(score - target).sum(), number.sum())),
            "empty_rate": float(_ratio(self.num_empty, self.num_rows)),
            "fallback_rate": float(_ratio(self.num_fallback, self.num_rows)),
            "by_label": {
                str(label): {"precision": p, "recall": r, "f1": f, "ap": a if s else None, "support": int(s)}
                for label, p, r, f, a, s in zip(labels, *columns, strict=True)
            },
        }

    def best_threshold(self) -> float:
        """Return the one of THRESHOLDS with the highest sample F1; of ties, the nearest to 0.5."""
        sums = self.sum_f1_by_threshold
        # Sums of fractions that are equal differ in their last digits, by the order of rows and workers.
        ties = THRESHOLDS[sums >= sums.max() - 1e-9 * self.num_rows]
        return float(ties[np.argmin(np.abs(ties - 0.5))])


def _ratio(part: ArrayLike, whole: ArrayLike) -> Array:
    """Divide; nothing over nothing is 0.0."""
    quotient: Array = np.divide(part, whole, out=np.zeros(np.shape(part)), where=np.greater(whole, 0))
    return quotient


def histogram(scores: Scores, positive: Mask) -> NDArray[np.int_]:
    """Count (row, label) pairs (2, L, NUM_BINS) by target, label and bin of logit."""
    scores = scores.astype(np.float64)
    with np.errstate(divide="ignore"):  # scores of 0 and 1 have infinite logits, which are clipped
        logits = np.clip(np.log(scores) - np.log1p(-scores), -MAX_LOGIT, MAX_LOGIT)
    bins = np.minimum((logits + MAX_LOGIT) / (2 * MAX_LOGIT / NUM_BINS), NUM_BINS - 1).astype(np.int64)
    shape = (2, scores.shape[1], NUM_BINS)
    cells = np.ravel_multi_index((positive.astype(np.int64), np.arange(shape[1]), bins), shape)
    return np.bincount(cells.ravel(), minlength=int(np.prod(shape))).reshape(shape)


def _average_precision(histogram: Array) -> Array:
    """Compute AP (L,) from the highest bin down, scores of one bin being ties; 0 without positives.

    Source: sklearn.metrics.average_precision_score: the sum of (R_n - R_{n-1}) P_n over thresholds.
    """
    negatives, positives = histogram[..., ::-1]
    hits = positives.cumsum(axis=1)
    precision = _ratio(hits, hits + negatives.cumsum(axis=1))
    return _ratio((positives * precision).sum(axis=1), positives.sum(axis=1))


def _calibration(scores: Scores, positive: Mask) -> Array:
    """Sum ones, scores and targets (3, NUM_CALIBRATION_BINS) by bin of score, bins being closed above.

    Source: arXiv 1706.04599, section 2, with a (row, label) pair as sample and its score as confidence.
    """
    flat = scores.ravel().astype(np.float64)
    bins = np.maximum(np.ceil(flat * NUM_CALIBRATION_BINS).astype(np.int64) - 1, 0)
    summands = (np.ones_like(flat), flat, positive.ravel())
    return np.stack([np.bincount(bins, summand, NUM_CALIBRATION_BINS) for summand in summands])


def sum_f1_by_threshold(scores: Scores, positive: Mask) -> Array:
    """Sum sample F1 (99,) over rows, deciding at each of THRESHOLDS, or the top label if none reaches it.

    At any threshold a row decides its top k, and F1 is the sum of what each of them gains over those before.
    A gain is entered once, at the highest threshold its score reaches; one cumsum hands it to the lower ones.
    """
    order = np.argsort(-scores, axis=1, kind="stable")  # of ties the lowest index leads, as in `decide`
    hits = np.take_along_axis(positive, order, axis=1).cumsum(axis=1)
    f1 = 2 * hits / (np.arange(1, scores.shape[1] + 1) + positive.sum(axis=1, keepdims=True))
    num_reached = np.take_along_axis(_num_reached(scores), order, axis=1)
    gains = np.bincount(num_reached.ravel(), np.diff(f1, prepend=0).ravel(), len(THRESHOLDS) + 1)
    return gains[:0:-1].cumsum()[::-1]


def macro_f1_by_threshold(scores: Scores, positive: Mask) -> Array:
    """Compute macro F1 (99,), deciding at each of THRESHOLDS, or the top label if none reaches it."""
    num_labels = scores.shape[1]
    cells = (_num_reached(scores) + (len(THRESHOLDS) + 1) * np.arange(num_labels)).ravel()

    def decided(among: NDArray[Any]) -> Array:
        at = np.bincount(cells, among.ravel(), num_labels * (len(THRESHOLDS) + 1)).reshape(num_labels, -1)
        return at[:, :0:-1].cumsum(axis=1)[:, ::-1]

    f1 = _ratio(2 * decided(positive), decided(np.ones(scores.shape)) + positive.sum(axis=0)[:, None])
    return f1.mean(axis=0)


def _num_reached(scores: Scores) -> NDArray[np.int_]:
    """Count the THRESHOLDS that each score reaches (B, L): the top label's all of them, by the fallback."""
    num_reached = np.searchsorted(THRESHOLDS.astype(scores.dtype), scores, side="right")  # as in `decide`
    num_reached[np.arange(len(scores)), scores.argmax(axis=1)] = len(THRESHOLDS)
    return num_reached
