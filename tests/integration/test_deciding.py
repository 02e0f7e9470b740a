"""Deciding again: the new output is the old one but for its labels, and these follow from scores and rule."""

import json
import runpy
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from mmray.config import LabelConfig
from mmray.deciding import decide_again, read_thresholds, settle_thresholds
from mmray.errors import ConfigError, DataError, OutputError
from mmray.evaluate import evaluate_predictions
from mmray.labeling import label_dataset
from mmray.plan import Plan, shards_of
from mmray.schema import Vocabulary
from mmray.shards import Committer
from mmray.storage import Folder
from mmray.verify import verify_dataset

pytestmark = pytest.mark.usefixtures("cluster")

JOB = Path(__file__).parents[2] / "jobs" / "decide.py"
VOCABULARY = Vocabulary((1, 2, 13))
KNOWN = np.array([0.1, 0.2, 0.3])


def files(output):
    """Give the labeled files of an output: relative path -> rows."""
    paths = [path for path in output.rglob("*.parquet") if "_mmray" not in path.parts]
    return {str(path.relative_to(output)): pq.read_table(path, partitioning=None) for path in paths}


def expected(row, labels, thresholds, fallback):
    """Decide a row as the documentation says, label by label."""
    if row["status"] == "failed":
        return None
    scores = np.array(row["scores"], np.float32)
    found = [
        label
        for label, score, least in zip(labels, scores, thresholds, strict=True)
        if score >= np.float32(least)
    ]
    return found or ([labels[int(scores.argmax())]] if fallback else [])


def check(before, after, thresholds, fallback=True):
    """Check all rows of an output against those that it was made of; give how many labels changed."""
    labels = Plan.load(Folder(str(before))).settings["labels"]
    old, new = files(before), files(after)
    assert new.keys() == old.keys() != set()
    changed = 0
    for path, table in new.items():
        assert table.schema.equals(old[path].schema)
        others = [name for name in table.column_names if name != "predicted_labels"]
        assert repr(table.select(others).to_pylist()) == repr(old[path].select(others).to_pylist())  # NaN
        rows = table.select(["status", "scores", "predicted_labels"]).to_pylist()
        for row, earlier in zip(rows, old[path]["predicted_labels"].to_pylist(), strict=True):
            assert row["predicted_labels"] == expected(row, labels, thresholds, fallback), path
            changed += row["predicted_labels"] != earlier
    return changed


@pytest.fixture(scope="module")
def decided(labeled, tmp_path_factory):
    """Give the archive's labels, decided again by one threshold. Copy it to change it."""
    output = tmp_path_factory.mktemp("decided") / "rows"
    result = decide_again(str(labeled), str(output), 0.3)
    assert result.counts == json.loads((labeled / "_mmray" / "manifest.json").read_text())["counts"]
    return output


def test_one_threshold_for_all_labels(archive, labeled, decided):
    assert check(labeled, decided, [0.3] * 6) > 100
    verified = verify_dataset(str(archive.folder), str(decided))
    assert verified.problems == []
    assert verified.num_rows == archive.num_rows


def test_the_same_thresholds_change_nothing(labeled, tmp_path):
    decide_again(str(labeled), str(tmp_path / "out"))
    assert check(labeled, tmp_path / "out", thresholds_of(labeled)) == 0


def thresholds_of(output):
    return Plan.load(Folder(str(output))).settings["thresholds"]


def test_without_fallback_a_row_may_be_left_without_a_label(archive, labeled, tmp_path):
    decide_again(str(labeled), str(tmp_path / "out"), {"city": 0.2}, fallback=False)
    thresholds = thresholds_of(labeled)
    thresholds[2] = 0.2
    check(labeled, tmp_path / "out", thresholds, fallback=False)
    rows = [
        row for table in files(tmp_path / "out").values() for row in table["predicted_labels"].to_pylist()
    ]
    assert [] in rows
    assert verify_dataset(str(archive.folder), str(tmp_path / "out")).problems == []


def test_a_decided_output_is_evaluated_as_any_other(archive, labeled, decided, tmp_path):
    (tmp_path / "rows").mkdir()
    shutil.copy(archive.folder / "big.parquet", tmp_path / "rows")
    one, other = (evaluate_predictions(str(tmp_path / "rows"), str(output)) for output in (labeled, decided))
    assert one["map"] == pytest.approx(other["map"])
    assert one["sample_f1"] != other["sample_f1"]


