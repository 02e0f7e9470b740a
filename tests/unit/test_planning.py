"""Plans of labeling jobs: inputs of any number of files, and inputs that cannot be used."""

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmray.bundle import Bundle
from mmray.config import Columns, LabelConfig
from mmray.errors import DataError, OutputError
from mmray.fingerprints import differences
from mmray.parquet import find_files
from mmray.plan import Plan, find_work
from mmray.planning import labeling_settings, plan_labeling, refuse_inside
from mmray.storage import Folder


def encoded(table):
    target = io.BytesIO()
    pq.write_table(table, target)
    return target.getvalue()


def plan(source, output, bundle_uri, **settings):
    folder, files = find_files(str(source))
    config = LabelConfig(precision="fp32", **settings)
    return plan_labeling(folder, files, Bundle.load(bundle_uri), Folder(str(output)), Columns(), config)


def test_labels_of_a_gpus_pixels_are_kept_apart_from_others(make_bundle, bundle_uri, tmp_path):
    def settings(uri, place):
        return labeling_settings(Bundle.load(uri), Columns(), LabelConfig(precision="fp32", decode=place))

    assert settings(bundle_uri, "pool") == settings(bundle_uri, "beside")
    assert differences(settings(bundle_uri, "pool"), settings(bundle_uri, "gpu")) == [
        "decoder: 'pillow-1' -> 'nvjpeg-1'"
    ]
    captions = make_bundle(tmp_path / "captions", fusion="text")
    assert settings(captions, "gpu") == settings(captions, "pool")


def test_ten_thousand_tiny_files_are_planned_each_with_its_row(draw_rows, bundle_uri, tmp_path):
    data = encoded(draw_rows(1))
    for number in range(10_000):
        folder = tmp_path / "rows" / f"day={number % 100:02}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:05}.parquet").write_bytes(data)
    made = plan(tmp_path / "rows", tmp_path / "out", bundle_uri)
    assert (len(made.files), made.num_rows, made.num_shards) == (10_000, 10_000, 10_000)
    output = Folder(str(tmp_path / "out"))
    assert Plan.load(output) == made
    assert find_work(output, made).num_pending == 10_000
    for file in made.files[::2]:
        target = tmp_path / "out" / file.path
        target.parent.mkdir(exist_ok=True)
        target.touch()
    assert [file for file, _ in find_work(output, made).pending] == list(made.files[1::2])


def twins(rows):
    names = [name if name != "labels" else "caption" for name in rows.column_names]
    return encoded(rows.rename_columns(names))


UNUSABLE = {
    "no columns": (
        lambda rows: encoded(pa.table({})),
        r"no column 'image'; there are none\..*--image-column",
    ),
    "no image column": (
        lambda rows: encoded(rows.drop_columns("image")),
        "no column 'image'.*--image-column",
    ),
    "no caption column": (
        lambda rows: encoded(rows.drop_columns("caption")),
        "no column 'caption'; there are image_id, image, labels. Name the right one with --caption-column",
    ),
    "nested images": (
        lambda rows: encoded(rows.set_column(1, "image", [[[image] for image in rows["image"].to_pylist()]])),
        "column 'image': an image column holds encoded bytes",
    ),
    "numbers for captions": (
        lambda rows: encoded(rows.set_column(2, "caption", [range(rows.num_rows)])),
        "column 'caption': a caption column holds text, not int64",
    ),
    "two columns of a name": (twins, "more than one column is called 'caption'; rename all but one"),
    "no Parquet": (lambda rows: b"image,caption\n" * 99, "no Parquet footer.*--skip-unreadable-files"),
    "nothing": (lambda rows: b"", "no Parquet footer"),
    "cut short": (lambda rows: encoded(rows)[:-9], "no Parquet footer"),
    "damaged footer": (
        lambda rows: encoded(rows)[:-300] + bytes(292) + encoded(rows)[-8:],
        "footer is damaged",
    ),
    "encrypted footer": (lambda rows: encoded(rows)[:-4] + b"PARE", "footer is encrypted"),
}


