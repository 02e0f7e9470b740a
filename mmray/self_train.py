"""Self-training: a teacher labels unlabeled rows, a student learns from these too, and teaches the next one.

OUTPUT/                      the bundle of the round that is best by validation sample F1
OUTPUT/_rounds/0/bundle/     the first teacher
OUTPUT/_rounds/N/labels/     what the teacher says of the unlabeled rows: an output of label.py
OUTPUT/_rounds/N/selection/  what the student learns of it, and how much and how right that is
OUTPUT/_rounds/N/bundle/     the student

Each step leaves what is done alone, so that the same command goes on where it was killed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.table import Table

from mmray.bundle import Bundle
from mmray.config import Columns, ComputeConfig, LabelConfig, ModelConfig, SelfTrainConfig, TrainConfig
from mmray.datasets import Rows
from mmray.errors import OutputError
from mmray.labeling import label_dataset
from mmray.pseudo import select
from mmray.storage import Folder
from mmray.training import TrainingResult, train_model, train_stages
from mmray.warm_start import check_stages

log = logging.getLogger(__name__)

ROUNDS = "_rounds"
REPORT = f"{ROUNDS}/report.json"

ROUND = ("round", "rows joined", "labels", "precision", "sample F1", "mAP", "macro F1", "gain")
"""What is told of each."""

EVERYTHING = LabelConfig(max_failed_fraction=1)
"""Rows that fail teach nothing, and end nothing."""


@dataclass(frozen=True)
class SelfTrainingResult:
    """What self-training gave."""

    bundle: Bundle
    rounds: list[dict[str, Any]]
    """Of the first teacher and each student: `metrics`, and of a student its `selection`."""
    best: int
    """The round whose bundle was kept."""
    seconds: float


def self_train(
    data_uri: str,
    unlabeled_uri: str,
    val_uri: str,
    output_uri: str,
    model: ModelConfig | None = None,
    train: TrainConfig | None = None,
    config: SelfTrainConfig | None = None,
    columns: Columns | None = None,
    compute: ComputeConfig | None = None,
    *,
    progress: bool = False,
) -> SelfTrainingResult:
    """Train a teacher, and students on labeled rows and on what their teachers say of unlabeled ones.

    Args:
        data_uri: Parquet rows with labels.
        unlabeled_uri: Parquet rows to learn from beside them. Labels that they have are never learned: they
            only tell how right the pseudo-labels are.
        val_uri: Parquet rows that choose the best epoch, calibration and thresholds.
        output_uri: folder of the best round's bundle; the rounds stand below it.
        model: what it is made of.
        train: how it learns.
        config: how pseudo-labels are selected.
        columns: names of the input's columns.
        compute: where the work runs.
        progress: show how the run goes, on stderr.

    Raises:
        DataError: the rows are unusable.
        ConfigError: a tower is unknown or out of reach.
        OutputError: the output holds what came of other data or another recipe.
    """
    config, columns = config or SelfTrainConfig(), columns or Columns()
    compute, model, train = compute or ComputeConfig(), model or ModelConfig(), train or TrainConfig()
    started, output = time.monotonic(), Folder(output_uri)
    if output.read_json("config.json") is not None and output.read_json(REPORT) is None:
        raise OutputError(f"{output} holds a bundle of unknown origin; choose another --output")
    unlabeled = Rows.find(unlabeled_uri, columns, needs=("image", "caption"))
    check_stages(model, train)
    # Once for all rounds: teacher and students start from the same stages.
    train = train_stages(data_uri, val_uri, output_uri, train, columns, compute, progress=progress)

    def bundle_of(number: int) -> str:
        return f"{output}/{ROUNDS}/{number}/bundle"

    def train_round(number: int, pseudo: Rows | None = None) -> TrainingResult:
        settings = (model, train, columns, compute)
        return train_model(data_uri, val_uri, bundle_of(number), *settings, pseudo=pseudo, progress=progress)

    teacher = train_round(0)
    training, vocabulary = teacher.metrics["training"], teacher.bundle.vocabulary
    positives = [training["by_label"][str(label)] for label in vocabulary.labels]
    shares = np.array(positives) / training["num_labeled"]
    rounds: list[dict[str, Any]] = [{"metrics": teacher.metrics}]
    for number in range(1, config.rounds + 1):
        folder = output / f"{ROUNDS}/{number}"
        log.info("round %d of %d: the teacher labels %d rows", number, config.rounds, unlabeled.num_rows)
        said = (unlabeled_uri, bundle_of(number - 1), f"{folder}/labels", columns, EVERYTHING, compute)
        label_dataset(*said, progress=progress)
        pseudo, report = select(unlabeled, folder, vocabulary, shares, config)
        teacher = train_round(number, pseudo)
        rounds.append({"metrics": teacher.metrics, "selection": report})
    best = max(range(len(rounds)), key=lambda number: rounds[number]["metrics"]["sample_f1"])
    output.publish_json(REPORT, {"best": best, "rounds": rounds})
    publish_best(Folder(bundle_of(best)), output)
    return SelfTrainingResult(Bundle.load(output_uri), rounds, best, time.monotonic() - started)


def publish_best(bundle: Folder, output: Folder) -> None:
    """Copy a round's bundle to where the job was told to leave one; `config.json` comes last."""
    paths = [path for path in bundle.list() if not path.startswith("_")]
    for path in sorted(paths, key=lambda path: path == "config.json"):
        output.publish(path, bundle.read(path))


def as_table(result: SelfTrainingResult) -> Table:
    """Lay the rounds out for people."""
    table = Table(title="self-training")
    for name in ROUND:
        table.add_column(name, justify="right")
    for cells in round_cells(result.rounds, result.best):
        table.add_row(*cells)
    return table


def round_cells(rounds: Sequence[dict[str, Any]], best: int) -> list[list[str]]:
    """Say of each round, in the order of ROUND, what joined, how right it was, and what it gained."""
    rows = []
    for number, entry in enumerate(rounds):
        metrics, teacher = entry["metrics"], rounds[max(0, number - 1)]["metrics"]
        scores = [f"{metrics[name]:.4f}" for name in ("sample_f1", "map", "macro_f1")]
        gain = f"{metrics['sample_f1'] - teacher['sample_f1']:+.4f}" if number else ""
        rows.append([f"{number}{' (kept)' if number == best else ''}", *_joined(entry), *scores, gain])
    return rows


def _joined(entry: dict[str, Any]) -> tuple[str, str, str]:
    report = entry.get("selection")
    if report is None:
        return "", "", ""
    labels = list(report["by_label"].values())
    num_true = sum(label["num_true"] for label in labels)
    known = sum(label["known_true"] for label in labels)
    right = sum(label["precision_true"] * label["known_true"] for label in labels if label["known_true"])
    precision = f"{right / known:.3f}" if known else "-"
    return f"{report['num_selected']:,} of {report['num_rows']:,}", f"{num_true:,}", precision
