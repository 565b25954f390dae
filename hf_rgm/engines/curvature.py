"""Curvature of the training loss at a recorded state, as rows `B` with `C = B' B`, each owned by a cluster."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import jacrev, vmap

from hf_rgm.engines.gradient_form import GradientForm, WholeGradients
from hf_rgm.exceptions import DivergenceError
from hf_rgm.model.functional_model import FunctionalModel
from hf_rgm.model.losses import LossFunction
from hf_rgm.model.padding import batches_by_length
from hf_rgm.model.vectorize import grad, map_rows

# With more labels than this, random signs take the place of eigenvectors.
MAX_EXACT_OUTPUTS = 64

# Largest off-diagonal second derivative, relative to the largest of all, that is rounding.
DIAGONAL = 1e-4

# Samples of a forward pass, and memory for their logits: large vocabularies take fewer samples.
SAMPLES_AT_ONCE, LOGITS_BYTES = 256, 2**27

# Gradients of one call, on the CPU (as much as its caches hold) and elsewhere.
CHUNK_BYTES = {True: 2**25, False: 2**28}


@dataclass(frozen=True, eq=False)
class WeightedInputs:
    """Samples or rows whose Gauss-Newton matrices add up to those of the clusters."""

    inputs: Mapping[str, Tensor]  # the forward's keyword arguments
    weights: Tensor  # (num_samples, *positions): weight of each output in the training loss; with a `loss` of rows
    clusters: Tensor  # (num_samples,), int64
    loss: LossFunction | None = None  # of rows; else the cross entropy, whose curvature no label changes
    labels: Tensor | None = None  # that it takes

    def __len__(self) -> int:
        return len(self.clusters)

    def __getitem__(self, chosen: slice | Tensor) -> WeightedInputs:
        inputs = {name: value[chosen] for name, value in self.inputs.items()}
        labels = None if self.labels is None else self.labels[chosen]
        return WeightedInputs(inputs, self.weights[chosen], self.clusters[chosen], self.loss, labels)

    def batches(self, model: FunctionalModel, at_once: int) -> Iterator[tuple[Tensor, dict[str, Tensor], Tensor, Any]]:
        """Batches of similar length: positions, inputs, weights and labels, if any."""
        if self.labels is None:
            for part, inputs, weights in batches_by_length(model, self.inputs, self.weights, at_once, ignored=0):
                yield part, inputs, weights, None
        else:  # no number is ignored, so that numbers of tokens are not cut off
            for part, inputs, labels in batches_by_length(model, self.inputs, self.labels, at_once, ignored=math.nan):
                yield part, inputs, self.weights[part], labels


@dataclass(frozen=True, eq=False)
class CurvatureRows:
    """Rows B of the curvature at one state: `B' B` is the Gauss-Newton matrix, or its expectation."""

    rows: Tensor  # (rank, length), float32
    clusters: Tensor  # (rank,), int64: the cluster of each row


@torch.no_grad()
def curvature_rows(
    model: FunctionalModel,
    samples: WeightedInputs,
    parameters: Tensor,
    *,
    rank: int,
    seed: int,
    form: GradientForm | None = None,
) -> CurvatureRows:
    """
    Rows of the square root of `C = sum over outputs o of w_o J_o' H_o J_o`, at most `rank` of them.

    docs/method.md, which rows of curvature. H is the second derivative of the loss in the logits; that of the cross
    entropy is the covariance of the softmax p, `diag p - p p'`. It is split into terms `c c'`; a row is `c' J`, one
    backward pass. With few labels the terms are eigenvectors, without those of negative curvature. Otherwise one term
    stands for all of a sample, with random signs e, whose second moment is H: `c = sqrt(w) (sqrt(p) e - p (sqrt(p)'
    e))`, and `c = sqrt(w h) e` where H is a diagonal h.
    """
    generator = torch.Generator().manual_seed(seed)
    form = form or WholeGradients(model.space)
    named = form.named(parameters)
    terms = _terms(model, samples, named, rank)
    draws = terms.traces.shape[1]
    chosen, factors = choose_terms(terms.traces.flatten().double().cpu().numpy(), rank, generator)
    owners = torch.from_numpy(chosen // draws).to(model.device)
    scales = torch.from_numpy(factors).to(model.device, torch.float32).sqrt()
    some = samples[owners]

    def row(inputs: dict[str, Tensor], term: Tensor) -> Tensor:
        def along(p: dict[str, Tensor]) -> Tensor:
            logits = model.logits(p, {name: value[None] for name, value in inputs.items()})[0]
            if not terms.are_of_softmax:
                return (logits.flatten() * term).sum()
            # With term = sqrt(w) e the gradient is c' J.
            probabilities = logits.detach().softmax(-1)
            signed = probabilities.sqrt() * term
            return (logits * (signed - probabilities * signed.sum(-1, keepdim=True))).sum()

        return form(grad(along)(named))

    def signs(shape: Sequence[int]) -> Tensor:
        drawn = torch.randint(2, (*shape,), generator=generator, dtype=torch.int8) * 2 - 1
        return drawn.to(model.device, torch.float32)

    result = torch.zeros(len(owners), form.length, device=model.device)
    positions = max(1, some.weights[:1].numel())
    fitting = LOGITS_BYTES // (4 * positions * terms.num_labels)
    at_once = max(1, min(form.at_once(CHUNK_BYTES[model.device.type == "cpu"]), fitting))
    for part, inputs, weights, _ in some.batches(model, at_once):
        if terms.exact is not None:  # of some outputs, one for each chosen term
            own = torch.from_numpy(chosen[part.cpu().numpy()] % draws).to(model.device)
            vectors = scales[part, None] * terms.exact[owners[part], own]
        elif terms.roots is not None:
            roots = terms.roots[owners[part]]
            vectors = signs(roots.shape) * (roots * scales[part, None] / draws**0.5)
        else:
            own = (weights / draws).sqrt() * scales[part].reshape(-1, *[1] * (weights.dim() - 1))
            vectors = signs((*weights.shape, terms.num_labels)) * own[..., None]
        result[part] = map_rows(row, inputs, vectors)
    return CurvatureRows(result, samples.clusters[owners])


@dataclass(frozen=True, eq=False)
class _Terms:
    """What the curvature of each sample is the sum of."""

    traces: Tensor  # (num_samples, terms_per_sample)
    num_labels: int
    exact: Tensor | None  # (num_samples, terms_per_sample, num_outputs): eigenvectors times roots of eigenvalues
    roots: Tensor | None  # (num_samples, num_outputs), of a diagonal curvature

    @property
    def are_of_softmax(self) -> bool:
        return self.exact is None and self.roots is None


def _terms(model: FunctionalModel, samples: WeightedInputs, named: dict[str, Tensor], rank: int) -> _Terms:
    """Terms of each sample's curvature in its outputs."""
    draws, num_labels = max(1, rank // len(samples)), 0
    first = model.logits(named, samples[:1].inputs)
    at_once = max(1, min(SAMPLES_AT_ONCE, LOGITS_BYTES // (4 * first.numel())))
    traces, exact, roots = torch.zeros(len(samples), device=model.device), None, None
    for part, inputs, weights, labels in samples.batches(model, at_once):
        logits = model.logits(named, inputs)
        p = logits.softmax(-1)
        if not bool(torch.isfinite(p).all()):
            raise DivergenceError(
                "The model's outputs at a recorded state are NaN or infinite, so that its curvature is too. Check the "
                "recorded states, the training rows or the synset's samples."
            )
        num_labels, num_outputs = p.shape[-1], p[0].numel()
        loss = None if samples.loss is None else _loss_of_outputs(samples.loss, first.shape[1:])
        diagonal = None
        if num_outputs <= MAX_EXACT_OUTPUTS and (p.dim() == 2 or loss is not None):
            if loss is None:
                matrices = torch.diag_embed(p) - p[:, :, None] * p[:, None]
            else:
                matrices = vmap(jacrev(torch.func.grad(loss)))(logits.flatten(1), labels)
            values, basis = torch.linalg.eigh(matrices)
            if exact is None:
                exact = p.new_zeros(len(samples), num_outputs, num_outputs)
            exact[part] = (basis * (values.clamp_min(0) * weights[:, None]).sqrt()[:, None]).transpose(1, 2)
            continue
        if loss is not None:
            diagonal = _diagonal(loss, logits.flatten(1), labels)
        if diagonal is not None:
            if roots is None:
                roots = p.new_zeros(len(samples), num_outputs)
            roots[part] = (diagonal.clamp_min(0) * weights[:, None]).sqrt()
        else:  # the trace of diag p - p p' is 1 - |p|^2
            traces[part] = (weights * (1 - p.square().sum(-1))).reshape(len(part), -1).sum(1)
    if exact is not None:
        return _Terms(exact.square().sum(-1), num_labels, exact, None)
    if roots is not None:
        traces = roots.square().sum(1)
    return _Terms(traces[:, None].expand(-1, draws) / draws, num_labels, None, roots)


def _loss_of_outputs(loss: LossFunction, shape: torch.Size) -> Callable[[Tensor, Tensor], Tensor]:
    """Loss of one row by its outputs, flat."""
    return lambda outputs, label: loss(outputs.reshape(1, *shape), label[None])[0]


def _diagonal(loss: Callable[[Tensor, Tensor], Tensor], outputs: Tensor, labels: Tensor) -> Tensor | None:
    """Second derivatives of the loss in outputs `(batch_size, num_outputs)`; `None` unless they are a diagonal."""

    def along(direction: Tensor) -> Tensor:
        def slope(z: Tensor, label: Tensor, v: Tensor) -> Tensor:
            return (torch.func.grad(loss)(z, label) * v).sum()

        return vmap(torch.func.grad(slope))(outputs, labels, direction)

    diagonal, alternating = along(torch.ones_like(outputs)), torch.ones_like(outputs)
    alternating[:, ::2] = -1
    other = along(alternating) * alternating
    return diagonal if bool((diagonal - other).abs().max() <= DIAGONAL * diagonal.abs().max()) else None


def choose_terms(
    traces: NDArray[np.float64], count: int, generator: torch.Generator
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """
    Positions, ascending, and factors of `count` terms whose expected sum is that of all, by traces `(num_terms,)`.

    The largest terms are certain, with factor 1; others are drawn in proportion to their trace (systematic sampling).
    """
    positive = np.flatnonzero(traces > 0)
    if len(positive) <= count:
        return positive, np.ones(len(positive))
    order = positive[np.argsort(-traces[positive], kind="stable")]
    rest = traces[order][::-1].cumsum()[::-1]  # remaining trace when those before are certain
    left = count - np.arange(count)
    uncertain = np.flatnonzero(traces[order[:count]] * left < rest[:count])
    num_certain = int(uncertain[0]) if len(uncertain) else count
    certain, drawn = order[:num_certain], np.sort(order[num_certain:])
    places = count - num_certain
    if not places:
        return np.sort(certain), np.ones(num_certain)
    edges = traces[drawn].cumsum()
    interval = edges[-1] / places
    offset = float(torch.rand((), generator=generator, dtype=torch.float64))
    picked = np.searchsorted(edges, (np.arange(places) + offset) * interval, side="right").clip(max=len(drawn) - 1)
    chosen = np.concatenate([certain, drawn[picked]])
    factors = np.concatenate([np.ones(num_certain), interval / traces[drawn[picked]]])
    by_position = np.argsort(chosen, kind="stable")
    return chosen[by_position], factors[by_position]
