"""The page of likely mistakes: each command on it is run, and ends as the page says, without a traceback."""

import re
import runpy
import shlex
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from mmray.deciding import decide_again

pytestmark = pytest.mark.usefixtures("cluster")

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "mmray" / "MISTAKES.md").read_text()


def mistakes():
    """Give the page's entries: title, command, exit status, and the text that ends it."""
    entries = []
    for entry in PAGE.split("\n## ")[1:]:
        title, _, rest = entry.partition("\n")
        command, *told = re.findall(r"^    (.+)$", rest, re.M)
        status = re.search(r"\(exit status (\d)\)", rest)
        command = command.removeprefix("$ python ")
        entries.append(pytest.param(command, int(status[1]) if status else 2, " ".join(told), id=title))
    return entries


@pytest.fixture(scope="module")
def place(draw_rows, make_bundle, labeled, archive, bundle_uri, tmp_path_factory):
    """Give a folder in which each of the mistakes can be made."""
    folder = tmp_path_factory.mktemp("mistakes")
    rows = draw_rows(60, 1)

    def write(path, table):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, folder / path)

    write("data/train/a.parquet", rows)
    write("data/val/a.parquet", draw_rows(30, 2))
    write("elsewhere/a.parquet", draw_rows(30, 77))
    write("renamed/a.parquet", rows.rename_columns(["image_id", "jpg", "text", "labels"]))
    write("unlabeled/a.parquet", rows.drop_columns("labels"))
    strange = pa.array([["unheard of"]] * 60)
    write("strange/a.parquet", rows.set_column(3, "labels", strange))
    urls = pa.array([f"https://example.com/{row}.jpg" for row in range(60)])
    write("urls/a.parquet", rows.set_column(1, "image", urls))
    write(
        "spoilt/a.parquet",
        rows.set_column(1, "image", pa.nulls(60, pa.binary())).set_column(
            2, "caption", pa.nulls(60, pa.string())
        ),
    )
    write("cut/a.parquet", rows)
    whole = (folder / "cut/a.parquet").read_bytes()
    (folder / "cut/a.parquet").write_bytes(whole[: len(whole) // 2])
    (folder / "photos").mkdir()
    (folder / "photos/a.txt").write_text("no picture")
    (folder / "photos.csv").write_text("file,label\na.jpg,dog\n")
    (folder / "recipe.yaml").write_text("epoch: 3\n")
    shutil.copytree(labeled, folder / "labeled")
    decide_again(str(labeled), str(folder / "decided"), 0.5)
    shutil.copytree(archive.folder, folder / "archive")
    shutil.copytree(bundle_uri, folder / "models/first")
    make_bundle(folder / "models/second", fusion="text")
    (folder / "jobs").symlink_to(REPOSITORY / "jobs")
    return folder


@pytest.mark.parametrize(("command", "status", "told"), mistakes())
def test_it_ends_as_the_page_says(place, monkeypatch, command, status, told):
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    script, *options = shlex.split(command)
    done = CliRunner().invoke(runpy.run_path(str(REPOSITORY / script))["main"], options)
    output = " ".join(done.output.split())
    assert done.exit_code == status, output
    assert "Traceback" not in output
    pattern = ".*".join(re.escape(part) for part in told.split("…"))
    assert re.search(pattern, output), output


def test_there_are_twenty_of_them():
    assert len(mistakes()) >= 20
