"""Learning that starts from earlier bundles takes their parts, and says what does not fit."""

from dataclasses import replace

import pytest
import torch

from mmray.bundle import Bundle
from mmray.config import FUSIONS, AblationConfig, TrainConfig
from mmray.errors import ConfigError
from mmray.model import build_model
from mmray.schema import Vocabulary
from mmray.variants import Experiment, suited, variants_of
from mmray.warm_start import check_frozen, check_stages, find_donors, take_over, without_other_labels

LABELS = ("circle", "square", "triangle")


@pytest.fixture(scope="module")
def bundles(make_bundle, tmp_path_factory):
    """Give a bundle of each of some fusions, and its config."""
    folder = tmp_path_factory.mktemp("donors")
    return {
        fusion: make_bundle(folder / fusion, LABELS, fusion=fusion) for fusion in ("image", "text", "logits")
    }


def config_of(uri, **changes):
    return replace(Bundle.load(uri).model_config, **changes)


def fresh(config, donors):
    torch.manual_seed(1)
    text_config = donors["caption"].text_config if "caption" in donors else {}
    return build_model(config, len(LABELS), text_config, donors)


def same(part, other):
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in part.state_dict().items())


def test_towers_come_from_the_last_bundle_that_has_them_and_the_head_stays_new(bundles):
    config = config_of(bundles["logits"], fusion="cross-attention")
    donors = find_donors(config, [bundles["logits"], bundles["image"], bundles["text"]])
    assert {part: bundle.folder.uri for part, bundle in donors.items()} == {
        "image": bundles["image"],
        "caption": bundles["text"],
    }
    model, untouched = fresh(config, donors), fresh(config, donors)
    take_over(model, without_other_labels(donors, Vocabulary(LABELS)))
    assert same(model.image, donors["image"].model().image)
    assert same(model.caption, donors["caption"].model().caption)
    assert same(model.head, untouched.head)


def test_the_same_model_takes_everything_over(bundles):
    config = config_of(bundles["logits"])
    donors = find_donors(config, [bundles["logits"]])
    model = fresh(config, donors)
    take_over(model, without_other_labels(donors, Vocabulary(LABELS)))
    assert same(model, Bundle.load(bundles["logits"]).model())


def test_a_head_of_other_labels_is_not_taken(bundles):
    config = config_of(bundles["logits"])
    donors = find_donors(config, [bundles["logits"]])
    model, untouched = fresh(config, donors), fresh(config, donors)
    take_over(model, without_other_labels(donors, Vocabulary(("a", "b", "c"))))
    assert same(model.head, untouched.head) and same(model.image, donors["image"].model().image)


def test_what_learns_from_captions_alone_takes_no_image_tower(bundles):
    assert set(find_donors(config_of(bundles["text"]), [bundles["logits"]])) == {"caption"}


@pytest.mark.parametrize(
    ("donor", "changes", "words"),
    [
        ("image", {"vision": "resnet18"}, ["test_efficientnet", "resnet18", "--vision test_efficientnet"]),
        ("logits", {"text": "other/encoder"}, ["bert_uncased_L-1_H-32_A-2", "--text"]),
        ("image", {"fusion": "text"}, ["no tower that --fusion text uses"]),
    ],
)
def test_what_does_not_fit_is_named(bundles, donor, changes, words):
    config = config_of(bundles[donor], **changes)
    with pytest.raises(ConfigError) as refusal:
        find_donors(config, [bundles[donor]])
    assert all(word in str(refusal.value) for word in [*words, bundles[donor]])


def test_nothing_is_fetched_for_parts_that_are_given(bundles):
    config = config_of(bundles["logits"], pretrained=True)
    donors = find_donors(config, [bundles["logits"]])
    assert fresh(config, donors).num_bytes() == Bundle.load(bundles["logits"]).model().num_bytes()


def test_only_towers_that_are_given_can_stay_as_they_are(bundles):
    config = config_of(bundles["logits"])
    check_frozen(config, TrainConfig(init=(bundles["image"],), freeze=("image",)))
    with pytest.raises(ConfigError, match="--freeze caption: no --init gives this tower"):
        check_frozen(config, TrainConfig(init=(bundles["image"],), freeze=("image", "caption")))


def test_an_ablation_starts_each_fusion_from_the_towers_that_it_has(bundles):
    given = (bundles["image"], bundles["logits"])
    base = Experiment(config_of(bundles["logits"]), TrainConfig(init=given, freeze=("image",)))
    variants = [suited(variant) for variant in variants_of(base, AblationConfig(axes=("fusion",)))]
    found = {variant.value: variant.experiment.train for variant in variants}
    assert found.keys() == {*FUSIONS}
    assert (found["text"].init, found["text"].freeze) == (given[1:], ())
    assert all(
        (train.init, train.freeze) == (given, ("image",)) for name, train in found.items() if name != "text"
    )
    for variant in variants:
        check_stages(variant.experiment.model, variant.experiment.train)
