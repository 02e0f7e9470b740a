"""What a labeled output holds, counted file by file in counts that add up; and which rows to look at."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmray.columns import refuse_pickles
from mmray.damage import reading_labels
from mmray.decisions import decide
from mmray.parquet import MAX_SHARD_ROWS
from mmray.picking import (
    CERTAIN,
    COUNTS,
    FALLBACK,
    RANDOM,
    REJECTION,
    UNCERTAIN,
    Pick,
    choose,
    doubt,
    first_turns,
    take_turns,
)
from mmray.plan import Plan
from mmray.schema import REJECTED, Vocabulary, score_matrix
from mmray.storage import Folder

NUM_BINS = 40
"""Of the histograms of scores, equal in score."""

MAX_REASONS = 1000
"""That are told apart; those that are rarer, in what was counted when they were too many, are lost."""

TRIM_AT = 100_000
"""Picks that are held before those are left out that cannot be chosen."""


@dataclass
class Survey:
    """Counts of labeled rows, and picks of them."""

    num_rows: int = 0
    num_empty: int = 0
    num_fallback: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    """Rows by status."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Rejected rows by reason; # stands for any number."""
    labels: np.ndarray | int = 0
    """int64 (L,), rows that were given each label."""
    histogram: np.ndarray | int = 0
    """int64 (L, NUM_BINS), scores; 0 where the output kept fewer than all."""
    picks: list[Pick] = field(default_factory=list)

    def __add__(self, other: Survey) -> Survey:
        """Count the rows of both."""
        return Survey(
            self.num_rows + other.num_rows,
            self.num_empty + other.num_empty,
            self.num_fallback + other.num_fallback,
            self.counts + other.counts,
            Counter(dict((self.reasons + other.reasons).most_common(MAX_REASONS))),
            self.labels + other.labels,
            self.histogram + other.histogram,
            choose([*self.picks, *other.picks]),
        )


@dataclass(frozen=True)
class Surveyor:
    """What is known of an output before its files are read."""

    output: Folder
    vocabulary: Vocabulary
    thresholds: np.ndarray
    """float64 (L,)."""
    fallback: bool
    scored: bool
    """Whether all scores were kept."""

    @classmethod
    def of(cls, output: Folder, plan: Plan) -> Surveyor:
        """Take it from the plan of an output."""
        fallback = plan.settings.get("fallback", True)
        return cls(output, plan.vocabulary, plan.thresholds, fallback, plan.scored)

    def survey(self, path: str) -> Survey:
        """Count the rows of one file, in a stream.

        Raises:
            OutputError: it is gone or damaged.
        """
        found = Survey()
        columns = ["predicted_labels", "status", "error", *["scores"] * self.scored]
        with reading_labels(f"{self.output}/{path}"):
            for first, rows in self._batches(path, columns):
                found += self.count(rows, path, first)
        return found

    def _batches(self, path: str, columns: list[str]) -> Iterator[tuple[int, pa.Table]]:
        """Read a labeled file in a stream; gives tables and the rows that they begin with."""
        first = 0
        with self.output.open(path) as source:
            file = pq.ParquetFile(source)
            refuse_pickles(file.schema_arrow, f"{self.output}/{path}")
            for batch in file.iter_batches(MAX_SHARD_ROWS, columns=columns):
                yield first, pa.Table.from_batches([batch])
                first += batch.num_rows

    def uncertain(self, path: str, count: int) -> list[Pick]:
        """Pick of one file the rows that may be among the `count` least certain of all, labels taking turns.

        Raises:
            OutputError: it is gone or damaged.
        """
        picks: list[Pick] = []
        trim_at = TRIM_AT
        with reading_labels(f"{self.output}/{path}"):
            for first, rows in self._batches(path, ["scores"]):
                scores, valid = score_matrix(rows["scores"], len(self.vocabulary))
                labels = np.abs(scores - self.thresholds).argmin(axis=1).tolist()
                found = zip(labels, doubt(scores).tolist(), itertools.count(first), valid, strict=False)
                picks += [
                    Pick(UNCERTAIN, label, rank, path, row) for label, rank, row, sound in found if sound
                ]
                if len(picks) > trim_at:
                    picks = first_turns(picks, count)
                    trim_at = max(TRIM_AT, 2 * len(picks))
        return first_turns(picks, count)

    def count(self, rows: pa.Table, path: str, first: int) -> Survey:
        """Count some rows of a file, from row `first` on."""
        statuses, reasons = np.array(rows["status"].to_pylist(), str), rows["error"].to_pylist()
        rejected = np.isin(statuses, REJECTED)
        decided = self.vocabulary.encode(rows["predicted_labels"]).astype(bool)
        found = Survey(
            num_rows=len(decided),
            num_empty=int((~decided.any(axis=1)).sum()),
            counts=Counter(statuses.tolist()),
            reasons=Counter(re.sub(r"\d+", "#", reasons[row]) for row in np.flatnonzero(rejected)),
            labels=decided.sum(axis=0),
        )
        chance = _random(len(decided), f"{path}:{first}")

        def pick(kind: str, among: np.ndarray, ranks: np.ndarray, labels: np.ndarray | None = None) -> None:
            places = np.flatnonzero(among)
            groups = np.zeros(len(places), int) if labels is None else labels[places]
            for turn in take_turns(groups, ranks[places], COUNTS[kind]):
                place = places[turn]
                found.picks.append(
                    Pick(kind, int(groups[turn]), float(ranks[place]), path, first + int(place))
                )

        pick(REJECTION, rejected, chance)
        pick(RANDOM, ~rejected, chance)
        if self.scored:
            scores, valid = score_matrix(rows["scores"], len(self.vocabulary))
            fell_back = decide(scores, self.thresholds, fallback=self.fallback)[1] & valid
            found.num_fallback = int(fell_back.sum())
            found.histogram = _histogram(scores[valid])
            unsure, top = doubt(scores), scores.argmax(axis=1)
            pick(CERTAIN, valid & ~fell_back, -unsure, top)
            pick(UNCERTAIN, valid, unsure, np.abs(scores - self.thresholds).argmin(axis=1))
            pick(FALLBACK, fell_back, chance, top)
        return found


def _random(count: int, seed: str) -> np.ndarray:
    """Draw numbers in [0, 1), float64 (count,), the same for the same rows of the same file."""
    digest = hashlib.sha256(seed.encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8])).random(count)


def _histogram(scores: np.ndarray) -> np.ndarray:
    """Count scores, float32 (B, L), by label and bin: int64 (L, NUM_BINS)."""
    bins = np.minimum((scores * NUM_BINS).astype(np.int64), NUM_BINS - 1)
    num_labels = scores.shape[1]
    cells = bins + NUM_BINS * np.arange(num_labels)
    return np.bincount(cells.ravel(), minlength=num_labels * NUM_BINS).reshape(num_labels, NUM_BINS)
