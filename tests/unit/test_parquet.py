"""Footers, cuts into shards, and reading them: every row once, in its own types, whatever the layout."""

import io
import os
import re
from dataclasses import replace
from datetime import datetime
from itertools import chain, pairwise
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmray import parquet
from mmray.errors import DataError
from mmray.parquet import (
    FOOTER_GUESS_BYTES,
    MAX_SHARD_BYTES,
    MAX_SHARD_ROWS,
    DataFile,
    cut_shards,
    describe_files,
    find_files,
    read_footer,
    read_units,
)
from mmray.rowgroups import DAMAGE
from mmray.storage import Folder

SMALL = st.tuples(st.integers(1, 400), st.integers(0, 60 << 20))
ANY = st.tuples(st.integers(1, 12_000), st.integers(0, 3 << 30))
EMPTY = st.tuples(st.just(0), st.sampled_from([0, 1 << 30]))
ROW_GROUPS = st.lists(SMALL | ANY | EMPTY, max_size=30)

light = settings(deadline=None, max_examples=200)
few = settings(deadline=None, max_examples=40)


class Watched(Folder):
    """A folder that notes how many bytes are asked of it at a time."""

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "asked", [])

    def tail(self, path, size, num_bytes):
        self.asked.append(num_bytes)
        return super().tail(path, size, num_bytes)


@pytest.fixture
def folder(tmp_path):
    return Folder(str(tmp_path / "rows"))


def starts_of(row_groups):
    return [0, *np.cumsum([num_rows for num_rows, _ in row_groups]).tolist()]


def write(folder, path, table, row_groups):
    """Write a table as row groups of these numbers of rows, and describe the file."""
    target = io.BytesIO()
    with pq.ParquetWriter(target, table.schema) as writer:
        for first, end in pairwise([0, *np.cumsum(row_groups).tolist()]):
            writer.write_table(table.slice(first, end - first), row_group_size=max(1, end - first))
    folder.publish(path, target.getvalue())
    return describe(folder, path)


def describe(folder, path):
    ((file, _),) = describe_files(folder, {path: folder.list()[path]}, "image")
    return file


def make_table(num_rows):
    rows = np.arange(num_rows)
    return pa.table(
        {
            "row": rows,
            "image": pa.array([b"%d" % row for row in rows], pa.binary()),
            "words": pa.array(
                [["a"] * (row % 4) if row % 5 else None for row in rows], pa.list_(pa.string())
            ),
            "kind": pa.array([f"kind {row // 300}" for row in rows], pa.string()).dictionary_encode(),
            "real": pa.array(np.where(rows % 3 == 0, np.nan, rows), pa.float64()),
        }
    )


@light
@given(ROW_GROUPS)
def test_shards_cover_all_rows_once_and_in_order(row_groups):
    units = cut_shards(row_groups)
    bounds = [shard for unit in units for shard in pairwise(unit)]
    assert bounds[0][0] == 0 and bounds[-1][1] == starts_of(row_groups)[-1]
    assert all(end == first for (_, end), (first, _) in pairwise(bounds))


@light
@given(ROW_GROUPS)
def test_no_shard_is_empty_or_has_more_rows_than_the_limit(row_groups):
    if sum(num_rows for num_rows, _ in row_groups) == 0:
        assert cut_shards(row_groups) == ((0, 0),)
        return
    sizes = [end - first for unit in cut_shards(row_groups) for first, end in pairwise(unit)]
    assert min(sizes) > 0 and max(sizes) <= MAX_SHARD_ROWS


@light
@given(ROW_GROUPS)
def test_units_begin_and_end_where_row_groups_do(row_groups):
    starts = set(starts_of(row_groups))
    assert {row for unit in cut_shards(row_groups) for row in (unit[0], unit[-1])} <= starts


@light
@given(ROW_GROUPS)
def test_row_groups_share_a_shard_only_as_far_as_their_bytes_allow(row_groups):
    starts = starts_of(row_groups)
    for unit in cut_shards(row_groups):
        held = [
            num_bytes
            for (num_rows, num_bytes), first in zip(row_groups, starts, strict=False)
            if num_rows and unit[0] <= first < unit[-1]
        ]
        num_shards = len(unit) - 1
        if len(held) > 1:
            assert num_shards == 1 and sum(held) <= MAX_SHARD_BYTES
        elif held:
            assert num_shards >= min(unit[-1] - unit[0], held[0] / MAX_SHARD_BYTES)


