"""The peers' adapters on padded texts and LoRA: a small BERT, held against gradients taken without the peers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from benchmarks.peers.captum_tracin import tracin
from benchmarks.peers.common import Logits, as_tensors, ensemble, trained_bytes
from benchmarks.peers.kronfluence_ekfac import ekfac
from benchmarks.peers.trak import trak
from benchmarks.recorded import Recorded
from benchmarks.tasks import Task
from benchmarks.tasks.trainers import quiet_trainer
from hf_rgm import ClusterMap
from hf_rgm.engines.objectives import Queries, resolve_objective
from hf_rgm.model.functional_model import FunctionalModel
from hf_rgm.model.row_gradients import row_gradients
from hf_rgm.model.row_reader import RowReader
from hf_rgm.trajectory.trajectory import Trajectory
from tests import text
from tests.benchmarks.peers.test_peers import need

NUM_ROWS, NUM_QUERIES = 24, 5
FLOAT32 = 1e-4


def build_trainer(dataset, seed, callbacks=()):
    lora = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"], init_lora_weights=False)
    model = get_peft_model(text.classifier("bert", seed=seed), lora)
    return quiet_trainer(
        model, dataset, seed, callbacks, max_steps=6, learning_rate=1e-2, per_device_train_batch_size=8
    )


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    task = Task(
        name="texts",
        train=text.texts(NUM_ROWS),
        queries=text.texts(NUM_QUERIES, seed=1),
        tuning_queries=text.texts(3, seed=2),
        clusters=ClusterMap.from_ids(np.arange(NUM_ROWS) % 4),
        build_trainer=build_trainer,
        num_cluster_masks=3,
        num_row_masks=3,
        seeds=(1,),
    )
    return Recorded(task, tmp_path_factory.mktemp("run") / "trajectory", num_states=3)


def batch(recorded, dataset):
    model = FunctionalModel(recorded.model)
    return model, *RowReader(dataset, model).batch(range(len(dataset)))


def inner_products(recorded, parameters=None) -> np.ndarray:
    """Of the gradients of the queries' margins and minus those of the rows' losses, `(num_queries, num_rows)`."""
    model, inputs, labels = batch(recorded, recorded.task.train)
    parameters = parameters or model.parameters()
    rows = row_gradients(model, parameters, inputs, labels)
    queries = resolve_objective("margin").gradients(
        model, model.space.flatten(parameters), Queries(*batch(recorded, recorded.task.queries)[1:])
    )
    return (-queries @ rows.T).numpy()


def test_padding_and_frozen_parameters(recorded):
    model, inputs, _ = batch(recorded, recorded.task.queries)
    logits = Logits(recorded.model)
    tokens, labels = as_tensors(recorded.task.queries, recorded.model).tensors
    assert not tokens.is_floating_point() and (tokens == 0).any()
    torch.testing.assert_close(logits(tokens), model.logits(model.parameters(), inputs), rtol=0, atol=1e-6)
    named = dict(logits.named_parameters())
    assert set(named) == {f"model.{name}" for name in model.space.names}
    assert trained_bytes(recorded.model) == 4 * model.num_parameters
    covered = {f"{layer}.{kind}" for layer in logits.trained_layers() for kind in ("weight", "bias")}
    assert set(named) <= covered


def test_members_of_an_ensemble_keep_what_was_trained(recorded):
    (member,) = ensemble(recorded, 1)
    logits = Logits(recorded.model)
    logits.load_state_dict(logits.checkpoint(member.parameters))
    assert set(member.parameters) == set(FunctionalModel(recorded.model).space.names)


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
    expected = inner_products(recorded)
    scores = ekfac(1e6)(recorded, recorded.task.queries).row_scores * 1e6
    np.testing.assert_allclose(scores, expected, atol=1e-2 * np.abs(expected).max(), rtol=0)


def test_trak_with_much_regularization_is_the_inner_product(recorded):
    """Of gradients of margins, each row weighted by one minus its probability: minus the gradient of its loss."""
    need("trak")
    scores = trak(1, regularization=1e8, projection_dimension=4096)(recorded, recorded.task.queries).row_scores
    assert np.corrcoef(scores.ravel(), inner_products(recorded).ravel())[0, 1] > 0.98
