"""An archive of every kind of bad row, each between good ones: it costs itself, and says why."""

import io
import json
import re
import runpy
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

from mmray.columns import text_values
from mmray.config import Columns, LabelConfig, ModelConfig
from mmray.datasets import Rows, count_labels, decode_rows, sample_captions
from mmray.evaluate import evaluate_model, evaluate_predictions
from mmray.labeler import Labeler
from mmray.labeling import label_dataset
from mmray.selection import as_lists
from mmray.verify import verify_dataset

pytestmark = pytest.mark.usefixtures("cluster")

JOBS = Path(__file__).parents[2] / "jobs"
CONFIG = LabelConfig(max_failed_fraction=0.2)
PLAIN, VIEWS, CODED = "plain.parquet", "100% é\n/[k=v] ?#.parquet", "a/b/c/d=1/coded.parquet"


def encoded(kind="JPEG", mode="RGB", size=(40, 30), **settings):
    pixels = np.random.default_rng(1).integers(0, 256, (*size[::-1], 3), np.uint8)
    target = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(target, kind, **settings)
    return target.getvalue()


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(exif=exif)


def deep():
    target = io.BytesIO()
    Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50).save(target, "PNG")
    return target.getvalue()


def huge(side, scanlines=b"\0"):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(scanlines))
    return b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")


BROKEN, LARGE = "image cannot be decoded: ", "limit of 89478485"
# What a row gets for its image or its caption, the status that follows, and the beginning of its reason.
IMAGES = {
    "truncated JPEG": (encoded()[:-200], "bad_image", BROKEN),
    "zero bytes": (b"", "bad_image", "image has no bytes"),
    "zeros": (bytes(500), "bad_image", BROKEN),
    "text file": (b"image,caption\n" * 9, "bad_image", f"{BROKEN}not an image of a known format"),
    "null": (None, "no_image", "image is null"),
    "20,000 x 20,000": (huge(20_000), "bad_image", BROKEN + f"it has more pixels than the {LARGE}"),
    "above the limit": (huge(10_000), "bad_image", f"image of 10000x10000 pixels is above the {LARGE}"),
    "bomb": (huge(20_000, bytes(2501 * 20_000)), "bad_image", BROKEN),
    "CMYK": (encoded(mode="CMYK"), "ok", None),
    "palette": (encoded("PNG", "P"), "ok", None),
    "16 bits": (deep(), "ok", None),
    "grayscale": (encoded(mode="L"), "ok", None),
    "animated": (encoded("GIF", save_all=True, append_images=[Image.new("RGB", (40, 30))]), "ok", None),
    "turned": (turned(), "ok", None),
    "1 x 1": (encoded("PNG", size=(1, 1)), "ok", None),
}
CAPTIONS = {
    "null": (None, "no_caption", "caption is null"),
    "empty": (b"", "no_caption", "caption is empty"),
    "white space": (b" \t\r\n", "no_caption", "caption is empty"),
    "100 kB": (b"the beach " * 10_000, "ok", None),
    "a word of 100 kB": (b"x" * 100_000, "ok", None),
    "Latin-1": ("a caf\xe9 in the city".encode("latin-1"), "ok", None),
    "no UTF-8 at all": (b"\xff\xfe\x80", "ok", None),
    "half a pair": (b"the city \xed\xa0\xbd", "ok", None),
    "control characters": (b"the \0\x01\x1b[2J\x7f city\x0b", "ok", None),
}


class Sick(NamedTuple):
    """The archive: what was done to which row, and its label in the tests' messages."""

    folder: Path
    bad: dict[int, tuple[str, str, str | None]]
    """Row -> kind, status, beginning of the reason; all other rows are good. The same in each file."""
    num_rows: int


