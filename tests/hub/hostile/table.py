"""
The table of hostile cases, `docs/hostile.md`: `python -m tests.hub.hostile.table` runs the cases and writes it.

Tests add a line with the fixture `outcome_of`, which also checks it against the table as committed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parents[3] / "docs" / "hostile.md"
PROPERTY = "hostile"
INTRODUCTION = """# Repositories that mean no good

What was done to an artefact that was whole, and what came of loading and using it. Whatever loads was looked at (repr,
tables, card) and saved again; a synset was asked for scores by every engine. Nothing was executed and nothing was
written outside the target in any of these cases. Between dots stands what was looked for in the error.

Tests compare every line with what happens; `python -m tests.hub.hostile.table` writes this file. Beside these cases,
the loaders are fuzzed with mutated bytes and JSON trees (`tests/hub/hostile/test_fuzz.py`).

| artefact | what was done | outcome |
|---|---|---|
"""

Line = tuple[str, str, str]
"""Artefact, what was done, outcome."""


def read_lines(text: str) -> dict[tuple[str, str], str]:
    """Outcomes in a table, by artefact and what was done."""
    cells = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("| ")][1:]
    return {(artefact.strip(), done): outcome.strip() for artefact, done, outcome in cells}


def cell(text: str) -> str:
    """Text that divides no cell and shows what is in it."""
    return text.replace("|", "&#124;").replace("<", "&lt;").replace("*", "\\*")


def render(lines: dict[tuple[str, str], str]) -> str:
    """The whole file."""
    return INTRODUCTION + "".join(
        f"| {artefact} | {done} | {outcome} |\n" for (artefact, done), outcome in sorted(lines.items())
    )


class Collector:
    """A plugin of pytest that collects the lines that tests add."""

    def __init__(self) -> None:
        self.lines: dict[tuple[str, str], str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            for name, value in report.user_properties:
                if name == PROPERTY:
                    artefact, done, outcome = value  # type: ignore[misc]
                    self.lines[artefact, done] = outcome


def main(run: Callable[..., int] = pytest.main) -> int:
    """Runs the cases, writes the table, and returns the exit code of the tests without the comparisons."""
    collector = Collector()
    fuzzing = f"--ignore={Path(__file__).with_name('test_fuzz.py')}"
    code = run([str(Path(__file__).parent), fuzzing, "-q", "--write-hostile-table"], plugins=[collector])
    if code == 0:
        PATH.write_text(render(collector.lines), encoding="utf-8")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
