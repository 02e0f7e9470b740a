"""Pseudo-labels: which rows of a labeled output, and which of their labels, are sure enough to learn from.

A selection is a folder with a Parquet file for each labeled file that has such rows, under the same relative
path: `row`, its place in the file; `targets`, list<float32>[L]; `mask`, list<bool>[L], of the labels that are
known. Images and captions stay where they are: the rows of the input are the rows of its output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mmray.metrics import MAX_LOGIT, NUM_BINS, Array, Mask, Scores
from mmray.storage import Folder

GROUP_ROWS = 1000
"""In a row group of a selection: about as many as in a shard, by which it is read."""


@dataclass(frozen=True, eq=False)
class Cutoffs:
    """From which score on a label is taken as true, and up to which as false; between them it is unknown."""

    positive: Array
    """float64 (L,)."""
    negative: Array
    """float64 (L,)."""

    @classmethod
    def by_confidence(cls, confidence: float, num_labels: int) -> Cutoffs:
        """Ask the same of every label: a score of at least `confidence`, or of at most 1 - `confidence`."""
        return cls(np.full(num_labels, confidence), np.full(num_labels, 1 - confidence))

    @classmethod
    def by_frequency(cls, histogram: Array, shares: Array, keep: float) -> Cutoffs:
        """Take of each label as many rows as bear it where the truth is known.

        Args:
            histogram: float64 (L, NUM_BINS), rows by label and bin of the score's logit.
            shares: float64 (L,), of the labeled rows that bear each label.
            keep: share of the expected positives, and of the expected negatives, that is taken: the surest.

        Source: Xie et al. 2023 (arXiv 2305.02795), class-distribution-aware thresholding, with one `keep`
        for both of its reliability factors.
        """
        num_rows = histogram.sum(axis=1)
        edges = 1 / (1 + np.exp(-np.linspace(-MAX_LOGIT, MAX_LOGIT, NUM_BINS + 1)))
        num_positive, num_negative = keep * shares * num_rows, keep * (1 - shares) * num_rows
        from_above, are_true = _bins_taken(histogram[:, ::-1], num_positive)
        from_below, are_false = _bins_taken(histogram, num_negative)
        # A label of which only presence or only absence joined would be learned as that.
        lacks_true = (num_positive >= 1) & (are_true < num_positive / 2)
        torn = lacks_true | (num_negative >= 1) & (are_false < num_negative / 2)
        positive = np.where((from_above > 0) & ~torn, edges[NUM_BINS - from_above], np.inf)
        negative = np.where((from_below > 0) & ~torn, edges[from_below], -np.inf)
        return cls(positive, np.minimum(negative, np.nextafter(positive, -np.inf)))

    def select(
        self, scores: Scores, valid: Mask, *, soft: bool
    ) -> tuple[NDArray[np.int64], NDArray[np.float32], Mask]:
        """Select from rows by their scores.

        Args:
            scores: float32 (B, L).
            valid: bool (B,), rows that have scores.
            soft: whether the targets are the scores, instead of 0 and 1.

        Returns:
            rows: int64 (N,), those of which a label is known, be it that it is false: without rows that bear
                none of the labels each would be more frequent than it is.
            targets: float32 (N, L).
            mask: bool (N, L), of the labels that are known.
        """
        true, false = scores >= self.positive, scores <= self.negative
        known = (true | false) & valid[:, None]
        rows = np.flatnonzero(known.any(axis=1))
        targets = scores if soft else true
        return rows, targets[rows].astype(np.float32), known[rows]


def _bins_taken(histogram: Array, expected: Array) -> tuple[NDArray[np.int64], Array]:
    """Give how many bins of each label are taken, the surest first, (L,), and how many rows they hold, (L,).

    They hold no more rows than expected. But ties are taken together: a further bin where without it there
    would be less than half of these rows, and with it at most half as many again; and the outermost, in which
    is all that is surer yet, whatever it holds.
    """
    rows = np.concatenate([np.zeros((len(histogram), 1)), histogram.cumsum(axis=1)], axis=1)
    labels, taken = np.arange(len(rows)), (rows[:, 1:] <= expected[:, None]).sum(axis=1)
    further = np.minimum(taken + 1, NUM_BINS)
    tied = (rows[labels, taken] < expected / 2) & (rows[labels, further] <= 1.5 * expected)
    taken = np.where((expected >= 1) & (tied | (taken == 0)), further, taken)
    return taken, rows[labels, taken]


class Selection(NamedTuple):
    """Selected rows of a dataset."""

    folder: Folder
    num_rows: dict[str, int]
    """By file; files without any do not occur."""
    fingerprint: str
    """Of all that it depends on."""

    def read(self, path: str, first: int, end: int) -> dict[str, Any]:
        """Read what is selected of the rows `first` to `end` of a file; `row` counts from `first` on."""
        with self.folder.open(path) as source:  # of its row groups only those that hold such rows
            chosen = pq.read_table(source, filters=[("row", ">=", first), ("row", "<", end)])
        return {
            **dict(zip(chosen.column_names, chosen.columns, strict=True)),
            "row": pc.subtract(chosen["row"], first),
        }


def write_selection(
    folder: Folder, path: str, rows: NDArray[np.int64], targets: NDArray[np.float32], mask: Mask
) -> None:
    """Publish what is selected of a file; see `Cutoffs.select`."""
    table = pa.table({"row": rows, "targets": as_lists(targets), "mask": as_lists(mask)})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=GROUP_ROWS)
    folder.publish(path, sink.getvalue().to_pybytes())


def as_lists(matrix: NDArray[Any]) -> pa.FixedSizeListArray:
    """Lay an array (B, L) out as B lists."""
    flat = pa.array(np.ascontiguousarray(matrix).ravel())
    return pa.FixedSizeListArray.from_arrays(flat, matrix.shape[1])


def as_matrix(lists: pa.ChunkedArray) -> NDArray[Any]:
    """Undo `as_lists`."""
    flat: NDArray[Any] = lists.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(len(lists), lists.type.list_size)