@light
@given(st.lists(SMALL, min_size=2, max_size=30))
def test_neighbours_that_fit_into_one_shard_share_it(row_groups):
    units = cut_shards(row_groups)
    starts = starts_of(row_groups)
    sizes = [
        [group for group, first in zip(row_groups, starts, strict=False) if unit[0] <= first < unit[-1]]
        for unit in units
    ]
    for held, (following, *_) in pairwise(sizes):
        rows, num_bytes = (sum(part) for part in zip(*held, following, strict=True))
        assert rows > MAX_SHARD_ROWS or num_bytes > MAX_SHARD_BYTES


def test_a_large_row_group_becomes_even_shards_of_one_unit():
    assert cut_shards([(10, 0), (2400, 0), (10, 0)]) == ((0, 10), (10, 810, 1610, 2410), (2410, 2420))


def test_a_row_group_of_few_huge_images_is_cut_by_bytes():
    assert cut_shards([(4, 4 * MAX_SHARD_BYTES)]) == ((0, 1, 2, 3, 4),)
    assert cut_shards([(2, 9 * MAX_SHARD_BYTES)]) == ((0, 1, 2),)


@few
@given(st.data())
def test_units_are_read_with_exactly_their_rows_in_any_layout(tmp_path_factory, data):
    folder = Folder(str(tmp_path_factory.mktemp("rows")))
    sizes = st.integers(0, 40) | st.sampled_from([0, 1, 999, 1000, 1001, 2500])
    row_groups = data.draw(st.lists(sizes, max_size=6))
    table = make_table(sum(row_groups))
    with patch.object(parquet, "MAX_SHARD_BYTES", data.draw(st.sampled_from([100, 2000, 1 << 30]))):
        file = write(folder, "a/b.parquet", table, row_groups)
    assert file.num_rows == table.num_rows
    units = [unit for unit in file.units if data.draw(st.booleans())]
    columns = data.draw(st.none() | st.permutations(table.column_names).map(lambda names: names[:2]))
    expected = table if columns is None else table.select(columns)
    read = list(read_units(folder, file, units, columns))
    assert [(first, end) for first, end, _ in read] == [bounds for unit in units for bounds in pairwise(unit)]
    for first, end, rows in read:
        assert rows.schema.names == expected.schema.names
        assert rows.schema.types == [
            pa.list_(pa.field("element", pa.string())) if name == "words" else kind
            for name, kind in zip(expected.schema.names, expected.schema.types, strict=True)
        ]
        assert repr(rows.to_pylist()) == repr(expected.slice(first, end - first).to_pylist())


def test_a_file_without_rows_is_one_empty_shard_with_the_files_columns(folder):
    file = write(folder, "a.parquet", make_table(0), [])
    assert file.shards == [(0, 0)]
    ((first, end, rows),) = read_units(folder, file, file.units)
    assert (first, end, rows.num_rows) == (0, 0, 0)
    assert rows.column_names == make_table(0).column_names


def test_image_bytes_are_counted_of_plain_columns_and_of_structs(folder):
    images = [bytes([row]) * 1000 for row in range(50)]
    plain = pa.table({"image": images, "image_id": [str(row) for row in range(50)]})
    nested = pa.table({"image": [{"bytes": image, "path": None} for image in images]})
    flat = pa.table({"image.bytes": images, "image": ["x"] * 50, "image.bytes2": images})
    for rows, column in ((plain, "image"), (nested, "image"), (flat, "image.bytes")):
        target = io.BytesIO()
        pq.write_table(rows, target)
        folder.publish("a.parquet", target.getvalue())
        ((file, _),) = describe_files(folder, folder.list(), column)
        assert 50_000 <= file.image_bytes < 55_000


def test_a_file_survives_the_way_through_json(folder):
    file = write(folder, "ä [1]/b.parquet", make_table(2100), [1500, 600])
    assert DataFile.from_json(file.to_json()) == file
    assert len(file.shards) == 3


