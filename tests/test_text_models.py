"""The whole path on text models, from a `Trainer` run to scores and the model without a cluster."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import pipeline

from hf_rgm import (
    Attributor,
    ClusterMap,
    DistillationConfig,
    ReverseGradientMatchingDistiller,
    Synset,
)
from hf_rgm.exceptions import ParameterMismatchError
from hf_rgm.model.functional_model import FunctionalModel
from hf_rgm.model.losses import RowLoss
from hf_rgm.model.row_gradients import cluster_gradients
from hf_rgm.model.row_reader import CachedBatches, RowReader
from tests.text import VOCABULARY, classifier, language_model, lora, texts, word_tokenizer
from tests.training import recorded_model

CLOSE = {"atol": 1e-6, "rtol": 1e-4}
"""Float32 by another order of operations."""


MODELS = {
    "bert": (lambda: classifier("bert"), "class"),
    "gpt2 classifier": (lambda: classifier("gpt2"), "class"),
    "gpt2": (lambda: language_model("gpt2"), "text"),
    "llama": (lambda: language_model("llama"), "text"),
    "bert LoRA": (lambda: lora(classifier("bert")), "class"),
    "bert in bfloat16": (lambda: classifier("bert", dtype=torch.bfloat16), "class"),
}


@pytest.fixture(params=MODELS, scope="module")
def run(request, tmp_path_factory):
    make, labels = MODELS[request.param]
    folder = tmp_path_factory.mktemp("run")
    dataset = texts(labels=labels)
    model = recorded_model(make(), dataset, folder, num_states=5, num_train_epochs=10)
    return model, folder / "trajectory", dataset, texts(6, labels=labels, seed=1)


@pytest.fixture(scope="module")
def clusters():
    return ClusterMap.from_ids(np.arange(24) % 3, names=["zero", "one", "two"])


def distil(run, clusters, **settings):
    model, trajectory, dataset, _ = run
    config = DistillationConfig(samples_per_cluster=2, num_tokens=6, **settings)
    return ReverseGradientMatchingDistiller(
        model, trajectory, dataset, clusters, config=config, disable_tqdm=True
    ).distill()


@pytest.fixture(scope="module")
def synset(run, clusters):
    return distil(run, clusters, num_iterations=80)


def test_distilling_lowers_the_matching_error(run, clusters, synset):
    start = distil(run, clusters, num_iterations=1, solve_weights=False)
    assert synset.matching_error < 0.7 * start.matching_error
    trained = FunctionalModel(run[0]).trains_embeddings
    assert synset.input_name == ("soft_tokens" if trained else "inputs_embeds")


def test_a_saved_synset_scores_alike(run, synset, tmp_path):
    model, _, _, queries = run
    loaded = Synset.from_pretrained(synset.save_pretrained(tmp_path / "synset"))
    assert loaded.samples_sha256 == synset.samples_sha256
    scores = [
        Attributor(model, kept, disable_tqdm=True).attribute(queries, objective="loss", rewind=0.5).scores
        for kept in (synset, loaded)
    ]
    assert np.array_equal(*scores)


class Decoder:
    @staticmethod
    def decode(tokens):
        return " ".join(map(str, tokens))


def test_synthetic_writtencan_be_read(synset):
    """Samples start from rows, whose tokens are 3 and up, and padding (0) never occurs in them."""
    read = synset.texts(Decoder)
    assert len(read) == 6
    assert all(len(text.split()) == 6 for text in read)
    assert list(synset.to_pandas()["tokens"].map(Decoder.decode)) == read
    assert synset.metadata["privacy"]["num_tokens"] == 6


def test_another_base_under_the_same_adapter_is_refused(run, synset):
    model, _, _, _ = run
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    if not frozen:
        pytest.skip("everything is trained")
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_parameter(sorted(frozen)[0]).flatten()[0] += 1e-3
    with pytest.raises(ParameterMismatchError, match="the parameters that were not trained differ"):
        Attributor(other, synset)
    Attributor(other, synset, force=True)


@pytest.mark.parametrize("num_queries", [1, 6])
def test_row_scores_add_up_to_those_of_their_clusters(run, clusters, synset, num_queries):
    """One query goes through forward mode, six through the rows' gradients."""
    model, _, dataset, queries = run
    attributor = Attributor(model, synset, disable_tqdm=True)
    result = attributor.attribute(queries.select(range(num_queries)), engine="adjoint", rows=dataset)
    sums = result.row_scores @ np.eye(3)[clusters.cluster_ids]
    np.testing.assert_allclose(sums, result.scores, rtol=1e-4, atol=1e-7)
    assert np.isfinite(result.scores).all() and result.scores.any(1).all()


def test_forward_mode_and_gradients_score_rows_alike(run, synset):
    model, _, dataset, queries = run
    attributor = Attributor(model, synset, disable_tqdm=True)
    few = attributor.attribute(queries.select(range(2)), engine="adjoint", rows=dataset).row_scores
    many = attributor.attribute(queries, engine="adjoint", rows=dataset).row_scores
    np.testing.assert_allclose(few, many[:2], rtol=1e-3, atol=1e-5 * np.abs(many).max())


def test_cluster_gradients_add_up_to_that_of_the_trainers_loss(run, clusters):
    model, _, dataset, _ = run
    functional = FunctionalModel(model)
    reader = RowReader(dataset, functional)
    batches = CachedBatches(reader, [clusters.rows(k) for k in range(3)], batch_size=5)
    row_loss = RowLoss(labels_per_row=reader.labels_per_row())
    parameters = functional.parameters()
    total = cluster_gradients(functional, [functional.space.flatten(parameters)], batches, range(3), 24, row_loss)[
        0
    ].sum(0)
    copy = functional.module_with(parameters, like=model).float()
    loss = copy(**dataset[:]).loss
    own = [value for name, value in copy.named_parameters() if name in functional.space.names]
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, own)])
    torch.testing.assert_close(total, expected, **CLOSE)


