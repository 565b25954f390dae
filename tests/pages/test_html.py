import base64
import re

import numpy as np
from matplotlib.figure import Figure

from hf_rgm.pages.html import HtmlReport


def test_pictures_are_inside_and_nothing_is_fetched():
    report = HtmlReport("title")
    report.section("s").figure(Figure(figsize=(1, 1)).add_subplot(), caption="caption")
    page = report.to_html()
    (source,) = re.findall(r'src="([^"]*)"', page)
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
    texts = [text for text in re.split(r"<[^>]*>", report.to_html()) if text.strip()]
    assert texts[-5:] == ["first", "one", "two", "second", "three"]


def test_numbers_are_short_and_aligned_and_text_is_left_as_it_is():
    report = HtmlReport("title")
    report.section("s").table(["n", "f", "mixed"], [[1200, np.float32(0.123456), 1.5], [3, 2.0, "0.50"]])
    page = report.to_html()
    assert '<td class="number">1200</td><td class="number">0.1235</td><td>1.5</td>' in page
    assert "<td>0.50</td>" in page


def test_save_makes_the_folder_and_replaces_the_file(tmp_path):
    path = tmp_path / "new" / "report.html"
    HtmlReport("first").save(path)
    assert HtmlReport("sécond").save(path) == path
    assert "sécond" in path.read_text(encoding="utf-8")
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]
