"""Reverse gradient matching for one block of clusters."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_rgm.distillation.config import DistillationConfig
from hf_rgm.distillation.sketch import identity
from hf_rgm.distillation.stopping import MatchQuality, SampleProducts, round_lengths, scaled
from hf_rgm.exceptions import DivergenceError
from hf_rgm.model.functional_model import FunctionalModel
from hf_rgm.synset.inputs import InputSpace
from hf_rgm.synset.matched_states import MatchedState, StateVectors
from hf_rgm.synset.samples import SyntheticSamples
from hf_rgm.synset.synset_gradients import (
    SynsetGradients,
    cluster_residuals,
    draw_states,
    matching_error,
)

DIVERGED_FACTOR = 100.0

ADAM_BETAS = (0.5, 0.95)
"""Means over few iterations, as there are few: with the usual ones 30 of them end with half as much error again."""


@dataclass
class BlockTargets:
    """
    What the real rows of a block of clusters do at each matched state.

    Args:
        names (`Sequence[str]`): The clusters' names.
        matched (`Sequence[MatchedState]`): Run and step of each state, the runs' final ones last.
        states (`StateVectors`): Parameters of each state.
        gradients (`Tensor`): `(num_states, num_clusters, num_parameters)`, or sketches of that.
    """

    names: Sequence[str]
    matched: Sequence[MatchedState]
    states: StateVectors
    gradients: Tensor


@dataclass(frozen=True)
class LearnedBlock:
    """
    What became of a block.

    Args:
        samples (`SyntheticSamples`): Of the best round.
        iterations (`int`): Iterations made, of all rounds.
        quality (`MatchQuality`): Of the samples.
    """

    samples: SyntheticSamples
    iterations: int
    quality: MatchQuality


class BlockLearner:
    """
    Learns the synthetic samples of a block by Adam on the matching error, in rounds, until that is done.

    Args:
        model (`FunctionalModel`): The model as a function of its parameters.
        inputs (`InputSpace`): The space of the synthetic inputs.
        targets (`BlockTargets`): What to match.
        config (`DistillationConfig`): Settings.
        generator (`torch.Generator`): Draws the states of each iteration.
        gradients (`SynsetGradients`): Gradients of the synthetic samples.
        sketch (`Callable`, *optional*): What the targets' gradients went through. Defaults to nothing.
        chunk_size (`int`, *optional*): Clusters matched in one backward pass. Defaults to all.
    """

    def __init__(
        self,
        model: FunctionalModel,
        inputs: InputSpace,
        targets: BlockTargets,
        config: DistillationConfig,
        generator: torch.Generator,
        gradients: SynsetGradients,
        *,
        sketch: Callable[[Tensor], Tensor] = identity,
        chunk_size: int | None = None,
    ) -> None:
        self.model = model
        self.inputs = inputs
        self.targets = targets
        self.config = config
        self._generator = generator
        self._gradients = gradients
        self._sketch = sketch
        self._chunk_size = chunk_size or len(targets.names)
        # One state at a time: the squares of all of them would take the memory of the gradients again.
        self._energies = [gradients.square().sum() for gradients in targets.gradients]
        self._bounds: dict[int, float] = {}

    def learn(self, start: SyntheticSamples, *, description: str, disable_tqdm: bool) -> LearnedBlock:
        """
        Runs rounds of iterations, each twice as long as the last, until one is enough.

        A round is a cosine cycle of Adam from where the last one ended. After it weights are solved for in closed
        form, where the matching error is all that is learned, and the quality is looked at.

        Args:
            start (`SyntheticSamples`): Where to start; left as they are.
            description (`str`): Text of the progress bar, which tells the iterations of the rounds begun so far.
            disable_tqdm (`bool`): No progress bar.

        Returns:
            `LearnedBlock`: the round with the smallest matching error.

        Raises:
            DivergenceError: If the matching error becomes NaN, infinite or explodes.
        """
        best, samples, made = None, start, 0
        input_scale = float(start.inputs.std().clamp_min(1e-6))
        with tqdm(desc=description, disable=disable_tqdm, total=0) as progress:
            for length in round_lengths(self.config.num_iterations):
                progress.total += length
                samples = self._round(samples, length, input_scale, progress)
                made += length
                samples, quality = self._settle(samples)
                progress.set_postfix(matching_error=f"{quality.error:.4f}")
                done = best is not None and quality.is_enough(best.quality, self.config.tolerance)
                if best is None or quality.error < best.quality.error:
                    best = LearnedBlock(samples, made, quality)
                if done:
                    break
        if best is None:
            raise RuntimeError("No round was run.")
        return replace(best, iterations=made)

    def _round(
        self, start: SyntheticSamples, num_iterations: int, input_scale: float, progress: tqdm
    ) -> SyntheticSamples:
        config, samples = self.config, _leaves(start)
        optimizer = torch.optim.Adam(
            [
                {"params": [samples.inputs], "lr": config.input_learning_rate * input_scale},
                {"params": [samples.targets], "lr": config.target_learning_rate},
                {"params": [samples.log_weights], "lr": config.weight_learning_rate},
            ],
            betas=ADAM_BETAS,
        )
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_iterations)
        batches = draw_states(len(self.targets.states), config.states_per_iteration, self._generator)
        for _, batch in zip(range(num_iterations), batches, strict=False):
            optimizer.zero_grad()
            errors = [self._match(index, samples) for index in batch]
            optimizer.step()
            scheduler.step()
            progress.set_postfix(matching_error=f"{sum(errors) / len(errors):.4f}", refresh=False)
            progress.update()
        return samples.detach()

    def _settle(self, samples: SyntheticSamples) -> tuple[SyntheticSamples, MatchQuality]:
        """Samples with their best weights, where those have a closed form, and the quality."""
        products = self._products(samples)
        factors = torch.ones(samples.inputs.shape[:2], dtype=torch.float64)
        # The match of the total gradient is not a least-squares problem of one cluster.
        if self.config.solve_weights and not self.config.total_gradient_weight:
            factors = products.best_factors()
            samples = scaled(samples, factors)
        return samples, products.quality(factors)

    def _products(self, samples: SyntheticSamples) -> SampleProducts:
        """Goes through the samples' gradients one by one, at every state."""
        num_clusters, per_cluster = samples.inputs.shape[:2]
        gram = torch.zeros(num_clusters, per_cluster, per_cluster, dtype=torch.float64)
        with_real, among_real = [], []
        together = max(1, self._chunk_size // per_cluster)
        for index, real in enumerate(self.targets.gradients):
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
        """What each sample adds to its cluster at one state: `(num_samples, num_parameters)`, or sketches of it."""
        single = samples.map(lambda tensor: tensor.flatten(0, 1).unsqueeze(1))
        result = self.targets.gradients.new_empty(len(single.inputs), self.targets.gradients.shape[-1])
        for first in range(0, len(result), self._chunk_size):
            piece = slice(first, first + self._chunk_size)
            result[piece] = self._sketch(self._gradients(self._named(index), single[piece])).detach()
        return result

    def time_iteration(self, start: SyntheticSamples) -> float:
        """
        Wall time of one iteration in seconds, measured on the last state after a first try.

        Args:
            start (`SyntheticSamples`): Any samples of the block; left as they are.
        """
        samples = _leaves(start)
        last = len(self.targets.states) - 1
        self._match(last, samples)
        begun = time.perf_counter()
        self._match(last, samples)
        return self.config.states_per_iteration * (time.perf_counter() - begun)

    def time_settling(self, start: SyntheticSamples) -> float:
        """Wall time of what comes after a round, in seconds, after `time_iteration`."""
        begun = time.perf_counter()
        self._settle(start)
        return time.perf_counter() - begun

    def residuals(self, samples: SyntheticSamples) -> Tensor:
        """
        Relative squared matching error of each cluster at each state: `(num_states, num_clusters)`, float32.

        Raises:
            DivergenceError: If one is NaN or infinite.
        """
        rows = []
        for index, real in enumerate(self.targets.gradients):
            parts = [self._gradients(self._named(index), samples[chunk]).detach() for chunk in self._chunks()]
            rows.append(cluster_residuals(torch.cat([self._sketch(part) for part in parts]), real))
            if not torch.isfinite(rows[-1]).all():
                self._raise_diverged(index, rows[-1])
        return torch.stack(rows)

    def _named(self, index: int) -> dict[str, Tensor]:
        return self.model.space.unflatten(self.targets.states[index])

    def _match(self, index: int, samples: SyntheticSamples) -> float:
        """Adds the gradient of the matching error at one state to the samples' and returns the error."""
        value, residuals = 0.0, []
        for chunk in self._chunks():
            synthetic = self._sketch(self._gradients(self._named(index), samples[chunk]))
            real = self.targets.gradients[index, chunk]
            error = matching_error(synthetic, real, self._energies[index], self.config.total_gradient_weight)
            error.backward()
            value += error.item()
            residuals.append(cluster_residuals(synthetic.detach(), real))
        if not value < self._bounds.setdefault(index, DIVERGED_FACTOR * max(value, 1.0)):
            self._raise_diverged(index, torch.cat(residuals))
        return value

    def _chunks(self) -> list[slice]:
        size = self._chunk_size
        return [slice(start, start + size) for start in range(0, len(self.targets.names), size)]

    def _raise_diverged(self, index: int, residuals: Tensor) -> None:
        worst = int(residuals.nan_to_num(nan=torch.inf).argmax())
        raise DivergenceError(
            f"Distillation diverged at cluster {self.targets.names[worst]!r}, "
            f"{self.targets.matched[index]}. Nothing was saved for this block of clusters. Lower "
            f"`input_learning_rate` (now {self.config.input_learning_rate}) and `target_learning_rate` (now "
            f"{self.config.target_learning_rate})."
        )


def _leaves(samples: SyntheticSamples) -> SyntheticSamples:
    """The same values, to be learned."""
    samples = samples.detach()
    for tensor in samples.tensors():
        tensor.requires_grad_()
    return samples
