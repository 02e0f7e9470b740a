"""Self-training with real workers: what the teacher says, what is selected of it, what the student learns."""

import io
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from mmray.ablate import Places, run_rounds
from mmray.bundle import Bundle
from mmray.config import Columns, ComputeConfig, ModelConfig, SelfTrainConfig, TrainConfig
from mmray.datasets import Rows, count_labels, examples
from mmray.errors import OutputError
from mmray.evaluate import evaluate_model
from mmray.labeler import Labeler
from mmray.pseudo import report_of, select
from mmray.schema import Vocabulary
from mmray.selection import as_matrix
from mmray.self_train import SelfTrainingResult, as_table, self_train
from mmray.storage import Folder
from mmray.training_report import training_report
from mmray.variants import Experiment

pytestmark = pytest.mark.usefixtures("cluster")

MODEL = ModelConfig(vision="test_efficientnet", image_size=32, max_tokens=16, width=32, pretrained=False)
TRAIN = TrainConfig(epochs=1, batch_size_per_worker=16, learning_rate=3e-3, warmup_epochs=0.2)
CONFIG = SelfTrainConfig(keep=0.5, rounds=2, targets="hard")
TWO = ComputeConfig("2", use_gpu=False)


@pytest.fixture(scope="module")
def places(draw_rows, spoil, tmp_path_factory):
    """Give folders of labeled, unlabeled and validation rows, and one for the bundle."""
    folder = tmp_path_factory.mktemp("self-training")
    bad = {3: "bad image", 5: "null image", 7: "null caption", 9: "null image, blank caption"}
    rows = {"train": spoil(draw_rows(61, 1), bad)[0], "val": spoil(draw_rows(43, 2), bad)[0]}
    more, _ = spoil(draw_rows(150, 3), {3: "bad image, null caption", 4: "null image", 77: "null caption"})
    rows |= {"unlabeled/a": more.slice(0, 100), "unlabeled/deep/b": more.slice(100)}
    for path, table in rows.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, folder / f"{path}.parquet", row_group_size=17)
    return [str(folder / name) for name in ("train.parquet", "unlabeled", "val.parquet", "bundle")]


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Give the recipe, with a stage before it: an image tower on smaller pictures."""
    stage = tmp_path_factory.mktemp("stages") / "small.yaml"
    stage.write_text(
        "fusion: image\nvision: test_efficientnet\nimage-size: 16\npretrained: false\nepochs: 1\n"
        "batch-size-per-worker: 16\nword-weight: 0.5\n"
    )
    return replace(TRAIN, init=(str(stage),))


@pytest.fixture(scope="module")
def result(cluster, places, train):
    return self_train(*places, MODEL, train, CONFIG, compute=TWO)


def test_teacher_and_student_start_from_the_same_stage(result, places):
    stage = Bundle.load(f"{places[3]}/_train/init/small")
    assert (stage.model_config.fusion, stage.model_config.image_size) == ("image", 16)
    for number, entry in enumerate(result.rounds):
        assert entry["metrics"]["training"]["init"] == {"image": "small"}
        recipe = Folder(f"{places[3]}/_rounds/{number}/bundle").read_json("_train/recipe.json")
        assert recipe["train"]["init"] == {"image": stage.fingerprint}


def test_each_student_teaches_the_next_one(result, places):
    for number in (1, 2):
        teacher = Bundle.load(f"{places[3]}/_rounds/{number - 1}/bundle")
        labels = pq.read_table(f"{places[3]}/_rounds/{number}/labels", partitioning=None)
        assert set(labels["model"].to_pylist()) == {teacher.fingerprint}


def test_what_a_round_gained_is_over_its_own_teacher_and_precision_over_all_known_labels():
    selection = {"num_rows": 2000, "num_selected": 1500}
    labels = {"x": entry(1000, 10, 0.0) | entry(5, 0, None, "false"), "y": entry(10, 10, 1.0)}
    scores = [{"sample_f1": f1, "map": 0.5, "macro_f1": 0.5} for f1 in (0.5, 0.6, 0.65)]
    rounds = [{"metrics": scores[0]}] + [
        {"metrics": each, "selection": selection | {"by_label": labels}} for each in scores[1:]
    ]
    console = Console(width=120, file=io.StringIO())
    console.print(as_table(SelfTrainingResult(None, rounds, 2, 1.0)))
    lines = console.file.getvalue().splitlines()
    assert [line.split()[-2] for line in lines if "1,500 of 2,000" in line] == ["+0.1000", "+0.0500"]
    assert all(" 0.500 " in line for line in lines if "1,500 of 2,000" in line)


def test_two_workers_on_uneven_rows_measure_what_one_process_measures(result, places):
    student = f"{places[3]}/_rounds/1/bundle"
    alone = evaluate_model(places[2], student, compute=ComputeConfig(use_gpu=False))
    assert alone["num_rows"] == 43
    for name in ("num_rows", "sample_f1", "micro_f1", "macro_f1", "map", "empty_rate", "fallback_rate"):
        assert result.rounds[1]["metrics"][name] == pytest.approx(alone[name], abs=1e-6), name
    captions = evaluate_model(places[2], student, compute=ComputeConfig(use_gpu=False), hidden="image")
    by_caption = result.rounds[1]["metrics"]["by_modality"]["caption"]
    assert by_caption["sample_f1"] == pytest.approx(captions["sample_f1"], abs=1e-6)
    assert by_caption["map"] == pytest.approx(captions["map"], abs=1e-6)


def test_the_best_rounds_bundle_is_the_one_that_stands_in_the_output(result, places):
    output = Folder(places[3])
    metrics = [entry["metrics"]["sample_f1"] for entry in result.rounds]
    assert len(metrics) == 3 and metrics[result.best] == max(metrics)
    assert Bundle.load(places[3]).fingerprint == result.bundle.fingerprint
    assert Bundle.load(f"{output}/_rounds/{result.best}/bundle").fingerprint == result.bundle.fingerprint
    assert output.read_json("_rounds/report.json")["best"] == result.best


def test_the_report_counts_what_joined_and_how_right_it_is(result, places):
    vocabulary = result.bundle.vocabulary
    report, selection = result.rounds[1]["selection"], Folder(places[3]) / "_rounds/1/selection"
    assert report["num_rows"] == 150
    truth, true, known = [], [], []
    for path in ("a.parquet", "deep/b.parquet"):
        labels = vocabulary.encode(pq.read_table(f"{places[1]}/{path}", partitioning=None)["labels"])
        chosen = pq.read_table(selection.path(path), partitioning=None)
        truth.append(labels[chosen["row"].to_numpy()].astype(bool))
        true.append(as_matrix(chosen["targets"]).astype(bool))
        known.append(as_matrix(chosen["mask"]))
    truth, true, known = map(np.concatenate, (truth, true, known))
    assert report["num_selected"] == len(truth) > 0
    for place, entry in enumerate(report["by_label"].values()):
        taken, denied = true[:, place], known[:, place] & ~true[:, place]
        assert (entry["num_true"], entry["num_false"]) == (taken.sum(), denied.sum())
        precision = truth[taken, place].mean() if taken.any() else None
        assert entry["precision_true"] == pytest.approx(precision)
        assert entry["precision_false"] == pytest.approx(1 - truth[denied, place].mean())


def entry(taken, known, precision, kind="true"):
    return {f"num_{kind}": taken, f"known_{kind}": known, f"precision_{kind}": precision}


def test_only_rows_of_known_truth_say_how_right_a_label_is():
    counts = {"num_true": [4, 0], "known_true": [2, 0], "right_true": [1, 0]}
    counts |= {"num_false": [3, 3], "known_false": [0, 3], "right_false": [0, 3]}
    report = report_of([{"path": "a", "num_rows": 5, **counts}], 9, Vocabulary(("x", "y")))
    assert report["by_label"] == {
        "x": entry(4, 2, 0.5) | entry(3, 0, None, "false"),
        "y": entry(0, 0, None) | entry(3, 3, 1.0, "false"),
    }


def test_the_student_sees_labeled_rows_and_the_selected_ones_as_they_were_selected(result, places):
    columns, vocabulary = Columns(), result.bundle.vocabulary
    labeled, unlabeled = (Rows.find(place, columns, needs=("image", "caption")) for place in places[:2])
    _, positives = count_labels(labeled)
    shares = positives / labeled.num_rows
    pseudo, _ = select(unlabeled, Folder(places[3]) / "_rounds/1", vocabulary, shares, CONFIG)
    assert pseudo.num_rows == result.rounds[1]["selection"]["num_selected"]
    read = list(examples([labeled, pseudo], vocabulary, seed=(3,)).iter_rows())
    seen = {(row["image"], row["caption"]): (list(row["targets"]), list(row["mask"])) for row in read}
    assert len(seen) == len(read) == labeled.num_rows + pseudo.num_rows
    for row in pq.read_table(places[0]).to_pylist():
        targets, mask = seen[row["image"], row["caption"]]
        assert [vocabulary.labels[place] for place in np.flatnonzero(targets)] == row["labels"]
        assert all(mask)
    for path in pseudo.selection.num_rows:
        rows = pq.read_table(f"{places[1]}/{path}", partitioning=None).to_pylist()
        for chosen in pq.read_table(pseudo.selection.folder.path(path), partitioning=None).to_pylist():
            row = rows[chosen["row"]]
            assert seen[row["image"], row["caption"]] == (chosen["targets"], chosen["mask"])


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (pa.nulls(150), []),  # as pandas writes labels that were taken away
        (pa.array(["cat", "dog"] * 75), ["labels of type string are no lists"]),
    ],
)
def test_labels_that_are_none_end_no_round(result, places, tmp_path, caplog, labels, told):
    labeled = [
        pq.read_table(f"{places[1]}/{path}", partitioning=None) for path in ("a.parquet", "deep/b.parquet")
    ]
    hidden = pa.concat_tables(labeled).drop("labels").append_column("labels", labels)
    (tmp_path / "rows/deep").mkdir(parents=True)
    pq.write_table(hidden[:100], tmp_path / "rows/a.parquet")
    pq.write_table(hidden[100:], tmp_path / "rows/deep/b.parquet")
    shutil.copytree(f"{places[3]}/_rounds/1/labels", tmp_path / "round/labels")
    unlabeled = Rows.find(str(tmp_path / "rows"), Columns(), needs=("image", "caption"))
    vocabulary = result.bundle.vocabulary
    shares = np.full(len(vocabulary), 0.3)
    _, report = select(unlabeled, Folder(str(tmp_path / "round")), vocabulary, shares, CONFIG)
    assert report["num_selected"] > 0
    assert {label["known_true"] for label in report["by_label"].values()} == {0}
    assert [
        line.message.count(each) for line in caplog.records if line.name == "mmray.pseudo" for each in told
    ] == [1] * len(told)
    assert ("2 of 2 files" in caplog.text) == bool(told)


def test_an_ablation_holds_the_student_against_its_teacher_and_more_steps(result, places, train):
    """What is there already is not trained again, so that only the control is."""
    where = Places(places[0], places[2], places[1], Columns(), TWO)
    folder = Folder(str(Path(places[3]).parent))
    readings = run_rounds(Experiment(MODEL, train, CONFIG), where, folder)
    teacher, student = result.rounds[0]["metrics"], result.rounds[-1]["metrics"]
    assert readings["whole"]["sample_f1"] == student["sample_f1"]
    assert readings["teacher"]["sample_f1"] == teacher["sample_f1"]
    control = folder.read_json("more-steps/metrics.json")
    assert readings["more steps"]["sample_f1"] == control["sample_f1"]
    assert control["training"]["num_rows"] == teacher["training"]["num_rows"]
    more = student["training"]["num_rows"] / teacher["training"]["num_rows"]
    assert len(control["history"]) == round(more) > 1


def test_the_page_shows_epochs_rounds_and_what_is_confused(result, places):
    page = training_report(Folder(places[3]))
    sections = {section.title: section for section in page.sections}
    metrics = result.rounds[result.best]["metrics"]
    assert len(list((Folder(places[3]) / "_rounds/1/bundle/_train").list(".mmray"))) == 1
    (epochs,), (rounds,) = sections["Epochs"].tables, sections["Rounds of self-training"].tables
    assert epochs.rows[0][:2] == ["1 (kept)", f"{metrics['loss']:.4f}"]
    told = [dict(zip(rounds.columns, row, strict=True)) for row in rounds.rows]
    assert [row["sample F1"] for row in told] == [
        f"{entry['metrics']['sample_f1']:.4f}" for entry in result.rounds
    ]
    assert [row["rows joined"].partition(" ")[0] for row in told[1:]] == [
        str(entry["selection"]["num_selected"]) for entry in result.rounds[1:]
    ]
    trained = {row[0]: row[-1] for row in sections["Labels"].tables[0].rows}
    truth = Counter(label for labels in pq.read_table(places[0])["labels"].to_pylist() for label in labels)
    assert trained == {label: str(count) for label, count in truth.items()}
    assert len(sections["Label by label"].charts) == 2 * len(trained)
    reader = sections["Confusion"].tables[0]
    assert [row[0] for row in reader.rows] == list(reader.columns[1:])
    missed = sum(int(cell.text or 0) for row in reader.rows for cell in row[1:])
    assert missed == count_confused(places, result)
    assert "<svg" in page.html()


def count_confused(places, result):
    """Count pairs of a label that a validation row was not given, and one that it was given instead."""
    labeler, rows = Labeler.load(places[3]), pq.read_table(places[2])
    labeled = labeler(rows["image"].to_pylist(), rows["caption"].to_pylist())
    targets = result.bundle.vocabulary.encode(rows["labels"]).astype(bool)
    missed, wrong = targets & ~labeled.decided, labeled.decided & ~targets
    return int((missed.sum(axis=1) * wrong.sum(axis=1)).sum())


def test_the_same_command_again_does_nothing_and_another_selection_is_refused(result, places, train):
    before = Folder(places[3]).list()
    again = self_train(*places, MODEL, train, CONFIG, compute=TWO)
    assert again.rounds == result.rounds and again.bundle.fingerprint == result.bundle.fingerprint
    assert Folder(places[3]).list() == before
    with pytest.raises(OutputError, match="unknown origin"):
        self_train(*places[:3], f"{places[3]}/_rounds/0/bundle", MODEL, train, CONFIG, compute=TWO)
    with pytest.raises(OutputError, match=r"keep: 0\.5 -> 0\.6"):
        self_train(*places, MODEL, train, SelfTrainConfig(keep=0.6, rounds=2), compute=TWO)
