"""Documents hold: snippets run, quoted messages are in the source, figures in the results, links lead somewhere."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

from benchmarks import stopping, token_inputs
from benchmarks.report import RESULTS
from hf_rgm import Attributor
from hf_rgm.testing import tiny_dataset, tiny_recorded_run, tiny_synset

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted((ROOT / "docs").glob("*.md"))
GENERATED = {"benchmarks.md", "runs.md", "scaling.md"}
WRITTEN = [path for path in DOCUMENTS if path.name not in GENERATED]
FENCE = re.compile(r"^(?:<!-- (\w+).*? -->\n)?```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
ELSEWHERE = ("sft", "sources")
"""Snippets under comments of these names are run by tests/test_readme.py."""


def snippets(path: Path) -> list[str]:
    found = FENCE.findall(path.read_text(encoding="utf-8"))
    return [code for name, code in found if name not in ELSEWHERE]


def named(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.name)


@named([path for path in WRITTEN if snippets(path)])
def test_snippets_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tiny_recorded_run()
    tiny_synset().save_pretrained("synset")
    run.trajectory.save("trajectory")
    Attributor(run.model, tiny_synset(), disable_tqdm=True).attribute(run.queries).save_pretrained("attributions")
    names = {
        "model": run.model,
        "trajectory": run.trajectory,
        "train": tiny_dataset(48, seed=0).add_column("source", ["web", "books", "mail", "chat"] * 12),
        "queries": run.queries,
    }
    for code in snippets(path):
        exec(compile(code, path.name, "exec"), names)


def messages() -> list[str]:
    """Every text in the source, with three dots for what is filled in."""
    found = []
    for path in (ROOT / "hf_rgm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%(?:\.\d)?[srdg]", "...", node.value))
            elif isinstance(node, ast.JoinedStr):
                parts = [str(p.value) if isinstance(p, ast.Constant) else "..." for p in node.values]
                found.append("".join(parts))
    return found


def quoted(text: str) -> list[str]:
    """The messages at the start of paragraphs of troubleshooting.md."""
    return [" ".join(quote.split()) for quote in re.findall(r"^\*\*`{1,2}(.*?)`{1,2}\*\*", text, re.M | re.S)]


def holds(text: str, parts: list[str]) -> bool:
    """Whether a text has all parts in this order."""
    position = 0
    for part in parts:
        found = text.find(part, position)
        if found < 0:
            return False
        position = found + len(part)
    return True


def test_quoted_messages_are_in_the_source():
    texts = messages()
    quotes = quoted((ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8"))
    assert len(quotes) > 25
    unknown = [quote for quote in quotes if not any(holds(text, quote.split("...")) for text in texts)]
    assert not unknown, "\n".join(unknown)


@named([path for path in WRITTEN if path.name in ("method.md", "choosing.md")])
def test_figures_are_those_of_the_benchmarks(path):
    known = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    for name, module in (("stopping", stopping), ("token_inputs", token_inputs)):
        known += module.table(json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["methods"])
    told = re.findall(r"(?<![\w.])[+-]?\d\.\d{3}(?![\d])", path.read_text(encoding="utf-8"))
    assert told
    assert not [figure for figure in told if figure not in known]


@named([*DOCUMENTS, ROOT / "README.md"])
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if "://" not in target and not target.startswith("#"):
            assert (path.parent / target.partition("#")[0]).exists(), target
