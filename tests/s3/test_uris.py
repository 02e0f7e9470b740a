"""Rows that name their images in a bucket: labeled and read as the rows that hold them."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmray.config import Columns, LabelConfig
from mmray.datasets import Rows
from mmray.errors import DataError
from mmray.labeling import label_dataset
from mmray.storage import Folder
from mmray.verify import verify_dataset

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.fixture
def held(draw_rows):
    """Give rows that hold their images; the last four have none."""
    rows = draw_rows(40)
    images = [*rows["image"].to_pylist()[:36], *[None] * 4]
    return rows.set_column(1, "image", pa.array(images, pa.binary()))


@pytest.fixture
def named(bucket, held):
    """Give a folder of the same rows, which name them: the last four nothing, or what cannot be had."""
    images = Folder(f"{bucket}/images")
    uris = []
    for row, image in enumerate(held["image"].to_pylist()[:36]):
        images.publish(f"ä {row}?#.png", image)
        uris.append(f"{images}/ä {row}?#.png")
    Folder(bucket).publish("private/a.png", held["image"][0].as_py())
    images.publish("empty.png", b"")
    uris += [None, f"{images}/missing.png", f"{bucket}/private/a.png", f"{images}/empty.png"]
    rows = pa.BufferOutputStream()
    pq.write_table(held.set_column(1, "image", pa.array(uris, pa.string())), rows, row_group_size=30)
    Folder(bucket).publish("rows/a.parquet", rows.getvalue().to_pybytes())
    return f"{bucket}/rows"


def test_they_are_labeled_like_rows_that_hold_them(bucket, named, held, bundle_uri, tmp_path):
    columns = Columns(image_prefixes=(f"{bucket}/images",))
    label_dataset(named, bundle_uri, f"{bucket}/labeled", columns, LabelConfig())
    assert verify_dataset(named, f"{bucket}/labeled").problems == []
    (tmp_path / "rows").mkdir()
    pq.write_table(held, tmp_path / "rows" / "a.parquet", row_group_size=30)
    label_dataset(str(tmp_path / "rows"), bundle_uri, str(tmp_path / "labeled"))
    there = pq.read_table(tmp_path / "labeled" / "a.parquet").to_pylist()
    here = pq.read_table(pa.BufferReader(Folder(f"{bucket}/labeled").read("a.parquet"))).to_pylist()
    for row, (one, other) in enumerate(zip(there, here, strict=True)):
        assert one["scores"] == pytest.approx(other["scores"], abs=1e-5), row
    assert [row["status"] for row in here] == [*["ok"] * 36, *["no_image"] * 2, *["bad_image"] * 2]
    for row, reason in zip(
        here[36:], ("is null", "does not exist", "under no --image-prefix", "no bytes"), strict=True
    ):
        assert reason in row["error"]


def test_training_reads_the_images_too(bucket, named, held):
    rows = Rows.find(named, Columns(image_prefixes=(f"{bucket}/images",)))
    read = {row["caption"]: row["image"] for row in rows.dataset(["image", "caption"]).iter_rows()}
    expected = dict(zip(held["caption"].to_pylist(), held["image"].to_pylist(), strict=True))
    empty = held["caption"][39].as_py()  # an object of no bytes is there, and no image
    assert read == expected | {empty: b""}


def test_without_an_allowed_place_they_are_refused_and_nothing_is_fetched(bucket, named, bundle_uri, proxy):
    with pytest.raises(DataError, match="--image-prefix"):
        label_dataset(named, bundle_uri, f"{bucket}/labeled")
