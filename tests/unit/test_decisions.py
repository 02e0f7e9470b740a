"""The decision: what reaches its threshold, and the top label where nothing does."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import optimize

from mmray.decisions import (
    CALIBRATION_PRIOR,
    NEAR,
    Calibration,
    decide,
    tune_single_threshold,
    tune_thresholds,
)
from mmray.errors import ConfigError
from mmray.metrics import THRESHOLDS, Counts

light = settings(deadline=None, max_examples=50)

UNIT = st.one_of(st.floats(0, 1, width=32), st.sampled_from([np.float32(0.3), np.float32(0.5)]))


@st.composite
def decisions(draw):
    """Draw scores float32 (B, L) and thresholds float32 (L,)."""
    num_rows, num_labels = draw(st.tuples(st.integers(0, 8), st.integers(1, 5)))
    scores = draw(arrays.arrays(np.float32, (num_rows, num_labels), elements=UNIT))
    return scores, draw(arrays.arrays(np.float32, num_labels, elements=UNIT))


@light
@given(decisions())
def test_decision_is_that_of_a_loop_over_rows(drawn):
    scores, thresholds = drawn
    decided, fell_back = decide(scores, thresholds)
    for row, labels, fell in zip(scores.tolist(), decided, fell_back, strict=True):
        expected = [i for i, score in enumerate(row) if score >= thresholds[i]]
        assert fell == (not expected)
        assert np.flatnonzero(labels).tolist() == (expected or [row.index(max(row))])


@light
@given(decisions())
def test_with_fallback_no_row_is_empty_and_without_it_none_falls_back(drawn):
    scores, thresholds = drawn
    with_fallback, fell_back = decide(scores, thresholds)
    without, none = decide(scores, thresholds, fallback=False)
    assert with_fallback.any(axis=1).all() and not none.any()
    assert np.array_equal(without, scores >= thresholds)
    assert np.array_equal(with_fallback[~fell_back], without[~fell_back])
    assert (with_fallback[fell_back].sum(axis=1) == 1).all()


@light
@given(decisions(), st.floats(0, 1, width=32))
def test_higher_thresholds_only_take_labels_away(drawn, higher):
    scores, thresholds = drawn
    low, _ = decide(scores, thresholds, fallback=False)
    high, _ = decide(scores, np.maximum(thresholds, np.float32(higher)), fallback=False)
    assert not (high & ~low).any()


@light
@given(decisions(), st.floats(0, 1, width=32))
def test_with_one_threshold_for_all_labels_this_holds_for_the_fallback_too(drawn, higher):
    scores, thresholds = drawn
    lower = min(thresholds[0], np.float32(higher))
    low, low_fell_back = decide(scores, np.full_like(thresholds, lower))
    high, high_fell_back = decide(scores, np.full_like(thresholds, higher))
    assert not (high & ~low).any()
    assert not (low_fell_back & ~high_fell_back).any()


def test_stored_float32_scores_reach_the_thresholds_of_a_json_file():
    grid = np.arange(1, 100) / 100
    decided, fell_back = decide(grid.astype(np.float32)[None], grid)
    assert decided.all() and not fell_back.any()


def test_float64_scores_are_compared_exactly():
    below = np.nextafter(0.5, 0)
    decided, _ = decide(np.array([[below, 0.5]]), np.array([0.5, 0.5]))
    assert decided.tolist() == [[False, True]]


@pytest.mark.parametrize(
    ("scores", "thresholds"),
    [
        (np.zeros(3), np.zeros(3)),
        (np.zeros((2, 3)), np.zeros(2)),
        (np.zeros((2, 3)), np.zeros(1)),
        (np.zeros((2, 3)), np.zeros(())),
        (np.zeros((2, 3)), np.zeros((2, 3))),
        (np.zeros((2, 3), dtype=int), np.zeros(3)),
    ],
)
def test_shapes_that_do_not_belong_together_are_refused(scores, thresholds):
    with pytest.raises(ConfigError, match="a threshold for each label"):
        decide(scores, thresholds)


def test_scores_are_left_as_they_were():
    scores, thresholds = np.array([[0.1, 0.2]], dtype=np.float32), np.array([0.5, 0.5])
    decide(scores, thresholds)
    assert scores.tolist() == np.array([[0.1, 0.2]], dtype=np.float32).tolist()


@pytest.fixture(scope="module")
def validation():
    """Give logits and targets of 1,500 rows: five labels, each off scale in its own way, the last rare."""
    generator = np.random.default_rng(0)
    shares = np.array([0.6, 0.3, 0.1, 0.05, 0.005])
    truth = generator.random((1500, 5)) < shares
    evidence = generator.normal(size=truth.shape) + np.where(truth, 1.5, -1.5)  # its log odds are 3 times it
    logits = 3 * evidence + np.log(shares / (1 - shares))
    return (logits * [0.4, 2.5, 1.0, 1.0, 0.7] + [0.5, -1.0, 0.0, 2.0, -0.5]).astype(np.float32), truth


def log_loss(scores, targets):
    scores = np.clip(scores.astype(np.float64), 1e-12, 1 - 1e-12)
    return -np.where(targets, np.log(scores), np.log1p(-scores)).sum(axis=0)


def ece(scores, targets):
    decided, _ = decide(scores, np.full(scores.shape[1], 0.5))
    return Counts.of(scores, targets, decided).summary(range(scores.shape[1]))["ece"]


def test_calibration_finds_the_line_that_scipy_finds(validation):
    logits, targets = validation
    calibration = Calibration.fit(logits, targets)
    for label, (x, y) in enumerate(zip(logits.T.astype(np.float64), targets.T, strict=True)):

        def loss(line, x=x, y=y):
            z = line[0] * x + line[1]
            prior = CALIBRATION_PRIOR / 2 * ((line[0] - 1) ** 2 + line[1] ** 2)
            return (np.logaddexp(0, z) - y * z).sum() + prior

        oracle = optimize.minimize(loss, [1, 0]).x
        assert (calibration.scales[label], calibration.offsets[label]) == pytest.approx(oracle, abs=1e-3)


def test_calibration_makes_scores_mean_what_they_say_also_on_rows_that_it_has_not_seen(validation):
    logits, targets = validation
    identity, fitted = Calibration.identity(5), Calibration.fit(logits[::2], targets[::2])
    assert (
        ece(fitted.scores(logits[1::2]), targets[1::2])
        < ece(identity.scores(logits[1::2]), targets[1::2]) / 3
    )


def test_logits_that_are_many_times_too_large_are_calibrated_too(validation):
    logits, targets = validation
    fitted = Calibration.fit(30 * logits, targets)
    assert (fitted.scales < 0.1).any()
    assert ece(fitted.scores(30 * logits), targets) < 2 * ece(
        Calibration.fit(logits, targets).scores(logits), targets
    )


@light
@given(decisions(), st.data())
def test_calibration_never_raises_the_loss_it_is_fitted_to_nor_changes_an_order(drawn, data):
    scores, _ = drawn
    logits = (20 * (scores - 0.5)).astype(np.float32)
    targets = data.draw(arrays.arrays(bool, scores.shape))
    calibration = Calibration.fit(logits, targets)
    assert np.isfinite([calibration.scales, calibration.offsets]).all()
    assert (calibration.scales > 0).all()
    before = log_loss(Calibration.identity(scores.shape[1]).scores(logits), targets)
    assert (log_loss(calibration.scores(logits), targets) <= before + 1e-4).all()


def test_a_label_that_no_row_bears_and_logits_without_a_meaning_keep_finite_lines():
    logits = np.random.default_rng(0).normal(size=(200, 2)).astype(np.float32)
    targets = np.zeros((200, 2), bool)
    targets[:, 1] = logits[:, 1] < 0  # just the other way round
    calibration = Calibration.fit(logits, targets)
    assert (calibration.scales[1], calibration.offsets[1]) == (1, 0)
    assert calibration.offsets[0] < 0 < calibration.scales[0]


def test_scores_of_extreme_logits_are_0_and_1():
    logits = np.array([[-1e30, -1e4, 0, 1e4, 1e30]], np.float32)
    assert Calibration.identity(5).scores(logits).tolist() == [[0, 0, 0.5, 1, 1]]


def sample_f1(scores, targets, thresholds):
    decided, fell_back = decide(scores, thresholds)
    return Counts.of(scores, targets, decided, fell_back).summary(range(scores.shape[1]))


def test_tuned_thresholds_are_better_where_labels_differ_and_a_rare_label_stays_near_the_others(validation):
    logits, targets = validation
    scores = Calibration.identity(5).scores(logits)
    tuned = tune_thresholds(scores[::2], targets[::2])
    single = max(
        THRESHOLDS, key=lambda each: sample_f1(scores[::2], targets[::2], np.full(5, each))["sample_f1"]
    )
    found, before = (sample_f1(scores[1::2], targets[1::2], each) for each in (tuned, np.full(5, single)))
    assert found["sample_f1"] + found["macro_f1"] > before["sample_f1"] + before["macro_f1"] + 0.01
    assert np.ptp(tuned) > 0.1


@light
@given(decisions(), st.data())
def test_tuning_never_worsens_the_rows_it_tunes_on_whatever_their_order(drawn, data):
    scores, _ = drawn
    targets = data.draw(arrays.arrays(bool, scores.shape))
    tuned = tune_thresholds(scores, targets)
    assert ((tuned >= 0) & (tuned <= 1)).all()
    half = sample_f1(scores, targets, np.full(len(tuned), 0.5))["sample_f1"]
    assert sample_f1(scores, targets, tuned)["sample_f1"] >= half - 1e-9


@light
@given(decisions(), st.data())
def test_of_single_thresholds_near_the_best_sample_f1_it_is_that_of_the_best_macro_f1(drawn, data):
    scores, _ = drawn
    targets = data.draw(arrays.arrays(bool, scores.shape))
    found = {each: sample_f1(scores, targets, np.full(scores.shape[1], each)) for each in THRESHOLDS}
    least = max(max(f1["sample_f1"] for f1 in found.values()) - NEAR, found[0.5]["sample_f1"]) - 1e-9
    macro = {each: f1["macro_f1"] for each, f1 in found.items() if f1["sample_f1"] >= least}
    single = tune_single_threshold(scores, targets)
    assert macro[single] == pytest.approx(max(macro.values()))
    nearer = [each for each in macro if abs(each - 0.5) < abs(single - 0.5) - 1e-12]
    assert all(macro[each] < macro[single] - 1e-10 for each in nearer)


def test_thresholds_that_differ_by_chance_alone_are_the_same():
    draw = np.random.default_rng(0)
    scores = draw.beta(0.5, 1.5, (400, 6)).astype(np.float32)
    tuned = tune_thresholds(scores, draw.random(scores.shape) < scores)
    assert np.ptp(tuned) < 0.05


def test_tuning_does_not_depend_on_the_order_of_rows(validation):
    logits, targets = validation
    scores = Calibration.identity(5).scores(logits)
    order = np.random.default_rng(1).permutation(len(scores))
    assert np.allclose(tune_thresholds(scores, targets), tune_thresholds(scores[order], targets[order]))
