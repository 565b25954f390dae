"""The adjoint engine: how the objective depends on every gradient of the recorded run."""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from torch.func import grad, vmap

from hf_rgm.attribution.curvature import GaussNewton
from hf_rgm.attribution.path import RecordedPath, adjoint_step
from hf_rgm.exceptions import DivergenceError
from hf_rgm.modeling import FunctionalModel
from hf_rgm.rows import RowReader
from hf_rgm.synset.inputs import ContinuousInputs
from hf_rgm.synset.matching import SynsetGradients, SyntheticSamples
from hf_rgm.synset.targets import check_labels

logger = logging.getLogger(__name__)

MAX_GROWTH = 100.0
MAX_INTEGRATION_STEPS = 500


class AdjointEngine:
    """
    Reverse-mode differentiation along the recorded path with the synset's curvature (METHOD: adjoint).

    Args:
        model (`FunctionalModel`): The trained model.
        inputs (`ContinuousInputs`): The continuous input space.
        samples (`SyntheticSamples`): The synset's samples.
        trajectory (`Trajectory`): The recorded run.
        rewind (`float`, *optional*, defaults to `0.07`): Fraction of training down to which effects are followed.
        stride (`int`, *optional*): Training steps per integration step. Defaults to the smallest that needs at most
            500 integration steps.
        max_bytes (`int`, *optional*, defaults to `2**30`): Memory for sensitivities and curvature factors.
    """

    name = "adjoint"

    def __init__(
        self,
        model: FunctionalModel,
        inputs: ContinuousInputs,
        samples: SyntheticSamples,
        trajectory,
        *,
        rewind: float = 0.07,
        stride: int | None = None,
        max_bytes: int = 2**30,
    ) -> None:
        self.model = model
        self.inputs = inputs
        self.samples = samples
        if stride is None:
            stride = max(1, -(-round((1 - rewind) * trajectory.num_steps) // MAX_INTEGRATION_STEPS))
        self.path = RecordedPath(trajectory, model.space, model.device, rewind=rewind, stride=stride)
        self._max_bytes = max_bytes
        self._curvatures: dict[int, GaussNewton] = {}

    def directions(self, gradients: Tensor) -> dict[int, Tensor]:
        """
        Sensitivity of each objective to the training gradient, summed over the steps nearest to each recorded state.

        Args:
            gradients (`Tensor`): `(num_values, num_parameters)`, gradients of the objectives at the final parameters.

        Returns:
            `dict[int, Tensor]`: recorded step to `(num_values, num_parameters)`: adding `eps * g` to the training
            gradient there raises objective i by `eps * <direction_i, g>`.

        Raises:
            DivergenceError: If sensitivities grow without bound going back.
        """
        bound = MAX_GROWTH * gradients.norm(dim=1).clamp_min(torch.finfo(gradients.dtype).tiny)
        sensitivity, momentum = gradients.clone(), torch.zeros_like(gradients)
        result: dict[int, Tensor] = {}
        for step in reversed(self.path.steps()):
            raw, momentum = adjoint_step(step, sensitivity, momentum)
            u = step.gradient_scale * raw
            if step.nearest_state in result:
                result[step.nearest_state] += u
            else:
                result[step.nearest_state] = u.clone()
            sensitivity = (1 - step.decoupled_decay) * sensitivity + step.coupled_decay * raw
            sensitivity += self._curvature(step.nearest_state).product(u)
            norm = sensitivity.norm(dim=1)
            if not bool((norm <= bound).all()):
                worst = int((norm / bound).nan_to_num(nan=torch.inf).argmax())
                raise DivergenceError(
                    f"The adjoint diverged at training step {step.step}: the sensitivity of objective value {worst} "
                    f"grew to {float(norm[worst]):.3g}, {MAX_GROWTH:g} times its start or more. Use a smaller "
                    f"`stride` (now {self.path.stride}), a later `rewind` (now from step {self.path.start}), or "
                    "record more states."
                )
        return result

    def cluster_scores(self, gradients: Tensor) -> Tensor:
        """
        Effect of each cluster's presence, estimated from the synset alone.

        Args:
            gradients (`Tensor`): `(num_values, num_parameters)`.

        Returns:
            `Tensor`: `(num_values, num_clusters)`, float32.
        """
        synset_gradients = SynsetGradients(self.model, self.inputs)
        scores = []
        for chunk in self._by_query(gradients):
            parts = [
                direction @ synset_gradients(self._named(state), self.samples).T
                for state, direction in self.directions(chunk).items()
            ]
            scores.append(torch.stack(parts).sum(0))
        return torch.cat(scores)

    def row_scores(self, gradients: Tensor, reader: RowReader, *, batch_size: int = 256) -> Tensor:
        """
        Effect of each training row's presence, from the row's own gradient at the recorded states.

        Args:
            gradients (`Tensor`): `(num_values, num_parameters)`.
            reader (`RowReader`): The training rows.
            batch_size (`int`, *optional*, defaults to `256`): Rows at once.

        Returns:
            `Tensor`: `(num_values, num_rows)`, float32.
        """
        batch_size = max(1, min(batch_size, self._max_bytes // (4 * self.model.num_parameters)))
        num_rows = len(reader)
        result = torch.zeros(len(gradients), num_rows, device=gradients.device)
        start_query = 0
        for chunk in self._by_query(gradients):
            queries = slice(start_query, start_query + len(chunk))
            start_query += len(chunk)
            directions = self.directions(chunk)
            for start in range(0, num_rows, batch_size):
                rows = range(start, min(start + batch_size, num_rows))
                inputs, labels = reader.batch(rows)
                check_labels(labels, self.samples.targets.shape[-1])
                for state, direction in directions.items():
                    row_gradients = self._row_gradients(self._named(state), inputs, labels)
                    result[queries, start : rows.stop] += direction @ row_gradients.T / num_rows
        return result

    def _by_query(self, gradients: Tensor):
        """Splits objectives so that one direction per recorded state fits in memory."""
        per_value = 4 * self.model.num_parameters * (len(self.path.trajectory.state_steps) + 4)
        return gradients.split(max(1, self._max_bytes // per_value))

    def _named(self, state: int) -> dict[str, Tensor]:
        return self.model.space.unflatten(self.path.state(state))

    def _curvature(self, state: int) -> GaussNewton:
        if state not in self._curvatures:
            self._curvatures.clear()
            self._curvatures[state] = GaussNewton(
                self.model, self.inputs, self.samples, self.path.state(state), max_bytes=self._max_bytes
            )
        return self._curvatures[state]

    def _row_gradients(self, parameters: dict[str, Tensor], inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
        def loss(p: dict[str, Tensor], x: dict[str, Tensor], y: Tensor) -> Tensor:
            logits = self.model.logits(p, {name: value[None] for name, value in x.items()})
            return -(logits.log_softmax(-1)[0].gather(-1, y[None])[0])

        return self.model.space.flatten(vmap(grad(loss), in_dims=(None, 0, 0))(parameters, inputs, labels))
