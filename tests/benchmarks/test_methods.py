"""The paper's plain forms and the baselines, on the tiny task."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from benchmarks.methods.baselines import gradient_cosine, random_scores, real_rows, sum_by_cluster
from benchmarks.methods.ours import adjoint, replay, without_synset
from benchmarks.methods.paper import ascent, matched
from benchmarks.recorded import Recorded
from hf_rgm import Attributor, DistillationConfig
from hf_rgm.engines.objectives import log_odds_margin
from hf_rgm.synset.samples import soft_cross_entropies
from hf_rgm.trajectory.trajectory import Trajectory
from tests.benchmarks import tiny

FAST = {"num_iterations": 3}
FINITE_DIFFERENCE_TOLERANCE = 2e-2
REPLAY_TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    return Recorded(tiny.task(), tmp_path_factory.mktemp("recorded") / "trajectory", num_states=3)


def gradient(model, function, row):
    """Gradient of a function of logits and label for one row."""
    logits = model(row["pixel_values"][None]).logits
    pieces = torch.autograd.grad(function(logits, row["labels"][None]).sum(), list(model.parameters()))
    return torch.cat([piece.flatten() for piece in pieces])


@pytest.fixture(scope="module")
def query_gradients(recorded):
    return torch.stack([gradient(recorded.model, log_odds_margin, row) for row in recorded.task.queries])


def test_random_scores_are_the_same_every_time(recorded):
    first, second = (random_scores(recorded, recorded.task.queries) for _ in range(2))
    assert np.array_equal(first.row_scores, second.row_scores)
    assert np.allclose(first.cluster_scores, tiny.by_cluster(first.row_scores), atol=1e-5)


def test_sum_by_cluster(recorded):
    rows = np.random.default_rng(0).standard_normal((3, tiny.NUM_ROWS))
    assert np.allclose(sum_by_cluster(recorded, rows), tiny.by_cluster(rows))


def test_gradient_cosine_is_positive_where_a_step_on_the_row_raises_the_margin(recorded, query_gradients):
    scores = gradient_cosine(recorded, recorded.task.queries).row_scores
    cross_entropy = torch.nn.functional.cross_entropy
    steps = -torch.stack([gradient(recorded.model, cross_entropy, row) for row in recorded.task.train])
    expected = torch.nn.functional.cosine_similarity(query_gradients[:, None], steps[None], dim=-1)
    assert np.allclose(scores, expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("init", ["nearest", "random"])
def test_real_rows_are_rows_of_their_clusters(recorded, init):
    synset, _ = recorded.synset(DistillationConfig(samples_per_cluster=2, **real_rows(init)))
    pixels = torch.stack([row["pixel_values"] for row in recorded.task.train])
    labels = torch.stack([row["labels"] for row in recorded.task.train])
    for cluster in range(6):
        rows = recorded.task.clusters.rows(cluster)
        for sample, target in zip(synset.samples.inputs[cluster], synset.samples.targets[cluster], strict=True):
            distances = (pixels[rows] - sample).flatten(1).norm(dim=1)
            assert distances.min() < 1e-6
            assert target.softmax(-1)[labels[rows][distances.argmin()]] > 1 - 1e-5
        if init == "nearest":
            centre = pixels[rows].mean(0)
            nearest = (pixels[rows] - centre).flatten(1).norm(dim=1).argmin()
            assert torch.allclose(synset.samples.inputs[cluster, 0], pixels[rows][nearest], atol=1e-6)
    assert torch.allclose(synset.samples.log_weights.exp(), torch.tensor(1 / 12), atol=1e-6)


def test_ascent_raises_the_loss_of_what_is_absent(recorded, query_gradients):
    """A short step changes a margin by the step's length times the inner product of the gradients."""
    rate = 1e-2
    prediction = ascent(1, num_steps=1, learning_rate=rate, **FAST)(recorded, recorded.task.queries)
    synset, _ = recorded.synset(DistillationConfig(samples_per_cluster=1, **FAST))
    samples = synset.samples

    def loss(cluster):
        logits = recorded.model(samples.inputs[cluster]).logits
        soft = -(samples.targets[cluster].softmax(-1) * logits.log_softmax(-1)).sum(-1)
        return (samples.log_weights[cluster].exp() * soft).sum()

    parameters = list(recorded.model.parameters())
    directions = torch.stack(
        [torch.cat([g.flatten() for g in torch.autograd.grad(loss(cluster), parameters)]) for cluster in range(6)]
    )
    expected = -rate * (query_gradients @ directions.T).numpy()
    assert np.abs(prediction.cluster_scores - expected).max() < FINITE_DIFFERENCE_TOLERANCE * np.abs(expected).max()
    kept = recorded.task.cluster_masks().astype(np.float32)
    changes = prediction.cluster_subset_values - prediction.cluster_subset_values.mean(1, keepdims=True)
    sums = expected @ kept.T
    sums -= sums.mean(1, keepdims=True)
    assert np.abs(changes - sums).max() < FINITE_DIFFERENCE_TOLERANCE * np.abs(sums).max()


