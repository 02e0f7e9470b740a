"""Labeling on a cluster: every row once, in its place; resume; refusals; the budget."""

import json
import logging
import re
import runpy
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from mmray.bundle import Bundle
from mmray.config import Columns, LabelConfig
from mmray.decisions import decide
from mmray.errors import DataError, OutputError
from mmray.labeler import Labeler
from mmray.labeling import label_dataset
from mmray.lease import Lease
from mmray.parquet import DataFile, describe_files, find_files
from mmray.plan import Plan, Shard, Work
from mmray.schema import PREDICTION_COLUMNS
from mmray.scoring import ShardSource
from mmray.shards import Committer
from mmray.storage import Folder
from mmray.verify import verify_dataset

pytestmark = pytest.mark.usefixtures("cluster")

JOBS = Path(__file__).parents[2] / "jobs"
CONFIG = LabelConfig(max_failed_fraction=0.05)


def read(folder, path):
    return pq.read_table(folder / path, partitioning=None)


def traces(folder):
    """Say of every file which it is and when it was written: what is not written again keeps both."""
    return {
        str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in folder.rglob("*.parquet")
    }


def zero(path, group, column):
    """Zero the bytes of a column in a row group; size and footer stay."""
    chunk = pq.read_metadata(path).row_group(group).column(column)
    content = bytearray(path.read_bytes())
    start = min(filter(None, (chunk.dictionary_page_offset, chunk.data_page_offset)))
    content[start : start + chunk.total_compressed_size] = bytes(chunk.total_compressed_size)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("rows", "image_bytes", "num_files", "num_tasks"),
    [
        (10, 10_000, 250, 3),  # small files share a task
        (1000, 10_000, 5, 5),
        (500, 150_000, 6, 6),  # two of them have more bytes than a task
        (10, 10_000, 3000, 30),
        (1000, 10_000, 1001, 48),
    ],
)
def test_files_are_read_by_no_more_tasks_than_the_driver_can_hold(
    monkeypatch, rows, image_bytes, num_files, num_tasks
):
    monkeypatch.setattr("mmray.scoring.MAX_READ_TASKS", 50)
    file = DataFile("a.parquet", 1, rows, "", rows * image_bytes, ((0, rows),))
    work = Work([(file, file.units)] * num_files, set(), [])
    tasks = ShardSource(Folder("here"), work, Columns()).get_read_tasks(1)
    assert len(tasks) == num_tasks
    assert sum(task.metadata.num_rows for task in tasks) == num_files


def run(*options):
    command = runpy.run_path(str(JOBS / "label.py"))["main"]
    return CliRunner().invoke(command, [str(option) for option in options])


@pytest.fixture
def rows(archive, tmp_path):
    """Give a copy of the archive."""
    return Path(shutil.copytree(archive.folder, tmp_path / "rows"))


@pytest.fixture
def output(labeled, tmp_path):
    """Give a copy of the labeled archive."""
    return Path(shutil.copytree(labeled, tmp_path / "output"))


@pytest.fixture(scope="module")
def alone(archive, bundle_uri):
    """Give what the labeler makes of each file without a cluster: path -> Labeled."""
    labeler = Labeler(Bundle.load(bundle_uri))

    def images_of(table):
        images = table["image"].to_pylist()
        return [image["bytes"] if isinstance(image, dict) else image for image in images]

    tables = {path: read(archive.folder, path) for path in archive.statuses}
    return {path: labeler(images_of(table), table["caption"].to_pylist()) for path, table in tables.items()}


def test_there_is_one_labeled_file_for_each_input_file_and_nothing_else(archive, labeled):
    found = {str(path.relative_to(labeled)) for path in labeled.rglob("*") if path.is_file()}
    assert {path for path in found if not path.startswith("_")} == set(archive.statuses)
    marks = {path for path in found if path.startswith("_") and not path.startswith("_mmray/rejected/")}
    assert marks == {"_SUCCESS", "_mmray/manifest.json", "_mmray/plan/00000.parquet"}


