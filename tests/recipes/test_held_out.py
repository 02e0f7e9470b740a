"""The headline rests on the rows that may train a model, and on no other."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from held_out import FIRST_HELD_OUT, ids_of, refuse_held_out


def test_the_training_rows_are_the_first_thirteen_thousand(coco18):
    assert sorted(ids_of(coco18 / "train")) == list(range(13_000))
    refuse_held_out(coco18 / "train")


def test_rows_that_validate_are_refused(coco18):
    with pytest.raises(ValueError, match="is held out"):
        refuse_held_out(coco18 / "val")


def test_a_single_row_that_is_held_out_is_found(tmp_path):
    for name, number in (("a", FIRST_HELD_OUT - 1), ("b", FIRST_HELD_OUT)):
        pq.write_table(pa.table({"image_id": [f"{number}.jpg"]}), tmp_path / f"{name}.parquet")
    with pytest.raises(ValueError, match=r"24000\.jpg is held out"):
        refuse_held_out(tmp_path)
    (tmp_path / "b.parquet").unlink()
    refuse_held_out(tmp_path)
