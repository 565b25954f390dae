"""The committed record of cases and its summary; that its outcomes are right, the cases check themselves."""

from __future__ import annotations

import pytest

from tests.hub.hostile import table
from tests.hub.hostile.cases import CASES


def test_the_record_has_the_cases_and_none_that_are_gone(committed):
    if committed is None:
        pytest.skip("the record is being written")
    told = [(case.artefact, case.done) for case in CASES]
    assert len(set(told)) == len(told)
    assert set(told) <= set(committed)
    assert {done for _, done in committed if done.endswith(" (on the Hub)")} == {
        f"{case.done} (on the Hub)" for case in CASES if case.on_hub
    }
    assert table.render(committed) == table.PATH.read_text(encoding="utf-8")


def test_the_page_is_the_summary_of_the_record(committed):
    if committed is None:
        pytest.skip("the record is being written")
    page = table.PAGE.read_text(encoding="utf-8")
    assert page == table.page(committed)
    assert all(f"| {family} |" in page for family in table.FAMILIES)


def test_outcomes_are_counted():
    assert table.counts("ValueError for null, true; harmless for []") == {"ValueError": 2, "harmless": 1}
    assert table.counts("MemoryError: … needs 100.0 GB …") == {"MemoryError": 1}
    assert table.counts("loads; attributing gives DivergenceError or scores") == {"harmless": 1}


def test_nothing_is_written_where_a_case_fails(tmp_path, monkeypatch):
    record, page = tmp_path / "outcomes.json", tmp_path / "formats.md"
    monkeypatch.setattr(table, "PATH", record)
    monkeypatch.setattr(table, "PAGE", page)
    page.write_text(f"before\n{table.START}old\n{table.END} after\n")
    assert table.main(lambda arguments, plugins: 1) == 1
    assert not record.exists() and "old" in page.read_text()
    assert table.main(lambda arguments, plugins: 0) == 0
    assert table.read() == {} and page.read_text() == f"before\n{table.START}{table.summary({})}{table.END} after\n"
