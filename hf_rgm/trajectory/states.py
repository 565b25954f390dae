"""Recorded states of training: parameters and optimizer moments, one safetensors file each."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf_rgm.trajectory.optimizers import Moments

STATES_FOLDER = "states"
_PARAMETERS = "parameters"


@dataclass
class TrajectoryState:
    """
    Where training was before update `step`.

    Args:
        step (`int`): Number of updates made so far; `0` is the start of training.
        parameters (`dict[str, Tensor]`): The trainable parameters, float32 on the CPU.
        moments (`dict[str, dict[str, Tensor]]`): Moment name (`"exp_avg"`, `"exp_avg_sq"` or `"momentum_buffer"`) to
            parameter name to tensor of the parameter's shape, float32 on the CPU. A moment that the optimizer had not
            initialised is absent; at step 0 usually all are.
    """

    step: int
    parameters: dict[str, Tensor]
    moments: Moments


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path that takes the place of `path`, flushed to disk, if the block ends without error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def state_path(folder: Path, step: int) -> Path:
    """Where the state of a step is kept."""
    return folder / STATES_FOLDER / f"step-{step:08d}.safetensors"


def recorded_states(folder: Path) -> list[int]:
    """Steps whose states are in the folder, ascending."""
    names = (path.stem.removeprefix("step-") for path in (folder / STATES_FOLDER).glob("step-*.safetensors"))
    return sorted(int(name) for name in names if name.isdigit())


def write_state(path: Path, state: TrajectoryState, *, dtype: torch.dtype | None = None) -> None:
    """
    Writes a state, on any device and in any dtype.

    Args:
        path (`Path`): The file, replaced whole.
        state (`TrajectoryState`): What to write.
        dtype (`torch.dtype`, *optional*): Tensors of more bytes per element are cast to this. By default each keeps
            its dtype, up to float32.
    """
    limit = dtype if dtype is not None else torch.float32
    tensors = {f"{_PARAMETERS}.{name}": tensor for name, tensor in state.parameters.items()}
    for kind, members in state.moments.items():
        tensors |= {f"{kind}.{name}": tensor for name, tensor in members.items()}
    with replacing(path) as temporary:
        save_file(
            {name: _detached(tensor, limit) for name, tensor in tensors.items()},
            temporary,
            metadata={"format": "pt", "step": str(state.step)},
        )


def _detached(tensor: Tensor, limit: torch.dtype) -> Tensor:
    dtype = limit if tensor.dtype.itemsize > limit.itemsize else tensor.dtype
    return tensor.detach().to(device="cpu", dtype=dtype, copy=True, memory_format=torch.contiguous_format)


def read_state(path: Path, step: int) -> TrajectoryState:
    """
    Reads a state as float32.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged.
    """
    state = TrajectoryState(step, {}, {})
    with _opened(path) as file:
        for key in file.keys():  # noqa: SIM118
            kind, _, name = key.partition(".")
            members = state.parameters if kind == _PARAMETERS else state.moments.setdefault(kind, {})
            members[name] = file.get_tensor(key).float()
    return state


def check_state(path: Path, shapes: Mapping[str, tuple[int, ...]], moment_names: tuple[str, ...]) -> None:
    """
    Checks that a file holds the given parameters, and moments of their shapes. Reads the file's header only.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged or holds something else.
    """
    found: dict[str, dict[str, tuple[int, ...]]] = {_PARAMETERS: {}}
    with _opened(path) as file:
        for key in file.keys():  # noqa: SIM118
            kind, _, name = key.partition(".")
            found.setdefault(kind, {})[name] = tuple(file.get_slice(key).get_shape())
    way_out = "Record the training run again."
    missing, extra = sorted(set(shapes) - set(found[_PARAMETERS])), sorted(set(found[_PARAMETERS]) - set(shapes))
    if missing or extra:
        raise ValueError(f"{path} lacks parameters {missing[:5]} and has {extra[:5]} too many. {way_out}")
    unknown = sorted(set(found) - {_PARAMETERS, *moment_names})
    if unknown:
        raise ValueError(f"{path} holds {unknown}, which this optimizer does not keep. {way_out}")
    for kind, members in found.items():
        for name, shape in members.items():
            if name not in shapes or shape != tuple(shapes[name]):
                raise ValueError(
                    f"{path} has {kind} of {name!r} with shape {shape}, expected {shapes.get(name)}. {way_out}"
                )


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing. Copy the whole folder again, or record the training run again.")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged ({error}). Copy the folder again, or record the training run again."
        ) from error
