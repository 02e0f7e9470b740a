"""Raw layouts to rows, rows to parts, a part to its file: all without Ray."""

import io
import json
import re
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmray import prepare
from mmray.errors import ConfigError, DataError, OutputError
from mmray.layouts import Row, coco_rows, csv_rows, kaggle_rows
from mmray.prepare import cut, prepare_folder, prepare_kaggle, write_part
from mmray.storage import Folder

light = settings(deadline=None, max_examples=200)

RECORD_START = re.compile(
    r'^[^,"\r\n]+\.(jpg|jpeg|png|webp|gif|bmp|tiff?|avif),', re.IGNORECASE | re.MULTILINE
)
CAPTIONS = st.text(st.sampled_from('abc.jpg1,"" \r\n\t')) | st.text(st.characters(codec="utf-8"))
LABELS = st.lists(st.integers(1, 19).map(str), max_size=4).map(tuple)


def jpeg(side_px: int = 8) -> bytes:
    """Give an encoded image of noise."""
    pixels = np.random.default_rng(side_px).integers(0, 255, (side_px, side_px, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


@light
@given(
    st.lists(
        st.tuples(LABELS, CAPTIONS.filter(lambda text: not RECORD_START.search(text[text.find("\n") + 1 :])))
    ),
    st.sampled_from(["\n", "\r\n", "\n\n", " \n\n\n"]),
    st.booleans(),
)
def test_every_kaggle_caption_between_quotes_survives_to_the_letter(drawn, end, labeled):
    lines = ["ImageID,Labels,Caption" if labeled else "ImageID,Caption"]
    for number, (labels, caption) in enumerate(drawn):
        lines.append(f"{number}.jpg," + (" ".join(labels) + "," if labeled else "") + f'"{caption}"')
    rows = list(kaggle_rows(end.join([*lines, ""]), "train.csv"))
    names = [f"{number}.jpg" for number in range(len(drawn))]
    captions = [caption or None for _, caption in drawn]
    expected_labels = [labels if labeled else None for labels, _ in drawn]
    assert rows == list(map(Row, names, names, captions, expected_labels))


def test_white_space_around_a_kaggle_caption_falls_away_and_the_inside_stays():
    text = (
        'ImageID,Caption\n0.jpg, " a ""b"" \n\n c " \n\n1.PNG,no quotes, but a comma \n\n2.jpg,\n3.jpg,""\n'
    )
    captions = [row.caption for row in kaggle_rows(text, "test.csv")]
    assert captions == [' a ""b"" \n\n c ', "no quotes, but a comma", None, None]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected ImageID,Labels,Caption"),
        ("image,caption\n0.jpg,a\n", "expected ImageID,Labels,Caption"),
        ('ImageID,Caption\nlost line\n0.jpg,"a"\n', "line 2: 'lost line'"),
        ('ImageID,Labels,Caption\n0.jpg,"a, b"\n', "'0.jpg' has no labels"),
    ],
)
def test_another_layout_than_kaggles_is_refused_by_name(text, message):
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        list(kaggle_rows(text, "raw/train.csv"))
    assert str(caught.value).startswith("raw/train.csv")


def coco(**changes) -> tuple[str, str]:
    """Give instances and captions with three images, the last of which has no annotation."""
    instances = {
        "images": [{"id": i, "file_name": f"{i:012d}.jpg"} for i in (7, 3, 5)],
        "annotations": [{"image_id": 3, "category_id": c} for c in (18, 1, 18)]
        + [{"image_id": 7, "category_id": 1}],
        "categories": [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}],
    }
    captions = {
        "annotations": [
            {"image_id": i, "caption": c} for i, c in ((3, "first"), (7, 'a "b"\n'), (3, "second"))
        ]
    }
    return json.dumps(instances | changes), json.dumps(captions)


def test_coco_gives_one_row_per_image_in_its_order_with_sorted_names_and_the_first_caption():
    assert coco_rows(*coco(), "instances.json") == [
        Row("7", "000000000007.jpg", 'a "b"\n', ("person",)),
        Row("3", "000000000003.jpg", "first", ("dog", "person")),
        Row("5", "000000000005.jpg", None, ()),
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"categories": []}, "KeyError(18)"),
        ({"images": [{"id": 1}]}, "file_name"),
        ({"images": 5}, "TypeError"),
    ],
)
def test_coco_without_what_its_layout_has_is_refused(changes, message):
    with pytest.raises(DataError, match=re.escape(message)):
        coco_rows(*coco(**changes), "instances.json")


