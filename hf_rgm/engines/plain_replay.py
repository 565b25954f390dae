"""Plain replay: the recorded optimizer itself, continued on a perturbed synset."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from hf_rgm.engines.anchored_replay import MAX_MODELS_AT_ONCE, finite, mask_gradients, progress
from hf_rgm.engines.engine import Engine
from hf_rgm.engines.memory_shares import MemoryShares
from hf_rgm.engines.recorded_run import given
from hf_rgm.model.cost_estimates import PieceOfWork, measured
from hf_rgm.trajectory.optimizers import apply_update


class ContinuingEngine(Engine):
    """Continues the recorded optimizer from a recorded state, with its moments, on gradients of its own."""

    anchored = False

    @abstractmethod
    def one_gradient(self) -> Tensor:
        """Gradient of one training step of one model, for estimates."""

    def start(self, rewind: float) -> int:
        """Recorded state nearest to the rewind point, the last one excepted."""
        path = self.run.path(rewind)
        return path.nearest_state(path.start, before=self.run.trajectory.num_steps)

    def continued(self, start: int, num_models: int, gradients: Callable[[int, Tensor], Tensor]) -> Tensor:
        """Final parameters `(num_models, num_parameters)`, by gradients of that shape at a step and its parameters."""
        run, device = self.run, self.run.model.device
        recorded, table, space = run.trajectory.state(start), run.trajectory.steps, run.model.space
        current = space.flatten(recorded.parameters).to(device).expand(num_models, -1).clone()
        moments = {
            kind: {name: value.to(device).expand(num_models, *value.shape) for name, value in values.items()}
            for kind, values in recorded.moments.items()
        }
        steps = range(start, run.trajectory.num_steps)
        for t in progress(steps, num_models, start, disable=run.disable_tqdm):
            if table.skipped[t]:
                continue
            updated, moments = apply_update(
                run.trajectory.optimizer,
                space.unflatten(current),
                space.unflatten(gradients(t, current)),
                moments,
                learning_rates=table.learning_rates[t].tolist(),
                step=int(run.trajectory.update_numbers[t]),
            )
            current = space.flatten(updated)
        return current

    def costs(self, num_masks: int, rewind: float | None) -> PieceOfWork:
        """Cost of so many models, from one gradient."""
        run = self.run
        gradient = measured(self.one_gradient)
        vectors = 4 * min(num_masks, self.batch_size) * run.model.num_parameters
        steps = run.trajectory.num_steps - self.start(self.rewind if rewind is None else rewind)
        # Parameters, gradients and both moments, before and after an update, and temporaries of the update.
        return PieceOfWork(steps * num_masks * gradient.seconds, 10 * vectors + gradient.peak_bytes)


class PlainReplayEngine(ContinuingEngine):
    """Trains on the synset from a recorded state to the end, as the paper does (docs/method.md, online)."""

    name = "plain_replay"
    needs = "samples"
    takes_rows = False
    rewind = 0.14

    @property
    def batch_size(self) -> int:
        """Models whose parameters, moments and gradients fit in memory."""
        vectors = MemoryShares.of(self.run.max_bytes, with_rows=False, with_curvature=False).vectors
        return max(1, min(MAX_MODELS_AT_ONCE, vectors // (24 * self.run.model.num_parameters)))

    def replay(self, masks: Tensor, rewind: float) -> Tensor:
        """Final parameters `(num_masks, num_parameters)` under `masks`, `(num_masks, num_clusters)`."""
        samples, start = given(self.run.samples, "a synset"), self.start(rewind)
        scales = self.run.trajectory.gradient_scales
        replayed = self.continued(
            start,
            len(masks),
            lambda t, current: float(scales[t]) * mask_gradients(samples, current, masks),
        )
        return finite(replayed, start)

    def one_gradient(self) -> Tensor:
        samples = given(self.run.samples, "a synset")
        everything = torch.ones(1, self.run.clusters.num_clusters, device=self.run.model.device)
        return mask_gradients(samples, self.run.final[None], everything)
