"""Rows as they were seen: what training never saw has no effect, and order counts where it is no accident."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hf_rgm import (
    Attributor,
    ClusterMap,
    DistillationConfig,
    ReverseGradientMatchingDistiller,
    Trajectory,
    TrajectoryCallback,
)
from hf_rgm.testing import tiny_dataset, tiny_recorded_run, tiny_trainer
from hf_rgm.trajectory.exposure import EXPOSURE, Exposure

NUM_ROWS, BATCH = 240, 8
CLUSTERS = ClusterMap.from_ids([i % 4 for i in range(NUM_ROWS)])


def seen(rows: np.ndarray, clusters: ClusterMap = CLUSTERS) -> Exposure:
    """Exposure along a run that saw these rows in this order."""
    steps = SimpleNamespace(rows=np.array_split(rows, len(rows) // BATCH), epoch=np.array([len(rows) / NUM_ROWS]))
    return Exposure(SimpleNamespace(steps=steps, metadata={}, folder=None), clusters)  # type: ignore[arg-type]


def shuffled(epochs: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return np.concatenate([generator.permutation(NUM_ROWS) for _ in range(epochs)])


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("epochs", [1, 3])
def test_shuffled_rows_are_all_seen_alike(epochs, seed):
    found = seen(shuffled(epochs, seed))
    assert not found.is_ordered and found.of_rows([10, 30]) is None and found.of_clusters([10, 30]) is None
    assert found.share([0, 1]) == pytest.approx(0.5)


def test_a_last_epoch_that_ends_early_is_no_difference():
    assert seen(shuffled(4)[: 3 * NUM_ROWS + 80]).of_rows([30]) is None


def test_rows_that_were_never_seen_weigh_nothing():
    order = shuffled(1)
    order = order[order < 160]
    found = seen(order)
    rows = found.of_rows([5, 20])
    assert rows is not None and not found.is_ordered
    np.testing.assert_allclose(rows[5], np.where(np.arange(NUM_ROWS) < 160, 1.5, 0), rtol=1e-6)
    np.testing.assert_array_equal(rows[5], rows[20])


def test_rows_that_are_drawn_more_often_weigh_more():
    order = np.concatenate(
        [shuffled(1), *[np.random.default_rng(i).permutation(np.arange(0, 240, 4)) for i in range(4)]]
    )
    found = seen(np.random.default_rng(9).permutation(order))
    clusters = found.of_clusters([5])
    assert clusters is not None
    np.testing.assert_allclose(clusters[5], np.array([5, 1, 1, 1]) / 2, rtol=1e-6)
    assert found.share([0]) == pytest.approx(5 / 8)


@pytest.mark.parametrize("name", ["as they lie", "backwards", "by cluster"])
def test_an_order_that_is_no_accident_is_told(name):
    orders = {
        "as they lie": np.arange(NUM_ROWS),
        "backwards": np.arange(NUM_ROWS)[::-1],
        "by cluster": np.argsort(CLUSTERS.cluster_ids, kind="stable"),
    }
    found = seen(orders[name])
    rows = found.of_rows([0, 10, 20, 30])
    assert found.is_ordered and found.max_states == 8 and rows is not None
    first = orders[name][:40]  # of the first five steps, that state 0 is nearest to
    np.testing.assert_allclose(rows[0][first], 6.0)
    assert rows[0].sum() == pytest.approx(NUM_ROWS) and (np.delete(rows[0], first) == 0).all()
    np.testing.assert_allclose(sum(rows.values()) > 0, True)


def test_epochs_in_the_same_order_differ_within_epochs_only():
    found = seen(np.tile(np.arange(NUM_ROWS), 2))
    rows = found.of_rows([15, 45])  # one state for each epoch of 30 steps
    assert found.is_ordered and rows is not None
    np.testing.assert_allclose(rows[15], 1)
    np.testing.assert_allclose(rows[45], 1)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Three steps that see the first half of the rows."""

    def run(**options):
        folder = tmp_path_factory.mktemp("seen") / "trajectory"
        trainer = tiny_trainer(
            tiny_dataset(48, seed=0), callbacks=[TrajectoryCallback(folder, num_states=8)], **options
        )
        trainer.train()
        return trainer.model.eval(), Trajectory.load(folder)

    return run


