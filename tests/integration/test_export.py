"""Hand-over: the least certain rows, tasks for people and back, what cleanlab asks for, other readers."""

import json
import runpy
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from mmray.answers import prepare_answers
from mmray.config import Columns
from mmray.datasets import Rows
from mmray.errors import DataError, OutputError
from mmray.export import export_cleanlab, export_label_studio, export_uncertain
from mmray.picking import doubt
from mmray.plan import Plan
from mmray.schema import Vocabulary, score_matrix
from mmray.storage import Folder

pytestmark = pytest.mark.usefixtures("cluster")

JOBS = Path(__file__).parents[2] / "jobs"


def read(labeled, path):
    """Give the labeled rows of a file, their scores, and which of them did not fail."""
    table = pq.read_table(labeled / path, partitioning=None)
    return table, *score_matrix(table["scores"], 6)


def test_no_row_that_is_left_out_is_less_certain_than_those_of_its_label(labeled, archive, tmp_path):
    thresholds = np.array(Plan.load(Folder(str(labeled))).settings["thresholds"])
    everything = []
    for path in archive.statuses:
        _, scores, valid = read(labeled, path)
        nearest = np.abs(scores - thresholds).argmin(axis=1)
        rows = zip(nearest.tolist(), doubt(scores).tolist(), range(len(scores)), strict=True)
        everything += [
            (label, rank, path, row) for (label, rank, row), sound in zip(rows, valid, strict=True) if sound
        ]
    assert export_uncertain(str(labeled), str(tmp_path / "u.parquet"), 100) == 100
    found = pq.read_table(tmp_path / "u.parquet").to_pylist()
    chosen = {(row["file"], row["row"]) for row in found}
    assert len(chosen) == 100
    for label in range(6):
        ranks = sorted((rank, (path, row)) for each, rank, path, row in everything if each == label)
        taken = [rank for rank, place in ranks if place in chosen]
        left = [rank for rank, place in ranks if place not in chosen]
        assert not left or not taken or min(taken) >= max(left)
        assert len(taken) >= min(len(ranks), 100 // 6)
    for row in found[::10]:
        table, scores, _ = read(labeled, row["file"])
        assert row["predicted_labels"] == table["predicted_labels"][row["row"]].as_py()
        assert row["scores"] == pytest.approx(scores[row["row"]].tolist())
        assert row["doubt"] == pytest.approx(doubt(scores[row["row"]][None])[0])


def test_what_people_answer_becomes_rows_to_train_on(labeled, archive, tmp_path):
    tasks_path, answers_path = tmp_path / "tasks.json", tmp_path / "answers.json"
    assert export_label_studio(str(labeled), str(archive.folder), str(tasks_path), 40) == 40
    assert "<Choice" in (tmp_path / "tasks.json.config.xml").read_text()
    exported, expected = json.loads(tasks_path.read_text()), {}
    for number, task in enumerate(exported):
        labels = [["beach"], [], ["circle", "city"]][number % 3]
        choice = {"from_name": "labels", "value": {"choices": labels}}
        task["annotations"] = [{"result": [choice], "updated_at": "2026"}] if number % 5 else []
        if number % 5:
            expected[task["data"]["file"], task["data"]["row"]] = labels
    answers_path.write_text(json.dumps(exported))
    done = prepare_answers(str(answers_path), str(archive.folder), str(tmp_path / "data"))
    assert done.num_rows == len(expected) == 32
    assert done.labels == {
        label: sum(label in labels for labels in expected.values()) for label in ("beach", "circle", "city")
    }
    rows = pq.read_table(tmp_path / "data").to_pylist()
    originals = {
        (path, row): pq.read_table(archive.folder / path, partitioning=None).slice(row, 1).to_pylist()[0]
        for path, row in sorted(expected)
    }
    for row, (place, original) in zip(rows, originals.items(), strict=True):
        image = original["image"]["bytes"] if isinstance(original["image"], dict) else original["image"]
        assert (row["image"], row["caption"], row["labels"]) == (image, original["caption"], expected[place])
        assert row["image_id"] == original["image_id"]
    assert Rows.find(str(tmp_path / "data"), Columns()).num_rows == 32
    before = {path: path.read_bytes() for path in (tmp_path / "data").glob("*.parquet")}
    assert prepare_answers(str(answers_path), str(archive.folder), str(tmp_path / "data")) == done
    assert before == {path: path.read_bytes() for path in (tmp_path / "data").glob("*.parquet")}
    answers_path.write_text(json.dumps(exported[:9]))
    with pytest.raises(OutputError, match="not of this run"):
        prepare_answers(str(answers_path), str(archive.folder), str(tmp_path / "data"))
    with pytest.raises(DataError, match="were people asked about other rows"):
        prepare_answers(str(answers_path), str(tmp_path / "data"), str(tmp_path / "again"))


def test_answers_for_other_rows_of_a_file_of_the_same_name_are_refused(labeled, archive, draw_rows, tmp_path):
    tasks_path = tmp_path / "tasks.json"
    export_label_studio(str(labeled), str(archive.folder), str(tasks_path), 5)
    tasks = json.loads(tasks_path.read_text())
    for task in tasks:
        task["annotations"] = [{"result": task["predictions"][0]["result"], "updated_at": "2026"}]
        path = tmp_path / "other" / task["data"]["file"]
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(draw_rows(2400, 8), path)
    tasks_path.write_text(json.dumps(tasks))
    with pytest.raises(DataError, match="were people asked about other rows"):
        prepare_answers(str(tasks_path), str(tmp_path / "other"), str(tmp_path / "data"))
    assert not (tmp_path / "data").exists()


def test_cleanlab_gets_what_every_sound_row_bears_and_was_given(labeled, archive, tmp_path):
    num_rows = export_cleanlab(str(archive.folder), str(labeled), str(tmp_path / "rows.npz"))
    found = np.load(tmp_path / "rows.npz", allow_pickle=False)
    vocabulary = Vocabulary(tuple(found["vocabulary"].tolist()))
    expected_scores, expected_targets, expected_rows = [], [], []
    for path in archive.statuses:
        _, scores, valid = read(labeled, path)
        truth = pq.read_table(archive.folder / path, columns=["labels"], partitioning=None)["labels"]
        expected_scores.append(scores[valid])
        expected_targets.append(vocabulary.encode(truth)[valid])
        expected_rows += [(path, row) for row in np.flatnonzero(valid).tolist()]
    assert (found["pred_probs"] == np.concatenate(expected_scores)).all()
    assert (found["targets"] == np.concatenate(expected_targets)).all()
    assert list(zip(found["path"].tolist(), found["row"].tolist(), strict=True)) == expected_rows
    assert num_rows == len(found["targets"]) < archive.num_rows


def test_what_cannot_be_exported_is_told_in_a_line(labeled, archive, tmp_path):
    main = runpy.run_path(str(JOBS / "export.py"))["main"]

    def refused(*options):
        done = CliRunner().invoke(main, [str(option) for option in options])
        assert done.exit_code == 2
        return done.output

    place = ("--output", tmp_path / "x")
    assert "not finished" in refused("uncertain", "--predictions", archive.folder, *place)
    assert "--count 0" in refused("uncertain", "--predictions", labeled, *place, "--count", 0)
    assert "is no complete bundle" in refused("onnx", "--model", archive.folder, *place)
    inside = ("--output", labeled / "more.parquet")
    assert "write it elsewhere" in refused("uncertain", "--predictions", labeled, *inside)
    folder = ("--output", tmp_path)
    assert "no place for a file" in refused("uncertain", "--predictions", labeled, *folder)
    done = CliRunner().invoke(
        main, ["uncertain", "--predictions", str(labeled), "--output", str(tmp_path / "u.parquet")]
    )
    assert done.exit_code == 0, done.output
    assert "500 rows" in done.output


@pytest.mark.parametrize("reader", ["pandas", "polars", "duckdb", "datasets"])
def test_other_readers_open_an_output_as_it_is(labeled, reader):
    path = labeled / "big.parquet"
    table = pq.read_table(path)
    module = pytest.importorskip(reader)
    if reader == "pandas":
        frame = module.read_parquet(path).astype(object)
        rows = frame.where(frame.notna(), None).to_dict("records")
    elif reader == "polars":
        rows = module.read_parquet(path).to_dicts()
    elif reader == "duckdb":
        rows = module.read_parquet(str(path)).to_arrow_table().to_pylist()
    else:
        rows = module.load_dataset(
            "parquet", data_files=str(path), split="train", cache_dir=str(labeled.parent)
        ).to_list()
    assert len(rows) == table.num_rows
    for row in (0, 3, 2299):
        expected = table.slice(row, 1).to_pylist()[0]
        for name in ("predicted_labels", "scores", "status", "caption"):
            value, wanted = rows[row][name], expected[name]
            assert (list(value) if isinstance(wanted, list) else value) == (
                pytest.approx(wanted) if name == "scores" and wanted else wanted
            )
