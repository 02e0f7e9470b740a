"""Recipes that are a stage of training: typed as the options are, found beside the recipe that names them."""

from pathlib import Path

import pytest

from mmray.config import ModelConfig, TrainConfig
from mmray.errors import ConfigError
from mmray.recipes import is_recipe, read_recipe, read_stage

RECIPES = Path(__file__).parents[2] / "jobs" / "recipes"


@pytest.fixture
def recipe(tmp_path):
    def write(text):
        (tmp_path / "stage.yaml").write_text(text)
        return str(tmp_path / "stage.yaml")

    return write


def test_a_stage_has_the_types_of_the_options(recipe):
    model, train = read_stage(
        recipe("fusion: image\nimage-size: 64\npretrained: false\nepochs: 3\nlearning_rate: 2.0e-3\n")
    )
    assert model == ModelConfig(fusion="image", image_size=64, pretrained=False)
    assert train == TrainConfig(epochs=3, learning_rate=2e-3)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("num-workers: 2", "num_workers"),
        ("epochs: many", "many"),
        ("fusion: sum", "--fusion 'sum'"),
        ("- a\n- b", "no option: value pairs"),
        ("a: [", "not YAML"),
    ],
)
def test_a_stage_that_cannot_be_meant_is_refused(recipe, text, named):
    with pytest.raises(ConfigError, match=named):
        read_stage(recipe(text))


def test_a_stage_that_is_not_there_is_refused_by_path(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        read_stage(str(tmp_path / "none.yaml"))


def test_stages_are_found_beside_the_recipe_that_names_them_and_bundles_where_they_are(recipe):
    (stage, bundle) = read_recipe(recipe("init: [other.yaml, models/first]"))["init"]
    assert stage == str(Path(recipe("")).parent / "other.yaml")
    assert bundle == "models/first"
    assert read_recipe(recipe("init: other.yaml"))["init"] == [stage]


def test_every_stage_that_comes_with_mmray_can_be_read():
    read, waiting = set(), [str(RECIPES / "coco18.yaml")]
    while waiting:
        starts = [start for start in read_recipe(waiting.pop()).get("init", []) if is_recipe(start)]
        for start in starts:
            read_stage(start)
        read.update(map(Path, starts))
        waiting += starts
    assert read == set(RECIPES.glob("coco18-image-*.yaml"))
