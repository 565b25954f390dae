"""Plain replay: the recorded optimizer itself, continued on a perturbed synset."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_rgm.engines.anchored_replay import MAX_MODELS_AT_ONCE, finite, mask_gradients, progress
from hf_rgm.engines.engine import Engine
from hf_rgm.engines.memory_shares import MemoryShares
from hf_rgm.model.cost_estimates import PieceOfWork, measured
from hf_rgm.trajectory.optimizers import apply_update


class PlainReplayEngine(Engine):
    """Trains on the synset from a recorded state to the end, as the paper does (docs/method.md, online)."""

    name = "plain_replay"
    needs = "samples"
    takes_rows = False
    anchored = False
    rewind = 0.14

    @property
    def batch_size(self) -> int:
        """Models whose parameters, moments and gradients fit in memory."""
        vectors = MemoryShares.of(self.run.max_bytes, with_rows=False, with_curvature=False).vectors
        return max(1, min(MAX_MODELS_AT_ONCE, vectors // (24 * self.run.model.num_parameters)))

    def start(self, rewind: float) -> int:
        """The recorded state nearest to the rewind point, the last one excepted."""
        path = self.run.path(rewind)
        return path.nearest_state(path.start, before=self.run.trajectory.num_steps)

    def replay(self, masks: Tensor, rewind: float) -> Tensor:
        """Final parameters under each row of `masks`."""
        run, start = self.run, self.start(rewind)
        if run.samples is None:
            raise RuntimeError("This engine needs a synset.")
        recorded = run.trajectory.state(start)
        table, rule, space = run.trajectory.steps, run.trajectory.optimizer, run.model.space
        device = run.model.device
        current = space.flatten(recorded.parameters).to(device).expand(len(masks), -1).clone()
        moments = {
            name: {k: v.to(device).expand(len(masks), *v.shape) for k, v in values.items()}
            for name, values in recorded.moments.items()
        }
        for t in progress(range(start, run.trajectory.num_steps), len(masks), start, disable=run.disable_tqdm):
            if table.skipped[t]:
                continue
            gradient = float(table.clip_factor[t]) * mask_gradients(run.samples, current, masks)
            updated, moments = apply_update(
                rule,
                space.unflatten(current),
                space.unflatten(gradient),
                moments,
                learning_rates=table.learning_rates[t].tolist(),
                step=int(run.trajectory.update_numbers[t]),
            )
            current = space.flatten(updated)
        return finite(current, start)

    def costs(self, num_masks: int, rewind: float | None) -> PieceOfWork:
        """From one gradient."""
        run, rewind = self.run, self.rewind if rewind is None else rewind
        if run.samples is None:
            raise RuntimeError("This engine needs a synset.")
        samples = run.samples
        everything = torch.ones(1, run.clusters.num_clusters, device=run.model.device)
        gradient = measured(lambda: mask_gradients(samples, run.final[None], everything))
        vectors = 4 * min(num_masks, self.batch_size) * run.model.num_parameters
        steps = run.trajectory.num_steps - self.start(rewind)
        # Parameters, gradients and both moments, before and after an update, and what it makes of them.
        return PieceOfWork(steps * num_masks * gradient.seconds, 10 * vectors + gradient.peak_bytes)
