"""What is asked about: the recorded runs of a model, by a synset or by themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from hf_rgm.clusters.cluster_map import ClusterMap
from hf_rgm.engines.gradient_sources import SampleSource, training_rows
from hf_rgm.model.functional_model import FunctionalModel, parameters_sha256
from hf_rgm.model.losses import LossFunction, RowLoss
from hf_rgm.model.row_reader import DataCollator
from hf_rgm.synset.compatibility import check_runs, check_samples, row_loss_of, warn_unless_matched
from hf_rgm.synset.inputs import SPACES, input_space
from hf_rgm.synset.synset import Synset
from hf_rgm.trajectory.trajectory import Trajectory


@dataclass(frozen=True, eq=False)
class Subject:
    """
    The recorded runs that are asked about, the model's own first.

    Args:
        trajectories (`tuple[Trajectory, ...]`): The runs.
        clusters (`ClusterMap`): Clusters of their training rows.
        parameters_sha256 (`str`): Identity of the trained parameters.
        samples_sha256 (`str`): Identity of the synset's samples; empty without a synset.
        model_description (`dict`): What the recorded run says of the model.
        fidelity (`dict`, *optional*): How well the synset agrees with retraining, if that was measured.
    """

    trajectories: tuple[Trajectory, ...]
    clusters: ClusterMap
    parameters_sha256: str
    samples_sha256: str
    model_description: dict[str, Any]
    fidelity: dict[str, Any] | None = None

    @property
    def trajectory(self) -> Trajectory:
        """The recorded run of the model."""
        return self.trajectories[0]

    @classmethod
    def of_synset(cls, synset: Synset) -> Subject:
        """The runs that a synset was distilled from."""
        return cls(
            synset.trajectories,
            synset.clusters,
            synset.parameters_sha256,
            synset.samples_sha256,
            synset.model_description,
            synset.fidelity,
        )

    @classmethod
    def of_runs(cls, model: FunctionalModel, trajectories: tuple[Trajectory, ...], clusters: ClusterMap) -> Subject:
        """The runs themselves."""
        described = trajectories[0].metadata.get("model")
        return cls(
            trajectories,
            clusters,
            parameters_sha256(model.parameters()),
            "",
            dict(described) if isinstance(described, dict) else {},
        )


def recorded_trajectories(
    trajectory: str | Path | Trajectory | Sequence[str | Path | Trajectory] | None,
    *,
    rows: Any,
    clusters: ClusterMap | None,
) -> tuple[tuple[Trajectory, ...], ClusterMap]:
    """
    Opens recorded runs that are asked about without a synset, and sees that there are rows and clusters.

    Raises:
        ValueError: If there is no run, or what else is needed is missing.
    """
    given = {"trajectory": trajectory, "rows": rows, "clusters": clusters}
    missing = [name for name, value in given.items() if value is None]
    if missing or clusters is None:
        raise ValueError(
            f"Without a synset, attribution needs the recorded run, the training dataset and its clusters; missing: "
            f"{', '.join(f'`{name}`' for name in missing)}. Pass `trajectory=`, `rows=` and `clusters=`, or `synset=`."
        )
    recorded = [trajectory] if isinstance(trajectory, str | Path | Trajectory) else list(trajectory or ())
    if not recorded:
        raise ValueError("`trajectory` is an empty list. Name at least the run that trained the model.")
    return tuple(t if isinstance(t, Trajectory) else Trajectory.load(t) for t in recorded), clusters


def check_only_synset(trajectory: Any, clusters: ClusterMap | None) -> None:
    """Refuses a recorded run or clusters beside a synset, with a `ValueError`."""
    if trajectory is not None or clusters is not None:
        raise ValueError(
            "The synset knows its recorded run and its clusters. Pass either `synset=`, or `trajectory=`, `rows=` "
            "and `clusters=`."
        )


class Opened(NamedTuple):
    """A model with what is asked about."""

    model: FunctionalModel
    subject: Subject
    synset: Synset | None
    samples: SampleSource | None
    row_loss: RowLoss


def of_runs(
    model: nn.Module,
    trajectories: tuple[Trajectory, ...],
    clusters: ClusterMap,
    rows: Any,
    data_collator: DataCollator | None,
    *,
    device: torch.device | str | None,
    function: LossFunction | None,
    force: bool,
) -> Opened:
    """
    A model with its recorded runs, once runs, rows and model are seen to belong together.

    Raises:
        ValueError: If they do not, or the loss is none that is known.
    """
    functional = _functional(model, trajectories[0], device)
    reader = training_rows(rows, functional, clusters, data_collator, trajectories[0])
    if not force:
        check_runs(functional, trajectories, rows, called="rows")
    row_loss = row_loss_of(trajectories, reader, function, force=force)
    return Opened(functional, Subject.of_runs(functional, trajectories, clusters), None, None, row_loss)


def _functional(model: nn.Module, trajectory: Trajectory, device: torch.device | str | None) -> FunctionalModel:
    """The model as a function of the parameters that a run trained."""
    names = tuple(trajectory.parameter_shapes)
    return FunctionalModel(model, trainable_names=names, device=device, shifts_labels=trajectory.shifts_labels)


def of_synset(
    model: nn.Module,
    synset: Synset | str | Path,
    *,
    has_rows: bool,
    device: torch.device | str | None,
    function: LossFunction | None,
    force: bool,
) -> Opened:
    """
    A model with its synset, once the samples are seen to be the model's.

    Raises:
        ParameterMismatchError: If the synset was distilled for other parameters.
        ValueError: If the model does not take the samples.
    """
    synset = synset if isinstance(synset, Synset) else Synset.from_pretrained(synset)
    functional = _functional(model, synset.trajectory, device)
    synset.check_model(functional, force=force)
    if not has_rows and synset.responses is None:  # else nothing depends on the samples
        warn_unless_matched(synset.matched_states, synset.residuals)
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
    return Opened(functional, Subject.of_synset(synset), synset, samples, row_loss)
