"""What a model or an error may not do to whoever runs a command."""

from __future__ import annotations

import json

import pytest
import typer
from huggingface_hub.errors import HfHubHTTPError

from hf_rgm.cli.common import clear_errors
from hf_rgm.cli.loading import Loading
from hf_rgm.explorer.app import open_exhibit
from hf_rgm.testing import tiny_recorded_run
from tests.pages.tiny import tiny_exhibit
from tests.vision import vit

CODE = """
import pathlib
from transformers import PretrainedConfig
pathlib.Path("executed").touch()
class Config(PretrainedConfig):
    model_type = "evil"
"""


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """A model folder whose code is executed once somebody answers "y"."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda prompt="": "y")
    folder = tmp_path / "evil"
    folder.mkdir()
    (folder / "code.py").write_text(CODE)
    auto = {"AutoConfig": "code.Config", "AutoTokenizer": ["code.Config", None]}
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto}))
    return folder


def test_code_in_a_repository_is_not_executed_whatever_is_answered(evil, tmp_path):
    with pytest.raises(ValueError, match="--model-class"):
        Loading().model(str(evil))
    with pytest.raises(OSError, match="no tokenizer"):
        Loading().collator(tiny_recorded_run().queries.rename_columns({"pixel_values": "input_ids"}), str(evil))
    for given in ({"tokenizer": evil}, {"model": evil, "synset": tiny_exhibit().synset}):
        with pytest.raises((OSError, ValueError)):
            open_exhibit(tiny_exhibit().result, **given)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("named", [None, [], 5, "BertModel", ["pipeline"], ["AutoModel"], ["__name__"], [5], [None]])
def test_odd_architectures_are_said_to_be_no_class(named, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": named}))
    with pytest.raises((TypeError, ValueError)) as caught:
        Loading().model(str(tmp_path))
    assert "no class of transformers" in str(caught.value) or "architectures" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("model.safetensors", lambda content: content[:99], "does not load. Copy or save it again. transformers says"),
        ("config.json", lambda content: content.replace(b'"hidden_size": 8', b'"hidden_size": []'), "or is damaged"),
        ("config.json", lambda content: content.replace(b'"hidden_size": 8', b'"hidden_size": 9'), "does not load"),
    ],
)
def test_a_damaged_model_is_one_line_that_names_it(name, damage, message, tmp_path, capsys):
    vit().save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
    with pytest.raises(typer.Exit), clear_errors():
        Loading().model(str(tmp_path))
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("Error: ") and str(tmp_path) in told and message in told


@pytest.mark.parametrize("error", [ValueError, HfHubHTTPError.__mro__[1]])
def test_errors_are_one_line_without_commands_for_the_terminal(error, capsys):
    with pytest.raises(typer.Exit), clear_errors():
        raise error("a\x1b[2J\x1b]0;title\x07\u202eb\nc")
    assert capsys.readouterr().err == "Error: a\\x1b[2J\\x1b]0;title\\x07\\u202eb c\n"
