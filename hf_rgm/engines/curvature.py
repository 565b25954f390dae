"""Curvature of the training loss at a recorded state, as rows `B` with `C = B' B`, each owned by a cluster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import grad

from hf_rgm.engines.gradient_form import GradientForm, WholeGradients
from hf_rgm.exceptions import DivergenceError
from hf_rgm.model.functional_model import FunctionalModel
from hf_rgm.model.padding import batches_by_length
from hf_rgm.model.vectorize import map_rows

# With more labels than this, random signs take the place of eigenvectors.
MAX_EXACT_OUTPUTS = 64

# Samples of a forward pass, and memory for their logits: large vocabularies take fewer samples.
SAMPLES_AT_ONCE, LOGITS_BYTES = 256, 2**27

# Gradients of one call, on the CPU (as much as its caches hold) and elsewhere.
CHUNK_BYTES = {True: 2**25, False: 2**28}


@dataclass(frozen=True, eq=False)
class WeightedInputs:
    """Samples or rows whose Gauss-Newton matrices add up to those of the clusters."""

    inputs: Mapping[str, Tensor]  # the forward's keyword arguments
    weights: Tensor  # (num_samples, *positions): weight of each output in the training loss
    clusters: Tensor  # (num_samples,), int64

    def __len__(self) -> int:
        return len(self.clusters)

    def __getitem__(self, chosen: slice | Tensor) -> WeightedInputs:
        inputs = {name: value[chosen] for name, value in self.inputs.items()}
        return WeightedInputs(inputs, self.weights[chosen], self.clusters[chosen])


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
    Rows of the square root of `C = sum over outputs o of w_o J_o' (diag p_o - p_o p_o') J_o`, at most `rank` of them.

    docs/method.md, which rows of curvature. The covariance of each output's softmax p is split into terms `c c'`; a
    row is `c' J`, one backward pass. With few labels the terms are eigenvectors. Otherwise one term stands for all of
    a sample: `c = sqrt(w) (sqrt(p) e - p (sqrt(p)' e))` with random signs e, whose second moment is the covariance.
    """
    generator = torch.Generator().manual_seed(seed)
    form = form or WholeGradients(model.space)
    named = form.named(parameters)
    traces, draws, num_labels, outputs = _traces(model, samples, named, rank)
    chosen, factors = choose_terms(traces.flatten().double().cpu().numpy(), rank, generator)
    owners = torch.from_numpy(chosen // draws).to(model.device)
    scales = torch.from_numpy(factors).to(model.device, torch.float32).sqrt()
    some = samples[owners]

    def row(inputs: dict[str, Tensor], term: Tensor) -> Tensor:
        def along(p: dict[str, Tensor]) -> Tensor:
            logits = model.logits(p, {name: value[None] for name, value in inputs.items()})[0]
            if outputs is not None:
                return (logits * term).sum()
            # With term = sqrt(w) e the gradient is c' J.
            probabilities = logits.detach().softmax(-1)
            signed = probabilities.sqrt() * term
            return (logits * (signed - probabilities * signed.sum(-1, keepdim=True))).sum()

        return form(grad(along)(named))

    result = torch.zeros(len(owners), form.length, device=model.device)
    positions = max(1, some.weights[:1].numel())
    fitting = LOGITS_BYTES // (4 * positions * num_labels)
    at_once = max(1, min(form.at_once(CHUNK_BYTES[model.device.type == "cpu"]), fitting))
    for part, inputs, weights in batches_by_length(model, some.inputs, some.weights, at_once, ignored=0):
        if outputs is not None:  # the eigenvectors of some outputs, one for each chosen term
            own = torch.from_numpy(chosen[part.cpu().numpy()] % draws).to(model.device)
            terms = scales[part, None] * outputs[owners[part], own]
        else:
            signs = torch.randint(2, (*weights.shape, num_labels), generator=generator, dtype=torch.int8) * 2 - 1
            own = (weights / draws).sqrt() * scales[part].reshape(-1, *[1] * (weights.dim() - 1))
            terms = signs.to(own) * own[..., None]
        result[part] = map_rows(row, inputs, terms)
    return CurvatureRows(result, samples.clusters[owners])


def _traces(
    model: FunctionalModel, samples: WeightedInputs, named: dict[str, Tensor], rank: int
) -> tuple[Tensor, int, int, Tensor | None]:
    """
    Traces of terms, `(num_samples, terms_per_sample)`, terms per sample, number of labels, and exact terms if any.

    Exact terms are eigenvectors times the roots of their eigenvalues, `(num_samples, terms_per_sample, num_labels)`.
    """
    draws, num_labels = max(1, rank // len(samples)), 0
    each = 4 * model.logits(named, samples[:1].inputs).numel()
    at_once = max(1, min(SAMPLES_AT_ONCE, LOGITS_BYTES // each))
    traces, vectors = torch.zeros(len(samples), device=model.device), None
    for part, inputs, weights in batches_by_length(model, samples.inputs, samples.weights, at_once, ignored=0):
        p = model.logits(named, inputs).softmax(-1)
        if not bool(torch.isfinite(p).all()):
            raise DivergenceError(
                "The model's outputs at a recorded state are NaN or infinite, so that its curvature is too. Check the "
                "recorded states, the training rows or the synset's samples."
            )
        num_labels = p.shape[-1]
        if p.dim() == 2 and num_labels <= MAX_EXACT_OUTPUTS:
            # Eigenvectors of diag p - p p' times sqrt(w * eigenvalue).
            values, basis = torch.linalg.eigh(torch.diag_embed(p) - p[:, :, None] * p[:, None])
            roots = (values.clamp_min(0) * weights[:, None]).sqrt()
            if vectors is None:
                vectors = p.new_zeros(len(samples), num_labels, num_labels)
            vectors[part] = (basis * roots[:, None]).transpose(1, 2)
        else:  # the trace of diag p - p p' is 1 - |p|^2
            traces[part] = (weights * (1 - p.square().sum(-1))).reshape(len(part), -1).sum(1)
    if vectors is not None:
        return vectors.square().sum(-1), num_labels, num_labels, vectors
    return traces[:, None].expand(-1, draws) / draws, draws, num_labels, None


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
