"""Curvature of the training loss at a recorded state, as rows `B` with `C = B' B`, each owned by a cluster."""

from __future__ import annotations

import functools
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

MAX_EXACT_OUTPUTS = 64
"""Labels of a sample up to which the eigenvectors of its softmax covariance are taken; beyond, random signs are."""

SAMPLES_AT_ONCE, LOGITS_BYTES = 256, 2**27
"""Samples in one forward pass, and memory for their logits: large vocabularies take fewer."""

CHUNK_BYTES = {True: 2**25, False: 2**28}
"""Of gradients taken in one call, on the CPU and elsewhere: on the CPU, what stays in its caches is fastest."""


@dataclass(frozen=True, eq=False)
class WeightedInputs:
    """
    Samples, or rows, whose Gauss-Newton matrices add up to the clusters'.

    Args:
        inputs (`dict[str, Tensor]`): The forward's keyword arguments, first dimension `num_samples`.
        weights (`Tensor`): `(num_samples, *positions)`, float32, the weight of each output in the training loss.
        clusters (`Tensor`): `(num_samples,)`, int64, the cluster of each.
    """

    inputs: Mapping[str, Tensor]
    weights: Tensor
    clusters: Tensor

    def __len__(self) -> int:
        return len(self.clusters)

    def __getitem__(self, chosen: slice | Tensor) -> WeightedInputs:
        inputs = {name: value[chosen] for name, value in self.inputs.items()}
        return WeightedInputs(inputs, self.weights[chosen], self.clusters[chosen])


@dataclass(frozen=True, eq=False)
class CurvatureRows:
    """
    Args:
        rows (`Tensor`): B, `(rank, length)`, float32; `B' B` is the Gauss-Newton matrix, or its expectation.
        clusters (`Tensor`): `(rank,)`, int64, the cluster that each row is of.
    """

    rows: Tensor
    clusters: Tensor


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
    Rows of the square root of `C = sum over outputs o of w_o J_o' (diag p_o - p_o p_o') J_o`.

    The covariance of each output's softmax p is split into rank-one terms `c c'`; a term's row is `c' J`, one
    backward pass. Terms are its eigenvectors where there are few labels. Else, and where a sample has several outputs,
    one term stands for all of a sample: `c = sqrt(w) (sqrt(p) e - p (sqrt(p)' e))` with random signs e. Its second
    moment is the covariance, and its length hardly varies (that of a drawn label's gradient varies much where the
    model is sure). Of more terms than `rank`, the largest are taken and the others drawn in proportion to their trace
    (systematic sampling), scaled so that the expectation stays.

    Args:
        model (`FunctionalModel`): The model, within its `differentiable()`.
        samples (`WeightedInputs`): Of all clusters, those of a cluster next to each other.
        parameters (`Tensor`): `(num_parameters,)`, the recorded state.
        rank (`int`): The most rows.
        seed (`int`): Of signs and draws.
        form ([`GradientForm`], *optional*): That of the rows, whole by default.

    Raises:
        DivergenceError: If the model's outputs are not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    form = form or WholeGradients(model.space)
    named = form.named(parameters)
    traces, draws, num_labels, outputs = _traces(model, samples, named, rank)
    chosen, factors = choose_terms(traces.flatten().double().cpu().numpy(), rank, generator)
    owners = torch.from_numpy(chosen // draws).to(model.device)
    scales = torch.from_numpy(factors).to(model.device, torch.float32).sqrt()
    is_exact, some = outputs is not None, samples[owners]
    result = torch.zeros(len(owners), form.length, device=model.device)
    at_once = max(1, CHUNK_BYTES[model.device.type == "cpu"] // (4 * model.num_parameters)) if form.is_whole else 1
    positions = max(1, some.weights[:1].numel())
    at_once = max(1, min(at_once, LOGITS_BYTES // (4 * positions * num_labels)))
    for part, inputs, weights in batches_by_length(model, some.inputs, some.weights, at_once, ignored=0):
        if outputs is not None:  # the eigenvectors of some outputs, one for each chosen term
            own = torch.from_numpy(chosen[part.cpu().numpy()] % draws).to(model.device)
            terms = scales[part, None] * outputs[owners[part], own]
        else:
            signs = torch.randint(2, (*weights.shape, num_labels), generator=generator, dtype=torch.int8) * 2 - 1
            own = (weights / draws).sqrt() * scales[part].reshape(-1, *[1] * (weights.dim() - 1))
            terms = signs.to(own) * own[..., None]
        result[part] = map_rows(functools.partial(_row, model, named, form, is_exact), inputs, terms)
    return CurvatureRows(result, samples.clusters[owners])


def _traces(
    model: FunctionalModel, samples: WeightedInputs, named: dict[str, Tensor], rank: int
) -> tuple[Tensor, int, int, Tensor | None]:
    """
    The trace of every term, `(num_samples, terms_per_sample)`, how many a sample has, the number of labels and, where
    terms are eigenvectors, these times the root of their eigenvalue, `(num_samples, terms_per_sample, num_labels)`.
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
            values, basis = torch.linalg.eigh(torch.diag_embed(p) - p[:, :, None] * p[:, None])
            roots = (values.clamp_min(0) * weights[:, None]).sqrt()
            if vectors is None:
                vectors = p.new_zeros(len(samples), num_labels, num_labels)
            vectors[part] = (basis * roots[:, None]).transpose(1, 2)
        else:
            traces[part] = (weights * (1 - p.square().sum(-1))).reshape(len(part), -1).sum(1)
    if vectors is not None:
        return vectors.square().sum(-1), num_labels, num_labels, vectors
    return traces[:, None].expand(-1, draws) / draws, draws, num_labels, None


def _row(
    model: FunctionalModel,
    named: dict[str, Tensor],
    form: GradientForm,
    is_exact: bool,
    inputs: dict[str, Tensor],
    term: Tensor,
) -> Tensor:
    """The gradient of one sample's logits along a term, or along the term that scaled signs make."""

    def along(p: dict[str, Tensor]) -> Tensor:
        logits = model.logits(p, {name: value[None] for name, value in inputs.items()})[0]
        if is_exact:
            return (logits * term).sum()
        probabilities = logits.detach().softmax(-1)
        signed = probabilities.sqrt() * term
        return (logits * (signed - probabilities * signed.sum(-1, keepdim=True))).sum()

    return form(grad(along)(named))


def choose_terms(
    traces: NDArray[np.float64], count: int, generator: torch.Generator
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """
    Chooses terms of a sum so that the expectation of what is chosen, with its factors, is the sum.

    Args:
        traces (`np.ndarray`): `(num_terms,)`, how large each is.
        count (`int`): How many.
        generator (`torch.Generator`): Draws.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: positions, ascending, and the factor of each, 1 for those that are certain.
    """
    positive = np.flatnonzero(traces > 0)
    if len(positive) <= count:
        return positive, np.ones(len(positive))
    order = positive[np.argsort(-traces[positive], kind="stable")]
    rest = traces[order][::-1].cumsum()[::-1]  # what is left when those before are certain
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
