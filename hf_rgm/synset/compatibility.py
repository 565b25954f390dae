"""Checks that model, recorded runs, rows and synthetic samples belong together."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_rgm.files.reading import printable
from hf_rgm.model.architecture import difference
from hf_rgm.model.functional_model import FunctionalModel, parameters_sha256
from hf_rgm.model.losses import LOSSES_OF_NUMBERS, LossFunction, RowLoss
from hf_rgm.model.row_reader import DataCollator, RowReader
from hf_rgm.model.warn_once import warn_once
from hf_rgm.synset.inputs import ContinuousInputs
from hf_rgm.synset.matched_states import MatchedState
from hf_rgm.synset.samples import SyntheticSamples
from hf_rgm.trajectory.description import has_checkpoints
from hf_rgm.trajectory.trained_loss import TrainedLoss
from hf_rgm.trajectory.trajectory import Trajectory

logger = logging.getLogger(__name__)

CROSS_ENTROPY_TYPE = "nll"
"""TRL's name for the cross entropy. The plain `Trainer` records no name."""

SAME_SCALE, SAME_LOSS = 0.02, 1e-3
"""Relative differences of scales (to 16 bits) and losses (float32) that rounding explains."""


def open_runs(
    trajectory: str | Path | Trajectory | Sequence[str | Path | Trajectory],
    model: nn.Module,
    train_dataset: Any,
    data_collator: DataCollator | None,
    row_loss: LossFunction | None,
) -> tuple[Trajectory, ...]:
    """Recorded runs, read from their folders or checkpoints where these are given."""
    runs = [trajectory] if isinstance(trajectory, str | Path | Trajectory) else list(trajectory)
    if not runs:
        raise ValueError("`trajectory` is an empty list. Name at least the run that trained the model.")

    options: dict[str, Any] = {"data_collator": data_collator, "row_loss": row_loss}
    opened: list[Trajectory] = []
    for run in runs:
        if isinstance(run, Trajectory):
            opened.append(run)
        elif not has_checkpoints(run):
            opened.append(Trajectory.load(run))
        else:  # the model is that of the first run; the others end where it does
            num_steps = opened[0].num_steps if opened else None
            made = Trajectory.from_checkpoints(run, model, train_dataset, **options, num_steps=num_steps)
            opened.append(made)
    return tuple(opened)


def check_runs(
    model: FunctionalModel, trajectories: Sequence[Trajectory], train_dataset: Any, *, called: str = "train_dataset"
) -> None:
    """Checks recorded runs against the model that the first one trained, and against their dataset."""
    found = dict(zip(model.space.names, map(tuple, model.space.shapes), strict=True))
    for run, trajectory in enumerate(trajectories):
        what = f"Run {run}: the" if run else "The"
        expected = {name: tuple(shape) for name, shape in trajectory.parameter_shapes.items()}
        if expected != found:
            different = sorted(set(expected.items()) ^ set(found.items()))
            raise ValueError(
                f"{what} model's parameters have other shapes than the recorded ones; first difference: "
                f"{different[0]}. Pass the model that was trained."
            )
        trajectory.check_dataset(train_dataset, what=called)
    other = other_function(model, trajectories[0])
    if other is not None:
        raise ValueError(f"{other} Pass the model as the Trainer left it.")
    final, own = trajectories[0].final.parameters, model.parameters()
    for name in found:
        if not torch.equal(final[name], own[name].cpu()):
            raise ValueError(
                f"The model's `{name}` is not what the recorded run ended with. Pass the model as the Trainer "
                "left it (not a later fine-tune, not the initial checkpoint)."
            )
    ends: dict[str, int] = {}
    for run, trajectory in enumerate(trajectories):
        twin = ends.setdefault(parameters_sha256(trajectory.final.parameters), run)
        if twin != run:
            raise ValueError(
                f"Runs {twin} and {run} end at the same parameters: they are the same run. Train each with a seed "
                "of its own."
            )


def other_function(model: FunctionalModel, trajectory: Trajectory) -> str | None:
    """How a model differs from the recorded one in configuration or frozen parameters; `None` if it does not."""
    settings, frozen = trajectory.metadata.get("architecture"), trajectory.metadata.get("frozen_sha256")
    changed = difference(settings, model.module) if settings else None
    if changed is not None:
        return f"The model's configuration is not that of the recorded one: {printable(changed)[:300]}."
    if frozen not in (None, model.frozen_sha256()):
        return (
            "The model's parameters that were not trained are not those of the recorded run (another base model, "
            "revision or dtype)."
        )
    return None


