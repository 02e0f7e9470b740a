"""Recipes that are a stage of training: typed as the options are, found beside the recipe that names them."""

from pathlib import Path

import pytest

from mmray.config import ModelConfig, TrainConfig
from mmray.errors import ConfigError
from mmray.recipes import is_recipe, read_recipe, read_stage
from mmray.warm_start import check_stages

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
        ("seed: 1", "seed"),
        ("epochs: [1, 2]", "epochs must be one value"),
        ("init: [[a]]", "init must be one value"),
        ("image-size: 1", r"stage\.yaml: --image-size 1"),
        ("epochs: many", "many"),
        ("fusion: sum", "--fusion 'sum'"),
        ("- a\n- b", "not a mapping of options to values"),
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
    assert read_recipe(recipe("init: ~")) == {}
    assert read_recipe(recipe("init: s3://bucket/first.yaml"))["init"] == ["s3://bucket/first.yaml"]


def test_stages_are_held_before_the_first_is_trained(recipe):
    """A tower that does not fit, a stage that names itself."""
    train = TrainConfig(init=(recipe("fusion: image\nvision: resnet18\n"),))
    with pytest.raises(ConfigError, match="has the tower resnet18, not resnet34"):
        check_stages(ModelConfig(vision="resnet34"), train)
    check_stages(ModelConfig(vision="resnet18"), train)
    train = TrainConfig(init=(recipe("fusion: text\nmembers: 2\n"),))
    with pytest.raises(ConfigError, match="has 2 caption towers; use --members 2"):
        check_stages(ModelConfig(vision="resnet18"), train)
    recipe("fusion: image\nvision: resnet18\ninit: stage.yaml\n")
    train = TrainConfig(init=(recipe("fusion: image\nvision: resnet18\ninit: stage.yaml\n"),))
    with pytest.raises(ConfigError, match="'stage' comes before it already"):
        check_stages(ModelConfig(vision="resnet18"), train)


def test_every_stage_that_comes_with_mmray_can_be_read():
    read, waiting = set(), [str(RECIPES / "coco18.yaml")]
    while waiting:
        starts = [start for start in read_recipe(waiting.pop()).get("init", []) if is_recipe(start)]
        for start in starts:
            read_stage(start)
        read.update(map(Path, starts))
        waiting += starts
    assert read == set(RECIPES.glob("coco18-image-*.yaml"))
