"""What each part of the method is worth: the same recipe but for one part, over several seeds.

OUTPUT/runs/NAME/result.json   what a variant gave with one seed; a rerun skips it
OUTPUT/runs/NAME/bundle/       its bundle
OUTPUT/ablation.md .csv .png   all of it: mean and standard deviation over the seeds
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import ray

from mmray.bundle import Bundle
from mmray.config import MAX_EPOCHS, AblationConfig, Columns, ComputeConfig, TrainConfig
from mmray.datasets import Rows
from mmray.errors import ConfigError, OutputError
from mmray.fingerprints import fingerprint
from mmray.fitting import TrainWorkers
from mmray.progress import Progress
from mmray.recipes import is_recipe
from mmray.self_train import self_train
from mmray.storage import Folder
from mmray.training import train_model
from mmray.variants import Experiment, Variant, of_all_seeds, suited, variants_of
from mmray.warm_start import check_stages

DATA = "data.json"
VERSION = "3"
"""Of what is measured, and how."""
METRICS = ("sample_f1", "map", "macro_f1", "ece")
TITLES = {"sample_f1": "sample F1", "map": "mAP", "macro_f1": "macro F1", "ece": "ECE"}


class Places(NamedTuple):
    """Where the data is."""

    data_uri: str
    val_uri: str
    unlabeled_uri: str | None
    columns: Columns
    compute: ComputeConfig

    def absolute(self) -> Places:
        """Write local paths in full: the trainings run in workers, which may stand in other folders."""
        unlabeled_uri = Folder(self.unlabeled_uri).uri if self.unlabeled_uri else None
        data_uri, val_uri = Folder(self.data_uri).uri, Folder(self.val_uri).uri
        return self._replace(data_uri=data_uri, val_uri=val_uri, unlabeled_uri=unlabeled_uri)


def run(experiment: Experiment, places: Places, folder: Folder) -> dict[str, Any]:
    """Train an experiment, unless that is done, and measure it.

    Returns:
        By reading, the METRICS. `whole` is what the bundle gives. `0.5`, `single` and `per-label` are
        thresholds, and `uncalibrated` leaves the scores as the model gives them: each on rows that it was not
        fitted to. `no image` and `no caption` hide these, `teacher` is who taught, and `more steps` a teacher
        who took as many steps as the student. `seconds` are those of all epochs.
    """
    known = folder.read_json("result.json")
    if known is not None:
        return dict(known)
    if experiment.self_train is None:
        metrics = train(experiment, places, f"{folder}/bundle")
        result = readings_of(metrics) | {"seconds": seconds_of(metrics)}
    else:
        result = run_rounds(experiment, places, folder)
    folder.publish_json("result.json", result)
    return result


def train(experiment: Experiment, places: Places, bundle_uri: str) -> dict[str, Any]:
    """Train an experiment on labeled rows alone; gives its metrics."""
    model, settings = experiment.model, experiment.train
    uris = (places.data_uri, places.val_uri, bundle_uri)
    return train_model(*uris, model, settings, places.columns, places.compute).metrics


def run_rounds(experiment: Experiment, places: Places, folder: Folder) -> dict[str, Any]:
    """Run an experiment's self-training, and what it is held against; see `run`."""
    assert places.unlabeled_uri is not None and experiment.self_train is not None
    rounds = self_train(
        places.data_uri,
        places.unlabeled_uri,
        places.val_uri,
        f"{folder}/bundle",
        experiment.model,
        experiment.train,
        experiment.self_train,
        places.columns,
        places.compute,
    ).rounds
    teacher, student = rounds[0]["metrics"], rounds[-1]["metrics"]  # of the last student, were it worse, too
    more = student["training"]["num_rows"] / teacher["training"]["num_rows"]
    control = replace(experiment, train=longer(experiment.train, more))
    trained = train(control, places, f"{folder}/more-steps")
    return readings_of(student) | {
        "teacher": brief(teacher),
        "more steps": brief(trained),
        "seconds": sum(seconds_of(entry["metrics"]) for entry in rounds),
    }


def longer(settings: TrainConfig, more: float) -> TrainConfig:
    """Give a recipe of so many times the steps, as far as a recipe may go."""
    return replace(
        settings,
        epochs=min(round(more * settings.epochs), MAX_EPOCHS),
        patience=min(round(more * settings.patience), MAX_EPOCHS),
        warmup_epochs=min(more * settings.warmup_epochs, MAX_EPOCHS),
    )


def brief(metrics: dict[str, Any]) -> dict[str, float]:
    """Give the METRICS among a bundle's."""
    return {name: metrics[name] for name in METRICS}


def readings_of(metrics: dict[str, Any]) -> dict[str, Any]:
    """Give what a bundle's metrics tell, by reading; see `run`."""
    whole = brief(metrics)
    readings = {"whole": whole}
    readings |= {name: whole | found for name, found in metrics["by_decision"].items()}
    for modality, hidden in (("caption", "image"), ("image", "caption")):
        if alone := metrics["by_modality"].get(modality):
            readings[f"no {hidden}"] = brief(alone)
    return readings


def seconds_of(metrics: dict[str, Any]) -> float:
    """Add up the seconds of a training's epochs, in whichever runs they were trained."""
    return sum(epoch["seconds"] for epoch in metrics["history"])


