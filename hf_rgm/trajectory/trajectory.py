"""A recorded training run, as a folder and as an object."""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from hf_rgm.files.reading import WAY_OUT, ArtefactFolder, parsed
from hf_rgm.files.writing import staged_folder, write_json
from hf_rgm.trajectory.description import (
    FORMAT_VERSION,
    MAX_UPDATES,
    METADATA_FILE,
    OWN_KEYS,
    Description,
    Metadata,
    read_metadata,
)
from hf_rgm.trajectory.fingerprint import dataset_fingerprint
from hf_rgm.trajectory.optimizers import OptimizerRule
from hf_rgm.trajectory.precision import PRECISIONS, check_precision
from hf_rgm.trajectory.row_digest import rows_sha256
from hf_rgm.trajectory.states import StateFile, TrajectoryState, file_sha256, state_path, write_state
from hf_rgm.trajectory.steps import StepTable, check_rows, read_steps, write_part
from hf_rgm.trajectory.trained_loss import TrainedLoss

if TYPE_CHECKING:
    from hf_rgm.model.losses import LossFunction
    from hf_rgm.model.row_reader import DataCollator
    from hf_rgm.trajectory.checkpoints import CheckpointState

logger = logging.getLogger(__name__)


class Trajectory:
    """
    A recorded training run: its states, and the steps between them.

    [`TrajectoryCallback`] records one; [`~Trajectory.load`] opens it. [`~Trajectory.from_checkpoints`] makes one of a
    run that was not recorded. States stay on disk until they are used.

    Args:
        optimizer (`OptimizerRule`): The update rule.
        parameter_shapes (`Mapping[str, tuple[int, ...]]`): Shapes of the trainable parameters, by name, in the order
            of `model.named_parameters()`.
        steps (`StepTable`): What happened at every step.
        states (`Mapping[int, TrajectoryState | StateFile]`): States by step, in memory or as files. One must belong to
            the last step.
        num_rows (`int`): Length of the training set.
        dataset_fingerprint (`str`): Result of [`dataset_fingerprint`] for the training set.
        metadata (`Mapping[str, Any]`, *optional*): Other facts about the run, JSON-safe.
        folder (`Path`, *optional*): Where it was loaded from.

    Raises:
        ValueError: If these do not belong together.

    Example:

    ```python
    >>> import tempfile
    >>> from hf_rgm import Trajectory
    >>> from hf_rgm.testing import tiny_recorded_run

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     tiny_recorded_run().trajectory.save(folder, precision="bfloat16")
    ...     trajectory = Trajectory.load(folder)
    >>> trajectory.num_steps, trajectory.state_steps
    (48, (0, 10, 19, 29, 38, 48))

    ```
    """

    def __init__(
        self,
        *,
        optimizer: OptimizerRule,
        parameter_shapes: Mapping[str, tuple[int, ...]],
        steps: StepTable,
        states: Mapping[int, TrajectoryState | StateFile | CheckpointState],
        num_rows: int,
        dataset_fingerprint: str,
        metadata: Mapping[str, Any] | None = None,
        folder: Path | None = None,
    ) -> None:
        if not states or max(states) != len(steps) or min(states) < 0:
            raise ValueError(
                f"`states` are at steps {sorted(states)}; the last must be at step {len(steps)}, where `steps` ends."
            )
        if steps.learning_rates.shape[1] != len(optimizer.groups):
            raise ValueError(
                f"`steps` has {steps.learning_rates.shape[1]} learning rates a step, the optimizer has "
                f"{len(optimizer.groups)} parameter groups."
            )
        grouped = {name for group in optimizer.groups for name in group.names}
        if grouped != set(parameter_shapes):
            differing = sorted(grouped ^ set(parameter_shapes))
            raise ValueError(f"The optimizer's groups and `parameter_shapes` differ in {differing[:5]}.")
        self.optimizer = optimizer
        self.parameter_shapes = {name: tuple(shape) for name, shape in parameter_shapes.items()}
        self.steps = steps
        self.num_rows = num_rows
        self.dataset_fingerprint = dataset_fingerprint
        self.metadata = dict(metadata or {})
        self.folder = folder
        self._states = {step: states[step] for step in sorted(states)}

    def __repr__(self) -> str:
        return (
            f"Trajectory({self.optimizer.name}, {self.num_steps} steps, states at {list(self.state_steps)}, "
            f"{len(self.parameter_shapes)} parameters, {self.num_rows} rows)"
        )

    @property
    def num_steps(self) -> int:
        """Number of updates, skipped ones included."""
        return len(self.steps)

    @property
    def state_steps(self) -> tuple[int, ...]:
        """Steps whose states are recorded, ascending; the last is `num_steps`, the trained model."""
        return tuple(self._states)

    @property
    def update_numbers(self) -> np.ndarray:
        """
        Number of every update for Adam's bias correction, `(num_steps,)`, int64.

        It is `step + 1`, unless updates were skipped or the optimizer had been used before this run.
        """
        return int(self.metadata.get("updates_before", 0)) + np.cumsum(~self.steps.skipped)

    def state(self, step: int) -> TrajectoryState:
        """
        A recorded state, read from disk at every call.

        Raises:
            KeyError: If this step's state is not recorded.
            FileNotFoundError: If its file is gone.
        """
        if step not in self._states:
            raise KeyError(f"No state is recorded at step {step}. Choose one of {list(self.state_steps)}.")
        state = self._states[step]
        return state if isinstance(state, TrajectoryState) else state.read()

    @property
    def final(self) -> TrajectoryState:
        """The trained model: the state at `num_steps`."""
        return self.state(self.num_steps)

    @property
    def states_bytes(self) -> int:
        """Size of the recorded states, in bytes, if each is as large as the final one."""
        final = self.final
        moments = (tensor for moment in final.moments.values() for tensor in moment.values())
        return len(self.state_steps) * sum(tensor.nbytes for tensor in (*final.parameters.values(), *moments))

    def check_dataset(self, dataset: Any, what: str = "train_dataset") -> None:
        """
        Checks that `dataset` has the rows of the training set, in the same order.

        Args:
            dataset: A map-style dataset.
            what (`str`, *optional*, defaults to `"train_dataset"`): Name of the dataset in errors.

        Raises:
            ValueError: If it has not.
        """
        if len(dataset) != self.num_rows:
            raise ValueError(
                f"`{what}` has {len(dataset)} rows, the recorded run had {self.num_rows}. Pass the dataset exactly as "
                "it was given to the Trainer."
            )
        fingerprint = dataset_fingerprint(dataset, self.metadata.get("fingerprint_columns"))
        if fingerprint != self.dataset_fingerprint:
            raise ValueError(
                f"`{what}` has fingerprint {fingerprint[:12]}, the recorded run's dataset had "
                f"{self.dataset_fingerprint[:12]}: same length, other rows or another order. Pass the dataset exactly "
                "as it was given to the Trainer."
            )
        noted, count = self.metadata.get("rows_sha256"), min(self.num_rows, self.metadata.get("num_digested_rows", 0))
        if noted is not None and noted != rows_sha256(dataset, self.metadata.get("fingerprint_columns") or (), count):
            raise ValueError(
                f"Some of the {self.num_rows} rows of `{what}` are not what they were when the run was recorded. Pass "
                "the dataset exactly as it was given to the Trainer."
            )

    @property
    def trained_loss(self) -> TrainedLoss | None:
        """What the trained loss was seen to be before the first step, if it was looked at."""
        told = self.metadata.get("trained_loss")
        return None if told is None else parsed(TrainedLoss, told, "What the trajectory says of its loss")

    @property
    def shifts_labels(self) -> bool | None:
        """Whether tokens predicted the label of the next one, if that was looked at."""
        return None if self.trained_loss is None else self.trained_loss.shifts_labels

    @property
    def longest_input(self) -> int | None:
        """Tokens of the longest text among some training rows, if that was looked at."""
        return None if self.trained_loss is None else self.trained_loss.longest_input

    @property
    def reader_options(self) -> dict[str, Any]:
        """Options of a `RowReader` by which rows are read as in training."""
        told = self.trained_loss or TrainedLoss()
        return {"remove_unused_columns": told.remove_unused_columns, "columns": told.columns, "loss": told.name}

    @property
    def gradient_scales(self) -> np.ndarray:
        """What multiplied the gradient of the mean loss at every step: clipping and short updates, `(num_steps,)`."""
        told, sizes = self.trained_loss, self.steps.micro_batch_sizes
        if told is None or not told.adds_micro_batches or sizes is None:
            return self.steps.clip_factor
        # The loss adds micro-batches, of which the last update of an epoch may have fewer.
        whole = int(self.metadata["gradient_accumulation_steps"]) * int(self.metadata["num_processes"])
        return self.steps.clip_factor * np.array([len(each) for each in sizes]) / whole

    def without_rows(self) -> Trajectory:
        """A copy to share, which does not tell the rows of each step."""
        shared = copy.copy(self)
        shared.metadata = dict(self.metadata)
        if self.trained_loss is not None:
            shared.metadata["trained_loss"] = asdict(replace(self.trained_loss, rows=[], losses=[]))
        shared.steps = replace(self.steps, clip_factor=self.gradient_scales, rows=None, micro_batch_sizes=None)
        return shared

    def save(self, folder: str | Path, *, precision: str | None = None) -> None:
        """
        Writes the trajectory. An older trajectory in the folder is replaced.

        Args:
            folder (`str` or `Path`): Where to write.
            precision (`str`, *optional*): `"float32"`, `"bfloat16"` or `"int8"` for all states but the last, which
                stays as it is. Defaults to the precision that the states have.

        Raises:
            FileExistsError: If the folder holds something else.
            ValueError: If the precision is unknown.
        """
        if precision is not None:
            check_precision(precision)
        final = None if precision in (None, PRECISIONS[0]) else self.final.parameters
        with staged_folder(folder, METADATA_FILE) as staging:
            for step, state in self._states.items():
                target = state_path(staging, step)
                if precision is not None and step != self.num_steps:
                    write_state(target, self.state(step), precision=precision, final=final)
                elif isinstance(state, StateFile):
                    target.parent.mkdir(exist_ok=True)
                    shutil.copyfile(state.checked_path(), target)
                else:
                    write_state(target, self.state(step))
            write_part(staging, 0, self.steps)
            description = Description(
                format_version=FORMAT_VERSION,
                complete=True,
                optimizer=self.optimizer.to_dict(),
                parameters={name: list(shape) for name, shape in self.parameter_shapes.items()},
                num_rows=self.num_rows,
                dataset_fingerprint=self.dataset_fingerprint,
                num_steps=self.num_steps,
                state_steps=list(self.state_steps),
            )
            digests = {str(step): file_sha256(state_path(staging, step)) for step in self._states}
            write_json(staging / METADATA_FILE, self.metadata | {"states_sha256": digests} | vars(description))

    @classmethod
    def from_checkpoints(
        cls,
        output_dir: str | Path,
        model: nn.Module,
        train_dataset: Any,
        *,
        max_grad_norm: float = 1.0,
        label_smoothing_factor: float = 0.0,
        data_collator: DataCollator | None = None,
        row_loss: LossFunction | None = None,
        num_steps: int | None = None,
    ) -> Trajectory:
        """
        The trajectory of a finished `Trainer` run that no callback recorded, by its checkpoints.

        States are the checkpoints', and stay there until they are used; [`~Trajectory.save`] copies them. Constants of
        the optimizer and its moments are read from `optimizer.pt`, without executing pickles; `training_args.bin` is
        not read. Learning rates and gradient norms are interpolated between those in `trainer_state.json`; training
        with `logging_steps=10` tells enough of them. What is assumed is warned of, and kept in
        `metadata["from_checkpoints"]`.

        Args:
            output_dir (`str` or `Path`): The `output_dir` of the run, with two or more folders `checkpoint-*`.
            model (`nn.Module`): The trained model: that of one of the checkpoints, at which the trajectory ends.
            train_dataset: The training set, exactly as it was given to the Trainer.
            max_grad_norm (`float`, *optional*, defaults to `1.0`): As in the run's `TrainingArguments`; 0 for no
                clipping.
            label_smoothing_factor (`float`, *optional*, defaults to `0.0`): As in the run's `TrainingArguments`.
            data_collator (`Callable`, *optional*): The Trainer's. Defaults to `default_data_collator`.
            row_loss (`Callable`, *optional*): As in [`Attributor`]. Defaults to that of the model.
            num_steps (`int`, *optional*): Step of the last checkpoint, of a run with another seed than the model's.

        Raises:
            OSError: If a checkpoint has no `optimizer.pt`, or no safetensors file.
            NotImplementedError: If the optimizer was another than SGD, Adam or AdamW, or the loss is not known.
            ValueError: If checkpoints are fewer than two, or not of one run, or none is the model or fits it.
        """
        from hf_rgm.trajectory.checkpoints import trajectory_parts  # imports the Trainer

        options: dict[str, Any] = {"max_grad_norm": max_grad_norm, "label_smoothing_factor": label_smoothing_factor}
        options |= {"data_collator": data_collator, "row_loss": row_loss, "num_steps": num_steps}
        return cls(**trajectory_parts(output_dir, model, train_dataset, **options))

    @classmethod
    def load(cls, folder: str | Path | ArtefactFolder) -> Trajectory:
        """
        Opens a trajectory folder and checks that it is complete.

        Raises:
            FileNotFoundError: If the folder, its description or a state is missing.
            ValueError: If the recording was not finished, was written by another release, or is damaged.
        """
        folder = folder if isinstance(folder, ArtefactFolder) else ArtefactFolder(folder)
        content = read_metadata(folder)
        if not content["complete"]:
            raise ValueError(
                f"The trajectory in {folder} is not complete: training is still running, or was interrupted. Let it "
                "finish, or resume it with `trainer.train(resume_from_checkpoint=True)` and the same callback."
            )
        source = f"{folder}/{METADATA_FILE}"
        description = parsed(Description, content, source)
        metadata = {key: value for key, value in content.items() if key not in (*OWN_KEYS, "checkpoints")}
        told = parsed(Metadata, metadata, f"What {source} says of the run")
        if told.states_sha256 is None or told.rows_sha256 is None:
            logger.warning(
                "%s was recorded by an earlier release: changes of its states, of the model's configuration, and of "
                "rows other than 64 would not be noticed. Record the run again if in doubt.",
                folder,
            )
        digests = told.states_sha256 or {}
        metadata.pop("states_sha256", None)
        steps_of_states = description.state_steps
        if description.num_rows < 1 or not 0 < description.num_steps <= MAX_UPDATES:
            raise ValueError(
                f"{source} has {description.num_steps} steps on {description.num_rows} rows; there must be at least "
                f"one of each. {WAY_OUT}"
            )
        if min(steps_of_states, default=-1) < 0 or max(steps_of_states) != description.num_steps:
            raise ValueError(
                f"{source} names states at steps {steps_of_states[:5]}...; the last must be at step "
                f"{description.num_steps}, none before 0. {WAY_OUT}"
            )
        try:
            optimizer = OptimizerRule.from_dict(description.optimizer)
        except ValueError as error:
            raise ValueError(f"The optimizer in {source} is damaged: {error}") from error
        shapes = {name: tuple(shape) for name, shape in description.parameters.items()}

        def state_file(step: int, reference: StateFile | None = None) -> StateFile:
            sha256 = digests.get(str(step))
            return StateFile(folder, step, shapes, optimizer.moment_names, reference, sha256)

        final = state_file(description.num_steps)
        states = {step: final if step == final.step else state_file(step, final) for step in steps_of_states}
        for state in states.values():
            if state.at_hand or state is final or not folder.is_remote:
                state.check()
        steps = read_steps(folder, description.num_steps)
        check_rows(steps, description.num_rows, str(folder))
        if not np.any(steps.learning_rates.max(1, initial=0) * steps.clip_factor * ~steps.skipped):
            logger.warning(
                "No step of the run in %s changed the model: learning rates or clipping factors are 0, or all updates "
                "were skipped. Every score by it is 0. Record a run that trains.",
                folder,
            )
        try:
            trajectory = cls(
                optimizer=optimizer,
                parameter_shapes=shapes,
                steps=steps,
                states=states,
                num_rows=description.num_rows,
                dataset_fingerprint=description.dataset_fingerprint,
                metadata=metadata,
                folder=folder.root,
            )
            looked_at = [] if trajectory.trained_loss is None else trajectory.trained_loss.rows
            if max(looked_at, default=0) >= description.num_rows:
                raise ValueError(f"`trained_loss` names row {max(looked_at)} of {description.num_rows}.")
            return trajectory
        except ValueError as error:
            raise ValueError(f"The trajectory in {folder} is damaged: {error} {WAY_OUT}") from error
