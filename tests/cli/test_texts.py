"""Texts are shown in words wherever a tokenizer is at hand, and escaped."""

from __future__ import annotations

import html
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
from transformers import AutoTokenizer, pipeline

from hf_rgm import AttributionResult, ClusterMap, DistillationConfig, ReverseGradientMatchingDistiller
from hf_rgm.explorer.app import open_exhibit
from hf_rgm.pages.exhibit import Exhibit
from tests.text import VOCABULARY, classifier, language_model, texts, word_tokenizer
from tests.training import recorded_model

EVIL = "<img/src=x>{}"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A recorded classifier whose vocabulary is markup, with its tokenizer beside it, and its data."""
    folder = tmp_path_factory.mktemp("texts")
    rows, queries = texts(), texts(4, seed=1)
    model = recorded_model(classifier("bert"), rows, folder / "run", num_states=3, num_train_epochs=3)
    tokenizer = word_tokenizer(EVIL.format(number) for number in range(3, VOCABULARY))
    for part in (model, tokenizer):
        part.save_pretrained(folder / "model")
    rows.add_column("source", np.arange(24) % 3).to_parquet(folder / "train.parquet")
    queries.to_parquet(folder / "queries.parquet")
    trajectory = folder / "run" / "trajectory"
    config = DistillationConfig(samples_per_cluster=2, num_iterations=3, num_tokens=6)
    clusters = ClusterMap.from_ids(np.arange(24) % 3)
    synset = ReverseGradientMatchingDistiller(
        model, trajectory, rows, clusters, config=config, disable_tqdm=True
    ).distill()
    synset.save_pretrained(folder / "synset")
    return SimpleNamespace(
        folder=folder, model=model, trajectory=trajectory, synset=synset, rows=rows, queries=queries,
        tokenizer=AutoTokenizer.from_pretrained(folder / "model"),
    )  # fmt: skip


def shown(page: str, run) -> set[str]:
    """Synthetic texts of the run on a page."""
    return {text for text in run.synset.texts(run.tokenizer) if html.escape(text) in page}


def samples_table(synset):
    """What `load_dataset` shows of a synset's folder."""
    return datasets.load_dataset(str(synset), split="train")


def test_a_report_of_a_pipeline_s_result_needs_no_tokenizer(run, tmp_path):
    attribute = pipeline(
        "data-attribution", model=str(run.folder / "model"), synset=run.synset, disable_tqdm=True, engine="adjoint"
    )
    result = attribute(run.queries)
    page = result.to_html(tmp_path / "report.html", queries=run.queries, synset=run.synset).read_text()
    assert shown(page, run) and "tokens 3," not in page and "read as its nearest tokens" in page
    assert html.escape(run.tokenizer.decode(run.queries[0]["input_ids"], skip_special_tokens=True)) in page
    assert "<img/src" not in page
    samples = [card.text for k in range(3) for card in Exhibit(result, synset=run.synset).cluster_samples(k)]
    assert samples == run.synset.texts(run.tokenizer)

    loaded = AttributionResult.from_pretrained(result.save_pretrained(tmp_path / "attributions"))
    ids = [card.text for card in Exhibit(loaded, synset=run.synset).cluster_samples(0)]
    assert ids[0] == f"tokens {', '.join(map(str, run.synset.metadata['tokens'][0]))}"
    exhibit = open_exhibit(loaded, synset=run.synset, model=run.folder / "model")
    assert [card.text for card in exhibit.cluster_samples(0)] == samples[:2]

    attribute.save_pretrained(tmp_path / "both")
    table = samples_table(tmp_path / "both" / "synset")
    assert table["text"][:] == samples


def test_each_token_of_a_text_is_explained(invoke, tmp_path):
    rows, tokenizer = texts(labels="text"), word_tokenizer(f"word{number}" for number in range(3, VOCABULARY))
    model = recorded_model(language_model("llama"), rows, tmp_path / "run", num_states=3)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    rows.add_column("source", np.arange(24) % 3).to_parquet(tmp_path / "train.parquet")
    rows.select([1]).remove_columns("labels").to_parquet(tmp_path / "queries.parquet")
    trajectory, scores = tmp_path / "run" / "trajectory", tmp_path / "scores"
    told = invoke(
        "attribute", tmp_path / "model", trajectory, tmp_path / "queries.parquet", "-o", scores, "--rows",
        tmp_path / "train.parquet", "--cluster-column", "source", "--per-token", "--html", tmp_path / "page.html",
    )  # fmt: skip
    assert told.exit_code == 0, told.output
    names = [f"token {position}" for position in range(1, 5)]  # of five tokens, the first is not predicted
    assert list(AttributionResult.from_pretrained(scores).query_ids) == names
    assert all(name in (tmp_path / "page.html").read_text() for name in names)
    known = {"trajectory": trajectory, "rows": rows, "clusters": ClusterMap.from_ids(np.arange(24) % 3)}
    attribute = pipeline("data-attribution", model=model, tokenizer=tokenizer, **known, disable_tqdm=True)
    text = tokenizer.decode(rows[1]["input_ids"][:5])
    found = attribute(text, per_token=True)
    assert list(found.query_ids) == [f"{name} {word!r}" for name, word in zip(names, text.split()[1:], strict=True)]
    np.testing.assert_allclose(found.scores.mean(0), attribute(text).scores[0], rtol=2e-4, atol=2e-6)


def test_commands_find_the_tokenizer_beside_the_model(invoke, run, tmp_path, monkeypatch):
    gradio = pytest.importorskip("gradio")
    model, queries = run.folder / "model", run.folder / "queries.parquet"
    done = invoke(
        "distill", run.trajectory, model, run.folder / "train.parquet", "-o", tmp_path / "synset",
        "--cluster-column", "source", "--samples-per-cluster", 1, "--num-iterations", 1,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    table = samples_table(tmp_path / "synset")
    assert all("<img/src=x>" in text for text in table["text"])
    done = invoke(
        "attribute", model, run.folder / "synset", queries, "-o", tmp_path / "scores", "--engine", "adjoint",
        "--html", tmp_path / "report.html",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    page = (tmp_path / "report.html").read_text()
    assert shown(page, run) and "<img/src" not in page

    served = []
    monkeypatch.setattr(gradio.Blocks, "launch", lambda app, **_: served.append(app) or (None, "address", None))
    monkeypatch.setattr(gradio.Blocks, "block_thread", lambda app: None)
    given = ("explore", tmp_path / "scores", "--synset", run.folder / "synset", "--queries", queries)
    assert invoke(*given, "--model", model).exit_code == 0
    assert invoke(*given, "--tokenizer", model).exit_code == 0
    assert invoke(*given).exit_code == 0
    pages = ["\n".join(str(b.value) for b in app.blocks.values() if b.get_block_name() == "html") for app in served]
    assert [bool(shown(page, run)) for page in pages] == [True, True, False]
    assert all("<img/src" not in page for page in pages)
    assert invoke(*given, "--tokenizer", model, "--space", tmp_path / "space").exit_code == 0
    assert 'tokenizer=HERE / "tokenizer"' in (tmp_path / "space" / "app.py").read_text()
