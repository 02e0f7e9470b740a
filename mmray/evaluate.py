"""How right labels are: of a bundle over labeled rows, or of an output that was labeled before."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray.data
from rich.table import Table

from mmray.bundle import Bundle
from mmray.columns import refuse_pickles, require_columns
from mmray.config import Columns, ComputeConfig, LabelConfig, ScoringConfig, make
from mmray.datasets import Rows
from mmray.decisions import decide
from mmray.errors import DataError, OutputError
from mmray.metrics import Counts
from mmray.parcels import unpack
from mmray.parquet import DataFile, read_footer, read_units
from mmray.plan import Plan, Work
from mmray.schema import Vocabulary, output_name, score_matrix
from mmray.scoring import Pool, Scorer, score_shards, streaming
from mmray.storage import Folder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rule:
    """What turns labeled rows into counts: vocabulary, thresholds, and whether all scores are there."""

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
    """
    columns, compute = columns or Columns(), compute or ComputeConfig()
    bundle, pool = Bundle.load(model_uri), Pool.on_cluster(compute)
    config = pool.settle_precision(make(LabelConfig, asdict(scoring or ScoringConfig())))
    rows = Rows.find(data_uri, columns)
    rule = Rule(bundle.vocabulary, bundle.thresholds, scored=True)
    work = Work([(file, list(file.units)) for file in rows.files], set(), [])

    def count(packed: pa.Table) -> Iterator[pa.Table]:
        for parcel in unpack(packed):
            if parcel.error or parcel.rows is None:
                raise parcel.error or AssertionError("a parcel holds rows or an error")
            yield _vector(rule.count(parcel.rows[output_name(columns.labels)], parcel.rows))

    with streaming():
        scored = score_shards(rows.folder, work, Scorer(bundle, columns, config, pool, hidden=hidden))
        counts = scored.map_batches(count, batch_size=1, batch_format="pyarrow", **pool.tasks())
        return rule.summary(_vectors(counts))


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
    columns = columns or Columns()
    predictions = Folder(predictions_uri)
    plan = Plan.load(predictions)
    if plan is None:
        raise OutputError(f"{predictions_uri} has no plan: it is no output of label.py")
    rows = Rows.find(data_uri, columns, needs=["labels"])
    scored = plan.settings["scores"] == "all"
    rule = Rule(Vocabulary(tuple(plan.settings["labels"])), np.array(plan.settings["thresholds"]), scored)
    planned = {(file.path, file.footer_sha256) for file in plan.files if file.num_rows}
    if planned == set(rows.identity()):
        return rule.summary(_count_by_position(rows, predictions, plan, rule))
    truth, labeled = _join_by_id(rows, predictions, plan, rule)
    return rule.summary([rule.count(truth, labeled).to_vector()])


def _count_by_position(rows: Rows, predictions: Folder, plan: Plan, rule: Rule) -> Iterator[np.ndarray]:
    """Count file by file, on the cluster: row i of the output is row i of the input."""
    label_column = rows.columns.labels

    def count(row: dict[str, Any]) -> dict[str, Any]:
        file = DataFile.from_json(row["item"])
        truth = pa.concat_tables(
            table for _, _, table in read_units(rows.folder, file, file.units, [label_column])
        )
        labeled = _read_predictions(predictions, file.path, rule)
        return {"counts": rule.count(truth[label_column], labeled).to_vector().tobytes()}

    files = ray.data.from_items([file.to_json() for file in plan.files if file.num_rows])
    return _vectors(files.map(count, num_cpus=0.5))


def _join_by_id(rows: Rows, predictions: Folder, plan: Plan, rule: Rule) -> tuple[pa.ChunkedArray, pa.Table]:
    """Join by id, on the driver: ids, labels and scores of all rows must fit there.

    Raises:
        DataError: an id is null or stands twice, or nothing matches.
    """
    id_column, label_column = rows.columns.id, rows.columns.labels
    for file in rows.files:
        schema = read_footer(rows.folder, file.path, file.size_bytes)[0].schema.to_arrow_schema()
        require_columns(schema, {"--id-column": id_column}, f"{rows.folder}/{file.path}")
    truth = pa.concat_tables(
        table.rename_columns(["id", "truth"])
        for file in rows.files
        for _, _, table in read_units(rows.folder, file, file.units, [id_column, label_column])
    )
    name = output_name(id_column)
    labeled = pa.concat_tables(_read_predictions(predictions, file.path, rule, name) for file in plan.files)
    for table, column, where in ((truth, "id", rows.folder), (labeled, name, predictions)):
        _require_unique(table[column], column, str(where))
    index = pc.index_in(labeled[name].cast(truth["id"].type), value_set=truth["id"].combine_chunks())
    matched = index.is_valid()
    joined = pc.sum(matched).as_py() or 0
    if not joined:
        raise DataError(
            f"no id of {predictions} occurs in {rows.folder}; is {id_column!r} the right --id-column?"
        )
    log.warning(
        "joined by %s: %d rows; %d predictions and %d labeled rows found no partner",
        id_column,
        joined,
        labeled.num_rows - joined,
        truth.num_rows - joined,
    )
    return truth["truth"].take(index.drop_null()), labeled.filter(matched)


def _read_predictions(predictions: Folder, path: str, rule: Rule, *more: str) -> pa.Table:
    columns = ["predicted_labels", *(["scores"] if rule.scored else []), *more]
    try:
        labeled = pq.read_table(pa.BufferReader(predictions.read(path)), columns=columns)
    except FileNotFoundError:
        raise OutputError(f"{predictions}/{path} is missing: let label.py finish first") from None
    refuse_pickles(labeled.schema, f"{predictions}/{path}")
    return labeled


def _require_unique(ids: pa.ChunkedArray, column: str, where: str) -> None:
    if ids.null_count:
        raise DataError(f"{where}: {ids.null_count} rows have no {column}; join by another --id-column")
    counts = pc.value_counts(ids)
    twice = counts.filter(pc.greater(pc.struct_field(counts, "counts"), 1))
    if len(twice):
        value = twice[0]["values"].as_py()
        raise DataError(f"{where}: {len(twice)} values of {column} stand more than once, such as {value!r}")


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
