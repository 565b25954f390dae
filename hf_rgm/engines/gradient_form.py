"""The form that engines hold gradients in: whole, or of many parameters in short."""

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

SKETCH_LENGTH = 2**16
"""Buckets of a sketch: inner products of gradients have a standard deviation of about 1/256 of their lengths."""

MAX_KEPT_SHARE = 0.75
"""Of the leading rows of a parameter, up to which those that never moved are left out: tokens that no text has."""


class GradientForm(ABC):
    """A linear map from named gradients to vectors, in which deviations and sensitivities are followed."""

    is_whole: ClassVar[bool]

    @property
    @abstractmethod
    def length(self) -> int:
        """Of a vector."""

    @abstractmethod
    def named(self, vector: Tensor) -> dict[str, Tensor]:
        """Parameters `(num_parameters,)` by name, as gradients are to be taken by."""

    @abstractmethod
    def __call__(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """Gradients `(*batch, *shape)` as `(*batch, length)`, float32."""

    @abstractmethod
    def segments(self, path: RecordedPath) -> list[Segment]:
        """The segments of a path for vectors of this form."""


@dataclass(frozen=True)
class WholeGradients(GradientForm):
    """
    Gradients as they are, one after the other.

    Args:
        space (`ParameterSpace`): The trainable parameters.
    """

    space: ParameterSpace
    is_whole: ClassVar = True

    @property
    def length(self) -> int:
        """Number of parameters."""
        return self.space.num_parameters

    def named(self, vector: Tensor) -> dict[str, Tensor]:
        """Parameters `(num_parameters,)` by name."""
        return self.space.unflatten(vector)

    def __call__(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """Gradients `(*batch, *shape)` as `(*batch, num_parameters)`."""
        return self.space.flatten(gradients)

    def segments(self, path: RecordedPath) -> list[Segment]:
        """The segments, each with a preconditioner of its own."""
        return segments_of(path)


class SketchedGradients(GradientForm):
    """
    Gradients scaled by the root of one preconditioner, with random signs, folded into a few buckets.

    Inner products of what is folded are, in expectation, those of gradients in the metric of the preconditioner, which
    is all that the linear engine asks of parameters (docs/method.md, many parameters). One preconditioner stands for
    all segments of a run, each with a factor of its own; elements that never moved are left out.

    Args:
        model (`FunctionalModel`): The model.
        path (`RecordedPath`): A path of the run, whose states the preconditioner is the geometric mean of.
        length (`int`): Buckets.
        seed (`int`): Of the signs.
    """

    is_whole = False

    def __init__(self, model: FunctionalModel, path: RecordedPath, length: int, seed: int = 0) -> None:
        self._model = model
        self._length = length
        self._path = path
        self._seed = seed

    @property
    def length(self) -> int:
        """Number of buckets."""
        return self._length

    def named(self, vector: Tensor) -> dict[str, Tensor]:
        """Parameters `(num_parameters,)` by name, of embeddings those rows that ever moved."""
        named = self._model.space.unflatten(vector)
        return {name: value[self._partial[name]] if name in self._partial else value for name, value in named.items()}

    def __call__(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """Gradients `(*batch, *shape)` as `(*batch, length)`."""
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
        """
        The segments, the preconditioner of each being one number: what it is times the common one.

        Raises:
            NotImplementedError: If weight decay goes through the gradient and differs between elements.
        """
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
        """The common preconditioner, up to a factor: `(num_parameters,)`, float32."""
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
        """How much an element counts for a segment's factor: its mean squared gradient, where that is known."""
        path = self._path
        if not path.is_adaptive:
            return torch.ones(1, device=path.device)
        return path.second_moment(path.trajectory.num_steps)

    @functools.cached_property
    def _partial(self) -> dict[str, Tensor]:
        """The rows of embeddings that ever moved, where the others can be left out."""
        some = {name: kept for name, (kept, _) in self._roots.items() if kept is not None}
        return {name: kept for name, kept in some.items() if self._model.give_rows(name, kept)}

    @functools.cached_property
    def _roots(self) -> dict[str, tuple[Tensor | None, Tensor]]:
        """For each parameter which of its leading rows ever move, if many do not, and the signed roots of these."""
        generator = torch.Generator().manual_seed(self._seed)
        roots: dict[str, tuple[Tensor | None, Tensor]] = {}
        for name, metric in self._path.space.unflatten(self._metric).items():
            kept = None
            if metric.dim() > 1:
                moving = torch.nonzero((metric > 0).flatten(1).any(1))[:, 0]
                if len(moving) <= MAX_KEPT_SHARE * len(metric):
                    kept, metric = moving, metric[moving]
            signs = torch.randint(2, (metric.numel(),), generator=generator, dtype=torch.int8) * 2 - 1
            roots[name] = kept, metric.reshape(-1).sqrt() * signs.to(metric.device)
        return roots


def _fold(vector: Tensor, root: Tensor, result: Tensor, start: int) -> int:
    """Adds `vector * root` to the buckets, one after the other from one on and round again; returns the next."""
    # A bucket for each element in turn, so that the buckets stay in the processor's cache.
    position = 0
    while position < len(vector):
        count = min(len(result) - start, len(vector) - position)
        taken = slice(position, position + count)
        result[start : start + count].addcmul_(vector[taken], root[taken])
        position, start = position + count, (start + count) % len(result)
    return start
