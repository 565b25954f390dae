"""Reverse gradient matching for one block of clusters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_rgm.distillation.config import DistillationConfig
from hf_rgm.distillation.stopping import MatchQuality, SampleProducts, round_lengths, scaled
from hf_rgm.exceptions import DivergenceError
from hf_rgm.model.cost_estimates import measured
from hf_rgm.synset.matched_states import StateVectors
from hf_rgm.synset.samples import SynsetGradients, SyntheticSamples

DIVERGED_FACTOR = 100.0
"""Growth of the matching error at a state, from its first value or 1, that counts as divergence."""

ADAM_BETAS = (0.5, 0.95)
"""Means over few iterations, as rounds are short: with the usual ones 30 iterations leave half as much error again."""


class BlockLearner:
    """Learns the synthetic samples of a block by Adam on the matching error, `chunk_size` clusters at a time."""

    def __init__(
        self,
        gradients: SynsetGradients,
        names: Sequence[str],
        states: StateVectors,
        targets: Tensor,
        config: DistillationConfig,
        generator: torch.Generator,
        *,
        sketch: Callable[[Tensor], Tensor],
        chunk_size: int,
    ) -> None:
        self._gradients = gradients
        self._names = names  # of the clusters
        self._states = states
        # The clusters' real gradients, or sketches of them: (num_states, num_clusters, num_parameters).
        self._targets = targets
        self.config = config
        self._generator = generator
        self._sketch = sketch
        self._chunk_size = chunk_size
        # One state at a time: the squares of all of them would take the memory of the gradients again.
        self._energies = [real.square().sum() for real in targets]
        self._bounds: dict[int, float] = {}

    def learn(self, start: SyntheticSamples, *, description: str, disable_tqdm: bool) -> tuple[SyntheticSamples, int]:
        """Samples of the round with the smallest matching error, and the number of iterations of all rounds."""
        # Each round is a cosine cycle of Adam, twice as long as the last, from where that one ended.
        best: tuple[SyntheticSamples, MatchQuality] | None = None
        samples, made = start, 0
        input_scale = float(start.inputs.std().clamp_min(1e-6))
        with tqdm(desc=description, disable=disable_tqdm, total=0) as progress:
            for length in round_lengths(self.config.num_iterations):
                progress.total += length
                samples = self._round(samples, length, input_scale, progress)
                made += length
                samples, quality = self._settle(samples)
                progress.set_postfix(matching_error=f"{quality.error:.4f}")
                done = best is not None and quality.is_enough(best[1], self.config.tolerance)
                if best is None or quality.error < best[1].error:
                    best = samples, quality
                if done:
                    break
        assert best is not None  # there is at least one iteration
        return best[0], made

    def _round(
        self, start: SyntheticSamples, num_iterations: int, input_scale: float, progress: tqdm
    ) -> SyntheticSamples:
        config, samples = self.config, start.leaves()
        optimizer = torch.optim.Adam(
            [
                {"params": [samples.inputs], "lr": config.input_learning_rate * input_scale},
                {"params": [samples.targets], "lr": config.target_learning_rate},
                {"params": [samples.log_weights], "lr": config.weight_learning_rate},
            ],
            betas=ADAM_BETAS,
        )
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_iterations)
        batches = draw_states(len(self._states), config.states_per_iteration, self._generator)
        for _, batch in zip(range(num_iterations), batches, strict=False):
            optimizer.zero_grad()
            errors = [self._match(index, samples) for index in batch]
            optimizer.step()
            scheduler.step()
            progress.set_postfix(matching_error=f"{sum(errors) / len(errors):.4f}", refresh=False)
            progress.update()
        return samples.detach()

    def _settle(self, samples: SyntheticSamples) -> tuple[SyntheticSamples, MatchQuality]:
        """Samples with the weights that the closed form gives, and their quality."""
        products = self._products(samples)
        factors = torch.ones(samples.inputs.shape[:2], dtype=torch.float64)
        if self.config.solve_weights:
            factors = products.best_factors()
            samples = scaled(samples, factors)
        return samples, products.quality(factors)

    def _products(self, samples: SyntheticSamples) -> SampleProducts:
        """Inner products of the gradients of all single samples, state by state."""
        num_clusters, per_cluster = samples.inputs.shape[:2]
        gram = torch.zeros(num_clusters, per_cluster, per_cluster, dtype=torch.float64)
        with_real, among_real = [], []
        together = max(1, self._chunk_size // per_cluster)
        for index, real in enumerate(self._targets):
            energy = max(float(self._energies[index]), torch.finfo(real.dtype).tiny)
            rows = []
            for first in range(0, num_clusters, together):
                clusters = slice(first, first + together)
                gradients = self._single_gradients(index, samples[clusters])
                rows.append((gradients @ real.T).unflatten(0, (-1, per_cluster)))
                own = gradients.unflatten(0, (-1, per_cluster))
                gram[clusters] += (own @ own.mT).cpu().double() / energy
            with_real.append(torch.cat(rows).cpu().double() / energy)
            among_real.append((real @ real.T).cpu().double() / energy)
            if not torch.isfinite(with_real[-1]).all():
                self._raise_diverged(index, with_real[-1].sum((1, 2)))
        return SampleProducts(gram, torch.stack(with_real), torch.stack(among_real))

    def _single_gradients(self, index: int, samples: SyntheticSamples) -> Tensor:
        """Gradient of each single sample at one state, or its sketch: `(num_samples, num_parameters)`."""
        single = samples.map(lambda tensor: tensor.flatten(0, 1).unsqueeze(1))
        result = self._targets.new_empty(len(single.inputs), self._targets.shape[-1])
        for piece in self._chunks(len(result)):
            result[piece] = self._synthetic(index, single[piece]).detach()
        return result

    def time_iteration(self, start: SyntheticSamples) -> float:
        """Wall time of one iteration in seconds, measured on the last state."""
        samples, last = start.leaves(), len(self._states) - 1
        return self.config.states_per_iteration * measured(lambda: self._match(last, samples)).seconds

    def time_settling(self, start: SyntheticSamples) -> float:
        """Wall time in seconds of settling the samples after a round."""
        return measured(lambda: self._settle(start)).seconds

    def residuals(self, samples: SyntheticSamples) -> Tensor:
        """Relative squared matching error of each cluster at each state: `(num_states, num_clusters)`."""
        rows = [self._residuals_at(index, samples) for index in range(len(self._states))]
        for index, row in enumerate(rows):
            if not torch.isfinite(row).all():
                self._raise_diverged(index, row)
        return torch.stack(rows)

    @torch.no_grad()
    def _residuals_at(self, index: int, samples: SyntheticSamples) -> Tensor:
        parts = [self._synthetic(index, samples[chunk]) for chunk in self._chunks(len(self._names))]
        return cluster_residuals(torch.cat(parts), self._targets[index])

    def _synthetic(self, index: int, samples: SyntheticSamples) -> Tensor:
        """Clusters' synthetic gradients at one state, or their sketches: `(num_clusters, num_parameters)`."""
        return self._sketch(self._gradients(self._gradients.model.space.unflatten(self._states[index]), samples))

    def _match(self, index: int, samples: SyntheticSamples) -> float:
        """Matching error at one state; its gradient is added to the samples'."""
        value = 0.0
        for chunk in self._chunks(len(self._names)):
            synthetic = self._synthetic(index, samples[chunk])
            error = matching_error(synthetic, self._targets[index, chunk], self._energies[index])
            error.backward()
            value += error.item()
        # `not <` also catches NaN.
        if not value < self._bounds.setdefault(index, DIVERGED_FACTOR * max(value, 1.0)):
            self._raise_diverged(index, self._residuals_at(index, samples))
        return value

    def _chunks(self, length: int) -> list[slice]:
        return [slice(start, start + self._chunk_size) for start in range(0, length, self._chunk_size)]

    def _raise_diverged(self, index: int, residuals: Tensor) -> None:
        worst = int(residuals.nan_to_num(nan=torch.inf).argmax())
        raise DivergenceError(
            f"Distillation diverged at cluster {self._names[worst]!r}, {self._states.matched[index]}. Nothing was "
            "saved for this block of clusters. Lower "
            f"`input_learning_rate` (now {self.config.input_learning_rate}) and `target_learning_rate` (now "
            f"{self.config.target_learning_rate})."
        )


def matching_error(synthetic: Tensor, real: Tensor, energy: Tensor) -> Tensor:
    """Squared distance of cluster gradients `(num_clusters, num_parameters)` at a state, relative to an energy."""
    # sum_k |g_k - G_k|^2 / sum_k |G_k|^2, the energy over all clusters of the block. No samples at all give 1.
    return (synthetic - real).square().sum() / energy


def cluster_residuals(synthetic: Tensor, real: Tensor) -> Tensor:
    """`|g_k - G_k|^2 / |G_k|^2` of each cluster: `(num_clusters,)`; 0 / 0 counts as 0."""
    energy = real.square().sum(1)
    distance = (synthetic - real).square().sum(1)
    return torch.where(energy > 0, distance / energy.clamp_min(torch.finfo(energy.dtype).tiny), distance)


def draw_states(num_states: int, states_per_iteration: int, generator: torch.Generator) -> Iterator[list[int]]:
    """States of each iteration, without end: all of them in random order, again and again."""
    while True:
        for batch in torch.randperm(num_states, generator=generator).split(states_per_iteration):
            yield batch.tolist()
