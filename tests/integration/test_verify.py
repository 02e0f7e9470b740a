"""Verify finds whatever was done to an output, names the file, and the row where the input shows it."""

import json
import runpy
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from mmray.errors import OutputError
from mmray.verify import verify_dataset

pytestmark = pytest.mark.usefixtures("cluster")

JOBS = Path(__file__).parents[2] / "jobs"
FILE = "country=at/year=2025/a.parquet"


@pytest.fixture
def output(labeled, tmp_path):
    """Give a copy of the labeled archive, to be tampered with."""
    return Path(shutil.copytree(labeled, tmp_path / "output"))


def problems(archive, output):
    return verify_dataset(str(archive.folder), str(output)).problems


def rewrite(output, change, path=FILE):
    """Write a labeled file anew, as `change` makes it."""
    table = pq.read_table(output / path, partitioning=None)
    pq.write_table(change(table), output / path)


def with_value(table, column, row, value):
    index = table.schema.get_field_index(column)
    field = table.schema.field(index)
    values = table[column].to_pylist()
    values[row] = value
    return table.set_column(index, field, pa.array(values, field.type))


def take(rows):
    return lambda table: table.take(pa.array(rows(table.num_rows)))


def test_an_untouched_output_has_no_problems(archive, labeled):
    found = verify_dataset(str(archive.folder), str(labeled))
    assert found.problems == []
    assert found.num_files == len(archive.statuses)
    assert found.num_rows == archive.num_rows


@pytest.mark.parametrize(
    ("change", "row"),
    [
        (take(lambda n: [*range(40), *range(41, n)]), 40),
        (take(lambda n: range(n - 1)), 89),
        (take(lambda n: [*range(6), 5, *range(6, n)]), 6),
        (take(lambda n: [*range(n), n - 1]), 90),
        (take(lambda n: [*range(20), 21, 20, *range(22, n)]), 20),
        (lambda table: with_value(table, "image_id", 33, "another"), 33),
        (lambda table: with_value(table, "caption", 33, "another"), 33),
        (lambda table: with_value(table, "facts", 89, [("depth", -1)]), 89),
    ],
    ids=["deleted", "last deleted", "doubled", "last doubled", "swapped", "id", "caption", "map"],
)
def test_a_row_that_is_not_the_inputs_is_named(archive, output, change, row):
    rewrite(output, change)
    found = problems(archive, output)
    assert any(line.startswith(f"{FILE}: row {row}:") for line in found), found
    assert all(line.startswith(f"{FILE}:") for line in found), found


@pytest.mark.parametrize(
    "change",
    [
        lambda table: with_value(table, "predicted_labels", 2, ["beach", "forest"]),
        lambda table: with_value(table, "scores", 2, [0.5] * 6),
        lambda table: table,
    ],
    ids=["label", "score", "only the bytes"],
)
def test_what_the_input_cannot_show_is_found_by_its_bytes(archive, output, change):
    rewrite(output, change)
    assert problems(archive, output) == [f"{FILE}: its bytes are not those of the manifest"]


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("status", "fine"),
        ("status", "failed"),
        ("model", "another"),
        ("scores", [0.1, 0.2, 0.3, 0.4, 0.5, 1.5]),
        ("scores", None),
        ("predicted_labels", None),
        ("error", "none"),
    ],
)
def test_a_prediction_that_no_model_makes_is_named_with_its_row(archive, output, column, value):
    rewrite(output, lambda table: with_value(table, column, 4, value))
    assert any(line.startswith(f"{FILE}: row 4: has ") for line in problems(archive, output))


def test_a_label_that_the_model_does_not_know_is_named(archive, output):
    rewrite(output, lambda table: with_value(table, "predicted_labels", 4, ["unheard of"]))
    assert any("labels that the model does not know" in line for line in problems(archive, output))


def test_other_columns_are_named(archive, output):
    rewrite(output, lambda table: table.drop_columns("tags"))
    assert any("tags" in line for line in problems(archive, output))


def test_a_missing_and_an_added_file_are_named(archive, output):
    shutil.move(output / FILE, output / "stranger.parquet")
    found = problems(archive, output)
    assert any(line.startswith(f"{FILE}: missing") for line in found)
    assert any(line.startswith("stranger.parquet: added") for line in found)


def test_a_torn_file_is_named(archive, output):
    (output / FILE).write_bytes((output / FILE).read_bytes()[:-100])
    assert any(line.startswith(f"{FILE}: cannot be read") for line in problems(archive, output))


def test_an_edited_manifest_is_found(archive, output):
    manifest = json.loads((output / "_mmray/manifest.json").read_text())
    manifest["files"][0]["num_rows"] += 1
    (output / "_mmray/manifest.json").write_text(json.dumps(manifest))
    path = manifest["files"][0]["path"]
    assert any(path in line and "num_rows" in line for line in problems(archive, output))


def test_an_input_that_changed_or_grew_is_named(archive, labeled, tmp_path):
    rows = Path(shutil.copytree(archive.folder, tmp_path / "rows"))
    shutil.copy(rows / FILE, rows / "late.parquet")
    (rows / "country=de/empty.parquet").unlink()
    table = pq.read_table(rows / FILE, partitioning=None)
    pq.write_table(with_value(table, "whole", 3, 7), rows / FILE, row_group_size=17)
    found = verify_dataset(str(rows), str(labeled)).problems
    assert any(line.startswith("late.parquet: came to the input") for line in found)
    assert any(line.startswith("country=de/empty.parquet: gone") for line in found)
    assert any(line.startswith(f"{FILE}: ") for line in found)


def test_an_unfinished_output_is_refused(archive, output):
    (output / "_SUCCESS").unlink()
    with pytest.raises(OutputError, match="not finished"):
        problems(archive, output)


def test_the_exit_status_tells_right_from_different_from_no_output(archive, labeled, output, tmp_path):
    command = runpy.run_path(str(JOBS / "verify.py"))["main"]

    def run(folder):
        return CliRunner().invoke(command, ["--input", str(archive.folder), "--output", str(folder)])

    assert run(labeled).exit_code == 0
    assert "skipped" not in run(labeled).output
    rewrite(output, lambda table: with_value(table, "caption", 1, "another"))
    different = run(output)
    assert different.exit_code == 1
    assert f"{FILE}: row 1:" in different.output
    assert run(tmp_path).exit_code == 2
