"""Counts against scikit-learn, against loops that a person can check, and against any split of the rows."""

import json
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from sklearn.metrics import average_precision_score, f1_score, precision_recall_fscore_support

from mmray.decisions import decide
from mmray.errors import ConfigError, DataError
from mmray.metrics import MAX_LOGIT, NUM_BINS, NUM_CALIBRATION_BINS, THRESHOLDS, Counts

light = settings(deadline=None, max_examples=40)

# Few values besides the free ones, so that ties, exact thresholds and the ends of the range all occur.
SCORES = st.one_of(
    st.floats(0, 1, width=32), st.sampled_from([np.float32(x) for x in (0, 0.01, 0.3, 0.5, 0.7, 0.99, 1)])
)


@st.composite
def batches(draw, min_rows=0):
    """Draw scores float32, targets, decided bool (B, L) and fallback bool (B,)."""
    shape = draw(st.tuples(st.integers(min_rows, 12), st.integers(1, 5)))
    scores = draw(arrays.arrays(np.float32, shape, elements=SCORES))
    targets, decided = (draw(arrays.arrays(bool, shape)) for _ in range(2))
    return scores, targets, decided, draw(arrays.arrays(bool, shape[:1]))


def summarise(*batch):
    counts = Counts.of(*batch)
    return counts.summary(range(len(counts.true_positives)))


def sample_f1(targets, decided):
    """Mean F1 over rows, one row at a time."""
    f1 = []
    for target, label in zip(targets, decided, strict=True):
        marks = target.sum() + label.sum()
        f1.append(2 * (target & label).sum() / marks if marks else 1.0)
    return np.mean(f1)


@light
@given(batches(min_rows=1))
def test_f1_precision_and_recall_agree_with_scikit_learn(batch):
    _, targets, decided, _ = batch
    summary = summarise(*batch)
    # scikit-learn reads a single column as two classes; an empty neighbour that no mean counts prevents it.
    columns = list(range(targets.shape[1]))
    wide_targets, wide_decided = (np.pad(matrix, [(0, 0), (0, 1)]) for matrix in (targets, decided))

    def oracle(average, zero_division):
        return f1_score(
            wide_targets, wide_decided, labels=columns, average=average, zero_division=zero_division
        )

    assert summary["sample_f1"] == pytest.approx(oracle("samples", 1.0))
    assert summary["micro_f1"] == pytest.approx(oracle("micro", 0.0))
    assert summary["macro_f1"] == pytest.approx(oracle("macro", 0.0))
    by_label = precision_recall_fscore_support(wide_targets, wide_decided, labels=columns, zero_division=0.0)
    for name, expected in zip(("precision", "recall", "f1", "support"), by_label, strict=True):
        assert [label[name] for label in summary["by_label"].values()] == pytest.approx(list(expected))


@light
@given(st.lists(st.tuples(st.integers(0, NUM_BINS - 1), st.booleans()), min_size=1, max_size=40))
def test_average_precision_of_scores_in_the_middle_of_bins_is_scikit_learns(rows):
    bins, targets = (np.array(column).reshape(-1, 1) for column in zip(*rows, strict=True))
    scores = 1 / (1 + np.exp(MAX_LOGIT - (bins + 0.5) * 2 * MAX_LOGIT / NUM_BINS))
    ap = summarise(scores, targets, targets)["by_label"]["0"]["ap"]
    assert ap == (pytest.approx(average_precision_score(targets, bins)) if targets.any() else None)


@pytest.mark.parametrize("prevalence", [0.01, 0.1, 0.6])
def test_average_precision_of_raw_scores_is_scikit_learns_within_two_thousandths(prevalence):
    random = np.random.default_rng(0)
    targets = random.random((20_000, 3)) < prevalence
    logits = random.normal(4 * targets - 3, [0.5, 2, 3])
    scores = (1 / (1 + np.exp(-logits))).astype(np.float32)
    by_label = summarise(scores, targets, targets)["by_label"].values()
    expected = average_precision_score(targets, scores, average=None)
    assert [label["ap"] for label in by_label] == pytest.approx(list(expected), abs=2e-3)


@light
@given(batches())
def test_map_is_the_mean_over_labels_with_support(batch):
    summary = summarise(*batch)
    ap = [label["ap"] for label in summary["by_label"].values() if label["support"]]
    assert summary["map"] == pytest.approx(np.mean(ap) if ap else 0.0)
    assert all((label["ap"] is None) == (label["support"] == 0) for label in summary["by_label"].values())


@light
@given(batches(min_rows=1))
def test_calibration_error_is_that_of_a_loop_over_bins(batch):
    scores, targets = batch[0].astype(float), batch[1]  # a float32 would be compared with rounded borders
    expected = 0.0
    for i in range(NUM_CALIBRATION_BINS):
        low, high = i / NUM_CALIBRATION_BINS, (i + 1) / NUM_CALIBRATION_BINS
        inside = (scores > low) & (scores <= high) | ((scores == 0) & (i == 0))
        if inside.any():
            gap = abs(scores[inside].astype(float).mean() - targets[inside].mean())
            expected += inside.mean() * gap
    assert summarise(*batch)["ece"] == pytest.approx(expected, abs=1e-12)


