"""Responses of a synset: changes of the trained parameters if a cluster is left out, in memory or in a file."""

from __future__ import annotations

import contextlib
import hashlib
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from hf_rgm.files.reading import DTYPE_BYTES, WAY_OUT, ArtefactFolder, TensorFile, check_memory, printable, shortened
from hf_rgm.files.writing import order_metadata
from hf_rgm.trajectory.precision import quantize_rows

if TYPE_CHECKING:
    from hf_rgm.synset.synset import Synset

RESPONSES_FILE = "responses.safetensors"
PRECISIONS = {"bfloat16": "BF16", "int8": "I8"}
VALUES, SCALES = "values", "scales"
LARGEST_INT8 = 128
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
        _check_precision(self.precision)
        if self.rewind_step < 0:
            raise ValueError(f"rewind_step is {self.rewind_step}, no training step")


@dataclass(frozen=True, eq=False)
class Responses:
    """Changes `δ_k` of the trained parameters if cluster `k` is left out, in 8 or 16 bits, in memory or in a file."""

    precision: str  # "bfloat16", or "int8" with a scale for each cluster and parameter tensor
    rewind_step: int  # the training step they were followed from
    num_clusters: int
    parameter_shapes: Mapping[str, tuple[int, ...]]  # in the recorded run's order, which is that of flat vectors
    sha256: str  # identity of the stored form
    source: Mapping[str, Tensor] | ResponsesFile = field(repr=False)
    parameters_sha256: str | None = None  # identity of the trained parameters that they change

    @classmethod
    def encode(
        cls,
        deviations: Tensor,
        parameter_shapes: Mapping[str, tuple[int, ...]],
        precision: str = "int8",
        *,
        rewind_step: int,
        cluster_names: Sequence[str] | None = None,
        parameters_sha256: str | None = None,
    ) -> Responses:
        """Rounds deviations `(num_clusters, num_parameters)`, parameters without the cluster minus trained ones."""
        # int8 is off by at most half a level, of 127 from zero to the largest value of a cluster's parameter tensor.
        _check_precision(precision)
        shapes = {name: tuple(shape) for name, shape in parameter_shapes.items()}
        sizes = [math.prod(shape) for shape in shapes.values()]
        if deviations.dim() != 2 or not len(deviations) or deviations.shape[1] != sum(sizes):
            raise ValueError(
                f"`deviations` must have shape (num_clusters, {sum(sizes)}) for these parameters, got "
                f"{tuple(deviations.shape)}. Pass a vector of all trainable parameters for each cluster."
            )
        if rewind_step < 0:
            raise ValueError(f"`rewind_step` must be a training step, got {rewind_step}. The first is 0.")
        bad = ~torch.isfinite(deviations).all(1).cpu()
        tensors: dict[str, Tensor] = {}
        for (name, shape), piece in zip(shapes.items(), deviations.split(sizes, dim=1), strict=True):
            rows = piece.detach().to(device="cpu", dtype=torch.float32)
            rounded, scales = quantize_rows(rows) if precision == "int8" else (rows.bfloat16(), None)
            bad |= _unusable_clusters(rounded, scales)
            tensors[f"{VALUES}.{name}"] = rounded.reshape(len(rows), *shape).contiguous()
            if scales is not None:
                tensors[f"{SCALES}.{name}"] = scales
        if bool(bad.any()):
            names = range(len(bad)) if cluster_names is None else [printable(name) for name in cluster_names]
            clusters = [names[k] for k in torch.nonzero(bad).flatten().tolist()[:5]]
            raise ValueError(
                f"The deviations of clusters {clusters} are NaN, infinite or too large for {precision}. Follow them "
                "from a later training step, or keep the synset without responses."
            )
        sha256 = _stored_sha256(_layout(precision, len(bad), shapes), tensors.__getitem__, rewind_step)
        return cls(precision, rewind_step, len(bad), shapes, sha256, tensors, parameters_sha256)

    @classmethod
    def open(
        cls,
        folder: ArtefactFolder,
        told: ResponsesDescription,
        *,
        num_clusters: int,
        parameter_shapes: Mapping[str, tuple[int, ...]],
        parameters_sha256: str,
        source: str,
    ) -> Responses:
        """Responses of a saved synset; their values are read, or downloaded from the Hub, at first use."""
        file = ResponsesFile(folder, _layout(told.precision, num_clusters, parameter_shapes), told, parameters_sha256)
        responses = cls(
            told.precision, told.rewind_step, num_clusters, parameter_shapes, told.sha256, file, parameters_sha256
        )
        if told.num_bytes != responses.num_bytes:
            raise ValueError(
                f"{source} announces responses of {told.num_bytes} bytes; {num_clusters} clusters and this model's "
                f"parameters take {responses.num_bytes} in {told.precision}. The files do not belong together. "
                f"{WAY_OUT}"
            )
        if file.at_hand or not folder.is_remote:
            with folder.open_tensors(RESPONSES_FILE, num_bytes=told.num_bytes) as tensors:
                file.check_header(tensors)
        return responses

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.parameter_shapes.values())

    @property
    def num_bytes(self) -> int:
        """Size of the stored tensors, without reading them."""
        layout = _layout(self.precision, self.num_clusters, self.parameter_shapes)
        return sum(math.prod(shape) * DTYPE_BYTES[dtype] for shape, dtype in layout.values())

    @property
    def at_hand(self) -> bool:
        """Whether they can be read without a download."""
        return not isinstance(self.source, ResponsesFile) or self.source.at_hand

    def decode(self, clusters: slice = slice(None)) -> Tensor:
        """Deviations `(num_chosen, num_parameters)` of some clusters or all, float32, on the CPU."""
        if not isinstance(clusters, slice):
            raise TypeError(f"`clusters` must be a slice, got {clusters!r}. For cluster k pass slice(k, k + 1).")
        num_chosen = len(range(self.num_clusters)[clusters])
        check_memory(4 * num_chosen * self.num_parameters, "Decoding responses")
        decoded = torch.empty(num_chosen, self.num_parameters)
        pieces = decoded.split([math.prod(shape) for shape in self.parameter_shapes.values()], dim=1)
        with self._opened() as read:
            for name, piece in zip(self.parameter_shapes, pieces, strict=True):
                piece.copy_(read(f"{VALUES}.{name}")[clusters].reshape(piece.shape))
                if self.precision == "int8":
                    piece.mul_(read(f"{SCALES}.{name}")[clusters, None])
        return decoded

    def check(self) -> None:
        """Compares the whole file with the synset's description; downloads it first if need be."""
        with self._opened():
            pass

    def check_belongs(self, synset: Synset) -> None:
        """Raises a `ValueError` unless they fit a synset's clusters, parameters and steps."""
        shapes, num_steps = synset.trajectory.parameter_shapes, synset.trajectory.num_steps
        if self.num_clusters != synset.num_clusters or list(self.parameter_shapes.items()) != list(shapes.items()):
            what = f"{self.num_clusters} clusters and {self.num_parameters} parameters, or of other tensors or order"
        elif self.parameters_sha256 not in (None, synset.parameters_sha256):
            what = f"a model with trained parameters {shortened(self.parameters_sha256)}"
        elif self.rewind_step > num_steps:
            what = f"a run that has a step {self.rewind_step}"
        else:
            return
        raise ValueError(
            f"The responses are of {what}; the synset has {synset.num_clusters} clusters, "
            f"{sum(map(math.prod, shapes.values()))} trained parameters with SHA-256 "
            f"{synset.parameters_sha256[:12]} and {num_steps} steps. Compute them for this synset, or set "
            "`responses` to None."
        )

    def describe(self) -> dict[str, Any]:
        """Description of them in `synset.json`."""
        return asdict(ResponsesDescription(self.precision, self.rewind_step, self.num_bytes, self.sha256))

    def write(self, path: Path, parameters_sha256: str) -> None:
        """Writes their file; an existing one is checked and copied."""
        if isinstance(self.source, ResponsesFile):
            self.check()
            shutil.copyfile(self.source.path(), path)
        else:
            metadata = _header_metadata(self.precision, self.rewind_step, parameters_sha256)
            save_file(dict(self.source), path, metadata=metadata)
            order_metadata(path)

    def _opened(self) -> contextlib.AbstractContextManager[Callable[[str], Tensor]]:
        """A function that reads stored tensors by name."""
        if isinstance(self.source, ResponsesFile):
            return self.source.opened()
        return contextlib.nullcontext(self.source.__getitem__)


