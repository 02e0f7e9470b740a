"""A survey of labeled files: counts that add up, and picks that are what they are called."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmray.decisions import decide
from mmray.errors import OutputError
from mmray.picking import CERTAIN, FALLBACK, RANDOM, REJECTION, UNCERTAIN, doubt
from mmray.schema import KeptScores, Vocabulary, prediction_fields
from mmray.storage import Folder
from mmray.survey import NUM_BINS, Survey, Surveyor

VOCABULARY = Vocabulary(("beach", "city", "forest"))
THRESHOLDS = np.array([0.5, 0.6, 0.4])
NUM_ROWS = 400


def label(seed):
    """Give scores (400, 3), decisions, and these as a labeled table; some rows have failed."""
    generator = np.random.default_rng(seed)
    scores = generator.beta(0.4, 0.9, (NUM_ROWS, 3)).astype(np.float32)
    valid = generator.random(NUM_ROWS) > 0.1
    decided, fell_back = decide(scores, THRESHOLDS)
    status = np.where(valid, np.where(generator.random(NUM_ROWS) < 0.1, "bad_image", "ok"), "failed")
    errors = [None if each == "ok" else f"row {row} is bad" for row, each in enumerate(status)]
    columns = {
        "predicted_labels": VOCABULARY.decode(decided, valid),
        "scores": KeptScores().array(scores, valid, VOCABULARY),
        "status": pa.array(status.tolist()),
        "error": pa.array(errors, pa.string()),
        "model": pa.array(["m"] * NUM_ROWS),
    }
    fields = prediction_fields(VOCABULARY, KeptScores())
    table = pa.Table.from_arrays([columns[field.name] for field in fields], schema=pa.schema(fields))
    return scores, decided & valid[:, None], fell_back & valid, status, table


@pytest.fixture
def surveyor(tmp_path):
    return Surveyor(Folder(str(tmp_path)), VOCABULARY, THRESHOLDS, fallback=True, scored=True)


def test_it_counts_what_is_there(surveyor):
    scores, decided, fell_back, status, table = label(0)
    pq.write_table(table, f"{surveyor.output}/a.parquet", row_group_size=150)
    found = surveyor.survey("a.parquet")
    assert found.num_rows == NUM_ROWS
    assert found.counts == Counter(status.tolist())
    assert found.num_fallback == fell_back.sum() > 0
    assert found.num_empty == (status == "failed").sum()
    assert found.labels.tolist() == decided.sum(axis=0).tolist()
    assert found.reasons == {"row # is bad": (status != "ok").sum()}
    for place in range(3):
        column = scores[status != "failed", place]
        assert found.histogram[place].tolist() == np.histogram(column, NUM_BINS, (0, 1))[0].tolist()


def test_files_add_up(surveyor):
    _, first, _, _, a = label(1)
    _, second, _, _, b = label(2)
    pq.write_table(a, f"{surveyor.output}/a.parquet")
    pq.write_table(b, f"{surveyor.output}/b.parquet")
    total = sum((surveyor.survey(path) for path in ("a.parquet", "b.parquet")), Survey())
    assert total.num_rows == 2 * NUM_ROWS
    assert total.labels.tolist() == (first.sum(axis=0) + second.sum(axis=0)).tolist()
    assert total.histogram.sum() == 3 * (total.num_rows - total.counts["failed"])
    assert {pick.path for pick in total.picks if pick.kind == UNCERTAIN} == {"a.parquet", "b.parquet"}


def test_picks_are_what_they_are_called(surveyor):
    scores, _, fell_back, status, table = label(3)
    pq.write_table(table, f"{surveyor.output}/a.parquet", row_group_size=150)
    picks = surveyor.survey("a.parquet").picks
    rows = {kind: [pick.row for pick in picks if pick.kind == kind] for kind in {pick.kind for pick in picks}}
    assert set(rows) == {CERTAIN, UNCERTAIN, FALLBACK, RANDOM, REJECTION}
    assert set(rows[REJECTION]) <= set(np.flatnonzero(status != "ok"))
    assert set(rows[RANDOM]) <= set(np.flatnonzero(status == "ok"))
    assert set(rows[FALLBACK]) <= set(np.flatnonzero(fell_back))
    unsure = doubt(scores)
    assert max(unsure[rows[CERTAIN]]) < min(unsure[rows[UNCERTAIN]])
    assert not set(rows[CERTAIN] + rows[UNCERTAIN]) & set(np.flatnonzero(status == "failed"))
    most = np.flatnonzero(status != "failed")[unsure[status != "failed"].argmax()]
    assert most in rows[UNCERTAIN][:3]


def test_without_scores_there_are_counts_and_no_certainty(surveyor):
    _, decided, _, _, table = label(4)
    pq.write_table(table.drop_columns("scores"), f"{surveyor.output}/a.parquet")
    unscored = Surveyor(surveyor.output, VOCABULARY, THRESHOLDS, fallback=True, scored=False)
    found = unscored.survey("a.parquet")
    assert found.labels.tolist() == decided.sum(axis=0).tolist()
    assert {pick.kind for pick in found.picks} == {RANDOM, REJECTION}


def test_a_damaged_file_is_named(surveyor):
    surveyor.output.publish("x/a.parquet", b"PAR1 no parquet PAR1")
    with pytest.raises(OutputError, match=r"x/a\.parquet is gone or damaged"):
        surveyor.survey("x/a.parquet")
