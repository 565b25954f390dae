"""Rows of the curvature: all of it where they suffice, else it in expectation."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_rgm.clusters.cluster_map import ClusterMap
from hf_rgm.engines import curvature as module
from hf_rgm.engines.curvature import choose_terms, curvature_rows
from hf_rgm.engines.gradient_sources import RowSource
from hf_rgm.exceptions import DivergenceError
from hf_rgm.model.functional_model import FunctionalModel
from hf_rgm.model.losses import RowLoss, binary_cross_entropies, squared_errors
from hf_rgm.model.processes import Processes
from hf_rgm.model.row_reader import RowReader
from tests.engines.parts import flat, row_run, sample_run
from tests.recorded import TinyNet, record
from tests.text import language_model, texts

NUM_TERMS = 36
"""Twelve rows with three labels each."""

SEEDS = 300
MAX_DEVIATION = 4.5
"""Standard errors by which a mean of so many seeds may be off."""


@pytest.fixture(scope="module")
def classifier():
    """Model, weighted rows and parameters."""
    run = row_run(record("sgd", model_class=TinyNet))
    return run.model, run.source.weighted_inputs, flat(run, 10)


@pytest.fixture(scope="module")
def language():
    """The last tokens of some rows have no label."""
    model = FunctionalModel(language_model("gpt2", initializer_range=0.5))
    reader = RowReader(texts(6, labels="text"), model)
    clusters = ClusterMap.from_ids([0, 0, 1, 1, 2, 2])
    row_loss = RowLoss(labels_per_row=reader.labels_per_row())
    source = RowSource(model, reader, clusters, row_loss, max_bytes=2**30, processes=Processes())
    return model, source.weighted_inputs, model.space.flatten(model.parameters())


def gauss_newton(parts, mask=None):
    """`sum_o w_o J_o' (diag p_o - p_o p_o') J_o`, dense, in float32 with float64 sums; of another loss its own."""
    model, samples, vector = parts
    if samples.loss is not None:
        return hessian_of_outputs(parts)
    weights = samples.weights.double().flatten()
    if mask is not None:
        weights = weights * mask[samples.clusters].double().repeat_interleave(weights.numel() // len(samples))

    def logits(v):
        return model.logits(model.space.unflatten(v), samples.inputs).flatten(0, -2)

    with model.differentiable():
        p = logits(vector).detach().double().softmax(-1)
        jacobian = torch.func.jacrev(logits)(vector).detach().double()
    half = torch.einsum("oc,ocp->ocp", p.sqrt(), jacobian - torch.einsum("oc,ocp->op", p, jacobian)[:, None])
    half = (weights.sqrt()[:, None, None] * half).flatten(0, 1)
    return half.T @ half


def hessian_of_outputs(parts):
    """`sum_r w_r J_r' H_r J_r` with the second derivative H of each row's loss in its outputs."""
    model, samples, vector = parts
    with model.differentiable():
        outputs = model.logits(model.space.unflatten(vector), samples.inputs).detach()
        jacobian = torch.func.jacrev(lambda v: model.logits(model.space.unflatten(v), samples.inputs))(vector)
    total = 0.0
    for row, weight in enumerate(samples.weights):
        loss = partial(lambda z, y: samples.loss(z[None], y[None]).sum(), y=samples.labels[row])
        own, middle = jacobian[row].detach().double(), torch.autograd.functional.hessian(loss, outputs[row]).double()
        total = total + weight * own.T @ middle @ own
    return total


def weighted(logits, labels):
    return torch.nn.functional.cross_entropy(logits, labels, weight=torch.tensor([1.0, 5.0, 0.2]), reduction="none")


