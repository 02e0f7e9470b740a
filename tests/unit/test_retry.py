"""Failed rows labeled again: in their places, beside rows that stay as they are, whatever type they have."""

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from mmray.retry import relabel
from mmray.schema import Status


def make_rows(num_rows):
    """Give rows with columns of every kind that Arrow cannot filter."""
    names = pa.array([b"\xff %d" % row for row in range(num_rows)], pa.binary()).view(pa.string())
    return pa.table(
        {
            "row": np.arange(num_rows),
            "text": names.cast(pa.string_view()),
            "bytes": names.cast(pa.binary()).cast(pa.binary_view()),
            "list": pa.array([[row] for row in range(num_rows)], pa.list_view(pa.int64())),
            "kind": names.dictionary_encode(),
        }
    )


@settings(deadline=None, max_examples=100)
@given(st.lists(st.booleans(), min_size=1, max_size=12).filter(any))
def test_only_failed_rows_are_labeled_again_and_every_row_keeps_its_place(failed):
    rows = make_rows(len(failed))
    statuses = [str(Status.FAILED if bad else Status.OK) for bad in failed]
    seen = []

    def label(part):
        seen.extend(part["row"].to_pylist())
        return part.append_column("status", pa.array(["no_image"] * part.num_rows))

    result = relabel(label, rows, rows.append_column("status", pa.array(statuses)))
    assert seen == [row for row, bad in enumerate(failed) if bad]
    assert result["status"].to_pylist() == ["no_image" if bad else "ok" for bad in failed]
    assert result.drop_columns("status").equals(rows)
