from __future__ import annotations

import os
from pathlib import Path

import pytest
import transformers
from typer.testing import CliRunner

from hf_rgm.cli import app


@pytest.fixture
def calls(monkeypatch):
    """What the command asks the demo for; nothing is trained."""
    received = []

    def run_demo(output_dir, **options):
        received.append((output_dir, options))
        options["say"]("hello from the demo")

    monkeypatch.setattr("hf_rgm.demo.run_demo", run_demo)
    # The command sets both for its own process.
    monkeypatch.setenv("HF_HUB_OFFLINE", os.environ["HF_HUB_OFFLINE"])
    yield received
    transformers.utils.logging.enable_progress_bar()


def invoke(*arguments):
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}).invoke(app, arguments)


def test_defaults(calls):
    result = invoke("demo")
    assert result.exit_code == 0, result.output
    ((output_dir, options),) = calls
    assert output_dir == Path("hf-rgm-demo")
    assert options["settings"].seed == 0
    assert options["overwrite"] is False
    assert options["disable_tqdm"] is True  # standard error is no terminal here
    assert result.output == "hello from the demo\n"


def test_options(calls, tmp_path):
    result = invoke("demo", "-o", str(tmp_path / "x"), "--seed", "7", "-q", "--overwrite")
    assert result.exit_code == 0, result.output
    ((output_dir, options),) = calls
    assert (output_dir, options["settings"].seed, options["disable_tqdm"]) == (tmp_path / "x", 7, True)
    assert options["overwrite"] is True


@pytest.mark.parametrize("arguments", [("demo", "--seed", "x"), ("demo", "--no-such-option"), ("explain",)])
def test_bad_arguments_are_refused(calls, arguments):
    assert invoke(*arguments).exit_code == 2
    assert calls == []


def test_help_names_the_command_and_its_options():
    assert "demo" in invoke("--help").output
    help_text = invoke("demo", "--help").output
    assert all(option in help_text for option in ("--output-dir", "--seed", "--quiet", "needs no network"))