@pytest.fixture(params=["squared", "binary", "weighted"])
def of_other_losses(request):
    """A model with three outputs, and rows that have a loss other than the cross entropy."""
    run = record("sgd", model_class=TinyNet)
    classes = request.param == "weighted"
    loss = {"squared": squared_errors, "binary": binary_cross_entropies, "weighted": weighted}[request.param]
    labels = run.labels if classes else torch.rand(12, 3, generator=torch.Generator().manual_seed(0))
    rows = [{"features": run.features[i].float(), "labels": labels[i]} for i in range(12)]
    model = FunctionalModel(run.model.float())
    clusters = ClusterMap.from_ids([i // 3 for i in range(12)])
    row_loss = RowLoss(function=loss, scale=2.0)
    source = RowSource(model, RowReader(rows, model), clusters, row_loss, max_bytes=2**30, processes=Processes())
    return model, source.weighted_inputs, model.space.flatten(run.trajectory.state(10).parameters)


def test_the_curvature_of_another_loss_is_its_second_derivative_in_the_outputs(of_other_losses):
    assert float(of_other_losses[1].weights.sum()) == pytest.approx(2)
    found = rows_of(of_other_losses, NUM_TERMS).rows.double()
    torch.testing.assert_close(found.T @ found, gauss_newton(of_other_losses), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("of_other_losses", ["squared", "binary"], indirect=True)
@pytest.mark.parametrize("rank", [5, 30])
def test_of_many_numbers_random_signs_are_it_in_expectation(of_other_losses, rank, monkeypatch):
    monkeypatch.setattr(module, "MAX_EXACT_OUTPUTS", 2)
    assert_unbiased(of_other_losses, rank, width=0.1)


@pytest.mark.parametrize("of_other_losses", ["weighted"], indirect=True)
def test_a_loss_of_many_classes_is_taken_to_be_curved_as_the_cross_entropy(of_other_losses, monkeypatch):
    monkeypatch.setattr(module, "MAX_EXACT_OUTPUTS", 2)
    model, samples, vector = of_other_losses
    assert_unbiased((model, replace(samples, loss=None, labels=None), vector), 12, width=0.1)
    plain = rows_of((model, replace(samples, loss=None, labels=None), vector), 12)
    assert torch.equal(rows_of(of_other_losses, 12).rows, plain.rows)


def rows_of(parts, rank, seed=0):
    model, samples, vector = parts
    with model.differentiable():
        return curvature_rows(model, samples, vector, rank=rank, seed=seed)


def test_the_oracle_is_the_definition(classifier):
    """The square root of the softmax covariance that it takes, against the covariance itself."""
    model, samples, vector = classifier
    p = model.logits(model.space.unflatten(vector), samples.inputs).double().softmax(-1)
    jacobian = torch.func.jacrev(lambda v: model.logits(model.space.unflatten(v), samples.inputs))(vector).double()
    middle = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    expected = torch.einsum("r,rcp,rcd,rdq->pq", samples.weights.double(), jacobian, middle, jacobian)
    torch.testing.assert_close(gauss_newton(classifier), expected.detach(), atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("at_once", [256, 5])
def test_with_a_row_for_every_term_it_is_the_gauss_newton_matrix(classifier, at_once, monkeypatch):
    monkeypatch.setattr(module, "SAMPLES_AT_ONCE", at_once)
    monkeypatch.setattr(module, "CHUNK_BYTES", {True: 4 * at_once * classifier[0].num_parameters, False: 1})
    found = rows_of(classifier, NUM_TERMS)
    whole = found.rows.double().T @ found.rows.double()
    torch.testing.assert_close(whole, gauss_newton(classifier), atol=1e-7, rtol=1e-4)
    for k in range(4):
        own = found.rows[found.clusters == k].double()
        expected = gauss_newton(classifier, torch.eye(4)[k])
        torch.testing.assert_close(own.T @ own, expected, atol=1e-7, rtol=1e-4)


def test_samples_of_a_synset_count_by_their_weights():
    run = sample_run(record("sgd", model_class=TinyNet))
    samples = run.samples.samples
    samples.log_weights = samples.log_weights + torch.arange(12).reshape(4, 3) / 4
    parts = run.model, run.source.weighted_inputs, flat(run, 10)
    found = rows_of(parts, NUM_TERMS).rows.double()
    torch.testing.assert_close(found.T @ found, gauss_newton(parts), atol=1e-6, rtol=1e-4)


def assert_unbiased(parts, rank, *, width, most=None):
    """Mean of `|B v|^2` over seeds against `v' C v`, for some directions; narrow enough to tell."""
    probes = torch.randn(12, parts[0].num_parameters, generator=torch.Generator().manual_seed(5)).double()
    expected = torch.einsum("vp,pq,vq->v", probes, gauss_newton(parts), probes)
    found = []
    for seed in range(SEEDS):
        made = rows_of(parts, rank, seed)
        assert len(made.rows) <= (most or rank)
        found.append((probes @ made.rows.double().T).square().sum(1))
    found = torch.stack(found)
    error = found.std(0) / SEEDS**0.5
    assert float((error / expected).max()) < width
    deviations = (found.mean(0) - expected) / error
    assert float(deviations.abs().max()) < MAX_DEVIATION, deviations


def test_fewer_rows_are_it_in_expectation(classifier):
    assert_unbiased(classifier, 6, width=0.1)
    assert not torch.equal(rows_of(classifier, 6).rows, rows_of(classifier, 6, seed=1).rows)
    assert torch.equal(rows_of(classifier, 6).rows, rows_of(classifier, 6).rows)


@pytest.mark.parametrize("rank", [5, 12, 30], ids=["fewer than samples", "one a sample", "two a sample"])
def test_of_many_labels_random_signs_are_it_in_expectation(classifier, rank, monkeypatch):
    monkeypatch.setattr(module, "MAX_EXACT_OUTPUTS", 2)
    assert_unbiased(classifier, rank, width=0.1)


@pytest.mark.parametrize("rank", [4, 6, 13], ids=["fewer than rows", "one a row", "two a row"])
def test_of_several_outputs_one_row_stands_for_all(language, rank):
    assert_unbiased(language, rank, width=0.15)


def test_outputs_without_a_label_count_for_nothing(language):
    model, samples, vector = language
    assert samples.weights.shape == samples.inputs["input_ids"].shape
    assert float(samples.weights.sum()) == pytest.approx(1)
    assert float((samples.weights == 0).sum()) > 6  # the last token of each row, and padding
    blind = module.WeightedInputs(samples.inputs, torch.ones_like(samples.weights) / 30, samples.clusters)
    with_all = gauss_newton((model, blind, vector))
    assert (gauss_newton(language) - with_all).norm() > 0.1 * with_all.norm()


def test_outputs_that_are_not_finite_are_told(classifier):
    model, samples, vector = classifier
    with pytest.raises(DivergenceError, match="outputs at a recorded state are NaN or infinite"):
        rows_of((model, samples, torch.full_like(vector, float("nan"))), 6)


class TestChoice:
    def chosen(self, traces, count, offset):
        with mock.patch.object(torch, "rand", return_value=torch.tensor(offset, dtype=torch.float64)):
            return choose_terms(np.asarray(traces, dtype=np.float64), count, torch.Generator())

    @settings(max_examples=60, deadline=None)
    @given(
        traces=st.lists(st.one_of(st.just(0.0), st.floats(1e-4, 100.0)), min_size=1, max_size=25),
        count=st.integers(1, 12),
    )
    def test_what_is_chosen_stands_for_the_sum(self, traces, count):
        """Over all offsets of the systematic sampling each term is there by as much as it is worth."""
        traces = np.array(traces)
        positive = np.flatnonzero(traces > 0)
        grid = 400
        seen = np.zeros(len(traces))
        for offset in (np.arange(grid) + 0.5) / grid:
            positions, factors = self.chosen(traces, count, offset)
            assert (np.diff(positions) > 0).all() and set(positions) <= set(positive)
            assert len(positions) == min(count, len(positive))
            assert (factors >= 1 - 1e-9).all()
            assert (factors * traces[positions]).sum() == pytest.approx(traces.sum())
            seen[positions] += factors / grid
        share = np.divide(traces.sum(), count * traces, out=np.zeros_like(traces), where=traces > 0)
        # A grid of offsets is off by at most one of its points at either edge.
        np.testing.assert_allclose(seen[positive], 1, atol=float(2.5 * max(1, share.max()) / grid))

    def test_the_largest_are_certain(self):
        positions, factors = self.chosen([1.0, 50.0, 1.0, 1.0, 1.0, 20.0], 4, 0.3)
        assert positions.tolist() == [0, 1, 3, 5]
        np.testing.assert_allclose(factors, [2.0, 1.0, 2.0, 1.0])

    def test_those_of_zero_are_never_chosen(self):
        assert self.chosen([0.0, 0.0], 3, 0.5)[0].tolist() == []
        positions, factors = self.chosen([0.0, 2.0, 0.0, 3.0], 3, 0.5)
        assert (positions.tolist(), factors.tolist()) == ([1, 3], [1.0, 1.0])

    def test_draws_are_the_generators(self):
        traces = np.ones(100)
        picks = [choose_terms(traces, 7, torch.Generator().manual_seed(seed))[0].tolist() for seed in (0, 0, 1)]
        assert picks[0] == picks[1] != picks[2]