def test_a_pool_that_decodes_changes_nothing(archive, labeled, bundle_uri, tmp_path):
    config = replace(CONFIG, decode="pool")
    label_dataset(str(archive.folder), bundle_uri, str(tmp_path / "output"), config=config)
    for path in archive.statuses:
        one, other = read(labeled, path), read(tmp_path / "output", path)
        assert other.schema == one.schema
        assert repr(other.drop_columns("scores").to_pylist()) == repr(one.drop_columns("scores").to_pylist())
        for there, here in zip(one["scores"].to_pylist(), other["scores"].to_pylist(), strict=True):
            assert here == (there and pytest.approx(there, abs=1e-5))


def test_every_input_value_stands_in_its_row_and_in_its_type(archive, labeled):
    for path in archive.statuses:
        before, after = read(archive.folder, path).drop_columns("image"), read(labeled, path)
        kept = len(before.column_names)
        assert after.column_names[kept:] == list(PREDICTION_COLUMNS)
        names = [f"input_{name}" if name in PREDICTION_COLUMNS else name for name in before.column_names]
        assert after.column_names[:kept] == names
        assert after.schema.types[:kept] == before.schema.types
        for name, column in zip(names, before.columns, strict=True):
            assert repr(after[name].to_pylist()) == repr(column.to_pylist()), (path, name)


def test_the_predictions_have_the_same_types_in_every_file(archive, labeled):
    for path in archive.statuses:
        kinds = [read(labeled, path).schema.field(name).type for name in PREDICTION_COLUMNS]
        labels, scores, *texts = kinds
        assert labels.value_type == pa.string()
        assert scores == pa.list_(pa.float32(), 6)
        assert texts == [pa.string()] * 3


def test_statuses_are_right_and_only_failed_rows_lack_labels_and_scores(archive, labeled):
    for path, bad in archive.statuses.items():
        table = read(labeled, path)
        assert table["status"].to_pylist() == [bad.get(row, "ok") for row in range(table.num_rows)]
        for name in ("predicted_labels", "scores"):
            nulls = table[name].is_null().to_pylist()
            assert nulls == [bad.get(row) == "failed" for row in range(table.num_rows)]
        assert table["error"].is_null().to_pylist() == [row not in bad for row in range(table.num_rows)]
        assert all(table["predicted_labels"].drop_null().to_pylist())


def test_each_row_has_the_scores_of_its_own_image_and_caption(archive, labeled, alone, bundle_uri):
    bundle = Bundle.load(bundle_uri)
    for path in archive.statuses:
        table, expected = read(labeled, path), alone[path]
        valid = expected.valid
        scores = np.array([row for row in table["scores"].to_pylist() if row], np.float32)
        assert np.allclose(scores.reshape(-1, 6), expected.scores[valid], atol=1e-5), path
        decided, _ = decide(scores.reshape(-1, 6), bundle.thresholds)
        labels = [[bundle.vocabulary.labels[index] for index in np.flatnonzero(row)] for row in decided]
        assert table["predicted_labels"].drop_null().to_pylist() == labels
        assert table["error"].to_pylist() == expected.errors
        assert set(table["model"].to_pylist()) <= {bundle.fingerprint}


def test_some_rows_reach_no_threshold_or_the_tests_here_prove_little(alone, bundle_uri):
    labeled = alone["big.parquet"]
    assert 0 < labeled.fell_back.sum() < len(labeled.fell_back)
    assert len({tuple(row) for row in labeled.decided.tolist()}) > 3


def test_bad_rows_are_listed_with_file_row_and_reason(archive, labeled):
    listed = {}
    for path in (labeled / "_mmray" / "rejected").rglob("*.jsonl"):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            assert set(record) == {"file", "row", "status", "reason"}
            assert record["reason"] == read(labeled, record["file"])["error"][record["row"]].as_py()
            listed.setdefault(record["file"], {})[record["row"]] = record["status"]
    expected = {
        path: {row: status for row, status in bad.items() if status in ("failed", "bad_image")}
        for path, bad in archive.statuses.items()
    }
    assert listed == {path: bad for path, bad in expected.items() if bad}


def test_the_manifest_sums_up(archive, labeled):
    manifest = json.loads((labeled / "_mmray" / "manifest.json").read_text())
    assert manifest["num_rows"] == archive.num_rows
    bad = [status for statuses in archive.statuses.values() for status in statuses.values()]
    expected = {status: bad.count(status) for status in sorted(set(bad))}
    assert manifest["counts"] == expected | {"ok": archive.num_rows - len(bad)}
    assert [(file["path"], file["size_bytes"]) for file in manifest["files"]] == [
        (path, (labeled / path).stat().st_size) for path in archive.statuses
    ]


