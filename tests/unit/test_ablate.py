"""Ablation: which variants there are, which of them share a run, and how results are summed up."""

import csv
import io
import statistics
from dataclasses import asdict, replace

import pytest
from PIL import Image

from mmray.ablate import METRICS, Places, ablate, as_csv, as_markdown, as_plot, longer, summarise
from mmray.config import AXES, AblationConfig, Columns, ComputeConfig, ModelConfig, TrainConfig
from mmray.errors import ConfigError
from mmray.fingerprints import differences
from mmray.variants import Experiment, of_all_seeds, variants_of

BASE = Experiment(ModelConfig(pretrained=False), TrainConfig(ema_decay=0.99, modality_dropout=0.2, seed=5))
EVERYTHING = AblationConfig(axes=AXES, seeds=2)


def test_a_variant_differs_from_the_base_in_its_axis_alone():
    fields = {"modality-dropout": "modality_dropout", "ema": "ema_decay", "backbone": "vision"}
    for variant in variants_of(BASE, EVERYTHING):
        found = differences(asdict(BASE), asdict(variant.experiment))
        assert len(found) <= 1
        if found and variant.axis != "self-training":
            assert found[0].split(":")[0].split(".")[1] == fields.get(variant.axis, variant.axis)


@pytest.mark.parametrize("axis", AXES)
def test_each_axis_has_its_variants_and_the_base_among_them(axis):
    config = AblationConfig(axes=(axis,), backbones=("test_vit", BASE.model.vision))
    variants = list(variants_of(BASE, config))
    assert {variant.axis for variant in variants} == {axis}
    assert len({variant.value for variant in variants}) == len(variants) >= 2
    names = {variant.experiment.name() for variant in variants}
    assert (BASE.name() in names) == (axis != "self-training")


def test_what_a_model_of_one_tower_cannot_be_asked_is_left_out():
    base = replace(BASE, model=replace(BASE.model, fusion="text"))
    readings = {variant.reading for variant in variants_of(base, EVERYTHING)}
    assert not readings & {"no image", "no caption"}
    assert "no image" in {variant.reading for variant in variants_of(BASE, EVERYTHING)}


def test_a_model_of_images_alone_has_no_members_beside_those_that_do():
    base = replace(BASE, model=replace(BASE.model, members=3, ngrams=True))
    variants = variants_of(base, AblationConfig(axes=("fusion",)))
    models = {variant.value: variant.experiment.model for variant in variants}
    members = {fusion: (model.members, model.ngrams) for fusion, model in models.items()}
    others = ("text", "logits", "concat", "cross-attention")
    assert members == {"image": (1, False)} | dict.fromkeys(others, (3, True))


def test_experiments_that_are_equal_share_a_run_and_seeds_do_not():
    names = [
        seeded.name() for each in variants_of(BASE, EVERYTHING) for seeded in of_all_seeds(each.experiment, 2)
    ]
    base = [each.name() for each in of_all_seeds(BASE, 2)]
    assert len(set(base)) == 2
    assert all(names.count(name) > 5 for name in base)
    assert [each.train.seed for each in of_all_seeds(BASE, 3)] == [5, 6, 7]


def results_of(variants):
    """Give results such that each seed and reading has numbers of its own."""
    results = {}
    for variant in variants:
        for seed, each in enumerate(of_all_seeds(variant.experiment, 3)):
            readings = ("0.5", "single", "per-label", "uncalibrated", "no image", "no caption", "teacher")
            readings += ("whole", "more steps")
            results[each.name()] = {
                reading: {name: (seed**2 + place + at) / 20 for at, name in enumerate(METRICS)}
                for place, reading in enumerate(readings)
            } | {"seconds": 60.0 * (seed + 1)}
    return results


def test_a_row_is_mean_and_standard_deviation_over_the_seeds():
    variants = list(variants_of(BASE, EVERYTHING))
    variant = next(each for each in variants if each.value == "0.2, no image")
    row = summarise(variant, 3, results_of(variants))
    numbers = [(seed**2 + 4 + 1) / 20 for seed in range(3)]
    assert (row["axis"], row["value"], row["seeds"]) == ("modality-dropout", "0.2, no image", 3)
    assert row["map"] == pytest.approx(statistics.fmean(numbers))
    assert row["map_std"] == pytest.approx(statistics.stdev(numbers))
    assert row["seconds"] == 120


def test_rows_are_written_as_csv_markdown_and_a_picture():
    variants = list(variants_of(BASE, EVERYTHING))
    rows = [summarise(variant, 3, results_of(variants)) for variant in variants]
    read = list(csv.DictReader(io.StringIO(as_csv(rows))))
    assert [float(row["sample_f1"]) for row in read] == [row["sample_f1"] for row in rows]
    lines = as_markdown(rows).splitlines()
    assert len(lines) == 2 + len(rows)
    assert len({line.count("|") for line in lines}) == 1
    assert f"{rows[0]['sample_f1']:.4f} ± {rows[0]['sample_f1_std']:.4f}" in lines[2]
    picture = Image.open(io.BytesIO(as_plot(rows)))
    assert picture.format == "PNG" and picture.width > 600


@pytest.mark.parametrize(
    ("more", "epochs", "patience", "warmup"), [(6.5, 78, 32, 6.5), (1e6, 10_000, 10_000, 1e4)]
)
def test_a_teacher_for_as_many_steps_has_a_recipe_that_may_be(more, epochs, patience, warmup):
    settings = longer(TrainConfig(epochs=12, patience=5, warmup_epochs=1.0), more)
    assert (settings.epochs, settings.patience, settings.warmup_epochs) == (epochs, patience, warmup)


def test_self_training_without_unlabeled_rows_is_refused(tmp_path):
    places = Places("train", "val", None, Columns(), ComputeConfig())
    with pytest.raises(ConfigError, match="--unlabeled"):
        ablate(BASE, AblationConfig(axes=("self-training",)), places, str(tmp_path))


def test_an_axis_that_there_is_not_is_refused_by_name():
    with pytest.raises(ConfigError, match="--axis 'colour'"):
        AblationConfig(axes=("colour",))
