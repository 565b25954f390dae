"""What happened at every step of training, kept as parts in safetensors."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from hf_rgm.files.reading import ArtefactFolder, check_memory, shortened
from hf_rgm.files.writing import order_metadata, replacing
from hf_rgm.trajectory.optimizers import MAX_CONSTANT

STEPS_FOLDER = "steps"
_WAY_OUT = "Copy the folder again, or record the training run again."
_SCALARS = {"epoch": np.float64, "gradient_norm": np.float64, "clip_factor": np.float64, "skipped": np.bool_}
# Columns with a list for each step: one tensor holds all elements, another the offsets of the steps in it.
_LISTS = ("rows", "micro_batch_sizes")
_OFFSETS = ".offsets"
_FIRST_STEP, _SHA256 = "first_step", "sha256"
_ARRAY_BYTES, _INTEGER_BYTES = 128, 40  # what an array and an integer in a list take in Python


@dataclass
class StepTable:
    """One entry per update; entry `t` describes the update from state `t` to state `t + 1`."""

    epoch: np.ndarray  # (num_steps,), float64: epochs done after the update, as in `TrainerState.epoch`
    learning_rates: np.ndarray  # (num_steps, num_groups), float64: what the update used
    gradient_norm: np.ndarray  # (num_steps,), float64: L2 norm before clipping
    clip_factor: np.ndarray  # (num_steps,), float64: what clipping multiplied the gradient by, 1 for none
    skipped: np.ndarray  # (num_steps,), bool: whether the optimizer left the update out (loss scaling)
    rows: list[np.ndarray] | None = None  # int64, rows of the training set in the order seen; `None` if private
    micro_batch_sizes: list[list[int]] | None = None  # how `rows` splits into batches (gradient accumulation)

    def __post_init__(self) -> None:
        for name, dtype in _SCALARS.items():
            setattr(self, name, np.asarray(getattr(self, name), dtype))
        self.learning_rates = np.asarray(self.learning_rates, np.float64)
        if self.learning_rates.ndim != 2:
            raise ValueError(
                f"`learning_rates` must have shape (num_steps, num_groups), got {self.learning_rates.shape}."
            )
        if self.rows is not None:
            self.rows = [np.asarray(rows, np.int64) for rows in self.rows]
        columns = {name: getattr(self, name) for name in (*_SCALARS, "learning_rates", *_LISTS)}
        lengths = {name: len(column) for name, column in columns.items() if column is not None}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"The columns of a step table must have one length, got {lengths}.")

    def __len__(self) -> int:
        return len(self.epoch)

    def select(self, start: int, stop: int) -> StepTable:
        """The steps `start` to `stop - 1`."""
        columns = {name: getattr(self, name) for name in (*_SCALARS, "learning_rates", *_LISTS)}
        return StepTable(**{name: column[start:stop] for name, column in columns.items() if column is not None})

    @classmethod
    def concatenate(cls, tables: Sequence[StepTable]) -> StepTable:
        """Several tables, one after the other. Rows are kept if all have them."""
        lists = {name: [getattr(table, name) for table in tables] for name in _LISTS}
        columns: dict[str, Any] = {
            name: None if None in parts else list(chain.from_iterable(parts)) for name, parts in lists.items()
        }
        for name in (*_SCALARS, "learning_rates"):
            columns[name] = np.concatenate([getattr(table, name) for table in tables])
        return cls(**columns)


def _part_name(first_step: int) -> str:
    return f"{STEPS_FOLDER}/part-{first_step:08d}.safetensors"


def part_path(folder: Path, first_step: int) -> Path:
    """Where the part that begins with a step is kept."""
    return folder / _part_name(first_step)


def recorded_parts(folder: Path) -> list[int]:
    """First steps of the parts in a folder, ascending."""
    names = {path: path.stem.removeprefix("part-") for path in (folder / STEPS_FOLDER).glob("part-*.safetensors")}
    steps = [int(name) for path, name in names.items() if name.isdecimal() and part_path(folder, int(name)) == path]
    return sorted(steps)


def write_part(folder: Path, first_step: int, table: StepTable) -> None:
    """Writes the part that begins with a step."""
    columns = {name: getattr(table, name) for name in (*_SCALARS, "learning_rates")}
    for name in _LISTS:
        lists = getattr(table, name)
        if lists is not None:
            columns[name] = np.concatenate([np.asarray(each, np.int64) for each in [[], *lists]])
            columns[name + _OFFSETS] = np.cumsum([0, *map(len, lists)], dtype=np.int64)
    tensors = {name: np.ascontiguousarray(column) for name, column in columns.items()}
    with replacing(part_path(folder, first_step)) as temporary:
        save_file(tensors, temporary, metadata={_FIRST_STEP: str(first_step), _SHA256: _digest(tensors)})
        order_metadata(temporary)


def _digest(tensors: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name, values in sorted(tensors.items()):
        digest.update(f"{name}{values.dtype}{values.shape}".encode() + values.tobytes())
    return digest.hexdigest()


def part_length(folder: ArtefactFolder, first_step: int) -> int:
    """Number of steps in the part that begins with a step. Reads its header only."""
    with folder.open_tensors(_part_name(first_step), way_out=_WAY_OUT) as file:
        return file.check("epoch", shape=(None,), dtypes=("F64",))[0]


def read_part(folder: ArtefactFolder, first_step: int) -> StepTable:
    """Reads the part that begins with a step."""
    with folder.open_tensors(_part_name(first_step), way_out=_WAY_OUT) as file:
        file.check_no_others((*_SCALARS, "learning_rates", *_LISTS, *(name + _OFFSETS for name in _LISTS)))
        found = file.metadata.get(_FIRST_STEP)
        if found != str(first_step):
            raise ValueError(f"{file.path} begins at step {shortened(found, 20)}, not at {first_step}. {_WAY_OUT}")

        read: dict[str, np.ndarray] = {}

        def column(name: str, *shape: int | None, dtype: str = "F64") -> np.ndarray:
            # A copy, as the tensor is a view of the file, which may be replaced.
            read[name] = file.read(name, shape=shape, dtypes=(dtype,)).numpy().copy()
            return read[name]

        def lists(name: str) -> list[np.ndarray] | None:
            if name not in file.names and name + _OFFSETS not in file.names:
                return None
            elements, offsets = column(name, None, dtype="I64"), column(name + _OFFSETS, length + 1, dtype="I64")
            if offsets[0] != 0 or offsets[-1] != len(elements) or (offsets[1:] < offsets[:-1]).any():
                raise ValueError(f"{file.path} has offsets of {name} that do not divide {len(elements)}. {_WAY_OUT}")
            check_memory(_ARRAY_BYTES * length, f"{name!r} of {file.path}")
            return [elements[start:stop] for start, stop in zip(offsets[:-1], offsets[1:], strict=True)]

        epoch = column("epoch", None)
        length = len(epoch)
        if length == 0:
            raise ValueError(f"{file.path} has no steps. {_WAY_OUT}")
        sizes = lists("micro_batch_sizes")
        check_memory(_INTEGER_BYTES * sum(map(len, sizes or [])), f"'micro_batch_sizes' of {file.path}")
        table = StepTable(
            epoch=epoch,
            learning_rates=column("learning_rates", length, None),
            gradient_norm=column("gradient_norm", length),
            clip_factor=column("clip_factor", length),
            skipped=column("skipped", length, dtype="BOOL").view(np.uint8) != 0,  # a byte may be other than 0 and 1
            rows=lists("rows"),
            micro_batch_sizes=None if sizes is None else [each.tolist() for each in sizes],
        )
        if file.metadata.get(_SHA256) not in (None, _digest(read)):  # earlier releases wrote none
            raise ValueError(f"{file.path} is not what was recorded: its content changed. {_WAY_OUT}")
        return table


def read_steps(folder: ArtefactFolder, num_steps: int) -> StepTable:
    """Reads steps `0` to `num_steps - 1` from the parts of a folder."""
    tables, done = [], 0
    while done < num_steps:
        try:
            table = read_part(folder, done)
        except FileNotFoundError:
            table = None
        if not table:
            raise ValueError(
                f"{folder}/{STEPS_FOLDER} records no steps {done} to {num_steps - 1}, or not in order. Copy the "
                f"folder again, resume training from a checkpoint at or before step {done}, or record the run from "
                "the beginning."
            )
        tables.append(table)
        done += len(table)
    if not tables:
        raise ValueError(f"{folder} records no steps. Train for at least one step.")
    if len({table.learning_rates.shape[1] for table in tables}) > 1:
        raise ValueError(f"{folder}/{STEPS_FOLDER} has different numbers of learning rates in its parts. {_WAY_OUT}")
    steps = StepTable.concatenate(tables).select(0, num_steps)
    for name in ("learning_rates", "clip_factor"):
        values = getattr(steps, name).reshape(num_steps, -1)
        # NaN is not within bounds either.
        good = ((values >= 0) & (values <= MAX_CONSTANT)).all(1)
        if not good.all():
            step = int(np.argmin(good))
            raise ValueError(
                f"{folder} has {name} {values[step].tolist()[:5]} at step {step}; they must be between 0 and "
                f"{MAX_CONSTANT:g}. {_WAY_OUT}"
            )
    return steps


def check_rows(steps: StepTable, num_rows: int, source: str) -> None:
    """Refuses steps that name rows beyond the `num_rows` of the training set, or not as many as their batches."""
    for step, rows in enumerate(steps.rows or []):
        if len(rows) and not 0 <= rows.min() <= rows.max() < num_rows:
            raise ValueError(
                f"{source} names rows {rows.min()} to {rows.max()} at step {step}, but the training set has "
                f"{num_rows}. {_WAY_OUT}"
            )
        sizes = [len(rows)] if steps.micro_batch_sizes is None else steps.micro_batch_sizes[step]
        if min(sizes, default=0) < 0 or sum(sizes) != len(rows):
            raise ValueError(f"{source} has {len(rows)} rows at step {step}, but batches of {sizes[:5]}. {_WAY_OUT}")
