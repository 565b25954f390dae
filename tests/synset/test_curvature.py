from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_rgm.modeling import FunctionalModel
from hf_rgm.synset.costs import measured
from hf_rgm.synset.curvature import GaussNewton
from hf_rgm.synset.inputs import ContinuousInputs
from hf_rgm.synset.samples import SyntheticSamples, soft_cross_entropy
from tests.recorded import Linear, TinyNet
from tests.vision import vit

MEMORY = (0, 2**30)


def setup(model, *shape, seed=0):
    functional = FunctionalModel(model)
    functional.module.double()
    inputs = ContinuousInputs(functional)
    generator = torch.Generator().manual_seed(seed)
    samples = SyntheticSamples(
        torch.randn(3, 2, *shape, generator=generator).double(),
        torch.randn(3, 2, 3, generator=generator).double(),
        torch.randn(3, 2, generator=generator).double(),
    )
    return functional, inputs, samples, functional.space.flatten(functional.parameters())


def curvature(parts, **settings):
    model, inputs, samples, vector = parts
    flat = samples.flatten()
    return GaussNewton(model, inputs.to_forward(flat), flat.log_weights.exp(), vector, **settings)


def dense(parts, **settings):
    return curvature(parts, **settings).product(torch.eye(parts[0].num_parameters, dtype=torch.float64))


def loss(model, inputs, samples):
    def function(vector):
        logits = model.logits(model.space.unflatten(vector), inputs.to_forward(samples.flatten()))
        return soft_cross_entropy(logits, samples.targets.flatten(0, 1), samples.log_weights.flatten())

    return function


def test_for_a_linear_model_it_is_the_hessian():
    model, inputs, samples, vector = setup(Linear(), 5)
    hessian = torch.autograd.functional.hessian(loss(model, inputs, samples), vector)
    for max_bytes in MEMORY:
        torch.testing.assert_close(dense((model, inputs, samples, vector), max_bytes=max_bytes), hessian)


def test_where_targets_are_the_models_own_output_it_is_the_hessian():
    model, inputs, samples, vector = setup(TinyNet(), 5)
    logits = model.logits(model.space.unflatten(vector), inputs.to_forward(samples.flatten()))
    samples.targets = logits.detach().reshape(3, 2, 3)
    hessian = torch.autograd.functional.hessian(loss(model, inputs, samples), vector)
    torch.testing.assert_close(dense((model, inputs, samples, vector)), hessian)


@pytest.mark.parametrize("make", [lambda: setup(TinyNet(), 5), lambda: setup(vit(initializer_range=0.3), 1, 4, 4)])
@pytest.mark.parametrize("num_vectors", [2, 7])
@pytest.mark.parametrize("samples_at_once", [0, 1, 4])
def test_memory_changes_the_way_and_not_the_product(make, num_vectors, samples_at_once):
    """Few vectors go through the model, more than labels take the Jacobian anew, four of six samples at a time."""
    parts = make()
    generator = torch.Generator().manual_seed(1)
    vectors = torch.randn(num_vectors, parts[0].num_parameters, generator=generator).double()
    weights = torch.rand(num_vectors, 6, generator=generator).double()
    plenty, tight = curvature(parts), curvature(parts, max_bytes=samples_at_once * 4 * 3 * parts[0].num_parameters)
    assert plenty._kept is not None
    assert tight._kept is None
    with parts[0].differentiable():
        for settings_ in ({}, {"weights": weights}):
            # Eager attention takes its softmax in float32 whatever the model's dtype.
            expected = plenty.product(vectors, **settings_)
            torch.testing.assert_close(tight.product(vectors, **settings_), expected, atol=2e-6, rtol=1e-6)


def test_a_jacobian_that_is_taken_anew_goes_before_the_next_one():
    torch.manual_seed(0)
    model = FunctionalModel(Linear(num_features=60_000))
    count = 64
    max_bytes = count // 4 * 4 * 3 * model.num_parameters
    own = GaussNewton(
        model,
        {"features": torch.randn(count, 60_000)},
        torch.ones(count),
        model.space.flatten(model.parameters()),
        max_bytes=max_bytes,
    )
    vectors = torch.randn(4, model.num_parameters)
    with torch.no_grad():
        peak = measured(lambda: own.product(vectors)).peak_bytes
    assert max_bytes < peak < 1.7 * max_bytes


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), max_bytes=st.sampled_from(MEMORY))
def test_it_is_symmetric_and_positive_semidefinite(seed, max_bytes):
    parts = setup(TinyNet(), 5, seed=seed)
    matrix = dense(parts, max_bytes=max_bytes)
    torch.testing.assert_close(matrix, matrix.T, atol=1e-10, rtol=1e-8)
    values = torch.linalg.eigvalsh(matrix)
    assert values[0] > -1e-10 * values[-1]
    assert (values > 1e-10 * values[-1]).sum() <= 6 * (3 - 1)


@pytest.mark.parametrize("num_vectors", [2, 4])
@pytest.mark.parametrize("max_bytes", MEMORY)
def test_products_are_differentiable_in_samples_and_weights(max_bytes, num_vectors):
    model, inputs, samples, vector = setup(TinyNet(), 5)
    vectors = torch.randn(num_vectors, model.num_parameters, generator=torch.Generator().manual_seed(1)).double()

    def energy(features, log_weights):
        arguments = {inputs.name: features}
        product = GaussNewton(model, arguments, log_weights.exp(), vector, max_bytes=max_bytes).product(vectors)
        return product.square().sum()

    features = samples.inputs.flatten(0, 1).requires_grad_()
    log_weights = samples.log_weights.flatten().requires_grad_()
    assert torch.autograd.gradcheck(energy, (features, log_weights))
