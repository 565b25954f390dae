"""What happened at every step of training, kept as parquet parts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hf_rgm.files.reading import ArtefactFolder, check_columns, check_no_nulls, check_table, printable
from hf_rgm.files.writing import replacing
from hf_rgm.trajectory.optimizers import MAX_CONSTANT

STEPS_FOLDER = "steps"
_WAY_OUT = "Copy the folder again, or record the training run again."
_SCALARS = {"epoch": np.float64, "gradient_norm": np.float64, "clip_factor": np.float64, "skipped": np.bool_}
_COLUMNS: dict[str, pa.DataType] = {
    "step": pa.int64(),
    **{name: pa.from_numpy_dtype(dtype) for name, dtype in _SCALARS.items()},
    "learning_rates": pa.large_list(pa.float64()),
    "rows": pa.large_list(pa.int64()),
    "micro_batch_sizes": pa.large_list(pa.int64()),
}
_ROW_COLUMNS = ("rows", "micro_batch_sizes")
_USED_NUMBERS = ("learning_rates", "clip_factor")


@dataclass
class StepTable:
    """
    One entry per update; entry `t` describes the update from state `t` to state `t + 1`.

    Args:
        epoch (`np.ndarray`): `(num_steps,)`, float64. Epochs done after the update, as in `TrainerState.epoch`.
        learning_rates (`np.ndarray`): `(num_steps, num_groups)`, float64. What the update used.
        gradient_norm (`np.ndarray`): `(num_steps,)`, float64. L2 norm of the gradient before clipping.
        clip_factor (`np.ndarray`): `(num_steps,)`, float64. What clipping multiplied the gradient by, 1 for none.
        skipped (`np.ndarray`): `(num_steps,)`, bool. Whether the optimizer left this update out (loss scaling).
        rows (`list[np.ndarray]`, *optional*): For every update the rows of the training set it saw, int64, in the
            order it saw them. `None` if they are kept private.
        micro_batch_sizes (`list[list[int]]`, *optional*): How `rows` splits into batches (gradient accumulation).

    Raises:
        ValueError: If lengths differ.
    """

    epoch: np.ndarray
    learning_rates: np.ndarray
    gradient_norm: np.ndarray
    clip_factor: np.ndarray
    skipped: np.ndarray
    rows: list[np.ndarray] | None = None
    micro_batch_sizes: list[list[int]] | None = None

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
        columns = {name: getattr(self, name) for name in (*_SCALARS, "learning_rates", "rows", "micro_batch_sizes")}
        lengths = {name: len(column) for name, column in columns.items() if column is not None}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"The columns of a step table must have one length, got {lengths}.")

    def __len__(self) -> int:
        return len(self.epoch)

    def select(self, start: int, stop: int) -> StepTable:
        """The steps `start` to `stop - 1`."""
        part = slice(start, stop)
        return StepTable(
            **{name: getattr(self, name)[part] for name in (*_SCALARS, "learning_rates")},
            rows=None if self.rows is None else self.rows[part],
            micro_batch_sizes=None if self.micro_batch_sizes is None else self.micro_batch_sizes[part],
        )

    @classmethod
    def concatenate(cls, tables: Sequence[StepTable]) -> StepTable:
        """Several tables, one after the other. Rows are kept if all have them."""
        rows = [table.rows for table in tables if table.rows is not None]
        sizes = [table.micro_batch_sizes for table in tables if table.micro_batch_sizes is not None]
        return cls(
            **{name: np.concatenate([getattr(t, name) for t in tables]) for name in (*_SCALARS, "learning_rates")},
            rows=list(chain.from_iterable(rows)) if len(rows) == len(tables) else None,
            micro_batch_sizes=list(chain.from_iterable(sizes)) if len(sizes) == len(tables) else None,
        )


def part_name(first_step: int) -> str:
    """Name of the part that begins with the given step."""
    return f"part-{first_step:08d}.parquet"


def part_path(folder: Path, first_step: int) -> Path:
    """Where a part that begins with the given step is kept."""
    return folder / STEPS_FOLDER / part_name(first_step)


def recorded_parts(folder: Path) -> list[Path]:
    """The parts in the folder, in order."""
    parts = (folder / STEPS_FOLDER).glob("part-*.parquet")
    return sorted(path for path in parts if path.stem.removeprefix("part-").isdigit())


def first_step(part: Path) -> int:
    """The step a part begins with."""
    return int(part.stem.removeprefix("part-"))


def part_length(part: Path) -> int:
    """
    Number of steps in a part. Reads the file's footer only.

    Raises:
        ValueError: If it is damaged.
    """
    with _damage_named(part):
        return pq.read_metadata(part).num_rows


def write_part(path: Path, table: StepTable) -> None:
    """Writes a part, whose name tells the step it begins with."""
    columns: dict[str, pa.Array] = {"step": pa.array(np.arange(len(table), dtype=np.int64) + first_step(path))}
    columns |= {name: pa.array(getattr(table, name)) for name in _SCALARS}
    columns["learning_rates"] = _lists(list(table.learning_rates), np.float64)
    if table.rows is not None:
        columns["rows"] = _lists(table.rows, np.int64)
    if table.micro_batch_sizes is not None:
        columns["micro_batch_sizes"] = _lists([np.asarray(sizes) for sizes in table.micro_batch_sizes], np.int64)
    with replacing(path) as temporary:
        pq.write_table(pa.table(columns), temporary)


def _lists(values: list[np.ndarray], dtype: type) -> pa.LargeListArray:
    offsets = np.cumsum([0, *(len(value) for value in values)], dtype=np.int64)
    flat = np.concatenate([np.empty(0, dtype), *values]).astype(dtype)
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(flat))


def read_part(path: Path) -> StepTable:
    """
    Reads one part.

    Raises:
        MemoryError: If it is larger than the memory that is free.
        ValueError: If it is damaged.
    """
    with _damage_named(path), pq.ParquetFile(path) as file:
        check_columns(file.schema_arrow, _COLUMNS, optional=_ROW_COLUMNS)
        extra = sorted(set(file.schema_arrow.names) - set(_COLUMNS))
        if extra:
            raise ValueError(f"it has the columns {extra[:5]} too many")
        check_table(path)
        content = file.read()
        check_no_nulls(content)
    steps = content["step"].to_numpy()
    if not np.array_equal(steps, np.arange(len(steps)) + first_step(path)):
        raise ValueError(f"{path} does not hold consecutive steps from {first_step(path)} on. {_WAY_OUT}")
    rates = np.array([len(values) for values in _split(content["learning_rates"])])
    if len(set(rates.tolist())) > 1:
        raise ValueError(f"{path} has between {rates.min()} and {rates.max()} learning rates a step. {_WAY_OUT}")
    rows = _split(content["rows"]) if "rows" in content.column_names else None
    sizes = _split(content["micro_batch_sizes"]) if "micro_batch_sizes" in content.column_names else None
    return StepTable(
        **{name: content[name].to_numpy() for name in _SCALARS},
        learning_rates=np.stack(_split(content["learning_rates"])) if len(steps) else np.empty((0, 0)),
        rows=rows,
        micro_batch_sizes=None if sizes is None else [values.tolist() for values in sizes],
    )


@contextlib.contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({printable(str(error))}). {_WAY_OUT}") from error


def _split(column: pa.ChunkedArray) -> list[np.ndarray]:
    return [values for chunk in column.chunks for values in _split_chunk(chunk)]


def _split_chunk(chunk: pa.LargeListArray) -> list[np.ndarray]:
    offsets = chunk.offsets.to_numpy()
    values = chunk.values.to_numpy(zero_copy_only=False)
    return [values[start:stop] for start, stop in zip(offsets[:-1], offsets[1:], strict=True)]


def read_steps(folder: ArtefactFolder, num_steps: int) -> StepTable:
    """
    Reads steps `0` to `num_steps - 1` from the parts of a folder.

    Raises:
        ValueError: If steps are missing or a part is damaged, or what is read can be no training; steps are named.
    """
    tables, done = [], 0
    while done < num_steps:
        name = f"{STEPS_FOLDER}/{part_name(done)}"
        try:
            table = read_part(folder.file(name))
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
    for name in _USED_NUMBERS:
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
    """
    Checks that steps name rows of the training set, as many as their batches have.

    Args:
        steps (`StepTable`): The steps.
        num_rows (`int`): Length of the training set.
        source (`str`): Where they are from, for the error.

    Raises:
        ValueError: If they do not.
    """
    for step, rows in enumerate(steps.rows or []):
        if len(rows) and not 0 <= rows.min() <= rows.max() < num_rows:
            raise ValueError(
                f"{source} names rows {rows.min()} to {rows.max()} at step {step}, but the training set has "
                f"{num_rows}. {_WAY_OUT}"
            )
        sizes = [len(rows)] if steps.micro_batch_sizes is None else steps.micro_batch_sizes[step]
        if min(sizes, default=0) < 0 or sum(sizes) != len(rows):
            raise ValueError(f"{source} has {len(rows)} rows at step {step}, but batches of {sizes[:5]}. {_WAY_OUT}")
