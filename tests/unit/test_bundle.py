"""A bundle on disk: round trip, fingerprint, damage."""

import json
import pickletools
from dataclasses import replace

import numpy as np
import pytest
import torch

from mmray.bundle import Bundle, save_bundle, tokenizer_files
from mmray.captions import tokenize, train_tokenizer
from mmray.config import ModelConfig
from mmray.decisions import Calibration
from mmray.errors import BundleError
from mmray.labeler import make_inputs
from mmray.model import build_model
from mmray.schema import Vocabulary
from mmray.storage import Folder
from mmray.towers import describe_encoder

CONFIG = ModelConfig(
    vision="test_efficientnet", image_size=32, max_tokens=12, width=16, num_heads=2, pretrained=False
)
CAPTIONS = ["a dog on the grass", "a cat on a red car", "the bus waits"]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def parts():
    """Give what a bundle is made of."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(CAPTIONS * 2)
    text_config = describe_encoder(CONFIG, len(tokenizer))
    model = build_model(CONFIG, 3, text_config)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):  # as if it had trained
            buffer.normal_(std=0.1)
    return {
        "model_config": CONFIG,
        "text_config": text_config,
        "vocabulary": Vocabulary(("bus", "cat", "dog")),
        "thresholds": np.array([0.5, 0.1, 1 / 3]),
        "calibration": Calibration(np.array([1.5, 1.0, 1 / 3]), np.array([0.0, -0.1, 2.0])),
        "tokenizer_files": tokenizer_files(tokenizer),
        "weights": model.state_dict(),
        "metrics": {"sample_f1": 0.5},
        "card": "# A bundle\n",
    }


@pytest.fixture
def folder(tmp_path):
    return Folder(str(tmp_path / "bundle"))


def scores_of(model, tokenizer):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    ids = tokenize(tokenizer, ["a dog on a car", "bus"], CONFIG.max_tokens)
    with torch.inference_mode():
        return model(make_inputs(list(pixels), *ids, has_caption=[True, True], size_px=32)).sigmoid()


def test_a_loaded_bundle_scores_as_what_was_saved(folder, parts):
    saved = save_bundle(folder, **parts)
    model = build_model(CONFIG, 3, parts["text_config"]).eval()
    model.load_state_dict(parts["weights"])
    loaded = Bundle.load(folder.uri)
    assert loaded.fingerprint == saved.fingerprint
    scores = scores_of(loaded.model(), loaded.tokenizer())
    assert torch.equal(scores, scores_of(model, saved.tokenizer()))
    assert scores.std() > 0
    assert loaded.vocabulary == parts["vocabulary"]
    assert loaded.thresholds.tolist() == parts["thresholds"].tolist()
    assert loaded.calibration.scales.tolist() == parts["calibration"].scales.tolist()
    assert loaded.calibration.offsets.tolist() == parts["calibration"].offsets.tolist()


def test_a_bundle_never_fetches_what_it_holds(folder, parts):
    settings = {**parts, "model_config": replace(CONFIG, pretrained=True)}
    assert not save_bundle(folder, **settings).model_config.pretrained


def test_labels_keep_their_type(folder, parts):
    bundle = save_bundle(folder, **{**parts, "vocabulary": Vocabulary((1, 2, 13))})
    assert bundle.vocabulary.labels == (1, 2, 13)


def changed_weights(parts):
    name = "head.head.layers.2.bias"
    return {**parts["weights"], name: parts["weights"][name] + 1e-6}


CHANGES = {
    "thresholds": lambda parts: np.array([0.5, 0.1, 0.34]),
    "calibration": lambda parts: Calibration(np.array([1.5, 1.0, 1 / 3]), np.array([0.0, -0.1, 2.1])),
    "weights": changed_weights,
    "vocabulary": lambda parts: Vocabulary(("bus", "cat", "dogs")),
    "tokenizer_files": lambda parts: tokenizer_files(train_tokenizer(["other words"] * 2)),
    "model_config": lambda parts: replace(CONFIG, max_tokens=11),
    "text_config": lambda parts: {**parts["text_config"], "hidden_act": "relu"},
}


@pytest.mark.parametrize("part", CHANGES)
def test_a_fingerprint_changes_with_everything_that_a_prediction_depends_on(folder, parts, part):
    before = save_bundle(folder, **parts).fingerprint
    assert save_bundle(folder, **parts).fingerprint == before
    assert save_bundle(folder, **{**parts, part: CHANGES[part](parts)}).fingerprint != before


def test_a_fingerprint_does_not_change_with_place_metrics_or_card(folder, parts):
    before = save_bundle(folder, **parts).fingerprint
    elsewhere = Folder(f"{folder.uri}-2")
    assert save_bundle(elsewhere, **{**parts, "metrics": {}, "card": "other"}).fingerprint == before


def test_a_bundle_holds_no_pickle(folder, parts):
    save_bundle(folder, **parts)
    assert set(folder.list()) == {
        *("README.md", "config.json", "labels.json", "metrics.json", "model.safetensors", "thresholds.json"),
        *(f"tokenizer/{name}" for name in parts["tokenizer_files"]),
    }
    for path in folder.list():
        assert path.endswith((".json", ".safetensors", ".md"))
        assert not folder.read(path).startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04", b"\x80\x05"))
        with pytest.raises(Exception):  # noqa: B017 - whatever makes it no pickle
            list(pickletools.genops(folder.read(path)))


def refusal(folder):
    with pytest.raises(BundleError) as caught:
        Bundle.load(folder.uri).model()
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and folder.uri in message
    return message


def edit(folder, name, **changes):
    record = folder.read_json(name) | changes
    folder.publish_json(name, {key: value for key, value in record.items() if value is not None})


@pytest.mark.parametrize(
    "name", ["config.json", "labels.json", "thresholds.json", "model.safetensors", "tokenizer/tokenizer.json"]
)
def test_a_bundle_with_a_file_missing_is_refused_by_its_name(folder, parts, name):
    save_bundle(folder, **parts)
    folder.remove([name])
    assert name in refusal(folder)


@pytest.mark.parametrize(
    "name", ["config.json", "labels.json", "thresholds.json", "model.safetensors", "tokenizer/tokenizer.json"]
)
@pytest.mark.parametrize("damage", ["cut", "emptied", "changed"])
def test_a_damaged_bundle_is_refused(folder, parts, name, damage):
    save_bundle(folder, **parts)
    data = folder.read(name)
    middle = len(data) // 2
    changed = data[:middle] + bytes([data[middle] ^ 0x80]) + data[middle + 1 :]
    folder.publish(name, {"cut": data[:middle], "emptied": b"", "changed": changed}[damage])
    assert name in refusal(folder)


def test_nothing_at_all_is_no_bundle(folder):
    assert "train.py" in refusal(folder)


def test_another_schema_version_is_refused_with_both(folder, parts):
    save_bundle(folder, **parts)
    edit(folder, "config.json", schema_version=99)
    assert "99" in refusal(folder) and "reads 2" in refusal(folder)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("config.json", {"precision": "int4"}),
        ("config.json", {"sums": None}),
        ("config.json", {"schema_version": None}),
        ("config.json", {"model": {"vision": "test_efficientnet", "depth": 7}}),
        ("config.json", {"model": {"fusion": "early"}}),
        ("config.json", {"model": {"image_size": "big"}}),
        ("config.json", {"model": ["fusion", "image"]}),
        ("config.json", {"sums": ["model.safetensors"]}),
        ("config.json", {"model": {"vision": "hf-hub:somebody/model", "pretrained": False}}),
        ("config.json", {"model": {"vision": "local-dir:/etc", "pretrained": False}}),
        ("config.json", {"model": {"vision": "test_efficientnet", "pretrained": True}}),
        ("config.json", {"sums": {"tokenizer/../../secret": "0"}}),
        ("config.json", {"sums": {"tokenizer/tokenization.py": "0"}}),
        ("config.json", {"sums": {"tokenizer/vocabulary.pkl": "0"}}),
        ("labels.json", {"order": [0, 1, 2]}),
        ("labels.json", {"labels": ["dog", "cat", "bus"]}),
        ("labels.json", {"labels": ["bus", "cat", 3]}),
        ("labels.json", {"labels": []}),
        ("labels.json", {"labels": 3}),
        ("labels.json", {"labels": ["bus", "cat"]}),
        ("thresholds.json", {"fallback": True}),
        ("thresholds.json", {"thresholds": [0.5, 0.5]}),
        ("thresholds.json", {"thresholds": [0.5] * 4}),
        ("thresholds.json", {"thresholds": 0.5}),
        ("thresholds.json", {"scales": [1, 1]}),
        ("thresholds.json", {"offsets": ["half", 0, 0]}),
        ("thresholds.json", {"thresholds": [0.5, "half", 0.5]}),
        ("thresholds.json", {"thresholds": [[0.5], [0.5], [0.5]]}),
    ],
)
def test_a_bundle_that_means_something_else_is_refused(folder, parts, name, changes):
    save_bundle(folder, **parts)
    edit(folder, name, **changes)
    assert refusal(folder)


def test_a_file_that_holds_no_record_is_refused(folder, parts):
    save_bundle(folder, **parts)
    folder.publish("labels.json", json.dumps(["bus"]).encode())
    assert "labels.json" in refusal(folder)


def test_weights_of_another_model_are_refused(folder, parts):
    weights = {name: tensor for name, tensor in parts["weights"].items() if "head" not in name}
    save_bundle(folder, **{**parts, "weights": weights})
    assert "another model" in refusal(folder)
