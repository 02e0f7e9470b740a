"""Evaluation: of a bundle, of its output, by position and by id; held against scikit-learn."""

import json
import runpy
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from sklearn.metrics import f1_score

from mmray.config import Columns, LabelConfig
from mmray.errors import DataError, OutputError
from mmray.evaluate import evaluate_model, evaluate_predictions
from mmray.labeling import label_dataset
from mmray.schema import Vocabulary

pytestmark = pytest.mark.usefixtures("cluster")

JOBS = Path(__file__).parents[2] / "jobs"
KEYS = {
    "num_rows",
    "sample_f1",
    "micro_f1",
    "macro_f1",
    "map",
    "ece",
    "empty_rate",
    "fallback_rate",
    "by_label",
}


@pytest.fixture(scope="module")
def one_file(archive, tmp_path_factory):
    """Give the labeled rows of the archive's largest file, some of them spoilt."""
    folder = tmp_path_factory.mktemp("one") / "rows"
    folder.mkdir()
    shutil.copy(archive.folder / "big.parquet", folder)
    return folder


@pytest.fixture(scope="module")
def predictions(one_file, bundle_uri, tmp_path_factory):
    output = tmp_path_factory.mktemp("predictions") / "rows"
    label_dataset(str(one_file), bundle_uri, str(output), config=LabelConfig(max_failed_fraction=0.05))
    return output


def test_a_bundle_and_its_output_measure_the_same(one_file, predictions, bundle_uri):
    of_output = evaluate_predictions(str(one_file), str(predictions))
    of_bundle = evaluate_model(str(one_file), bundle_uri)
    # The sums are of the same shards in another order: only their last digits may differ.
    assert of_output.pop("by_label") == of_bundle.pop("by_label")
    assert of_output == pytest.approx(of_bundle, abs=1e-12)
    assert set(of_output) == KEYS - {"by_label"}


def test_the_numbers_are_those_of_scikit_learn_and_failed_rows_bear_no_label(
    one_file, predictions, bundle_uri
):
    truth = pq.read_table(one_file / "big.parquet")
    labeled = pq.read_table(predictions / "big.parquet")
    failed = np.array(labeled["status"].to_pylist()) == "failed"
    assert failed.any()
    vocabulary = Vocabulary(("beach", "circle", "city", "forest", "square", "triangle"))
    targets, decided = vocabulary.encode(truth["labels"]), vocabulary.encode(labeled["predicted_labels"])
    assert not decided[failed].any()
    found = evaluate_predictions(str(one_file), str(predictions))
    for average in ("micro", "macro"):
        expected = f1_score(targets, decided, average=average, zero_division=0)
        assert found[f"{average}_f1"] == pytest.approx(expected, abs=1e-9)
    assert found["sample_f1"] == pytest.approx(f1_score(targets, decided, average="samples", zero_division=1))
    assert found["empty_rate"] == pytest.approx(failed.mean())


def test_other_files_are_joined_by_id(one_file, predictions, tmp_path, caplog):
    rows = pq.read_table(one_file / "big.parquet", columns=["image_id", "labels"])
    order = np.random.default_rng(0).permutation(rows.num_rows)
    pq.write_table(rows.take(pa.array(order)), tmp_path / "truth.parquet")
    by_position = evaluate_predictions(str(one_file), str(predictions))
    by_id = evaluate_predictions(str(tmp_path), str(predictions))
    assert by_id.pop("by_label") == by_position.pop("by_label")
    assert by_id == pytest.approx(by_position, abs=1e-12)
    pq.write_table(rows.take(pa.array(order[:2000])), tmp_path / "truth.parquet")
    assert evaluate_predictions(str(tmp_path), str(predictions))["num_rows"] == 2000
    assert "350 predictions and 0 labeled rows found no partner" in caplog.text


@pytest.mark.parametrize(("row", "value", "told"), [(3, None, "1 rows have no"), (3, "1-00004", "1-00004")])
def test_ids_that_are_null_or_stand_twice_are_refused(one_file, predictions, tmp_path, row, value, told):
    rows = pq.read_table(one_file / "big.parquet", columns=["image_id", "labels"])
    ids = rows["image_id"].to_pylist()
    ids[row] = value
    pq.write_table(rows.set_column(0, "image_id", pa.array(ids)), tmp_path / "truth.parquet")
    with pytest.raises(DataError, match=told):
        evaluate_predictions(str(tmp_path), str(predictions))


def test_rows_of_another_dataset_and_labels_that_no_model_knows_are_refused(
    one_file, predictions, draw_rows, tmp_path
):
    pq.write_table(draw_rows(50, 77), tmp_path / "truth.parquet")
    with pytest.raises(DataError, match="--id-column"):
        evaluate_predictions(str(tmp_path), str(predictions))
    rows = pq.read_table(one_file / "big.parquet", columns=["image_id", "labels"])
    unheard = pa.array([["unheard of"]] * rows.num_rows)
    pq.write_table(rows.set_column(1, "labels", unheard), tmp_path / "truth.parquet")
    with pytest.raises(DataError, match="unheard of"):
        evaluate_predictions(str(tmp_path), str(predictions))


def test_a_column_of_other_name_is_found_by_its_option(one_file, predictions, tmp_path):
    rows = pq.read_table(one_file / "big.parquet", columns=["image_id", "labels"])
    pq.write_table(rows.rename_columns(["image_id", "scores"]), tmp_path / "truth.parquet")
    with pytest.raises(DataError, match="--label-column"):
        evaluate_predictions(str(tmp_path), str(predictions))
    found = evaluate_predictions(str(tmp_path), str(predictions), Columns(labels="scores"))
    assert found == evaluate_predictions(str(one_file), str(predictions))


@pytest.mark.parametrize("scores", ["none", "top-2"])
def test_what_needs_every_score_is_null_where_fewer_were_kept(one_file, bundle_uri, tmp_path, scores):
    config = LabelConfig(max_failed_fraction=0.05, scores=scores, limit=200)
    label_dataset(str(one_file), bundle_uri, str(tmp_path / "out"), config=config)
    rows = pq.read_table(one_file / "big.parquet", columns=["image_id", "labels"]).slice(0, 200)
    (tmp_path / "truth").mkdir()
    pq.write_table(rows, tmp_path / "truth/a.parquet")
    found = evaluate_predictions(str(tmp_path / "truth"), str(tmp_path / "out"))
    assert set(found) == KEYS
    assert found["map"] is None
    assert found["ece"] is None
    assert found["num_rows"] == 200


def test_a_folder_that_no_job_labeled_is_refused(one_file):
    with pytest.raises(OutputError, match="no plan"):
        evaluate_predictions(str(one_file), str(one_file))


def test_the_job_writes_the_numbers_as_json(one_file, predictions, tmp_path):
    command = runpy.run_path(str(JOBS / "evaluate.py"))["main"]
    options = ["--data", str(one_file), "--predictions", str(predictions), "--json", str(tmp_path / "n.json")]
    done = CliRunner().invoke(command, options)
    assert done.exit_code == 0, done.output
    assert "sample F1" in done.output
    assert json.loads((tmp_path / "n.json").read_text()) == evaluate_predictions(
        str(one_file), str(predictions)
    )
    assert CliRunner().invoke(command, ["--data", str(one_file)]).exit_code == 2
