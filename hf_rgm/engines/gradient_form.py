"""Form of the gradients that engines hold: whole, or sketches where there are many parameters."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from hf_rgm.engines.segments import Segment, segments_of
from hf_rgm.model.functional_model import FunctionalModel, ParameterSpace
from hf_rgm.trajectory.path import RecordedPath

# Buckets of a sketch: the standard deviation of an inner product is about 1/256 of the gradients' lengths.
SKETCH_LENGTH = 2**16


class GradientForm(ABC):
    """Linear map from named gradients to the vectors `(length,)` in which deviations and sensitivities are held."""

    is_whole: ClassVar[bool]

    @property
    @abstractmethod
    def length(self) -> int: ...

    @abstractmethod
    def at_once(self, max_bytes: int) -> int:
        """Number of rows or queries whose gradients are computed together."""

    @abstractmethod
    def named(self, vector: Tensor) -> dict[str, Tensor]:
        """Parameters `(num_parameters,)` by name, to differentiate with respect to."""

    @abstractmethod
    def __call__(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """Vectors `(*batch, length)`, float32, of gradients `(*batch, *shape)`."""

    @abstractmethod
    def segments(self, path: RecordedPath) -> list[Segment]:
        """Segments of a path for vectors of this form."""


@dataclass(frozen=True)
class WholeGradients(GradientForm):
    """Gradients as they are, concatenated: `length` is the number of parameters."""

    space: ParameterSpace
    is_whole: ClassVar = True

    @property
    def length(self) -> int:
        return self.space.num_parameters

    def at_once(self, max_bytes: int) -> int:
        return max(1, max_bytes // (4 * self.length))  # float32

    def named(self, vector: Tensor) -> dict[str, Tensor]:
        return self.space.unflatten(vector)

    def __call__(self, gradients: Mapping[str, Tensor]) -> Tensor:
        return self.space.flatten(gradients)

    def segments(self, path: RecordedPath) -> list[Segment]:
        return segments_of(path)


class SketchedGradients(GradientForm):
    """Sketches `S D^1/2 g`: scaled by one preconditioner, with random signs, folded into `length` buckets."""

    # docs/method.md, many parameters: the linear engine only needs inner products in the metric D, which sketches keep
    # in expectation. One D serves all segments, each with a factor of its own; elements that never moved are left out.

    is_whole = False

    def __init__(self, model: FunctionalModel, path: RecordedPath, length: int, seed: int = 0) -> None:
        self._model = model
        self._length = length
        self._path = path
        self._seed = seed

    @property
    def length(self) -> int:
        return self._length

    def at_once(self, max_bytes: int) -> int:
        return 1  # vectorising would hold whole gradients

    def named(self, vector: Tensor) -> dict[str, Tensor]:
        """Parameters by name; embeddings with only the rows that ever moved."""
        named = self._model.space.unflatten(vector)
        return {name: value[self._partial[name]] if name in self._partial else value for name, value in named.items()}

    def __call__(self, gradients: Mapping[str, Tensor]) -> Tensor:
        space = self._path.space
        if gradients[space.names[0]].dim() > len(space.shapes[0]):
            rows = zip(*(gradients[name] for name in space.names), strict=True)
            return torch.stack([self(dict(zip(space.names, row, strict=True))) for row in rows])
        result, start = torch.zeros(self._length, device=self._path.device), 0
        for name, (kept, root) in self._roots.items():
            gradient = gradients[name]
            if kept is not None and gradient.numel() != root.numel():
                gradient = gradient[kept]
            start = _fold(gradient.reshape(-1), root, result, start)
        return result

    def segments(self, path: RecordedPath) -> list[Segment]:
        """Segments whose preconditioner is one number: its ratio to the common one."""
        found = []
        for segment in segments_of(path, uniform_decay=True):
            if segment.frozen_decay is not None:
                raise NotImplementedError(
                    f"Weight decay of {path.trajectory.optimizer.name} goes through the gradient, which so many "
                    "parameters are not followed with. Train with AdamW, or raise `max_memory`."
                )
            own = segment.precondition.expand_as(self._metric)
            factor = (own * self._weights).sum() / (self._metric * self._weights).sum()
            found.append(replace(segment, precondition=factor.reshape(1)))
        return found

    @functools.cached_property
    def _metric(self) -> Tensor:
        """Common preconditioner D up to a factor, `(num_parameters,)`: the geometric mean over the states in use."""
        path = self._path
        trajectory, rule = path.trajectory, path.trajectory.optimizer
        rates = trajectory.steps.learning_rates.sum(0).tolist()
        metric = path.space.expand_groups(rates, rule.group_of, path.device).expand(path.space.num_parameters)
        if not path.is_adaptive:
            return metric
        logs, counts = torch.zeros_like(metric), torch.zeros_like(metric)
        for state, _, _ in path.segments():
            inverse = path.inverse_root_moment(float(max(state, 1)))
            logs += inverse.clamp_min(torch.finfo(inverse.dtype).tiny).log().where(inverse > 0, 0.0)
            counts += inverse > 0
        return metric * (logs / counts.clamp_min(1)).exp().where(counts > 0, 0.0)

    @functools.cached_property
    def _weights(self) -> Tensor:
        """Weight of each element in a segment's factor: its mean squared gradient, where known."""
        path = self._path
        if not path.is_adaptive:
            return torch.ones(1, device=path.device)
        return path.second_moment(path.trajectory.num_steps)

    @functools.cached_property
    def _partial(self) -> dict[str, Tensor]:
        """Rows that ever moved, for embeddings whose other rows the model can do without."""
        some = {name: kept for name, (kept, _) in self._roots.items() if kept is not None}
        return {name: kept for name, kept in some.items() if self._model.give_rows(name, kept)}

    @functools.cached_property
    def _roots(self) -> dict[str, tuple[Tensor | None, Tensor]]:
        """Leading rows of each parameter that ever moved (`None`: all are kept), and the signed roots of D there."""
        generator = torch.Generator().manual_seed(self._seed)
        roots: dict[str, tuple[Tensor | None, Tensor]] = {}
        for name, metric in self._path.space.unflatten(self._metric).items():
            kept = None
            if metric.dim() > 1:
                moving = torch.nonzero((metric > 0).flatten(1).any(1))[:, 0]
                if len(moving) <= 0.75 * len(metric):  # most tokens of an embedding are in no text
                    kept, metric = moving, metric[moving]
            signs = torch.randint(2, (metric.numel(),), generator=generator, dtype=torch.int8) * 2 - 1
            roots[name] = kept, metric.reshape(-1).sqrt() * signs.to(metric.device)
        return roots


def _fold(vector: Tensor, root: Tensor, result: Tensor, start: int) -> int:
    """Adds `vector * root` to the buckets in turn from `start` on, round and round; returns the next bucket."""
    # In turn and not at random, so that the buckets stay in the processor's cache.
    position = 0
    while position < len(vector):
        count = min(len(result) - start, len(vector) - position)
        taken = slice(position, position + count)
        result[start : start + count].addcmul_(vector[taken], root[taken])
        position, start = position + count, (start + count) % len(result)
    return start