def test_a_finished_output_is_left_alone(archive, output, bundle_uri):
    before = traces(output)
    result = label_dataset(str(archive.folder), bundle_uri, str(output), config=CONFIG)
    assert result.num_resumed == result.num_shards == 8
    assert traces(output) == before
    assert verify_dataset(str(archive.folder), str(output)).problems == []


def test_the_best_scores_of_the_first_rows_of_a_single_file(archive, bundle_uri, alone, tmp_path):
    big = read(archive.folder, "big.parquet").rename_columns(["image_id", "jpg", "text", "labels"])
    pq.write_table(big, tmp_path / "one.parquet", row_group_size=1200)
    columns = Columns(image="jpg", caption="text")
    config = LabelConfig(scores="top-2", limit=700, batch_size=50)
    result = label_dataset(
        str(tmp_path / "one.parquet"), bundle_uri, str(tmp_path / "out"), columns=columns, config=config
    )
    assert (result.num_rows, result.num_files, result.num_shards) == (700, 1, 2)
    table = read(tmp_path / "out", "one.parquet")
    assert table["image_id"].to_pylist() == big["image_id"][:700].to_pylist()
    labels = Bundle.load(bundle_uri).vocabulary.labels
    for row, kept in enumerate(table["scores"].to_pylist()):
        scores = alone["big.parquet"].scores[row]
        assert [entry["score"] for entry in kept] == pytest.approx(sorted(scores)[:-3:-1], abs=1e-5)
        assert [entry["score"] for entry in kept] == pytest.approx(
            [scores[labels.index(entry["label"])] for entry in kept], abs=1e-5
        )
        assert len({entry["label"] for entry in kept}) == 2
    assert verify_dataset(str(tmp_path / "one.parquet"), str(tmp_path / "out")).problems == []


def test_without_scores_and_with_files_that_come_later(rows, bundle_uri, tmp_path, caplog):
    late = {path: (rows / path).read_bytes() for path in ("big.parquet", "holiday [*] é.parquet")}
    for path in late:
        (rows / path).unlink()
    output, config = tmp_path / "out", LabelConfig(max_failed_fraction=0.05, scores="none")
    planned = label_dataset(str(rows), bundle_uri, str(output), config=config, dry_run=True)
    assert (planned.num_rows, planned.num_files, planned.num_shards) == (150, 3, 3)
    assert not output.exists()

    label_dataset(str(rows), bundle_uri, str(output), config=config)
    before = traces(output)
    table = read(output, "country=at/year=2026/a.parquet")
    assert table.column_names[-4:] == ["predicted_labels", "status", "error", "model"]
    assert "scores" not in table.column_names
    assert "input_scores" in read(output, "country=at/year=2025/a.parquet").column_names
    assert verify_dataset(str(rows), str(output)).problems == []

    (rows / "holiday [*] é.parquet").write_bytes(late["holiday [*] é.parquet"])
    assert verify_dataset(str(rows), str(output)).problems == [
        "holiday [*] é.parquet: came to the input after the plan; label.py --extend labels it"
    ]
    with caplog.at_level(logging.WARNING, "mmray"):
        label_dataset(str(rows), bundle_uri, str(output), config=config)
    assert "1 input files came after the plan; --extend labels them too" in caplog.text
    assert traces(output) == before

    again = label_dataset(str(rows), bundle_uri, str(output), config=config, extend=True, dry_run=True)
    assert (again.num_files, again.num_shards, again.num_resumed) == (4, 4, 3)
    assert traces(output) == before
    assert (output / "_SUCCESS").exists()
    result = label_dataset(str(rows), bundle_uri, str(output), config=config, extend=True)
    assert (result.num_rows, result.num_files, result.num_resumed) == (180, 4, 3)
    after = traces(output)
    assert {path: after[path] for path in before} == before
    assert set(after) - set(before) == {"holiday [*] é.parquet", "_mmray/plan/00001.parquet"}
    assert verify_dataset(str(rows), str(output)).problems == []