@pytest.mark.parametrize("num_columns", [1, 2000])
def test_a_footer_is_read_in_one_request_and_a_large_one_in_two(tmp_path, num_columns):
    folder = Watched(str(tmp_path))
    table = pa.table({f"a column with a long name {number}": [number] for number in range(num_columns)})
    pq.write_table(table, tmp_path / "a.parquet")
    size = (tmp_path / "a.parquet").stat().st_size
    metadata, sha256 = read_footer(folder, "a.parquet", size)
    assert metadata.schema.to_arrow_schema().names == table.column_names
    assert len(sha256) == 64
    assert folder.asked[0] == FOOTER_GUESS_BYTES
    assert len(folder.asked) == (1 if num_columns == 1 else 2)


def test_a_footer_of_any_length_around_the_first_guess_is_read_whole(folder):
    def write_with(filler):
        file = io.BytesIO()
        with pq.ParquetWriter(file, pa.schema([("a", pa.int64())])) as writer:
            writer.add_key_value_metadata({"filler": filler})
        return file.getvalue()

    length = int.from_bytes(write_with("x" * 10_000)[-8:-4], "little") - 10_000
    for beyond in range(-12, 4):
        filler = "x" * (FOOTER_GUESS_BYTES - length + beyond)
        content = write_with(filler)
        folder.publish("a.parquet", content)
        metadata, _ = read_footer(folder, "a.parquet", len(content))
        assert metadata.metadata[b"filler"].decode() == filler


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 100, -1, -8, -9])
def test_a_file_that_is_cut_short_is_refused_by_path(folder, kept):
    file = io.BytesIO()
    pq.write_table(make_table(50), file)
    data = file.getvalue()[:kept]
    folder.publish("x/a.parquet", data)
    with pytest.raises(DataError, match=r"x/a\.parquet: no Parquet footer"):
        read_footer(folder, "x/a.parquet", len(data))