def test_matched_trains_from_scratch_on_the_synset(recorded):
    """The same by hand: torch's AdamW from the recorded initial parameters, on all samples but the first cluster's."""
    prediction = matched(1, **FAST)(recorded, recorded.task.queries)
    config = DistillationConfig(samples_per_cluster=1, **FAST)
    inputs, targets, log_weights = (tensor.flatten(0, 1) for tensor in recorded.synset(config)[0].samples.tensors())
    trajectory = Trajectory.load(recorded.folder)

    def margins(present: slice) -> torch.Tensor:
        model = copy.deepcopy(recorded.model)
        model.load_state_dict(trajectory.state(0).parameters)
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
        for rates, clip_factor in zip(trajectory.steps.learning_rates, trajectory.steps.clip_factor, strict=True):
            optimizer.param_groups[0]["lr"] = rates[0]
            loss = soft_cross_entropies(model(inputs[present]).logits, targets[present], log_weights[present]).sum()
            optimizer.zero_grad()
            (float(clip_factor) * loss).backward()
            optimizer.step()
        labels = torch.stack([row["labels"] for row in recorded.task.queries])
        return log_odds_margin(model(recorded.task.queries["pixel_values"][:]).logits, labels).detach()

    expected = margins(slice(None)) - margins(slice(1, None))
    assert np.allclose(prediction.cluster_scores[:, 0], expected, atol=REPLAY_TOLERANCE)
    assert expected.abs().max() > 20 * REPLAY_TOLERANCE


@pytest.mark.parametrize(
    "method", [replay(engine="replay", distillation=FAST), ascent(1, num_steps=2, learning_rate=0.1, **FAST)]
)
def test_outputs_belong_to_the_masks(recorded, method):
    """Margins of the outputs under the half-masks are the subset values of the same masks."""
    prediction = method(recorded, recorded.task.queries)
    labels = torch.stack([row["labels"] for row in recorded.task.queries])
    for index, logits in enumerate(prediction.outputs["halves"]):
        margins = log_odds_margin(torch.from_numpy(logits), labels).numpy()
        assert np.allclose(margins, prediction.cluster_subset_values[:, index], atol=1e-5)
    trained = log_odds_margin(recorded.model(recorded.task.queries["pixel_values"][:]).logits, labels).detach().numpy()
    without_first = log_odds_margin(torch.from_numpy(prediction.outputs["leave_out"][0]), labels).numpy()
    assert np.allclose(trained - without_first, prediction.cluster_scores[:, 0], atol=1e-5)


def test_costs(recorded):
    prediction = adjoint(**FAST)(recorded, recorded.task.queries)
    again = replay(distillation=FAST)(recorded, recorded.task.queries)
    assert prediction.offline_seconds == again.offline_seconds
    assert prediction.details["kept_bytes"] == again.details["kept_bytes"] > 1000
    assert prediction.model_seconds is None
    assert again.model_seconds is not None
    assert list(prediction.stages) == ["distil", "attribute"]
    assert list(again.stages) == ["distil", "cluster scores", "halves"]
    assert again.stages["distil"] == again.offline_seconds
    assert again.stages["cluster scores"] == again.online_seconds


@pytest.mark.parametrize("num_runs", [1, 2])
def test_without_a_synset_nothing_is_distilled(recorded, num_runs, monkeypatch):
    monkeypatch.setattr(Recorded, "synset", lambda *_, **__: pytest.fail("a synset was distilled"))
    prediction = without_synset(num_runs=num_runs)(recorded, recorded.task.queries)
    assert prediction.cluster_scores.shape == (8, 6) and prediction.row_scores.shape == (8, 24)
    assert prediction.details["kept_bytes"] == 0
    assert (prediction.offline_seconds == 0) == (num_runs == 1)
    assert list(prediction.stages) == ["attribute", "halves"]
    assert {part: values.shape for part, values in prediction.outputs.items()} == {
        part: (len(masks), 8, 3) for part, masks in recorded.task.distance_masks().items()
    }


def test_halves_are_weighted_up_to_the_number_of_rows(recorded):
    task = recorded.task
    attributor = Attributor(
        recorded.model, trajectory=recorded.folder, rows=task.train, clusters=task.clusters, disable_tqdm=True
    )
    for engine in ("linearized_replay", "training_on"):
        prediction = without_synset(engine=engine)(recorded, task.queries)
        expected = attributor.replayed_values(task.queries, torch.tensor(2.0 * task.cluster_masks()), engine=engine)
        assert np.allclose(prediction.cluster_subset_values, expected.T, atol=1e-5)
        assert np.array_equal(
            prediction.cluster_scores, attributor.attribute(task.queries, engine="linearized_replay").scores
        )


def test_leaving_row_scores_out_changes_nothing_else(recorded):
    settings = {"engine": "replay", "with_rows": True, "distillation": FAST}
    whole, clusters = (
        replay(**settings, score_rows=score_rows)(recorded, recorded.task.queries) for score_rows in (True, False)
    )
    assert whole.row_scores is not None
    assert clusters.row_scores is None
    assert np.allclose(clusters.cluster_scores, whole.cluster_scores, atol=1e-5)
    assert np.allclose(clusters.cluster_subset_values, whole.cluster_subset_values, atol=1e-5)
