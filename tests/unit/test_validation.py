"""What validation rows are worth: metrics, and the decision that they settle. Without Ray."""

import numpy as np
import pytest
import torch

from mmray.decisions import decide, tune_single_threshold
from mmray.metrics import Counts
from mmray.schema import Vocabulary
from mmray.validation import Validation

LABELS = Vocabulary(("bus", "cat", "dog"))
CPU = torch.device("cpu")


def draw(num_rows=900, num_invalid=9):
    """Draw rows whose logits are twice too sure and, by label, off their place."""
    generator = np.random.default_rng(0)
    targets = generator.random((num_rows, 3)) < [0.5, 0.2, 0.1]
    logits = generator.normal(np.where(targets, 1.0, -1.0), 1.0) * 4 + [0.0, 2.0, -3.0]
    valid = np.arange(num_rows) >= num_invalid
    alone = np.stack([logits / 2 + generator.normal(0, 2, logits.shape), logits * 0.9], 1)
    there = generator.random((num_rows, 2)) < 0.9
    return Validation(logits.astype(np.float32), targets, valid, alone.astype(np.float32), there)


def test_rows_that_could_not_be_labeled_count_as_rows_without_labels():
    drawn = draw()
    metrics = drawn.measure(LABELS, CPU)
    assert metrics["num_rows"] == 900
    scores = 1 / (1 + np.exp(-drawn.logits.astype(np.float64)))
    decided, _ = decide(scores, np.full(3, metrics["threshold"]))
    decided[:9] = False
    hits = (decided & drawn.targets).sum()
    assert metrics["micro_f1"] == pytest.approx(2 * hits / (decided.sum() + drawn.targets.sum()))
    assert metrics["empty_rate"] == 9 / 900


def test_what_is_settled_is_measured_as_it_will_be_used():
    drawn = draw()
    calibration, thresholds, metrics = drawn.settle(LABELS)
    scores = calibration.scores(drawn.logits) * drawn.valid[:, None]
    decided, fell_back = decide(scores, thresholds)
    expected = Counts.of(scores, drawn.targets, decided & drawn.valid[:, None], fell_back & drawn.valid)
    for name, value in expected.summary(LABELS.labels).items():
        assert metrics[name] == value


def test_rows_that_are_kept_are_from_all_over(monkeypatch):
    """In rows that stand label by label the first ones would know nothing of the last labels."""
    monkeypatch.setattr("mmray.validation.MAX_ROWS_KEPT", 70)
    drawn = draw()
    kept = drawn.gathered()
    places = [int(np.flatnonzero((drawn.logits == row).all(axis=1))[0]) for row in kept.logits]
    assert len(places) == 70 and (np.diff([0, *places, 900]) <= 13).all()
    np.testing.assert_array_equal(kept.targets, drawn.targets[places])
    monkeypatch.setattr("mmray.validation.MAX_ROWS_KEPT", 1000)
    np.testing.assert_array_equal(drawn.gathered().logits, drawn.logits)


def test_settling_never_lowers_sample_f1():
    drawn = draw()
    calibration, _, metrics = drawn.settle(LABELS)
    scores = drawn.scores(calibration)
    for threshold in (0.5, tune_single_threshold(scores, drawn.targets)):
        counts = drawn.counts(scores, np.full(3, threshold))
        assert metrics["sample_f1"] >= counts.summary(LABELS.labels)["sample_f1"]


def test_rules_are_measured_on_rows_that_they_were_not_fitted_to():
    drawn, found = draw(), draw().held_out()
    assert list(found) == ["0.5", "single", "per-label", "uncalibrated"]
    hits = np.zeros(3)
    for fold in range(5):
        held_out = np.zeros(900, bool)
        held_out[np.lexsort(drawn.logits.T)[fold::5]] = True
        calibration, thresholds, _ = drawn.rows(~held_out).settle(LABELS)
        rest = drawn.rows(held_out)
        decided, _ = decide(rest.scores(calibration), thresholds)
        hits += (decided & rest.valid[:, None] & rest.targets).sum(axis=0)
    assert found["per-label"].true_positives.tolist() == hits.tolist()
    assert all(counts.num_rows == 900 for counts in found.values())


def test_calibration_helps_on_rows_that_it_was_not_fitted_to():
    by_decision = draw().settle(LABELS).metrics["by_decision"]
    assert by_decision["per-label"]["ece"] < by_decision["uncalibrated"]["ece"] / 2


def test_each_modality_is_measured_alone_by_the_same_rule():
    drawn = draw()
    calibration, thresholds, metrics = drawn.settle(LABELS)
    assert list(metrics["by_modality"]) == ["image", "caption"]
    for place, found in enumerate(metrics["by_modality"].values()):
        valid = drawn.valid & drawn.there[:, place]
        scores = calibration.scores(drawn.alone[:, place]) * valid[:, None]
        decided, fell_back = decide(scores, thresholds)
        expected = Counts.of(scores, drawn.targets, decided & valid[:, None], fell_back & valid)
        assert found == expected.summary(LABELS.labels)
    assert metrics["by_modality"]["image"]["map"] < metrics["map"]


def of_one_modality(drawn):
    return drawn._replace(alone=drawn.alone[:, :0])


def test_a_model_of_one_modality_has_none_to_leave_out():
    assert of_one_modality(draw()).settle(LABELS).metrics["by_modality"] == {}


@pytest.mark.parametrize("drawn", [draw(50), of_one_modality(draw(50))])
def test_it_stands_in_a_checkpoint_as_it_was(tmp_path, drawn):
    drawn.save(tmp_path)
    for one, other in zip(drawn, Validation.load(tmp_path), strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert np.array_equal(one, other)


@pytest.mark.parametrize("num_rows", [0, 5])
def test_rows_none_of_which_is_valid_settle_too(num_rows):
    drawn = draw(num_rows, num_rows)
    settled = drawn.settle(LABELS)
    assert settled.metrics["num_rows"] == num_rows
    assert settled.calibration.scales.tolist() == [1, 1, 1]
