"""The peers' adapters on a small GPT-2 with tied embeddings, held against gradients taken without the peers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

from benchmarks.peers.captum_tracin import tracin
from benchmarks.peers.common import Logits, as_tensors, ensemble, load_peer, negative_objective, summed_loss
from benchmarks.peers.dattri_dvemb import dvemb
from benchmarks.peers.dattri_influence import conjugate_gradients
from benchmarks.peers.kronfluence_ekfac import ekfac, fit_factors
from benchmarks.peers.trak import log_odds_output, trak
from benchmarks.recorded import Recorded
from benchmarks.tasks import Task
from benchmarks.tasks.trainers import quiet_trainer
from hf_rgm import ClusterMap
from hf_rgm.engines.objectives import Objective, Queries, resolve_objective
from hf_rgm.model.functional_model import FunctionalModel
from hf_rgm.model.row_gradients import row_gradients
from hf_rgm.model.row_reader import RowReader
from hf_rgm.trajectory.trajectory import Trajectory
from tests import text
from tests.benchmarks.peers.test_peers import need

NUM_ROWS, NUM_QUERIES = 24, 5
FLOAT32 = 1e-4


def language_model(seed=0, **changes):
    return text.language_model("gpt2", seed=seed, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **changes)


def build_trainer(dataset, seed, callbacks=()):
    return quiet_trainer(
        language_model(seed), dataset, seed, callbacks, max_steps=12, learning_rate=3e-2, per_device_train_batch_size=8
    )


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    task = Task(
        name="language models",
        train=text.texts(NUM_ROWS, labels="text"),
        queries=text.texts(NUM_QUERIES, labels="text", seed=1),
        tuning_queries=text.texts(3, labels="text", seed=2),
        clusters=ClusterMap.from_ids(np.arange(NUM_ROWS) % 4),
        build_trainer=build_trainer,
        num_cluster_masks=3,
        num_row_masks=3,
        seeds=(1,),
        objective="log_probability",
        num_distances=0,
    )
    return Recorded(task, tmp_path_factory.mktemp("run") / "trajectory", num_states=3)


def queries_of(model, dataset) -> Queries:
    return Queries(*RowReader(dataset, model).batch(range(len(dataset))))


def transposed_by_name(model: FunctionalModel, gradients: Tensor) -> dict[str, Tensor]:
    """Gradients as the peers' linear layers have them: `Conv1D` holds the weights of its layer transposed."""
    return {
        name: value.mT if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else value
        for name, value in model.space.unflatten(gradients).items()
    }


def inner_products(recorded, parameters) -> np.ndarray:
    """
    Of the queries' and minus the rows' gradients, those of linear layers alone, `(num_queries, num_rows)`.

    From the same model with a head of its own, whose gradient lacks what the head's weights do as embeddings.
    """
    untied = FunctionalModel(language_model(tie_word_embeddings=False))
    parameters = {**parameters, "lm_head.weight": parameters["transformer.wte.weight"]}
    layers = torch.cat(
        [
            torch.full((size,), any(part in name for part in (".attn.", ".mlp.", "lm_head")))
            for name, size in zip(untied.space.names, untied.space.sizes, strict=True)
        ]
    )
    rows = queries_of(untied, recorded.task.train)
    of_rows = row_gradients(untied, parameters, rows.inputs, rows.labels)
    of_queries = resolve_objective("log_probability").gradients(
        untied, untied.space.flatten(parameters), queries_of(untied, recorded.task.queries)
    )
    return (-of_queries[:, layers] @ of_rows[:, layers].T).numpy()


def final_parameters(recorded):
    return FunctionalModel(recorded.model).parameters()


