"""Gradients of rows and clusters of the training data."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.func import jvp

from hf_rgm.model.cost_estimates import PieceOfWork, measured
from hf_rgm.model.functional_model import FunctionalModel, ToVector
from hf_rgm.model.losses import CROSS_ENTROPY, RowLoss, check_labels
from hf_rgm.model.padding import batches_by_length
from hf_rgm.model.row_reader import CachedBatches
from hf_rgm.model.vectorize import OLD_FUNCTION, grad, map_rows
from hf_rgm.model.warn_once import warn_once

logger = logging.getLogger(__name__)

MAX_FORWARD_DIRECTIONS = 4
PROBED_ROWS, FORWARD_TOLERANCE = 4, 1e-2
"""Rows by which forward mode is tried, and the relative difference of derivatives that is rounding."""
ROWS_AT_ONCE = 64
"""Rows of one backward pass; fewer rows of text have less padding."""


def cluster_gradients(
    model: FunctionalModel,
    states: Sequence[Tensor],
    batches: CachedBatches,
    clusters: Sequence[int],
    num_rows: int,
    row_loss: RowLoss = CROSS_ENTROPY,
    *,
    form: ToVector | None = None,
    row_weights: Tensor | None = None,
) -> Tensor:
    """
    Gradient of each cluster's part of the training loss at each state: `(num_states, num_clusters, length)`.

    Rows count by `row_weights`, `(num_states, num_rows)`, if there are any.
    """
    # `G_k(theta) = (1 / num_rows) * sum over rows i of cluster k of grad loss_i(theta)`, one backward pass per batch.
    make = form or model.space.flatten

    def gradient(state: Tensor, inputs: dict[str, Tensor], labels: Tensor, weights: Tensor | float) -> Tensor:
        named = model.space.unflatten(state)
        parameters = {name: value.detach().requires_grad_() for name, value in named.items()}
        logits = model.logits(parameters, inputs)
        if row_loss.function is None:
            check_labels(logits, labels)
        loss = (row_loss(logits, labels) * weights).sum() / num_rows
        gradients = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
        return make(dict(zip(parameters, gradients, strict=True)))

    result = None
    for position, cluster in enumerate(clusters):
        rows = torch.tensor(batches.rows(cluster))
        for collated, all_labels in batches.group(cluster):  # each batch is collated once for all states
            own, rows = rows[: len(all_labels)], rows[len(all_labels) :]
            for part, inputs, labels in batches_by_length(model, collated, all_labels, ROWS_AT_ONCE):
                for index, state in enumerate(states):
                    weights = 1.0 if row_weights is None else row_weights[index, own[part.cpu()]]
                    kept = gradient(state, inputs, labels, weights)
                    if result is None:  # in place from the start: stacking at the end would double the memory
                        result = kept.new_zeros(len(states), len(clusters), len(kept))
                    result[index, position] += kept
    if result is None:
        raise ValueError(f"{len(clusters)} clusters at {len(states)} states: there is no gradient to take.")
    return result


def measure_rows(
    model: FunctionalModel, state: Tensor, batches: CachedBatches, row_loss: RowLoss, form: ToVector | None = None
) -> PieceOfWork:
    """Cost of `cluster_gradients` at one state: seconds per row, and memory for a batch of the largest cluster."""
    largest = max(range(len(batches)), key=batches.num_rows)
    piece = measured(lambda: cluster_gradients(model, [state], batches, [largest], 1, row_loss, form=form))
    return PieceOfWork(piece.seconds / batches.num_rows(largest), piece.peak_bytes)


def row_gradients(
    model: FunctionalModel,
    parameters: dict[str, Tensor],
    inputs: dict[str, Tensor],
    labels: Tensor,
    row_loss: RowLoss = CROSS_ENTROPY,
    form: ToVector | None = None,
) -> Tensor:
    """Gradient of each row's loss, `(batch_size, length)`, float32."""

    def loss(p: dict[str, Tensor], x: dict[str, Tensor], y: Tensor) -> Tensor:
        return row_loss(model.logits(p, {name: value[None] for name, value in x.items()}), y[None])[0]

    def gradient(x: dict[str, Tensor], y: Tensor) -> Tensor:
        return (form or model.space.flatten)(grad(loss)(parameters, x, y))

    return map_rows(gradient, inputs, labels)


def row_derivatives(
    model: FunctionalModel,
    parameters: dict[str, Tensor],
    directions: Tensor,
    inputs: dict[str, Tensor],
    labels: Tensor,
    row_loss: RowLoss = CROSS_ENTROPY,
    form: ToVector | None = None,
) -> Tensor:
    """Derivatives of each row's loss along `directions` `(num_directions, length)`: `(num_directions, batch_size)`."""
    # Forward mode takes one pass per direction and keeps nothing per row. It does not pay for many directions, and
    # some operators have no rule for it, or silently give zero.
    if form is None and len(directions) <= MAX_FORWARD_DIRECTIONS and model.has_forward_mode is not False:

        def losses(p: dict[str, Tensor]) -> Tensor:
            return row_loss(model.logits(p, inputs), labels)

        named = (model.space.unflatten(direction) for direction in directions)
        try:
            found = torch.stack([jvp(losses, (parameters,), (direction,))[1] for direction in named])
            if model.has_forward_mode is None:
                some = {name: value[:PROBED_ROWS] for name, value in inputs.items()}
                gradients = row_gradients(model, parameters, some, labels[:PROBED_ROWS], row_loss)
                _compare(model, found[:, :PROBED_ROWS], directions @ gradients.T)
            return found
        except (NotImplementedError, RuntimeError) as error:
            if not isinstance(error, NotImplementedError) and OLD_FUNCTION not in str(error):
                raise
            model.has_forward_mode = False
            told = "Rows are scored by their gradients, not in forward mode: %s"
            warn_once(logger, told, str(error).split(". ")[0])
    return directions @ row_gradients(model, parameters, inputs, labels, row_loss, form).T


def _compare(model: FunctionalModel, found: Tensor, expected: Tensor) -> None:
    """Notes whether forward mode gives the derivatives of reverse mode; a `NotImplementedError` if it does not."""
    if bool((found - expected).norm() > FORWARD_TOLERANCE * expected.norm()):
        raise NotImplementedError(f"an operator of {type(model.module).__name__} gives other derivatives in it")
    model.has_forward_mode = True if bool(expected.any()) else None
