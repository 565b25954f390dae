"""
The record of hostile cases: `python -m tests.hub.hostile.table` runs them and writes `outcomes.json` and its summary,
`docs/hostile.md`.

Tests add an outcome with the fixture `outcome_of`, which also compares it with the record as committed.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

PATH = Path(__file__).with_name("outcomes.json")
"""Outcomes by artefact and what was done."""

SUMMARY = Path(__file__).resolve().parents[3] / "docs" / "hostile.md"
PROPERTY = "hostile"
INTRODUCTION = """# Hostile repositories

A repository on the Hub may be damaged, contradict itself, or be made to do harm. Here is what was done to whole
artefacts, and what came of loading and using them. What loads was also looked at (repr, tables, card) and saved again,
and a synset was asked for scores by every engine. In none of these cases was anything executed, or written outside the
target.

Every outcome is recorded in [`outcomes.json`](../tests/hub/hostile/outcomes.json), which the tests compare with what
happens. `python -m tests.hub.hostile.table` writes it and this page. `python -m tests.hub.hostile.bounds` loads each
folder and tells which took the most time and memory. Beside these cases, every loader is fuzzed with mutated folders:
`python -m tests.hub.hostile.fuzz`.

| what was done | for example | artefacts | outcomes |
|---|---|---|---|
"""
FAMILIES = {
    "a value of another type in the place of every node of every JSON file": (
        r" of other types$",
        "null, true, -1, 2**63, 1e300, text, control characters, empty and nested lists and objects",
    ),
    "names and texts that are markup, code or commands, in every rendering": (
        r" as names, ",
        "HTML, Markdown, YAML, Jinja, formulas, terminal commands, changes of direction, 10,000 characters; on cards, "
        "pages, plots, in the explorer, in the terminal",
    ),
    "sizes that fit into no memory, announced or there": (
        r"^announces",
        "a header of 2**62 bytes, a state of 100 GB, 10**8 rows, a million tensors; within 200 MB, or 300 MB to load",
    ),
    "a JSON file that is damaged, or contradicts the others": (
        r"\.json",
        "missing, cut off, a pickle, a link out of the folder, nested 100,000 deep, of more than 32 MB, with a key "
        "twice, NaN or -1 rows, with fewer clusters than rows have, of another version, run or optimizer",
    ),
    "a safetensors file that is damaged, or contradicts the others": (
        r"\.safetensors",
        "missing, cut off, a pickle, a header that announces other data, another shape or dtype, a tensor too many, "
        "NaN, offsets that go back, rows that the training set lacks, a learning rate of 1e30",
    ),
    "a model that is not the synset's": (r"^used with", "of other weights, another width or number of labels"),
    "the recorded run within": (
        r"\bits? run|\bstate\b|its runs",
        "missing, of another optimizer, without moments, with betas of 0.9999999, a link out of the folder",
    ),
    "files that nobody needs, and nothing": (
        "",
        "the card or the tables to look at are missing or a pickle, the repository lists names that lead out of it",
    ),
}
"""What was done, in groups: a pattern, the first to match counts, and examples."""

Outcomes = dict[tuple[str, str], str]
"""Outcomes by artefact and what was done."""


def read() -> Outcomes:
    """The outcomes as committed."""
    content = json.loads(PATH.read_text(encoding="utf-8"))
    return {(artefact, done): outcome for artefact, cases in content.items() for done, outcome in cases.items()}


def render(outcomes: Outcomes) -> str:
    """The content of `outcomes.json`."""
    content: dict[str, dict[str, str]] = {}
    for (artefact, done), outcome in sorted(outcomes.items()):
        content.setdefault(artefact, {})[done] = outcome
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def counts(outcome: str) -> Counter[str]:
    """How often an outcome is each error, or harmless: `ValueError for null, true; harmless for []` is two and one."""
    if re.match(r"(\w+Error|harmless) for ", outcome):
        parts = (part.split(" for ") for part in outcome.split("; "))
        return Counter({name: len(values.split(", ")) for name, values in parts})
    error = re.search(r"\w+Error", outcome)
    return Counter(["harmless" if error is None or "scores" in outcome else error.group()])


def summary(outcomes: Outcomes) -> str:
    """The content of `docs/hostile.md`: a line for each family of cases."""
    totals: dict[str, Counter[str]] = {family: Counter() for family in FAMILIES}
    artefacts: dict[str, set[str]] = {family: set() for family in FAMILIES}
    for (artefact, done), outcome in sorted(outcomes.items()):
        family = next(family for family, (pattern, _) in FAMILIES.items() if re.search(pattern, done))
        totals[family] += counts(outcome)
        artefacts[family].add(artefact)
    lines = [
        (family, example, ", ".join(sorted(artefacts[family])), ", ".join(f"{n} {k}" for k, n in found.most_common()))
        for (family, (_, example)), found in zip(FAMILIES.items(), totals.values(), strict=True)
    ]
    return INTRODUCTION + "".join("| " + " | ".join(line).replace("*", "\\*") + " |\n" for line in lines)


class Collector:
    """A plugin of pytest that collects the outcomes that tests add."""

    def __init__(self) -> None:
        self.outcomes: Outcomes = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            for name, value in report.user_properties:
                if name == PROPERTY:
                    artefact, done, outcome = value  # type: ignore[misc]
                    self.outcomes[artefact, done] = outcome


def main(run: Callable[..., int] = pytest.main) -> int:
    """Runs the cases, writes both files, and returns the exit code of the tests without the comparisons."""
    collector = Collector()
    fuzzing = f"--ignore={Path(__file__).with_name('test_fuzz.py')}"
    code = run([str(Path(__file__).parent), fuzzing, "-q", "--write-hostile-table"], plugins=[collector])
    if code == 0:
        PATH.write_text(render(collector.outcomes), encoding="utf-8")
        SUMMARY.write_text(summary(collector.outcomes), encoding="utf-8")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
