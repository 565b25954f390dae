"""Names that would be markup, code or commands somewhere are shown as they are, everywhere."""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import DatasetCard, ModelCard
from markdown_it import MarkdownIt
from matplotlib.figure import Figure
from matplotlib.text import Text

from hf_rgm import AttributionResult, ClusterMap
from hf_rgm.cli.artefact_info import describe
from hf_rgm.explorer.app import Explorer
from hf_rgm.files.reading import printable
from hf_rgm.pages.exhibit import Exhibit
from hf_rgm.pages.html import Card, HtmlReport
from hf_rgm.pages.shown_rows import png_of
from hf_rgm.results.result_files import attribution_card
from hf_rgm.results.unlearned import UnlearnedModel, unlearned_model_card
from hf_rgm.synset.synset_files import synset_card
from hf_rgm.testing import tiny_recorded_run, tiny_synset
from tests.hub.hostile.artefacts import ARTEFACTS, is_plain
from tests.hub.hostile.edits import set_json

TEXTS = {
    "HTML": "<script>alert(1)</script>",
    "an HTML attribute": '"><img src=x onerror=alert(1)>',
    "HTML in entities": "&lt;script&gt;&#60;b&#62;",
    "a Markdown link": "[x](javascript:alert(1))",
    "a Markdown picture": "![x](https://evil.example/x.png)",
    "an address": "https://evil.example",
    "an address in angle brackets": "<https://evil.example>",
    "a Markdown reference": "[x][y] [y]: https://evil.example",
    "Markdown of all kinds": "*a* _b_ **c** ~~d~~ `e` ``f`` # g > h + i 1. j - k --- | l |",
    "a new table row": "a | b |\n| c | d",
    "the end of a YAML header": "x\n---\nlicense: mit\n---\n# y",
    "YAML": "x: [1, {a: !!python/object/apply:os.system [ls]}]",
    "Jinja": "{{ 7 * 7 }}{% for x in range(9) %}x{% endfor %}{# y #}",
    "a formula": "$x^2$ $$\\frac{a}$$ \\(x\\) \\[y\\]",
    "half a formula": r"$\frac{$ \$ \\$ $",
    "terminal commands": "\x1b[2J\x1b]0;x\x07\x9b31m\b\r",
    "a change of direction": "abc\u202edef\u2066ghi",
    "invisible characters": "a\u200b\ufeff\u00adb\U000e0041",
    "half a surrogate": "a\ud800b",
    "a null byte": "a\x00b",
    "an address without a scheme": "www.evil.example | WWW.evil.example`",
    "a mention": "@somebody and ``x`` |",
    "10,000 characters": "x" * 10_000,
    "a path": "../../../etc/passwd",
}
ADDRESS = "https://huggingface.co/"
PNG = png_of(np.eye(2))
SAFE_TAGS = {"html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "p", "section", "figure", "img"} | {
    "figcaption", "div", "table", "thead", "tbody", "tr", "th", "td", "caption", "col", "colgroup", "h3", "span"
} | {"ul", "li", "strong", "blockquote"}  # fmt: skip


def test_names_of_two_megabytes_are_refused(tmp_path):
    long = "x" * 2_000_000
    for make in (lambda: result_named(long), lambda: ClusterMap.from_ids([0], names=[long])):
        with pytest.raises(ValueError, match="has 2000000 characters"):
            make()
    for name, route in (("AttributionResult", ("objective",)), ("AttributionResult", ("query_ids", 0))):
        folder = Path(shutil.copytree(ARTEFACTS[name].pristine, tmp_path / route[0]))
        set_json(ARTEFACTS[name].marker, route, long)(folder)
        assert "2000000 characters" in str(describe(folder).problem)
    synset = tiny_synset()
    trajectory = copy.copy(synset.trajectory)
    trajectory.metadata = trajectory.metadata | {"model": {"class": long}}
    assert len(synset_card(replace(synset, trajectories=(trajectory,)))) < 50_000