HALVES = ClusterMap.from_ids([i // 24 for i in range(48)], ["first", "second"])


def half_seen(recorded):
    model, trajectory = recorded(max_steps=3, per_device_train_batch_size=8, train_sampling_strategy="sequential")
    assert sorted(np.concatenate(trajectory.steps.rows)) == list(range(24))
    return model, trajectory


@pytest.mark.parametrize("engine", [None, "adjoint", "linearized_replay"])
def test_rows_that_training_never_saw_score_nothing(recorded, engine):
    model, trajectory = half_seen(recorded)
    rows = tiny_dataset(48, seed=0)
    asked = Attributor(model, trajectory=trajectory, rows=rows, clusters=HALVES, disable_tqdm=True)
    found = asked.attribute(tiny_dataset(6, seed=1), engine=engine, rewind=0.0)
    assert (found.scores[:, 1] == 0).all() and (found.row_scores[:, 24:] == 0).all()
    assert (found.scores[:, 0] != 0).all() and (np.abs(found.row_scores[:, :24]).sum(1) > 0).all()
    for engine in (None, "linearized_replay"):
        without = asked.model_without(["second"], engine=engine)
        for name, value in without.state_dict().items():
            torch.testing.assert_close(value, model.state_dict()[name], atol=1e-6, rtol=0)


def test_a_synset_tells_without_rows_what_was_not_seen(recorded, tmp_path):
    model, trajectory = half_seen(recorded)
    config = DistillationConfig(num_iterations=20, responses="none")
    synset = ReverseGradientMatchingDistiller(
        model, trajectory, tiny_dataset(48, seed=0), HALVES, config=config, disable_tqdm=True
    ).distill()
    synset.save_pretrained(tmp_path)
    shared = type(synset).from_pretrained(tmp_path)
    assert shared.trajectory.steps.rows is None
    queries = tiny_dataset(6, seed=1)
    for engine in ("linearized_replay", "adjoint", "replay"):
        scores = [
            Attributor(model, each, disable_tqdm=True).attribute(queries, engine=engine, rewind=0.0).scores
            for each in (synset, shared)
        ]
        np.testing.assert_allclose(*scores, rtol=1e-4, atol=1e-6)
        assert np.abs(scores[0][:, 1]).max() < 1e-6 < np.abs(scores[0][:, 0]).min()


@pytest.mark.parametrize(
    "content", [[], 3, {}, {"3": [1.0]}, {"x": [1.0, 1.0]}, {"3": [-1.0, 1.0]}, {"3": [1e400, 1]}]
)
def test_exposures_that_are_none_are_refused(content):
    trajectory = tiny_recorded_run().trajectory.without_rows()
    trajectory.metadata[EXPOSURE] = content
    with pytest.raises(ValueError, match="has no exposures of 2 clusters"):
        Exposure(trajectory, HALVES)


LENGTH, RATE = 24, 0.1


def margins_without(rows: range) -> np.ndarray:
    """Margins of the queries after the same steps, in which some rows add nothing to the loss."""
    model = tiny_trainer(tiny_dataset(48, seed=0)).model
    train, queries = tiny_dataset(48, seed=0).with_format("torch")[:], tiny_dataset(6, seed=1).with_format("torch")[:]
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for step in range(LENGTH):
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / LENGTH)
        batch = torch.arange(2 * step, 2 * step + 2)
        logits = model(train["pixel_values"][batch]).logits
        losses = torch.nn.functional.cross_entropy(logits, train["labels"][batch], reduction="none")
        present = torch.tensor([row not in rows for row in batch.tolist()])
        optimizer.zero_grad()
        (losses * present).mean().backward()
        optimizer.step()
    logits, labels = model(queries["pixel_values"]).logits.detach(), queries["labels"][:, None]
    others = logits.scatter(1, labels, -torch.inf).logsumexp(1)
    return (logits.gather(1, labels)[:, 0] - others).numpy()


def test_order_counts_as_in_training(recorded):
    model, trajectory = recorded(
        num_train_epochs=1,
        per_device_train_batch_size=2,
        train_sampling_strategy="sequential",
        learning_rate=RATE,
        max_grad_norm=0,
        optim="sgd",
    )
    parts = ClusterMap.from_ids([i // 6 for i in range(48)])
    asked = Attributor(model, trajectory=trajectory, rows=tiny_dataset(48, seed=0), clusters=parts, disable_tqdm=True)
    found = asked.attribute(tiny_dataset(6, seed=1))
    np.testing.assert_allclose(found.objective_values, margins_without(range(0)), rtol=1e-3, atol=1e-3)
    retrained = found.objective_values - np.stack([margins_without(range(6 * k, 6 * k + 6)) for k in range(8)])
    correlation = np.corrcoef(found.scores.T.ravel(), retrained.ravel())[0, 1]
    assert correlation > 0.8  # 0.71 if every part counts alike at every state
    effects = np.abs(found.scores).mean(0)
    assert effects[-1] < effects[:5].min() / 2
