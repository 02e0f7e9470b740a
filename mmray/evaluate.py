"""How right labels are: of a bundle over labeled rows, or of an output that was labeled before."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
from rich.table import Table

from mmray.bundle import Bundle
from mmray.config import Columns, ComputeConfig, LabelConfig, ScoringConfig
from mmray.datasets import Rows
from mmray.decisions import decide
from mmray.metrics import Counts
from mmray.options import make
from mmray.pairing import Pairs
from mmray.parcels import unpack
from mmray.parquet import DataFile
from mmray.plan import Work
from mmray.pool import Pool
from mmray.resources import spread
from mmray.schema import Vocabulary, output_name, score_matrix
from mmray.scoring import Scorer, score_shards, streaming


@dataclass(frozen=True)
class Grader:
    """Turns labeled rows into counts: by vocabulary, thresholds, and whether all scores are there."""

    vocabulary: Vocabulary
    thresholds: np.ndarray
    """float64 (L,)."""
    scored: bool

    def count(self, truth: pa.ChunkedArray, labeled: pa.Table) -> Counts:
        """Count rows; those that failed count as rows without a label.

        Args:
            truth: list<label>, B rows; null is no label.
            labeled: B rows with `predicted_labels`, and with `scores` of all labels if `scored`.

        Raises:
            DataError: a true label that the model does not know.
        """
        targets = self.vocabulary.encode(truth).astype(bool)
        decided = self.vocabulary.encode(labeled["predicted_labels"]).astype(bool)
        scores = decided.astype(np.float32)
        if self.scored:
            scores, _ = score_matrix(labeled["scores"], len(self.vocabulary))
        _, fell_back = decide(scores, self.thresholds)
        return Counts.of(scores, targets, decided, fell_back & decided.any(axis=1))

    def summary(self, counts: Iterable[np.ndarray]) -> dict[str, Any]:
        """Add counts up, as vectors, to what `evaluate --json` writes."""
        size = len(self.vocabulary)
        total = sum((Counts.from_vector(vector, size) for vector in counts), start=Counts.zero(size))
        summary = total.summary(self.vocabulary.labels)
        if not self.scored:  # these need every score; what remains needs decisions alone
            summary |= {"map": None, "ece": None, "fallback_rate": None}
            for entry in summary["by_label"].values():
                entry["ap"] = None
        return summary


def evaluate_model(
    data_uri: str,
    model_uri: str,
    columns: Columns | None = None,
    scoring: ScoringConfig | None = None,
    compute: ComputeConfig | None = None,
    *,
    hidden: str | None = None,
) -> dict[str, Any]:
    """Label rows whose labels are known, with the pipeline of `label_dataset`, and measure.

    Args:
        data_uri: Parquet rows with labels.
        model_uri: the bundle.
        columns: names of the input's columns.
        scoring: how the model computes.
        compute: where the work runs.
        hidden: `image` or `caption`, to measure what the model makes of the other alone.

    Returns:
        `Counts.summary`.

    Raises:
        DataError: the rows are unusable, or bear labels that the model does not know.
        BundleError: the bundle is incomplete or damaged.
        ConfigError: a GPU is asked for, and this machine has none.
        ClusterError: the cluster has no CPU yet, or not the GPU that is asked for.
    """
    columns, compute, scoring = columns or Columns(), compute or ComputeConfig(), scoring or ScoringConfig()
    bundle, pool = Bundle.load(model_uri), Pool.on_cluster(compute, scoring)
    config = pool.settle(make(LabelConfig, asdict(scoring)))
    rows = Rows.find(data_uri, columns)
    grader = Grader(bundle.vocabulary, bundle.thresholds, scored=True)
    work = Work([(file, list(file.units)) for file in rows.files], set(), [])

    def count(packed: pa.Table) -> Iterator[pa.Table]:
        for parcel in unpack(packed):
            if parcel.error or parcel.rows is None:
                raise parcel.error or AssertionError("a parcel holds rows or an error")
            yield _vector(grader.count(parcel.rows[output_name(columns.labels)], parcel.rows))

    with streaming(pool):
        scored = score_shards(rows.folder, work, Scorer(bundle, columns, config, pool, hidden=hidden))
        counts = scored.map_batches(count, batch_size=1, batch_format="pyarrow", **pool.tasks())
        return grader.summary(_vectors(counts))


def evaluate_predictions(
    data_uri: str, predictions_uri: str, columns: Columns | None = None
) -> dict[str, Any]:
    """Measure an output of `label_dataset` against rows whose labels are known.

    Rows are joined by position where the output was made of just these files, else by id.

    Returns:
        `Counts.summary`; what needs all scores is None where the output kept fewer.

    Raises:
        OutputError: the predictions are no output of label.py.
        DataError: the rows are unusable, bear labels that the model does not know, or cannot be joined.
    """
    pairs = Pairs.find(data_uri, predictions_uri, columns or Columns())
    grader = Grader(pairs.plan.vocabulary, pairs.plan.thresholds, pairs.plan.scored)
    if not pairs.by_position:
        return grader.summary([grader.count(*pairs.joined()).to_vector()])

    def count(files: Sequence[DataFile]) -> np.ndarray:
        counts = (grader.count(*pairs.of_file(file)) for file in files)
        return sum(counts, start=Counts.zero(len(grader.vocabulary))).to_vector()

    return grader.summary(spread(count, pairs.files))


def _vector(counts: Counts) -> pa.Table:
    return pa.table({"counts": [counts.to_vector().tobytes()]})


def _vectors(dataset: ray.data.Dataset) -> Iterator[np.ndarray]:
    for row in dataset.iter_rows():
        yield np.frombuffer(row["counts"])


def as_table(summary: dict[str, Any]) -> Table:
    """Lay a summary out for people: a row for each label, the averages below."""
    table = Table(title=f"{summary['num_rows']:,} rows", show_footer=True)
    averages = f"sample F1 {summary['sample_f1']:.4f}"
    table.add_column("label", footer=averages)
    footers = (
        "",
        f"micro {summary['micro_f1']:.4f}",
        f"macro {summary['macro_f1']:.4f}",
        f"mAP {_shown(summary['map'])}",
    )
    for name, footer in zip(("precision", "recall", "F1", "AP"), footers, strict=True):
        table.add_column(name, footer=footer, justify="right")
    table.add_column("rows", footer=f"fallback {_shown(summary['fallback_rate'])}", justify="right")
    for label, entry in summary["by_label"].items():
        numbers = (_shown(entry[name]) for name in ("precision", "recall", "f1", "ap"))
        table.add_row(label, *numbers, f"{entry['support']:,}")
    return table


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
