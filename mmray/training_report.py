"""The report on a training run: how it went, and how right its model is, label by label."""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mmray import ablate
from mmray.bundle import Bundle
from mmray.charts import Chart, Series
from mmray.decisions import decide
from mmray.errors import BundleError
from mmray.metrics import THRESHOLDS
from mmray.page import Cell, Page, Section, Table
from mmray.self_train import REPORT, ROUND, ROUNDS, round_cells
from mmray.start import RUN
from mmray.storage import Folder
from mmray.validation import VALIDATION, Validation

MAX_CHARTED = 24
"""Labels that have charts of their own: the most frequent."""

MAX_MATRIX = 30
MAX_POINTS = 200
METRICS = {"sample_f1": "sample F1", "map": "mAP", "macro_f1": "macro F1"}


def training_report(folder: Folder) -> Page:
    """Report on a bundle that `train_model` or `self_train` left.

    Raises:
        BundleError: there is no complete bundle.
    """
    bundle = Bundle.load(folder.uri)
    metrics = folder.read_json("metrics.json")
    if not metrics:
        raise BundleError(f"{folder}/metrics.json is missing or empty; train.py writes it")
    names = [str(label) for label in bundle.vocabulary.labels]
    sections = [by_epoch(metrics)] if metrics.get("history") else []
    rounds, run = folder.read_json(REPORT), folder
    if rounds is not None:
        sections.append(by_round(rounds))
        run = folder / f"{ROUNDS}/{rounds['best']}/bundle"
    if metrics.get("by_modality"):
        sections.append(by_modality(metrics))
    sections.append(by_label(metrics, bundle, names))
    validation = read_validation(run)
    if validation is not None:
        scores = validation.scores(bundle.calibration)
        charted = np.argsort(-validation.targets.sum(axis=0), kind="stable")[:MAX_CHARTED]
        sections += [
            reliability(validation, scores),
            by_threshold(validation, scores, metrics),
            per_label_charts(validation, scores, bundle, names, charted),
            confusion(validation, scores, bundle, names),
        ]
    sections.append(made_of(bundle))
    return Page(f"Training run: {folder}", _facts(metrics), sections)


def read_validation(run: Folder) -> Validation | None:
    """Read what the kept epoch made of the validation rows, where the run's own folder is still there."""
    data = run.read_or_none(f"{RUN}/{VALIDATION}")
    if data is None:
        return None
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / VALIDATION).write_bytes(data)
        return Validation.load(Path(scratch))


