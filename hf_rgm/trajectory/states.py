"""Recorded states of training: a safetensors file each, with parameters and optimizer moments."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from hf_rgm.files.reading import MAX_HEADER_BYTES, ArtefactFolder, TensorFile, printable
from hf_rgm.files.writing import order_metadata, replacing
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
MAX_VALUE = 1e20
"""Larger parameters and moments are none of a training that went on."""

_VALUE_BYTES = 16  # at most, with the scales of a tensor whose rows have one value
_FLOATS = ("F32", "BF16", "F16")
_WAY_OUT = "Copy the folder again, or record the training run again."


@dataclass
class TrajectoryState:
    """Trainable parameters and optimizer moments before update `step`, float32 on the CPU once loaded."""

    step: int
    parameters: dict[str, Tensor]
    moments: Moments  # name as in torch -> parameter -> tensor; those not initialised yet are absent


def state_name(step: int) -> str:
    return f"step-{step:08d}.safetensors"


def state_path(folder: Path, step: int) -> Path:
    return folder / STATES_FOLDER / state_name(step)


def recorded_states(folder: Path) -> list[int]:
    """Steps whose states are in the folder, ascending."""
    names = (path.stem.removeprefix("step-") for path in (folder / STATES_FOLDER).glob("step-*.safetensors"))
    return sorted(int(name) for name in names if name.isdigit())


def detached_state(state: TrajectoryState, dtype: torch.dtype = torch.float32) -> TrajectoryState:
    """Copy of a state on the CPU; tensors wider than `dtype` (float32 by default) are cast to it."""

    def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: _detached(tensor, dtype) for name, tensor in tensors.items()}

    moments = {kind: copies(members) for kind, members in state.moments.items()}
    return TrajectoryState(state.step, copies(state.parameters), moments)


def write_state(
    path: Path, state: TrajectoryState, *, precision: str = "float32", final: Mapping[str, Tensor] | None = None
) -> None:
    """Writes a state; in `bfloat16` and `int8`, parameters are kept as differences from `final`."""
    metadata = {"format": "pt", "step": str(state.step)}
    if (precision == PRECISIONS[0]) != (final is None):
        raise ValueError("States of lower precision, and no others, are differences from the final state.")
    if precision != PRECISIONS[0]:
        metadata[_PRECISION] = precision
    tensors = {}
    for kind, members in {_PARAMETERS: state.parameters, **state.moments}.items():
        for name, tensor in members.items():
            if final is not None and kind == _PARAMETERS:
                tensor = tensor - final[name]
            tensors |= _rounded(kind, name, _detached(tensor, torch.float32), precision)
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)
        order_metadata(temporary)


def _rounded(kind: str, name: str, tensor: Tensor, precision: str) -> dict[str, Tensor]:
    if precision != "int8":
        return {f"{kind}.{name}": tensor.bfloat16() if precision == "bfloat16" else tensor}
    # Second moments span many orders of magnitude.
    values, scale = (quantize_logarithm if kind == "exp_avg_sq" else quantize)(tensor.float())
    return {f"{kind}.{name}": values, f"{kind}{SCALE_SUFFIX}.{name}": scale}


def _detached(tensor: Tensor, limit: torch.dtype) -> Tensor:
    dtype = limit if tensor.dtype.itemsize > limit.itemsize else tensor.dtype
    return tensor.detach().to(device="cpu", dtype=dtype, copy=True, memory_format=torch.contiguous_format)


def file_sha256(path: Path) -> str:
    """SHA-256 of a safetensors file, computed again only if it was written since."""
    told = path.stat()
    return _file_sha256(path, told.st_mtime_ns, told.st_size)


@functools.lru_cache(maxsize=256)
def _file_sha256(path: Path, changed: int, size: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        # Safetensors writes the keys of its header in any order.
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        digest.update(json.dumps(header, sort_keys=True).encode())
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class StateFile:
    """A state on disk or on the Hub, read when asked for."""

    folder: ArtefactFolder
    step: int
    shapes: Mapping[str, tuple[int, ...]]
    moment_names: tuple[str, ...]
    reference: StateFile | None = None  # the trained model, which the file may hold differences from
    sha256: str | None = None  # of the file, as recorded

    @property
    def name(self) -> str:
        return f"{STATES_FOLDER}/{state_name(self.step)}"

    @property
    def at_hand(self) -> bool:
        """Whether it can be read without a download."""
        return self.folder.at_hand(self.name)

    def path(self) -> Path:
        """Path of the file, downloaded if necessary."""
        num_values = sum(map(math.prod, self.shapes.values())) * (1 + len(self.moment_names))
        try:
            return self.folder.file(self.name, max_bytes=MAX_HEADER_BYTES + _VALUE_BYTES * num_values)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{self.folder}/{self.name} is missing. Copy the whole folder again, or record the training run again."
            ) from error

    def checked_path(self) -> Path:
        """Path of the file, if its content is what was recorded."""
        with self._opened() as file:
            self._members(file)
            self._check_content(file)
            return file.path

    def _check_content(self, file: TensorFile) -> None:
        if self.sha256 not in (None, file_sha256(file.path)):
            raise ValueError(f"{file.path} is not the state that was recorded: its content changed. {_WAY_OUT}")

    def check(self) -> None:
        """Checks names and shapes by the file's header."""
        with self._opened() as file:
            self._members(file)

    def read(self) -> TrajectoryState:
        """Reads the state as float32, if it is as recorded; differences are added to the trained parameters."""
        with self._opened() as file:
            precision = file.metadata.get(_PRECISION, PRECISIONS[0])
            values = {
                kind: {name: self._tensor(file, kind, name, precision) for name in names}
                for kind, names in self._members(file).items()
            }
            self._check_content(file)
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
        """Parameter names by kind of tensor (parameters and moments)."""
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
            if bool((scale[1:] if is_logarithm else scale).lt(0).any()):
                raise ValueError(f"{file.path} has negative scales of {kind} of {name!r}. {_WAY_OUT}")
            tensor = dequantize_logarithm(tensor, scale) if is_logarithm else dequantize(tensor, scale)
        tensor = tensor.float()
        lowest = 0 if is_logarithm else -MAX_VALUE
        if not bool(((tensor >= lowest) & (tensor <= MAX_VALUE)).all()):
            raise ValueError(
                f"{file.path} has NaN or infinite {kind} of {name!r}, or values outside {lowest:g} to {MAX_VALUE:g}. "
                f"{_WAY_OUT}"
            )
        return tensor