def test_what_is_committed_is_neither_read_nor_scored_again(rows, output, bundle_uri):
    """Half of a file of two units is committed; its input bytes, and those of done files, are unreadable."""
    plan = Plan.load(Folder(str(output)))
    big = next(file for file in plan.files if file.path == "big.parquet")
    assert big.units == ((0, 600, 1200), (1200, 1775, 2350))
    finished = read(output, "big.parquet")
    halves = [None if score is None else [0.5] * 6 for score in finished["scores"].to_pylist()]
    index = finished.schema.get_field_index("scores")
    marked = finished.set_column(index, "scores", pa.array(halves, finished.schema.field(index).type))
    for path in ("big.parquet", "country=at/year=2025/a.parquet", "_SUCCESS", "_mmray/manifest.json"):
        (output / path).unlink()
    committer = Committer(Folder(str(output)), plan.fingerprint)
    for first, end in ((0, 600), (600, 1200), (1775, 2350)):
        committer.commit(Shard("big.parquet", first, end), marked.slice(first, end - first), big)
    before = traces(output)

    sound = {path: (rows / path).read_bytes() for path in ("big.parquet", "holiday [*] é.parquet")}
    spans = {path: pq.read_metadata(rows / path).row_group(0) for path in sound}
    for path, group in spans.items():
        content = bytearray(sound[path])
        chunks = [group.column(index) for index in range(group.num_columns)]
        for chunk in chunks:
            start = min(filter(None, (chunk.dictionary_page_offset, chunk.data_page_offset)))
            content[start : start + chunk.total_compressed_size] = bytes(chunk.total_compressed_size)
        (rows / path).write_bytes(content)

    result = label_dataset(str(rows), bundle_uri, str(output), config=CONFIG)
    assert (result.num_shards, result.num_resumed) == (8, 6)
    after = traces(output)
    kept = [path for path in before if not path.startswith("_mmray/pieces/")]
    assert {path: after[path] for path in kept} == {path: before[path] for path in kept}
    assert set(after) - set(kept) == {"big.parquet", "country=at/year=2025/a.parquet"}
    table = read(output, "big.parquet")
    halves = [scores == [0.5] * 6 for scores in table["scores"].to_pylist() if scores]
    assert halves == [True] * 1200 + [False] * 575 + [True] * 573
    assert table.drop_columns("scores").equals(finished.drop_columns("scores"))
    assert table.slice(1200, 575).equals(finished.slice(1200, 575))
    for path, content in sound.items():
        (rows / path).write_bytes(content)
    assert verify_dataset(str(rows), str(output)).problems == []


def test_pieces_that_are_all_there_are_only_joined(archive, output, bundle_uri):
    plan = Plan.load(Folder(str(output)))
    big = next(file for file in plan.files if file.path == "big.parquet")
    finished = read(output, "big.parquet")
    committer = Committer(Folder(str(output)), plan.fingerprint)
    *others, last = big.shards
    for first, end in others:
        committer.commit(Shard("big.parquet", first, end), finished.slice(first, end - first), big)
    spare = Folder(str(output / "_spare"))
    Committer(spare, plan.fingerprint).commit(Shard("big.parquet", *last), finished.slice(last[0]), big)
    Folder(str(output)).publish(
        Shard("big.parquet", *last).piece, spare.read(Shard("big.parquet", *last).piece)
    )
    shutil.rmtree(output / "_spare")
    for path in ("big.parquet", "_SUCCESS", "_mmray/manifest.json"):
        (output / path).unlink()
    result = label_dataset(str(archive.folder), bundle_uri, str(output), config=CONFIG)
    assert result.num_resumed == result.num_shards
    assert read(output, "big.parquet").equals(finished)
    assert not (output / "_mmray" / "pieces").exists()
    assert verify_dataset(str(archive.folder), str(output)).problems == []


