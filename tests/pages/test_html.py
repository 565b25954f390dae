import base64
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from hf_rgm.pages.html import HtmlReport

EVIL = "</td><script>alert('x')</script><img src=\"http://example.com\" onerror='y'>&"


class Reader(HTMLParser):
    """Collects tags, attributes and text, and checks that what opens closes."""

    VOID = ("meta", "img")

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.texts, self.open = [], [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.extend(attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def make_report(text):
    report = HtmlReport(text, lead=text)
    section = report.section(text)
    section.text(text)
    section.table([text], [[text]], caption=text)
    section.frame(pd.DataFrame({text: [text]}), caption=text)
    figure = Figure(figsize=(1, 1))
    section.figure(figure.add_subplot(), caption=text)
    section.figure(figure, caption=text)
    return report


def test_everything_from_data_is_escaped():
    reader = Reader(make_report(EVIL).to_html())
    plain = Reader(make_report("plain").to_html())
    assert reader.tags == plain.tags
    assert "script" not in reader.tags
    assert [name for name, _ in reader.attributes] == [name for name, _ in plain.attributes]
    assert reader.texts.count(EVIL) == plain.texts.count("plain") == 13


def test_pictures_are_inside_and_nothing_is_fetched():
    page = make_report("plain").to_html()
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == 2
    for source in sources:
        kind, data = source.split(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data, validate=True).startswith(b"\x89PNG")
    assert "http:" not in page and "https:" not in page
    assert "default-src 'none'" in page


def test_sections_and_parts_keep_their_order():
    report = HtmlReport("title")
    first = report.section("first")
    report.section("second").text("three")
    first.text("one\n\ntwo")
    texts = [text for text in Reader(report.to_html()).texts if text.strip()]
    assert texts[-5:] == ["first", "one", "two", "second", "three"]


def test_numbers_are_short_and_aligned_and_text_is_left_as_it_is():
    report = HtmlReport("title")
    report.section("s").table(["n", "f", "mixed"], [[1200, np.float32(0.123456), 1.5], [3, 2.0, "0.50"]])
    page = report.to_html()
    assert '<td class="number">1200</td><td class="number">0.1235</td><td>1.5</td>' in page
    assert "<td>0.50</td>" in page


def test_bad_parts_are_named():
    section = HtmlReport("title").section("s")
    with pytest.raises(ValueError, match="1 cells for 2 columns"):
        section.table(["a", "b"], [[1]])
    with pytest.raises(ValueError, match="must be the bytes of a PNG"):
        section.image(b"<svg>")


def test_save_makes_the_folder_and_replaces_the_file(tmp_path):
    path = tmp_path / "new" / "report.html"
    HtmlReport("first").save(path)
    assert HtmlReport("sécond").save(path) == path
    assert "sécond" in path.read_text(encoding="utf-8")
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]