def test_logits_and_shifted_labels(recorded):
    model = FunctionalModel(recorded.model)
    expected = queries_of(model, recorded.task.queries)
    tokens, labels = as_tensors(recorded.task.queries, recorded.model).tensors
    assert torch.equal(labels, expected.labels)
    known = labels != -100
    assert (~known[:, :-1]).any() and torch.equal(labels[known], tokens[:, 1:][known[:, :-1]])
    logits = Logits(recorded.model)(tokens)
    torch.testing.assert_close(
        logits[known], model.logits(model.parameters(), expected.inputs)[known], rtol=0, atol=1e-5
    )
    later = tokens.clone()
    later[:, 3] = 7
    torch.testing.assert_close(Logits(recorded.model)(later)[:, :3], logits[:, :3], rtol=0, atol=0)


def test_tied_and_transposed_parameters_have_the_original_gradients(recorded):
    model = FunctionalModel(recorded.model)
    logits = Logits(recorded.model)
    assert {f"model.{name}" for name in model.space.names} == set(dict(logits.named_parameters()))
    assert logits.model.lm_head.weight is logits.model.transformer.wte.weight
    assert "model.lm_head" in logits.trained_layers() and len(logits.trained_layers()) == 5
    batch = queries_of(model, recorded.task.train)
    expected = transposed_by_name(model, row_gradients(model, model.parameters(), batch.inputs, batch.labels).sum(0))
    tokens, labels = as_tensors(recorded.task.train, recorded.model).tensors
    summed_loss(logits(tokens), labels).backward()
    for name, gradient in expected.items():
        torch.testing.assert_close(logits.get_parameter(f"model.{name}").grad, gradient, rtol=1e-4, atol=1e-4)


def test_a_checkpoint_is_loaded_under_every_name(recorded):
    model = FunctionalModel(recorded.model)
    other = ensemble(recorded, 2)[1].parameters
    logits = Logits(recorded.model)
    logits.load_state_dict(Logits(recorded.model).checkpoint(other))
    batch = queries_of(model, recorded.task.queries)
    known = batch.labels != -100
    actual = logits(batch.inputs["input_ids"])[known]
    torch.testing.assert_close(actual, model.logits(other, batch.inputs)[known], rtol=0, atol=1e-5)
    assert (actual - model.logits(model.parameters(), batch.inputs)[known]).abs().max() > 0.1


def test_the_queries_loss_is_minus_the_objective(recorded):
    model = FunctionalModel(recorded.model)
    batch = queries_of(model, recorded.task.queries)
    logits = model.logits(model.parameters(), batch.inputs)
    means = [
        torch.stack([row[place].log_softmax(0)[label] for place, label in enumerate(labels) if label != -100]).mean()
        for row, labels in zip(logits, batch.labels, strict=True)
    ]
    torch.testing.assert_close(negative_objective("log_probability")(logits, batch.labels), -sum(means))


def test_tracin(recorded):
    need("captum")
    trajectory = Trajectory.load(recorded.folder)
    expected = sum(
        trajectory.steps.learning_rates[step - 1, 0]
        * inner_products(recorded, dict(trajectory.state(step).parameters))
        for step in trajectory.state_steps[1:]
    )
    scores = tracin()(recorded, recorded.task.queries).row_scores
    np.testing.assert_allclose(scores, expected, atol=FLOAT32 * np.abs(expected).max(), rtol=0)


def test_ekfac_with_much_damping_is_the_inner_product(recorded):
    need("kronfluence")
    expected = inner_products(recorded, final_parameters(recorded))
    scores = ekfac(1e6)(recorded, recorded.task.queries).row_scores * 1e6
    np.testing.assert_allclose(scores, expected, atol=1e-2 * np.abs(expected).max(), rtol=0)


