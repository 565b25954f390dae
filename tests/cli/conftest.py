"""A small vision Transformer on disk, its recording and its data: what the commands are given."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import transformers
from typer.testing import CliRunner

from hf_rgm.cli import app
from tests.hub.conftest import hub, hub_in_process  # noqa: F401 (fixtures)
from tests.vision import vit_run


@dataclass
class Files:
    """Paths, as text."""

    model: str
    trajectory: str
    train: str
    queries: str
    synset: str


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> Files:
    """Do not change them."""
    run, root = vit_run(), tmp_path_factory.mktemp("cli")
    run.model.save_pretrained(root / "model")
    train = run.train_dataset.add_column("source", ["web", "books", "mail"] * 8)
    train.to_parquet(root / "train.parquet")
    run.queries.to_parquet(root / "queries.parquet")
    run.synset.save_pretrained(root / "synset")
    paths = (root / "model", run.trajectory.folder, root / "train.parquet", root / "queries.parquet", root / "synset")
    return Files(*map(str, paths))


@pytest.fixture
def invoke(monkeypatch):
    """Runs `hf-rgm`. Standard output and error are kept apart."""
    monkeypatch.delenv("CI", raising=False)

    def run(*arguments: object):
        runner = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})
        return runner.invoke(app, [str(argument) for argument in arguments])

    yield run
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture
def told(invoke):
    """Runs `hf-rgm ... --json` and returns what it prints."""

    def run(*arguments: object) -> dict:
        result = invoke(*arguments, "--json")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    return run


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """A user's script, with the functions that commands ask for."""
    path = tmp_path / "my_training.py"
    path.write_text(
        "from __future__ import annotations\n"
        "from transformers import default_data_collator as collate\n"
        "from tests.vision import trainer_for as build_trainer, vit\n"
        "from hf_rgm import Objective\n\n"
        "first = Objective('first', lambda forward, queries: forward(queries.inputs)[:, 0])\n\n"
        "def first_half(dataset):\n"
        "    return dataset.select(range(len(dataset) // 2))\n"
    )
    return path
