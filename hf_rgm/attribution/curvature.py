"""Curvature along the recorded path: the synset's, or that of real rows where the synset has too little."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from hf_rgm.clusters import ClusterMap
from hf_rgm.losses import IGNORED_LABEL, RowLoss
from hf_rgm.modeling import FunctionalModel
from hf_rgm.rows import RowReader
from hf_rgm.synset.curvature import GaussNewton
from hf_rgm.synset.inputs import InputSpace
from hf_rgm.synset.samples import SyntheticSamples
from hf_rgm.trajectory.path import RecordedPath
from hf_rgm.trajectory.storage import Trajectory

logger = logging.getLogger(__name__)

MAX_FACTOR = 2.0
"""Between the synset's curvature and the rows'. Deviations settle where it balances the force: half doubles scores."""

NUM_PROBES = 8


@dataclass(frozen=True, eq=False)
class WeightedInputs:
    """
    Samples, or rows, whose Gauss-Newton matrices add up to the clusters'.

    Args:
        inputs (`dict[str, Tensor]`): The forward's keyword arguments, first dimension `num_samples`.
        weights (`Tensor`): `(num_samples, *positions)`, float32.
        clusters (`Tensor`): `(num_samples,)`, int64, the cluster of each.
    """

    inputs: Mapping[str, Tensor]
    weights: Tensor
    clusters: Tensor

    def masked(self, masks: Tensor) -> Tensor:
        """Weights under cluster weights `(num_masks, num_clusters)`: `(num_masks, num_samples, *positions)`."""
        own = masks[:, self.clusters]
        return own.reshape(*own.shape, *[1] * (self.weights.dim() - 1)) * self.weights


@dataclass(frozen=True, eq=False)
class RowSample:
    """
    Rows that stand for all of every cluster; every replay of an attribution meets the same.

    Args:
        inputs (`WeightedInputs`): The rows.
        shares (`dict`, *optional*): What was found of the synset's curvature in units of theirs, by run, recorded step
            and the step whose second moments were taken.
    """

    inputs: WeightedInputs
    shares: dict[tuple[Trajectory, int, int], float] = field(default_factory=dict)

    def found(self, key: tuple[Trajectory, int, int], share: float) -> None:
        """Keeps a share, and says so once where it is too far from 1."""
        if not _is_close(share) and all(map(_is_close, self.shares.values())):
            logger.warning(
                "The synset has %.2g times the rows' curvature at recorded step %d, which would make scores too %s. "
                "The curvature of %d rows takes its place wherever they differ by more than a factor of %g. Scores "
                "without `rows` need a synset with more samples or iterations.",
                share,
                key[1],
                "large" if share < 1 else "small",
                len(self.inputs.clusters),
                MAX_FACTOR,
            )
        self.shares[key] = share


@dataclass(frozen=True)
class StateCurvature:
    """
    The curvature at one recorded state.

    Args:
        matrix (`GaussNewton`): Of the samples.
        samples (`WeightedInputs`): Whose curvature it is.
    """

    matrix: GaussNewton
    samples: WeightedInputs

    @torch.no_grad()  # which lets a Jacobian be filled piece by piece
    def product(self, vectors: Tensor, masks: Tensor | None = None) -> Tensor:
        """`C v` for each of `(batch_size, num_parameters)`, under cluster weights `(batch_size, num_clusters)`."""
        return self.matrix.product(vectors, weights=None if masks is None else self.samples.masked(masks))


class PathCurvature:
    """
    The curvature at every recorded state.

    Synthetic samples are matched in their gradients, and a bad match can lack most of the rows' curvature. Nothing
    then holds deviations back, and scores grow with every step although each is stable. Where rows are given, their
    own curvature is looked at, and stands in for the synset's at every state where the two differ by more than a
    factor of two.

    Args:
        model (`FunctionalModel`): The trained model.
        inputs (`InputSpace`): The space of the synthetic inputs.
        samples (`SyntheticSamples`): The synset's samples, on the model's device.
        rows (`RowSample`, *optional*): What [`sample_rows`] drew.
        max_bytes (`int`, *optional*, defaults to `2**30`): Memory for the samples' Jacobian at a state.
        max_row_bytes (`int`, *optional*, defaults to `2**29`): Memory for that of the rows.
    """

    def __init__(
        self,
        model: FunctionalModel,
        inputs: InputSpace,
        samples: SyntheticSamples,
        *,
        rows: RowSample | None = None,
        max_bytes: int = 2**30,
        max_row_bytes: int = 2**29,
    ) -> None:
        num_clusters, per_cluster = samples.log_weights.shape[:2]
        flat = samples.flatten()
        clusters = torch.arange(num_clusters, device=flat.log_weights.device).repeat_interleave(per_cluster)
        self._model = model
        self._samples = WeightedInputs(inputs.to_forward(flat), flat.log_weights.exp(), clusters)
        self._rows = rows
        self._max_bytes = max_bytes
        self._max_row_bytes = max_row_bytes

    def at(self, path: RecordedPath, state: int) -> StateCurvature:
        """The curvature at a recorded step of a path."""
        if self._rows is None:
            return self._of_samples(path, state)
        first = {used: first for used, first, _ in path.segments()}.get(state, path.start)
        key = (path.trajectory, state, first)
        known = self._rows.shares.get(key)
        if known is not None:
            return self._of_samples(path, state) if _is_close(known) else self._of_rows(self._rows, path, state)
        own, rows = self._of_samples(path, state), self._of_rows(self._rows, path, state)
        share = self._share(own, rows, path.steps(first, first + 1)[0].precondition)
        self._rows.found(key, share)
        return own if _is_close(share) else rows

    def _of_samples(self, path: RecordedPath, state: int) -> StateCurvature:
        return self._of(self._samples, path, state, self._max_bytes)

    def _of_rows(self, rows: RowSample, path: RecordedPath, state: int) -> StateCurvature:
        return self._of(rows.inputs, path, state, self._max_row_bytes)

    @torch.no_grad()
    def _of(self, samples: WeightedInputs, path: RecordedPath, state: int, max_bytes: int) -> StateCurvature:
        matrix = GaussNewton(self._model, samples.inputs, samples.weights, path.state(state), max_bytes=max_bytes)
        return StateCurvature(matrix, samples)

    def _share(self, own: StateCurvature, rows: StateCurvature, precondition: Tensor) -> float:
        """The trace of one preconditioned curvature in units of the other, by the same random signs for both."""
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(2, (NUM_PROBES, self._model.num_parameters), generator=generator) * 2.0 - 1
        probes = signs.to(precondition) * precondition.sqrt()
        traces = [float((curvature.product(probes) * probes).sum()) for curvature in (own, rows)]
        return traces[0] / traces[1] if traces[1] > 0 else 1.0


def _is_close(share: float) -> bool:
    return 1 / MAX_FACTOR <= share <= MAX_FACTOR


def sample_rows(
    model: FunctionalModel,
    reader: RowReader,
    clusters: ClusterMap,
    row_loss: RowLoss,
    *,
    at_least: int,
    max_bytes: int = 2**29,
    seed: int = 0,
) -> RowSample:
    """
    Rows of every cluster that stand for all of it.

    Args:
        model (`FunctionalModel`): The trained model.
        reader (`RowReader`): The training rows.
        clusters (`ClusterMap`): Their clusters.
        row_loss (`RowLoss`): The loss of a row.
        at_least (`int`): Rows of each cluster, if it has as many.
        max_bytes (`int`, *optional*, defaults to `2**29`): As many more are drawn as have a Jacobian that fits here.
        seed (`int`, *optional*, defaults to `0`): Draws them.

    Returns:
        `RowSample`
    """
    with torch.no_grad():
        outputs = model.logits(model.parameters(), reader.batch([0])[0]).numel()
    count = max(at_least, max_bytes // (4 * model.num_parameters * outputs * clusters.num_clusters))
    generator = np.random.default_rng(seed)
    drawn = [generator.permutation(clusters.rows(k))[:count] for k in range(clusters.num_clusters)]
    inputs, labels = reader.batch(np.concatenate(drawn))
    ids = torch.tensor(np.repeat(np.arange(len(drawn)), [len(rows) for rows in drawn]), device=labels.device)
    stands_for = torch.tensor([size / len(rows) for size, rows in zip(clusters.sizes, drawn, strict=True)])
    own = stands_for.float().to(labels.device)[ids] / (len(reader) * row_loss.labels_per_row)
    weights = (labels != IGNORED_LABEL) * own.reshape(-1, *[1] * (labels.dim() - 1))
    return RowSample(WeightedInputs(inputs, weights, ids))
