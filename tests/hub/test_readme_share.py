"""The README's section on sharing runs against the local Hub and prints what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import pipeline
from typer.testing import CliRunner

from hf_rgm import ClusterMap, Synset
from hf_rgm.cli import app
from hf_rgm.testing import tiny_dataset, tiny_synset
from tests.vision import distilled_run, vit

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
NUMBER = re.compile(r"-?\d+\.\d+(?:e-?\d+)?|(?<=-> )\d+\.?\d*")
TOLERANCE = 0.02
"""Of printed numbers: other machines add in another order."""


def test_push_and_pull_on_the_command_line(hub_in_process, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    synset = tiny_synset()
    synset.save_pretrained("my-synset")
    for line in re.findall(r"`hf-rgm (push .*|pull .*?)`", README):
        done = CliRunner().invoke(app, line.split())
        assert done.exit_code == 0, done.output
    assert hub_in_process.repository("me/my-synset", "dataset").private
    assert Synset.from_pretrained("copy-of-my-synset").samples_sha256 == synset.samples_sha256


def test_share_it(hub_in_process, capsys):
    code = re.search(r"<!-- share -->\n```python\n(.*?)```", README, flags=re.DOTALL)
    shown = re.search(r"<!-- share:output -->\n```\n(.*?)```", README, flags=re.DOTALL)
    assert code is not None
    assert shown is not None
    train = tiny_dataset(24, seed=0).add_column("source", ["web", "books", "mail"] * 8)
    queries = tiny_dataset(4, seed=1)
    run = distilled_run(vit(), dataset=train, clusters=ClusterMap.from_column(train, "source"), num_train_epochs=12)
    attribute = pipeline("data-attribution", model=run.model, synset=run.synset, disable_tqdm=True)
    names = {
        "attribute": attribute,
        "result": attribute(queries, rows=train),
        "queries": queries,
        "train": train,
        "pipeline": pipeline,
    }
    capsys.readouterr()
    exec(compile(code[1], "README.md", "exec"), names)
    printed = capsys.readouterr().out.replace(hub_in_process.endpoint, "https://huggingface.co")
    assert NUMBER.sub("#", printed) == NUMBER.sub("#", shown[1]), printed
    assert [float(number) for number in NUMBER.findall(printed)] == pytest.approx(
        [float(number) for number in NUMBER.findall(shown[1])], abs=TOLERANCE
    )