def test_the_same_command_resumes_and_another_rule_is_refused(archive, labeled, decided, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(decided, output)
    again = decide_again(str(labeled), str(output), 0.3)
    assert again.num_resumed > 0
    (output / "_SUCCESS").unlink()
    (output / "_mmray" / "manifest.json").unlink()
    (output / "big.parquet").unlink()
    resumed = decide_again(str(labeled), str(output), 0.3)
    assert resumed.num_resumed == again.num_resumed - 4
    check(labeled, output, [0.3] * 6)
    assert verify_dataset(str(archive.folder), str(output)).problems == []
    with pytest.raises(OutputError, match="thresholds"):
        decide_again(str(labeled), str(output), 0.4)
    with pytest.raises(OutputError, match="fallback"):
        decide_again(str(labeled), str(output), 0.3, fallback=False)


def test_what_cannot_be_decided_again_is_refused(archive, labeled, bundle_uri, tmp_path):
    with pytest.raises(OutputError, match=r"--predictions .* is not finished"):
        decide_again(str(archive.folder), str(tmp_path / "out"), 0.3)
    with pytest.raises(OutputError, match="lies in the input"):
        decide_again(str(labeled), str(labeled / "out"), 0.3)
    (tmp_path / "rows").mkdir()
    shutil.copy(archive.folder / "holiday [*] é.parquet", tmp_path / "rows")
    config = LabelConfig(scores="top-2")
    label_dataset(str(tmp_path / "rows"), bundle_uri, str(tmp_path / "top"), config=config)
    with pytest.raises(ConfigError, match="--scores top-2"):
        decide_again(str(tmp_path / "top"), str(tmp_path / "out"), 0.3)
    assert not (tmp_path / "out").exists()


def test_the_failed_rows_of_a_decided_output_are_not_labeled_again_into_another(
    archive, decided, bundle_uri, tmp_path
):
    places = (str(archive.folder), bundle_uri, str(tmp_path / "again"))
    with pytest.raises(OutputError, match=r"--retry-failed .* comes from decide\.py"):
        label_dataset(*places, retry_failed_uri=str(decided))
    assert not [*(tmp_path / "again").rglob("*.parquet")]


@pytest.mark.parametrize(
    ("given", "settled"),
    [
        (None, [0.1, 0.2, 0.3]),
        (0.5, [0.5, 0.5, 0.5]),
        ({"13": 0.9}, [0.1, 0.2, 0.9]),
        ({13: np.float32(0.5)}, [0.1, 0.2, 0.5]),
        ({"1": 0, "2": 1}, [0, 1, 0.3]),
    ],
)
def test_thresholds_are_one_or_by_label(given, settled):
    found = settle_thresholds(given, VOCABULARY, KNOWN)
    assert found.tolist() == settled and found.dtype == np.float64


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"12": 0.5}, r"labels \['12'\]: there are 1, 2, 13"),
        ({"1": 1.5}, r"threshold 1\.5 of label 1 is no number between 0 and 1"),
        ({"1": "high"}, r"threshold 'high' of label 1"),
        (-0.1, r"threshold -0\.1"),
        (float("nan"), "threshold nan"),
        ({"2": True}, "threshold True of label 2"),
    ],
)
def test_what_is_no_threshold_is_refused(given, told):
    with pytest.raises(ConfigError, match=told):
        settle_thresholds(given, VOCABULARY, KNOWN)


def run(*options):
    main = runpy.run_path(str(JOB))["main"]
    return CliRunner().invoke(main, [str(option) for option in options])


def test_the_job_takes_a_bundles_thresholds(labeled, bundle_uri, tmp_path):
    ran = run(
        *("--predictions", labeled, "--output", tmp_path / "out"),
        *("--thresholds", Path(bundle_uri) / "thresholds.json"),
    )
    assert ran.exit_code == 0, ran.output
    assert "rows labeled" in ran.output
    assert check(labeled, tmp_path / "out", thresholds_of(labeled)) == 0


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ((), "nothing to decide"),
        (("--threshold", "0.5", "--thresholds", "t.json"), "exclude one another"),
    ],
)
def test_the_job_says_what_it_cannot_use(options, told):
    ran = run("--predictions", "in", "--output", "out", *options)
    assert ran.exit_code == 2
    assert told in ran.output


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.json", "{", "is not JSON"),
        ("a.json", "[0.5]", "no file that holds label: threshold pairs"),
        ("a.json", "{}", "no file that holds label: threshold pairs"),
        ("missing.json", None, "no file that holds label: threshold pairs"),
        ("", None, "no file that holds label: threshold pairs"),  # the folder itself
        ("thresholds.json", '{"thresholds": [0.5]}', "no labels.json of the same bundle"),
    ],
)
def test_a_file_without_thresholds_is_refused(name, text, told, tmp_path):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises((ConfigError, DataError), match=told):
        read_thresholds(str(tmp_path / name))


@pytest.mark.parametrize("harm", ["gone", "damaged", "of another job"])
def test_predictions_that_are_not_as_they_were_are_refused(labeled, decided, tmp_path, harm):
    """By an error of the user's: to run the same command again would not help."""
    before, output = tmp_path / "before", tmp_path / "out"
    shutil.copytree(labeled, before)
    if harm == "gone":
        (before / "big.parquet").unlink()
    elif harm == "damaged":
        (before / "big.parquet").write_bytes((before / "big.parquet").read_bytes()[:-9])
    else:  # the same bundle and rows, and yet another fingerprint
        shutil.copy(decided / "big.parquet", before)
    with pytest.raises(OutputError, match=r"big\.parquet is .*verify\.py says more"):
        decide_again(str(before), str(output), 0.3)
    assert not (output / "_SUCCESS").exists()


@pytest.mark.parametrize("num_missing", [1, 0], ids=["some pieces", "all pieces"])
def test_shards_that_are_committed_are_not_decided_again(labeled, decided, tmp_path, num_missing):
    output = tmp_path / "out"
    shutil.copytree(decided, output)
    plan = Plan.load(Folder(str(output)))
    (big,) = (file for file in plan.files if file.path == "big.parquet")
    whole = pq.ParquetFile(output / "big.parquet")
    committer = Committer(Folder(str(output)), plan.fingerprint)
    for path in ("_SUCCESS", "_mmray/manifest.json", "big.parquet"):
        (output / path).unlink()
    for number, shard in enumerate(shards_of(big, big.units)):
        if number >= num_missing:
            committer.commit(shard, whole.read_row_group(number).replace_schema_metadata(None), big)
    result = decide_again(str(labeled), str(output), 0.3)
    assert result.num_resumed == result.num_shards - num_missing
    check(labeled, output, [0.3] * 6)
    assert (output / "big.parquet").read_bytes() == (decided / "big.parquet").read_bytes()