def test_the_model_without_a_cluster_is_one_of_its_kind(run, synset, tmp_path):
    model, _, dataset, queries = run
    without = Attributor(model, synset, disable_tqdm=True).model_without("one")
    assert type(without) is type(model)
    batch = queries[:]
    with torch.no_grad():
        before, after = (m(**batch).logits.float() for m in (model, without))
    assert not torch.equal(before, after)
    if isinstance(model, PeftModel):
        without.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(classifier("bert"), tmp_path).eval()
        with torch.no_grad():
            torch.testing.assert_close(again(**batch).logits, after, atol=0, rtol=0)


def cut(rows):
    """The same rows without their padding."""
    lengths = [int(row["attention_mask"].sum()) for row in rows]
    return [
        {name: value[:length].tolist() if value.dim() else int(value) for name, value in row.items()}
        for row, length in zip(rows, lengths, strict=True)
    ]


def test_a_pipeline_with_a_tokenizer_pads_queries_and_rows(run, synset):
    model, _, dataset, queries = run
    tokenizer = word_tokenizer(f"w{number}" for number in range(3, VOCABULARY))
    settings = {"engine": "adjoint", "objective": "loss", "rewind": 0.5}
    expected = Attributor(model, synset, disable_tqdm=True).attribute(queries, rows=dataset, **settings)
    attribute = pipeline("data-attribution", model=model, tokenizer=tokenizer, synset=synset, disable_tqdm=True)
    result = attribute(cut(queries), rows=dataset, **settings)
    np.testing.assert_allclose(result.scores, expected.scores, rtol=1e-3, atol=1e-5 * np.abs(expected.scores).max())
    assert result.row_scores.shape == (6, 24)
    with pytest.raises(ValueError, match="Pass the `data_collator`"):
        pipeline("data-attribution", model=model, synset=synset, disable_tqdm=True)(cut(queries))


def test_a_pipeline_with_a_tokenizer_takes_texts(run, synset):
    model = run[0]
    tokenizer = word_tokenizer(f"w{number}" for number in range(3, VOCABULARY))
    attribute = pipeline("data-attribution", model=model, tokenizer=tokenizer, synset=synset, disable_tqdm=True)
    written = ["w3 w5 w9", "w4 w7"]
    rows = [dict(tokenizer(text)) for text in written]
    expected = attribute(rows, rewind=0.5).scores
    np.testing.assert_array_equal(attribute(written, rewind=0.5).scores, expected)
    np.testing.assert_allclose(attribute("w4 w7", rewind=0.5).scores, expected[1:], rtol=1e-3, atol=1e-6)
    np.testing.assert_array_equal(attribute(Dataset.from_dict({"text": written}), rewind=0.5).scores, expected)


def test_rows_with_a_text_keep_their_labels(run, synset):
    if run[2].with_format(None)[0]["labels"] not in (0, 1, 2):
        pytest.skip("its labels are those of tokens")
    tokenizer = word_tokenizer(f"w{number}" for number in range(3, VOCABULARY))
    attribute = pipeline("data-attribution", model=run[0], tokenizer=tokenizer, synset=synset, disable_tqdm=True)
    settings = {"engine": "adjoint", "objective": "loss", "rewind": 0.5}
    labels = [attribute([{"text": "w3 w5 w9", "labels": label}], **settings) for label in (0, 1)]
    rows = [attribute([{**tokenizer("w3 w5 w9"), "labels": label}], **settings) for label in (0, 1)]
    assert labels[0].objective_values[0] != labels[1].objective_values[0]
    for given, expected in zip(labels, rows, strict=True):
        np.testing.assert_array_equal(given.scores, expected.scores)


def test_a_pipeline_finds_the_tokenizer_beside_the_model(tmp_path):
    tokenizer = word_tokenizer(f"w{number}" for number in range(3, VOCABULARY))
    dataset, clusters = texts(), ClusterMap.from_ids(np.arange(24) % 3)
    model = recorded_model(classifier("bert"), dataset, tmp_path / "run", num_states=3, num_train_epochs=3)
    kept = distil((model, tmp_path / "run" / "trajectory", dataset, None), clusters, num_iterations=3)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    attribute = pipeline("data-attribution", model=str(tmp_path / "model"), synset=kept, disable_tqdm=True)
    written = ["w3 w5", "w4 w9 w7"]
    scores = attribute(written, engine="adjoint").scores
    attribute.save_pretrained(tmp_path / "both")
    again = pipeline("data-attribution", model=str(tmp_path / "both"), synset=kept, disable_tqdm=True)
    np.testing.assert_array_equal(again(written, engine="adjoint").scores, scores)


def test_a_tokenizer_made_up_for_a_model_without_one_is_not_used(tmp_path):
    """transformers gives one that knows special tokens alone: every text would be the same unknown word."""
    dataset, clusters = texts(), ClusterMap.from_ids(np.arange(24) % 3)
    model = recorded_model(classifier("bert"), dataset, tmp_path / "run", num_states=3, num_train_epochs=3)
    kept = distil((model, tmp_path / "run" / "trajectory", dataset, None), clusters, num_iterations=3)
    model.save_pretrained(tmp_path / "model")
    attribute = pipeline("data-attribution", model=str(tmp_path / "model"), synset=kept, disable_tqdm=True)
    with pytest.raises(ValueError, match="give the pipeline the `tokenizer`"):
        attribute(["w3 w5"])
