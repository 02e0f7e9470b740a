"""Reports: of a labeled output with rows spoilt in every way, as Python sees it and as a browser does."""

import json
import os
import runpy
import shutil
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score, precision_recall_curve

from mmray.bundle import Bundle
from mmray.errors import ConfigError, DataError, OutputError
from mmray.gallery import DISAGREEING
from mmray.labeling_report import by_time, labeling_report
from mmray.picking import CERTAIN, FALLBACK, RANDOM, REJECTION, SHOWN, UNCERTAIN
from mmray.plan import Plan
from mmray.report import write_report
from mmray.storage import Folder
from mmray.training_report import f1_by_threshold, precision_and_recall

pytestmark = pytest.mark.usefixtures("cluster")

JOBS = Path(__file__).parents[2] / "jobs"


@pytest.fixture(scope="module")
def page(labeled, archive, bundle_uri):
    return labeling_report(Folder(str(labeled)), str(archive.folder), Bundle.load(bundle_uri))


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=30))
def test_curves_are_those_of_scikit_learn(rows):
    scores, targets = np.array([row[0] / 9 for row in rows]), np.array([row[1] for row in rows])
    precision, recall = precision_and_recall(scores, targets)
    with warnings.catch_warnings(action="ignore"):  # rows without a label have no recall
        theirs = precision_recall_curve(targets, scores)
    assert precision == pytest.approx(theirs[0][-2::-1])
    if targets.any():
        assert recall == pytest.approx(theirs[1][-2::-1])
    f1 = f1_by_threshold(scores, targets)
    assert f1[49] == pytest.approx(f1_score(targets, scores >= 0.5, zero_division=0))


def section(page, title):
    return next(section for section in page.sections if section.title == title)


def test_its_counts_are_those_of_the_manifest(page, labeled):
    manifest = json.loads((labeled / "_mmray/manifest.json").read_text())
    (table,) = section(page, "Status").tables
    shown = {row[0]: int(row[1].text.replace(",", "")) for row in table.rows}
    assert shown == manifest["counts"]
    assert dict(page.facts)["rows"] == f"{manifest['num_rows']:,}"


def test_its_labels_are_those_that_rows_were_given(page, labeled, archive):
    given = Counter(
        label
        for path in archive.statuses
        for labels in pq.read_table(labeled / path, columns=["predicted_labels"])[0].to_pylist()
        for label in labels or ()
    )
    (table,) = section(page, "Labels").tables
    assert {row[0]: int(row[1].replace(",", "")) for row in table.rows if row[1] != "0"} == given
    assert len(section(page, "Scores").charts) == len(table.rows)


def test_its_cards_show_rows_as_they_are(page, labeled, archive):
    cards = section(page, "Rows to look at").cards
    kinds = Counter(card.kind for card in cards)
    assert set(kinds) == {CERTAIN, UNCERTAIN, FALLBACK, RANDOM, REJECTION, DISAGREEING}
    assert max(kinds.values()) == SHOWN
    for card in cards:
        path, _, row = card.where.rpartition(", row ")
        rows = pq.read_table(labeled / path).slice(int(row), 1).to_pylist()[0]
        assert card.status == rows["status"]
        assert card.caption == (rows["caption"] or "")
        assert (card.thumbnail is not None) == (card.status in ("ok", "no_caption"))
        assert [page.labels[place] for place in card.labels] == (rows["predicted_labels"] or [])
        assert bool(card.error) == (card.status != "ok")
    assert all(card.remark for card in cards if card.kind == DISAGREEING)


def test_every_rejected_row_is_shown_with_its_reason(page, labeled, archive):
    rejected = {
        (path, row)
        for path, statuses in archive.statuses.items()
        for row, status in statuses.items()
        if status in ("failed", "bad_image")
    }
    cards = section(page, "Rows to look at").cards
    shown = {card.where for card in cards if card.kind == REJECTION}
    assert shown == {f"{path}, row {row}" for path, row in rejected}
    reasons = section(page, "Rejected rows").tables[0].rows
    assert sum(int(row[1]) for row in reasons) == len(rejected)


def test_the_speed_is_that_of_rows_by_the_time_of_their_files(labeled, tmp_path):
    """Of files that came 100 s apart: all rows but the first file's, each where its file came."""
    shutil.copytree(labeled, tmp_path / "labeled")
    plan = Plan.load(Folder(str(tmp_path / "labeled")))
    for number, file in enumerate(plan.files):
        os.utime(tmp_path / "labeled" / file.path, (0, 1e9 + 100 * number))
    (section,) = by_time(Folder(str(tmp_path / "labeled")), plan)
    (chart,) = section.charts
    (series,) = chart.series
    assert chart.x_label == "minutes"
    assert series.x[0] == 0 and series.x[-1] == pytest.approx(100 * (len(plan.files) - 1) / 60)
    assert series.y * np.diff(series.x) * 60 == pytest.approx([file.num_rows for file in plan.files[1:]])


