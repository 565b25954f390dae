"""Regression, several labels a row, multiple choice and spans: recorded by a Trainer and attributed by the rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import BertForMultipleChoice, BertForQuestionAnswering, Trainer

from hf_rgm import Attributor, ClusterMap, FidelityReport, ReverseGradientMatchingDistiller, Trajectory
from hf_rgm.fidelity.retraining import retrain
from hf_rgm.testing import tiny_recorded_run, tiny_trainer
from hf_rgm.trajectory import path
from tests.recording.runs import KINDS
from tests.recording.test_trained_loss import bert
from tests.training import recorded_model

NUM_ROWS, NUM_STEPS, RATE = 12, 10, 0.1
CLUSTERS = ClusterMap.from_ids([i % 3 for i in range(NUM_ROWS)])
CLOSE = {"rtol": 1e-3, "atol": 1e-5}
"""Float32 over ten steps."""


@pytest.fixture
def every_state(monkeypatch):
    """All recorded states are used, so that the linear engine is exact at every step."""
    for name in ("MIN_STATES", "MAX_STATES"):
        monkeypatch.setattr(path, name, NUM_STEPS + 1)


class Linear(nn.Module):
    """A linear model, whose Gauss-Newton matrix is its Hessian."""

    def __init__(self, num_outputs: int, loss) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.loss = nn.Linear(4, num_outputs), loss

    def forward(self, features, labels=None):
        logits = self.layer(features)
        return {"logits": logits} | ({} if labels is None else {"loss": self.loss(logits, labels).mean()})


def squared(logits, labels):
    return (logits - labels).square()


def binary(logits, labels):
    return F.binary_cross_entropy_with_logits(logits, labels, reduction="none")


def recorded(folder, num_outputs, loss):
    """Rows, a linear model that was trained on all of them at every step, and its attributor."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(NUM_ROWS, 4, generator=generator)
    labels = torch.randn(NUM_ROWS, num_outputs, generator=generator)
    labels = labels if loss is squared else (labels > 0).float()
    rows = [{"features": features[i], "labels": labels[i]} for i in range(NUM_ROWS)]
    settings = {"max_steps": NUM_STEPS, "num_states": NUM_STEPS + 1, "per_device_train_batch_size": NUM_ROWS}
    settings |= {"optim": "sgd", "learning_rate": RATE, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    model = recorded_model(Linear(num_outputs, loss), rows, folder, **settings)
    return rows, model, attributor(model, folder, rows)


def attributor(model, folder, rows, clusters=CLUSTERS):
    return Attributor(model, trajectory=folder / "trajectory", rows=rows, clusters=clusters, disable_tqdm=True)


def retrained(rows, num_outputs, loss, weights):
    """Outputs of the model for its rows when these have weights, `(num_rows, num_outputs)`."""
    start = Linear(num_outputs, loss).layer
    x, y = (torch.stack([row[name] for row in rows]).double() for name in ("features", "labels"))
    weight, bias = start.weight.detach().double().requires_grad_(), start.bias.detach().double().requires_grad_()
    for _ in range(NUM_STEPS):
        mean = (weights * loss(x @ weight.T + bias, y).mean(1)).mean()
        slopes = torch.autograd.grad(mean, (weight, bias), create_graph=True)
        weight, bias = weight - RATE * slopes[0], bias - RATE * slopes[1]
    return x @ weight.T + bias


def test_leaving_a_cluster_out_of_a_linear_regression_is_exact(tmp_path, every_state):
    rows, _, attributor = recorded(tmp_path, 1, squared)
    result = attributor.attribute(rows[:5], objective="predicted_value", engine="linearized_replay", rewind=0.0)
    ids = torch.tensor(CLUSTERS.cluster_ids)
    ones = torch.ones(NUM_ROWS).double()
    whole = retrained(rows, 1, squared, ones)
    expected = [(whole - retrained(rows, 1, squared, ones * (ids != k)))[:5, 0] for k in range(3)]
    np.testing.assert_allclose(result.scores, torch.stack(expected, 1).detach().numpy(), **CLOSE)
    np.testing.assert_allclose(result.objective_values, whole[:5, 0].detach().numpy(), **CLOSE)


@pytest.mark.parametrize(
    ("num_outputs", "loss", "objective"),
    [(1, squared, "loss"), (3, squared, "predicted_value:2"), (3, binary, "probability:1"), (3, binary, "loss")],
)
def test_scores_of_rows_are_the_derivatives_of_training(tmp_path, every_state, num_outputs, loss, objective):
    rows, _, attributor = recorded(tmp_path, num_outputs, loss)
    result = attributor.attribute(rows[:4], objective=objective, engine="adjoint", rewind=0.0)
    labels = torch.stack([row["labels"] for row in rows[:4]]).double()

    def values(weights):
        outputs = retrained(rows, num_outputs, loss, weights)[:4]
        if objective == "loss":
            return loss(outputs, labels).mean(1)
        index = int(objective[-1])
        return outputs[:, index] if objective.startswith("predicted") else outputs[:, index].sigmoid()

    expected = torch.autograd.functional.jacobian(values, torch.ones(NUM_ROWS).double())
    np.testing.assert_allclose(result.row_scores, expected.numpy(), **CLOSE)
    assert np.abs(result.row_scores).max() > 100 * CLOSE["atol"]


def test_queries_without_labels_get_the_predictions(tmp_path):
    rows, model, attributor = recorded(tmp_path, 3, binary)
    bare = [{"features": row["features"]} for row in rows[:4]]
    outputs = model(torch.stack([row["features"] for row in bare]))["logits"].detach()
    expected = binary(outputs, (outputs > 0).float()).mean(1)
    np.testing.assert_allclose(attributor.attribute(bare, objective="loss").objective_values, expected, rtol=1e-5)


def test_objectives_of_classes_and_outputs_that_are_not_there_are_refused(tmp_path):
    rows, _, attributor = recorded(tmp_path / "regression", 3, squared)
    for objective, message in {
        "margin": "'margin' is for classes, and the labels are numbers",
        "predicted_value": "The model has 3 outputs. Say which",
        "probability:7": "The model has 3 outputs",
        "probability:0": "Regression has no probabilities",
        "probability": "Unknown objective 'probability'. Use one of .*probability:OUTPUT",
    }.items():
        with pytest.raises((NotImplementedError, ValueError), match=message):
            attributor.attribute(rows[:2], objective=objective)


def test_an_output_may_be_named(tmp_path):
    kind = KINDS["Losses"]["several labels a row"]
    rows = kind.data()
    model = bert(id2label={0: "rude", 1: "toxic", 2: "spam"}, label2id={"rude": 0, "toxic": 1, "spam": 2})
    model = recorded_model(model, rows, tmp_path, num_states=3, max_steps=4)
    asked = attributor(model, tmp_path, rows, ClusterMap.from_ids([i % 3 for i in range(len(rows))]))
    named, numbered = (asked.attribute(rows.select([0, 1]), objective=f"probability:{k}") for k in ("toxic", "1"))
    np.testing.assert_array_equal(named.row_scores, numbered.row_scores)
    other = asked.attribute(rows.select([0, 1]), objective="probability:spam")
    assert np.abs(other.row_scores - named.row_scores).max() > 0


@pytest.mark.parametrize(
    ("case", "model", "message"),
    [
        ("regression", lambda: bert(num_labels=1), "labels are numbers"),
        ("several labels a row", bert, "labels are numbers"),
        ("BERT, multiple choice", lambda: bert(BertForMultipleChoice), "multiple choice"),
        ("BERT, spans", lambda: bert(BertForQuestionAnswering, num_labels=2), "labels are positions in the text"),
    ],
)
def test_texts_are_attributed_by_their_rows_and_not_distilled(tmp_path, caplog, case, model, message):
    rows = next(kinds[case] for kinds in KINDS.values() if case in kinds).data()
    model = recorded_model(model(), rows, tmp_path, num_states=3, max_steps=4)
    assert "no synset can be distilled" in caplog.text and message in caplog.text
    clusters = ClusterMap.from_ids([i % 3 for i in range(len(rows))])
    with pytest.raises(NotImplementedError, match=f"{message}.*[Aa]ttribute from the trajectory and the rows"):
        ReverseGradientMatchingDistiller(model, tmp_path / "trajectory", rows, clusters)
    asked = attributor(model, tmp_path, rows, clusters)
    result = asked.attribute(rows.select(range(3)), objective="loss", engine="adjoint", rewind=0.0)
    assert np.abs(result.row_scores).max() > 0
    sums = np.stack([result.row_scores[:, clusters.rows(k)].sum(1) for k in range(3)], 1)
    np.testing.assert_allclose(result.scores, sums, rtol=1e-4, atol=1e-7)
    assert asked.attribute(rows.select(range(3)), objective="loss").scores.shape == (3, 3)


def trainer(rows, seed, *, loss=squared, num_outputs=3, **settings):
    known = {"max_steps": NUM_STEPS, "per_device_train_batch_size": NUM_ROWS, "optim": "sgd", "learning_rate": RATE}
    known |= {"lr_scheduler_type": "constant", "max_grad_norm": 0.0, "seed": seed, **settings}
    made = tiny_trainer(rows, **known)
    return Trainer(Linear(num_outputs, loss), made.args, train_dataset=rows, callbacks=[])


@pytest.mark.parametrize("loss", [squared, binary])
@pytest.mark.parametrize("logged", ["no", "steps"])
def test_checkpoints_have_the_loss_of_the_model(tmp_path, loss, logged):
    rows, _, recording = recorded(tmp_path, 3, loss)
    out = {"output_dir": str(tmp_path / "checkpoints"), "save_strategy": "steps", "save_steps": 1}
    own = trainer(rows, 0, loss=loss, logging_strategy=logged, logging_steps=1, **out)
    own.train()
    known = {"rows": rows, "clusters": CLUSTERS, "disable_tqdm": True}
    for row_loss in (None, lambda logits, labels: loss(logits, labels).mean(1)):
        by_default = Attributor(own.model, trajectory=tmp_path / "checkpoints", row_loss=row_loss, **known)
        assert by_default.attribute(rows[:2], objective="loss").scores.shape == (2, 3)
    told = Trajectory.from_checkpoints(tmp_path / "checkpoints", own.model, rows, max_grad_norm=0.0)
    found = Attributor(own.model, trajectory=told, **known).attribute(rows[:4], objective="loss", engine="adjoint")
    expected = recording.attribute(rows[:4], objective="loss", engine="adjoint")
    np.testing.assert_allclose(found.objective_values, expected.objective_values, rtol=1e-4)
    assert np.corrcoef(found.scores.flatten(), expected.scores.flatten())[0, 1] > 0.99


def test_another_loss_of_numbers_has_to_be_given_with_checkpoints(tmp_path):
    def absolute(logits, labels):
        return (logits - labels).abs()

    rows = recorded(tmp_path, 3, squared)[0]
    out = {"output_dir": str(tmp_path / "checkpoints"), "save_strategy": "steps", "save_steps": 5}
    own = trainer(rows, 0, loss=absolute, **out)
    own.train()
    with pytest.raises(NotImplementedError, match="Linear computes is none of .*Pass the loss of each row"):
        Trajectory.from_checkpoints(tmp_path / "checkpoints", own.model, rows)
    given = Trajectory.from_checkpoints(
        tmp_path / "checkpoints", own.model, rows, row_loss=lambda *asked: absolute(*asked).mean(1)
    )
    assert "the mean of `row_loss` as loss" in given.metadata["from_checkpoints"]


@pytest.mark.parametrize("objective", ["loss", "predicted_value:1"])
def test_retraining_computes_the_same_objective(tmp_path, objective):
    rows, model, _ = recorded(tmp_path, 3, squared)
    asked = attributor(model, tmp_path, rows, ClusterMap.from_ids([i % 6 for i in range(NUM_ROWS)]))
    settings = {"budget": 5, "seeds": [5], "objective": objective, "disable_tqdm": True}
    report = FidelityReport.measure(asked, rows[:4], trainer, rows, **settings)
    assert report.objective == objective and report.num_queries == 4
    values = retrain(
        trainer, rows, [range(NUM_ROWS)], rows[:4], objective=objective, row_loss=asked.subject.row_loss.function
    )
    np.testing.assert_allclose(
        values[0, 0], asked.attribute(rows[:4], objective=objective).objective_values, rtol=1e-4
    )


def test_retraining_knows_outputs_by_their_names():
    run = tiny_recorded_run()
    named = {"objective": "probability:LABEL_2", "disable_tqdm": True}
    by_name = retrain(tiny_trainer, run.train_dataset, [range(48)], run.queries, **named)
    by_number = retrain(tiny_trainer, run.train_dataset, [range(48)], run.queries, objective="probability:2")
    np.testing.assert_array_equal(by_name, by_number)
    asked = Attributor(run.model, trajectory=run.trajectory, rows=run.train_dataset, clusters=run.clusters)
    report = FidelityReport.measure(asked, run.queries, tiny_trainer, run.train_dataset, budget=5, **named)
    assert report.objective == "probability:2"


@pytest.mark.parametrize("objective", ["margin", "log_probability"])
def test_self_influence_refuses_objectives_of_classes(tmp_path, objective):
    _, _, asked = recorded(tmp_path, 3, squared)
    with pytest.raises(NotImplementedError, match=f"'{objective}' is for classes, and the labels are numbers"):
        asked.self_influence(objective=objective)
