from __future__ import annotations

import pytest
import torch

from hf_rgm.modeling import FunctionalModel
from hf_rgm.rows import CachedBatches, RowReader
from hf_rgm.synset.curvature import GaussNewton
from hf_rgm.synset.inputs import ContinuousInputs
from hf_rgm.synset.matching import curvature_error
from hf_rgm.synset.probes import curvature_probes
from hf_rgm.synset.targets import curvature_products
from hf_rgm.testing import tiny_recorded_run, tiny_synset

RUN = tiny_recorded_run()
MODEL = FunctionalModel(RUN.model)
INPUTS = ContinuousInputs(MODEL)
READER = RowReader(RUN.train_dataset, MODEL)
STEPS = tuple(step for step in RUN.trajectory.state_steps if step > 0)


def probes(seed=0, num_probes=5):
    return curvature_probes(MODEL, INPUTS, READER, RUN.trajectory, STEPS, num_probes=num_probes, seed=seed)


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
    products = curvature_products(
        MODEL, INPUTS, states, directions, batches, range(RUN.clusters.num_clusters), len(READER)
    )
    samples = INPUTS.from_batch(READER.batch(range(len(READER)))[0])
    weights = torch.full((len(READER),), 1 / len(READER))
    for state, direction, product in zip(states, directions, products, strict=True):
        expected = GaussNewton(MODEL, INPUTS, samples, weights, state).product(direction)
        torch.testing.assert_close(product, expected, atol=1e-6, rtol=1e-4)


def test_curvature_error_is_the_mean_relative_squared_distance():
    real = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    assert curvature_error(real, real) == 0
    assert curvature_error(torch.zeros(2, 2), real) == 1
    assert curvature_error(real + torch.tensor([[5.0, 0.0], [0.0, 1.0]]), real) == pytest.approx((1 + 0.25) / 2)


def test_distilling_brings_the_curvature_near_that_of_the_data():
    """Against a synset distilled without it, on probes that neither has seen."""
    from hf_rgm import DistillationConfig, ReverseGradientMatchingDistiller

    config = DistillationConfig(num_iterations=200, curvature_weight=0)
    without = ReverseGradientMatchingDistiller(
        RUN.model, RUN.trajectory, RUN.train_dataset, RUN.clusters, config=config, disable_tqdm=True
    ).distill()
    unseen = probes(seed=9, num_probes=16)
    real = INPUTS.from_batch(READER.batch(range(len(READER)))[0])
    real_weights = torch.full((len(READER),), 1 / len(READER))

    def error(synset):
        errors = []
        for step, vectors in zip(STEPS, unseen, strict=True):
            state = MODEL.space.flatten(RUN.trajectory.state(step).parameters)
            samples, weights = synset.samples.inputs.flatten(0, 1), synset.samples.log_weights.flatten().exp()
            synthetic = GaussNewton(MODEL, INPUTS, samples, weights, state).product(vectors)
            errors.append(
                curvature_error(synthetic, GaussNewton(MODEL, INPUTS, real, real_weights, state).product(vectors))
            )
        return float(torch.stack(errors).mean())

    assert error(tiny_synset()) < 0.7 * error(without)
