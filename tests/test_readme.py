"""The README's snippet runs as printed."""

from __future__ import annotations

import re
from pathlib import Path

from hf_rgm.attribution.result import AttributionResult
from hf_rgm.testing import tiny_dataset, tiny_trainer

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_snippet(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = re.search(r"<!-- snippet -->\n```python\n(.*?)```", README, flags=re.DOTALL)
    assert code is not None
    train = tiny_dataset(48, seed=0).add_column("source", ["web", "books", "mail", "chat"] * 12)
    prepared = tiny_trainer(train)
    names = {"model": prepared.model, "args": prepared.args, "train": train, "queries": tiny_dataset(6, seed=1)}
    exec(compile(code[1], "README.md", "exec"), names)
    assert names["result"].scores.shape == (6, 4)
    assert names["result"].row_scores.shape == (6, 48)
    assert type(names["without"]) is type(prepared.model)
    assert (tmp_path / "attributions.png").stat().st_size > 10_000
    assert "books" in capsys.readouterr().out


def test_sign_convention_is_that_of_the_results():
    words = " ".join(README.split())
    assert " ".join(AttributionResult.SIGN_CONVENTION.split()).rstrip(".") in words