def ablate(
    base: Experiment, config: AblationConfig, places: Places, output_uri: str, *, progress: bool = False
) -> list[dict[str, Any]]:
    """Run all variants with all seeds, as many side by side as the cluster has room for, and write them up.

    Returns:
        The rows of `ablation.csv`: axis, value, seeds, and of each metric mean and standard deviation.

    Raises:
        ConfigError: the axis of self-training lacks rows without labels, or a variant cannot start so.
        DataError: the rows are unusable.
        BundleError: a bundle of `--init` is incomplete or damaged.
        ClusterError: the cluster has no CPU yet.
        OutputError: the output's runs saw other rows.
    """
    if "self-training" in config.axes and places.unlabeled_uri is None:
        raise ConfigError("the axis self-training needs --unlabeled")
    if recipes := [start for start in base.train.init if is_recipe(start)]:
        raise ConfigError(
            f"--init {recipes[0]} would be trained for each variant; train it once, and give its bundle"
        )
    places, donors = places.absolute(), tuple(Folder(uri).uri for uri in base.train.init)
    base = replace(base, train=replace(base.train, init=donors))
    workers = TrainWorkers.on_cluster(places.compute)
    output, variants = Folder(output_uri), [suited(variant) for variant in variants_of(base, config)]
    for variant in variants:
        check_stages(variant.experiment.model, variant.experiment.train)
    require_same_data(output, places, donors, workers)
    experiments = {
        seeded.name(): seeded
        for variant in variants
        for seeded in of_all_seeds(variant.experiment, config.seeds)
    }
    side_by_side = min(config.side_by_side, workers.groups)
    results = dict(run_all(experiments, places, output / "runs", side_by_side, progress=progress))
    rows = [summarise(variant, config.seeds, results) for variant in variants]
    output.publish("ablation.csv", as_csv(rows).encode())
    output.publish("ablation.md", as_markdown(rows).encode())
    output.publish("ablation.png", as_plot(rows))
    return rows


def require_same_data(output: Folder, places: Places, donors: Sequence[str], workers: TrainWorkers) -> None:
    """Keep apart results of other rows, donors and workers, which the names of the runs do not tell apart.

    Raises:
        OutputError: the output's runs had others; says which.
    """
    uris = {"--data": places.data_uri, "--val": places.val_uri, "--unlabeled": places.unlabeled_uri}
    seen = {
        name: fingerprint(Rows.find(uri, places.columns, needs=("image", "caption")).identity())
        for name, uri in uris.items()
        if uri is not None
    }
    seen |= {f"--init {uri}": Bundle.load(uri).fingerprint for uri in donors}
    columns = places.columns
    seen["columns"] = fingerprint([columns.image, columns.caption, columns.labels])
    seen["--num-workers"] = str(workers.scaling.maximum)
    seen["--use-gpu"] = str(workers.use_gpu)
    seen["version"] = VERSION
    known = output.read_json(DATA) or {}
    if known and known.get("version") != VERSION:
        raise OutputError(f"{output} was measured by another version of mmray; choose another --output")
    if found := [name for name in seen if known.get(name, seen[name]) != seen[name]]:
        raise OutputError(f"{output} is an ablation of other {', '.join(found)}; choose another --output")
    output.publish_json(DATA, known | seen)


def run_all(
    experiments: dict[str, Experiment], places: Places, runs: Folder, side_by_side: int, *, progress: bool
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run experiments, so many at a time; gives each one's name and result as it is done."""
    task = ray.remote(num_cpus=0, max_retries=2)(run)
    waiting, running = list(experiments.items()), dict[ray.ObjectRef, str]()
    with Progress("ablate", len(experiments), "runs") if progress else nullcontext() as bar:
        for done in range(1, len(experiments) + 1):
            while waiting and len(running) < side_by_side:
                name, experiment = waiting.pop(0)
                running[task.remote(experiment, places, runs / name)] = name
            (ready,), _ = ray.wait(list(running))
            yield running.pop(ready), ray.get(ready)
            if bar:
                bar.update(done)


def summarise(variant: Variant, num_seeds: int, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Sum up what a variant gave over its seeds: a row of `ablation.csv`."""
    found = [results[each.name()] for each in of_all_seeds(variant.experiment, num_seeds)]
    row: dict[str, Any] = {"axis": variant.axis, "value": variant.value, "seeds": num_seeds}
    for name in METRICS:
        numbers = [result[variant.reading][name] for result in found]
        row[name] = statistics.fmean(numbers)
        row[f"{name}_std"] = statistics.stdev(numbers) if num_seeds > 1 else 0.0
    return row | {"seconds": statistics.fmean(result["seconds"] for result in found)}


def as_csv(rows: list[dict[str, Any]]) -> str:
    """Write rows as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_markdown(rows: list[dict[str, Any]]) -> str:
    """Write rows as a Markdown table of mean ± standard deviation."""
    lines = [f"| axis | value | {' | '.join(TITLES.values())} | s |", f"|---|---|{'---|' * len(METRICS)}---|"]
    for row in rows:
        cells = [f"{row[name]:.4f} ± {row[f'{name}_std']:.4f}" for name in METRICS]
        lines.append(f"| {row['axis']} | {row['value']} | {' | '.join(cells)} | {row['seconds']:.0f} |")
    return "\n".join([*lines, ""])


def as_plot(rows: list[dict[str, Any]]) -> bytes:
    """Draw rows: a PNG with sample F1 and mAP of each variant, and their standard deviations."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1 + 0.3 * len(rows)), layout="constrained")
    names = [f"{row['axis']}: {row['value']}" for row in rows]
    for axes, metric in zip(figure.subplots(1, 2, sharey=True), ("sample_f1", "map"), strict=True):
        axes.errorbar(
            [row[metric] for row in rows],
            range(len(rows)),
            xerr=[row[f"{metric}_std"] for row in rows],
            fmt="o",
        )
        axes.set_yticks(range(len(rows)), names)
        axes.set_xlabel(TITLES[metric])
        axes.grid(axis="x")
    figure.axes[0].invert_yaxis()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    return image.getvalue()
