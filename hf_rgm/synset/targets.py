"""Cluster gradients of the real training data: what a synset has to reproduce."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.nn.functional import cross_entropy

from hf_rgm.modeling import FunctionalModel
from hf_rgm.rows import CachedBatches
from hf_rgm.synset.curvature import GaussNewton
from hf_rgm.synset.inputs import ContinuousInputs


def row_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """
    Cross entropy of each row.

    Args:
        logits (`Tensor`): `(batch_size, num_labels)`.
        labels (`Tensor`): `(batch_size,)`, int64.

    Returns:
        `Tensor`: `(batch_size,)`, float32.

    Raises:
        NotImplementedError: If the logits are not one vector a row, or the labels are not class indices.
        ValueError: If a label is out of range.
    """
    check_classification(logits, labels)
    return cross_entropy(logits, labels, reduction="none")


def check_classification(logits: Tensor, labels: Tensor) -> None:
    """
    Checks that labels are class indices of the logits, one a row.

    Raises:
        NotImplementedError: If the logits are not one vector a row, or the labels are not class indices.
        ValueError: If a label is out of range.
    """
    if logits.dim() != 2 or labels.dim() != 1 or labels.is_floating_point():
        raise NotImplementedError(
            f"Logits of shape {tuple(logits.shape)} with {labels.dtype} labels of shape {tuple(labels.shape)} are not "
            "supported yet. Single-label classification is: logits (rows, classes), integer labels (rows,)."
        )
    check_labels(labels, logits.shape[-1])


def check_labels(labels: Tensor, num_labels: int) -> None:
    """Raises a `ValueError` that names the first label outside `[0, num_labels)`."""
    outside = labels[(labels < 0) | (labels >= num_labels)]
    if outside.numel():
        raise ValueError(
            f"Label {int(outside[0])} is out of range for a model with {num_labels} classes (labels 0 to "
            f"{num_labels - 1}). Set `num_labels` in the model's config to the number of classes, or fix the column."
        )


def cluster_gradients(
    model: FunctionalModel,
    states: Sequence[dict[str, Tensor]],
    batches: CachedBatches,
    clusters: Sequence[int],
    num_rows: int,
) -> Tensor:
    """
    Gradient of the training loss that each cluster contributes, at each recorded state.

    `G_k(theta) = (1 / n) * sum over rows i of cluster k of grad loss_i(theta)`; one backward pass per batch.

    Args:
        model (`FunctionalModel`): The model as a function of its parameters.
        states (`Sequence[dict[str, Tensor]]`): Trainable parameters at each state.
        batches (`CachedBatches`): One group of rows per cluster.
        clusters (`Sequence[int]`): The groups to go through.
        num_rows (`int`): n, the rows of the whole training set.

    Returns:
        `Tensor`: `(num_states, len(clusters), num_parameters)`, float32, on the model's device.
    """
    result = torch.zeros(len(states), len(clusters), model.num_parameters, device=model.device)
    for position, cluster in enumerate(clusters):
        for inputs, labels in batches.group(cluster):
            for index, state in enumerate(states):
                parameters = {name: value.detach().requires_grad_() for name, value in state.items()}
                loss = row_losses(model.logits(parameters, inputs), labels).sum() / num_rows
                gradients = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
                result[index, position] += model.space.flatten(dict(zip(parameters, gradients, strict=True)))
    return result


def row_gradients(
    model: FunctionalModel, parameters: dict[str, Tensor], inputs: dict[str, Tensor], labels: Tensor
) -> Tensor:
    """
    Gradient of each row's cross entropy.

    Args:
        model (`FunctionalModel`): The model as a function of its parameters.
        parameters (`dict[str, Tensor]`): Where.
        inputs (`dict[str, Tensor]`): The forward's keyword arguments, first dimension `batch_size`.
        labels (`Tensor`): `(batch_size,)`, int64.

    Returns:
        `Tensor`: `(batch_size, num_parameters)`, float32.
    """

    def loss(p: dict[str, Tensor], x: dict[str, Tensor], y: Tensor) -> Tensor:
        logits = model.logits(p, {name: value[None] for name, value in x.items()})
        return -(logits.log_softmax(-1)[0].gather(-1, y[None])[0])

    return model.space.flatten(vmap(grad(loss), in_dims=(None, 0, 0))(parameters, inputs, labels))


def curvature_products(
    model: FunctionalModel,
    inputs: ContinuousInputs,
    states: Sequence[Tensor],
    probes: Tensor,
    batches: CachedBatches,
    clusters: Sequence[int],
    num_rows: int,
) -> Tensor:
    """
    Product of the data's Gauss-Newton matrix, restricted to some clusters, with probe directions.

    Args:
        model (`FunctionalModel`): The model as a function of its parameters.
        inputs (`ContinuousInputs`): The continuous input space.
        states (`Sequence[Tensor]`): Parameters of each state, `(num_parameters,)`.
        probes (`Tensor`): `(num_states, num_probes, num_parameters)`.
        batches (`CachedBatches`): One group of rows per cluster.
        clusters (`Sequence[int]`): The groups whose rows count.
        num_rows (`int`): n, the rows of the whole training set.

    Returns:
        `Tensor`: `(num_states, num_probes, num_parameters)`, float32.
    """
    result = torch.zeros_like(probes)
    for cluster in clusters:
        for batch, _ in batches.group(cluster):
            samples = inputs.from_batch(batch)
            weights = torch.full((len(samples),), 1 / num_rows, device=samples.device)
            for index, state in enumerate(states):
                result[index] += GaussNewton(model, inputs, samples, weights, state).product(probes[index])
    return result
