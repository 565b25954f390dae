from __future__ import annotations

import pytest
import torch

from hf_rgm import ClusterMap, DistillationConfig, ReverseGradientMatchingDistiller
from hf_rgm.modeling import FunctionalModel
from hf_rgm.rows import CachedBatches, RowReader
from hf_rgm.synset.curvature import GaussNewton
from hf_rgm.synset.inputs import ContinuousInputs
from hf_rgm.synset.matching import curvature_error
from hf_rgm.synset.probes import curvature_probes
from hf_rgm.synset.targets import curvature_products
from hf_rgm.testing import tiny_recorded_run

RUN = tiny_recorded_run()
MODEL = FunctionalModel(RUN.model)
INPUTS = ContinuousInputs(MODEL)
READER = RowReader(RUN.train_dataset, MODEL)
STEPS = tuple(step for step in RUN.trajectory.state_steps if step > 0)


def probes(seed=0, num_probes=5):
    return curvature_probes(MODEL, READER, RUN.trajectory, STEPS, num_probes=num_probes, seed=seed)


def test_probes_are_unit_vectors_that_depend_on_the_seed_alone():
    first = probes()
    assert first.shape == (len(STEPS), 5, MODEL.num_parameters)
    torch.testing.assert_close(first.norm(dim=-1), torch.ones(len(STEPS), 5))
    assert torch.equal(first, probes())
    assert not torch.equal(first, probes(seed=1))


def test_products_of_all_clusters_are_the_curvature_of_all_rows():
    directions = probes()
    states = [MODEL.space.flatten(RUN.trajectory.state(step).parameters) for step in STEPS]
    groups = [RUN.clusters.rows(k) for k in range(RUN.clusters.num_clusters)]
    batches = CachedBatches(READER, groups, batch_size=3)
    products = curvature_products(MODEL, states, directions, batches, range(RUN.clusters.num_clusters), len(READER))
    samples = READER.batch(range(len(READER)))[0]
    weights = torch.full((len(READER),), 1 / len(READER))
    for state, direction, product in zip(states, directions, products, strict=True):
        expected = GaussNewton(MODEL, samples, weights, state).product(direction)
        torch.testing.assert_close(product, expected, atol=1e-6, rtol=1e-4)


def test_curvature_error_is_the_mean_relative_squared_distance():
    real = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    assert curvature_error(real, real) == 0
    assert curvature_error(torch.zeros(2, 2), real) == 1
    assert curvature_error(real + torch.tensor([[5.0, 0.0], [0.0, 1.0]]), real) == pytest.approx((1 + 0.25) / 2)


def test_distilling_brings_the_curvature_nearer_to_that_of_the_data():
    """With and without matching it, on probes that neither has seen."""
    clusters = ClusterMap.from_column(RUN.train_dataset, "labels")
    unseen = probes(seed=9, num_probes=16)
    real = READER.batch(range(len(READER)))[0]
    real_weights = torch.full((len(READER),), 1 / len(READER))

    def error(curvature_weight):
        config = DistillationConfig(
            samples_per_cluster=3,
            tolerance=0.0,
            num_iterations=300,
            curvature_weight=curvature_weight,
            curvature_interval=1,
        )
        samples = (
            ReverseGradientMatchingDistiller(
                RUN.model, RUN.trajectory, RUN.train_dataset, clusters, config=config, disable_tqdm=True
            )
            .distill()
            .samples
        )
        errors = []
        for step, vectors in zip(STEPS, unseen, strict=True):
            state = MODEL.space.flatten(RUN.trajectory.state(step).parameters)
            flat = samples.flatten()
            weights = flat.log_weights.exp()
            synthetic = GaussNewton(MODEL, INPUTS.to_forward(flat), weights, state).product(vectors)
            expected = GaussNewton(MODEL, real, real_weights, state).product(vectors)
            errors.append(curvature_error(synthetic, expected))
        return float(torch.stack(errors).mean())

    assert error(20) < 0.6 * error(0)
