"""Files of responses: their layout and their checks."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_rgm.files.reading import WAY_OUT, ArtefactFolder, TensorFile, printable

RESPONSES_FILE = "responses.safetensors"
PRECISIONS = ("bfloat16", "int8")
VALUES, SCALES = "values", "scales"
_DTYPES = {"bfloat16": "BF16", "int8": "I8"}
_LARGEST = 128
"""Largest magnitude of an int8: a scale times this must be finite."""

Layout = Mapping[str, tuple[tuple[int, ...], str]]
"""Shape and dtype of each stored tensor, by name."""


@dataclass
class ResponsesDescription:
    """Description of responses in `synset.json`; `num_bytes` and `sha256` are of the stored tensors."""

    precision: str
    rewind_step: int
    num_bytes: int
    sha256: str

    def __post_init__(self) -> None:
        check_precision(self.precision)
        if self.rewind_step < 0:
            raise ValueError(f"rewind_step is {self.rewind_step}, no training step")


class ResponsesFile:
    """A file of responses that stays on disk, or on the Hub, until it is used."""

    def __init__(
        self, folder: ArtefactFolder, layout: Layout, told: ResponsesDescription, parameters_sha256: str
    ) -> None:
        self._folder = folder
        self._layout = layout
        self._told = told
        self._metadata = header_metadata(told.precision, told.rewind_step, parameters_sha256)
        self._read_whole: tuple[int, ...] | None = None

    @property
    def at_hand(self) -> bool:
        """Whether it can be read without a download."""
        return self._folder.at_hand(RESPONSES_FILE)

    def path(self) -> Path:
        return self._folder.file(RESPONSES_FILE)

    def check_header(self) -> None:
        """Checks tensor names, shapes and the model by the file's header alone."""
        with self._folder.open_tensors(RESPONSES_FILE) as file:
            self._check_header(file)

    @contextlib.contextmanager
    def opened(self) -> Iterator[Callable[[str], Tensor]]:
        """A function that reads a tensor by name."""
        with self._folder.open_tensors(RESPONSES_FILE) as file:
            self._check_header(file)
            # All of a new or changed file is compared with what the synset announces.
            state = file.path.stat()
            signature = (state.st_ino, state.st_mtime_ns, state.st_size)
            if signature != self._read_whole:
                self._check_content(file)
                self._read_whole = signature
            yield lambda key: self._tensor(file, key)

    def _tensor(self, file: TensorFile, key: str) -> Tensor:
        shape, dtype = self._layout[key]
        return file.read(key, shape=shape, dtypes=(dtype,))

    def _check_header(self, file: TensorFile) -> None:
        missing, extra = sorted(set(self._layout) - set(file.names)), sorted(set(file.names) - set(self._layout))
        if missing or extra:
            raise ValueError(
                f"{file.path} lacks the tensors {shortened(missing)} and has {shortened(extra)} too many: these are "
                f"no {self._told.precision} responses of this model. {WAY_OUT}"
            )
        for key, (shape, dtype) in self._layout.items():
            if (file.shape(key), file.dtype(key)) != (shape, dtype):
                raise ValueError(
                    f"{file.path} has {printable(key)!r} of shape {file.shape(key)} and dtype {file.dtype(key)}; "
                    f"expected {shape} and {dtype} for this model and these clusters. {WAY_OUT}"
                )
        for name, value in self._metadata.items():
            found = file.metadata.get(name)
            if found != value:
                raise ValueError(
                    f"{file.path} has {name} {shortened(found)}, the synset's is {shortened(value)}: these are other "
                    f"responses, or those of another model. {WAY_OUT}"
                )

    def _check_content(self, file: TensorFile) -> None:
        for key in self._layout:
            kind, _, name = key.partition(".")
            if kind == VALUES:
                scale = f"{SCALES}.{name}"
                scales = self._tensor(file, scale) if scale in self._layout else None
                bad = torch.nonzero(unusable_clusters(self._tensor(file, key), scales)).flatten().tolist()
                if bad:
                    raise ValueError(
                        f"{file.path} has NaN or infinite responses of {printable(name)!r}, or impossible scales, in "
                        f"clusters {bad[:5]}. {WAY_OUT}"
                    )
        found = stored_sha256(self._layout, lambda key: self._tensor(file, key), self._told.rewind_step)
        if found != self._told.sha256:
            raise ValueError(
                f"{file.path} has SHA-256 {found[:12]} over its responses, the synset announces "
                f"{shortened(self._told.sha256)}: the file was changed, or is another synset's. {WAY_OUT}"
            )


def check_precision(precision: str) -> None:
    if precision not in PRECISIONS:
        raise ValueError(
            f"The precision of responses must be one of {', '.join(PRECISIONS)}, got {shortened(precision)}."
        )


def tensor_layout(precision: str, num_clusters: int, shapes: Mapping[str, tuple[int, ...]]) -> Layout:
    """Tensors of a file: `values.NAME` `(num_clusters, *shape)`, and for int8 `scales.NAME` `(num_clusters,)`."""
    layout: dict[str, tuple[tuple[int, ...], str]] = {}
    for name, shape in shapes.items():
        layout[f"{VALUES}.{name}"] = ((num_clusters, *shape), _DTYPES[precision])
        if precision == "int8":
            layout[f"{SCALES}.{name}"] = ((num_clusters,), "F32")
    return layout


def header_metadata(precision: str, rewind_step: int, parameters_sha256: str) -> dict[str, str]:
    """Metadata in the header of a file."""
    return {"precision": precision, "rewind_step": str(rewind_step), "parameters_sha256": parameters_sha256}


def stored_sha256(layout: Layout, read: Callable[[str], Tensor], rewind_step: int) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of the stored tensors, and the step."""
    digest = hashlib.sha256(str(rewind_step).encode())
    for key, (shape, dtype) in layout.items():
        digest.update(f"{key}{shape}{dtype}".encode())
        digest.update(read(key).contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def unusable_clusters(values: Tensor, scales: Tensor | None) -> Tensor:
    """Clusters `(num_clusters,)`, bool, whose values `(num_clusters, *shape)` are not finite or have a wrong scale."""
    values = values.reshape(len(values), math.prod(values.shape[1:]))
    if scales is None:
        return ~torch.isfinite(values).all(1)
    bad = ~torch.isfinite(_LARGEST * scales) | (scales < 0)
    zero = torch.nonzero(scales == 0).flatten()
    bad[zero] |= (values[zero] != 0).any(1)
    return bad


def shortened(value: Any) -> str:
    """Text from a file, for errors."""
    text = printable(str(value))
    return text if len(text) <= 80 else f"{text[:80]}..."
