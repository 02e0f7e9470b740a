"""Raw layouts to files, through Ray."""

import hashlib
import io
import json
import runpy

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

from mmray import prepare
from mmray.prepare import prepare_coco, prepare_folder, prepare_kaggle

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.fixture
def images(tmp_path):
    """Give a folder of twelve images, in two formats and two folders, beside other files."""
    for number in range(12):
        path = (
            tmp_path
            / "images"
            / ("a" if number % 2 else "b/c")
            / f"{number:02d}.{'JPG' if number % 3 else 'png'}"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), (20 * number, 0, 0)).save(buffer, "PNG" if number % 3 == 0 else "JPEG")
        path.write_bytes(buffer.getvalue())
    (tmp_path / "images" / "notes.txt").write_text("not an image")
    return tmp_path / "images"


def paths_of(images):
    return sorted(str(path.relative_to(images)) for path in images.rglob("*.*") if path.suffix != ".txt")


def digests(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*.*")
    }


def test_the_kaggle_set_keeps_every_row_in_order_and_reports_the_missing_images(coco18, tmp_path):
    raw, output = coco18 / "raw", tmp_path / "out"
    command = [
        "kaggle",
        "--csv",
        str(raw / "train.csv"),
        "--images",
        str(raw / "data"),
        "--output",
        str(output),
    ]
    result = CliRunner().invoke(runpy.run_path("jobs/prepare.py")["main"], command)
    assert result.exit_code == 0, result.output
    lines = [" ".join(line.split()) for line in result.output.splitlines()]
    for line in ("26,000 rows written", "300 with an image", "25,700 images missing", "0 images unreadable"):
        assert line in lines
    assert "100 images in the folder that no row names" in lines

    file = pq.ParquetFile(output / "part-00000.parquet")
    assert max(file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)) <= 1000
    table = file.read()
    assert table.schema.names == ["image_id", "image", "caption", "labels"]
    assert table.schema.types == [
        pa.string(),
        pa.binary(),
        pa.string(),
        pa.list_(pa.field("element", pa.int64())),
    ]
    assert table["image_id"].to_pylist() == [f"{number}.jpg" for number in range(26_000)]
    present = {row["image_id"]: row["image"] for row in table.to_pylist() if row["image"] is not None}
    assert len(present) == 300
    assert all((raw / "data" / name).read_bytes() == data for name, data in present.items())

    captions = table["caption"].to_pylist()
    assert captions[23] == "A man tossing an orange frisbee on top of a lush green field."
    assert captions[1338] == 'A man surfing with titling that reads "spray."'
    assert captions[6751] == "Red motor \nscooter parked on the sand with a sunset in background."
    assert table["labels"][2259].as_py() == [1, 3]
    rejected = [json.loads(line) for line in (output / "_prepare/rejected.jsonl").read_text().splitlines()]
    assert [row["image_id"] for row in rejected] == [
        f"{n}.jpg" for n in range(26_000) if f"{n}.jpg" not in present
    ]


def test_a_folder_becomes_a_row_per_image_without_labels(images, tmp_path):
    prepared = prepare_folder(str(images), str(tmp_path / "out"))
    table = pq.read_table(tmp_path / "out/part-00000.parquet")
    assert table.schema.names == ["image_id", "image", "caption"]
    assert table.schema.field("caption").type == pa.string()
    assert table["image_id"].to_pylist() == paths_of(images)
    assert table["image"].to_pylist() == [(images / path).read_bytes() for path in paths_of(images)]
    assert (prepared.num_rows, prepared.num_missing, prepared.num_left_out, prepared.labels) == (12, 0, 0, {})
    assert (tmp_path / "out/_prepare/rejected.jsonl").read_text() == ""


