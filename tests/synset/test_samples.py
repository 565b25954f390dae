from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from hf_rgm.model.functional_model import FunctionalModel
from hf_rgm.synset.inputs import ContinuousInputs
from hf_rgm.synset.samples import SynsetGradients, SyntheticSamples, smoothed_one_hot, soft_cross_entropies
from tests.recorded import TinyNet
from tests.vision import vit

EXACT = {"atol": 1e-10, "rtol": 1e-10}
"""Float64 by another order of operations."""


def parts(model, *shape, clusters=3, per_cluster=2, dtype=torch.float64):
    functional = FunctionalModel(model)
    functional.module.to(dtype)
    generator = torch.Generator().manual_seed(5)
    samples = SyntheticSamples(
        torch.randn(clusters, per_cluster, *shape, generator=generator).to(dtype),
        torch.randn(clusters, per_cluster, 3, generator=generator).to(dtype),
        torch.randn(clusters, per_cluster, generator=generator).to(dtype),
    )
    return functional, SynsetGradients(functional, ContinuousInputs(functional)), samples


def test_soft_cross_entropy_closed_form():
    logits, labels = torch.randn(4, 3).double(), torch.tensor([0, 2, 1, 1])
    weights = torch.tensor([0.5, 1.0, 2.0, 0.1]).double()
    hard = torch.nn.functional.one_hot(labels, 3).double().clamp_min(1e-30).log()
    expected = (weights * cross_entropy(logits, labels, reduction="none")).sum()
    torch.testing.assert_close(soft_cross_entropies(logits, hard, weights.log()).sum(), expected, **EXACT)
    entropy = torch.distributions.Categorical(logits=logits).entropy().sum()
    torch.testing.assert_close(
        soft_cross_entropies(logits, logits + 7, torch.zeros(4).double()).sum(), entropy, **EXACT
    )


def test_gradients_equal_a_plain_autograd_loop():
    model, gradients, samples = parts(TinyNet(), 5)
    plain = TinyNet().double()
    plain.load_state_dict(model.module.state_dict())
    expected = []
    for cluster in range(3):
        plain.zero_grad()
        for j in range(2):
            target = samples.targets[cluster, j].softmax(-1)
            loss = cross_entropy(plain(samples.inputs[cluster, j][None]), target[None])
            (samples.log_weights[cluster, j].exp() * loss).backward()
        expected.append(torch.cat([p.grad.flatten() for p in plain.parameters()]))
    torch.testing.assert_close(gradients(model.parameters(), samples), torch.stack(expected), **EXACT)


@pytest.mark.parametrize("make", [lambda: parts(TinyNet(), 5), lambda: parts(vit(initializer_range=0.3), 1, 4, 4)])
def test_together_equals_one_by_one_also_in_second_derivatives(make):
    """With fused layer normalisation the second derivatives of a ViT would be off by 6% (pytorch/functorch 534)."""
    model, gradients, samples = make()
    results = []
    with model.differentiable():
        for compute in (gradients._together, gradients._one_by_one):
            leaves = SyntheticSamples(*(t.clone().requires_grad_() for t in samples.tensors()))
            value = compute(model.parameters(), leaves)
            value.square().sum().backward()
            results.append([value.detach(), *(t.grad for t in leaves.tensors())])
        gradients(model.parameters(), samples)
    for together, apart in zip(*results, strict=True):
        torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)
    assert gradients._vectorized


def test_wrong_second_derivatives_are_noticed():
    """Outside `differentiable` nothing keeps `vmap` from the fused layer normalisation."""
    model, gradients, samples = parts(vit(initializer_range=0.3), 1, 4, 4)
    expected = gradients._one_by_one(model.parameters(), samples)
    assert torch.equal(gradients(model.parameters(), samples), expected)
    assert gradients._vectorized is False


def test_second_derivatives_pass_gradcheck():
    model, gradients, samples = parts(TinyNet(), 5, clusters=2)
    leaves = [t.requires_grad_() for t in samples.tensors()]
    assert torch.autograd.gradcheck(lambda *t: gradients(model.parameters(), SyntheticSamples(*t)), leaves)


def test_a_model_that_does_not_vectorise_goes_one_by_one(caplog):
    class Branching(TinyNet):
        def forward(self, features):
            return super().forward(features if float(features.sum()) > 0 else 2 * features)

    caplog.set_level("INFO", logger="hf_rgm")
    model, gradients, samples = parts(Branching(), 5)
    assert torch.equal(gradients(model.parameters(), samples), gradients._one_by_one(model.parameters(), samples))
    assert "does not vectorise over clusters" in caplog.text


def test_a_model_that_vectorises_wrongly_goes_one_by_one():
    class BatchDependent(TinyNet):
        """Looks at every picture of the batch, through a method that hides the batching from vmap."""

        calls = 0

        def forward(self, features):
            BatchDependent.calls += 1
            return super().forward(features * BatchDependent.calls)

    model, gradients, samples = parts(BatchDependent(), 5)
    gradients(model.parameters(), samples)
    assert gradients._vectorized is False


def test_smoothed_one_hot_is_the_smoothed_distribution():
    probabilities = smoothed_one_hot(torch.tensor([2]), 4, 0.2).exp()
    assert probabilities[0].tolist() == pytest.approx([0.05, 0.05, 0.85, 0.05])