# Not at random: of some thousand damaged footers, one makes Arrow abort the whole process.
@settings(light, derandomize=True)
@given(st.data())
def test_a_damaged_footer_is_a_data_error_of_one_line_or_is_read(tmp_path_factory, data):
    file = io.BytesIO()
    pq.write_table(make_table(10), file)
    content = bytearray(file.getvalue())
    length = int.from_bytes(content[-8:-4], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        content[-8 - data.draw(st.integers(1, length))] = data.draw(st.integers(0, 255))
    folder = Folder(str(tmp_path_factory.mktemp("rows")))
    folder.publish("a.parquet", bytes(content))
    try:
        describe_files(folder, {"a.parquet": len(content)}, "image")
    except DataError as error:
        assert "a.parquet: the Parquet footer is damaged" in str(error) and "\n" not in str(error)


def test_a_damaged_column_name_is_a_data_error(folder):
    file = io.BytesIO()
    pq.write_table(pa.table({"image": [b""], "caption": ["a"]}), file, store_schema=False)
    for part in (b"caption", b"image"):
        content = bytearray(file.getvalue())
        content[content.rindex(part)] = 0xFF
        folder.publish("a.parquet", bytes(content))
        with pytest.raises(DataError, match=r"a\.parquet: the Parquet footer is damaged"):
            describe_files(folder, folder.list(), "image")


def test_what_is_no_parquet_is_refused_by_path(folder):
    folder.publish("a.parquet", b"image,caption\n" * 1000)
    with pytest.raises(DataError, match=r"a\.parquet: no Parquet footer; the file is damaged or of another"):
        describe_files(folder, folder.list(), "image")


def test_an_encrypted_footer_is_refused_as_such(folder):
    folder.publish("a.parquet", b"PARE" + bytes(100) + (50).to_bytes(4, "little") + b"PARE")
    with pytest.raises(
        DataError, match=r"a\.parquet: its Parquet footer is encrypted; write the file in plain"
    ):
        describe_files(folder, folder.list(), "image")


@pytest.mark.parametrize("names", [["image", "image"], ["image", "a", "a"], ["image", DAMAGE]])
def test_column_names_that_stand_for_two_things_are_refused(folder, names):
    target = io.BytesIO()
    pq.write_table(pa.Table.from_arrays([pa.array([b"1"])] * len(names), names), target)
    folder.publish("a.parquet", target.getvalue())
    with pytest.raises(DataError, match=rf"a\.parquet: .*column .*'{names[-1]}'.*; rename"):
        describe_files(folder, folder.list(), "image")


def test_a_footer_that_contradicts_itself_is_damaged(folder):
    """Rows of the file are one varint of the footer, those of its row group another."""
    target = io.BytesIO()
    pq.write_table(make_table(50), target)
    content = bytearray(target.getvalue())
    length = int.from_bytes(content[-8:-4], "little")
    damaged = 0
    for place in range(len(content) - 8 - length, len(content) - 8):
        if content[place] == 2 * 50:  # zigzag
            changed = bytearray(content)
            changed[place] = 2 * 40
            folder.publish("a.parquet", bytes(changed))
            try:
                ((file, _),) = describe_files(folder, folder.list(), "image")
                assert file.num_rows == 50
            except DataError as error:
                assert re.search(r"a\.parquet: the Parquet footer is damaged \(.* rows, and row", str(error))
                damaged += 1
    assert damaged == 2


def test_a_row_group_of_no_rows_that_claims_bytes_becomes_no_shard():
    assert cut_shards([(0, 1 << 40), (10, 0), (0, 1 << 40)])[0][0] == 0
    assert [*chain(*(pairwise(unit) for unit in cut_shards([(0, 1 << 40), (10, 0)])))] == [(0, 10)]


def test_a_footer_length_beyond_the_file_is_refused(folder):
    folder.publish("a.parquet", b"PAR1" + (1 << 30).to_bytes(4, "little") + b"PAR1")
    with pytest.raises(DataError, match="no Parquet footer"):
        read_footer(folder, "a.parquet", 12)


def test_a_file_that_is_gone_is_refused_by_path(folder):
    file = write(folder, "a.parquet", make_table(5), [5])
    folder.remove(["a.parquet"])
    with pytest.raises(DataError, match=r"a\.parquet: the file is gone"):
        list(read_units(folder, file, file.units))


@pytest.mark.parametrize("num_rows", [4, 5, 6])
def test_a_file_that_changed_since_it_was_planned_is_refused(folder, num_rows):
    file = write(folder, "a.parquet", make_table(5), [5])
    target = io.BytesIO()
    pq.write_table(make_table(num_rows).slice(0, num_rows), target, compression="gzip")
    folder.publish("a.parquet", target.getvalue())
    with pytest.raises(DataError, match=r"a\.parquet"):
        list(read_units(folder, file, file.units))
    with pytest.raises(DataError, match="changed since it was planned"):
        list(read_units(folder, replace(file, size_bytes=len(target.getvalue())), file.units))


def test_hidden_paths_and_other_files_are_no_data(folder):
    data = ["a.parquet", "year=2026/month=1/b.parquet", "x_y/c.d.parquet"]
    others = [
        "_SUCCESS",
        "_mmray/a.parquet",
        "year=2026/_tmp.parquet",
        ".git/a.parquet",
        ".b.parquet",
        "c.csv",
    ]
    for path in (*data, *others):
        folder.publish(path, b"12345")
    found, files = find_files(folder.uri)
    assert found == folder
    assert list(files.items()) == [(path, 5) for path in sorted(data)]


def test_a_single_file_is_an_input_of_its_own(folder):
    for path in ("a/b.parquet", "a/b.parquet.parquet", "a/c.parquet", "a/d/b.parquet"):
        folder.publish(path, b"123")
    found, files = find_files(f"{folder}/a/b.parquet")
    assert found == folder / "a"
    assert files == {"b.parquet": 3}


def test_a_folder_may_be_called_like_a_file(folder):
    folder.publish("rows.parquet/part-0.parquet", b"123")
    found, files = find_files(f"{folder}/rows.parquet")
    assert found == folder / "rows.parquet"
    assert files == {"part-0.parquet": 3}


NAMES = [
    " a b ",
    "100%25",
    "k=v",
    "a\nb",
    "?x#y",
    "\u00e9\u0301 \u202e",
    "[*]",
    "'\"\\",
    "a:b@c",
    "~",
    "a\x1b[2J",
]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_files_and_folders_may_have_any_name_that_is_text(folder, name):
    table = make_table(10)
    file = write(folder, f"{name}/{name}.parquet", table, [10])
    inside = Folder(folder.uri) / name
    for found in (find_files(folder.uri), find_files(inside.uri), find_files(f"{inside}/{name}.parquet")):
        ((described, _),) = describe_files(*found, "image")
        assert replace(described, path=file.path) == file
        assert found[0].read(described.path) == folder.read(file.path)
    ((_, _, rows),) = read_units(folder, file, file.units)
    assert rows["row"].to_pylist() == list(range(10))
    folder.publish(file.path, b"no Parquet")
    with pytest.raises(DataError, match="no Parquet footer") as caught:
        describe_files(folder, folder.list(), "image")
    assert str(caught.value).isprintable()


def test_a_file_whose_name_is_no_text_is_refused_in_one_line(folder):
    folder.publish("a.parquet", b"123")
    try:
        os.rename(folder.path("a.parquet"), folder.path("b.parquet").encode() + b"\xe9.parquet")
    except OSError:
        pytest.skip("the disk takes no such names")
    with pytest.raises(DataError, match=r"the name of a file in it is not UTF-8 .*; rename it") as caught:
        find_files(folder.uri)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("path", ["", "/nothing", "/a.parquet", "/b.csv"])
def test_an_input_without_data_is_refused_by_its_uri(folder, path):
    folder.publish("b.csv", b"1")
    folder.publish("_old/a.parquet", b"1")
    with pytest.raises(DataError, match=r"no \.parquet file there") as caught:
        find_files(folder.uri + path)
    assert folder.uri + path in str(caught.value)


def damage(folder, path, group, name, *, share=1.0):
    """Zero the bytes of a column in a row group, or the last share of them."""
    content = bytearray(folder.read(path))
    metadata = pq.read_metadata(pa.BufferReader(folder.read(path)))
    chunks = [metadata.row_group(group).column(index) for index in range(metadata.num_columns)]
    for chunk in (chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] == name):
        start = min(filter(None, (chunk.dictionary_page_offset, chunk.data_page_offset)))
        size = int(chunk.total_compressed_size * share)
        end = start + chunk.total_compressed_size
        content[end - size : end] = bytes(size)
    folder.publish(path, bytes(content))


