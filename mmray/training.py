"""Training: from two datasets to a bundle, by way of the stages before it.

OUTPUT/             the bundle, when training is done
OUTPUT/_train/      what it started from: see `mmray.start`
OUTPUT/_train/init/ bundles of earlier stages, where `--init` names recipes
OUTPUT/_train/run/  Ray Train's checkpoints, one an epoch; the best and the latest are kept
OUTPUT/_train/tensorboard/  the history, for TensorBoard
OUTPUT/_train/validation.safetensors  what the best one makes of the validation rows
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import ray
import ray.train
import safetensors.torch

from mmray.bundle import Bundle, save_bundle
from mmray.card import model_card
from mmray.config import Columns, ComputeConfig, ModelConfig, TrainConfig
from mmray.datasets import Rows
from mmray.errors import DataError
from mmray.fitting import TrainWorkers, fit
from mmray.learner import PROGRESS
from mmray.news import heard
from mmray.recipes import is_recipe, read_stage
from mmray.start import RECIPE, RUN, Start, is_finished, prepare_start, recipe_of
from mmray.storage import Folder
from mmray.validation import VALIDATION, Validation
from mmray.warm_start import check_stages, find_donors
from mmray.worker import TrainJob

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingResult:
    """What training gave."""

    bundle: Bundle
    metrics: dict[str, Any]
    """Of the best epoch on the validation rows, as `Counts.summary` gives them, and the epoch's number."""
    seconds: float
    resumed: bool
    """Whether everything had been done before."""


def train_model(
    data_uri: str,
    val_uri: str,
    output_uri: str,
    model: ModelConfig | None = None,
    train: TrainConfig | None = None,
    columns: Columns | None = None,
    compute: ComputeConfig | None = None,
    *,
    pseudo: Rows | None = None,
    progress: bool = False,
) -> TrainingResult:
    """Train a model on labeled rows, or go on from its last checkpoint; leaves a bundle.

    Args:
        data_uri: Parquet rows to train on.
        val_uri: Parquet rows that choose the best epoch and the thresholds, and calibrate.
        output_uri: folder of the bundle; checkpoints stand below it.
        model: what it is made of.
        train: how it learns.
        columns: names of the input's columns.
        compute: where the work runs.
        pseudo: further rows to train on, by what was selected of their pseudo-labels.
        progress: show how the run goes, on stderr.

    Raises:
        DataError: the rows are unusable.
        ConfigError: a tower is unknown, out of reach, or does not fit what it starts from.
        BundleError: what it starts from is incomplete or damaged.
        ClusterError: the cluster has no CPU yet.
        OutputError: the output holds a bundle of other data or another recipe.
    """
    model, train = model or ModelConfig(), train or TrainConfig()
    columns, compute = columns or Columns(), compute or ComputeConfig()
    started = time.monotonic()
    output = Folder(output_uri)
    rows, val = Rows.find(data_uri, columns), Rows.find(val_uri, columns)
    parts = [rows, pseudo] if pseudo else [rows]
    workers = TrainWorkers.on_cluster(compute)
    if rows.num_rows < workers.scaling.maximum:
        raise DataError(f"{data_uri}: {rows.num_rows} rows for {workers.scaling.maximum} workers; use fewer")
    check_stages(model, train)
    if any(map(is_recipe, train.init)):  # whose bundles are still to come: all else is held beforehand
        is_finished(output, recipe_of(parts, val, model, train, None))
        train = train_stages(data_uri, val_uri, output_uri, train, columns, compute, progress=progress)
    donors = find_donors(model, train.init)
    recipe = recipe_of(parts, val, model, train, donors)
    if is_finished(output, recipe):
        bundle = Bundle.load(output_uri)
        return TrainingResult(bundle, output.read_json("metrics.json"), time.monotonic() - started, True)
    start = prepare_start(output, parts, val, model, train, donors)
    num_bytes, architecture = ray.get(try_building.remote(start, model))
    log.info("model: %s", ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in num_bytes.items()))
    output.publish_json(RECIPE, recipe)  # what cannot be built has taken no output
    with heard(progress, train.epochs) as news:
        num_rows = sum(part.num_rows for part in parts)
        datasets = [PurePosixPath(part.folder.uri).name for part in parts]
        job = TrainJob(model, train, start, datasets, num_rows, output / RUN, news)
        best, latest = fit(job, parts, val, output, workers)
    # A bundle needs no other folder: a backbone that came from one is kept under timm's name for it.
    kept = replace(model, vision=architecture or model.vision)
    bundle, metrics = save_best(output, best, latest, replace(job, model=kept))
    return TrainingResult(bundle, metrics, time.monotonic() - started, False)


def train_stages(
    data_uri: str,
    val_uri: str,
    output_uri: str,
    train: TrainConfig,
    columns: Columns,
    compute: ComputeConfig,
    *,
    progress: bool,
) -> TrainConfig:
    """Train what recipes among `--init` describe, unless that is done; gives the bundles in their place.

    A stage learns from the same rows, with the same seed, and its bundle stands below the output.
    """
    starts = []
    for start in train.init:
        if is_recipe(start):
            stage, (model, earlier) = PurePosixPath(start).stem, read_stage(start)
            start = f"{Folder(output_uri)}/{RUN}/init/{stage}"
            log.info("stage %s", stage)
            earlier = replace(earlier, seed=train.seed)
            train_model(data_uri, val_uri, start, model, earlier, columns, compute, progress=progress)
        starts.append(start)
    return replace(train, init=tuple(starts))


@ray.remote(num_cpus=0.5)
def try_building(start: Start, config: ModelConfig) -> tuple[dict[str, int], str | None]:
    """Build the model where workers will, since a head computes nothing; forget it again.

    Returns:
        Bytes of each part, and timm's name for the image tower.

    Raises:
        ConfigError, BundleError: as `Start.build` does.
    """
    model = start.build(config)
    return model.num_bytes(), model.image.architecture if model.image else None


def save_best(
    output: Folder, best: ray.train.Checkpoint, latest: ray.train.Checkpoint, job: TrainJob
) -> tuple[Bundle, dict[str, Any]]:
    """Make the bundle of the best epoch's averaged weights; gives it and its metrics."""
    with latest.filesystem.open_input_stream(f"{latest.path}/{PROGRESS}") as file:
        history = json.loads(file.read())["history"]
    with best.as_directory() as folder:
        weights = safetensors.torch.load_file(Path(folder) / "averaged.safetensors")
        state = json.loads((Path(folder) / PROGRESS).read_text())
        validation = Validation.load(Path(folder))
        output.publish(f"{RUN}/{VALIDATION}", Path(folder) / VALIDATION)
    start, settled = job.start, validation.settle(job.start.vocabulary)
    metrics = settled.metrics | {name: state["metrics"][name] for name in ("epoch", "loss", "seconds")}
    metrics["history"] = history
    metrics["training"] = {
        "datasets": job.datasets,
        "num_rows": job.num_rows,
        "num_labeled": start.num_labeled,
        "by_label": {
            str(label): int(n) for label, n in zip(start.vocabulary.labels, start.positives, strict=True)
        },
        "init": {part: PurePosixPath(donor.folder.uri).name for part, donor in start.donors.items()},
    }
    bundle = save_bundle(
        output,
        model_config=job.model,
        text_config=start.text_config,
        vocabulary=start.vocabulary,
        thresholds=settled.thresholds,
        calibration=settled.calibration,
        tokenizer_files=start.tokenizer_files,
        weights=weights,
        metrics=metrics,
        card=model_card(job.model, metrics),
    )
    return bundle, metrics