def test_coco_that_is_not_json_is_refused():
    with pytest.raises(DataError, match=r"captions\.json"):
        coco_rows(coco()[0], "{", "instances.json with captions.json")


def test_csv_takes_quoted_captions_and_both_separators_of_labels():
    text = (
        'labels,image,caption\r\n1 2,a.jpg,"one ""two"",\nthree"\r\nstop sign|dog|,b/c.png,\r\n,d.gif,x\r\n'
    )
    assert list(csv_rows(text, "rows.csv")) == [
        Row("a.jpg", "a.jpg", 'one "two",\nthree', ("1", "2")),
        Row("b/c.png", "b/c.png", None, ("stop sign", "dog")),
        Row("d.gif", "d.gif", "x", ()),
    ]


def test_csv_without_captions_and_labels_gives_rows_without_them():
    assert list(csv_rows("image\na.jpg\n\nb.jpg\n", "rows.csv")) == [
        Row("a.jpg", "a.jpg"),
        Row("b.jpg", "b.jpg"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected the columns"),
        ("path,caption\n", "expected the columns"),
        ("image,captions\na.jpg,x\n", "expected the columns"),
        ("image,caption\na.jpg,x\nb.jpg,x,y\n", "line 3"),
        ("image,caption\na.jpg\n", "line 2"),
        ('image,caption\na.jpg,"x\nb.jpg,y\n', "after line 1"),
    ],
)
def test_a_malformed_csv_is_refused_with_its_line(text, message):
    with pytest.raises(DataError, match=message):
        list(csv_rows(text, "rows.csv"))


@light
@given(st.lists(st.integers(0, 12)), st.integers(1, 10), st.integers(1, 4))
def test_cuts_keep_order_and_limits_and_leave_no_two_runs_that_fit_into_one(sizes, most_bytes, most_rows):
    runs = [sizes[run] for run in cut(sizes, most_bytes, most_rows)]
    assert [size for run in runs for size in run] == sizes
    for run in runs:
        assert len(run) == 1 or (sum(run) <= most_bytes and len(run) <= most_rows)
    for run, following in pairwise(runs):
        assert len(run) == most_rows or sum(run) + following[0] > most_bytes


@pytest.mark.parametrize(
    "path",
    [
        "../0.jpg",
        "a/../../0.jpg",
        "/etc/0.jpg",
        "..\\0.jpg",
        "a\\0.jpg",
        "C:0.jpg",
        "http://host/0.jpg",
        "s3://b/0.jpg",
    ],
)
@pytest.mark.parametrize("layout", ["kaggle", "csv"])
def test_a_path_that_leaves_the_images_is_refused_with_its_record(tmp_path, path, layout):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.jpg").write_bytes(jpeg())
    table = tmp_path / "rows.csv"
    table.write_text(f"{'ImageID,Caption' if layout == 'kaggle' else 'image,caption'}\n0.jpg,a\n{path},b\n")
    images, output = str(tmp_path / "images"), str(tmp_path / "out")
    with pytest.raises(DataError) as caught:
        if layout == "kaggle":
            prepare_kaggle(str(table), images, output)
        else:
            prepare_folder(images, output, str(table))
    assert f"{table} record 2: {path!r} leads out of" in str(caught.value)


def test_what_cannot_be_prepared_is_refused_before_anything_is_written(tmp_path):
    images, output, table = tmp_path / "images", tmp_path / "out", tmp_path / "train.csv"
    images.mkdir()
    arguments = str(table), str(images), str(output)
    with pytest.raises(DataError, match="no such file"):
        prepare_kaggle(*arguments)
    table.write_text("ImageID,Caption\n")
    with pytest.raises(DataError, match="no images there"):
        prepare_kaggle(*arguments)
    (images / "0.jpg").write_bytes(jpeg())
    with pytest.raises(DataError, match="no rows"):
        prepare_kaggle(*arguments)
    table.write_text("ImageID,Caption\n0.jpg,a\n")
    with pytest.raises(DataError, match="one side"):
        prepare_kaggle(*arguments, val_fraction=0.5)
    with pytest.raises(ConfigError, match="--val-fraction"):
        prepare_kaggle(*arguments, val_fraction=1.5)
    table.write_bytes(b"ImageID,Caption\n0.jpg,caf\xe9\n")
    with pytest.raises(DataError, match="UTF-8"):
        prepare_kaggle(*arguments)
    assert not output.exists()


