"""Training with real Ray Train workers: exact validation, uneven shards, kills, refusals."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import ray.data
import safetensors.torch
import torch
from sklearn.metrics import average_precision_score

from mmray.bundle import Bundle, tokenizer_of
from mmray.captions import tokenize, train_tokenizer
from mmray.config import Columns, ComputeConfig, ModelConfig, TrainConfig
from mmray.datasets import Rows, RowSource, count_labels
from mmray.demo import draw_scene
from mmray.errors import ConfigError, DataError, OutputError
from mmray.fitting import decoded_rows
from mmray.learner import PROGRESS
from mmray.start import NGRAMS, RECIPE, START, Start, prepare_start
from mmray.storage import Folder
from mmray.training import train_model
from mmray.worker import Collate, TrainJob, train_epoch

JOBS = Path(__file__).parents[2] / "jobs"
MODEL = ModelConfig(vision="test_efficientnet", image_size=32, max_tokens=16, width=32, pretrained=False)
TRAIN = TrainConfig(epochs=1, batch_size_per_worker=16, learning_rate=3e-3, warmup_epochs=0.2)


def write_scenes(folder: Path, num_rows: int, seed: int, *, spoil: bool = False) -> Path:
    """Write drawn scenes as two files of uneven row groups; some rows spoilt in every way."""
    generator = np.random.default_rng(seed)
    images, captions, labels = map(list, zip(*(draw_scene(generator) for _ in range(num_rows)), strict=True))
    if spoil:
        images[3], images[5], captions[7] = b"no image", None, None
        images[9], captions[9] = None, ""
        labels[11] = None
    table = pa.table(
        {
            "image_id": [f"{seed}-{row}" for row in range(num_rows)],
            "image": pa.array(images, pa.binary()),
            "caption": captions,
            "labels": pa.array(labels, pa.list_(pa.string())),
        }
    )
    folder.mkdir(parents=True)
    cut = num_rows // 3
    pq.write_table(table.slice(0, cut), folder / "a.parquet", row_group_size=5)
    pq.write_table(table.slice(cut), folder / "b.parquet", row_group_size=17)
    return folder


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("scenes")
    return {
        "train": str(write_scenes(folder / "train", 101, 0, spoil=True)),
        "val": str(write_scenes(folder / "val", 43, 1, spoil=True)),
    }


@pytest.mark.usefixtures("cluster")
def test_each_epoch_reads_every_row_once_in_another_order(scenes):
    rows = Rows.find(scenes["train"], Columns())
    source = RowSource((rows,), ("caption", "labels"), seed=(7,))
    stream = ray.data.read_datasource(source).streaming_split(1)[0]
    epochs = [[batch["draw"][0] for batch in stream.iter_batches(batch_size=None)] for _ in range(2)]
    assert epochs[0] != epochs[1]
    for _ in range(2):
        assert captions_of([stream]) == captions_of_files(scenes["train"])


@pytest.mark.usefixtures("cluster")
def test_workers_share_the_rows_equally_and_none_is_seen_twice(scenes):
    rows = Rows.find(scenes["train"], Columns())
    stream = ray.data.read_datasource(RowSource((rows,), ("caption", "labels"), seed=(7,)))
    seen, there = captions_of(stream.streaming_split(2, equal=True)), captions_of_files(scenes["train"])
    assert seen.total() == 100 and seen <= there and there.total() == 101


def captions_of(shares):
    """Count the captions that workers see, who read at the same time."""

    def read(share):
        return Counter(str(each) for batch in share.iter_batches(batch_size=10) for each in batch["caption"])

    with ThreadPoolExecutor(len(shares)) as workers:
        return sum(workers.map(read, shares), start=Counter())


def captions_of_files(folder):
    tables = [pq.read_table(path) for path in Path(folder).rglob("*.parquet")]
    return Counter(str(caption) for table in tables for caption in table["caption"].to_pylist())


class Recorder:
    """Stands where a learner does, and notes what it is given to learn from."""

    with_words, device = None, torch.device("cpu")

    def __init__(self, config):
        self.config, self.seen = config, []

    def step(self, inputs, targets, mask, words):
        self.seen.append((inputs, targets, mask))
        return torch.tensor(float(len(self.seen)))


def test_an_epoch_hides_words_and_modalities_as_it_is_told_and_gives_the_mean_loss():
    tokenizer = train_tokenizer(["a red bus on a wet road", "two dogs and a cat"])
    captions = np.array(["a red bus on a wet road"] * 400, object)
    batch = Collate(tokenizer, 16)(
        {
            "pixels": np.zeros((400, 2, 2, 3), np.uint8),
            "caption": captions,
            "has_image": np.ones(400, bool),
            "has_caption": np.ones(400, bool),
            "valid": np.ones(400, bool),
            "targets": np.ones((400, 3), np.float32),
            "mask": np.ones((400, 3), bool),
        }
    )
    learner = Recorder(replace(TRAIN, word_dropout=0.3, modality_dropout=0.2))
    torch.manual_seed(0)
    assert train_epoch(learner, [dict(batch), dict(batch), dict(batch)], tokenizer) == 2.0
    inputs = [inputs for inputs, _, _ in learner.seen]
    words = (batch["input_ids"] != tokenizer.cls_token_id) & (batch["input_ids"] != tokenizer.sep_token_id)
    for each in inputs:
        masked = (each.input_ids == tokenizer.mask_token_id)[words].float().mean()
        assert float(masked) == pytest.approx(0.3, abs=0.05)
        hidden = 1 - each.has_image.float().mean(), 1 - each.has_caption.float().mean()
        assert [float(share) for share in hidden] == pytest.approx([0.2, 0.2], abs=0.06)
    assert not torch.equal(inputs[0].input_ids, inputs[1].input_ids)


@pytest.mark.usefixtures("cluster")
def test_a_try_that_was_refused_leaves_nothing_for_the_next_one(scenes, tmp_path):
    table = pq.read_table(scenes["val"])
    table = table.set_column(3, "labels", pa.array([["unseen"]] * table.num_rows))
    pq.write_table(table, tmp_path / "others.parquet")
    others, output = str(tmp_path / "others.parquet"), Folder(str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="no_such_tower"):
        train_model(others, others, output.uri, replace(MODEL, vision="no_such_tower"), TRAIN)
    assert output.read_json(START)["labels"] == ["unseen"]
    rows = Rows.find(scenes["train"], Columns())
    start = prepare_start(output, [rows], rows, MODEL, TRAIN, {})
    assert start.vocabulary == count_labels(rows)[0] and start.num_labeled == rows.num_rows


@pytest.mark.usefixtures("cluster")
def test_ngrams_are_fitted_to_captions_and_labels_once_and_found_again(scenes, tmp_path):
    rows, output = Rows.find(scenes["train"], Columns()), Folder(str(tmp_path))
    counting = replace(MODEL, fusion="text", ngrams=True)
    start = prepare_start(output, [rows], rows, counting, TRAIN, {})
    model = start.build(counting).eval()
    table = pq.read_table(scenes["train"], columns=["caption", "labels"])
    table = table.filter(pc.fill_null(pc.greater(pc.utf8_length(table["caption"]), 0), False))
    assert table.num_rows == rows.num_rows - 2, "a null caption, and an empty one"
    ids, mask = tokenize(tokenizer_of(start.tokenizer_files), table["caption"].to_pylist(), MODEL.max_tokens)
    logits = model.ngrams(torch.from_numpy(ids), torch.from_numpy(mask)).detach().numpy()
    targets = start.vocabulary.encode(table["labels"])
    for label in ("beach", "city", "forest"):  # which captions tell
        column = start.vocabulary.labels.index(label)
        assert average_precision_score(targets[:, column], logits[:, column]) > 0.95
    output.publish_json(RECIPE, {})
    output.publish(NGRAMS, b"those that were fitted")
    again = prepare_start(output, [rows], rows, counting, TRAIN, {})
    assert again.ngrams == b"those that were fitted"


@pytest.mark.usefixtures("cluster")
def test_ngrams_need_a_caption(scenes, tmp_path):
    table = pq.read_table(scenes["train"]).drop_columns("caption")
    table = table.append_column("caption", pa.nulls(table.num_rows, pa.string()))
    pq.write_table(table, tmp_path / "rows.parquet")
    rows, output = Rows.find(str(tmp_path / "rows.parquet"), Columns()), Folder(str(tmp_path / "out"))
    with pytest.raises(DataError, match="no row has a caption for n-grams; use --no-ngrams"):
        prepare_start(output, [rows], rows, replace(MODEL, ngrams=True), TRAIN, {})


@pytest.mark.usefixtures("cluster")
def test_labels_that_are_null_are_told_of(scenes, caplog):
    count_labels(Rows.find(scenes["train"], Columns()))
    (told,) = caplog.messages
    assert "labels of 1 of 101 rows are null" in told and "--unlabeled" in told


@pytest.mark.usefixtures("cluster")
def test_who_goes_on_from_an_epoch_sees_other_views_than_who_begins(scenes):
    rows = Rows.find(scenes["train"], Columns())
    vocabulary, positives = count_labels(rows)
    start = Start(vocabulary, rows.num_rows, positives, {}, {}, {})
    job = TrainJob(MODEL, TRAIN, start, [], rows.num_rows, Folder(scenes["train"]), None)

    def seen(epochs_done):
        batches = decoded_rows([rows], job, 0.5, epochs_done).iter_batches(batch_size=None)
        return [
            (str(row), view.sum())
            for batch in batches
            for row, view in zip(batch["caption"], batch["pixels"], strict=True)
        ]

    begun, resumed, plain = seen(0), seen(1), seen(None)
    assert seen(0) == begun and seen(None) == plain
    captions = [sorted(caption for caption, _ in found) for found in (begun, resumed, plain)]
    assert captions[0] == captions[1] == captions[2]
    assert len({*begun} & {*resumed}) < len(begun) / 2, "most views came again"


@pytest.mark.usefixtures("cluster")
def test_a_model_of_captions_alone_is_sent_no_images(scenes):
    rows = Rows.find(scenes["train"], Columns())
    vocabulary, positives = count_labels(rows)
    start = Start(vocabulary, rows.num_rows, positives, {}, {}, {})
    job = TrainJob(
        replace(MODEL, fusion="text"), TRAIN, start, [], rows.num_rows, Folder(scenes["train"]), None
    )
    batches = list(decoded_rows([rows], job, 0.5, epochs_done=0).iter_batches(batch_size=None))
    assert sum(batch["pixels"].nbytes for batch in batches) == 3 * rows.num_rows
    assert sum(batch["has_caption"].sum() for batch in batches) == rows.num_rows - 2
    assert not any(batch["has_image"].any() for batch in batches)


@pytest.mark.usefixtures("cluster")
def test_labels_that_only_validation_has_are_refused(scenes, tmp_path):
    table = pq.read_table(scenes["val"])
    table = table.set_column(3, "labels", pa.array([["unseen"]] * table.num_rows))
    (tmp_path / "val").mkdir()
    pq.write_table(table, tmp_path / "val" / "a.parquet")
    with pytest.raises(DataError, match="unseen"):
        train_model(scenes["train"], str(tmp_path / "val"), str(tmp_path / "out"), MODEL, TRAIN)


@pytest.mark.usefixtures("cluster")
def test_fewer_rows_than_workers_are_refused(scenes, tmp_path):
    few = tmp_path / "few"
    few.mkdir()
    pq.write_table(pq.read_table(scenes["train"]).slice(0, 2), few / "a.parquet")
    with pytest.raises(DataError, match="2 rows for 3 workers"):
        train_model(
            str(few),
            scenes["val"],
            str(tmp_path / "out"),
            MODEL,
            TRAIN,
            compute=ComputeConfig("3", use_gpu=False),
        )


@pytest.mark.usefixtures("cluster")
def test_gpus_that_are_not_there_are_refused(scenes, tmp_path):
    import ray

    if ray.cluster_resources().get("GPU"):
        pytest.skip("this cluster has a GPU")
    with pytest.raises(ConfigError, match="--use-gpu"):
        train_model(
            scenes["train"], scenes["val"], str(tmp_path), MODEL, TRAIN, compute=ComputeConfig(use_gpu=True)
        )


@pytest.mark.usefixtures("cluster")
def test_a_killed_run_goes_on_from_its_checkpoint_and_a_finished_one_does_nothing(
    scenes, bundle_uri, tmp_path
):
    import ray

    settings = {"vision": "test_efficientnet", "image-size": 32, "max-tokens": 16, "width": 32, "epochs": 2}
    settings |= {"text": "bert_uncased_L-1_H-32_A-2", "word-weight": 0.5, "init": bundle_uri}
    command = [sys.executable, str(JOBS / "train.py"), "--data", scenes["train"], "--val", scenes["val"]]
    command += ["--output", str(tmp_path / "out"), "--no-pretrained", "--no-gpu", "--ngrams"]
    command += [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}

    with open(tmp_path / "told", "w") as told:
        first = subprocess.Popen(command, stdout=told, stderr=told, start_new_session=True, env=environment)
    # Ray Train goes on from a checkpoint that this file names; its folder alone may be half written.
    known = tmp_path / "out" / "_train" / "run" / "checkpoint_manager_snapshot.json"
    deadline = time.monotonic() + 300
    while not (known.exists() and "checkpoint_" in known.read_text()):
        assert first.poll() is None, (tmp_path / "told").read_text()
        assert time.monotonic() < deadline, (tmp_path / "told").read_text()
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert not (tmp_path / "out" / "config.json").exists()

    (name,) = known_checkpoints(known)
    first_epochs = json.loads((known.parent / name / PROGRESS).read_text())["history"]

    # In this process, which has Ray already: the same recipe as the command's, and another one.
    model = replace(MODEL, text="bert_uncased_L-1_H-32_A-2", ngrams=True)
    compute = ComputeConfig(use_gpu=False)
    train = TrainConfig(epochs=2, word_weight=0.5, init=(bundle_uri,))
    places = (scenes["train"], scenes["val"], str(tmp_path / "out"))
    second = train_model(*places, model, train, compute=compute)
    assert not second.resumed
    assert 2 in known_checkpoints(known).values()
    assert second.metrics["history"][:1] == first_epochs, "an epoch was repeated"
    assert [epoch["epoch"] for epoch in second.metrics["history"]] == [1, 2]
    assert all(0 < epoch["waited"] < epoch["seconds"] for epoch in second.metrics["history"])

    fitted = safetensors.torch.load(Folder(places[2]).read(NGRAMS))
    kept = second.bundle.model().ngrams.state_dict()
    assert fitted["weights"].any() and all(torch.equal(fitted[name], kept[name]) for name in fitted)

    third = train_model(*places, model, train, compute=compute)
    assert third.resumed
    assert third.bundle.fingerprint == second.bundle.fingerprint
    with pytest.raises(OutputError, match=r"learning_rate: 0\.001 -> 0\.5"):
        train_model(*places, model, replace(train, learning_rate=0.5))
    assert second.bundle.tokenizer_files == Bundle.load(bundle_uri).tokenizer_files
    with pytest.raises(OutputError, match=rf"init\.caption: '{Bundle.load(bundle_uri).fingerprint}' -> None"):
        train_model(*places, model, replace(train, init=()))


@pytest.mark.usefixtures("cluster")
def test_ctrl_c_ends_training_as_interrupted(scenes, tmp_path):
    settings = {"data": scenes["train"], "val": scenes["val"], "output": tmp_path / "out", "epochs": 10_000}
    settings |= {"vision": "test_efficientnet", "image-size": 32, "width": 32, "patience": 10_000}
    command = [sys.executable, JOBS / "train.py", "--no-pretrained", "--no-gpu"]
    command += [str(part) for name, value in settings.items() for part in (f"--{name}", value)]
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    told, deadline = tmp_path / "told", time.monotonic() + 300
    with open(told, "w") as log:
        job = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    while "epoch 1: loss" not in told.read_text():
        assert job.poll() is None and time.monotonic() < deadline, told.read_text()
        time.sleep(0.1)
    job.send_signal(signal.SIGINT)
    assert job.wait(120) == 3, told.read_text()
    assert told.read_text().splitlines()[-1] == "mmray: interrupted; the same command resumes"


def known_checkpoints(snapshot):
    """Give the checkpoints that Ray Train knows of: folder -> epoch."""
    results = json.loads(snapshot.read_text())["checkpoint_results"]
    return {result["checkpoint_dir_name"]: result["metrics"]["epoch"] for result in results}


@pytest.mark.usefixtures("cluster")
def test_a_bundle_of_unknown_origin_is_not_overwritten(scenes, tmp_path):
    Folder(str(tmp_path)).publish_json("config.json", {})
    with pytest.raises(OutputError, match="unknown origin"):
        train_model(scenes["train"], scenes["val"], str(tmp_path), MODEL, TRAIN)
