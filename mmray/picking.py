"""Which rows of a labeled output are worth a look: by how sure the model is, labels taking turns."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

CERTAIN, UNCERTAIN, FALLBACK = "most certain", "least certain", "fallback"
REJECTION, RANDOM = "rejected", "at random"
SHOWN = 48
"""Rows of a kind."""

COUNTS = {UNCERTAIN: SHOWN, FALLBACK: SHOWN, CERTAIN: SHOWN, REJECTION: SHOWN, RANDOM: 256}
"""Rows of each kind that are picked: at random more than are shown, to find among them what disagrees."""


class Pick(NamedTuple):
    """A row to look at."""

    kind: str
    label: int
    """That it stands for, by place in the vocabulary."""
    rank: float
    """The higher, the sooner it is shown."""
    path: str
    row: int


def doubt(scores: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Tell how unsure a model is of rows: the mean entropy of their labels, in bits.

    Args:
        scores: float (B, L) in [0, 1].

    Returns:
        float64 (B,) in [0, 1].
    """
    p = np.clip(scores.astype(np.float64), 1e-12, 1 - 1e-12)
    entropy: NDArray[np.float64] = -(p * np.log2(p) + (1 - p) * np.log2(1 - p))
    return entropy.mean(axis=1)


def take_turns(labels: np.ndarray, ranks: np.ndarray, count: int) -> NDArray[np.intp]:
    """Choose rows so that each label has its turn, with its rows of highest rank first.

    Args:
        labels: int (B,).
        ranks: float (B,).
        count: how many, at most.

    Returns:
        Their places, int (N,), in the order in which they were chosen.
    """
    order = np.lexsort((-ranks, labels))
    _, first, places = np.unique(labels[order], return_index=True, return_inverse=True)
    turns = np.arange(len(order)) - first[places]
    return order[np.lexsort((-ranks[order], turns))][:count]


def take_first(picks: Iterable[Pick], count: int) -> list[Pick]:
    """Choose so many picks, labels taking turns."""
    ordered = sorted(picks, key=lambda pick: (pick.path, pick.row))
    labels, ranks = (np.array([pick[place] for pick in ordered]) for place in (1, 2))
    return [ordered[place] for place in take_turns(labels, ranks, count)]


def choose(picks: Iterable[Pick]) -> list[Pick]:
    """Keep as many picks of each kind as are shown, labels taking turns."""
    kept: list[Pick] = []
    for kind, same in groupby(sorted(picks), key=lambda pick: pick.kind):
        kept += take_first(same, COUNTS[kind])
    return kept


def first_turns(picks: Iterable[Pick], count: int) -> list[Pick]:
    """Leave out picks that are not among the first `count` of their label: these alone can be, of all."""
    by_label: dict[int, list[Pick]] = defaultdict(list)
    for pick in picks:
        by_label[pick.label].append(pick)
    return [
        pick
        for same in by_label.values()
        for pick in heapq.nsmallest(count, same, key=lambda pick: (-pick.rank, pick.path, pick.row))
    ]
