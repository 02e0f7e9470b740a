"""Whether an output holds what a recipe asks for: done, begun, or another's."""

import json
from dataclasses import asdict

import pytest

from mmray.config import ModelConfig, TrainConfig
from mmray.errors import OutputError
from mmray.start import RECIPE, is_finished
from mmray.storage import Folder


def recipe(**changes):
    train = asdict(TrainConfig(**changes)) | {"init": {}}
    settings = {"columns": {"image": "image"}, "model": asdict(ModelConfig()), "train": train}
    return json.loads(json.dumps({"data": "a", "val": "b"} | settings))


@pytest.fixture
def output(tmp_path):
    return Folder(str(tmp_path))


def test_an_output_is_finished_when_its_bundle_is_whole(output):
    assert not is_finished(output, recipe())
    output.publish_json(RECIPE, recipe())
    assert not is_finished(output, recipe())
    output.publish_json("config.json", {})
    assert is_finished(output, recipe())


def test_a_bundle_of_unknown_origin_is_left_alone(output):
    output.publish_json("config.json", {})
    with pytest.raises(OutputError, match="unknown origin"):
        is_finished(output, recipe())


def test_another_recipe_is_named_by_what_differs(output):
    output.publish_json(RECIPE, recipe())
    with pytest.raises(OutputError, match=r"train\.epochs: 10 -> 3"):
        is_finished(output, recipe(epochs=3))


def test_an_option_that_came_later_was_off_in_runs_begun_before(output):
    known = recipe()
    del known["train"]["freeze"], known["train"]["word_weight"]
    known["columns"]["id"] = "image_id"  # an option that is none of training's any more
    output.publish_json(RECIPE, known)
    assert not is_finished(output, recipe())
    with pytest.raises(OutputError, match=r"train\.freeze: \[\] -> \['image'\]"):
        is_finished(output, recipe(freeze=("image",)))
