from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.hub.hostile import table

OPTION = "--write-hostile-table"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(OPTION, action="store_true", help="do not compare with outcomes.json, it is being written")


@pytest.fixture(scope="session")
def committed(request: pytest.FixtureRequest) -> dict[tuple[str, str], str] | None:
    """The record as committed, or nothing while it is being written."""
    # Where the whole suite runs, pytest comes here too late to ask for options.
    if request.config.getoption(OPTION, default=False):
        return None
    return table.read()


@pytest.fixture
def outcome_of(
    record_property: Callable[[str, object], None], committed: dict[tuple[str, str], str] | None
) -> Callable[[str, str, str], None]:
    """Adds an outcome to the record of cases; call it with artefact, what was done, and outcome."""

    def add(artefact: str, done: str, outcome: str) -> None:
        record_property(table.PROPERTY, (artefact, done, outcome))
        if committed is not None:
            told = "Run `python -m tests.hub.hostile.table` and look at what has changed."
            assert committed.get((artefact, done)) == outcome, told

    return add


@pytest.fixture(autouse=True)
def free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """On every machine 8 GB are said to be free."""
    monkeypatch.setattr("hf_rgm.files.reading.psutil.virtual_memory", lambda: SimpleNamespace(available=8 * 10**9))


@pytest.fixture(autouse=True)
def no_flushing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of small files are written here, and no machine loses its power meanwhile."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


@pytest.fixture(autouse=True)
def nothing_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """
    A folder `target`, in which tests may write; nothing may appear in the working folder beside it.

    A payload that was executed would write to the working folder too.
    """
    target, working = tmp_path / "target", tmp_path / "working"
    target.mkdir()
    working.mkdir()
    monkeypatch.chdir(working)
    yield target
    assert not list(working.iterdir())
