"""Names of objectives on the command line."""

import pytest

from hf_rgm.cli.loading import load_objective


def test_names_of_outputs_and_references_are_told_apart(tmp_path, monkeypatch):
    (tmp_path / "probability_of_mine.py").write_text("confidence = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_objective("probability_of_mine:confidence") == 3
    for name in ("margin", "probability:1", "probability:a:b", "predicted_value:0"):
        assert load_objective(name) == name
    with pytest.raises(ImportError):
        load_objective("no_such_module:name")
