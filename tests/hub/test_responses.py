"""Responses on the Hub: fetched when they are asked for, left out when that is asked for."""

from __future__ import annotations

import json

import pytest
import torch
from huggingface_hub import DatasetCard
from typer.testing import CliRunner

from hf_rgm import Synset
from hf_rgm.cli import app
from hf_rgm.synset.responses import RESPONSES_FILE
from hf_rgm.synset.synset_files import synset_card
from hf_rgm.testing import tiny_synset
from tests.responses import add_responses, tiny_responses, with_responses

FETCHED = f"HEAD .*resolve/.*{RESPONSES_FILE}"


def invoke(*arguments):
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}).invoke(app, [str(a) for a in arguments])


@pytest.mark.parametrize("precision", ["int8", "bfloat16"])
def test_they_come_back_as_they_were_pushed_and_when_they_are_asked_for(hub_in_process, precision):
    hub = hub_in_process
    with_responses(precision).push_to_hub("me/synset")
    expected = tiny_responses(precision)
    responses = Synset.from_pretrained("me/synset").responses
    assert responses is not None and not responses.at_hand
    assert (responses.precision, responses.num_bytes, responses.sha256) == (
        precision,
        expected.num_bytes,
        expected.sha256,
    )
    assert not hub.count(FETCHED)
    assert torch.equal(responses.decode(slice(1, 3)), expected.decode(slice(1, 3)))
    assert hub.count(FETCHED) == 2 and responses.at_hand  # first its size alone
    with hub.unreachable():
        assert torch.equal(Synset.from_pretrained("me/synset").responses.decode(), expected.decode())


def test_offline_those_that_were_never_fetched_are_missed_by_name(hub_in_process):
    with_responses().push_to_hub("me/synset")
    synset = Synset.from_pretrained("me/synset")
    with hub_in_process.unreachable():
        with pytest.raises(
            FileNotFoundError, match="responses.safetensors of the dataset repository me/synset is not"
        ):
            synset.responses.decode()
    synset.responses.decode()


def test_pushing_without_them_takes_them_away(hub_in_process):
    hub = hub_in_process
    with_responses().push_to_hub("me/synset")
    assert RESPONSES_FILE in hub.files("me/synset", "dataset")
    Synset.from_pretrained("me/synset").push_to_hub("me/synset", with_responses=False)
    files = hub.files("me/synset", "dataset")
    assert RESPONSES_FILE not in files
    assert json.loads(files["synset.json"])["responses"] is None
    assert "## Responses" not in DatasetCard.load("me/synset").text
    assert Synset.from_pretrained("me/synset").responses is None
    assert not hub.count(FETCHED)


def test_a_synset_that_is_pushed_on_brings_them(hub_in_process):
    with_responses().push_to_hub("me/synset")
    Synset.from_pretrained("me/synset").push_to_hub("me/copy")
    first, second = (hub_in_process.files(name, "dataset")[RESPONSES_FILE] for name in ("me/synset", "me/copy"))
    assert first == second


def test_commands_say_that_they_are_there_and_bring_them(hub_in_process, tmp_path):
    folder = with_responses().save_pretrained(tmp_path / "synset")
    size = "1.1 kB"
    assert f"responses: int8, {size}: the parameter changes of leaving each of 6" in invoke("info", folder).output
    pushed = invoke("push", folder, "me/synset")
    assert pushed.exit_code == 0, pushed.output
    told = invoke("info", "me/synset").output
    assert f"responses: int8, {size}" in told and "fetched when asked for" in told
    assert not hub_in_process.count(FETCHED)
    pulled = invoke("pull", "me/synset", tmp_path / "copy")
    assert pulled.exit_code == 0, pulled.output
    assert "responses: int8" in pulled.output and "fetched when asked for" not in pulled.output
    with hub_in_process.unreachable():
        assert torch.equal(
            Synset.from_pretrained(tmp_path / "copy").responses.decode(),  # type: ignore[union-attr]
            tiny_responses().decode(),
        )


def test_info_and_pull_find_that_they_were_changed(hub_in_process, tmp_path):
    folder = tiny_synset().save_pretrained(tmp_path / "synset")
    add_responses(folder)
    whole = (folder / RESPONSES_FILE).read_bytes()
    (folder / RESPONSES_FILE).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    result = invoke("info", folder)
    assert result.exit_code == 1
    assert "whole: NO" in result.output and "the file was changed" in result.output
    content = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    hub_in_process.commit("me/synset", content, "dataset")
    pulled = invoke("pull", "me/synset", tmp_path / "copy")
    assert pulled.exit_code == 1
    assert "the file was changed" in pulled.stderr
    assert not (tmp_path / "copy").exists()


def test_the_card_says_what_they_are_and_how_large():
    text = DatasetCard(synset_card(with_responses("bfloat16"))).text
    section = text[text.index("## Responses") : text.index("## Links")]
    for part in (
        "`responses.safetensors` (2.0 kB, bfloat16)",
        "the 163 trained parameters, followed from training step 10 of 48",
        "one vector of parameter changes for each of the 6 clusters, derived from the gradients of its real training",
        "was not measured",
    ):
        assert part in section
    assert "## Responses" not in synset_card(tiny_synset())
