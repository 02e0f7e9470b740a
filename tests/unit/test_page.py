"""A page: whatever a row holds is text, nothing is fetched, and charts are SVG."""

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

from mmray.charts import COLOURS, Chart, Series
from mmray.page import Card, Cell, Page, Score, Section, Table

HOSTILE = "<script>alert('x')</script>\"'&{{ 7 * 7 }}"


def a_chart(title="F1"):
    return Chart(title, [Series([0, 1], [0.2, 0.4], "one"), Series([0, 1], [0.3, 0.1], "two")], "epoch", "F1")


def a_page(text="fine"):
    card = Card(text, text, text, text, text, [Score(text, 0.25, True)], [0, 2], b"\xff\xd8", text)
    table = Table([text, text], [[text, Cell(text, 0.5)]])
    matrix = Table([text, text], [[text, Cell(text, 0.5)]], shaded=True)
    section = Section(text, text, [table, matrix], [a_chart(text)], [card])
    return Page(text, [(text, text)], [section], [text])


class Reader(HTMLParser):
    """Collects tags and texts."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, text):
        self.texts.append(text.strip())


def test_whatever_a_row_holds_is_text():
    plain, hostile = Reader(a_page().html()), Reader(a_page(HOSTILE).html())
    assert [tag for tag, _ in hostile.tags] == [tag for tag, _ in plain.tags]
    assert hostile.texts.count(HOSTILE) == plain.texts.count("fine") > 8


def test_nothing_is_fetched_and_the_page_says_so_itself():
    reader = Reader(a_page().html())
    for tag, attributes in reader.tags:
        assert tag not in ("link", "iframe", "object")
        assert attributes.get("src", "data:").startswith("data:")
        assert attributes.get("href", "#").startswith("#")
    policy = next(
        attributes["content"]
        for tag, attributes in reader.tags
        if "content" in attributes and "default-src" in attributes["content"]
    )
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_ids_are_unique_and_images_have_words():
    reader = Reader(
        Page(
            "t", [], [Section("s", charts=[a_chart("a"), a_chart("b")], cards=a_page().sections[0].cards)]
        ).html()
    )
    # Of the SVGs' own, equal ids stand for equal shapes.
    ids = [
        attributes["id"]
        for tag, attributes in reader.tags
        if "id" in attributes and tag not in ("path", "clippath")
    ]
    assert len(ids) == len(set(ids))
    assert all(attributes["alt"] for tag, attributes in reader.tags if tag == "img")
    assert [attributes["aria-label"] for tag, attributes in reader.tags if tag == "svg"] == [
        "a: F1 by epoch, of one and two",
        "b: F1 by epoch, of one and two",
    ]


def test_a_chart_is_svg_in_the_pages_own_ink():
    svg = a_chart("Äpfel & <Birnen>").svg()
    assert ElementTree.fromstring(svg).get("viewBox")
    assert "currentColor" in svg and "#010203" not in svg
    assert not re.search(r"<svg[^>]* (width|height)=", svg)
    assert svg == a_chart("Äpfel & <Birnen>").svg()


@pytest.mark.parametrize("values", [np.zeros(40), np.arange(40)])
def test_bars_are_drawn_on_a_logarithmic_scale_from_nothing_on(values):
    bars = Series(np.linspace(0, 1, 41), values, kind="steps")
    svg = Chart("h", [bars], "score", "rows", mark=0.5, log=True).svg()
    (path,) = re.findall(rf'<path d="([^"]*)"[^>]*{COLOURS[0]}', svg)
    levels = np.array([float(y) for y in re.findall(r"[ML] \S+ (\S+)", path)])
    heights = levels[0] - levels[1::2][:40]
    assert (heights > 0).tolist() == (values > 0).tolist()
    assert heights[20] - heights[2] == pytest.approx(heights[30] - heights[3]), "ten times as many"
