"""The model and the recorded runs that questions are about, by a synset or by the runs themselves."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_rgm.clusters.cluster_map import ClusterMap
from hf_rgm.engines.gradient_sources import RowSource, SampleSource, training_rows
from hf_rgm.engines.memory_shares import MemoryShares
from hf_rgm.engines.recorded_run import RecordedRun
from hf_rgm.model.functional_model import FunctionalModel, parameters_sha256
from hf_rgm.model.losses import LossFunction, RowLoss
from hf_rgm.model.processes import Processes
from hf_rgm.model.row_reader import DataCollator, RowReader
from hf_rgm.synset.compatibility import check_runs, check_samples, open_runs, row_loss_of
from hf_rgm.synset.inputs import SPACES, input_space
from hf_rgm.synset.synset import Synset
from hf_rgm.trajectory.exposure import Exposure
from hf_rgm.trajectory.trajectory import Trajectory


@dataclass(frozen=True, eq=False)
class Subject:
    """Model and recorded runs that questions are about; the model's own run comes first."""

    model: FunctionalModel
    row_loss: RowLoss
    trajectories: tuple[Trajectory, ...]
    clusters: ClusterMap
    parameters_sha256: str  # identity of the trained parameters
    synset: Synset | None = None
    samples: SampleSource | None = None  # the synset's

    @property
    def trajectory(self) -> Trajectory:
        """Recorded run of the model."""
        return self.trajectories[0]

    @functools.cached_property
    def samples_sha256(self) -> str:
        """Identity of the synset's samples; empty without a synset."""
        return "" if self.synset is None else self.synset.samples_sha256

    @property
    def model_description(self) -> dict[str, Any]:
        """Description of the model in the recorded run."""
        described = self.trajectory.metadata.get("model")
        return dict(described) if isinstance(described, dict) else {}

    @property
    def fidelity(self) -> dict[str, Any] | None:
        """Agreement of the synset with retraining, if it was measured."""
        return None if self.synset is None else self.synset.fidelity


def subject_of_runs(
    model: nn.Module,
    trajectory: str | Path | Trajectory | Sequence[str | Path | Trajectory] | None,
    *,
    rows: Any,
    clusters: ClusterMap | None,
    data_collator: DataCollator | None,
    device: torch.device | str | None,
    function: LossFunction | None,
    force: bool,
) -> Subject:
    """Subject of recorded runs; raises a `ValueError` unless runs, rows, clusters and model belong together."""
    given = {"trajectory": trajectory, "rows": rows, "clusters": clusters}
    missing = [f"`{name}`" for name, value in given.items() if value is None]
    if trajectory is None or clusters is None or missing:
        raise ValueError(
            "Without a synset, attribution needs the recorded run, the training dataset and its clusters; missing: "
            f"{', '.join(missing)}. Pass `trajectory=`, `rows=` and `clusters=`, or `synset=`."
        )
    trajectories = open_runs(trajectory, model, rows, data_collator, function)
    functional = _functional(model, trajectories[0], device)
    reader = training_rows(rows, functional, clusters, data_collator, trajectories[0])
    if not force:
        check_runs(functional, trajectories, rows, called="rows")
    row_loss = row_loss_of(trajectories, reader, function, force=force)
    return Subject(functional, row_loss, trajectories, clusters, parameters_sha256(functional.parameters()))


def _functional(model: nn.Module, trajectory: Trajectory, device: torch.device | str | None) -> FunctionalModel:
    """The model as a function of the parameters that a run trained."""
    names = tuple(trajectory.parameter_shapes)
    return FunctionalModel(model, trainable_names=names, device=device, shifts_labels=trajectory.shifts_labels)


def subject_of_synset(
    model: nn.Module,
    synset: Synset | str | Path,
    *,
    device: torch.device | str | None,
    function: LossFunction | None,
    force: bool,
) -> Subject:
    """Subject of a synset; raises an error unless it was distilled for the model."""
    synset = synset if isinstance(synset, Synset) else Synset.from_pretrained(synset)
    functional = _functional(model, synset.trajectory, device)
    synset.check_model(functional, force=force)
    name = synset.input_name
    inputs = input_space(functional, name if name in SPACES else "auto")
    if inputs.name != name:
        raise ValueError(
            f"The synset's samples are `{name}`, the model takes `{inputs.name}`. Pass the model that was recorded."
        )
    check_samples(functional, inputs, synset.samples)
    row_loss = RowLoss(
        labels_per_row=float(synset.metadata.get("labels_per_row", 1.0)),
        label_smoothing=float(synset.metadata.get("label_smoothing_factor", 0.0)),
        function=function,
        scale=float(synset.metadata.get("loss_scale", 1.0)),
    )
    samples = SampleSource(functional, inputs, synset.samples.map(lambda tensor: tensor.to(functional.device)))
    return Subject(
        functional, row_loss, synset.trajectories, synset.clusters, synset.parameters_sha256, synset, samples
    )


@dataclass(eq=False)
class KnownRuns:
    """Recorded runs with the rows of the last question; gradients and curvature stay while the rows stay the same."""

    subject: Subject
    max_bytes: int  # beside the recorded states
    processes: Processes
    disable_tqdm: bool
    _known: tuple[Any, DataCollator | None, list[RecordedRun]] | None = field(default=None, init=False)

    def of(self, rows: Any, collator: DataCollator | None) -> list[RecordedRun]:
        """Runs with the training rows, or without any; raises a `ValueError` for other rows."""
        if self._known is not None and self._known[0] is rows and (rows is None or self._known[1] is collator):
            return self._known[2]
        subject, reader = self.subject, None
        if rows is not None:
            custom = subject.synset is not None and subject.synset.metadata.get("custom_row_loss")
            if custom and subject.row_loss.function is None:
                raise ValueError(
                    "The synset was distilled with a `row_loss` of its own, which rows are scored by. Pass the same "
                    "function as `row_loss`."
                )
            reader = training_rows(rows, subject.model, subject.clusters, collator, subject.trajectory)
            reader.warn_of_draws()
            subject.trajectory.check_dataset(rows, what="rows")
        runs = [self._run(trajectory, reader) for trajectory in subject.trajectories]
        self._known = rows, collator, runs
        return runs

    def _run(self, trajectory: Trajectory, reader: RowReader | None) -> RecordedRun:
        subject, rows = self.subject, None
        exposure = Exposure(trajectory, subject.clusters)
        max_bytes = self.max_bytes // len(subject.trajectories)
        if reader is not None:
            kept = MemoryShares.of(max_bytes, with_rows=True).kept
            source = (subject.model, reader, subject.clusters, subject.row_loss)
            rows = RowSource(*source, max_bytes=kept, processes=self.processes, exposure=exposure)
        return RecordedRun(
            subject.model,
            trajectory,
            subject.clusters,
            samples=None if subject.samples is None else replace(subject.samples, exposure=exposure),
            rows=rows,
            responses=None if subject.synset is None else subject.synset.responses,
            max_states=exposure.max_states,
            max_bytes=max_bytes,
            processes=self.processes,
            disable_tqdm=self.disable_tqdm,
        )