@pytest.fixture(scope="module")
def sick(draw_rows, tmp_path_factory):
    """Every second row is bad, the last two are the first two again. One file for each layout of text."""
    kinds = [("image", *kind) for kind in IMAGES.items()] + [("caption", *kind) for kind in CAPTIONS.items()]
    good = draw_rows(2 * len(kinds) + 3, 1)
    values = {name: good[name].cast(pa.binary()).to_pylist() for name in ("image", "caption")}
    bad = {}
    for row, (column, kind, (value, status, reason)) in enumerate(kinds):
        values[column][2 * row + 1] = value
        bad[2 * row + 1] = (f"{column}: {kind}", status, reason)
    values["image"][-2], values["caption"][-2] = None, b""
    bad[good.num_rows - 2] = ("nothing", "failed", "image is null; caption is empty")
    places = [*range(good.num_rows), 0, 1, good.num_rows - 2]
    bad |= {row: bad[place] for row, place in enumerate(places) if place in bad}
    text = pa.array(values["caption"], pa.binary()).view(pa.string())
    rows = pa.table(
        {
            "image": pa.array(values["image"], pa.binary()),
            "caption": text,
            "labels": good["labels"],
            "notes": pa.StructArray.from_arrays([text, pa.array([np.nan] * len(text))], ["text", "number"]),
        }
    ).take(pa.array(places))
    views = {"image": pa.binary_view(), "caption": pa.string_view()}
    coded = {"image": pa.large_binary(), "caption": pa.dictionary(pa.int32(), pa.string())}
    folder = tmp_path_factory.mktemp("sick") / "rows"
    for path, types in ((PLAIN, {}), (VIEWS, views), (CODED, coded)):
        table = rows
        for name, kind in types.items():
            column = table[name].combine_chunks()
            table = table.set_column(table.schema.get_field_index(name), name, column.cast(kind))
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, folder / path, row_group_size=20)
    return Sick(folder, bad, len(places))