class ResponsesFile:
    """A file of responses that stays on disk, or on the Hub, until it is used."""

    def __init__(
        self, folder: ArtefactFolder, layout: Layout, told: ResponsesDescription, parameters_sha256: str
    ) -> None:
        self._folder = folder
        self._layout = layout
        self._told = told
        self._metadata = _header_metadata(told.precision, told.rewind_step, parameters_sha256)
        self._read_whole: tuple[int, ...] | None = None

    @property
    def at_hand(self) -> bool:
        """Whether it can be read without a download."""
        return self._folder.at_hand(RESPONSES_FILE)

    def path(self) -> Path:
        return self._folder.file(RESPONSES_FILE)

    @contextlib.contextmanager
    def opened(self) -> Iterator[Callable[[str], Tensor]]:
        """A function that reads a tensor by name."""
        with self._folder.open_tensors(RESPONSES_FILE, num_bytes=self._told.num_bytes) as file:
            self.check_header(file)
            # All of a new or changed file is compared with the synset's description.
            state = file.path.stat()
            signature = (state.st_ino, state.st_mtime_ns, state.st_size)
            if signature != self._read_whole:
                self._check_content(file)
                self._read_whole = signature
            yield lambda key: self._tensor(file, key)

    def _tensor(self, file: TensorFile, key: str) -> Tensor:
        shape, dtype = self._layout[key]
        return file.read(key, shape=shape, dtypes=(dtype,))

    def check_header(self, file: TensorFile) -> None:
        """Checks tensor names, shapes and the model by the file's header alone."""
        file.check_no_others(self._layout)
        for key, (shape, dtype) in self._layout.items():
            file.check(key, shape=shape, dtypes=(dtype,))
        for name, value in self._metadata.items():
            found = file.metadata.get(name)
            if found != value:
                raise ValueError(
                    f"{file.path} has {name} {shortened(found)}, the synset's is {shortened(value)}: these are "
                    f"other responses, or those of another model. {WAY_OUT}"
                )

    def _check_content(self, file: TensorFile) -> None:
        for key in self._layout:
            kind, _, name = key.partition(".")
            if kind == VALUES:
                scale = f"{SCALES}.{name}"
                scales = self._tensor(file, scale) if scale in self._layout else None
                bad = torch.nonzero(_unusable_clusters(self._tensor(file, key), scales)).flatten().tolist()
                if bad:
                    raise ValueError(
                        f"{file.path} has NaN or infinite responses of {printable(name)!r}, or impossible scales, in "
                        f"clusters {bad[:5]}. {WAY_OUT}"
                    )
        found = _stored_sha256(self._layout, lambda key: self._tensor(file, key), self._told.rewind_step)
        if found != self._told.sha256:
            raise ValueError(
                f"{file.path} has SHA-256 {found[:12]} over its responses, the synset announces "
                f"{shortened(self._told.sha256)}: the file was changed, or is another synset's. {WAY_OUT}"
            )