@pytest.mark.parametrize("name", ["row", "image", "words", "kind"])
def test_rows_of_a_damaged_row_group_are_given_with_the_reason_and_what_can_be_read(folder, name):
    table = make_table(900)
    file = write(folder, "a.parquet", table, [300, 300, 300])
    damage(folder, "a.parquet", 1, name)
    with pytest.raises(DataError, match=rf"a\.parquet: row group 1 is damaged \(column {name}: "):
        list(read_units(folder, file, file.units))
    read = pa.concat_tables(rows for _, _, rows in read_units(folder, file, file.units, salvage=True))
    reasons = read[DAMAGE].to_pylist()
    assert [bool(reason) for reason in reasons] == [False] * 300 + [True] * 300 + [False] * 300
    assert reasons[300].startswith(f"row group 1 is damaged (column {name}: ")
    for column in table.column_names:
        expected = table[column].to_pylist()
        if column == name:
            expected[300:600] = [None] * 300
        assert repr(read[column].to_pylist()) == repr(expected)  # NaN equals nothing, its text does


def test_a_large_row_group_that_ends_in_damage_gives_all_its_rows(folder):
    table = make_table(2500)
    folder.publish("a.parquet", b"")
    pq.write_table(table, folder.path("a.parquet"), row_group_size=2500, data_page_size=2000)
    file = describe(folder, "a.parquet")
    name = table.column_names[0]
    damage(folder, "a.parquet", 0, name, share=0.4)
    parts = list(read_units(folder, file, file.units, salvage=True))
    assert [(first, end) for first, end, _ in parts] == file.shards
    assert all(rows.num_rows == end - first for first, end, rows in parts)
    reasons = pa.concat_tables(rows for _, _, rows in parts)[DAMAGE]
    assert reasons[-1].is_valid


def test_a_damaged_struct_of_required_values_is_null_and_can_be_written(folder, tmp_path):
    """As Spark writes its primitives."""
    kind = pa.struct([pa.field("a", pa.int32(), nullable=False)])
    table = pa.table({"kept": range(20), "size": pa.array([{"a": row} for row in range(20)], kind)})
    file = write(folder, "a.parquet", table, [10, 10])
    damage(folder, "a.parquet", 1, "size")
    ((_, _, rows),) = read_units(folder, file, file.units, salvage=True)
    pq.write_table(rows, tmp_path / "written.parquet")
    written = pq.read_table(tmp_path / "written.parquet")
    assert written["size"].to_pylist() == [{"a": row} for row in range(10)] + [None] * 10


