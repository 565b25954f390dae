"""The callback that records the training run of an unmodified Trainer."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from hf_rgm.files.writing import format_size
from hf_rgm.model.losses import LossFunction
from hf_rgm.recording.capture import are_finite, as_table, same_parameters
from hf_rgm.recording.process_group import check_same, failing_together
from hf_rgm.recording.recording import TrajectoryRecorder, default_dtype
from hf_rgm.recording.training_run import OngoingRun, checkpoint_step
from hf_rgm.trajectory.states import TrajectoryState

logger = logging.getLogger(__name__)


class TrajectoryCallback(TrainerCallback):
    """
    Records the training run of a `Trainer` into a folder that [`Trajectory.load`] opens.

    It records some states (trainable parameters and optimizer moments) and, for every update, the learning rates, the
    gradient norm, the clipping factor and the rows. Training is the same with and without the callback, bit for bit.
    An interrupted run continues its recording when it is resumed from a checkpoint with the same folder, also on
    another number of processes. A background thread writes the files: training waits for copies of the states and,
    before each checkpoint, for pending writes.

    Supported are torch's SGD, Adam and AdamW on any number of processes, with the whole model on each
    (DistributedDataParallel) or a part of it (FSDP2, whose states are gathered on the main process); gradient
    accumulation and clipping; any learning rate schedule; mixed precision in bf16 and fp16. With
    `load_best_model_at_end` the trajectory ends at the best checkpoint, so that its last state is always the model
    after `trainer.train()`.

    Before the first step it compares the gradient that the Trainer takes with that of the loss of rows, on some rows.
    A ratio is recorded and used; any other difference is refused, unless `row_loss` explains it.

    Args:
        folder (`str` or `Path`): Where to record: new, empty, or a trajectory folder.
        num_states (`int`, *optional*, defaults to `8`): Number of states, evenly spread from the first to the last
            step. Each is as large as the trainable parameters and their moments.
        dtype (`torch.dtype`, *optional*): `torch.float32` or `torch.bfloat16`, which halves the disk. Defaults to
            bfloat16 from 5 million trained parameters on. The last state is always exact (up to float32).
        row_loss (`Callable`, *optional*): Takes logits `(batch_size, *positions, num_labels)` and labels and returns
            the loss of each row, `(batch_size,)`, where it is not the cross entropy: class weights, focal losses,
            losses of your own in the model, `compute_loss` or `compute_loss_func`. Pass it to later stages too.
        overwrite (`bool`, *optional*, defaults to `False`): Replace the complete trajectory of another run.

    Raises:
        ValueError: If `num_states` or `dtype` is wrong; in `on_train_begin`, if training resumes and the folder does
            not record the steps before, or if the optimizer misses a trainable parameter.
        FileExistsError: In `on_train_begin`, if the folder holds a complete trajectory or something else.
        NotImplementedError: In `on_train_begin`, if the optimizer, the order of rows or the parallelism (FSDP1,
            DeepSpeed, tensor parallelism) cannot be recorded, the trained loss is another than `row_loss` or the cross
            entropy, or no gradient of a row can be taken; later, at the step before which anything but the optimizer
            changed parameters, moments, gradients or its settings, or layers were frozen or unfrozen.
        OSError: When the disk is full or the folder can no longer be written. Training stops there and can be resumed.
        RuntimeError: In `on_train_begin`, if another process records into the folder or the processes that train
            together differ in data or settings; later, on processes that stop because another one failed.

    Example:

    ```python
    >>> import tempfile
    >>> from hf_rgm import Trajectory, TrajectoryCallback
    >>> from hf_rgm.testing import tiny_dataset, tiny_trainer  # any Trainer will do

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     callback = TrajectoryCallback(folder, num_states=2)
    ...     result = tiny_trainer(tiny_dataset(12, seed=0), callbacks=[callback], num_train_epochs=2).train()
    ...     trajectory = Trajectory.load(folder)
    >>> trajectory.num_steps, trajectory.state_steps, [len(rows) for rows in trajectory.steps.rows]
    (4, (0, 4), [8, 4, 8, 4])

    ```
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        num_states: int = 8,
        dtype: torch.dtype | None = None,
        row_loss: LossFunction | None = None,
        overwrite: bool = False,
    ) -> None:
        if num_states < 2:
            raise ValueError(
                f"`num_states` must be at least 2 (the first and the last), got {num_states}. Record more states with "
                "TrajectoryCallback(num_states=...)."
            )
        if dtype not in (None, torch.float32, torch.bfloat16):
            raise ValueError(f"`dtype` must be torch.float32 or torch.bfloat16, got {dtype}.")
        self.folder = Path(folder)
        self.num_states = num_states
        self.dtype = dtype
        self.row_loss = row_loss
        self._recorder = TrajectoryRecorder(self.folder, overwrite=overwrite)
        self._active: OngoingRun | None = None
        self._seconds = 0.0
        self._summary = "Nothing is recorded yet."

    def summary(self) -> str:
        """Size, time and disk of the last finished recording, as a sentence."""
        return self._summary

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds += time.perf_counter() - start

    @property
    def _run(self) -> OngoingRun:
        if self._active is None:
            raise RuntimeError(
                "TrajectoryCallback was added while training was running. Add it before calling `trainer.train()`."
            )
        return self._active

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        """Checks that the run can be recorded, opens the folder and records the first state."""
        if self._active is not None:
            self._active.remove_hooks()
            self._active = None
        self._seconds = 0.0
        with self._timed():
            with failing_together(args.world_size):
                run = OngoingRun(args, state, num_states=self.num_states, **kwargs)
            try:
                check_same(run.description | {"global_step": state.global_step}, args.world_size)
                self._begin(run, state)
            except BaseException:
                run.remove_hooks()
                self._active = None
                raise

    def _begin(self, run: OngoingRun, state: TrainerState) -> None:
        self._active = run
        step = state.global_step
        with failing_together(run.num_processes):
            run.rehearse(self.row_loss)
        with failing_together(run.num_processes):
            if run.is_main:
                run.description |= run.digest_rows(self._recorder.num_digested_rows if step else None)
                dtype = self.dtype or default_dtype(run.parameters)
                self._recorder.begin(run.description, dtype=dtype, step=step, planned=run.planned, best=run.best_step)
                self._announce(run, dtype)
        with failing_together(run.num_processes):
            # The run may have been killed after it wrote the best checkpoint and before `on_save`.
            if step in {*run.planned, run.best_step}:
                self._record_state(step, exact=step == run.best_step or step >= state.max_steps)

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        """Determines the order of rows of this epoch."""
        with self._timed():
            self._run.schedule.begin_epoch()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        """Determines the rows of this update."""
        with self._timed():
            self._run.batches = self._run.schedule.next_update()
            self._before_stopping(state, control)

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        """Records all steps before a checkpoint that is written because training was told to stop."""
        with self._timed():
            self._before_stopping(state, control)

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        """Notes whether the optimizer skipped the update, and checks those before it."""
        with self._timed():
            run = self._run
            skipped = bool(getattr(kwargs["optimizer"], "step_was_skipped", False))
            run.watch.end_update(skipped=skipped)
            run.steps[-1].skipped = skipped
            if run.num_processes == 1:
                run.watch.settle(now=False)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        """Records the state if it is due, and all steps before a checkpoint is written."""
        with self._timed():
            run = self._run
            run.steps[-1].epoch = float(state.epoch or 0)
            due = state.global_step in run.planned
            saves = control.should_save or control.should_training_stop
            if due or saves:
                with failing_together(run.num_processes):
                    if due:
                        self._record_state(state.global_step, exact=state.global_step >= state.max_steps)
                        run.look_again(state.global_step)
                    self._write_steps(checkpoint=state.global_step if saves else None)
            elif run.num_processes == 1:
                self._recorder.writer.check()

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        """Records all steps before a checkpoint is written."""
        if control.should_save or control.should_training_stop:
            with self._timed(), failing_together(args.world_size):
                self._write_steps(checkpoint=state.global_step)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        """Records all steps where the result of the evaluation may lead to a checkpoint."""
        if args.save_strategy == SaveStrategy.BEST and self._active is not None:
            with self._timed(), failing_together(args.world_size):
                self._write_steps(checkpoint=state.global_step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        """Records the state of the best checkpoint so far, where training is to end with it."""
        with self._timed():
            run = self._run
            is_best = args.load_best_model_at_end and checkpoint_step(state.best_model_checkpoint) == state.global_step
            with failing_together(args.world_size):
                self._write_steps(checkpoint=state.global_step)
                outdated = run.best_step if is_best and run.is_main else None
                if outdated is not None and outdated not in {*run.planned, state.global_step}:
                    self._recorder.drop_state(outdated)
            if is_best:
                run.best_step = state.global_step
                with failing_together(args.world_size):
                    self._record_state(state.global_step, exact=True)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        """Records the last state, closes the folder and logs what recording cost."""
        run = self._run
        run.remove_hooks()
        with failing_together(args.world_size), self._timed():
            if run.best_step in (None, state.global_step):  # else that checkpoint is loaded by now
                run.watch.compare_parameters()
            self._write_steps()
            run.check_frozen()
        with failing_together(args.world_size):
            with self._timed():
                captured = run.captured(state.global_step)
            if captured is not None:
                self._finish(run, args, state, captured)
        self._active = None

    def _finish(self, run: OngoingRun, args: TrainingArguments, state: TrainerState, captured: TrajectoryState):
        if state.global_step == 0:
            logger.warning("Training ended before its first step, so %s holds no trajectory.", self.folder)
            self._recorder.abandon()
            return
        with self._timed():
            final_step = self._best_step(state, captured) if args.load_best_model_at_end else None
            if final_step is None:
                final_step = state.global_step
                self._recorder.write_state(captured, exact=True)
            self._recorder.writer.drain()
            trained_loss = run.trained_loss()
        recording, training = self._seconds + run.norms.seconds + run.watch.seconds, time.perf_counter() - run.started
        cost = {"recording_seconds": recording, "training_seconds": training}
        stopped_early = state.global_step < state.max_steps
        self._recorder.finish(final_step, cost, stopped_early=stopped_early, trained_loss=trained_loss)
        self._summary = (
            f"Recorded {final_step} steps in {self.folder}: {format_size(self._recorder.num_bytes())} on disk, "
            f"{recording:.2f} s, which is {recording / training:.1%} of the {training:.2f} s of training."
        )
        logger.info(self._summary)

    def _best_step(self, state: TrainerState, captured: TrajectoryState) -> int | None:
        """Step of the best checkpoint if it is older than the last step and was loaded into the model."""
        best = checkpoint_step(state.best_model_checkpoint)
        if best is None or best == state.global_step:
            return None
        if self._recorder.has_state(best) and same_parameters(self._recorder.read_state(best), captured):
            return best
        logger.warning(
            "The model that training leaves is not the recorded state of the best checkpoint %s. It is kept as the "
            "state after step %d, with the optimizer moments of that step.",
            state.best_model_checkpoint,
            state.global_step,
        )
        return None

    def _before_stopping(self, state: TrainerState, control: TrainerControl) -> None:
        # The Trainer's answer to SIGTERM writes a checkpoint in the middle of an update, and tells no callback.
        if control.should_training_stop:
            self._write_steps(checkpoint=state.global_step)

    def _record_state(self, step: int, *, exact: bool) -> None:
        """Records a state unless it is there. All processes must call this."""
        captured = self._run.captured(step)
        if captured is not None:
            self._recorder.write_state(captured, exact=exact)

    def _write_steps(self, *, checkpoint: int | None = None) -> None:
        """Writes pending steps; waits for that, and notes checksums, where a checkpoint of a step may be written."""
        run = self._run
        run.watch.settle()
        sums = None
        if checkpoint is not None and checkpoint != run.noted_step and (run.is_main or run.is_sharded):
            sums, run.noted_step = run.checkpoint_sums(), checkpoint
        if run.is_main:
            if run.steps:
                table = as_table(run.steps)
                run.is_finite = run.is_finite and are_finite(table, run.next_step)
                self._recorder.write_steps(run.next_step, table)
            if checkpoint is not None:
                self._recorder.writer.drain()
            if checkpoint is not None and sums is not None:
                self._recorder.note_checkpoint(checkpoint, sums)
        run.next_step += len(run.steps)
        run.steps.clear()

    def _announce(self, run: OngoingRun, dtype: torch.dtype) -> None:
        size = sum(p.numel() * min(p.element_size(), dtype.itemsize) for p in run.parameters.values())
        logger.info(
            "Recording %d states into %s, about %s each. Fewer states (`num_states`) or `dtype=torch.bfloat16` take "
            "less disk.",
            len(run.planned),
            self.folder,
            format_size(size * (1 + len(run.rule.moment_names))),
        )
