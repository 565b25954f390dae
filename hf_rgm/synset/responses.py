"""Responses of a synset: changes of the trained parameters if a cluster is left out."""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from hf_rgm.files.reading import DTYPE_BYTES, WAY_OUT, ArtefactFolder, check_memory, printable
from hf_rgm.synset.responses_file import (
    SCALES,
    VALUES,
    ResponsesDescription,
    ResponsesFile,
    check_precision,
    header_metadata,
    shortened,
    stored_sha256,
    tensor_layout,
    unusable_clusters,
)
from hf_rgm.trajectory.precision import quantize_rows

if TYPE_CHECKING:
    from hf_rgm.synset.synset import Synset


@dataclass(frozen=True, eq=False)
class Responses:
    """Changes `δ_k` of the trained parameters if cluster `k` is left out, in 8 or 16 bits, in memory or a file."""

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
        check_precision(precision)
        shapes = {name: tuple(shape) for name, shape in parameter_shapes.items()}
        sizes = [math.prod(shape) for shape in shapes.values()]
        if deviations.dim() != 2 or not len(deviations) or deviations.shape[1] != sum(sizes):
            raise ValueError(
                f"`deviations` must have shape (num_clusters, {sum(sizes)}) for these parameters, got "
                f"{tuple(deviations.shape)}. Pass a vector of all trainable parameters for each cluster."
            )
        if rewind_step < 0:
            raise ValueError(f"`rewind_step` must be a training step, got {rewind_step}. The first is 0.")
        _refuse(~torch.isfinite(deviations).all(1), precision, cluster_names)
        tensors: dict[str, Tensor] = {}
        for (name, shape), piece in zip(shapes.items(), deviations.split(sizes, dim=1), strict=True):
            rows = piece.detach().to(device="cpu", dtype=torch.float32)
            rounded, scales = quantize_rows(rows) if precision == "int8" else (rows.bfloat16(), None)
            _refuse(unusable_clusters(rounded, scales), precision, cluster_names)
            tensors[f"{VALUES}.{name}"] = rounded.reshape(len(rows), *shape).contiguous()
            if scales is not None:
                tensors[f"{SCALES}.{name}"] = scales
        layout = tensor_layout(precision, len(deviations), shapes)
        sha256 = stored_sha256(layout, tensors.__getitem__, rewind_step)
        return cls(precision, rewind_step, len(deviations), shapes, sha256, tensors, parameters_sha256)

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.parameter_shapes.values())

    @property
    def num_bytes(self) -> int:
        """Size of the stored tensors, without reading them."""
        layout = tensor_layout(self.precision, self.num_clusters, self.parameter_shapes)
        return sum(math.prod(shape) * DTYPE_BYTES[dtype] for shape, dtype in layout.values())

    @property
    def at_hand(self) -> bool:
        """Whether they can be read without a download."""
        return not isinstance(self.source, ResponsesFile) or self.source.at_hand

    def decode(self, clusters: slice | None = None) -> Tensor:
        """Deviations `(num_chosen, num_parameters)` of some clusters or all, float32, on the CPU."""
        clusters = slice(None) if clusters is None else clusters
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
        """Compares all of the file with what the synset announces; downloads it if need be."""
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
            metadata = header_metadata(self.precision, self.rewind_step, parameters_sha256)
            save_file(dict(self.source), path, metadata=metadata)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Callable[[str], Tensor]]:
        """A function that reads stored tensors by name."""
        if isinstance(self.source, ResponsesFile):
            with self.source.opened() as read:
                yield read
        else:
            yield self.source.__getitem__


def open_responses(
    folder: ArtefactFolder,
    told: ResponsesDescription,
    *,
    num_clusters: int,
    parameter_shapes: Mapping[str, tuple[int, ...]],
    parameters_sha256: str,
    source: str,
) -> Responses:
    """Responses of a saved synset. Their values are read, or downloaded from the Hub, at first use."""
    file = ResponsesFile(
        folder, tensor_layout(told.precision, num_clusters, parameter_shapes), told, parameters_sha256
    )
    responses = Responses(
        told.precision, told.rewind_step, num_clusters, parameter_shapes, told.sha256, file, parameters_sha256
    )
    if told.num_bytes != responses.num_bytes:
        raise ValueError(
            f"{source} announces responses of {told.num_bytes} bytes; {num_clusters} clusters and this model's "
            f"parameters take {responses.num_bytes} in {told.precision}. The files do not belong together. {WAY_OUT}"
        )
    if file.at_hand or not folder.is_remote:
        file.check_header()
    return responses


def _refuse(bad: Tensor, precision: str, names: Sequence[str] | None) -> None:
    if bool(bad.any()):
        clusters = [k if names is None else printable(names[int(k)]) for k in torch.nonzero(bad).flatten().tolist()]
        raise ValueError(
            f"The deviations of clusters {clusters[:5]} are NaN, infinite or too large for {precision}. Follow them "
            "from a later training step, or keep the synset without responses."
        )