def test_labels_are_drawn_where_rows_have_them(recorded):
    """The trace of the head's gradient covariance is a sum of |p - e_y|^2, whose mean over drawn y is 1 - |p|^2."""
    need("kronfluence")
    factors = fit_factors(recorded)
    matrices = factors.analyzer.load_covariance_matrices("ekfac")
    covariance = matrices["gradient_covariance"]["model.lm_head"]
    model = FunctionalModel(recorded.model)
    batch = queries_of(model, recorded.task.train)
    known = batch.labels != -100
    probabilities = model.logits(model.parameters(), batch.inputs).softmax(-1)[known]
    expected = (1 - probabilities.square().sum(-1)).sum().item()
    assert covariance.trace().item() == pytest.approx(expected, rel=0.05)
    of_given = probabilities - torch.nn.functional.one_hot(batch.labels[known], text.VOCABULARY)
    assert (covariance - of_given.T @ of_given).norm() > 0.2 * covariance.norm()
    assert matrices["num_activation_covariance_processed"]["model.lm_head"] == batch.inputs["attention_mask"].sum()


def test_ekfac_with_little_damping_is_finite(recorded):
    need("kronfluence")
    result = ekfac(None)(recorded, recorded.task.queries)
    assert result.row_scores.shape == (NUM_QUERIES, NUM_ROWS) and np.isfinite(result.row_scores).all()


def log_odds_gradients(model: FunctionalModel, dataset) -> Tensor:
    """Of each row's summed log-odds in all parameters, tied ones in both of their uses."""

    def summed_log_odds(forward, queries):
        probabilities = forward(queries.inputs).softmax(-1).gather(-1, queries.labels.clamp_min(0)[..., None])[..., 0]
        return torch.where(queries.labels == -100, 0.0, (probabilities / (1 - probabilities)).log()).sum(1)

    objective = Objective("summed log-odds", summed_log_odds, per_query=True)
    return objective.gradients(model, model.space.flatten(model.parameters()), queries_of(model, dataset))


def mean_errors(model: FunctionalModel, dataset) -> Tensor:
    """Each row's mean over its labels of one minus the label's probability, `(num_rows,)`."""
    batch = queries_of(model, dataset)
    probabilities = model.logits(model.parameters(), batch.inputs).softmax(-1)
    return torch.stack(
        [
            torch.stack([1 - row[place, label] for place, label in enumerate(labels) if label != -100]).mean()
            for row, labels in zip(probabilities, batch.labels, strict=True)
        ]
    )


def test_traks_output_function_and_weights(recorded):
    need("trak")
    output = log_odds_output(load_peer("trak.modelout_functions"))
    model, logits = FunctionalModel(recorded.model), Logits(recorded.model)
    at = logits, dict(logits.named_parameters()), dict(logits.named_buffers())
    tokens, labels = as_tensors(recorded.task.train, recorded.model).tensors
    gradients = vmap(grad(output.get_output, argnums=1), (None, None, None, 0, 0))(*at, tokens, labels)
    expected = transposed_by_name(model, log_odds_gradients(model, recorded.task.train))
    assert set(gradients) == {f"model.{name}" for name in expected}
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[f"model.{name}"], gradient, rtol=1e-4, atol=1e-4)
    weights = output.get_out_to_loss_grad(*at, (tokens, labels))
    torch.testing.assert_close(weights[:, 0], mean_errors(model, recorded.task.train), rtol=1e-5, atol=1e-6)


def test_trak_with_much_regularization_is_the_inner_product(recorded):
    need("trak")
    model = FunctionalModel(recorded.model)
    rows, queries = (log_odds_gradients(model, part) for part in (recorded.task.train, recorded.task.queries))
    expected = (queries @ rows.T * mean_errors(model, recorded.task.train)).numpy()
    scores = trak(1, regularization=1e8, projection_dimension=4096)(recorded, recorded.task.queries).row_scores
    assert np.corrcoef(scores.ravel(), expected.ravel())[0, 1] > 0.99


@pytest.mark.parametrize("method", [conjugate_gradients(0.1), dvemb()], ids=["conjugate gradients", "DVEmb"])
def test_dattri_refuses_language_models(recorded, method):
    need("dattri")
    with pytest.raises(NotImplementedError, match=r"dattri's .* not for language models"):
        method(recorded, recorded.task.queries)
