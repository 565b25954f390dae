"""Recorded run with everything that engines ask of it: paths, segments, curvature and their memory."""

from __future__ import annotations

import functools
from dataclasses import KW_ONLY, dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from hf_rgm.clusters.cluster_map import ClusterMap
from hf_rgm.engines.curvature import CurvatureRows, curvature_rows
from hf_rgm.engines.drift import DriftMeter
from hf_rgm.engines.gradient_form import SKETCH_LENGTH, GradientForm, SketchedGradients, WholeGradients
from hf_rgm.engines.gradient_sources import RowSource, SampleSource, Source
from hf_rgm.engines.memory_shares import MemoryShares
from hf_rgm.engines.segment_map import SegmentMap
from hf_rgm.engines.segments import Segment
from hf_rgm.model.cost_estimates import PieceOfWork, measured
from hf_rgm.model.functional_model import FunctionalModel
from hf_rgm.model.processes import Processes
from hf_rgm.synset.responses import Responses
from hf_rgm.trajectory.exposure import Exposure
from hf_rgm.trajectory.path import RecordedPath
from hf_rgm.trajectory.states import TrajectoryState
from hf_rgm.trajectory.trajectory import Trajectory

Part = TypeVar("Part")

# Rows of curvature at a state, whole and sketched, where each takes a pass of its own; docs/method.md (which rows of
# curvature) says what fewer cost.
MAX_RANK = {True: 600, False: 300}

# With fewer rows of whole gradients than the first, gradients are sketched; fewer than the second are of no use.
ENOUGH_ROWS, MIN_RANK = 300, 16


def given(part: Part | None, what: str) -> Part:
    """A part of a run that the registry has checked for."""
    if part is None:
        raise RuntimeError(f"This engine needs {what}.")
    return part


@dataclass(eq=False, repr=False)
class RecordedRun:
    """One recorded run, with the source of its gradients and curvature."""

    model: FunctionalModel
    trajectory: Trajectory
    clusters: ClusterMap
    _: KW_ONLY
    samples: SampleSource | None = None
    rows: RowSource | None = None
    responses: Responses | None = None
    exposure: Exposure = field(init=False)
    max_states: int | None = None  # recorded states in use; all by default
    max_bytes: int  # for engines, beside the recorded states
    processes: Processes
    disable_tqdm: bool

    def __post_init__(self) -> None:
        source = self.rows or self.samples
        known = None if source is None else source.exposure
        self.exposure = known or Exposure(self.trajectory, self.clusters)
        self.disable_tqdm = self.disable_tqdm or not self.processes.shows_progress
        self._paths: dict[tuple[float, int], RecordedPath] = {}
        self._curvature: dict[int, CurvatureRows] = {}
        self._maps: dict[tuple[int, int, int], SegmentMap] = {}
        self.single_drifts: dict[float, float] = {}  # of the linear engine by rewind, once they are known

    @property
    def source(self) -> Source:
        """Source of gradients and curvature: the rows if there are any, else the samples."""
        source = self.rows or self.samples
        if source is None:
            raise RuntimeError("A run has rows or samples.")
        return source

    @functools.cached_property
    def final(self) -> Tensor:
        """The trained parameters, `(num_parameters,)`, float32."""
        return self._flat(self.trajectory.final)

    @functools.cached_property
    def drift_meter(self) -> DriftMeter:
        first, loss = self.trajectory.state_steps[0], self.trajectory.metadata.get("initial_loss")
        initial, sizes = self._flat(self.trajectory.state(first)), torch.from_numpy(self.clusters.sizes)
        if first > 0 and loss is None:  # then drift is not known, and nothing drifts
            loss = torch.finfo(torch.float32).max
        return DriftMeter(self.source.losses, sizes, initial=initial, final=self.final, initial_loss=loss)

    @functools.cached_property
    def shares(self) -> MemoryShares:
        return MemoryShares.of(self.max_bytes, with_rows=self.rows is not None)

    def path(self, rewind: float, stride: int = 1) -> RecordedPath:
        """Recorded path from a fraction of training on; the stride is for anchored replay."""
        key = (rewind, stride)
        if key not in self._paths:
            self._paths[key] = RecordedPath(
                self.trajectory,
                self.model.space,
                self.model.device,
                rewind=rewind,
                stride=stride,
                max_states=self.max_states,
                like=next(iter(self._paths.values()), None),
            )
        return self._paths[key]

    def segments(self, rewind: float) -> list[Segment]:
        """Segments of a path, in training order."""
        return self.form.segments(self.path(rewind))

    @functools.cached_property
    def form(self) -> GradientForm:
        """Form of gradients in the linear engine: whole, unless too few rows of curvature would fit into memory."""
        length = self.model.num_parameters
        if length > SKETCH_LENGTH and self._fitting(length) < ENOUGH_ROWS:
            return SketchedGradients(self.model, self.path(0.0), SKETCH_LENGTH)
        return WholeGradients(self.model.space)

    def _fitting(self, length: int) -> int:
        return self.shares.curvature // (8 * length)  # float32, and once more for temporaries

    @functools.cached_property
    def rank(self) -> int:
        """Rows of curvature at a state: `MAX_RANK`, or as many as fit."""
        fitting = self._fitting(self.form.length)
        if fitting < MIN_RANK:
            raise ValueError(
                f"`max_memory` leaves room for {fitting} rows of curvature of {self.model.num_parameters} parameters; "
                f"at least {MIN_RANK} are needed. Raise it, or train fewer parameters (LoRA)."
            )
        return min(MAX_RANK[self.form.is_whole], fitting)

    def map_of(self, path: RecordedPath, segment: Segment) -> SegmentMap:
        """Linear map of a segment, kept if those of all states fit into memory."""
        key = (segment.state, segment.first, segment.last)
        found = self._maps.get(key) or SegmentMap(segment, self.curvature_at(path, segment.state))
        if self.keeps_maps:
            self._maps[key] = found
        return found

    def curvature_at(self, path: RecordedPath, state: int) -> CurvatureRows:
        """Rows of curvature at a recorded state, kept if those of all states fit into memory."""
        if state not in self._curvature:
            if not self.keeps_maps:
                self._curvature = {}  # but the last: pieces of a segment share its state's
            self._curvature[state] = self._rows_at(path, state)
        return self._curvature[state]

    @property
    def keeps_maps(self) -> bool:
        """Whether the maps of all states fit into memory."""
        # Rows, and three matrices of their inner products: the Gram matrix, its eigenvectors, a temporary.
        held = 4 * self.rank * (self.form.length + 3 * self.rank)
        return held * (self.max_states or len(self.trajectory.state_steps)) <= self.shares.curvature

    def cost_of_map(self, path: RecordedPath, segment: Segment) -> PieceOfWork:
        """Cost of `map_of` where nothing is known yet; `held_bytes` are what stays of one map."""

        def made() -> SegmentMap:
            found = SegmentMap(segment, self._rows_at(path, segment.state))
            found.prepare()
            return found

        return measured(made)

    def _rows_at(self, path: RecordedPath, state: int) -> CurvatureRows:
        return curvature_rows(
            self.model, self.source.weighted_inputs, path.state(state), rank=self.rank, seed=state, form=self.form
        )

    def _flat(self, state: TrajectoryState) -> Tensor:
        return self.model.space.flatten(state.parameters).to(self.model.device)
