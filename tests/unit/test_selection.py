"""Pseudo-labels: what is taken as true, as false, and what is left out."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmray.metrics import histogram
from mmray.selection import Cutoffs, Selection, as_lists, as_matrix, write_selection
from mmray.storage import Folder


def draw(num_rows=2000, seed=0):
    """Draw scores of three labels: a frequent one, one of which the model is never sure, and a rare one."""
    generator = np.random.default_rng(seed)
    logits = generator.normal([1.0, -1.0, -4.0], [3.0, 0.3, 2.0], (num_rows, 3))
    return (1 / (1 + np.exp(-logits))).astype(np.float32)


def counted(scores):
    return histogram(scores, np.zeros(scores.shape, bool))[0].astype(float)


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.8, 1.0])
def test_of_each_label_as_many_rows_are_taken_as_bear_it(keep):
    scores, shares = draw(), np.array([0.6, 0.2, 0.01])
    cutoffs = Cutoffs.by_frequency(counted(scores), shares, keep)
    valid = np.arange(2000) >= 10
    rows, targets, mask = cutoffs.select(scores, valid, soft=False)
    assert set(range(10)).isdisjoint(rows)
    true, false = targets.astype(bool) & mask, mask & ~targets.astype(bool)
    # A bin is taken whole or not at all; ten rows could not be labeled.
    slack = np.array([25, 25, 3])
    assert (np.abs(true.sum(0) - keep * shares * 2000) <= slack).all()
    assert false.sum(0) == pytest.approx(keep * (1 - shares) * 2000, abs=25)
    assert (true.sum(0) <= keep * shares * 2000 + 1).all()


def test_rows_that_bear_no_label_are_learned_from_too():
    """Else each label would be as many times more frequent as there are fewer rows."""
    scores = np.array([[0.99, 0.01]] * 10 + [[0.01, 0.01]] * 90, np.float32)
    cutoffs = Cutoffs.by_frequency(counted(scores), np.array([0.1, 0.0]), 1.0)
    rows, targets, mask = cutoffs.select(scores, np.ones(100, bool), soft=False)
    assert len(rows) == 100 and mask.all() and targets.sum(0).tolist() == [10, 0]


def test_scores_too_sure_to_be_told_apart_are_taken_together():
    logits = np.array([-40.0] * 950 + [0.0] * 10 + [40.0] * 40)[:, None]
    scores = (1 / (1 + np.exp(-logits))).astype(np.float32)
    cutoffs = Cutoffs.by_frequency(counted(scores), np.array([0.02]), 0.8)  # of 40 and of 950 ties, some
    rows, targets, _ = cutoffs.select(scores, np.ones(1000, bool), soft=False)
    assert (len(rows), targets.sum()) == (990, 40)


@pytest.mark.parametrize(
    ("share", "keep", "true", "false"),
    [(0.05, 1.0, 61, 939), (0.02, 1.0, 0, 0), (0.0, 1.0, 0, 1000), (0.05, 0.0, 0, 0)],
)
def test_rows_with_one_score_are_taken_together_or_the_label_stays_unknown(share, keep, true, false):
    """As rows with the same caption have. Of absences alone the student would unlearn the label."""
    scores = np.array([0.995] + [0.99] * 60 + [0.2] * 939, np.float32)[:, None]
    assert taken(scores, share, keep) == (true, false)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7, 0.95])
@pytest.mark.parametrize("keep", [0.5, 0.8, 1.0])
def test_a_label_that_has_the_same_score_everywhere_stays_unknown(share, keep):
    assert taken(np.full((1000, 1), 0.3, np.float32), share, keep) == (0, 0)


def taken(scores, share, keep):
    """Give how many rows bear the one label for the student, and how many do not."""
    cutoffs = Cutoffs.by_frequency(counted(scores), np.array([share]), keep)
    _, targets, mask = cutoffs.select(scores, np.ones(len(scores), bool), soft=False)
    return targets[mask].sum(), (targets[mask] == 0).sum()


def test_the_surest_are_taken():
    scores = draw()
    cutoffs = Cutoffs.by_frequency(counted(scores), np.array([0.5, 0.3, 0.02]), 0.8)
    for label in range(3):
        true = scores[:, label] >= cutoffs.positive[label]
        false = scores[:, label] <= cutoffs.negative[label]
        assert scores[true, label].min() > scores[~true, label].max()
        assert scores[false, label].max() < scores[~false, label].min()


def test_confidence_asks_the_same_of_every_label():
    scores = np.array([[0.95, 0.9, 0.5], [0.89, 0.1, 0.11], [0.05, 0.5, 0.5]])
    rows, targets, mask = Cutoffs.by_confidence(0.9, 3).select(scores, np.ones(3, bool), soft=False)
    assert rows.tolist() == [0, 2]
    assert targets.tolist() == [[1, 1, 0], [0, 0, 0]]
    assert mask.tolist() == [[True, True, False], [True, False, False]]


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 100), st.booleans(), st.floats(0.5, 1))
def test_a_selected_row_has_a_known_label_and_unsure_labels_are_masked_not_called_false(
    seed, soft, confidence
):
    scores = draw(40, seed)
    cutoffs = Cutoffs.by_confidence(confidence, 3)
    rows, targets, mask = cutoffs.select(scores, np.ones(40, bool), soft=soft)
    for row in range(40):
        true, false = scores[row] >= cutoffs.positive, scores[row] <= cutoffs.negative
        assert (row in rows) == (true | false).any()
        if row in rows:
            place = rows.tolist().index(row)
            assert np.array_equal(mask[place], true | false)
            assert np.array_equal(targets[place], scores[row] if soft else true)
    assert targets.dtype == np.float32 and mask.dtype == bool


def test_a_selection_is_read_back_by_rows_of_its_file(tmp_path):
    generator = np.random.default_rng(0)
    rows, targets, mask = (
        np.array([0, 3, 4, 9]),
        generator.random((4, 2), np.float32),
        generator.random((4, 2)) < 0.5,
    )
    folder = Folder(str(tmp_path))
    write_selection(folder, "deep/a=1/b.parquet", rows, targets, mask)
    selection = Selection(folder, {"deep/a=1/b.parquet": 4}, "")
    read = selection.read("deep/a=1/b.parquet", 3, 9)
    assert read["row"].to_pylist() == [0, 1]
    assert np.array_equal(as_matrix(read["targets"]), targets[1:3])
    assert np.array_equal(as_matrix(read["mask"]), mask[1:3])
    nothing = selection.read("deep/a=1/b.parquet", 5, 9)
    assert as_matrix(nothing["targets"]).shape == (0, 2)
    assert pq.read_schema(tmp_path / "deep/a=1/b.parquet").names == ["row", "targets", "mask"]


@pytest.mark.parametrize("num_rows", [0, 1, 5])
def test_matrices_are_lists_and_back_also_in_slices(num_rows):
    matrix = np.arange(3 * num_rows, dtype=np.float32).reshape(num_rows, 3)
    column = pa.chunked_array([as_lists(matrix)])
    assert np.array_equal(as_matrix(column), matrix)
    assert np.array_equal(as_matrix(column.slice(1)), matrix[1:])