def _check_precision(precision: str) -> None:
    if precision not in PRECISIONS:
        raise ValueError(
            f"The precision of responses must be one of {', '.join(PRECISIONS)}, got {shortened(precision)}."
        )


def _layout(precision: str, num_clusters: int, shapes: Mapping[str, tuple[int, ...]]) -> Layout:
    """Tensors of a file: `values.NAME` `(num_clusters, *shape)`, and for int8 `scales.NAME` `(num_clusters,)`."""
    layout: dict[str, tuple[tuple[int, ...], str]] = {}
    for name, shape in shapes.items():
        layout[f"{VALUES}.{name}"] = ((num_clusters, *shape), PRECISIONS[precision])
        if precision == "int8":
            layout[f"{SCALES}.{name}"] = ((num_clusters,), "F32")
    return layout


def _header_metadata(precision: str, rewind_step: int, parameters_sha256: str) -> dict[str, str]:
    return {"precision": precision, "rewind_step": str(rewind_step), "parameters_sha256": parameters_sha256}


def _stored_sha256(layout: Layout, read: Callable[[str], Tensor], rewind_step: int) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of the stored tensors, and the step."""
    digest = hashlib.sha256(str(rewind_step).encode())
    for key, (shape, dtype) in layout.items():
        digest.update(f"{key}{shape}{dtype}".encode())
        digest.update(read(key).contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _unusable_clusters(values: Tensor, scales: Tensor | None) -> Tensor:
    """Clusters `(num_clusters,)`, bool, whose values `(num_clusters, *shape)` are not finite or have a wrong scale."""
    values = values.reshape(len(values), math.prod(values.shape[1:]))
    if scales is None:
        return ~torch.isfinite(values).all(1)
    bad = ~torch.isfinite(LARGEST_INT8 * scales) | (scales < 0)
    zero = torch.nonzero(scales == 0).flatten()
    bad[zero] |= (values[zero] != 0).any(1)
    return bad
