"""Responses: the models without each cluster, computed from the rows and kept in the synset."""

from __future__ import annotations

import logging

from torch import Tensor

from hf_rgm.engines.engine import Engine
from hf_rgm.engines.linear import LinearEngine
from hf_rgm.engines.memory_shares import ranges
from hf_rgm.engines.perturbations import leave_one_out
from hf_rgm.engines.recorded_run import RecordedRun, given
from hf_rgm.engines.request import Evaluation
from hf_rgm.exceptions import DivergenceError
from hf_rgm.model.cost_estimates import PieceOfWork
from hf_rgm.synset.responses import Responses

logger = logging.getLogger(__name__)


class ResponsesEngine(Engine):
    """Adds up the changes of the parameters without each cluster, which a synset keeps (docs/method.md, responses)."""

    name = "responses"
    needs = "responses"
    takes_rows = False
    rewind = 0.14

    @property
    def batch_size(self) -> int:
        """Models that fit in memory together."""
        return max(1, self.run.shares.vectors // (16 * self.run.model.num_parameters))

    @property
    def _responses(self) -> Responses:
        return given(self.run.responses, "a synset with responses")

    def start(self, rewind: float) -> int:
        """Training step from which the responses were computed."""
        return self._responses.rewind_step

    def replay(self, masks: Tensor, rewind: float) -> Tensor:
        """Final parameters under `masks`: the trained ones plus the changes without what is absent."""
        result = self.run.final.repeat(len(masks), 1)
        for clusters in ranges(masks.shape[1], self.batch_size):
            part = slice(clusters.start, clusters.stop)
            absent = 1 - masks[:, part]
            if bool(absent.any()):
                result += absent @ self._responses.decode(part).to(result)
        return result

    def evaluate(self, evaluation: Evaluation, parameters: Tensor) -> Tensor:
        """Objective to first order, where it has a gradient."""
        return evaluation.to_first_order(parameters - self.run.final, self.form)

    def costs(self, num_masks: int, rewind: float | None) -> PieceOfWork:
        """Memory alone; the time is negligible."""
        return PieceOfWork(0.0, 16 * self.run.model.num_parameters * min(num_masks, self.batch_size))


def compute_responses(run: RecordedRun, *, precision: str, parameters_sha256: str) -> Responses | None:
    """Responses to leaving each cluster out, by the linear engine on the rows; `None`, with a warning, if it fails."""
    num_clusters, num_parameters = run.clusters.num_clusters, run.model.num_parameters
    if 8 * num_clusters * num_parameters > run.max_bytes:  # float32, and once more for a copy
        logger.warning(
            "Responses of %d clusters in %d parameters do not fit into `max_memory`, and are left out of the synset. "
            "Raise it, or use fewer clusters.",
            *(num_clusters, num_parameters),
        )
        return None
    try:
        outcome = LinearEngine(run).parameters(leave_one_out(num_clusters), None)
        return Responses.encode(
            outcome.values - run.final.cpu(),
            run.trajectory.parameter_shapes,
            precision,
            rewind_step=outcome.start,
            cluster_names=run.clusters.names,
            parameters_sha256=parameters_sha256,
        )
    except (DivergenceError, NotImplementedError, ValueError) as error:  # the synset is good without responses too
        logger.warning("The synset keeps no responses: %s", error)
        return None
