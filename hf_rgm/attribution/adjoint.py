"""The adjoint engine: how the objective depends on every gradient of the recorded run."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from hf_rgm.attribution.curvature import PathCurvature, WeightedInputs
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


class AdjointEngine:
    """
    Reverse-mode differentiation along the recorded path with the synset's curvature (METHOD: adjoint).

    Args:
        model (`FunctionalModel`): The trained model.
        inputs (`InputSpace`): The space of the synthetic inputs.
        samples (`SyntheticSamples`): The synset's samples.
        trajectory (`Trajectory`): The recorded run.
        rewind (`float`, *optional*, defaults to `0.07`): Fraction of training down to which effects are followed.
        stride (`int`, *optional*): Training steps per integration step. Defaults to the smallest that needs at most
            100 integration steps.
        rows (`WeightedInputs`, *optional*): Rows whose curvature stands in for the synset's where the two differ
            much; see [`~hf_rgm.attribution.curvature.PathCurvature`].
        max_bytes (`int`, *optional*, defaults to `2**30`): Memory for sensitivities and curvature factors.
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
        rows: WeightedInputs | None = None,
        max_bytes: int = 2**30,
    ) -> None:
        self.model = model
        self.inputs = inputs
        self.samples = samples
        if stride is None:
            stride = automatic_stride(trajectory, rewind)
        self.path = RecordedPath(trajectory, model.space, model.device, rewind=rewind, stride=stride)
        self._max_bytes = max_bytes
        self._curvature = PathCurvature(model, inputs, samples, rows=rows, max_bytes=max_bytes)

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
        synset_gradients = SynsetGradients(self.model, self.inputs)
        scores = []
        for chunk in self._by_query(gradients):
            parts = [
                direction @ synset_gradients(self._named(state), self.samples).T
                for state, direction in self.directions(chunk).items()
            ]
            scores.append(torch.stack(parts).sum(0))
        return torch.cat(scores)

    def row_scores(
        self, gradients: Tensor, reader: RowReader, row_loss: RowLoss = CROSS_ENTROPY, *, batch_size: int = 256
    ) -> Tensor:
        """
        Effect of each training row's presence, from the row's own gradient at the recorded states.

        Args:
            gradients (`Tensor`): `(num_values, num_parameters)`.
            reader (`RowReader`): The training rows.
            row_loss (`RowLoss`, *optional*): The loss of a row. Defaults to the cross entropy.
            batch_size (`int`, *optional*, defaults to `256`): Rows at once.

        Returns:
            `Tensor`: `(num_values, num_rows)`, float32.
        """
        batch_size = self._rows_at_once(batch_size)
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
                for state, direction in directions.items():
                    change = row_derivatives(self.model, self._named(state), direction, inputs, labels, row_loss)
                    result[queries, start : rows.stop] += change / num_rows
        return result

    def costs(self, num_values: int, reader: RowReader | None, row_loss: RowLoss = CROSS_ENTROPY) -> PieceOfWork:
        """
        What scores of so many objectives take, from one state, one step and one batch of rows.

        Args:
            num_values (`int`): Objectives; those that fit in memory together go together.
            reader (`RowReader`, *optional*): The training rows, for [`AdjointEngine.row_scores`]. Without them,
                [`AdjointEngine.cluster_scores`] is meant.
            row_loss (`RowLoss`, *optional*): The loss of a row. Defaults to the cross entropy.
        """
        path, at_once = self.path, min(num_values, self.queries_at_once)
        state, last, segments = path.trajectory.num_steps, path.steps()[-1], len(path.segments())
        vectors = torch.zeros(at_once, self.model.num_parameters, device=self.model.device)
        preparing = measured(lambda: self._curvature.at(path, state))
        curvature = self._curvature.at(path, state)
        stepping = measured(lambda: curvature.product(adjoint_step(last, vectors, vectors)[0]) + vectors)
        if reader is None:
            gradients = SynsetGradients(self.model, self.inputs)
            gradients(self._named(state), self.samples)  # decides how to vectorise
            scoring = measured(lambda: vectors @ gradients(self._named(state), self.samples).T)
            batches = 1.0
        else:
            inputs, labels = reader.batch(range(min(self._rows_at_once(256), len(reader))))
            scoring = measured(
                lambda: row_derivatives(self.model, self._named(state), vectors, inputs, labels, row_loss)
            )
            batches = len(reader) / len(labels)
        # Parameters and second moments of each state; a direction for each; sensitivity, momentum and sum.
        held = 8 * segments * self.model.num_parameters + (segments + 3) * vectors.nbytes
        following = 2 * preparing.held_bytes + max(preparing.peak_bytes - preparing.held_bytes, stepping.peak_bytes)
        return PieceOfWork(
            seconds=-(-num_values // at_once)
            * (segments * (preparing.seconds + batches * scoring.seconds) + len(path.steps()) * stepping.seconds),
            peak_bytes=held + max(following, scoring.peak_bytes),
        )

    def _by_query(self, gradients: Tensor):
        return gradients.split(self.queries_at_once)

    @property
    def queries_at_once(self) -> int:
        """Objectives for which one direction per recorded state fits in memory."""
        per_value = 4 * self.model.num_parameters * (len(self.path.trajectory.state_steps) + 4)
        return max(1, self._max_bytes // per_value)

    def _rows_at_once(self, at_most: int) -> int:
        return max(1, min(at_most, self._max_bytes // (4 * self.model.num_parameters)))

    def _named(self, state: int) -> dict[str, Tensor]:
        return self.model.space.unflatten(self.path.state(state))
