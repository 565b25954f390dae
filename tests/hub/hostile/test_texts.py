"""Names that would be markup, code or commands somewhere are shown as they are, everywhere."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from huggingface_hub import DatasetCard, ModelCard
from markdown_it import MarkdownIt

from hf_rgm import AttributionResult, ClusterMap
from hf_rgm.files.reading import printable
from hf_rgm.pages.html import HtmlReport
from hf_rgm.results.result_files import attribution_card
from hf_rgm.results.unlearned import UnlearnedModel, unlearned_model_card
from hf_rgm.synset.synset_files import synset_card
from hf_rgm.testing import tiny_recorded_run, tiny_synset
from tests.hub.hostile.artefacts import is_plain

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
    "10,000 characters": "x" * 10_000,
    "a path": "../../../etc/passwd",
}
SAFE_TAGS = {"html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "p", "section", "figure", "img"} | {
    "figcaption", "div", "table", "thead", "tbody", "tr", "th", "td", "caption", "col", "colgroup", "h3", "span"
} | {"ul", "li", "strong", "blockquote"}  # fmt: skip


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
        metadata={"model": {"class": text, "name_or_path": text}, text: text, "nested": {text: [text]}},
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
                assert address.startswith("https://huggingface.co/"), address
            shown.append(token.content)
        shown.append("\n")
    return "".join(shown)


class Parsed(HTMLParser):
    """What is in a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[tuple[str, str]] = set()
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {(name, value or "") for name, value in attrs}

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("what", list(TEXTS))
def test_cards(what, outcome_of):
    text = TEXTS[what]
    result = result_named(text)
    card = attribution_card(result)
    assert is_plain(card)
    seen = visible(card)
    # Names, objective and engine; Markdown joins no words and drops no character of them.
    assert seen.count(printable(text)) >= 4
    data = DatasetCard(card).data.to_dict()
    assert set(data) == {"configs", "library_name", "tags"}
    assert [part["config_name"] for part in data["configs"]] == ["top", "scores", "clusters", "queries"]
    outcome_of("AttributionResult", f"{what} as names, shown on the card", "harmless text")


@pytest.mark.parametrize("what", list(TEXTS))
def test_cards_of_synsets_and_unlearned_models(what, outcome_of, monkeypatch):
    text, run = TEXTS[what], tiny_recorded_run()
    synset = tiny_synset()
    described = {"model": {"class": text, "name_or_path": f"{text}/{text}"}}
    monkeypatch.setattr(synset.trajectory, "metadata", synset.trajectory.metadata | described)
    card = synset_card(synset)
    assert is_plain(card) and printable(text) in visible(card)
    assert "base_model" not in DatasetCard(card).data.to_dict()
    unlearned = UnlearnedModel(
        model=run.model,
        clusters=[text],
        sizes=[1],
        checks=[],
        engine=text,
        rewind_step=0,
        num_steps=1,
        parameters_sha256="0" * 64,
        model_name=text,
        fidelity=None,
    )
    card = unlearned_model_card(unlearned)
    assert is_plain(card) and visible(card).count(printable(text)) >= 2
    assert set(ModelCard(card).data.to_dict()) == {"library_name", "tags"}
    outcome_of("Synset", f"{what} as the model's name, shown on the card", "harmless text")


@pytest.mark.parametrize("what", list(TEXTS))
def test_pages_and_pictures(what, nothing_outside, outcome_of):
    text = TEXTS[what]
    result, rows = result_named(text), [{"text": text, "label": text}] * 6
    path = result.to_html(nothing_outside / "page.html", title=text, rows=rows, queries=rows[: result.num_queries])
    page = path.read_text(encoding="utf-8")
    parsed = Parsed(page)
    assert parsed.tags <= SAFE_TAGS
    names = {name for name, _ in parsed.attributes}
    assert not [name for name in names if name.startswith("on")] and not names & {"href", "action", "formaction"}
    assert all(value.startswith("data:image/png") for name, value in parsed.attributes if name == "src")
    assert is_plain(page)
    assert printable(text).replace("\\n", "\n") in parsed.text.replace("\\n", "\n")
    outcome_of("AttributionResult", f"{what} as names, on a page with pictures", "harmless text")


@pytest.mark.parametrize("what", list(TEXTS))
def test_terminals(what, outcome_of):
    text = TEXTS[what]
    result, clusters = result_named(text), ClusterMap.from_ids([0, 1], names=[text, "plain"])
    shown: list[object] = [result, clusters, result.top(3), result.top(3, text), result.to_pandas()]
    shown += [result.to_dataset(), result.cluster_names, result.query_ids, clusters.names, clusters.rows(text)]
    for unknown in (result.query_index, clusters.index):
        with pytest.raises(KeyError) as caught:
            unknown(f"{text}?")
        shown.append(caught.value)
    assert all(is_plain(str(item)) and is_plain(repr(item)) for item in shown)
    outcome_of("ClusterMap", f"{what} as names, printed", "harmless text")


def test_pages_made_by_hand_escape_too():
    report = HtmlReport("<b>", lead="\x1b")
    section = report.section("<i>")
    section.text("<script>\n\nx")
    section.table(["<u>"], [["<s>"]], caption="<s>")
    assert not Parsed(report.to_html()).tags & {"b", "i", "u", "s", "script"} and is_plain(report.to_html())
