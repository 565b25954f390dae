"""
Plain replay, the online form of the paper: the recorded optimizer on the synset from a recorded state on.

Anchored replay agrees better with retraining in every figure, so it is no engine of the library.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_rgm.engines.anchored_replay import mask_gradients
from hf_rgm.engines.recorded_run import given
from hf_rgm.engines.training_on import GradientOf, TrainingOnEngine


class PlainReplayEngine(TrainingOnEngine):
    """Trains on the synset from a recorded state to the end."""

    name = "plain_replay"
    needs = "samples"
    takes_rows = False
    rewind = 0.14

    def gradients(self, mask: Tensor) -> GradientOf:
        """Gradients of the synthetic samples under one mask, `(num_clusters,)`, times the step's gradient scale."""
        samples, scales = given(self.run.samples, "a synset"), self.run.trajectory.gradient_scales
        return lambda t, current: float(scales[t]) * mask_gradients(samples, current[None], mask[None])[0]

    def one_gradient(self) -> Tensor:
        everything = torch.ones(1, self.run.clusters.num_clusters, device=self.run.model.device)
        return mask_gradients(given(self.run.samples, "a synset"), self.run.final[None], everything)
