"""Hostile input: nothing that it brings is run, whichever job reads it."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmray.errors import DataError
from mmray.evaluate import evaluate_model, evaluate_predictions
from mmray.labeling import label_dataset
from mmray.training import train_model
from mmray.verify import verify_dataset

pytestmark = pytest.mark.usefixtures("cluster")


class Touch:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def trap(tmp_path):
    """Give a column of pickles, as Ray Data writes Python objects, and the file that they leave behind."""
    from ray.data.extensions.object_extension import ArrowPythonObjectArray

    touched = tmp_path / "touched"
    column = ArrowPythonObjectArray.from_objects([Touch(touched)] * 20)
    column[0].as_py()
    assert touched.exists(), "a trap that does not close proves nothing"
    touched.unlink()
    return column, touched


@pytest.fixture(scope="module")
def output(cluster, draw_rows, bundle_uri, tmp_path_factory):
    """Give the output of rows that were harmless then."""
    folder = tmp_path_factory.mktemp("harmless")
    pq.write_table(draw_rows(20), folder / "a.parquet")
    label_dataset(str(folder / "a.parquet"), bundle_uri, str(folder / "out"))
    return folder / "out"


@pytest.mark.parametrize("name", ["image", "labels", "notes"])
def test_a_column_of_pickles_is_refused_by_every_job_and_never_loaded(
    draw_rows, trap, output, bundle_uri, tmp_path, name
):
    column, touched = trap
    rows, folder = draw_rows(20), tmp_path / "rows"
    folder.mkdir()
    rows = rows.drop_columns(name) if name in rows.column_names else rows
    pq.write_table(rows.append_column(name, column), folder / "a.parquet")
    uses = [
        lambda: label_dataset(str(folder), bundle_uri, str(tmp_path / "other")),
        lambda: train_model(str(folder), str(folder), str(tmp_path / "bundle")),
        lambda: evaluate_model(str(folder), bundle_uri),
        lambda: evaluate_predictions(str(folder), str(output)),
    ]
    for use in uses:
        with pytest.raises(DataError, match="pickled Python objects"):
            use()
    assert verify_dataset(str(folder), str(output)).problems
    assert not touched.exists()


def test_pickles_inside_of_lists_and_structs_are_refused(draw_rows, trap, bundle_uri, tmp_path):
    column, touched = trap
    nested = pa.StructArray.from_arrays(
        [pa.ListArray.from_arrays(pa.array(range(21), pa.int32()), column)], ["deep"]
    )
    pq.write_table(draw_rows(20).append_column("notes", nested), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="'notes' holds pickled Python objects"):
        label_dataset(str(tmp_path / "a.parquet"), bundle_uri, str(tmp_path / "out"))
    assert not touched.exists()