def _facts(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    facts = [(title, f"{metrics[name]:.4f}") for name, title in METRICS.items()]
    facts.append(("calibration error", f"{metrics['ece']:.4f}"))
    facts.append(("validation rows", f"{metrics['num_rows']:,}"))
    if training := metrics.get("training"):
        facts.append(("training rows", f"{training['num_rows']:,}"))
    return facts


def by_epoch(metrics: dict[str, Any]) -> Section:
    """Show how the run went."""
    history = metrics["history"]
    epochs = [entry["epoch"] for entry in history]
    charts = [
        Chart("Training loss", [Series(epochs, [entry["loss"] for entry in history])], "epoch", "loss"),
        Chart(
            "On the validation rows, at one threshold for all labels",
            [Series(epochs, [entry[name] for entry in history], title) for name, title in METRICS.items()],
            *("epoch", "metric"),
            mark=metrics["epoch"],
        ),
    ]
    columns = ("epoch", "loss", *METRICS.values(), "seconds")
    rows = [
        [
            f"{entry['epoch']}{' (kept)' if entry['epoch'] == metrics['epoch'] else ''}",
            *(f"{entry[name]:.4f}" for name in ("loss", *METRICS)),
            f"{entry['seconds']:.0f}",
        ]
        for entry in history
    ]
    return Section("Epochs", "The dotted line is the epoch that was kept.", [Table(columns, rows)], charts)


def by_round(report: dict[str, Any]) -> Section:
    """Show what each round of self-training gave."""
    return Section(
        "Rounds of self-training",
        "Round 0 is the first teacher; each teaches the next one.",
        [Table(ROUND, round_cells(report["rounds"], report["best"]))],
    )


def by_modality(metrics: dict[str, Any]) -> Section:
    """Show what image and caption say, each alone."""
    seen = {"image and caption": metrics} | {
        f"the {modality} alone": found for modality, found in metrics["by_modality"].items()
    }
    rows = [[name, *(f"{found[metric]:.4f}" for metric in METRICS)] for name, found in seen.items()]
    return Section("Modalities", tables=[Table(("of", *METRICS.values()), rows)])


def by_label(metrics: dict[str, Any], bundle: Bundle, names: Sequence[str]) -> Section:
    """Show how right each label is."""
    trained = metrics.get("training", {}).get("by_label", {})
    rows: list[list[str | Cell]] = []
    for name, threshold in zip(names, bundle.thresholds, strict=True):
        entry = metrics["by_label"][name]
        quality = [entry[key] for key in ("precision", "recall", "f1", "ap")]
        cells = [Cell("-" if value is None else f"{value:.3f}", value or 0.0) for value in quality]
        seen = f"{trained[name]:,}" if name in trained else "-"
        rows.append([name, *cells, f"{threshold:.3f}", f"{entry['support']:,}", seen])
    columns = ("label", "precision", "recall", "F1", "AP", "threshold", "validation rows", "training rows")
    words = "On the validation rows, which also chose epoch, calibration and thresholds."
    return Section("Labels", words, [Table(columns, rows)])


def reliability(validation: Validation, scores: np.ndarray) -> Section:
    """Show whether scores mean what they say."""
    series = [Series([0, 1], [0, 1], "perfect")]
    for name, found in (("calibrated", scores), ("as the model gives them", validation.scores())):
        number, score, target = validation.counts(found, np.full(scores.shape[1], 0.5)).calibration
        there = number > 0
        series.append(Series(score[there] / number[there], target[there] / number[there], name))
    words = "Of all row and label pairs with about this score, how many are true."
    return Section("Reliability", words, charts=[Chart("Reliability", series, "score", "share true", True)])


def by_threshold(validation: Validation, scores: np.ndarray, metrics: dict[str, Any]) -> Section:
    """Show what one threshold for all labels would give, and what other rules gave."""
    counts = validation.counts(scores, np.full(scores.shape[1], 0.5))
    f1 = counts.sum_f1_by_threshold / np.maximum(counts.num_rows, 1)
    chart = Chart("One threshold for all labels", [Series(THRESHOLDS, f1)], "threshold", "sample F1")
    columns = ("decision", "sample F1", "micro F1", "macro F1", "fallback rate", "ECE")
    keys = ("sample_f1", "micro_f1", "macro_f1", "fallback_rate", "ece")
    rows = [
        [
            name,
            *(f"{found[key]:.4f}" if key in found else "-" for key in keys),
        ]  # a bundle of before has no ECE
        for name, found in metrics["by_decision"].items()
    ]
    words = "The table: rows that calibration and thresholds were not fitted to. The chart: all of them."
    return Section("Decision rules", words, tables=[Table(columns, rows)], charts=[chart])


def per_label_charts(
    validation: Validation, scores: np.ndarray, bundle: Bundle, names: Sequence[str], charted: np.ndarray
) -> Section:
    """Show precision against recall, and F1 against the threshold, of the most frequent labels."""
    charts = []
    for label in charted:
        column, truth = scores[:, label], validation.targets[:, label]
        precision, recall = precision_and_recall(column, truth)
        charts += [
            Chart(
                f"{names[label]}: precision and recall",
                [Series(recall, precision)],
                *("recall", "precision", True),
            ),
            Chart(
                f"{names[label]}: F1 by threshold",
                [Series(THRESHOLDS, f1_by_threshold(column, truth))],
                *("threshold", "F1", True),
                mark=float(bundle.thresholds[label]),
            ),
        ]
    words = "The dotted line is the label's own threshold."
    if len(names) > len(charted):
        words += f" The {len(charted)} most frequent of {len(names):,} labels."
    return Section("Label by label", words, charts=charts)


def precision_and_recall(scores: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Give both at each score as threshold, from the highest down, thinned out to be drawn.

    Args:
        scores: float (B,).
        targets: bool (B,).

    Returns:
        precision, recall: float64 (N,) each; equal scores are one threshold.
    """
    order = np.argsort(-scores, kind="stable")
    hits = targets[order].cumsum()
    last = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))
    last = last[np.unique(np.linspace(0, len(last) - 1, min(len(last), MAX_POINTS)).astype(int))]
    return hits[last] / (last + 1), hits[last] / max(1, targets.sum())


def f1_by_threshold(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Give F1 at each of THRESHOLDS, float64 (99,), of one label's scores (B,) and targets (B,)."""
    decided = scores >= THRESHOLDS[:, None].astype(scores.dtype)
    hits = (decided & targets).sum(axis=1)
    return 2 * hits / np.maximum(1, decided.sum(axis=1) + targets.sum())


def confusion(validation: Validation, scores: np.ndarray, bundle: Bundle, names: Sequence[str]) -> Section:
    """Show which labels rows were given in place of those that they bear."""
    decided, _ = decide(scores, bundle.thresholds)
    decided &= validation.valid[:, None]
    missed, wrong = validation.targets & ~decided, decided & ~validation.targets
    # By floats, which BLAS multiplies; of whole numbers below 2^24 they are exact.
    pairs = (missed.T.astype(np.float32) @ wrong.astype(np.float32)).astype(np.int64)
    kept = np.sort(np.argsort(-(pairs.sum(axis=0) + pairs.sum(axis=1)), kind="stable")[:MAX_MATRIX])
    largest = max(1, pairs.max(initial=0))
    rows = [
        [
            names[row],
            *(
                Cell(f"{pairs[row, column]}" if pairs[row, column] else "", pairs[row, column] / largest)
                for column in kept
            ),
        ]
        for row in kept
    ]
    words = (
        "Validation rows that lack the label of the line, which they bear, and were given the label of the "
        "column, which they do not bear."
    )
    if len(names) > MAX_MATRIX:
        words += f" The {MAX_MATRIX} labels that are confused most."
    return Section(
        "Confusion", words, [Table(["missed", *(names[column] for column in kept)], rows, shaded=True)]
    )


def made_of(bundle: Bundle) -> Section:
    """Show what the model is made of."""
    config = bundle.model_config
    rows = [
        ("image tower", f"{config.vision}, {config.image_size} px"),
        ("caption tower", config.text),
        ("fusion", config.fusion),
        ("fingerprint", bundle.fingerprint),
    ]
    return Section("Made of", tables=[Table(("what", "value"), rows)])


def ablation_report(folder: Folder) -> Page:
    """Report on an output of `ablate`."""
    rows = list(csv.DictReader(folder.read("ablation.csv").decode().splitlines()))
    tables = []
    for axis in dict.fromkeys(row["axis"] for row in rows):
        lines = [
            [row["value"], *map(partial(_mean, row), ablate.METRICS)] for row in rows if row["axis"] == axis
        ]
        tables.append(Table((axis, *ablate.TITLES.values()), lines))
    words = f"Mean and standard deviation over {rows[0]['seeds']} seeds, on the validation rows."
    return Page(f"Ablation: {folder}", [("variants", f"{len(rows)}")], [Section("Ablation", words, tables)])


def _mean(row: dict[str, str], metric: str) -> str:
    return f"{float(row[metric]):.4f} ± {float(row[f'{metric}_std']):.4f}"