def test_a_csv_names_the_rows_of_a_folder_and_its_faults_are_counted(images, tmp_path):
    first, second, *_ = paths_of(images)
    (images / second).write_bytes(b"damaged")
    table = tmp_path / "rows.csv"
    table.write_text(
        f'image,caption,labels\n{second},"b, ""c""",dog|cat\n./{first},,\nnone.png,x,7\n{second},again,dog\n'
    )
    prepared = prepare_folder(str(images), str(tmp_path / "out"), str(table))
    rows = pq.read_table(tmp_path / "out/part-00000.parquet").drop_columns("image").to_pylist()
    assert rows == [
        {"image_id": second, "caption": 'b, "c"', "labels": ["dog", "cat"]},
        {"image_id": f"./{first}", "caption": None, "labels": []},
        {"image_id": "none.png", "caption": "x", "labels": ["7"]},
        {"image_id": second, "caption": "again", "labels": ["dog"]},
    ]
    assert prepared.num_rows == 4
    assert prepared.num_with_image == 3
    assert prepared.num_missing == 1
    assert prepared.num_unreadable == 2
    assert prepared.num_duplicates == 1
    assert prepared.num_left_out == 10
    assert prepared.labels == {"7": 1, "cat": 1, "dog": 2}
    assert prepared.num_bytes == (tmp_path / "out/part-00000.parquet").stat().st_size


def test_many_parts_hold_the_source_in_order_and_a_second_run_writes_the_same_bytes(
    images, tmp_path, monkeypatch
):
    monkeypatch.setattr(prepare, "PART_ROWS", 5)
    prepared = prepare_folder(str(images), str(tmp_path / "out"))
    files = sorted((tmp_path / "out").glob("*.parquet"))
    assert [file.name for file in files] == [f"part-{number:05d}.parquet" for number in range(3)]
    assert [pq.read_metadata(file).num_rows for file in files] == [5, 5, 2]
    assert [name for file in files for name in pq.read_table(file)["image_id"].to_pylist()] == paths_of(
        images
    )
    before = digests(tmp_path / "out")
    assert prepare_folder(str(images), str(tmp_path / "out")) == prepared
    assert digests(tmp_path / "out") == before


def test_the_split_is_by_image_id_so_that_neither_order_nor_the_other_rows_matter(images, tmp_path):
    names = [f"{number}.jpg" for number in range(300)]
    table = tmp_path / "train.csv"
    table.write_text(
        "ImageID,Labels,Caption\n" + "".join(f'{name},,"one"\n{name},4,"two"\n' for name in names)
    )
    prepared = prepare_kaggle(str(table), str(images), str(tmp_path / "out"), val_fraction=0.2)
    sides = {side: pq.read_table(tmp_path / "out" / side / "part-00000.parquet") for side in ("train", "val")}
    ids = {side: rows["image_id"].to_pylist() for side, rows in sides.items()}
    assert sides["train"].schema == sides["val"].schema
    assert not set(ids["train"]) & set(ids["val"])
    assert ids["train"] == [name for name in names for _ in range(2) if name in set(ids["train"])]
    assert len(ids["train"]) + len(ids["val"]) == prepared.num_rows == 600
    assert 0.1 < len(ids["val"]) / 600 < 0.3
    assert prepared.num_duplicates == 300

    table.write_text("ImageID,Caption\n" + "".join(f'{name},"one"\n' for name in reversed(names[:150])))
    prepare_kaggle(str(table), str(images), str(tmp_path / "again"), val_fraction=0.2)
    again = pq.read_table(tmp_path / "again/val/part-00000.parquet")["image_id"].to_pylist()
    assert set(again) == set(ids["val"]) & set(names[:150])


def test_coco_is_prepared_with_names_for_labels(images, tmp_path):
    named = [{"id": number, "file_name": path} for number, path in enumerate(paths_of(images))]
    annotations = [{"image_id": 3, "category_id": 2}, {"image_id": 3, "category_id": 1}]
    categories = [{"id": 1, "name": "traffic light"}, {"id": 2, "name": "dog"}]
    instances, captions = tmp_path / "instances.json", tmp_path / "captions.json"
    instances.write_text(json.dumps({"images": named, "annotations": annotations, "categories": categories}))
    captions.write_text(json.dumps({"annotations": [{"image_id": 3, "caption": "a dog at a light"}]}))
    prepared = prepare_coco(str(instances), str(captions), str(images), str(tmp_path / "out"))
    table = pq.read_table(tmp_path / "out/part-00000.parquet")
    assert table["image_id"].to_pylist() == [str(number) for number in range(12)]
    assert table["image"].null_count == 0
    assert table["labels"].to_pylist() == [["dog", "traffic light"] if n == 3 else [] for n in range(12)]
    assert table["caption"].to_pylist() == ["a dog at a light" if n == 3 else None for n in range(12)]
    assert prepared.labels == {"dog": 1, "traffic light": 1}
