"""Settings: refused where they are made, summed up and compared."""

import json
import math
from dataclasses import asdict, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmray.config import (
    Columns,
    ComputeConfig,
    LabelConfig,
    ModelConfig,
    ScoringConfig,
    TrainConfig,
    Workers,
)
from mmray.errors import ConfigError
from mmray.fingerprints import differences, fingerprint
from mmray.options import from_json, make

light = settings(deadline=None, max_examples=100)

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4)
RECORDS = st.dictionaries(
    st.text(max_size=3),
    SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(st.text(max_size=3), SCALARS),
)


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (ModelConfig, "fusion", "early"),
        (ModelConfig, "image_size", 0),
        (ModelConfig, "max_tokens", 1),
        (ModelConfig, "width", 0),
        (ModelConfig, "width", -4),
        (ModelConfig, "width", 255),
        (ModelConfig, "num_heads", 0),
        (ModelConfig, "num_heads", -1),
        (ModelConfig, "dropout", 1.0),
        (ModelConfig, "dropout", math.nan),
        (TrainConfig, "loss", "hinge"),
        (TrainConfig, "epochs", 0),
        (TrainConfig, "batch_size_per_worker", 0),
        (TrainConfig, "learning_rate", 0.0),
        (TrainConfig, "learning_rate", math.inf),
        (TrainConfig, "weight_decay", -0.1),
        (TrainConfig, "warmup_epochs", -1.0),
        (TrainConfig, "clip_norm", 0.0),
        (TrainConfig, "ema_decay", 1.0),
        (TrainConfig, "patience", 0),
        (TrainConfig, "crop", 0.0),
        (TrainConfig, "colour", 1.5),
        (TrainConfig, "modality_dropout", 0.6),
        (TrainConfig, "seed", -1),
        (ComputeConfig, "num_workers", "many"),
        (ScoringConfig, "batch_size", 0),
        (LabelConfig, "batch_size", 0),
        (LabelConfig, "max_failed_fraction", 1.5),
        (LabelConfig, "scores", "some"),
        (LabelConfig, "limit", 0),
    ],
)
def test_a_value_that_cannot_work_is_refused_by_option_and_value(kind, field, value):
    with pytest.raises(ConfigError) as caught:
        kind(**{field: value})
    message = str(caught.value)
    assert "--" + field.replace("_", "-") in message and str(value) in message
    assert "\n" not in message


@pytest.mark.parametrize("setting", [{"members": 2}, {"ngrams": True}])
def test_what_reads_captions_is_refused_beside_a_model_of_images_alone(setting):
    (name,) = setting
    with pytest.raises(ConfigError, match=rf"--{name} .* --fusion image"):
        ModelConfig(fusion="image", **setting)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"freeze": ("vision",)}, "--freeze 'vision' is none of image, caption"),
        ({"freeze": ("image",), "word_weight": 0.5}, "--word-weight .* --freeze image"),
    ],
)
def test_towers_that_cannot_be_frozen_are_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        TrainConfig(**changes)


@pytest.mark.parametrize(
    ("text", "minimum", "maximum"), [("3", 3, 3), (3, 3, 3), ("1:4", 1, 4), ("2:2", 2, 2)]
)
def test_workers_are_a_number_or_a_range(text, minimum, maximum):
    assert Workers.parse(text) == Workers(minimum, maximum)


@pytest.mark.parametrize("text", ["", "0", "-1", "2:", ":2", "3:2", "0:2", "1:2:3", "two", "1.5", "²", 0])
def test_what_is_neither_a_number_nor_a_range_of_workers_is_refused(text):
    with pytest.raises(ConfigError, match="--num-workers") as caught:
        Workers.parse(text)
    assert repr(text) in str(caught.value)


def test_a_config_takes_its_own_fields_out_of_all_settings():
    settings = {"epochs": 3, "fusion": "image", "image": "jpg"}
    assert make(TrainConfig, settings) == TrainConfig(epochs=3)
    assert make(ModelConfig, settings) == ModelConfig(fusion="image")
    assert make(Columns, settings).image == "jpg"


@pytest.mark.parametrize(
    "config", [ModelConfig(width=64), TrainConfig(epochs=2), Columns(id="key"), LabelConfig(limit=5)]
)
def test_a_config_survives_the_way_through_json(config):
    assert from_json(type(config), json.loads(json.dumps(asdict(config))), "here") == config


def test_an_unknown_key_is_refused_by_name_and_place():
    with pytest.raises(ConfigError, match=r"config\.json.*depth, height"):
        from_json(ModelConfig, asdict(ModelConfig()) | {"height": 1, "depth": 2}, "config.json")


def test_a_fingerprint_is_the_same_on_every_machine():
    assert fingerprint({"labels": [1, 2], "name": "ü", "rate": 0.1, "none": None}) == "984b4ba4fb8ccc8c"


@light
@given(RECORDS, st.randoms())
def test_a_fingerprint_does_not_depend_on_the_order_of_keys(record, random):
    keys = list(record)
    random.shuffle(keys)
    assert fingerprint({key: record[key] for key in keys}) == fingerprint(record)
    assert fingerprint(json.loads(json.dumps(record))) == fingerprint(record)


@light
@given(RECORDS, RECORDS)
def test_fingerprints_differ_where_records_do(one, other):
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (fingerprint(one) == fingerprint(other)) == same


def test_every_field_counts_in_a_fingerprint():
    base = ModelConfig()
    others = [replace(base, width=128), replace(base, vision="resnet18"), replace(base, pretrained=False)]
    assert len({fingerprint(asdict(config)) for config in [base, *others]}) == 4


def test_differences_name_the_key_and_both_values():
    old = {"model": {"width": 8, "vision": "a"}, "scores": "all", "gone": 1, "same": [1, 2]}
    new = {"model": {"width": 16, "vision": "a"}, "scores": "none", "come": {"x": 1}, "same": [1, 2]}
    assert differences(old, new) == [
        "come: None -> {'x': 1}",
        "gone: 1 -> None",
        "model.width: 8 -> 16",
        "scores: 'all' -> 'none'",
    ]


@light
@given(RECORDS)
def test_a_record_does_not_differ_from_itself(record):
    assert differences(record, json.loads(json.dumps(record))) == []