@pytest.fixture(scope="module")
def output(sick, bundle_uri, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sick") / "labeled"
    label_dataset(str(sick.folder), bundle_uri, str(folder), config=CONFIG)
    return folder


def read(folder, path):
    return pq.read_table(folder / path, partitioning=None)


@pytest.mark.parametrize("path", [PLAIN, VIEWS, CODED], ids=ascii)
def test_each_bad_row_has_its_status_and_its_reason_and_all_others_are_ok(sick, output, path):
    table = read(output, path)
    assert table.num_rows == sick.num_rows
    for row, (status, error) in enumerate(
        zip(table["status"].to_pylist(), table["error"].to_pylist(), strict=True)
    ):
        kind, expected, reason = sick.bad.get(row, ("good", "ok", None))
        assert status == expected, (row, kind, error)
        assert error is None if reason is None else error.startswith(reason), (row, kind)
        assert error is None or error.isprintable()


@pytest.mark.parametrize("path", [PLAIN, VIEWS, CODED], ids=ascii)
def test_good_rows_have_the_scores_that_they_have_without_bad_ones(sick, output, bundle_uri, path):
    rows, scores = read(sick.folder, PLAIN), read(output, path)["scores"].to_pylist()
    good = [row for row in range(sick.num_rows) if row not in sick.bad]
    images, captions = rows["image"].to_pylist(), text_values(rows["caption"])
    alone = Labeler.load(bundle_uri)([images[row] for row in good], [captions[row] for row in good])
    assert np.allclose([scores[row] for row in good], alone.scores, atol=1e-5)
    assert len(good) > 20 and len(np.unique(alone.scores.round(4), axis=0)) > 10


def test_rows_that_stand_twice_are_labeled_twice_and_alike(sick, output):
    for path in (PLAIN, VIEWS, CODED):
        rows = read(output, path).drop_columns(["caption", "notes"]).to_pylist()
        for first, again in ((0, -3), (1, -2), (sick.num_rows - 5, -1)):
            scores = rows[first].pop("scores"), rows[again].pop("scores")
            assert repr(rows[first]) == repr(rows[again])
            assert scores[0] is scores[1] is None or np.allclose(*scores, atol=1e-5)


def test_text_that_is_not_utf8_stands_in_the_output_byte_for_byte_in_its_type(sick, output):
    for path in (PLAIN, VIEWS, CODED):
        before, after = read(sick.folder, path), read(output, path)
        assert before["caption"].type == after["caption"].type
        as_bytes = [table["caption"].cast(pa.large_binary()).to_pylist() for table in (before, after)]
        assert as_bytes[0] == as_bytes[1] and b"\xff\xfe\x80" in as_bytes[0]
        notes = [table["notes"].combine_chunks().field("text") for table in (before, after)]
        assert notes[0].equals(notes[1])


def test_rejected_rows_are_listed_and_the_output_is_proven(sick, output):
    for path in (PLAIN, VIEWS, CODED):
        lines = (output / "_mmray" / "rejected" / f"{path}.jsonl").read_text().split("\n")[:-1]
        listed = {record["row"]: record["status"] for record in map(json.loads, lines)}
        wanted = {row: status for row, (_, status, _) in sick.bad.items()}
        assert listed == {row: status for row, status in wanted.items() if status in ("bad_image", "failed")}
    assert verify_dataset(str(sick.folder), str(output)).problems == []


@pytest.mark.parametrize("path", [PLAIN, VIEWS, CODED], ids=ascii)
@pytest.mark.parametrize("name", ["caption", "notes"])
def test_a_byte_that_differs_in_text_that_is_not_utf8_is_found_in_its_row(sick, output, path, name):
    whole = (output / path).read_bytes()
    table = read(output, path)
    row = next(row for row, (kind, *_) in sick.bad.items() if kind == "caption: no UTF-8 at all")
    column = table[name].combine_chunks()
    text = column if name == "caption" else column.field("text")
    values = text.cast(pa.large_binary()).to_pylist()
    values[row] = b"\xff\xfe\x81"
    spoilt = pa.array(values, pa.binary()).view(pa.string()).cast(text.type)
    if name == "notes":
        spoilt = pa.StructArray.from_arrays([spoilt, column.field("number")], ["text", "number"])
    try:
        pq.write_table(
            table.set_column(table.schema.get_field_index(name), table.schema.field(name), spoilt),
            output / path,
        )
        problems = verify_dataset(str(sick.folder), str(output)).problems
    finally:
        (output / path).write_bytes(whole)
    assert any(f": row {row}: column {name} holds " in line and r"\xff\xfe\x81" in line for line in problems)


def test_failed_rows_are_labeled_again_in_files_of_any_layout(sick, output, bundle_uri, tmp_path):
    result = label_dataset(
        str(sick.folder), bundle_uri, str(tmp_path), config=CONFIG, retry_failed_uri=str(output)
    )
    assert result.num_rows == 3 * sick.num_rows
    for path in (PLAIN, VIEWS, CODED):
        before, after = read(output, path), read(tmp_path, path)
        assert after.schema == before.schema
        assert after.drop_columns("notes").equals(before.drop_columns("notes"))
    assert verify_dataset(str(sick.folder), str(tmp_path)).problems == []


def test_bad_rows_are_measured_and_learned_from_as_the_others(sick, output, bundle_uri):
    summary = evaluate_model(str(sick.folder), bundle_uri)
    measured = evaluate_predictions(str(sick.folder), str(output))
    assert summary["num_rows"] == measured["num_rows"] == 3 * sick.num_rows
    assert summary["sample_f1"] == pytest.approx(measured["sample_f1"])
    rows = Rows.find(str(sick.folder), Columns())
    captions = sample_captions([rows], 1000)
    assert "a caf\ufffd in the city" in captions and "the beach " * 10_000 in captions
    vocabulary, _ = count_labels(rows)
    block = read(sick.folder, PLAIN).select(["image", "caption", "labels"])
    targets = vocabulary.encode(block["labels"]).astype(np.float32)
    block = block.append_column("targets", as_lists(targets)).append_column("mask", as_lists(targets >= 0))
    decoded = decode_rows(block, ModelConfig(image_size=16))
    assert np.array_equal(decoded["targets"], targets)
    assert np.array_equal(decoded["mask"].any(axis=1), decoded["valid"])
    failed = [row for row, (_, status, _) in sick.bad.items() if status == "failed"]
    assert np.flatnonzero(~decoded["valid"]).tolist() == sorted(failed)
    assert decoded["caption"][[row for row in sick.bad if "Latin" in sick.bad[row][0]]].tolist() == [
        "a caf\ufffd in the city"
    ]


@pytest.mark.parametrize(
    "labels",
    [
        pa.array([b"caf\xe9"], pa.binary()).view(pa.string()),
        pa.ListArray.from_arrays([0, 1], pa.array([b"caf\xe9"], pa.binary()).view(pa.string())),
        pa.array([1]),
    ],
)
def test_labels_that_are_none_end_training_with_2_in_one_line(draw_rows, tmp_path, labels):
    pq.write_table(draw_rows(1).set_column(3, "labels", labels), tmp_path / "a.parquet")
    command = runpy.run_path(str(JOBS / "train.py"))["main"]
    options = ["--data", tmp_path, "--val", tmp_path, "--output", tmp_path / "out", "--no-pretrained"]
    result = CliRunner().invoke(command, [str(option) for option in options])
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.strip().splitlines()
    assert re.fullmatch("mmray: labels of type .* are no lists of integers or of text: .{10,120}", line)
