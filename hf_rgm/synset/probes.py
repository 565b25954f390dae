"""Directions in which a synset's curvature is held to the data's."""

from __future__ import annotations

import logging

import numpy as np
import torch
from torch import Tensor

from hf_rgm.losses import CROSS_ENTROPY, IGNORED_LABEL, RowLoss, check_labels
from hf_rgm.modeling import FunctionalModel
from hf_rgm.rows import RowReader
from hf_rgm.synset.curvature import GaussNewton
from hf_rgm.synset.targets import row_gradients
from hf_rgm.trajectory.path import RecordedPath, adjoint_directions
from hf_rgm.trajectory.storage import Trajectory

logger = logging.getLogger(__name__)

MAX_ROWS = 256
MAX_INTEGRATION_STEPS = 100


def curvature_probes(
    model: FunctionalModel,
    reader: RowReader,
    trajectory: Trajectory,
    steps: tuple[int, ...],
    row_loss: RowLoss = CROSS_ENTROPY,
    *,
    num_probes: int,
    seed: int,
) -> Tensor:
    """
    Directions like those the adjoint engine multiplies with the curvature: unit vectors, per recorded state.

    The sensitivities of the losses of random training rows, followed back along the recorded path with the curvature
    of a random sample of real rows. Directions drawn without the path lie mostly in the few sharp directions of the
    loss, which the adjoint has damped away long before it reaches the early states.

    Args:
        model (`FunctionalModel`): The trained model.
        reader (`RowReader`): The training rows.
        trajectory (`Trajectory`): The recorded run.
        steps (`tuple[int, ...]`): Recorded steps to give directions for, ascending.
        row_loss (`RowLoss`, *optional*): The loss of a row. Defaults to the cross entropy.
        num_probes (`int`): Directions for each state.
        seed (`int`): Draws the rows.

    Returns:
        `Tensor`: `(len(steps), num_probes, num_parameters)`, float32.
    """
    order = np.random.default_rng(seed).permutation(len(reader))
    final = trajectory.num_steps
    rows, labels = reader.batch(order[:num_probes])
    parameters = model.space.unflatten(model.space.flatten(trajectory.final.parameters).to(model.device))
    check_labels(model.logits(parameters, rows), labels)
    gradients = _unit(row_gradients(model, parameters, rows, labels, row_loss))
    sample, labels = reader.batch(order[-MAX_ROWS:])
    weights = (labels != IGNORED_LABEL) / (len(labels) * row_loss.labels_per_row)
    span = final - steps[0]
    path = RecordedPath(
        trajectory,
        model.space,
        model.device,
        rewind=max(0, steps[0] - span // (2 * len(steps))) / final,
        stride=max(1, -(-span // MAX_INTEGRATION_STEPS)),
    )
    directions = adjoint_directions(
        path, gradients, lambda step: GaussNewton(model, sample, weights, path.state(step)).product
    )
    return torch.stack([_unit(directions.get(step, gradients)) for step in steps])


def _unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(vectors.dtype).tiny)
