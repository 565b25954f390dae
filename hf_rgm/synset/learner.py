"""Reverse gradient matching for one block of clusters."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_rgm.exceptions import DivergenceError
from hf_rgm.modeling import FunctionalModel
from hf_rgm.synset.config import DistillationConfig
from hf_rgm.synset.curvature import GaussNewton
from hf_rgm.synset.inputs import InputSpace
from hf_rgm.synset.matching import (
    ReverseCurriculum,
    SynsetGradients,
    cluster_residuals,
    curvature_error,
    matching_error,
)
from hf_rgm.synset.samples import SyntheticSamples
from hf_rgm.synset.sketch import identity
from hf_rgm.synset.states import MatchedState, StateVectors

DIVERGED_FACTOR = 100.0


@dataclass
class BlockTargets:
    """
    What the real rows of a block of clusters do at each matched state.

    Args:
        names (`Sequence[str]`): The clusters' names.
        matched (`Sequence[MatchedState]`): Run and step of each state, the runs' final ones last.
        states (`StateVectors`): Parameters of each state.
        gradients (`Tensor`): `(num_states, num_clusters, num_parameters)`, or sketches of that.
        probes, products (`Tensor`, *optional*): Directions and the curvature times them,
            `(num_states, num_probes, num_parameters)`; none where the curvature is not matched.
    """

    names: Sequence[str]
    matched: Sequence[MatchedState]
    states: StateVectors
    gradients: Tensor
    probes: Tensor | None = None
    products: Tensor | None = None


class BlockLearner:
    """
    Learns the synthetic samples of a block by Adam on the matching error.

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

    def learn(self, start: SyntheticSamples, *, description: str, disable_tqdm: bool) -> SyntheticSamples:
        """
        Runs all iterations.

        Args:
            start (`SyntheticSamples`): Where to start; left as they are.
            description (`str`): Text of the progress bar.
            disable_tqdm (`bool`): No progress bar.

        Returns:
            `SyntheticSamples`: what was learned.

        Raises:
            DivergenceError: If the matching error becomes NaN, infinite or explodes.
        """
        config = self.config
        samples = start.detach()
        for tensor in samples.tensors():
            tensor.requires_grad_()
        input_scale = float(start.inputs.std().clamp_min(1e-6))
        optimizer = torch.optim.Adam(
            [
                {"params": [samples.inputs], "lr": config.input_learning_rate * input_scale},
                {"params": [samples.targets], "lr": config.target_learning_rate},
                {"params": [samples.log_weights], "lr": config.weight_learning_rate},
            ]
        )
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.num_iterations)
        num_states = len(self.targets.states)
        curriculum = ReverseCurriculum(
            num_states,
            config.num_iterations,
            config.states_per_iteration,
            config.curriculum_tolerance,
            self._generator,
            num_runs=len({state.run for state in self.targets.matched}),
        )
        progress = tqdm(curriculum, total=config.num_iterations, desc=description, disable=disable_tqdm)
        for iteration, batch in enumerate(progress):
            optimizer.zero_grad()
            errors = {index: self._match(index, samples) for index in batch}
            if iteration % config.curvature_interval == 0:
                # A final state is in every batch; its curvature, matched best of all, only takes its turn.
                turn = iteration // config.curvature_interval % num_states
                self._match_curvature(batch[-1] if turn else batch[0], samples)
            optimizer.step()
            scheduler.step()
            curriculum.report(errors)
            progress.set_postfix(matching_error=f"{sum(errors.values()) / len(errors):.4f}", refresh=False)
        return samples.detach()

    def time_iteration(self, start: SyntheticSamples) -> float:
        """
        Wall time of one iteration in seconds, measured on the last state after a first try.

        Args:
            start (`SyntheticSamples`): Any samples of the block; left as they are.
        """
        samples = start.detach()
        for tensor in samples.tensors():
            tensor.requires_grad_()
        last = len(self.targets.states) - 1
        self._match(last, samples)
        begun = time.perf_counter()
        self._match(last, samples)
        matched = time.perf_counter()
        self._match_curvature(last, samples)
        curvature = time.perf_counter() - matched
        return self.config.states_per_iteration * (matched - begun) + curvature / self.config.curvature_interval

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

    def _match_curvature(self, index: int, samples: SyntheticSamples) -> None:
        if self.targets.probes is None or self.targets.products is None:
            return
        flat = samples.flatten()
        weights = flat.log_weights.exp()
        curvature = GaussNewton(self.model, self.inputs.to_forward(flat), weights, self.targets.states[index])
        error = curvature_error(curvature.product(self.targets.probes[index]), self.targets.products[index])
        (self.config.curvature_weight * error).backward()

    def _raise_diverged(self, index: int, residuals: Tensor) -> None:
        worst = int(residuals.nan_to_num(nan=torch.inf).argmax())
        raise DivergenceError(
            f"Distillation diverged at cluster {self.targets.names[worst]!r}, "
            f"{self.targets.matched[index]}. Nothing was saved for this block of clusters. Lower "
            f"`input_learning_rate` (now {self.config.input_learning_rate}) and `target_learning_rate` (now "
            f"{self.config.target_learning_rate})."
        )