@pytest.mark.parametrize("harm", UNUSABLE)
def test_a_file_that_cannot_be_used_is_refused_in_one_line_before_anything_is_written(
    draw_rows, bundle_uri, tmp_path, harm
):
    spoil, message = UNUSABLE[harm]
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.parquet").write_bytes(encoded(draw_rows(3)))
    (tmp_path / "rows" / "b.parquet").write_bytes(spoil(draw_rows(3)))
    with pytest.raises(DataError, match=rf"^{tmp_path}/rows/b\.parquet: .*{message}") as caught:
        plan(tmp_path / "rows", tmp_path / "out", bundle_uri)
    assert str(caught.value).isprintable()
    assert not (tmp_path / "out").exists()


def test_files_that_cannot_be_read_are_left_out_if_that_is_asked_for(draw_rows, bundle_uri, tmp_path):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.parquet").write_bytes(encoded(draw_rows(3)))
    for harm in ("no Parquet", "damaged footer", "encrypted footer", "two columns of a name"):
        (tmp_path / "rows" / f"{harm}.parquet").write_bytes(UNUSABLE[harm][0](draw_rows(3)))
    made = plan(tmp_path / "rows", tmp_path / "out", bundle_uri, skip_unreadable_files=True)
    assert [file.path for file in made.files] == ["a.parquet"]
    assert len(made.skipped) == 4


def test_an_input_of_which_no_file_can_be_read_is_refused_also_when_others_are_to_be_skipped(
    bundle_uri, tmp_path
):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.parquet").write_bytes(b"no Parquet" * 9)
    with pytest.raises(DataError, match=r"none of its 1 \.parquet files can be read"):
        plan(tmp_path / "rows", tmp_path / "out", bundle_uri, skip_unreadable_files=True)
    assert not (tmp_path / "out").exists()


def test_files_that_come_later_and_cannot_be_read_are_in_the_plan_as_skipped(draw_rows, bundle_uri, tmp_path):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.parquet").write_bytes(encoded(draw_rows(1)))
    plan(tmp_path / "rows", tmp_path / "out", bundle_uri)
    (tmp_path / "rows" / "b.parquet").write_bytes(b"no Parquet" * 9)
    folder, files = find_files(str(tmp_path / "rows"))
    output, config = Folder(str(tmp_path / "out")), LabelConfig(precision="fp32", skip_unreadable_files=True)
    plan_labeling(folder, files, Bundle.load(bundle_uri), output, Columns(), config, extend=True)
    assert [*Plan.load(output).skipped] == ["b.parquet"]


@pytest.mark.parametrize("paths", [["a//b.parquet"], ["a.parquet", "a.parquet/b.parquet"]])
def test_keys_of_a_store_that_no_folder_could_hold_are_refused(monkeypatch, paths):
    monkeypatch.setattr(Folder, "list", lambda *_: dict.fromkeys(paths, 100))
    with pytest.raises(DataError, match="rename it"):
        find_files("s3://bucket/rows")


def test_an_output_within_its_input_is_refused_however_it_is_written(tmp_path, monkeypatch):
    (tmp_path / "rows").mkdir()
    (tmp_path / "here").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "rows")
    monkeypatch.chdir(tmp_path / "here")
    for output in ("../rows/labels", str(tmp_path / "linked/labels"), "../rows"):
        with pytest.raises(OutputError, match="lies in the input"):
            refuse_inside(Folder(output), Folder(str(tmp_path / "rows")))
    refuse_inside(Folder("../rows-labeled"), Folder(str(tmp_path / "rows")))
    with pytest.raises(OutputError, match="lies in the input"):
        refuse_inside(Folder("s3://bucket/rows/labels"), Folder("s3://bucket/rows"))


def test_folders_that_readers_take_for_a_column_of_the_output_are_told(
    draw_rows, bundle_uri, tmp_path, caplog
):
    (tmp_path / "rows/status=new").mkdir(parents=True)
    (tmp_path / "rows/status=new/country=at.parquet").write_bytes(encoded(draw_rows(3)))
    plan(tmp_path / "rows", tmp_path / "out", bundle_uri)
    assert [line.message for line in caplog.records if "partitioning=None" in line.message] == [
        "the folders status=… are called like a column of the output: read it with partitioning=None"
    ]
