"""Everything on object storage: folders, and the whole way from images to verified labels."""

import os
import pickle
import time

import fsspec
import numpy as np
import pytest

from mmray.config import ComputeConfig, LabelConfig, ModelConfig, TrainConfig
from mmray.demo import draw_scenes
from mmray.errors import MmrayError
from mmray.evaluate import evaluate_model, evaluate_predictions
from mmray.labeling import label_dataset
from mmray.prepare import prepare_folder
from mmray.storage import Folder
from mmray.training import train_model
from mmray.verify import verify_dataset

MODEL = ModelConfig(vision="test_efficientnet", image_size=32, max_tokens=16, width=32, pretrained=False)
TRAIN = TrainConfig(epochs=1, batch_size_per_worker=16, warmup_epochs=0.2)
CPU = ComputeConfig(use_gpu=False)


def test_a_folder_lists_reads_publishes_and_removes(bucket, tmp_path):
    folder = Folder(f"{bucket}/some/where")
    assert folder.list() == {}
    assert folder.read_json("a.json") is None
    local = tmp_path / "large"
    local.write_bytes(os.urandom(300_000))
    folder.publish("b/c [1].bin", local)
    folder.publish("a.json", b'{"x": 1}')
    folder.publish("a.json", b'{"x": 2}')
    assert folder.list() == {"a.json": 8, "b/c [1].bin": 300_000}
    assert folder.list(".json") == {"a.json": 8}
    assert all(abs(time.time() - put) < 60 for put in folder.times().values())
    assert folder.read_json("a.json") == {"x": 2}
    assert folder.tail("b/c [1].bin", 300_000, 10) == local.read_bytes()[-10:]
    with folder.open("b/c [1].bin") as file:
        file.seek(1000)
        assert file.read(5) == local.read_bytes()[1000:1005]
    folder.remove(["b/c [1].bin", "never/there"])
    assert folder.list() == {"a.json": 8}
    assert pickle.loads(pickle.dumps(folder)) == folder
    assert b"secret" not in pickle.dumps(folder)


def test_a_neighbour_of_the_same_beginning_is_not_listed(bucket):
    Folder(f"{bucket}/rows").publish("a", b"1")
    Folder(f"{bucket}/rows-2").publish("b", b"2")
    assert Folder(f"{bucket}/rows").list() == {"a": 1}


def test_a_bucket_that_is_not_there_is_one_clear_line(proxy):
    with pytest.raises(MmrayError) as caught:
        label_dataset("s3://no-such-bucket-anywhere/rows", "s3://no-such-bucket-anywhere/b", "s3://x/y")
    assert "no-such-bucket-anywhere" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("cluster")
def test_the_whole_way_on_s3_and_a_second_run_that_resumes(bucket):
    for seed, (part, num_rows) in enumerate({"train": 96, "val": 32, "archive": 150}.items()):
        draw_scenes(Folder(f"{bucket}/raw/{part}"), num_rows, np.random.default_rng(seed))
        raw = f"{bucket}/raw/{part}"
        prepare_folder(f"{raw}/images", f"{bucket}/data/{part}", csv_uri=f"{raw}/scenes.csv")
    data, bundle, labeled = f"{bucket}/data", f"{bucket}/bundle", f"{bucket}/labeled"
    trained = train_model(f"{data}/train", f"{data}/val", bundle, MODEL, TRAIN, compute=CPU)
    measured = evaluate_model(f"{data}/val", bundle, compute=CPU)
    assert measured["map"] == pytest.approx(trained.metrics["map"], abs=1e-6)

    first = label_dataset(f"{data}/archive", bundle, labeled, config=LabelConfig(), compute=CPU)
    assert first.counts == {"ok": 150}
    assert verify_dataset(f"{data}/archive", labeled).problems == []
    assert evaluate_predictions(f"{data}/archive", labeled)["num_rows"] == 150

    folder = Folder(labeled)
    store = fsspec.filesystem("s3", use_listings_cache=False)

    def written():
        return {path: store.info(folder.path(path))["LastModified"] for path in folder.list(".parquet")}

    before = written()
    folder.remove(["_SUCCESS", "_mmray/manifest.json"])
    second = label_dataset(f"{data}/archive", bundle, labeled, config=LabelConfig(), compute=CPU)
    assert second.num_resumed == second.num_shards
    assert written() == before
    assert verify_dataset(f"{data}/archive", labeled).problems == []

    everything = Folder(bucket)
    secrets = [os.environ[f"AWS_{name}"] for name in ("SECRET_ACCESS_KEY", "ACCESS_KEY_ID", "ENDPOINT_URL")]
    for path in everything.list():
        content = everything.read(path)
        assert not [secret for secret in secrets if secret.encode() in content], path
