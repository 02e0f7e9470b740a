"""The decision: what reaches its threshold, and the top label where nothing does."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mmray.decisions import decide
from mmray.errors import ConfigError

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