@pytest.mark.parametrize(
    ("names", "flagged"),
    [
        (["paypal", "p\u0430ypal"], [1]),
        (["ab", "a\u200cb"], [1]),
        (["a b", "a  b"], [1]),
        (["", "x"], [0]),
        (["\u3164", "x"], [0]),
        (["fi", "\ufb01"], [1]),
        (["Кот", "Cat", "cat", "стол", "👩\u200d👧"], []),
    ],
)
def test_names_that_look_like_others_or_show_nothing_are_flagged(names, flagged, tmp_path, caplog):
    ClusterMap.from_ids(np.arange(len(names)), names=names).save(tmp_path / "map")
    sizes, scores = np.ones(len(names)), np.zeros((2, len(names)))
    result = replace(result_named("x"), cluster_names=names, cluster_sizes=sizes, scores=scores)
    for load, saved in (
        (ClusterMap.load, tmp_path / "map"),
        (AttributionResult.from_pretrained, result.save_pretrained(tmp_path / "result")),
    ):
        caplog.clear()
        load(saved)
        assert len(caplog.records) == bool(flagged)
        assert all(ascii(names[k]) in caplog.text for k in flagged)


def result_named(text: str) -> AttributionResult:
    rng = np.random.default_rng(0)
    return AttributionResult(
        scores=rng.normal(size=(2, 3)),
        cluster_names=[text, f"{text}!", "plain"],
        cluster_sizes=np.array([1, 2, 3]),
        query_ids=[text, "other"],
        objective=text,
        objective_values=np.ones(2),
        engine=text,
        metadata={
            "model": {"class": text, "name_or_path": text},
            "num_runs": text,
            text: text,
            "nested": {text: [text]},
        },
    )


def visible(markdown: str) -> str:
    """The text that a reader of a card sees; fails on HTML, pictures, and links that we did not put there."""
    shown: list[str] = []
    body = re.sub(r"\A---\n.*?\n---\n", "", markdown, flags=re.DOTALL)
    for block in MarkdownIt("gfm-like", {"html": True, "linkify": False}).parse(body):
        assert block.type not in ("html_block",), block.content
        for token in block.children or []:
            assert token.type not in ("html_inline", "image"), token
            if token.type == "link_open":
                address = str(token.attrs["href"])
                assert address.startswith(ADDRESS), address
            if token.type != "code_inline":
                assert not re.search(r"://|www\.|@", token.content.replace(ADDRESS, ""), re.IGNORECASE), token.content
            shown.append(token.content)
        shown.append("\n")
    return "".join(shown)


class Parsed(HTMLParser):
    """What is in a page, whose tags must close as they open."""

    VOID = ("meta", "img", "col")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def check_card(card: str, header: set[str], shown: dict[str, int]) -> None:
    """Fails unless a card has this header, and shows each text so often or more."""
    assert is_plain(card)
    data = (ModelCard if "configs" not in header else DatasetCard)(card).data.to_dict()
    assert set(data) == header
    seen = visible(card)
    for text, count in shown.items():
        assert seen.count(text) >= count, text


def check_page(page: str, text: str) -> None:
    """Fails unless a page shows a text, and has only tags, attributes and addresses of ours."""
    assert is_plain(page)
    parsed = Parsed(page)
    assert set(parsed.tags) <= SAFE_TAGS
    names = {name for name, _ in parsed.attributes}
    assert not [name for name in names if name.startswith("on")] and not names & {"href", "action", "formaction"}
    assert all(value.startswith("data:image/png") for name, value in parsed.attributes if name == "src")
    assert printable(text).replace("\\n", "\n") in parsed.text.replace("\\n", "\n")


def attributions_card(text: str, folder: Path) -> None:
    # Names, objective and engine.
    check_card(attribution_card(result_named(text)), {"configs", "library_name", "tags"}, {printable(text): 4})


def synsets_card(text: str, folder: Path) -> None:
    synset = tiny_synset()
    trajectory = copy.copy(synset.trajectory)
    trajectory.metadata = trajectory.metadata | {"model": {"class": text, "name_or_path": f"{text}/{text}"}}
    clusters = ClusterMap(synset.clusters.cluster_ids, (text, *synset.clusters.names[1:]))
    card = synset_card(replace(synset, trajectories=(trajectory,), clusters=clusters))
    check_card(card, {"configs", "library_name", "tags"}, {printable(text): 1})


