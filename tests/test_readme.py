"""The README's snippets run and print what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from datasets import Dataset
from peft import LoraConfig
from transformers import pipeline

from hf_rgm import ClusterMap, ReverseGradientMatchingDistiller, TrajectoryCallback
from hf_rgm.results.result import AttributionResult
from hf_rgm.testing import tiny_dataset, tiny_trainer
from tests.text import language_model, word_tokenizer

WORDS = ("cat", "dog", "mat", "road")
ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SOURCES = [("web", "books", "mail")[row % 3] if row % 4 else "chat" for row in range(48)]
"""Each has mostly one class, so that they help different queries."""

NUMBER = re.compile(r"-?\d+\.\d+")
TOLERANCE = 0.02
"""Of printed numbers: other machines add in another order."""


def block(name: str, language: str = "python", text: str = README) -> str:
    """The fenced block after a comment of this name."""
    found = re.search(rf"<!-- {name} -->\n```{language}\n(.*?)```", text, flags=re.DOTALL)
    assert found is not None, name
    return found[1]


def test_every_python_snippet_is_run_by_a_test():
    assert README.count("```python") == len(re.findall(r"<!-- (?:snippet|measure|share) -->\n```python", README))


def test_snippet(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train = tiny_dataset(48, seed=0).add_column("source", SOURCES)
    prepared = tiny_trainer(train)
    names = {"model": prepared.model, "args": prepared.args, "train": train, "queries": tiny_dataset(6, seed=1)}
    assert len(block("snippet").splitlines()) <= 20
    exec(compile(block("snippet"), "README.md", "exec"), names)
    printed = re.sub(r"\{'train_runtime.*\n", "", capsys.readouterr().out)
    shown = block("snippet:output", "")
    assert NUMBER.sub("#", printed).split() == NUMBER.sub("#", shown).split(), printed
    assert [float(number) for number in NUMBER.findall(printed)] == pytest.approx(
        [float(number) for number in NUMBER.findall(shown)], abs=TOLERANCE
    )
    assert names["result"].scores.shape == (6, 4)
    assert names["result"].row_scores.shape == (6, 48)
    assert type(names["without"]) is type(prepared.model)
    assert (tmp_path / "attributions.png").stat().st_size > 10_000

    names["build_trainer"] = tiny_trainer
    measure = block("measure")
    assert "budget=24" in measure
    exec(compile(measure.replace("budget=24", "budget=5, disable_tqdm=True"), "README.md", "exec"), names)
    assert "with 5 retrainings" in capsys.readouterr().out
    assert names["synset"].fidelity == names["report"].to_dict()


def test_the_page_of_sources(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "sources.md").read_text(encoding="utf-8")
    rows = tiny_dataset(96, seed=0)
    sources = [("web", "books", "mail", "chat")[row % 4] for row in range(96)]
    sources = ["books" if label == 1 else source for source, label in zip(sources, rows["labels"], strict=True)]
    labels = [2 if label == 1 else int(label) for label in rows["labels"]]  # what "books" calls all of its 1s
    train = rows.remove_columns("labels").add_column("labels", labels).add_column("source", sources)
    trainer = tiny_trainer(train, callbacks=[TrajectoryCallback("trajectory")])
    trainer.train()
    names = {"model": trainer.model.eval(), "train": train, "held_out": tiny_dataset(24, seed=1)}
    parts = ("sources", "sources:rows", "sources:without")
    assert page.count("```python") == len(parts)
    for part in parts:
        exec(compile(block(part, text=page), "sources.md", "exec"), names)
    assert names["result"].scores.shape == (len(names["wrong"]), 4)
    assert set(names["train"].select(names["order"])["source"]) == {names["worst"]}
    assert names["worst"] == "books"
    assert "right without books" in capsys.readouterr().out


def test_sft_snippet(tmp_path, monkeypatch):
    trl = pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    document = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
    texts = [f"the {word} sat on the {other}" for word in WORDS for other in WORDS]
    names = {
        "model": language_model("gpt2", bos_token_id=1, eos_token_id=1),
        "base": language_model("gpt2", bos_token_id=1, eos_token_id=1),
        "args": trl.SFTConfig(str(tmp_path / "out"), num_train_epochs=2, use_cpu=True, bf16=False, report_to="none"),
        "train": Dataset.from_dict({"text": texts, "source": ["web", "books"] * 8}),
        "tokenizer": word_tokenizer(texts),
        "lora": LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM"),
        "TrajectoryCallback": TrajectoryCallback,
        "ClusterMap": ClusterMap,
        "ReverseGradientMatchingDistiller": ReverseGradientMatchingDistiller,
        "pipeline": pipeline,
    }
    exec(compile(block("sft", text=document), "choosing.md", "exec"), names)
    assert names["result"].scores.shape == (2, 2)
    assert names["result"].row_scores.shape == (2, 16)
    assert type(names["without"]) is type(names["trainer"].model)


def test_sign_convention_is_that_of_the_results():
    words = " ".join(README.split())
    assert " ".join(AttributionResult.SIGN_CONVENTION.split()).rstrip(".") in words
