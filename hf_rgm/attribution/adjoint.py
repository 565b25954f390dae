"""The adjoint engine: how the objective depends on every gradient of the recorded run."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from hf_rgm.attribution.curvature import PathCurvature, RowSample
from hf_rgm.attribution.memory import MemoryShares
from hf_rgm.losses import CROSS_ENTROPY, RowLoss
from hf_rgm.modeling import FunctionalModel
from hf_rgm.rows import RowReader
from hf_rgm.synset.costs import PieceOfWork, measured
from hf_rgm.synset.inputs import InputSpace
from hf_rgm.synset.matching import SynsetGradients
from hf_rgm.synset.samples import SyntheticSamples
from hf_rgm.synset.targets import row_derivatives
from hf_rgm.trajectory.path import RecordedPath, adjoint_directions, adjoint_step, automatic_stride

logger = logging.getLogger(__name__)

MAX_ROWS_AT_ONCE = 256


class AdjointEngine:
    """
    Reverse-mode differentiation along the recorded path with the synset's curvature; see docs/method.md.

    Args:
        model (`FunctionalModel`): The trained model.
        inputs (`InputSpace`): The space of the synthetic inputs.
        samples (`SyntheticSamples`): The synset's samples.
        trajectory (`Trajectory`): The recorded run.
        rewind (`float`, *optional*, defaults to `0.07`): Fraction of training down to which effects are followed.
        stride (`int`, *optional*): Training steps per integration step. Defaults to the smallest that needs at most
            100 integration steps.
        rows (`RowSample`, *optional*): Rows whose curvature stands in for the synset's where the two differ
            much; see [`~hf_rgm.attribution.curvature.PathCurvature`].
        max_bytes (`int`, *optional*, defaults to `2**30`): Memory, beside the recorded states; see [`MemoryShares`].
    """

    name = "adjoint"

    def __init__(
        self,
        model: FunctionalModel,
        inputs: InputSpace,
        samples: SyntheticSamples,
        trajectory,
        *,
        rewind: float = 0.07,
        stride: int | None = None,
        rows: RowSample | None = None,
        max_bytes: int = 2**30,
    ) -> None:
        self.model = model
        self.inputs = inputs
        self.samples = samples
        if stride is None:
            stride = automatic_stride(trajectory, rewind)
        self.path = RecordedPath(trajectory, model.space, model.device, rewind=rewind, stride=stride)
        self._shares = MemoryShares.of(max_bytes, with_rows=rows is not None)
        self._synset_gradients = SynsetGradients(model, inputs)
        self._curvature = PathCurvature(
            model, inputs, samples, rows=rows, max_bytes=self._shares.jacobian, max_row_bytes=self._shares.row_jacobian
        )

    @property
    def start(self) -> int:
        """Training step down to which effects are followed."""
        return self.path.start

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
        return adjoint_directions(self.path, gradients, lambda state: self._curvature.at(self.path, state).product)

    def cluster_scores(self, gradients: Tensor) -> Tensor:
        """
        Effect of each cluster's presence, estimated from the synset alone.

        Args:
            gradients (`Tensor`): `(num_values, num_parameters)`.

        Returns:
            `Tensor`: `(num_values, num_clusters)`, float32.
        """
        scores = [self._cluster_scores(self.directions(chunk)) for chunk in gradients.split(self.queries_at_once)]
        return torch.cat(scores)

    def row_scores(
        self,
        directions: dict[int, Tensor],
        reader: RowReader,
        rows: range,
        row_loss: RowLoss = CROSS_ENTROPY,
    ) -> Tensor:
        """
        Effect of the presence of some training rows, from their own gradients at the recorded states.

        Args:
            directions (`dict[int, Tensor]`): What [`AdjointEngine.directions`] gave.
            reader (`RowReader`): All training rows.
            rows (`range`): Which of them.
            row_loss (`RowLoss`, *optional*): The loss of a row. Defaults to the cross entropy.

        Returns:
            `Tensor`: `(num_values, len(rows))`, float32.
        """
        num_values = len(next(iter(directions.values())))
        result = torch.zeros(num_values, len(rows), device=self.model.device)
        for start in range(0, len(rows), self.rows_at_once):
            batch = rows[start : start + self.rows_at_once]
            inputs, labels = reader.batch(batch)
            for state, direction in directions.items():
                change = row_derivatives(self.model, self._named(state), direction, inputs, labels, row_loss)
                result[:, start : start + len(batch)] += change / len(reader)
        return result

    def costs(
        self,
        num_values: int,
        reader: RowReader | None,
        row_loss: RowLoss = CROSS_ENTROPY,
        *,
        num_rows: int | None = None,
    ) -> PieceOfWork:
        """
        What scores of so many objectives take, from one state, one step and one batch of rows.

        Args:
            num_values (`int`): Objectives; those that fit in memory together go together.
            reader (`RowReader`, *optional*): The training rows, for [`AdjointEngine.row_scores`]. Without them,
                [`AdjointEngine.cluster_scores`] is meant.
            row_loss (`RowLoss`, *optional*): The loss of a row. Defaults to the cross entropy.
            num_rows (`int`, *optional*): Rows to score. Defaults to all.
        """
        path, at_once = self.path, min(num_values, self.queries_at_once)
        state, last, segments = path.trajectory.num_steps, path.steps()[-1], len(path.segments())
        vectors = torch.zeros(at_once, self.model.num_parameters, device=self.model.device)
        preparing = measured(lambda: self._curvature.at(path, state))
        curvature = self._curvature.at(path, state)
        stepping = measured(lambda: curvature.product(adjoint_step(last, vectors, vectors)[0]) + vectors)
        if reader is None:
            self._cluster_scores({state: vectors})  # decides how to vectorise
            scoring = measured(lambda: self._cluster_scores({state: vectors}))
            batches = 1.0
        else:
            batch = range(min(self.rows_at_once, len(reader)))
            inputs, labels = reader.batch(batch)
            scoring = measured(
                lambda: row_derivatives(self.model, self._named(state), vectors, inputs, labels, row_loss)
            )
            batches = (len(reader) if num_rows is None else num_rows) / len(batch)
        # Parameters and second moments of each state; a direction for each; sensitivity, momentum and sum.
        held = 8 * segments * self.model.num_parameters + (segments + 3) * vectors.nbytes
        following = preparing.held_bytes + max(preparing.peak_bytes - preparing.held_bytes, stepping.peak_bytes)
        return PieceOfWork(
            seconds=-(-num_values // at_once)
            * (segments * (preparing.seconds + batches * scoring.seconds) + len(path.steps()) * stepping.seconds),
            peak_bytes=held + max(following, scoring.peak_bytes),
        )

    @property
    def queries_at_once(self) -> int:
        """Objectives for which one direction per recorded state fits in memory."""
        per_value = 4 * self.model.num_parameters * (len(self.path.trajectory.state_steps) + 4)
        return max(1, self._shares.vectors // per_value)

    @property
    def rows_at_once(self) -> int:
        """Rows whose gradients fit in memory, on their way to scores."""
        return max(1, min(MAX_ROWS_AT_ONCE, self._shares.gradients // (12 * self.model.num_parameters)))

    def _cluster_scores(self, directions: dict[int, Tensor]) -> Tensor:
        num_clusters = len(self.samples.log_weights)
        at_once = max(1, self._shares.gradients // (12 * self.model.num_parameters))
        scores = []
        for start in range(0, num_clusters, at_once):
            some = self.samples[slice(start, start + at_once)]
            parts = [
                direction @ self._synset_gradients(self._named(state), some).T
                for state, direction in directions.items()
            ]
            scores.append(torch.stack(parts).sum(0))
        return torch.cat(scores, dim=1)

    def _named(self, state: int) -> dict[str, Tensor]:
        return self.model.space.unflatten(self.path.state(state))