def test_the_speed_of_a_single_moment_is_not_shown(labeled, tmp_path):
    shutil.copytree(labeled, tmp_path / "labeled")
    plan = Plan.load(Folder(str(tmp_path / "labeled")))
    for file in plan.files:
        os.utime(tmp_path / "labeled" / file.path, (0, 1e9))
    assert list(by_time(Folder(str(tmp_path / "labeled")), plan)) == []


def test_without_the_input_there_are_no_images(labeled):
    page = labeling_report(Folder(str(labeled)))
    assert not any(card.thumbnail for card in section(page, "Rows to look at").cards)


def test_what_is_no_finished_output_is_refused(labeled, archive, tmp_path):
    with pytest.raises(OutputError, match="neither a bundle nor an output"):
        write_report(str(archive.folder), str(tmp_path / "r.html"))
    shutil.copytree(labeled, tmp_path / "half")
    (tmp_path / "half/_SUCCESS").unlink()
    with pytest.raises(OutputError, match="not finished"):
        write_report(str(tmp_path / "half"), str(tmp_path / "r.html"))
    with pytest.raises(ConfigError, match="no place for a file"):
        write_report(str(labeled), f"{tmp_path}/")


def test_another_bundle_and_another_input_are_refused(labeled, archive, make_bundle, draw_rows, tmp_path):
    other = make_bundle(tmp_path / "bundle", labels=("beach", "city"))
    with pytest.raises(ConfigError, match="labeled by another bundle"):
        labeling_report(Folder(str(labeled)), None, Bundle.load(other))
    shutil.copytree(archive.folder, tmp_path / "rows")
    pq.write_table(draw_rows(30, 6), tmp_path / "rows/holiday [*] é.parquet")
    with pytest.raises(DataError, match="bytes and was planned with"):
        labeling_report(Folder(str(labeled)), str(tmp_path / "rows"))


@pytest.fixture(scope="module")
def written(labeled, archive, bundle_uri, tmp_path_factory):
    """Give the page that the job writes."""
    path = tmp_path_factory.mktemp("report") / "report.html"
    command = runpy.run_path(str(JOBS / "report.py"))["main"]
    options = ["--run", labeled, "--input", archive.folder, "--model", bundle_uri, "--output", path]
    done = CliRunner().invoke(command, [str(option) for option in options])
    assert done.exit_code == 0, done.output
    return path


@pytest.fixture(scope="module")
def browser():
    """Give headless Chromium, where Debian's packages of it and of its driver are installed."""
    from selenium import webdriver

    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("chromium and chromium-driver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=400,800"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield started
    started.quit()


def test_a_browser_shows_it_and_its_filters_work(page, written, browser):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.select import Select

    browser.get(written.as_uri())
    assert browser.get_log("browser") == []
    assert browser.find_element(By.TAG_NAME, "h1").text == page.title
    wide = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert browser.execute_script(wide) == 0  # on a phone, too
    cards = section(page, "Rows to look at").cards

    def shown():
        return [
            card for card in browser.find_elements(By.CSS_SELECTOR, ".cards > .card") if card.is_displayed()
        ]

    def pick(name, text):
        Select(browser.find_element(By.NAME, name)).select_by_visible_text(text)

    assert len(shown()) == len(cards)
    pick("label", page.labels[0])
    expected = [card for card in cards if 0 in card.labels]
    assert 0 < len(expected) < len(cards)
    assert len(shown()) == len(expected)
    assert browser.find_element(By.TAG_NAME, "output").text == f"{len(expected)} rows"
    pick("label", "any")
    pick("status", "bad_image")
    assert len(shown()) == sum(card.status == "bad_image" for card in cards)
    pick("kind", REJECTION)
    assert len(shown()) == sum(card.status == "bad_image" and card.kind == REJECTION for card in cards) > 0
    assert browser.get_log("browser") == []


def test_a_browser_shows_every_thumbnail(written, browser, page):
    browser.get(written.as_uri())
    script = """
        const done = arguments[0];
        const images = [...document.images];
        Promise.all(images.map(image => { image.loading = "eager"; return image.decode(); })).then(
            () => done(images.filter(image => image.naturalWidth > 1).length), error => done(String(error)));
    """
    num_thumbnails = sum(card.thumbnail is not None for card in section(page, "Rows to look at").cards)
    assert browser.execute_async_script(script) == num_thumbnails > 100
