"""The recipe on the real data, from raw files to numbers: `make test-recipes`, over an hour of two cores."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from held_out import refuse_held_out

REPOSITORY = Path(__file__).parents[2]
pytestmark = pytest.mark.recipe


def run(job: str, *options: object) -> str:
    command = [sys.executable, f"jobs/{job}.py", *map(str, options)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    print(done.stdout, done.stderr, sep="\n")
    assert done.returncode == 0, done.stderr
    return done.stdout


def measure(*options: object, to: Path) -> dict:
    run("evaluate", *options, "--json", to)
    return json.loads(to.read_text())


@pytest.fixture(scope="module")
def bundle(coco18: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train by the recipe, into build/coco18 so that a second run of these tests finds it done."""
    output = REPOSITORY / "build" / "coco18"
    refuse_held_out(coco18 / "train")
    recipe = ("--config", "jobs/recipes/coco18.yaml")
    run("train", *recipe, "--data", coco18 / "train", "--val", coco18 / "val", "--output", output)
    return output


def test_prepare_reports_every_row_of_the_raw_csv(coco18, tmp_path):
    raw = coco18 / "raw"
    told = run(
        "prepare", "kaggle", "--csv", raw / "train.csv", "--images", raw / "data", "--output", tmp_path
    )
    assert "26,000" in told
    table = pq.read_table(tmp_path, columns=["image", "caption"])
    assert table.num_rows == 26_000
    assert table.num_rows - table["image"].null_count == 300


def test_labels_are_right_and_the_ways_to_measure_them_agree(coco18, bundle, tmp_path):
    run("label", "--input", coco18 / "val", "--model", bundle, "--output", tmp_path / "val")
    run("verify", "--input", coco18 / "val", "--output", tmp_path / "val")
    of_output = measure(
        "--data", coco18 / "val", "--predictions", tmp_path / "val", to=tmp_path / "output.json"
    )
    of_bundle = measure("--data", coco18 / "val", "--model", bundle, to=tmp_path / "bundle.json")
    for name in (
        "num_rows",
        "sample_f1",
        "micro_f1",
        "macro_f1",
        "map",
        "ece",
        "empty_rate",
        "fallback_rate",
    ):
        assert of_output[name] == pytest.approx(of_bundle[name], abs=1e-6), name
    # Somewhat less than what RESULTS.md tells of.
    for name, least in {"sample_f1": 0.868, "map": 0.775, "macro_f1": 0.745}.items():
        assert of_output[name] >= least, name


def test_each_modality_is_worth_what_is_told_of_it(coco18, bundle, tmp_path):
    val = ("--data", coco18 / "val", "--model", bundle)
    images = measure(*val, "--hide", "caption", to=tmp_path / "images.json")
    captions = measure(*val, "--hide", "image", to=tmp_path / "captions.json")
    both = measure(*val, to=tmp_path / "both.json")
    assert images["map"] >= 0.4
    assert both["map"] - captions["map"] >= 0.02 and both["sample_f1"] - captions["sample_f1"] >= 0.01


def test_unlabeled_rows_are_labeled_and_verified(coco18, bundle, tmp_path):
    run("label", "--input", coco18 / "unlabeled", "--model", bundle, "--output", tmp_path)
    assert "no problems" in run("verify", "--input", coco18 / "unlabeled", "--output", tmp_path)


def test_the_image_tower_counts(coco18, bundle, tmp_path):
    rows = pq.read_table(coco18 / "val")
    mixed = rows["image"].take(pa.array(np.random.default_rng(0).permutation(rows.num_rows)))
    (tmp_path / "mixed").mkdir()
    mixed_rows = rows.set_column(rows.schema.get_field_index("image"), "image", mixed)
    pq.write_table(mixed_rows, tmp_path / "mixed" / "part.parquet", row_group_size=1000)
    own = measure("--data", coco18 / "val", "--model", bundle, to=tmp_path / "own.json")
    others = measure("--data", tmp_path / "mixed", "--model", bundle, to=tmp_path / "others.json")
    print(f"mAP {own['map']:.4f} with each row's own image, {others['map']:.4f} with another's")
    assert others["map"] < own["map"] - 0.02