def test_other_settings_are_refused_with_what_differs_and_change_nothing(
    archive, output, bundle_uri, make_bundle, tmp_path
):
    other = make_bundle(tmp_path / "other", fusion="concat")
    before = traces(output)
    attempts = [
        ((bundle_uri, LabelConfig(scores="top-3")), "scores: 'all' -> 'top-3'"),
        ((bundle_uri, LabelConfig(limit=5)), "limit: None -> 5"),
        ((bundle_uri, LabelConfig(precision="bf16")), "precision: 'fp32' -> 'bf16'"),
        ((other, LabelConfig()), f"bundle: '{Bundle.load(bundle_uri).fingerprint}' -> "),
    ]
    for (bundle, config), difference in attempts:
        with pytest.raises(OutputError) as caught:
            label_dataset(str(archive.folder), bundle, str(output), config=config)
        assert difference in str(caught.value) and "\n" not in str(caught.value)
    result = run(
        "--input", archive.folder, "--model", bundle_uri, "--output", output, "--caption-column", "labels"
    )
    assert result.exit_code == 2
    assert "columns.caption: 'caption' -> 'labels'" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert traces(output) == before and (output / "_SUCCESS").exists()


def test_an_input_file_that_is_gone_or_has_changed_is_refused_by_path(rows, output, bundle_uri):
    (output / "_SUCCESS").unlink()
    path = rows / "country=at/year=2025/a.parquet"
    content = path.read_bytes()
    path.write_bytes(content + b"x")
    with pytest.raises(
        DataError, match=r"country=at/year=2025/a\.parquet has \d+ bytes and was planned with"
    ):
        label_dataset(str(rows), bundle_uri, str(output), config=CONFIG)
    path.unlink()
    with pytest.raises(DataError, match=r"country=at/year=2025/a\.parquet was planned and is gone"):
        label_dataset(str(rows), bundle_uri, str(output), config=CONFIG)


def test_an_input_file_of_the_same_size_with_other_rows_is_refused_by_path(draw_rows, bundle_uri, tmp_path):
    (tmp_path / "rows").mkdir()
    for seed in (1, 2):
        table = draw_rows(20, 1).set_column(0, "image_id", [[f"{seed}-{row:03}" for row in range(20)]])
        pq.write_table(table, tmp_path / f"{seed}.parquet", compression="none")
    assert (tmp_path / "1.parquet").stat().st_size == (tmp_path / "2.parquet").stat().st_size
    shutil.copy(tmp_path / "1.parquet", tmp_path / "rows" / "a.parquet")
    source, output = str(tmp_path / "rows"), Folder(str(tmp_path / "out"))
    label_dataset(source, bundle_uri, output.uri)
    output.remove(["a.parquet", "_SUCCESS"])
    shutil.copy(tmp_path / "2.parquet", tmp_path / "rows" / "a.parquet")
    result = run("--input", source, "--model", bundle_uri, "--output", output)
    assert result.exit_code == 2
    assert "a.parquet has changed since it was planned" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_folder_that_holds_other_files_is_refused_and_kept(archive, bundle_uri, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "mine.parquet").write_bytes(b"mine")
    with pytest.raises(OutputError, match=r"holds sub/mine\.parquet, which no plan knows"):
        label_dataset(str(archive.folder), bundle_uri, str(tmp_path), config=CONFIG)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["sub", "sub/mine.parquet"]


@pytest.mark.parametrize("below", [".", "labeled", "country=at/labeled"])
def test_an_output_in_the_input_is_refused(rows, bundle_uri, below):
    before = traces(rows)
    with pytest.raises(OutputError, match="lies in the input"):
        label_dataset(str(rows), bundle_uri, str(rows / below), config=CONFIG)
    assert traces(rows) == before


def test_columns_that_cannot_be_used_are_refused_by_file_and_remedy(draw_rows, bundle_uri, tmp_path):
    rows = draw_rows(3)
    cases = {
        "missing": (rows.drop_columns("caption"), r"no column 'caption'.*--caption-column"),
        "numbers": (rows.set_column(1, "image", [[1, 2, 3]]), "'image': an image column holds encoded bytes"),
        "lists": (rows.set_column(2, "caption", [[["a"]] * 3]), "'caption': a caption column holds text"),
        "twice": (
            rows.append_column("status", [["a"] * 3]).append_column("input_status", [["b"] * 3]),
            r"a\.parquet: columns 'status' and 'input_status' would share the name .*; rename one",
        ),
    }
    for name, (table, message) in cases.items():
        (tmp_path / name).mkdir()
        pq.write_table(table, tmp_path / name / "a.parquet")
        with pytest.raises(DataError, match=message):
            label_dataset(str(tmp_path / name), bundle_uri, str(tmp_path / "out"))
    assert list((tmp_path / "out").rglob("*")) == []


