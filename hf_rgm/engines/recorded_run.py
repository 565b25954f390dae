"""One recorded run with everything that engines ask of it."""

from __future__ import annotations

import functools

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
from hf_rgm.trajectory.path import RecordedPath
from hf_rgm.trajectory.states import TrajectoryState
from hf_rgm.trajectory.trajectory import Trajectory

MAX_RANK = {True: 600, False: 300}
"""Rows of curvature at a recorded state, whole and in short, where each takes a pass of its own; see docs/method.md
(which rows of curvature) for what fewer cost."""

ENOUGH_ROWS, MIN_RANK = 300, 16
"""Where fewer of the first fit of whole gradients, these are sketched; fewer of the second stand for nothing."""


class RecordedRun:
    """
    One recorded run, and where its gradients and curvature come from.

    Args:
        model (`FunctionalModel`): The model as a function of its parameters.
        trajectory (`Trajectory`): The recorded run.
        clusters (`ClusterMap`): Clusters of the training rows.
        samples (`SampleSource`, *optional*): The synset's samples.
        rows (`RowSource`, *optional*): The training rows; where they are given, gradients and curvature are theirs.
        responses (`Responses`, *optional*): What leaving each cluster out does, where the synset keeps it.
        max_states (`int`, *optional*): Recorded states that gradients and curvature are taken at. Defaults to all.
        max_bytes (`int`): Memory for engines, beside the recorded states.
        processes (`Processes`): Among which work is split.
        disable_tqdm (`bool`): No progress bars.
    """

    def __init__(
        self,
        model: FunctionalModel,
        trajectory: Trajectory,
        clusters: ClusterMap,
        *,
        samples: SampleSource | None = None,
        rows: RowSource | None = None,
        responses: Responses | None = None,
        max_states: int | None = None,
        max_bytes: int,
        processes: Processes,
        disable_tqdm: bool,
    ) -> None:
        self.model = model
        self.trajectory = trajectory
        self.clusters = clusters
        self.samples = samples
        self.rows = rows
        self.responses = responses
        self.max_bytes = max_bytes
        self._max_states = max_states
        self.processes = processes
        self.disable_tqdm = disable_tqdm or not processes.shows_progress
        self._paths: dict[tuple[float, int], RecordedPath] = {}
        self._curvature: dict[int, CurvatureRows] = {}
        self._maps: dict[tuple[int, int, int], SegmentMap] = {}

    @property
    def source(self) -> Source:
        """Where gradients and curvature come from: the rows, if they are at hand."""
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
        """Measures how far replayed models are from where training could have led."""
        initial = self._flat(self.trajectory.state(self.trajectory.state_steps[0]))
        sizes = torch.from_numpy(self.clusters.sizes)
        return DriftMeter(self.source.losses, sizes, initial=initial, final=self.final)

    @functools.cached_property
    def shares(self) -> MemoryShares:
        """How memory is divided."""
        return MemoryShares.of(self.max_bytes, with_rows=self.rows is not None)

    def path(self, rewind: float, stride: int = 1) -> RecordedPath:
        """The recorded path from a fraction of training on; a stride is for anchored replay."""
        key = (rewind, stride)
        if key not in self._paths:
            self._paths[key] = RecordedPath(
                self.trajectory,
                self.model.space,
                self.model.device,
                rewind=rewind,
                stride=stride,
                max_states=self._max_states,
                like=next(iter(self._paths.values()), None),
            )
        return self._paths[key]

    def segments(self, rewind: float) -> list[Segment]:
        """The segments of a path, in training order."""
        return self.form.segments(self.path(rewind))

    @functools.cached_property
    def form(self) -> GradientForm:
        """How the linear engine holds gradients: whole, unless these are so long that too few would fit."""
        length = self.model.num_parameters
        if length > SKETCH_LENGTH and self._fitting(length) < ENOUGH_ROWS:
            return SketchedGradients(self.model, self.path(0.0), SKETCH_LENGTH)
        return WholeGradients(self.model.space)

    def _fitting(self, length: int) -> int:
        return self.shares.curvature // (8 * length)  # once more for what is made of them

    @functools.cached_property
    def rank(self) -> int:
        """
        Rows of curvature at a state: those of [`MAX_RANK`], or as many as fit.

        Raises:
            ValueError: If so few fit that they would be of no use.
        """
        fitting = self._fitting(self.form.length)
        if fitting < MIN_RANK:
            raise ValueError(
                f"`max_memory` leaves room for {fitting} rows of curvature of {self.model.num_parameters} parameters; "
                f"at least {MIN_RANK} are needed. Raise it, or train fewer parameters (LoRA)."
            )
        return min(MAX_RANK[self.form.is_whole], fitting)

    def map_of(self, path: RecordedPath, segment: Segment) -> SegmentMap:
        """The linear map of a segment; those of all states are kept where they fit into memory."""
        key = (segment.state, segment.first, segment.last)
        if key in self._maps:
            return self._maps[key]
        found = SegmentMap(segment, self.curvature_at(path, segment.state))
        if self.keeps_maps:
            self._maps[key] = found
        return found

    def curvature_at(self, path: RecordedPath, state: int) -> CurvatureRows:
        """The curvature's rows at a recorded state; those of all states are kept where they fit into memory."""
        if state not in self._curvature:
            self._curvature = self._curvature if self.keeps_maps else {}  # pieces of a segment share its state's
            self._curvature[state] = self._rows_at(path, state)
        return self._curvature[state]

    @property
    def keeps_maps(self) -> bool:
        """Whether the maps of all states fit into memory: rows, and beside them the Gram matrix, its eigenvectors."""
        held = 4 * self.rank * (self.form.length + 3 * self.rank)
        return held * (self._max_states or len(self.trajectory.state_steps)) <= self.shares.curvature

    def cost_of_map(self, path: RecordedPath, segment: Segment) -> PieceOfWork:
        """What [`RecordedRun.map_of`] takes where nothing is known yet; holds what stays of one map."""

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
