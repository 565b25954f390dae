"""Cluster gradients of the real training data: what a synset has to reproduce."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.func import grad, jvp

from hf_rgm.model.cost_estimates import PieceOfWork, measured
from hf_rgm.model.functional_model import FunctionalModel, ToVector
from hf_rgm.model.losses import CROSS_ENTROPY, RowLoss, check_labels
from hf_rgm.model.padding import batches_by_length
from hf_rgm.model.row_reader import CachedBatches
from hf_rgm.model.vectorize import map_rows

logger = logging.getLogger(__name__)

MAX_FORWARD_DIRECTIONS = 4
ROWS_AT_ONCE = 64
"""Rows of one backward pass: on texts the fewer, the less of them is padding."""


def cluster_gradients(
    model: FunctionalModel,
    states: Sequence[Tensor],
    batches: CachedBatches,
    clusters: Sequence[int],
    num_rows: int,
    row_loss: RowLoss = CROSS_ENTROPY,
    *,
    form: ToVector | None = None,
) -> Tensor:
    """
    Gradient of the training loss that each cluster contributes, at each recorded state.

    `G_k(theta) = (1 / n) * sum over rows i of cluster k of grad loss_i(theta)`; one backward pass per batch.

    Args:
        model (`FunctionalModel`): The model as a function of its parameters.
        states (`Sequence[Tensor]`): Parameters at each state, `(num_parameters,)`; gone through once
            per cluster.
        batches (`CachedBatches`): One group of rows per cluster.
        clusters (`Sequence[int]`): The groups to go through.
        num_rows (`int`): n, the rows of the whole training set.
        row_loss (`RowLoss`, *optional*): The loss of a row. Defaults to the cross entropy.
        form (`Callable`, *optional*): Makes a vector of named gradients. Defaults to `model.space.flatten`.

    Returns:
        `Tensor`: `(num_states, len(clusters), length)`, float32, on the model's device.

    Raises:
        NotImplementedError, ValueError: If labels do not fit the logits, see [`~hf_rgm.model.losses.check_labels`].
    """
    result, make = None, form or model.space.flatten
    for position, cluster in enumerate(clusters):
        for collated, all_labels in batches.group(cluster):  # each batch is collated once for all states
            for _, inputs, labels in batches_by_length(model, collated, all_labels, ROWS_AT_ONCE):
                for index, state in enumerate(states):
                    kept = make(_batch_gradient(model, state, inputs, labels, num_rows, row_loss))
                    if result is None:  # in place from the start: stacking at the end would take the memory twice
                        result = kept.new_zeros(len(states), len(clusters), len(kept))
                    result[index, position] += kept
    if result is None:
        raise ValueError(f"{len(clusters)} clusters at {len(states)} states: there is no gradient to take.")
    return result


def _batch_gradient(
    model: FunctionalModel,
    state: Tensor,
    inputs: dict[str, Tensor],
    labels: Tensor,
    num_rows: int,
    row_loss: RowLoss,
) -> dict[str, Tensor]:
    named = model.space.unflatten(state)
    parameters = {name: value.detach().requires_grad_() for name, value in named.items()}
    logits = model.logits(parameters, inputs)
    check_labels(logits, labels)
    loss = row_loss(logits, labels).sum() / num_rows
    gradients = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
    return dict(zip(parameters, gradients, strict=True))


def measure_rows(
    model: FunctionalModel,
    state: Tensor,
    batches: CachedBatches,
    row_loss: RowLoss,
    form: ToVector | None = None,
) -> PieceOfWork:
    """
    What [`cluster_gradients`] takes at one state: seconds a row, and memory for a batch, seen on the largest cluster.
    """
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
    """
    Gradient of each row's loss.

    Args:
        model (`FunctionalModel`): The model as a function of its parameters.
        parameters (`dict[str, Tensor]`): Where.
        inputs (`dict[str, Tensor]`): The forward's keyword arguments, first dimension `batch_size`.
        labels (`Tensor`): `(batch_size, *positions)`, int64.
        row_loss (`RowLoss`, *optional*): The loss of a row. Defaults to the cross entropy.
        form (`Callable`, *optional*): Makes a vector of named gradients. Defaults to `model.space.flatten`.

    Returns:
        `Tensor`: `(batch_size, length)`, float32.
    """

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
    """
    Derivative of each row's loss along some directions.

    A few directions are followed in forward mode, one pass over the batch each and nothing per row in memory. Many are
    products with the gradients of the rows, as are few where an operator of the model has no forward-mode rule.

    Args:
        model (`FunctionalModel`): The model as a function of its parameters.
        parameters (`dict[str, Tensor]`): Where.
        directions (`Tensor`): `(num_directions, length)`.
        inputs (`dict[str, Tensor]`): The forward's keyword arguments, first dimension `batch_size`.
        labels (`Tensor`): `(batch_size, *positions)`, int64.
        row_loss (`RowLoss`, *optional*): The loss of a row. Defaults to the cross entropy.
        form (`Callable`, *optional*): Makes vectors of named gradients, to which directions belong. Defaults to
            `model.space.flatten`.

    Returns:
        `Tensor`: `(num_directions, batch_size)`, float32.
    """
    if form is None and len(directions) <= MAX_FORWARD_DIRECTIONS:
        try:
            return _forward_derivatives(model, parameters, directions, inputs, labels, row_loss)
        except NotImplementedError as error:
            logger.warning("Rows are scored by their gradients, not in forward mode: %s", str(error).split(". ")[0])
    return directions @ row_gradients(model, parameters, inputs, labels, row_loss, form).T


def _forward_derivatives(
    model: FunctionalModel,
    parameters: dict[str, Tensor],
    directions: Tensor,
    inputs: dict[str, Tensor],
    labels: Tensor,
    row_loss: RowLoss,
) -> Tensor:
    def losses(p: dict[str, Tensor]) -> Tensor:
        return row_loss(model.logits(p, inputs), labels)

    named = (model.space.unflatten(direction) for direction in directions)
    return torch.stack([jvp(losses, (parameters,), (direction,))[1] for direction in named])
