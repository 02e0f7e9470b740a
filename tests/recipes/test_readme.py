"""Every command of the README runs, in its order, on drawn scenes and with towers that are quick to train."""

import json
import re
import runpy
import shlex
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from mmray.demo import draw_scenes
from mmray.storage import Folder

pytestmark = [pytest.mark.recipe, pytest.mark.usefixtures("cluster")]

REPOSITORY = Path(__file__).parents[2]
SMALL = [
    *("--no-pretrained", "--vision", "test_efficientnet", "--image-size", "32", "--max-tokens", "16"),
    *("--width", "32", "--epochs", "1", "--batch-size-per-worker", "16", "--num-workers", "1"),
]
QUICK = {
    "train.py": SMALL,
    "self_train.py": SMALL,
    "ablate.py": [*SMALL, "--axis", "decision", "--seeds", "1"],
}
"""What is added to a job's options, so that it takes seconds."""


def commands():
    """Give the README's commands: lines that are set as code, without their remarks."""
    text = (REPOSITORY / "README.md").read_text()
    return [
        shlex.split(line, comments=True)[1:] for line in re.findall(r"^    (python jobs/.*)$", text, re.M)
    ]


def answer(tasks: Path, answers: Path) -> None:
    """Agree with the model, as a person would who exports answers."""
    exported = json.loads(tasks.read_text())
    for task in exported:
        task["annotations"] = [{"result": task["predictions"][0]["result"], "updated_at": "2026-01-01"}]
    answers.write_text(json.dumps(exported))


@pytest.fixture
def place(tmp_path, draw_rows, monkeypatch):
    """Give a folder with all that the commands start from, and go there."""
    draw_scenes(Folder(str(tmp_path)), 150, np.random.default_rng(0))
    (tmp_path / "images").rename(tmp_path / "photos")
    (tmp_path / "scenes.csv").rename(tmp_path / "photos.csv")
    for path, num_rows in {
        "archive/a": 80,
        "archive/b": 40,
        "coco18/train/a": 96,
        "coco18/val/a": 40,
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(draw_rows(num_rows, num_rows), tmp_path / f"{path}.parquet")
    shutil.copy(tmp_path / "photos/00000.jpg", tmp_path / "photo.jpg")
    shutil.copytree(REPOSITORY / "jobs", tmp_path / "jobs")
    for recipe in (tmp_path / "jobs" / "recipes").iterdir():  # no stages before: they take an hour
        recipe.write_text(re.sub(r"^(init|freeze): .*$", "", recipe.read_text(), flags=re.M))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_of_the_readme_runs(place):
    ran = commands()
    assert len(ran) > 15
    assert {Path(command[0]).name for command in ran} >= {"label.py", "export.py", "ablate.py", "report.py"}
    for script, *options in ran:
        if "answers.json" in options:
            answer(place / "tasks.json", place / "answers.json")
        main = runpy.run_path(str(REPOSITORY / script))["main"]
        done = CliRunner().invoke(main, [*options, *QUICK.get(Path(script).name, [])])
        assert done.exit_code == 0, f"{script} {shlex.join(options)}: {done.output}"
    (example,) = re.findall(r"^```python\n(.+?)^```", (REPOSITORY / "README.md").read_text(), re.M | re.S)
    names = {}
    exec(example, names)
    assert names["labeled"].scores.shape == (1, 6)
    assert names["result"].num_rows == 120
