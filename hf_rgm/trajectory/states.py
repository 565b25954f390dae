"""Recorded states of training: parameters and optimizer moments, one safetensors file each."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from hf_rgm.files.reading import ArtefactFolder, TensorFile, printable
from hf_rgm.files.writing import replacing
from hf_rgm.trajectory.optimizers import Moments
from hf_rgm.trajectory.precision import (
    PRECISIONS,
    SCALE_SUFFIX,
    dequantize,
    dequantize_logarithm,
    quantize,
    quantize_logarithm,
    scale_shape,
)

STATES_FOLDER = "states"
_PARAMETERS = "parameters"
_PRECISION = "precision"
_FLOATS = ("F32", "BF16", "F16")
_WAY_OUT = "Copy the folder again, or record the training run again."


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


def state_name(step: int) -> str:
    """Name of the file that the state of a step is kept in."""
    return f"step-{step:08d}.safetensors"


def state_path(folder: Path, step: int) -> Path:
    """Where the state of a step is kept."""
    return folder / STATES_FOLDER / state_name(step)


def recorded_states(folder: Path) -> list[int]:
    """Steps whose states are in the folder, ascending."""
    names = (path.stem.removeprefix("step-") for path in (folder / STATES_FOLDER).glob("step-*.safetensors"))
    return sorted(int(name) for name in names if name.isdigit())


def detached_state(state: TrajectoryState, dtype: torch.dtype | None = None) -> TrajectoryState:
    """
    A copy of a state on the CPU, which goes on being what it is when training goes on.

    Args:
        state (`TrajectoryState`): On any device and in any dtype.
        dtype (`torch.dtype`, *optional*): Tensors of more bytes per element are cast to this. By default each keeps
            its dtype, up to float32.
    """
    limit = dtype if dtype is not None else torch.float32

    def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: _detached(tensor, limit) for name, tensor in tensors.items()}

    return TrajectoryState(
        state.step, copies(state.parameters), {kind: copies(members) for kind, members in state.moments.items()}
    )


def write_state(
    path: Path,
    state: TrajectoryState,
    *,
    dtype: torch.dtype | None = None,
    precision: str = "float32",
    final: Mapping[str, Tensor] | None = None,
) -> None:
    """
    Writes a state, on any device and in any dtype.

    Args:
        path (`Path`): The file, replaced whole.
        state (`TrajectoryState`): What to write.
        dtype (`torch.dtype`, *optional*): Tensors of more bytes per element are cast to this. By default each keeps
            its dtype, up to float32.
        precision (`str`, *optional*, defaults to `"float32"`): In `"bfloat16"` and `"int8"`, parameters are kept as
            differences from `final`.
        final (`Mapping[str, Tensor]`, *optional*): The trained parameters.
    """
    kinds: dict[str, Mapping[str, Tensor]] = {_PARAMETERS: state.parameters, **state.moments}
    metadata = {"format": "pt", "step": str(state.step)}
    if precision == PRECISIONS[0]:
        copy = detached_state(state, dtype)
        kinds = {_PARAMETERS: copy.parameters, **copy.moments}
        tensors = {f"{kind}.{name}": tensor for kind, members in kinds.items() for name, tensor in members.items()}
    else:
        if final is None:
            raise ValueError(f"A state in {precision} is kept as the difference from the trained model: pass `final`.")
        kinds[_PARAMETERS] = {name: tensor - final[name] for name, tensor in state.parameters.items()}
        tensors = {}
        for kind, members in kinds.items():
            for name, tensor in members.items():
                tensors |= _rounded(kind, name, _detached(tensor.float(), torch.float32), precision)
        metadata[_PRECISION] = precision
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def _rounded(kind: str, name: str, tensor: Tensor, precision: str) -> dict[str, Tensor]:
    if precision == "bfloat16":
        return {f"{kind}.{name}": tensor.bfloat16()}
    values, scale = quantize_logarithm(tensor) if kind == "exp_avg_sq" else quantize(tensor)
    return {f"{kind}.{name}": values, f"{kind}{SCALE_SUFFIX}.{name}": scale}


def _detached(tensor: Tensor, limit: torch.dtype) -> Tensor:
    dtype = limit if tensor.dtype.itemsize > limit.itemsize else tensor.dtype
    return tensor.detach().to(device="cpu", dtype=dtype, copy=True, memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class StateFile:
    """
    A state that stays on disk, or on the Hub, until it is asked for.

    Args:
        folder (`ArtefactFolder`): The folder of the trajectory.
        step (`int`): The state's step.
        shapes (`Mapping[str, tuple[int, ...]]`): Shapes of the trainable parameters.
        moment_names (`tuple[str, ...]`): Moments the optimizer keeps.
        reference (`StateFile`, *optional*): The trained model, whose differences from this state the file may hold.
    """

    folder: ArtefactFolder
    step: int
    shapes: Mapping[str, tuple[int, ...]]
    moment_names: tuple[str, ...]
    reference: StateFile | None = None

    @property
    def name(self) -> str:
        """The file, in the folder."""
        return f"{STATES_FOLDER}/{state_name(self.step)}"

    @property
    def at_hand(self) -> bool:
        """Whether it can be read without fetching it."""
        return self.folder.at_hand(self.name)

    def path(self) -> Path:
        """
        The file, fetched if need be.

        Raises:
            FileNotFoundError: If it is missing.
        """
        try:
            return self.folder.file(self.name)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{self.folder}/{self.name} is missing. Copy the whole folder again, or record the training run again."
            ) from error

    def check(self) -> None:
        """
        Checks that the file holds the parameters, and moments of their shapes. Reads its header only.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is damaged or holds something else.
        """
        with self._opened() as file:
            self._members(file)

    def read(self) -> TrajectoryState:
        """
        Reads the state as float32, differences added to what they are differences from.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is damaged, holds something else, or is NaN or infinite.
        """
        with self._opened() as file:
            precision = file.metadata.get(_PRECISION, PRECISIONS[0])
            values = {
                kind: {name: self._tensor(file, kind, name, precision) for name in names}
                for kind, names in self._members(file).items()
            }
        parameters = values.pop(_PARAMETERS)
        if precision != PRECISIONS[0]:
            if self.reference is None:
                raise ValueError(f"{self.path()} holds differences from nothing. {_WAY_OUT}")
            final = self.reference.read().parameters
            parameters = {name: final[name] + difference for name, difference in parameters.items()}
        return TrajectoryState(self.step, parameters, values)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[TensorFile]:
        path = self.path()
        try:
            with self.folder.open_tensors(self.name) as file:
                yield file
        except ValueError as error:
            if "is damaged" not in str(error):
                raise
            raise ValueError(f"{path} is damaged ({printable(str(error.__cause__ or error))}). {_WAY_OUT}") from error

    def _members(self, file: TensorFile) -> dict[str, list[str]]:
        """Names of the parameters each kind of tensor is there for."""
        precision = file.metadata.get(_PRECISION, PRECISIONS[0])
        if precision not in PRECISIONS:
            raise ValueError(f"{file.path} has states in {precision!r}, not in {', '.join(PRECISIONS)}. {_WAY_OUT}")
        found: dict[str, dict[str, tuple[int, ...]]] = {_PARAMETERS: {}}
        scales: set[tuple[str, str]] = set()
        for key in file.names:
            kind, _, name = key.partition(".")
            if precision == "int8" and kind.endswith(SCALE_SUFFIX):
                scales.add((kind.removesuffix(SCALE_SUFFIX), name))
            else:
                found.setdefault(kind, {})[name] = file.shape(key)
        known = found[_PARAMETERS]
        missing, extra = sorted(set(self.shapes) - set(known)), sorted(set(known) - set(self.shapes))
        if missing or extra:
            raise ValueError(f"{file.path} lacks parameters {missing[:5]} and has {extra[:5]} too many. {_WAY_OUT}")
        unknown = sorted(set(found) - {_PARAMETERS, *self.moment_names})
        if unknown:
            raise ValueError(f"{file.path} holds {unknown}, which this optimizer does not keep. {_WAY_OUT}")
        for kind, members in found.items():
            for name, shape in members.items():
                if name not in self.shapes or shape != tuple(self.shapes[name]):
                    raise ValueError(
                        f"{file.path} has {kind} of {name!r} with shape {shape}, expected {self.shapes.get(name)}. "
                        f"{_WAY_OUT}"
                    )
        if precision == "int8" and scales != {(kind, name) for kind, members in found.items() for name in members}:
            raise ValueError(f"{file.path} holds other scales than tensors. {_WAY_OUT}")
        return {kind: list(members) for kind, members in found.items()}

    def _tensor(self, file: TensorFile, kind: str, name: str, precision: str) -> Tensor:
        shape = tuple(self.shapes[name])
        is_logarithm = kind == "exp_avg_sq"
        dtypes = ("U8",) if is_logarithm else ("I8",)
        tensor = file.read(f"{kind}.{name}", shape=shape, dtypes=dtypes if precision == "int8" else _FLOATS)
        if precision == "int8":
            scale = file.read(f"{kind}{SCALE_SUFFIX}.{name}", shape=scale_shape(kind, shape), dtypes=("F32",))
            tensor = dequantize_logarithm(tensor, scale) if is_logarithm else dequantize(tensor, scale)
        tensor = tensor.float()
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{file.path} has NaN or infinite {kind} of {name!r}. {_WAY_OUT}")
        return tensor