@light
@given(batches(min_rows=1))
def test_rates_count_rows(batch):
    _, _, decided, fallback = batch
    summary = summarise(*batch)
    assert summary["empty_rate"] == pytest.approx(np.mean([not row.any() for row in decided]))
    assert summary["fallback_rate"] == pytest.approx(np.mean(fallback))


@light
@given(batches(min_rows=1))
def test_threshold_curve_is_the_sample_f1_of_deciding_at_each_threshold(batch):
    scores, targets, *_ = batch
    num_labels = scores.shape[1]
    expected = [
        sample_f1(targets, decide(scores, np.full(num_labels, threshold))[0]) for threshold in THRESHOLDS
    ]
    curve = Counts.of(*batch).sum_f1_by_threshold / len(scores)
    assert curve == pytest.approx(expected, abs=1e-12)


@light
@given(batches())
def test_best_threshold_has_the_highest_f1_and_is_the_nearest_to_a_half(batch):
    counts = Counts.of(*batch)
    best = counts.best_threshold()
    curve = dict(zip(THRESHOLDS.tolist(), counts.sum_f1_by_threshold, strict=True))
    assert curve[best] == pytest.approx(max(curve.values()))
    nearer = [f1 for threshold, f1 in curve.items() if abs(threshold - 0.5) < abs(best - 0.5) - 1e-12]
    assert all(f1 < curve[best] - 1e-9 for f1 in nearer)


def test_best_threshold_separates_what_can_be_separated():
    scores = np.array([[0.20, 0.10], [0.25, 0.19], [0.05, 0.90]], dtype=np.float32)
    targets = np.array([[1, 0], [1, 0], [0, 1]], dtype=np.uint8)
    # Where a row reaches nothing its top label speaks, so any threshold above 0.19 is right on all rows.
    assert Counts.of(scores, targets, targets.astype(bool)).best_threshold() == 0.5
    # With a second target at 0.19, only 0.11 ... 0.19 is right on all rows.
    targets[1, 1] = 1
    assert Counts.of(scores, targets, targets.astype(bool)).best_threshold() == 0.19


@light
@given(batches(), st.data())
def test_any_split_adds_up_to_the_whole(batch, data):
    num_rows, num_labels = batch[0].shape
    cuts = sorted(data.draw(st.lists(st.integers(0, num_rows), max_size=4)))
    parts = zip(*(np.split(array, cuts) for array in batch), strict=True)
    merged = sum((Counts.of(*part) for part in parts), start=Counts.zero(num_labels))
    assert np.allclose(merged.to_vector(), Counts.of(*batch).to_vector(), rtol=0, atol=1e-9)


@light
@given(batches())
def test_vector_round_trip_keeps_every_count(batch):
    counts, num_labels = Counts.of(*batch), batch[0].shape[1]
    vector = counts.to_vector()
    again = Counts.from_vector(vector, num_labels)
    assert vector.dtype == np.float64 and vector.ndim == 1
    for name, array in vars(counts).items():
        assert np.array_equal(array, getattr(again, name)) and array.shape == getattr(again, name).shape


def test_a_vector_of_another_vocabulary_is_refused():
    with pytest.raises(ConfigError, match="3 labels"):
        Counts.from_vector(Counts.zero(2).to_vector(), 3)


@light
@given(batches())
def test_summary_is_plain_json_without_nan_and_without_warnings(batch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        summary = summarise(*batch)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert type(summary["num_rows"]) is int and type(summary["by_label"]["0"]["support"]) is int


def test_no_rows_are_summarised_as_zeros():
    summary = Counts.zero(2).summary(["cat", "dog"])
    nothing = {"precision": 0.0, "recall": 0.0, "f1": 0.0, "ap": None, "support": 0}
    assert summary.pop("by_label") == {"cat": nothing, "dog": nothing}
    assert set(summary.values()) == {0}
    assert Counts.zero(2).best_threshold() == 0.5


def test_integer_targets_count_as_boolean_ones():
    scores = np.full((300, 1), 0.5)
    targets = np.ones((300, 1), dtype=np.uint8)  # 300 of them overflow a uint8
    assert summarise(scores, targets, targets.astype(bool))["by_label"]["0"]["support"] == 300


@pytest.mark.parametrize("bad", [np.nan, -0.1, 1.1, np.inf])
def test_what_is_no_score_is_refused(bad):
    mask = np.ones((1, 2), dtype=bool)
    with pytest.raises(DataError, match="sigmoid"):
        Counts.of(np.array([[0.5, bad]]), mask, mask)


@pytest.mark.parametrize(
    ("scores", "targets", "decided", "fallback"),
    [
        (np.zeros(2), np.zeros(2, bool), np.zeros(2, bool), np.zeros(2, bool)),
        (np.zeros((2, 3)), np.zeros((1, 3), bool), np.zeros((2, 3), bool), None),
        (np.zeros((2, 3)), np.zeros((2, 3), bool), np.zeros((2, 1), bool), None),
        (np.zeros((2, 3)), np.zeros((2, 3), bool), np.zeros((2, 3), bool), np.zeros(3, bool)),
        (np.zeros((2, 3), int), np.zeros((2, 3), bool), np.zeros((2, 3), bool), None),
    ],
)
def test_arrays_that_do_not_belong_together_are_refused(scores, targets, decided, fallback):
    with pytest.raises(ConfigError, match="must be floats"):
        Counts.of(scores, targets, decided, fallback)