def test_text_that_is_no_unicode_is_refused(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.jpg").write_bytes(jpeg())
    instances, captions = tmp_path / "instances.json", tmp_path / "captions.json"
    instances.write_text(coco()[0])
    captions.write_text(r'{"annotations": [{"image_id": 3, "caption": "\ud800"}]}')
    with pytest.raises(DataError, match=r"record 2: .* Unicode"):
        prepare.prepare_coco(str(instances), str(captions), str(tmp_path / "images"), str(tmp_path / "out"))


def test_an_output_with_other_parquet_files_is_refused_and_stays(tmp_path):
    images, stranger = tmp_path / "images", tmp_path / "out" / "part-00001.parquet"
    images.mkdir()
    (images / "0.jpg").write_bytes(jpeg())
    stranger.parent.mkdir()
    stranger.write_bytes(b"of another run")
    with pytest.raises(OutputError, match=r"part-00001\.parquet"):
        prepare_folder(str(images), str(stranger.parent))
    assert [path.name for path in stranger.parent.iterdir()] == ["part-00001.parquet"]


def part_of(sizes: dict[str, int | None]) -> pa.Table:
    """Give a part without labels, with a row for each path."""
    rows = [
        {
            "image_id": path,
            "caption": f"of {path}",
            "file": "x/part-00000.parquet",
            "path": path,
            "size": size,
        }
        for path, size in sizes.items()
    ]
    names = ["image_id", "image", "caption", "file", "path", "size"]
    types = [pa.string(), pa.binary(), pa.string(), pa.string(), pa.string(), pa.int64()]
    return pa.Table.from_pylist(rows, pa.schema(list(zip(names, types, strict=True))))


def test_a_part_becomes_a_file_in_which_bad_rows_keep_their_place(tmp_path):
    images, output = Folder(str(tmp_path / "images")), Folder(str(tmp_path / "out"))
    contents = {
        "a.jpg": jpeg(),
        "broken.jpg": jpeg()[:200],
        "text.png": b"no image",
        "empty.jpg": b"",
        "z.jpg": jpeg(9),
    }
    for path, data in contents.items():
        images.publish(path, data)
    sizes = {"gone.jpg": 5, **{path: len(data) for path, data in contents.items()}, "never.jpg": None}
    rejected = write_part(part_of(sizes), images, output).to_pylist()
    table = pq.read_table(tmp_path / "out/x/part-00000.parquet")
    assert table.column_names == ["image_id", "image", "caption"]
    assert table["image_id"].to_pylist() == list(sizes)
    assert table["image"].to_pylist() == [None, *contents.values(), None]
    assert table["caption"].to_pylist() == [f"of {path}" for path in sizes]
    missing = {row["image_id"]: row["missing"] for row in rejected}
    assert missing == {
        "gone.jpg": True,
        "broken.jpg": False,
        "text.png": False,
        "empty.jpg": False,
        "never.jpg": True,
    }
    assert {row["file"] for row in rejected} == {"x/part-00000.parquet"}


def test_row_groups_keep_their_limits_and_a_larger_image_has_one_to_itself(tmp_path, monkeypatch):
    images, output = Folder(str(tmp_path / "images")), Folder(str(tmp_path / "out"))
    contents = {f"{number}.jpg": jpeg(side_px) for number, side_px in enumerate([8, 8, 64, 8, 8, 8, 8])}
    for path, data in contents.items():
        images.publish(path, data)
    monkeypatch.setattr(prepare, "GROUP_BYTES", 2 * len(jpeg(8)))
    monkeypatch.setattr(prepare, "GROUP_ROWS", 3)
    sizes = {path: len(data) for path, data in contents.items()} | {f"{n}.jpg": None for n in range(7, 12)}
    write_part(part_of(sizes), images, output)
    file = pq.ParquetFile(tmp_path / "out/x/part-00000.parquet")
    groups = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
    assert groups == [2, 1, 2, 3, 3, 1]
    assert file.read()["image"].to_pylist() == [*contents.values(), *[None] * 5]
