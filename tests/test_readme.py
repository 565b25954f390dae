"""The README's snippet runs as printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from datasets import Dataset
from peft import LoraConfig
from transformers import pipeline

from hf_rgm import ClusterMap, ReverseGradientMatchingDistiller, TrajectoryCallback
from hf_rgm.attribution.result import AttributionResult
from hf_rgm.testing import tiny_dataset, tiny_trainer
from tests.text import language_model, word_tokenizer

WORDS = ("cat", "dog", "mat", "road")
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


def test_sft_snippet(tmp_path, monkeypatch):
    trl = pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    code = re.search(r"<!-- sft -->\n```python\n(.*?)```", README, flags=re.DOTALL)
    assert code is not None
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
    exec(compile(code[1], "README.md", "exec"), names)
    assert names["result"].scores.shape == (2, 2)
    assert names["result"].row_scores.shape == (2, 16)
    assert type(names["without"]) is type(names["trainer"].model)


def test_sign_convention_is_that_of_the_results():
    words = " ".join(README.split())
    assert " ".join(AttributionResult.SIGN_CONVENTION.split()).rstrip(".") in words
