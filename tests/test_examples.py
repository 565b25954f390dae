"""The examples run, with tiny settings, and say what they are for."""

from __future__ import annotations

import importlib
import re
import runpy
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

EXAMPLES = Path(__file__).parents[1] / "examples"
FLOAT_TOLERANCE = 1e-5
"""Logits of one model in two objects."""

NAMES = ("causal_lm", "lora", "text_classification")
NOTEBOOKS = {
    "vision": "vision-example/report.html",
    "data_cleaning": "data-cleaning-example/cleaning.png",
    "sources_and_mixture": "mixture-example/mixture.png",
    "unlearning": "unlearning-example/unlearning.png",
}
"""Scripts in percent format, and what each ends with."""


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
    notebooks = {path.stem for path in EXAMPLES.glob("*.py") if "# %%" in path.read_text(encoding="utf-8")}
    assert notebooks == set(NOTEBOOKS)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_RGM_TINY", "1")
    monkeypatch.syspath_prepend(EXAMPLES)
    for module in (*NAMES, "texts"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    names = runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    plt.close("all")
    assert (tmp_path / NOTEBOOKS[name]).stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert f"Look at {NOTEBOOKS[name]}" in printed
    assert "nan" not in printed.lower()
    if name == "unlearning":
        assert re.search(r"Digit 3 is (gone|NOT gone)", printed)
        removed, others = names["unlearned"].checks
        assert (removed.num_rows, others.num_rows) == (120 - len(names["kept"]), len(names["kept"]))
    if name == "data_cleaning":
        assert len(names["subsets"]["all wrong labels dropped"]) == 114
    if name == "sources_and_mixture":
        assert names["mixture"].weights @ names["clusters"].sizes == pytest.approx(80)


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


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """Saves a tiny model and a tokenizer of the examples' words where `--model_name_or_path` can find them."""

    def save(model_class, config_class, texts, *, language_model=False, **settings) -> str:
        tokenizer = word_tokenizer(texts, language_model=language_model)
        ids = {"pad_token_id": tokenizer.pad_token_id, "vocab_size": len(tokenizer)}
        folder = tmp_path / "checkpoint"
        model_class(config_class(**ids, **settings)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    monkeypatch.syspath_prepend(EXAMPLES)
    word_tokenizer = importlib.import_module("texts").word_tokenizer
    return save


@pytest.mark.parametrize("name", ["text_classification", "lora"])
def test_a_named_classifier_is_taken(run, checkpoint, name):
    words = importlib.import_module("texts").reviews(160)["text"]
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    folder = checkpoint(BertForSequenceClassification, BertConfig, words, **sizes)
    arguments = ["--num_train_epochs=1", "--num_iterations=5", "--questions", "what a sick ramp"]
    printed = run(name, f"--model_name_or_path={folder}", "--learning_rate=1e-3", *arguments)
    assert '"what a sick ramp"' in printed and "Sources: " in printed


def test_a_named_language_model_is_taken(run, checkpoint):
    words = importlib.import_module("texts").stories(160)["text"]
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 32, "bos_token_id": 2, "eos_token_id": 2}
    folder = checkpoint(GPT2LMHeadModel, GPT2Config, words, language_model=True, **sizes)
    printed = run("causal_lm", f"--model_name_or_path={folder}", "--num_train_epochs=1", "--num_iterations=5")
    assert '"... rock": log-probability' in printed
