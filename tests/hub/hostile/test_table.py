"""The committed table of cases; that its outcomes are right, the cases check themselves."""

from __future__ import annotations

import pytest

from tests.hub.hostile import table
from tests.hub.hostile.cases import CASES


def test_the_table_has_the_cases_and_none_that_are_gone(committed):
    if committed is None:
        pytest.skip("the table is being written")
    told = [(case.artefact, table.cell(case.done)) for case in CASES]
    assert len(set(told)) == len(told)
    assert set(told) <= set(committed)
    assert {done for _, done in committed if done.endswith(" (on the Hub)")} == {
        f"{table.cell(case.done)} (on the Hub)" for case in CASES if case.on_hub
    }
    assert table.render(committed) == table.PATH.read_text(encoding="utf-8")


def test_a_table_that_is_written_can_be_read():
    lines = {("Synset", table.cell("a | b <c> 10**8")): table.cell("ValueError: … a* | b …")}
    assert table.read_lines(table.render(lines)) == lines


def test_the_table_is_not_written_where_a_case_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "PATH", tmp_path / "table.md")
    assert table.main(lambda arguments, plugins: 1) == 1 and not table.PATH.exists()
    assert table.main(lambda arguments, plugins: 0) == 0 and table.PATH.exists()
