"""The model card says what data, what labels, how good by modality and label, and what it is not for."""

from mmray.card import model_card
from mmray.config import ModelConfig


def summary(**more):
    entry = {"precision": 0.5, "recall": 0.25, "f1": 1 / 3, "ap": None, "support": 1200}
    return {
        "num_rows": 2000,
        "sample_f1": 0.8,
        "map": 0.7,
        "macro_f1": 0.6,
        "ece": 0.01,
        "by_label": {"a|b": entry},
    } | more


DECISIONS = {
    "single": {"sample_f1": 0.785, "ece": 0.011},
    "per-label": {"sample_f1": 0.795, "ece": 0.012},
    "uncalibrated": {"sample_f1": 0.775, "ece": 0.034},
}


def test_it_tells_what_a_user_must_know():
    metrics = summary(
        epoch=2,
        history=[{}, {}, {}],
        training={
            "datasets": ["photos", "more"],
            "num_rows": 15_000,
            "num_labeled": 13_000,
            "by_label": {"a|b": 77},
            "init": {"image": "photos-first"},
        },
        by_decision=DECISIONS,
        by_modality={"image": summary(sample_f1=0.4), "caption": summary(sample_f1=0.75)},
    )
    card = model_card(ModelConfig(vision="resnet18", pretrained=False), metrics)
    for words in (
        "resnet18 at 380 px",
        "Trained on 15,000 rows of photos and more, 13,000 of them with labels of their own; epoch 2 of 3",
        "- Started from other bundles: image from the bundle photos-first.",
        "| image and caption | 0.800 | 0.700 | 0.600 |",
        "| the image alone | 0.400 | 0.700 | 0.600 |",
        "| a\\|b | 0.500 | 0.250 | 0.333 |  | 1,200 | 77 |",
        "sample F1 is 0.795, at a single threshold 0.785;",
        "calibration error is 0.0120, before calibration 0.0340.",
        "## What it is not for",
        "jobs/label.py --input DATA",
    ):
        assert words in card
    assert "; the mean logits of 3 caption towers." in model_card(ModelConfig(members=3), metrics)
    counted = model_card(ModelConfig(ngrams=True), metrics)
    assert "; the mean logits of a caption tower and a linear model of n-grams." in counted


def test_a_model_of_one_modality_has_one_line():
    metrics = summary(
        epoch=1,
        history=[{}],
        training={"datasets": ["a"], "num_rows": 10, "num_labeled": 10, "by_label": {"a|b": 7}, "init": {}},
        by_decision=DECISIONS,
        by_modality={},
    )
    card = model_card(ModelConfig(fusion="text", pretrained=False), metrics)
    assert "| all | 0.800 |" in card and "other bundles" not in card and "| the " not in card
