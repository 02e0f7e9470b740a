"""What averaged weights make of validation rows, over all workers: metrics, calibration, thresholds."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
import torch
import torch.distributed
from torch import Tensor

from mmray.decisions import NUM_FOLDS, Calibration, decide, tune_single_threshold, tune_thresholds
from mmray.learner import Batches, Learner, inputs_of
from mmray.metrics import Counts
from mmray.schema import Vocabulary

MAX_ROWS_KEPT, MAX_BYTES_KEPT = 200_000, 512 << 20
"""Of validation rows, for calibration and thresholds: more would not change them."""
MAX_ROWS_HELD_OUT = 20_000
"""Of these, to measure what was fitted to others: five fits more."""
VALIDATION = "validation.safetensors"
BRIEF = ("sample_f1", "micro_f1", "macro_f1", "fallback_rate", "ece")
"""What is told of each rule to decide."""


class Validation(NamedTuple):
    """What the averaged weights make of validation rows."""

    logits: np.ndarray
    """float32 (B, L)."""
    targets: np.ndarray
    """bool (B, L)."""
    valid: np.ndarray
    """bool (B,); other rows could not be labeled, and count as rows without a label."""
    alone: np.ndarray
    """float32 (B, 2, L), logits of image and caption alone; (B, 0, L) of a model of one modality."""
    there: np.ndarray
    """bool (B, 2), whether a row has an image, and a caption."""

    @classmethod
    def of(cls, learner: Learner, batches: Batches, num_labels: int) -> Validation:
        """Run this worker's rows through the averaged weights."""
        if torch.distributed.is_initialized():
            # Batch norm saw other rows on each worker: all take the first one's.
            for buffer in learner.averaged.buffers():
                torch.distributed.broadcast(buffer, 0)
        nothing = np.zeros((0, num_labels), np.float32)
        fused = learner.model.image is not None and learner.model.caption is not None
        none = np.zeros((0, 2 * fused, num_labels), np.float32)
        parts = [(nothing, nothing.astype(bool), np.zeros(0, bool), none, np.zeros((0, 2), bool))]
        for batch in batches:
            logits, alone = learner.readings(inputs_of(batch, learner.device))
            there = np.stack([batch["has_image"].numpy(), batch["has_caption"].numpy()], 1)
            parts.append((logits, batch["targets"].numpy() > 0.5, batch["valid"].numpy(), alone, there))
        return cls(*(np.concatenate(part) for part in zip(*parts, strict=True)))

    def measure(self, vocabulary: Vocabulary, device: torch.device) -> dict[str, Any]:
        """Measure all workers' rows together, at the single threshold of best sample F1.

        What is reduced over workers are counts, so that their number makes no difference.

        Returns:
            `Counts.summary`, and the `threshold`.
        """
        scores = self.scores()

        def count(threshold: float) -> Counts:
            vector = torch.from_numpy(self.counts(scores, np.full(len(vocabulary), threshold)).to_vector())
            vector = vector.to(device)
            add_up(vector)
            return Counts.from_vector(vector.cpu().numpy(), len(vocabulary))

        threshold = count(0.5).best_threshold()
        return count(threshold).summary(vocabulary.labels) | {"threshold": threshold}

    def scores(self, calibration: Calibration | None = None) -> np.ndarray:
        """Give calibrated scores, or those of the model: float32 (B, L), zeros of rows that failed."""
        calibration = calibration or Calibration.identity(self.logits.shape[1])
        return calibration.scores(self.logits) * self.valid[:, None]

    def counts(self, scores: np.ndarray, thresholds: np.ndarray) -> Counts:
        """Count rows by their scores (B, L)."""
        decided, fell_back = decide(scores, thresholds)
        return Counts.of(scores, self.targets, decided & self.valid[:, None], fell_back & self.valid)

    def gathered(self) -> Validation:
        """Put the rows of all workers together, as many as calibration needs, from all over them."""
        world_size = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        row_bytes = sum(array.nbytes for array in self) // max(1, len(self.logits))
        share = min(MAX_ROWS_KEPT, MAX_BYTES_KEPT // max(1, row_bytes)) // world_size
        num_rows, kept = len(self.logits), min(len(self.logits), share)
        parts = [self.rows(np.arange(kept) * num_rows // max(kept, 1))] * world_size
        if world_size > 1:
            torch.distributed.all_gather_object(parts, parts[0])
        return Validation(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))

    def save(self, folder: Path) -> None:
        """Write it into a checkpoint."""
        safetensors.numpy.save_file(
            {name: np.ascontiguousarray(array) for name, array in self._asdict().items()},
            folder / VALIDATION,
        )

    @classmethod
    def load(cls, folder: Path) -> Validation:
        """Read it from a checkpoint."""
        return cls(**safetensors.numpy.load_file(folder / VALIDATION))

    def settle(self, vocabulary: Vocabulary) -> Settled:
        """Fit calibration and thresholds to these rows, and measure what they are worth."""
        calibration = Calibration.fit(self.logits[self.valid], self.targets[self.valid])
        scores = self.scores(calibration)
        thresholds = tune_thresholds(scores, self.targets)
        metrics = self.counts(scores, thresholds).summary(vocabulary.labels)
        metrics["by_decision"] = {
            rule: {name: value for name, value in counts.summary(vocabulary.labels).items() if name in BRIEF}
            for rule, counts in self.held_out().items()
        }
        metrics["by_modality"] = {}
        for place, modality in enumerate(("image", "caption")[: self.alone.shape[1]]):
            alone = self._replace(logits=self.alone[:, place], valid=self.valid & self.there[:, place])
            counts = alone.counts(alone.scores(calibration), thresholds)
            metrics["by_modality"][modality] = counts.summary(vocabulary.labels)
        return Settled(calibration, thresholds, metrics)

    def rows(self, chosen: np.ndarray) -> Validation:
        """Give those rows that are chosen: bool (B,), or their numbers."""
        return Validation(*(each[chosen] for each in self))

    def held_out(self) -> dict[str, Counts]:
        """Measure ways to decide on rows that they were not fitted to: fold by fold, fitted to the others.

        Returns:
            `0.5`, `single` and `per-label` thresholds for calibrated scores, and `uncalibrated`: thresholds
            for each label, tuned to scores as the model gives them.
        """
        order = np.lexsort(self.logits.T)  # whatever order the rows came in, the folds are the same
        drawn = self.rows(order[:: -(-len(order) // MAX_ROWS_HELD_OUT) or 1])
        num_labels, folds = drawn.logits.shape[1], np.arange(len(drawn.logits)) % NUM_FOLDS
        found = dict.fromkeys(("0.5", "single", "per-label", "uncalibrated"), Counts.zero(num_labels))
        for fold in range(NUM_FOLDS):
            fitted, rest = drawn.rows(folds != fold), drawn.rows(folds == fold)
            calibration = Calibration.fit(fitted.logits[fitted.valid], fitted.targets[fitted.valid])
            scores, half = fitted.scores(calibration), np.full(num_labels, 0.5)
            single = np.full(num_labels, tune_single_threshold(scores, fitted.targets))
            rules = {
                "0.5": (calibration, half),
                "single": (calibration, single),
                "per-label": (calibration, tune_thresholds(scores, fitted.targets)),
                "uncalibrated": (None, tune_thresholds(fitted.scores(), fitted.targets)),
            }
            for rule, (given, thresholds) in rules.items():
                found[rule] += rest.counts(rest.scores(given), thresholds)
        return found


class Settled(NamedTuple):
    """How scores and labels follow from logits."""

    calibration: Calibration
    thresholds: np.ndarray
    """float64 (L,)."""
    metrics: dict[str, Any]
    """`Counts.summary`; `by_decision` what other rules give, on rows that they were not fitted to, and
    `by_modality` for image and caption alone."""


def add_up(tensor: Tensor) -> None:
    """Sum a tensor over all workers, in place."""
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(tensor)
