"""A trajectory folder that is written while training runs, and that a crash leaves usable."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from hf_rgm.files.reading import ArtefactFolder
from hf_rgm.files.writing import FOLDER_LOCK, FolderLock, remove_unfinished, write_json
from hf_rgm.recording.writer import BackgroundWriter
from hf_rgm.trajectory.optimizers import OptimizerRule
from hf_rgm.trajectory.states import (
    STATES_FOLDER,
    StateFile,
    TrajectoryState,
    detached_state,
    file_sha256,
    recorded_states,
    state_path,
    write_state,
)
from hf_rgm.trajectory.steps import (
    STEPS_FOLDER,
    StepTable,
    part_length,
    part_path,
    read_part,
    recorded_parts,
    write_part,
)
from hf_rgm.trajectory.trajectory import FORMAT_VERSION, METADATA_FILE, read_metadata

logger = logging.getLogger(__name__)


LARGE = 5_000_000
"""Trained parameters from which on states are recorded in 16 bits: see `benchmarks/state_precision.py`."""


def default_dtype(parameters: Mapping[str, torch.nn.Parameter]) -> torch.dtype:
    """What states are recorded in unless it is asked for."""
    return torch.bfloat16 if sum(p.numel() for p in parameters.values()) >= LARGE else torch.float32


class TrajectoryRecorder:
    """The growing trajectory folder of one training run; every file is written whole or not at all."""

    # Another thread writes steps and states in the given order: drain it before anything relies on them, such as a
    # checkpoint. Once a write fails, nothing after it is written, and the next call raises the error.

    def __init__(self, folder: Path, *, overwrite: bool) -> None:
        self.folder = folder
        self._dtype = torch.float32
        self._overwrite = overwrite
        self._own = False
        self._description: dict[str, Any] = {}
        self._exact: set[int] = set()
        self._lock: FolderLock | None = None
        self._writer: BackgroundWriter | None = None

    def begin(
        self,
        description: Mapping[str, Any],
        *,
        dtype: torch.dtype,
        step: int,
        planned: Collection[int],
        best: int | None,
    ) -> None:
        """Opens the folder for a run that begins at `step`, and drops what it holds from there on."""
        self._close()
        self._dtype = dtype
        if self.folder.exists() and not self.folder.is_dir():
            raise FileExistsError(f"{self.folder} is a file. Choose another folder.")
        lock = FolderLock(self.folder)
        lock.acquire()
        try:
            self._open(description, step=step, planned=planned, best=best)
        except BaseException:
            lock.release()
            raise
        self._lock = lock
        self._writer = BackgroundWriter()

    def _open(self, description: Mapping[str, Any], *, step: int, planned: Collection[int], best: int | None) -> None:
        existing = self._existing()
        if existing is not None and existing["complete"] and step < existing["num_steps"]:
            if step > 0 and existing.get("stopped_early") is True:
                logger.info("The trajectory in %s stopped early; it goes on from step %d.", self.folder, step)
            elif self._own:
                logger.warning("The trajectory in %s is replaced by that of another training run.", self.folder)
            elif not self._overwrite:
                raise FileExistsError(
                    f"{self.folder} holds the complete trajectory of another training run. Choose another folder, or "
                    "pass `overwrite=True` to replace it: `TrajectoryCallback(..., overwrite=True)`."
                )
        self._description = {**description, "format_version": FORMAT_VERSION, "complete": False, "num_steps": None}
        wanted = set(planned)
        if step > 0:
            existing = self._resumable(existing, step)
            wanted |= {earlier for earlier in existing["state_steps"] or () if earlier <= step}
            self._description["updates_before"] = existing.get("updates_before", 0)
            earlier = {key: sums for key, sums in existing["checkpoints"].items() if int(key) <= step}
            self._description["checkpoints"] |= earlier
            self._description["trained_loss"] = self._same_loss(existing)
        self._description["state_steps"] = sorted(wanted)
        self._exact.clear()
        self._own = True
        self._write_description()
        for recorded in recorded_states(self.folder):
            if recorded not in {*wanted, best} or recorded > step or step == 0:
                self.drop_state(recorded)
        folder = ArtefactFolder(self.folder)
        for start in recorded_parts(self.folder):
            if start >= step:
                part_path(self.folder, start).unlink()
            elif start + part_length(folder, start) > step:
                write_part(self.folder, start, read_part(folder, start).select(0, step - start))
        # Of format version 1, which can only be replaced.
        for old in (self.folder / STEPS_FOLDER).glob("part-*.parquet"):
            if old.stem.removeprefix("part-").isdecimal():
                old.unlink()

    def _existing(self) -> dict[str, Any] | None:
        for folder in (self.folder, self.folder / STATES_FOLDER, self.folder / STEPS_FOLDER):
            remove_unfinished(folder)
        if all(path.name == FOLDER_LOCK for path in self.folder.iterdir()):
            return None
        try:
            return read_metadata(ArtefactFolder(self.folder))
        except FileNotFoundError as error:
            raise FileExistsError(
                f"{self.folder} is not empty and holds no trajectory, so it is left alone. Choose another folder."
            ) from error
        except ValueError as error:
            if self._overwrite:
                return None
            raise FileExistsError(
                f"{self.folder} holds a trajectory that cannot be read ({error}). Choose another folder, or pass "
                "`overwrite=True` to replace it."
            ) from error

    def _resumable(self, existing: dict[str, Any] | None, step: int) -> dict[str, Any]:
        way_out = (
            "Resume with the folder that the earlier part of this run was recorded to, or train from the beginning."
        )
        if existing is None:
            raise ValueError(
                f"Training resumes at step {step}, but {self.folder} records no steps 0 to {step - 1}. {way_out}"
            )
        for key in (
            "optimizer",
            "parameters",
            "architecture",
            "frozen_sha256",
            "num_rows",
            "dataset_fingerprint",
            "rows_sha256",
        ):
            if existing.get(key) != self._description[key]:
                raise ValueError(
                    f"Training resumes at step {step}, but the `{key}` of the trajectory in {self.folder} is another. "
                    f"{way_out}"
                )
        noted, now = existing.get("checkpoints", {}).get(str(step)), self._description["checkpoints"][str(step)]
        if noted is None:
            raise ValueError(
                f"Training resumes at step {step}, but {self.folder} does not know what the checkpoint holds: it was "
                f"written elsewhere, or by an earlier release. {way_out}"
            )
        differing = [kind for kind in now if noted.get(kind) != now[kind]]
        if differing:
            raise ValueError(
                f"Training resumes at step {step} with other `{'` and `'.join(differing)}` than it stopped with: the "
                "checkpoint was saved without its optimizer (`save_only_model=True`), or was not loaded whole, as "
                "transformers 5 does with a ViT (docs/troubleshooting.md). Such a jump is not recorded. Train from "
                "the beginning, with `save_only_model=False`."
            )
        done = 0
        for start in recorded_parts(self.folder):
            if start != done:
                break
            done += part_length(ArtefactFolder(self.folder), start)
        if done < step:
            raise ValueError(
                f"Training resumes at step {step}, but {self.folder} records no steps {done} to {step - 1}. Resume "
                f"from a checkpoint at or before step {done}, or train from the beginning."
            )
        if 0 not in recorded_states(self.folder):
            raise ValueError(f"{state_path(self.folder, 0)} is missing, so training cannot be resumed here. {way_out}")
        now = self._state_digests(step)
        known = existing.get("states_sha256") or {}
        changed = [key for key, digest in known.items() if now.get(key, digest) != digest]
        if changed:
            raise ValueError(f"The states of steps {changed} in {self.folder} are not what was recorded. {way_out}")
        return existing

    @property
    def num_digested_rows(self) -> int | None:
        """Number of rows in the digest of the run that is in the folder, if there is one."""
        if not (self.folder / METADATA_FILE).is_file():
            return None
        return read_metadata(ArtefactFolder(self.folder)).get("num_digested_rows")

    def _same_loss(self, existing: dict[str, Any]) -> dict[str, Any] | None:
        """The loss as the first part of the run had it; refuses to resume with another."""
        before, now = existing.get("trained_loss"), self._description.get("trained_loss")
        if before is not None and now is not None:
            for key in ("adds_micro_batches", "shifts_labels", "custom", "name"):
                if before.get(key) != now[key]:
                    raise ValueError(
                        f"Training resumes with another loss: `{key}` was {before.get(key)} and is {now[key]}. Resume "
                        "with the same model, arguments and `row_loss`, or train from the beginning."
                    )
        return now if before is None else before

    def write_steps(self, start: int, steps: StepTable) -> None:
        """Adds steps, starting at number `start`."""
        self._submit(start + len(steps), lambda: write_part(self.folder, start, steps))

    def note_checkpoint(self, step: int, sums: Mapping[str, str]) -> None:
        """Notes the checksums of a checkpoint that is about to be written, or was."""
        self._description["checkpoints"][str(step)] = dict(sums)
        self._description["states_sha256"] = self._state_digests(step)
        with self._stopping(step):
            self._write_description()

    def _state_digests(self, last: int) -> dict[str, str]:
        steps = [step for step in recorded_states(self.folder) if step <= last]
        return {str(step): file_sha256(state_path(self.folder, step)) for step in steps}

    def write_state(self, state: TrajectoryState, *, exact: bool) -> None:
        """Adds a copy of a state unless it is there, in the model's own dtype if it must be exact."""
        if state.step in self._exact or (not exact and self.has_state(state.step)):
            return
        copy = detached_state(state, torch.float32 if exact else self._dtype)

        def write() -> None:
            write_state(state_path(self.folder, copy.step), copy)
            file_sha256(state_path(self.folder, copy.step))  # known to `_state_digests` then

        self._submit(state.step, write)
        if exact:
            self._exact.add(state.step)

    def _submit(self, step: int, work: Callable[[], None]) -> None:
        self.writer.submit(self._stopping(step)(work))

    @property
    def writer(self) -> BackgroundWriter:
        """The thread that writes; it exists between `begin` and `finish`."""
        if self._writer is None:
            raise RuntimeError(f"Nothing is being recorded into {self.folder}.")
        return self._writer

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer = None

    def has_state(self, step: int) -> bool:
        return state_path(self.folder, step).is_file()

    def read_state(self, step: int) -> TrajectoryState:
        shapes = {name: tuple(shape) for name, shape in self._description["parameters"].items()}
        moment_names = OptimizerRule.from_dict(self._description["optimizer"]).moment_names
        return StateFile(ArtefactFolder(self.folder), step, shapes, moment_names).read()

    def drop_state(self, step: int) -> None:
        """Deletes a state, after earlier writes are done."""
        path = state_path(self.folder, step)
        self._exact.discard(step)
        if self._writer is None:
            path.unlink(missing_ok=True)
        else:
            self._writer.submit(lambda: path.unlink(missing_ok=True))

    def finish(
        self,
        num_steps: int,
        cost: Mapping[str, float],
        *,
        stopped_early: bool,
        trained_loss: Mapping[str, Any] | None = None,
    ) -> None:
        """Marks the trajectory as complete, ending at step `num_steps`. Later steps stay, to resume after."""
        self.writer.drain()
        recorded = recorded_states(self.folder)
        self._description |= {
            "complete": True,
            "num_steps": num_steps,
            "state_steps": [step for step in recorded if step <= num_steps],
            "states_sha256": self._state_digests(num_steps),
            "recording": dict(cost),
            "stopped_early": stopped_early,
        }
        told = self._description.get("trained_loss")
        if told is not None and trained_loss is not None:  # of a resumed run, the first part's, with the last losses
            self._description["trained_loss"] = {
                **told,
                "rows": trained_loss["rows"],
                "losses": trained_loss["losses"],
            }
        with self._stopping(num_steps):
            self._write_description()
        for step in recorded:
            if step > num_steps:
                self.drop_state(step)
        self.abandon()

    def abandon(self) -> None:
        """Finishes writing and releases the folder."""
        self._close()
        if self._lock is not None:
            self._lock.release()
        self._lock = None

    def _write_description(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / METADATA_FILE, self._description)

    @contextlib.contextmanager
    def _stopping(self, step: int) -> Iterator[None]:
        """Adds advice on how to go on to errors of the disk, and to that of a folder that is no longer there."""
        try:
            if not self._is_there:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            yield
        except OSError as error:
            if error.errno is None:
                raise
            moved = f"{self.folder} was moved or deleted while training was recorded into it."
            reason = error.strerror if self._is_there else moved
            raise OSError(
                error.errno,
                f"{reason} Training stops, as it would go on without a record of step {step}. What is "
                "recorded up to the last checkpoint is whole. Once that is repaired, go on with "
                "`trainer.train(resume_from_checkpoint=True)` and the same callback, or from the beginning.",
            ) from error

    @property
    def _is_there(self) -> bool:
        """Whether the folder is still the one that is locked."""
        return (self.folder / FOLDER_LOCK).is_file()

    def num_bytes(self) -> int:
        """Size on disk of the recorded states and steps."""
        files = [*(self.folder / STATES_FOLDER).glob("*"), *(self.folder / STEPS_FOLDER).glob("*")]
        return sum(path.stat().st_size for path in files)
