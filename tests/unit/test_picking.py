"""Picks: how unsure a model is, and labels that take turns."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmray.picking import COUNTS, RANDOM, UNCERTAIN, Pick, choose, doubt, take_turns

LABELED = st.lists(st.tuples(st.integers(0, 4), st.floats(-2, 2)), max_size=40)


def test_doubt_is_the_mean_entropy_in_bits():
    scores = np.array([[0.5, 0.5], [0.0, 1.0], [0.25, 1.0]], np.float32)
    quarter = -(0.25 * np.log2(0.25) + 0.75 * np.log2(0.75))
    assert doubt(scores) == pytest.approx([1.0, 0.0, quarter / 2], abs=1e-6)


@given(rows=LABELED, count=st.integers(0, 50))
def test_labels_take_turns_each_with_its_highest_rank_first(rows, count):
    labels, ranks = np.array([row[0] for row in rows], int), np.array([row[1] for row in rows], float)
    left = {
        label: sorted(np.flatnonzero(labels == label), key=lambda i: (-ranks[i], i)) for label in range(5)
    }
    expected = []
    while any(left.values()):
        turn = [queue.pop(0) for queue in left.values() if queue]
        expected += sorted(turn, key=lambda i: -ranks[i])
    assert take_turns(labels, ranks, count).tolist() == expected[:count]


def test_as_many_of_each_kind_are_kept_as_are_shown():
    picks = [Pick(kind, row % 3, float(row), "a", row) for kind in (UNCERTAIN, RANDOM) for row in range(500)]
    kept = choose(picks)
    for kind in (UNCERTAIN, RANDOM):
        of_kind = [pick for pick in kept if pick.kind == kind]
        assert len(of_kind) == COUNTS[kind]
        assert [pick.row for pick in of_kind[:3]] == [499, 498, 497]
        assert {pick.label for pick in of_kind[:3]} == {0, 1, 2}
    assert choose(reversed(picks)) == kept
