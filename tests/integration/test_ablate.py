"""An ablation with real training: the runs, the tables, and a rerun that trains nothing."""

import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import mmray.ablate
from mmray.ablate import Places, ablate, run_all
from mmray.bundle import Bundle
from mmray.config import AblationConfig, Columns, ComputeConfig, ModelConfig, TrainConfig
from mmray.errors import OutputError
from mmray.report import write_report
from mmray.storage import Folder
from mmray.variants import Experiment

MODEL = ModelConfig(fusion="text", max_tokens=16, width=32, pretrained=False)
TRAIN = TrainConfig(epochs=1, batch_size_per_worker=16, learning_rate=3e-3, warmup_epochs=0.2)


@pytest.mark.usefixtures("cluster")
def test_variants_that_share_a_training_are_trained_once_and_a_rerun_trains_nothing(draw_rows, tmp_path):
    pq.write_table(draw_rows(64, 1), tmp_path / "train.parquet")
    pq.write_table(draw_rows(40, 2), tmp_path / "val.parquet")
    config = AblationConfig(axes=("decision", "calibration"), seeds=1)
    places = [str(tmp_path / name) for name in ("train.parquet", "val.parquet")]
    where = Places(*places, None, Columns(), ComputeConfig(use_gpu=False))
    rows = ablate(Experiment(MODEL, TRAIN), config, where, str(tmp_path / "out"))

    output = Folder(str(tmp_path / "out"))
    (bundle,) = (path.removesuffix("/config.json") for path in output.list("bundle/config.json"))
    metrics = (output / bundle).read_json("metrics.json")
    assert Bundle.load(f"{output}/{bundle}").model_config.fusion == "text"
    found = {(row["axis"], row["value"]): row for row in rows}
    assert found["decision", "per-label"]["sample_f1"] == metrics["by_decision"]["per-label"]["sample_f1"]
    assert found["decision", "single"]["macro_f1"] == metrics["by_decision"]["single"]["macro_f1"]
    for value, rule in (("uncalibrated", "uncalibrated"), ("on", "per-label")):
        assert found["calibration", value]["ece"] == metrics["by_decision"][rule]["ece"]
    assert {"ablation.md", "ablation.csv", "ablation.png"} <= output.list().keys()

    before = {path: (tmp_path / "out" / path).stat().st_ino for path in output.list() if "runs/" in path}
    assert ablate(Experiment(MODEL, TRAIN), config, where, str(tmp_path / "out")) == rows
    assert before == {path: (tmp_path / "out" / path).stat().st_ino for path in before}
    write_report(f"{output}", str(tmp_path / "report.html"))
    assert f"{rows[0]['sample_f1']:.4f} ± 0.0000" in (tmp_path / "report.html").read_text()
    with pytest.raises(OutputError, match="other --num-workers"):
        ablate(
            Experiment(MODEL, TRAIN),
            config,
            where._replace(compute=ComputeConfig("2", use_gpu=False)),
            str(tmp_path / "out"),
        )
    with pytest.raises(OutputError, match="other columns"):
        other = where._replace(columns=Columns(caption="image_id"))
        ablate(Experiment(MODEL, TRAIN), config, other, str(tmp_path / "out"))
    with pytest.raises(OutputError, match="other --val"):
        other = where._replace(val_uri=places[0])
        ablate(Experiment(MODEL, TRAIN), config, other, str(tmp_path / "out"))


@pytest.mark.usefixtures("cluster")
def test_as_many_runs_as_are_asked_for_go_side_by_side(monkeypatch, tmp_path):
    def run(experiment, places, folder):
        """Wait for the other one of two; gives how many went at that time."""
        number, running = experiment, Path(places)
        (running / str(number)).touch()
        deadline = time.monotonic() + 60
        while not (running / str(number ^ 1)).exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        going = len(list(running.glob("?"))) - len(list(running.glob("?-done")))
        (running / f"{number}-counted").touch()
        while not (running / f"{number ^ 1}-counted").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        (running / f"{number}-done").touch()
        return {"going": going}

    monkeypatch.setattr(mmray.ablate, "run", run)
    running = tmp_path / "running"
    running.mkdir()
    runs = {str(number): number for number in range(4)}
    results = dict(run_all(runs, str(running), Folder(str(tmp_path)), 2, progress=False))
    assert results.keys() == runs.keys()
    assert [result["going"] for result in results.values()] == [2] * 4