def test_damaged_weights_are_refused_in_one_line(archive, bundle_uri, tmp_path, capfd):
    bundle = Path(shutil.copytree(bundle_uri, tmp_path / "bundle"))
    weights = bundle / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\1\2\3\4")
    options = ("--input", archive.folder / "holiday [*] é.parquet", "--model", bundle)
    result = run(*options, "--output", tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert f"{weights} is damaged" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert "Traceback" not in capfd.readouterr().err


def test_too_many_failed_rows_stop_the_job_and_what_is_committed_stays(
    draw_rows, spoil, bundle_uri, tmp_path, capfd
):
    source, output = tmp_path / "rows", tmp_path / "out"
    source.mkdir()
    damages = dict.fromkeys(range(0, 1200, 60), "bad image, null caption")
    many, bad = spoil(draw_rows(1200, 1), damages)
    for path, table in (
        ("a.parquet", draw_rows(30, 2)),
        ("b.parquet", many),
        ("c.parquet", draw_rows(30, 3)),
    ):
        pq.write_table(table, source / path)
    options = ("--input", source, "--model", bundle_uri, "--output", output)
    stopped = run(*options, "--max-failed-fraction", "0.005")
    assert stopped.exit_code == 1, stopped.stderr
    assert re.search(r"\d+ of 1260 rows failed, above --max-failed-fraction 0\.005", stopped.stderr)
    assert "Traceback" not in stopped.stderr
    assert not (output / "_SUCCESS").exists() and not (output / "_mmray" / "manifest.json").exists()
    committed = {path: trace for path, trace in traces(output).items() if "_mmray/plan" not in path}
    assert committed

    result = label_dataset(str(source), bundle_uri, str(output), config=LabelConfig(max_failed_fraction=0.02))
    assert result.counts == {"failed": 20, "ok": 1240}
    after = traces(output)
    whole = {path: trace for path, trace in committed.items() if not path.startswith("_mmray/pieces")}
    assert {path: after[path] for path in whole} == whole
    assert read(output, "b.parquet")["status"].to_pylist() == [bad.get(row, "ok") for row in range(1200)]
    assert verify_dataset(str(source), str(output)).problems == []


def test_shards_are_planned_as_the_footers_say_and_never_above_a_thousand_rows(archive, labeled):
    plan = Plan.load(Folder(str(labeled)))
    described = describe_files(*find_files(str(archive.folder)), "image")
    assert plan.files == tuple(file for file, _ in described)
    assert max(end - first for file in plan.files for first, end in file.shards) <= 1000


def test_a_dataset_without_rows_gives_an_output_without_rows(draw_rows, bundle_uri, tmp_path):
    (tmp_path / "rows").mkdir()
    pq.write_table(draw_rows(0), tmp_path / "rows" / "a.parquet")
    result = label_dataset(str(tmp_path / "rows"), bundle_uri, str(tmp_path / "out"))
    assert result.num_rows == 0
    assert read(tmp_path / "out", "a.parquet").num_rows == 0
    assert verify_dataset(str(tmp_path / "rows"), str(tmp_path / "out")).problems == []


def test_a_damaged_row_group_and_an_unreadable_file_cost_themselves_alone(draw_rows, bundle_uri, tmp_path):
    source, output = tmp_path / "rows", tmp_path / "out"
    source.mkdir()
    for path, seed in (("a.parquet", 1), ("b.parquet", 2), ("late.parquet", 3)):
        pq.write_table(draw_rows(300, seed), source / path, row_group_size=100)
    zero(source / "a.parquet", group=1, column=1)
    sound = (source / "late.parquet").read_bytes()
    (source / "late.parquet").write_bytes(sound[:-4] + b"PARX")

    options = ("--input", source, "--model", bundle_uri, "--output", output, "--max-failed-fraction", 0.2)
    result = run(*options)
    assert result.exit_code == 2
    assert "late.parquet: no Parquet footer" in result.stderr

    config = LabelConfig(max_failed_fraction=0.2, skip_unreadable_files=True)
    label_dataset(str(source), bundle_uri, str(output), config=config)
    table = read(output, "a.parquet")
    assert table["status"].to_pylist() == ["ok"] * 100 + ["failed"] * 100 + ["ok"] * 100
    assert table["image_id"].to_pylist() == draw_rows(300, 1)["image_id"].to_pylist()
    assert table["error"][150].as_py().startswith("row group 1 is damaged (column image: ")
    assert read(output, "b.parquet")["status"].to_pylist() == ["ok"] * 300
    assert not (output / "late.parquet").exists()
    manifest = json.loads((output / "_mmray" / "manifest.json").read_text())
    assert list(manifest["skipped"]) == ["late.parquet"]
    found = verify_dataset(str(source), str(output))
    assert (found.problems, found.num_files, found.num_skipped) == ([], 2, 1)

    (source / "late.parquet").write_bytes(sound)
    label_dataset(str(source), bundle_uri, str(output), config=config, extend=True)
    assert read(output, "late.parquet")["status"].to_pylist() == ["ok"] * 300
    assert json.loads((output / "_mmray" / "manifest.json").read_text())["skipped"] == {}
    assert verify_dataset(str(source), str(output)).problems == []


def test_an_output_that_another_job_works_on_is_refused(archive, bundle_uri, tmp_path):
    with Lease(Folder(str(tmp_path / "out")), renewal_s=0.2):
        result = run("--input", archive.folder, "--model", bundle_uri, "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert "is being labeled by process" in result.stderr
    assert list((tmp_path / "out").rglob("*.parquet")) == []


def test_failed_rows_alone_are_labeled_again_into_a_new_output(draw_rows, spoil, bundle_uri, tmp_path):
    source, first, second = tmp_path / "rows", tmp_path / "first", tmp_path / "second"
    source.mkdir()
    spoilt, _ = spoil(draw_rows(60, 2, extras=True), dict.fromkeys((3, 59), "bad image, null caption"))
    tables = {"a": draw_rows(2300, 1), "b": spoilt, "c": draw_rows(40, 3), "d": draw_rows(0)}
    for path, rows in tables.items():
        pq.write_table(rows, source / f"{path}.parquet", row_group_size=1100)
    sound = (source / "a.parquet").read_bytes()
    zero(source / "a.parquet", group=1, column=1)
    config = LabelConfig(max_failed_fraction=0.6, batch_size=100)
    result = label_dataset(str(source), bundle_uri, str(first), config=config)
    assert result.counts["failed"] == 1102
    (source / "a.parquet").write_bytes(sound)
    zero(source / "c.parquet", group=0, column=1)  # not to be read: none of its rows has failed

    again = {"config": config, "retry_failed_uri": str(first)}
    result = label_dataset(str(source), bundle_uri, str(second), **again)
    assert result.counts == {"ok": 2398, "failed": 2}
    for path in ("a", "b", "c", "d"):
        before, after = read(first, f"{path}.parquet"), read(second, f"{path}.parquet")
        assert before.schema == after.schema
        kept = pa.array([status != "failed" for status in before["status"].to_pylist()], pa.bool_())
        assert repr(after.filter(kept).to_pylist()) == repr(before.filter(kept).to_pylist())
    whole = label_dataset(str(source), bundle_uri, str(tmp_path / "third"), config=config)
    assert whole.counts["failed"] == 42
    there, here = read(tmp_path / "third", "a.parquet"), read(second, "a.parquet")
    assert here.drop_columns("scores").equals(there.drop_columns("scores"))
    assert np.allclose(here["scores"].to_pylist(), there["scores"].to_pylist(), atol=1e-5)
    with pytest.raises(OutputError, match=r"retry_of: '[0-9a-f]{64}' -> None"):
        label_dataset(str(source), bundle_uri, str(second), config=config)
    assert label_dataset(str(source), bundle_uri, str(second), **again).num_resumed == result.num_shards

    with pytest.raises(OutputError, match=r"other settings.*scores: 'all' -> 'none'"):
        other = LabelConfig(max_failed_fraction=0.6, scores="none")
        label_dataset(str(source), bundle_uri, str(tmp_path / "x"), config=other, retry_failed_uri=str(first))
    (first / "_SUCCESS").unlink()
    with pytest.raises(OutputError, match="it is not finished"):
        label_dataset(str(source), bundle_uri, str(tmp_path / "x"), **again)
