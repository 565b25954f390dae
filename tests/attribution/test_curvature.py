"""Curvature of rows where the synset has too little."""

from __future__ import annotations

import logging
import re

import pytest
import torch

from hf_rgm.attribution.adjoint import AdjointEngine
from hf_rgm.attribution.curvature import MAX_FACTOR, PathCurvature, sample_rows
from hf_rgm.attribution.linearized import LinearizedReplayEngine
from hf_rgm.clusters import ClusterMap
from hf_rgm.losses import RowLoss
from hf_rgm.modeling import FunctionalModel
from hf_rgm.rows import CachedBatches, RowReader
from hf_rgm.synset.samples import SyntheticSamples
from hf_rgm.synset.targets import cluster_gradients
from tests.attribution.test_linearized import FLOAT_TOLERANCE, MASKS, ROWS_PER_CLUSTER, dense_replay
from tests.recorded import TinyNet, engine_parts, record
from tests.text import language_model, texts

CLUSTERS = ClusterMap.from_ids([0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3])


def faded(samples: SyntheticSamples, factor: float) -> SyntheticSamples:
    """Samples with a share of their curvature."""
    shift = torch.tensor(factor).log()
    return SyntheticSamples(samples.inputs, samples.targets, samples.log_weights + shift)


@pytest.fixture(params=["sgd", "adamw"])
def parts(request, monkeypatch):
    """Adam's unwarmed second moments make the first deviations larger than the engine would let pass."""
    monkeypatch.setattr("hf_rgm.attribution.linearized.MAX_DEVIATION", float("inf"))
    run = record(request.param, model_class=TinyNet)
    model, inputs, samples = engine_parts(run, ROWS_PER_CLUSTER)
    items = [{"features": x.float(), "labels": int(y)} for x, y in zip(run.features, run.labels, strict=True)]
    reader = RowReader(items, model)
    return run, model, inputs, samples, reader


def engine(parts, samples, *, with_rows):
    run, model, inputs, _, reader = parts
    batches = CachedBatches(reader, [CLUSTERS.rows(k) for k in range(4)], batch_size=4)
    return LinearizedReplayEngine(
        model,
        inputs,
        samples,
        run.trajectory,
        rewind=0,
        disable_tqdm=True,
        cluster_gradients=lambda step, clusters: cluster_gradients(
            model, [model.space.flatten(run.trajectory.state(step).parameters)], batches, clusters, len(reader)
        )[0],
        rows=sample_rows(model, reader, CLUSTERS, RowLoss(), at_least=1) if with_rows else None,
    )


@pytest.mark.parametrize(("factor", "told"), [(0.05, "0.05 times.*too large"), (3.0, "3 times.*too small")])
def test_a_synset_of_another_curvature_replays_as_the_rows_do(parts, factor, told, caplog):
    run, _, _, samples, _ = parts
    expected = torch.stack([dense_replay(run, mask) for mask in MASKS]).float()
    weak = faded(samples, factor)
    with caplog.at_level(logging.WARNING):
        replayed = engine(parts, weak, with_rows=True).parameters(MASKS)
    torch.testing.assert_close(replayed, expected, atol=FLOAT_TOLERANCE, rtol=1e-4)
    (message,) = caplog.messages
    assert re.search(told, message)
    final = run.trajectory.final.parameters
    moved = (expected - torch.cat([value.flatten() for value in final.values()])).norm()
    without = engine(parts, weak, with_rows=False).parameters(MASKS)
    assert (without - expected).norm() > 0.1 * moved


def test_a_synset_with_about_the_rows_curvature_keeps_its_own(parts, caplog):
    _, _, _, samples, _ = parts
    good = faded(samples, 1.5 / MAX_FACTOR)
    replayed = engine(parts, good, with_rows=True).parameters(MASKS)
    assert torch.equal(replayed, engine(parts, good, with_rows=False).parameters(MASKS))
    assert caplog.text == ""


