"""Adjoint engine: derivatives by the cluster weights, at a cost that does not depend on the number of clusters."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_rgm.engines.engine import Outcome
from hf_rgm.engines.linear import LinearEngine
from hf_rgm.engines.memory_shares import cluster_ranges
from hf_rgm.engines.request import Evaluation, Request
from hf_rgm.model.cost_estimates import PieceOfWork, measured


class AdjointEngine(LinearEngine):
    """The linear engine backwards: scores of clusters are derivatives at p = 1."""

    name = "adjoint"
    replays = False

    @property
    def queries_at_once(self) -> int:
        """Objectives for which one direction per recorded state fits in memory."""
        per_value = 4 * self.form.length * (len(self.run.trajectory.state_steps) + 4)
        return max(1, self.run.shares.vectors // per_value)

    def scores(self, evaluation: Evaluation) -> Outcome:
        """Derivatives of the objective by the cluster weights, `(num_values, num_clusters)`."""
        rewind = self.rewind_of(evaluation.request)
        self.prepare(rewind)
        gradients = evaluation.gradients(self.form)
        parts = self.run.processes.parts(len(gradients), at_most=self.queries_at_once)
        found = self.run.processes.map(lambda part: self.cluster_scores(gradients(part), rewind).cpu(), parts)
        return Outcome(torch.cat(found), self.start(rewind))

    def rewind_of(self, request: Request) -> float:
        """Fraction of training to go back to: a derivative does not drift."""
        return self.rewind if request.rewind is None else request.rewind

    def cluster_scores(self, gradients: Tensor, rewind: float) -> Tensor:
        """Scores `(num_values, num_clusters)` for gradients of objectives `(num_values, length)`."""
        run, of_clusters = self.run, self.gradients(rewind)
        scores = torch.zeros(len(gradients), run.clusters.num_clusters, device=run.model.device)
        for state, direction in self.directions(gradients, rewind).items():
            for part in cluster_ranges(run.clusters.num_clusters, self.form.length, run.shares.gradients):
                # sum over segments of <u, G_k>
                scores[:, part.start : part.stop] += direction @ of_clusters(state, part).T
        return scores

    def costs_of_values(self, num_values: int, rewind: float | None) -> PieceOfWork:
        """Cost of the directions of so many objectives, from the rows of curvature at one state and one segment."""
        run, rewind = self.run, self.rewind if rewind is None else rewind
        path, segments = run.path(rewind), run.segments(rewind)
        at_once = min(num_values, self.queries_at_once)
        vectors = torch.zeros(at_once, self.form.length, device=run.model.device)
        preparing = run.cost_of_map(path, segments[-1])
        segment_map = run.map_of(path, segments[-1])
        stepping = measured(lambda: segment_map.backward(vectors, vectors))
        batches = math.ceil(num_values / at_once)
        return PieceOfWork(
            seconds=len(segments) * (preparing.seconds + batches * stepping.seconds),
            peak_bytes=self.states_bytes
            + self.kept_bytes(preparing, len(segments))
            + (len(segments) + 3) * vectors.nbytes
            + preparing.peak_bytes
            + stepping.peak_bytes,
        )
