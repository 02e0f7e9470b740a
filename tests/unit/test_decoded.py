"""Decoded rows as a column: what goes in comes out, however Arrow cuts it."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmray.decoded import DECODED, from_column, to_column
from mmray.decoding import Row
from mmray.schema import Status

SIZE_PX = 3


@st.composite
def rows(draw):
    """Give a row of any kind: with pixels or without, with a caption or without."""
    pixels = draw(st.none() | st.binary(min_size=27, max_size=27))
    image = None if pixels is None else np.frombuffer(pixels, np.uint8).reshape(SIZE_PX, SIZE_PX, 3)
    return Row(
        image,
        draw(st.none() | st.text(max_size=5)),
        draw(st.sampled_from(Status)),
        draw(st.none() | st.text(max_size=5)),
    )


@settings(deadline=None)
@given(st.lists(st.lists(rows(), max_size=20), max_size=4), st.integers(0, 5))
def test_rows_survive_the_way(chunks, skipped):
    given_rows = [row for chunk in chunks for row in chunk][skipped:]
    column = pa.chunked_array([to_column(chunk) for chunk in chunks], DECODED).slice(skipped)
    found = from_column(column, [row.caption for row in given_rows], SIZE_PX)
    assert len(found) == len(given_rows)
    for row, other in zip(given_rows, found, strict=True):
        assert (row.pixels is None) == (other.pixels is None)
        assert row.pixels is None or np.array_equal(row.pixels, other.pixels)
        assert row[1:] == other[1:]


def test_pixels_are_not_copied():
    image = np.arange(27, dtype=np.uint8).reshape(SIZE_PX, SIZE_PX, 3)
    column = pa.chunked_array([to_column([Row(image, "a", Status.OK, None)] * 2)])
    first, second = from_column(column, ["a", "a"], SIZE_PX)
    assert not first.pixels.flags.owndata
    assert second.pixels.ctypes.data - first.pixels.ctypes.data == 27


def test_a_caption_that_said_nothing_stays_unread():
    column = pa.chunked_array([to_column([Row(None, None, Status.FAILED, "caption is empty")])])
    (row,) = from_column(column, [" "], SIZE_PX)
    assert row == Row(None, None, Status.FAILED, "caption is empty")


@pytest.mark.parametrize("num_rows", [0, 1, 9])
def test_the_type_is_the_one_that_is_looked_for(num_rows):
    assert to_column([Row(None, "a", Status.NO_IMAGE, "image is null")] * num_rows).type == DECODED
