from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import typer

from hf_rgm.cli import app
from hf_rgm.cli.common import hide_bars

ROOT = Path(__file__).parents[2]
COMMANDS = list(typer.main.get_command(app).commands.items())


@pytest.mark.parametrize(("name", "command"), COMMANDS, ids=[name for name, _ in COMMANDS])
def test_every_command_has_an_example_that_its_own_parser_takes(name, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("trajectory", "my-synset", "hf-rgm-demo/synset"):
        (tmp_path / folder).mkdir(parents=True)
    example = re.search(r"Examples?: hf-rgm (\S+) ?(.*?)(?: hf-rgm|$)", " ".join(command.help.split()))
    assert example is not None
    assert example[1] == name
    assert command.make_context(name, example[2].split()).params


def test_the_help_is_shown_without_loading_what_takes_seconds():
    code = (
        "import sys, types\n"
        "package = sys.modules['hf_rgm'] = types.ModuleType('hf_rgm')\n"
        "package.__path__ = ['hf_rgm']\n"
        "import hf_rgm.cli\n"
        "assert not {'torch', 'transformers', 'datasets', 'pandas', 'sklearn'} & {*sys.modules}, sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


@pytest.mark.parametrize(
    ("terminal", "ci", "quiet", "hidden"),
    [
        (True, "", False, False),
        (True, "true", False, True),
        (True, "false", False, False),
        (True, "", True, True),
        (False, "", False, True),
    ],
)
def test_bars_are_for_terminals(monkeypatch, terminal, ci, quiet, hidden):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setenv("CI", ci)
    datasets.enable_progress_bars()
    assert hide_bars(quiet) is hidden
    assert datasets.are_progress_bars_disabled() is hidden
    datasets.enable_progress_bars()
