"""What an ablation trains: one part of a recipe changed at a time, over several seeds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

from mmray.bundle import Bundle
from mmray.config import (
    FUSIONS,
    LOSSES,
    SELECTIONS,
    TOWERS,
    AblationConfig,
    ModelConfig,
    SelfTrainConfig,
    TrainConfig,
    towers_of,
)
from mmray.fingerprints import fingerprint


@dataclass(frozen=True)
class Experiment:
    """What is trained, and how."""

    model: ModelConfig
    train: TrainConfig
    self_train: SelfTrainConfig | None = None

    def name(self) -> str:
        """Name its folder: equal experiments, whatever axis they stand on, share a run."""
        record = asdict(self) | {"model": self.model.record()}
        return f"{self.model.fusion}-{self.train.loss}-{self.train.seed}-{fingerprint(record)}"


class Variant(NamedTuple):
    """One value of an axis."""

    axis: str
    value: str
    experiment: Experiment
    reading: str = "whole"
    """What of its result counts; see `run`."""


def variants_of(base: Experiment, config: AblationConfig) -> Iterator[Variant]:
    """Give the variants of each axis: the base, but for one part."""
    model, train = base.model, base.train
    if "fusion" in config.axes:
        for fusion in FUSIONS:
            reads = "caption" in towers_of(fusion)
            members, ngrams = (model.members, model.ngrams) if reads else (1, False)
            fused = replace(model, fusion=fusion, members=members, ngrams=ngrams)
            yield Variant("fusion", fusion, replace(base, model=fused))
    if "loss" in config.axes:
        for loss in LOSSES:
            yield Variant("loss", loss, replace(base, train=replace(train, loss=loss)))
    if "backbone" in config.axes:
        for backbone in config.backbones:
            yield Variant("backbone", backbone, replace(base, model=replace(model, vision=backbone)))
    if "ema" in config.axes:
        for decay in sorted({0.0, train.ema_decay}):
            value = "on" if decay else "off"
            yield Variant("ema", value, replace(base, train=replace(train, ema_decay=decay)))
    if "modality-dropout" in config.axes:
        for share in sorted({0.0, train.modality_dropout}):
            changed = replace(base, train=replace(train, modality_dropout=share))
            value = f"{share:g}" if share else "off"
            yield Variant("modality-dropout", value, changed)
            for hidden in TOWERS if len(model.towers) > 1 else ():
                yield Variant("modality-dropout", f"{value}, no {hidden}", changed, f"no {hidden}")
    if "self-training" in config.axes:
        for selection in SELECTIONS:
            student = replace(base, self_train=SelfTrainConfig(select=selection))
            yield Variant("self-training", f"{selection}, its teacher", student, "teacher")
            yield Variant(
                "self-training", f"{selection}, its teacher for as many steps", student, "more steps"
            )
            yield Variant("self-training", selection, student)
    for axis, readings in {
        "decision": ("0.5", "single", "per-label"),
        "calibration": ("uncalibrated", "per-label"),
    }.items():
        if axis in config.axes:
            for reading in readings:
                value = "on" if axis == "calibration" and reading == "per-label" else reading
                yield Variant(axis, value, base, reading)


def suited(variant: Variant) -> Variant:
    """Leave out of a variant's start what its fusion has no tower for."""
    train, towers = variant.experiment.train, variant.experiment.model.towers
    init = tuple(uri for uri in train.init if {*Bundle.load(uri).model_config.towers} & {*towers})
    freeze = tuple(tower for tower in train.freeze if tower in towers)
    experiment = replace(variant.experiment, train=replace(train, init=init, freeze=freeze))
    return variant._replace(experiment=experiment)


def of_all_seeds(experiment: Experiment, num_seeds: int) -> list[Experiment]:
    """Give an experiment with its own seed and those that follow."""
    train = experiment.train
    return [replace(experiment, train=replace(train, seed=train.seed + place)) for place in range(num_seeds)]