def row_loss_of(
    trajectories: Sequence[Trajectory], reader: RowReader, function: LossFunction | None, *, force: bool = False
) -> RowLoss:
    """Loss of a row in the recorded runs, which must share it; a `function` if the training had a loss of its own."""
    losses = [
        (str(told.get("loss_type") or CROSS_ENTROPY_TYPE), float(told.get("label_smoothing_factor") or 0.0))
        for told in (trajectory.metadata for trajectory in trajectories)
    ]
    for run, loss in enumerate(losses):
        for name, own, first in zip(("loss_type", "label_smoothing_factor"), loss, losses[0], strict=True):
            if own != first:
                raise ValueError(
                    f"Run {run} was trained with `{name}={own!r}`, run 0 with `{name}={first!r}`: one synset "
                    "stands for one loss. Distil a synset for each, or train all with the same settings but the "
                    "seed."
                )
    loss_type, label_smoothing = losses[0]
    trained = trajectories[0].trained_loss
    if function is None and loss_type != CROSS_ENTROPY_TYPE and trained is None:
        raise ValueError(
            f"The recorded run was trained with `loss_type={loss_type!r}`, which is not the cross entropy. Pass "
            "the loss of each row as `row_loss`."
        )
    scales = [1.0 if each is None else each.scale for each in (t.trained_loss for t in trajectories)]
    far = next((run for run, scale in enumerate(scales) if not math.isclose(scale, scales[0], rel_tol=SAME_SCALE)), 0)
    if far:
        raise ValueError(
            f"The loss of run {far} is {scales[far] / scales[0]:.3g} times that of run 0 (gradient accumulation?): "
            "one synset stands for one loss. Distil a synset for each, or train all with the same settings but the "
            "seed."
        )
    if function is None and trained is not None and trained.name is not None:
        function = LOSSES_OF_NUMBERS[trained.name]
    counts_first = trained is not None and trained.counts_first
    row_loss = RowLoss(reader.labels_per_row(as_trained=counts_first), label_smoothing, function, scales[0])
    if not force:
        check_losses(trained, reader, row_loss)
    return row_loss


def check_losses(trained: TrainedLoss | None, reader: RowReader, row_loss: RowLoss) -> None:
    """Checks the losses of some rows under the trained parameters against those at the end of training."""
    if trained is not None and trained.custom and row_loss.function is None:
        raise ValueError(
            "The run was recorded with a `row_loss` of its own. Pass the same function as `row_loss` here."
        )
    if trained is None or not trained.rows:
        return
    model, (inputs, labels) = reader.model, reader.batch(trained.rows)
    with torch.no_grad():
        own = replace(row_loss, labels_per_row=1.0, scale=1.0)(model.logits(model.parameters(), inputs), labels).cpu()
    recorded = torch.tensor(trained.losses)
    if not torch.allclose(own, recorded, rtol=SAME_LOSS, atol=SAME_LOSS * float(recorded.abs().mean())):
        raise ValueError(
            f"Rows {trained.rows} have losses {[round(x, 3) for x in own.tolist()]}; at the end of training they had "
            f"{[round(x, 3) for x in trained.losses]}. Pass the `data_collator` that the Trainer used "
            f"({trained.data_collator}), the same `row_loss`, and the rows as they were."
        )


def check_samples(model: FunctionalModel, inputs: ContinuousInputs, samples: SyntheticSamples) -> None:
    """Checks samples by trying the model on one of them."""
    # Ids first: on a GPU an id out of range would end the process.
    ids = samples.input_ids
    if ids is not None and int(ids.max()) >= model.vocabulary_size:
        raise ValueError(
            f"The synset has token {int(ids.max())}, but the model's vocabulary has {model.vocabulary_size}. It is "
            "not a synset of this model."
        )
    flat = samples[:1].flatten()
    one = flat[:1]
    try:
        with torch.no_grad():
            logits = model.logits(model.parameters(), inputs.to_forward(one))
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        shape = tuple(one.inputs.shape[1:])
        raise ValueError(
            f"The model does not take the synset's samples, `{inputs.name}` of shape {shape} "
            f"({printable(str(error))[:300]}). It is not a synset of this model."
        ) from error
    num_labels = logits.shape[-1]
    targets = one.targets.shape[-1] if samples.target_ids is None else int(samples.target_ids.max()) + 1
    fits = targets == num_labels if samples.target_ids is None else targets <= num_labels
    if logits.shape[:-1] != one.log_weights.shape or not fits:
        raise ValueError(
            f"The synset's samples have {targets} labels at positions {tuple(one.log_weights.shape[1:])}, the model "
            f"gives logits of shape {tuple(logits.shape[1:])}. It is not a synset of this model."
        )


def warn_unless_matched(matched_states: Sequence[MatchedState], matching_errors: Tensor) -> None:
    """Warns if most clusters match no better than without samples; errors `(num_matched_states, num_clusters)`."""
    for matched, residuals in zip(matched_states, matching_errors, strict=True):
        if float(residuals.median()) >= 1:
            warn_once(
                logger,
                "At %s the synthetic samples of most clusters match the data's gradients no better than no samples "
                "would (relative squared error %.3g): scores by the samples alone will be noise. Pass the training "
                "rows, keep responses, or distil again with more `samples_per_cluster` or a smaller `tolerance`.",
                matched,
                float(residuals.median()),
            )
            return
