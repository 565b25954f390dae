from __future__ import annotations

import numpy as np
import pytest
from datasets import load_from_disk

from hf_rgm import AttributionPipeline
from tests.vision import vit_run

gradio = pytest.importorskip("gradio")


@pytest.fixture(scope="module")
def attributions(tmp_path_factory):
    run = vit_run()
    result = AttributionPipeline(run.model, synset=run.synset, disable_tqdm=True)(run.queries, rows=run.train_dataset)
    return result.save_pretrained(tmp_path_factory.mktemp("explore") / "attributions")


@pytest.fixture
def served(monkeypatch):
    """What would be served, and how."""
    calls = []

    def launch(app, **options):
        calls.append((app, options))
        return None, "http://127.0.0.1:1", None

    monkeypatch.setattr(gradio.Blocks, "launch", launch)
    monkeypatch.setattr(gradio.Blocks, "block_thread", lambda app: None)
    return calls


def html_of(app):
    return "\n".join(str(block.value) for block in app.blocks.values() if block.get_block_name() == "html")


def test_it_serves_what_is_named(invoke, files, attributions, served):
    result = invoke(
        "explore", attributions, "--synset", files.synset, "--model", files.model, "--queries", files.queries,
        "--rows", files.train, "--port", 7899, "--title", "Mine",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert result.stdout == "Serving http://127.0.0.1:1, until Ctrl-C.\n"
    [(app, options)] = served
    assert (app.title, options["server_port"]) == ("Mine", 7899)
    shown = html_of(app)
    assert "Synthetic samples" in shown and "Choose clusters, then predict." in shown


def test_attributions_alone_are_served(invoke, attributions, served):
    assert invoke("explore", attributions).exit_code == 0
    assert "need the model, the synset and the queries" in html_of(served[0][0])


def test_it_writes_a_space(invoke, files, attributions, served, tmp_path):
    result = invoke(
        "explore", attributions, "--space", tmp_path / "space", "--queries", files.queries, "--model", "me/model"
    )
    assert result.exit_code == 0, result.output
    assert f"python {tmp_path / 'space'}/app.py" in result.stdout and served == []
    kept = load_from_disk(tmp_path / "space" / "queries")
    np.testing.assert_array_equal(kept["labels"], vit_run().queries["labels"])
    app = tmp_path / "space" / "app.py"
    assert "model='me/model'" in app.read_text()
    app.write_text("edited")
    again = ("explore", attributions, "--space", tmp_path / "space")
    refused = invoke(*again)
    assert refused.exit_code == 1 and f"{tmp_path / 'space'} holds finished work already" in refused.stderr
    assert app.read_text() == "edited"
    assert invoke(*again, "--overwrite").exit_code == 0
    assert "explore(" in app.read_text()


def test_what_is_missing_is_said(invoke, files, attributions, served):
    result = invoke("explore", attributions, "--model", files.model)
    assert result.exit_code == 1 and "Pass `synset`" in result.stderr
    assert invoke("explore", "no/such/thing/at/all").exit_code == 1
