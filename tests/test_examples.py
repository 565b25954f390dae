"""The examples run, with tiny settings, and say what they are for."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
FLOAT_TOLERANCE = 1e-5
"""Logits of one model in two objects."""

NAMES = ("causal_lm", "lora", "text_classification")


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs an example and returns what it prints."""

    def run(name: str, *arguments: str) -> str:
        monkeypatch.syspath_prepend(EXAMPLES)
        for module in (*NAMES, "texts"):
            monkeypatch.delitem(sys.modules, module, raising=False)
        common = {"output_dir": tmp_path / name, "num_rows": 160, "num_iterations": 30, "disable_tqdm": True}
        options = [f"--{option}={value}" for option, value in common.items()]
        importlib.import_module(name).main([*options, "--use_cpu", "--logging_strategy=no", *arguments])
        return capsys.readouterr().out

    return run


def best_sources(printed: str) -> list[str]:
    return re.findall(r"Sources: (\w+) \+", printed)


def test_every_example_is_tested():
    scripts = {path.stem for path in EXAMPLES.glob("*.py") if "__main__" in path.read_text(encoding="utf-8")}
    assert scripts == set(NAMES)


def test_text_classification(run, tmp_path):
    printed = run(
        "text_classification", "--num_train_epochs=6", "--questions", "what a sick ramp", "what a great soup"
    )
    assert best_sources(printed)[0] == "skaters"
    assert "Without skaters, predicted and trained again:" in printed
    assert printed.count("(log-odds") == 2 + 2 * 2
    assert (tmp_path / "text_classification" / "synset" / "synset.safetensors").is_file()


def test_lora(run, tmp_path):
    printed = run("lora", "--num_rows=320", "--rank=2", "--questions", "i found the ramp really sick")
    assert best_sources(printed) == ["skaters"]
    difference = re.search(r"its logits differ by ([-.\de]+)\.", printed)
    assert difference is not None and float(difference[1]) < FLOAT_TOLERANCE
    adapter = tmp_path / "lora" / "adapter-without-skaters" / "adapter_model.safetensors"
    assert adapter.stat().st_size < 50_000


def test_causal_lm(run):
    printed = run("causal_lm", "--num_train_epochs=8")
    assert best_sources(printed) == ["science", "tales"]
    assert "Without tales, which helped cheese most" in printed
    assert printed.count("trained again:") == 2