def unlearned_card(text: str, folder: Path) -> None:
    unlearned = UnlearnedModel(
        model=tiny_recorded_run().model, clusters=[text], sizes=[1], checks=[], engine=text, rewind_step=0,
        num_steps=1, parameters_sha256="0" * 64, model_name=text, fidelity=None,
    )  # fmt: skip
    check_card(unlearned_model_card(unlearned), {"library_name", "tags"}, {printable(text): 2})


def a_page(text: str, folder: Path) -> None:
    result, rows = result_named(text), [{"text": text, "label": text}] * 6
    path = result.to_html(folder / "page.html", title=text, rows=rows, queries=rows[: result.num_queries])
    check_page(path.read_text(encoding="utf-8"), text)


def all_parts_of_a_page(text: str, folder: Path) -> None:
    def page(text: str) -> str:
        report = HtmlReport(text, banner=[text])
        section = report.section(text)
        section.text(text)
        section.table([text], [[text]], caption=text)
        section.bars([text], np.ones(1), k=1, caption=text)
        section.figure(Figure(figsize=(1, 1)).add_subplot(), caption=text)
        section.cards({text: [Card(text, text=text, label=text, notes=[text]), Card(text, PNG, notes=[text])]})
        return report.to_html()

    shown, plain = Parsed(page(text)), Parsed(page("plain"))
    check_page(page(text), text)
    assert shown.tags == plain.tags
    assert [name for name, _ in shown.attributes] == [name for name, _ in plain.attributes]
    assert shown.text.count("\n".join(map(printable, text.split("\n")))) >= plain.text.count("plain") == 18


def panels_of_the_explorer(text: str, folder: Path) -> None:
    result = result_named(text)
    rows = [{"text": text, "label": text}] * 6
    explorer = Explorer(Exhibit(result, rows=rows, queries=rows[: result.num_queries]))
    for panel in (*explorer.of_query(0)[:2], explorer.cluster(0, 0)):
        check_page(panel, text[:79])


def plots(text: str, folder: Path) -> None:
    for axes in (result_named(text).plot(kind) for kind in ("heatmap", "bars")):
        axes.get_figure().savefig(folder / "plot.png", dpi=20)
        assert all(is_plain(shown.get_text()) for shown in axes.get_figure().findobj(Text))


def what_is_printed(text: str, folder: Path) -> None:
    result, clusters = result_named(text), ClusterMap.from_ids([0, 1], names=[text, "plain"])
    shown: list[object] = [result, clusters, result.top(3), result.top(3, text), result.to_pandas()]
    shown += [result.to_dataset(), result.cluster_names, result.query_ids, clusters.names, clusters.rows(text)]
    for unknown in (result.query_index, clusters.index):
        with pytest.raises(KeyError) as caught:
            unknown(f"{text}?")
        shown.append(caught.value)
    assert all(is_plain(str(item)) and is_plain(repr(item)) for item in shown)


def what_the_info_command_prints(text: str, folder: Path) -> None:
    saved = shutil.copytree(ARTEFACTS["AttributionResult"].pristine, folder / "saved")
    for name in ("objective", "engine"):
        set_json("attribution.json", (name,), text)(saved)
    description = describe(saved)
    assert description.problem is None and description.facts["objective"] == printable(text)
    assert is_plain(str(description))


RENDERINGS: dict[str, tuple[str, Callable[[str, Path], None]]] = {
    "on the card of attributions": ("AttributionResult", attributions_card),
    "on the card of a synset": ("Synset", synsets_card),
    "on the card of a model without clusters": ("UnlearnedModel", unlearned_card),
    "on a page with pictures": ("AttributionResult", a_page),
    "in every part of a page": ("HtmlReport", all_parts_of_a_page),
    "in the explorer": ("AttributionResult", panels_of_the_explorer),
    "in plots": ("AttributionResult", plots),
    "printed": ("ClusterMap", what_is_printed),
    "printed by `hf-rgm info`": ("AttributionResult", what_the_info_command_prints),
}


@pytest.mark.parametrize("where", list(RENDERINGS))
@pytest.mark.parametrize("what", list(TEXTS))
def test_hostile_texts_are_shown_as_harmless_text(where, what, nothing_outside, outcome_of):
    artefact, render = RENDERINGS[where]
    render(TEXTS[what], nothing_outside)
    outcome_of(artefact, f"{what} as names, {where}", "harmless text")
