"""What is asked about: the recorded runs of a model, by a synset or by themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_rgm.clusters.cluster_map import ClusterMap
from hf_rgm.engines.gradient_sources import SampleSource
from hf_rgm.model.functional_model import FunctionalModel, parameters_sha256
from hf_rgm.model.losses import LossFunction, RowLoss
from hf_rgm.model.row_reader import RowReader
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


def row_loss_of_synset(synset: Synset, function: LossFunction | None) -> RowLoss:
    """The loss that a synset's rows were trained by."""
    return RowLoss(
        labels_per_row=float(synset.metadata.get("labels_per_row", 1.0)),
        label_smoothing=float(synset.metadata.get("label_smoothing_factor", 0.0)),
        function=function,
    )


def row_loss_of_runs(
    model: FunctionalModel,
    trajectories: tuple[Trajectory, ...],
    rows: Any,
    reader: RowReader,
    function: LossFunction | None,
    *,
    force: bool,
) -> RowLoss:
    """
    The loss that rows were trained by, once runs, rows and model are seen to belong together.

    Raises:
        ValueError: If they do not, or the loss is none that is known.
    """
    if not force:
        check_runs(model, trajectories, rows, called="rows")
    return row_loss_of(trajectories, reader, function)


def checked_samples(synset: Synset, model: FunctionalModel, *, force: bool) -> SampleSource:
    """
    The synset's samples, once they are seen to be the model's.

    Raises:
        ParameterMismatchError: If the synset was distilled for other parameters.
        ValueError: If the model does not take the samples.
    """
    synset.check_model(model, force=force)
    warn_unless_matched(synset.matched_states, synset.residuals)
    name = synset.input_name
    inputs = input_space(model, name if name in SPACES else "auto")
    if inputs.name != name:
        raise ValueError(
            f"The synset's samples are `{name}`, the model takes `{inputs.name}`. Pass the model that was recorded."
        )
    check_samples(model, inputs, synset.samples)
    return SampleSource(model, inputs, synset.samples.map(lambda tensor: tensor.to(model.device)))