def test_damaged_structs_of_other_kinds_are_null_too(folder, tmp_path):
    inner = pa.array(["x", "y"] * 10).dictionary_encode()
    ids = pa.array([bytes([row]) * 16 for row in range(20)], pa.uuid())
    table = pa.table({"kept": range(20), "size": pa.StructArray.from_arrays([inner, ids], ["word", "id"])})
    file = write(folder, "a.parquet", table, [10, 10])
    damage(folder, "a.parquet", 1, "size")
    ((_, _, rows),) = read_units(folder, file, file.units, salvage=True)
    pq.write_table(rows.combine_chunks(), tmp_path / "written.parquet")
    assert pq.read_table(tmp_path / "written.parquet")["size"].to_pylist()[10:] == [None] * 10


def test_a_file_that_is_overwritten_while_it_is_read_is_not_taken_for_damaged(folder):
    file = write(folder, "a.parquet", make_table(2000), [1000, 1000])
    reading = read_units(folder, file, file.units, salvage=True)
    next(reading)
    content = folder.read("a.parquet")
    with open(folder.path("a.parquet"), "r+b") as overwritten:
        overwritten.write(bytes(len(content) - 4000))
        overwritten.write(content[-4000:].replace(b"parquet-cpp", b"parquet-CPP"))
    with pytest.raises(DataError, match=r"a\.parquet has changed since it was planned"):
        next(reading)


def test_timestamps_of_96_bits_reach_as_far_as_their_years(folder):
    """As Spark writes them; dates without an end are often of the year 9999."""
    times = [datetime(9999, 12, 31), datetime(1, 1, 1), datetime(2026, 11, 28, 7, 28, 34, 123456), None]
    target = io.BytesIO()
    pq.write_table(
        pa.table({"until": times, "image": [b""] * 4}), target, use_deprecated_int96_timestamps=True
    )
    folder.publish("a.parquet", target.getvalue())
    ((file, schema),) = describe_files(folder, folder.list(), "image")
    ((_, _, rows),) = read_units(folder, file, file.units)
    assert rows["until"].to_pylist() == times
    assert rows.schema.equals(schema)


def test_storage_that_fails_is_not_taken_for_damage(folder):
    class Failing(Folder):
        def open(self, path, size=None):
            class File(io.BytesIO):
                def read(self, *size):
                    raise ConnectionResetError(104, "Connection reset by peer")

            return File(super().open(path).read())

    write(folder, "a.parquet", make_table(20), [20])
    file = describe(folder, "a.parquet")
    with pytest.raises(ConnectionResetError):
        list(read_units(Failing(folder.uri), file, file.units, salvage=True))


def test_a_file_that_is_damaged_only_in_passing_is_read_whole(folder):
    class Passing(Folder):
        """A folder whose first opening reads zeros."""

        def open(self, path, size=None):
            content = super().open(path).read()
            first = not getattr(self, "opened", False)
            object.__setattr__(self, "opened", True)
            return io.BytesIO(bytes(len(content)) if first else content)

    table = make_table(50)
    write(folder, "a.parquet", table, [25, 25])
    file = describe(folder, "a.parquet")
    [(_, _, rows)] = read_units(Passing(folder.uri), file, file.units, salvage=True)
    assert rows[DAMAGE].null_count == 50
    assert repr(rows.drop_columns(DAMAGE).to_pylist()) == repr(table.to_pylist())


def test_unreadable_files_are_left_out_only_if_that_is_asked_for(folder):
    write(folder, "a.parquet", make_table(20), [20])
    folder.publish("b.parquet", b"PAR1 no footer")
    files = folder.list()
    with pytest.raises(DataError, match=r"b\.parquet: no Parquet footer"):
        describe_files(folder, files, "image")
    unreadable = {}
    assert [file.path for file, _ in describe_files(folder, files, "image", unreadable)] == ["a.parquet"]
    assert list(unreadable) == ["b.parquet"]
    assert "no Parquet footer" in unreadable["b.parquet"]