def test_the_adjoint_takes_the_rows_curvature_too(parts):
    run, model, inputs, samples, reader = parts
    objective = torch.randn(2, model.num_parameters, generator=torch.Generator().manual_seed(1))
    rows = sample_rows(model, reader, CLUSTERS, RowLoss(), at_least=1)
    engines = [
        AdjointEngine(model, inputs, own, run.trajectory, rewind=0, rows=given)
        for own, given in ((samples, None), (faded(samples, 0.01), rows), (faded(samples, 0.01), None))
    ]
    scores = [engine.row_scores(engine.directions(objective), reader, range(len(reader))) for engine in engines]
    torch.testing.assert_close(scores[1], scores[0], atol=FLOAT_TOLERANCE, rtol=1e-3)
    assert (scores[2] - scores[0]).norm() > 0.02 * scores[0].norm()


def test_rows_are_compared_once_at_a_state(parts, monkeypatch):
    run, model, inputs, samples, reader = parts
    rows = sample_rows(model, reader, CLUSTERS, RowLoss(), at_least=1)
    looked_at = []
    original = PathCurvature.at

    def at(self, path, state):
        before = len(rows.shares)
        result = original(self, path, state)
        looked_at.append(len(rows.shares) - before)
        return result

    monkeypatch.setattr(PathCurvature, "at", at)
    weak = faded(samples, 0.01)
    replays = [
        LinearizedReplayEngine(model, inputs, weak, run.trajectory, rewind=rewind, rows=rows, disable_tqdm=True)
        for rewind in (0, 0, 0.5)
    ]
    first, again, later = (replay.parameters(MASKS) for replay in replays)
    segments = [len(replay.path.segments()) for replay in replays]
    assert torch.equal(first, again)
    assert looked_at[: segments[0]] == [1] * segments[0]
    assert looked_at[segments[0] : 2 * segments[0]] == [0] * segments[0]
    assert sum(looked_at[2 * segments[0] :]) <= 1 < segments[2]  # the first one's second moments may be others
    alone = sample_rows(model, reader, CLUSTERS, RowLoss(), at_least=1)
    fresh = LinearizedReplayEngine(model, inputs, weak, run.trajectory, rewind=0.5, rows=alone, disable_tqdm=True)
    assert torch.equal(fresh.parameters(MASKS), later)


class TestRows:
    def test_few_stand_for_all_of_their_cluster(self, parts):
        _, model, _, _, reader = parts
        clusters = ClusterMap.from_ids([0] * 9 + [1] * 3)
        rows = sample_rows(model, reader, clusters, RowLoss(), at_least=3, max_bytes=0).inputs
        assert rows.clusters.tolist() == [0] * 3 + [1] * 3
        assert rows.weights.tolist() == pytest.approx([3 / 12] * 3 + [1 / 12] * 3)
        assert len(sample_rows(model, reader, clusters, RowLoss(), at_least=1).inputs.clusters) == 12

    def test_tokens_without_a_label_weigh_nothing(self):
        model = FunctionalModel(language_model("gpt2"))
        reader = RowReader(texts(6, labels="text"), model)
        clusters = ClusterMap.from_ids([0, 0, 0, 1, 1, 1])
        row_loss = RowLoss(labels_per_row=reader.labels_per_row())
        rows = sample_rows(model, reader, clusters, row_loss, at_least=3).inputs
        assert rows.weights.shape == rows.inputs["input_ids"].shape
        assert float(rows.weights.sum()) == pytest.approx(1)
        masks = torch.tensor([[1.0, 0.0]])
        assert float(rows.masked(masks).sum()) == pytest.approx(float(rows.weights[rows.clusters == 0].sum()))


def test_masks_scale_the_curvature_of_their_clusters(parts):
    run, model, inputs, samples, _ = parts
    replayed = engine(parts, samples, with_rows=False)
    curvature = PathCurvature(model, inputs, samples).at(replayed.path, run.trajectory.num_steps)
    vector = torch.randn(1, model.num_parameters, generator=torch.Generator().manual_seed(2))
    alone = [curvature.product(vector, torch.eye(4)[k : k + 1]) for k in range(4)]
    torch.testing.assert_close(sum(alone), curvature.product(vector), atol=1e-6, rtol=1e-5)
    mixed = curvature.product(vector, torch.tensor([[2.0, 0.0, 0.5, 1.0]]))
    torch.testing.assert_close(mixed, 2 * alone[0] + 0.5 * alone[2] + alone[3], atol=1e-6, rtol=1e-5)
