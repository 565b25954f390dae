"""Responses of a synset: what leaving each cluster out changes in the trained parameters, in 8 or 16 bits."""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True, eq=False)
class Responses:
    """
    Changes of the trained parameters if each cluster is left out, which answer any objective by forward passes.

    Cluster `k` left out, training would have ended at `θ + δ_k`; `decode` gives `δ`. [`Responses.encode`] makes them.
    Those of a synset that was loaded are read from disk, or fetched from the Hub, when they are decoded.

    Args:
        precision (`str`): `"bfloat16"`, or `"int8"` with a scale for each cluster and parameter tensor.
        rewind_step (`int`): Training step they were followed from.
        num_clusters (`int`): Number of clusters.
        parameter_shapes (`Mapping[str, tuple[int, ...]]`): Shapes of the trainable parameters, in the recorded run's
            order, which is that of flat vectors.
        sha256 (`str`): Identity of the stored form.
        source (`Mapping[str, Tensor]` or `ResponsesFile`): The stored form, or where it is.
        parameters_sha256 (`str`, *optional*): Identity of the trained parameters they are changes of.

    Example:

    ```python
    >>> import torch
    >>> from hf_rgm.synset.responses import Responses
    >>> deviations = torch.tensor([[1.27, 0.5, 0.0], [-0.02, 0.04, 2.54]])
    >>> responses = Responses.encode(deviations, {"bias": (1,), "weight": (2,)}, rewind_step=0)
    >>> print(responses.num_clusters, responses.num_bytes, responses.decode(slice(1, 2)))
    2 22 tensor([[-0.0200,  0.0400,  2.5400]])

    ```
    """

    precision: str
    rewind_step: int
    num_clusters: int
    parameter_shapes: Mapping[str, tuple[int, ...]]
    sha256: str
    source: Mapping[str, Tensor] | ResponsesFile = field(repr=False)
    parameters_sha256: str | None = None

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
        """
        Rounds deviations to 8 or 16 bits.

        Args:
            deviations (`Tensor`): `(num_clusters, num_parameters)`, float32, on any device: parameters without the
                cluster minus the trained ones, laid out as in
                [`~hf_rgm.model.functional_model.ParameterSpace.flatten`].
            parameter_shapes (`Mapping[str, tuple[int, ...]]`): Those of the recorded run, in its order.
            precision (`str`, *optional*, defaults to `"int8"`): `"int8"`, off by at most half a level of 127 from zero
                to the largest value of a cluster's parameter tensor, or `"bfloat16"`.
            rewind_step (`int`): Training step they were followed from.
            cluster_names (`Sequence[str]`, *optional*): Names for errors. Positions without.
            parameters_sha256 (`str`, *optional*): Identity of the trained parameters. A synset of others refuses them.

        Raises:
            ValueError: If shapes do not fit, the precision is unknown, or deviations are NaN, infinite or too large
                for the precision.
        """
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
        """Length of a flat vector."""
        return sum(math.prod(shape) for shape in self.parameter_shapes.values())

    @property
    def num_bytes(self) -> int:
        """Size of the stored tensors, known without reading them."""
        layout = tensor_layout(self.precision, self.num_clusters, self.parameter_shapes)
        return sum(math.prod(shape) * DTYPE_BYTES[dtype] for shape, dtype in layout.values())

    @property
    def at_hand(self) -> bool:
        """Whether they can be read without fetching them."""
        return not isinstance(self.source, ResponsesFile) or self.source.at_hand

    @property
    def values(self) -> dict[str, Tensor]:
        """
        The stored form by parameter, read at every call: `(num_clusters, *shape)`, int8 or bfloat16.

        Raises:
            FileNotFoundError, MemoryError, ValueError: See [`Responses.decode`].
        """
        with self._opened() as read:
            return {name: read(f"{VALUES}.{name}") for name in self.parameter_shapes}

    @property
    def scales(self) -> dict[str, Tensor]:
        """What int8 values are multiplied with, by parameter: `(num_clusters,)`, float32. Empty in bfloat16."""
        with self._opened() as read:
            names = self.parameter_shapes if self.precision == "int8" else ()
            return {name: read(f"{SCALES}.{name}") for name in names}

    def decode(self, clusters: slice | None = None) -> Tensor:
        """
        Deviations of some clusters, or of all. Of a file only their part is read, after the first time.

        Args:
            clusters (`slice`, *optional*): Which clusters.

        Returns:
            `Tensor`: `(num_chosen, num_parameters)`, float32, on the CPU, in the order of `parameter_shapes`.

        Raises:
            FileNotFoundError: If the file is missing, or cannot be fetched.
            MemoryError: If they are larger than the memory that is free.
            ValueError: If the file is damaged, or is not the one that the synset announces.
        """
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
        """
        Reads all of the file and compares it with what the synset announces; fetches it if need be.

        Raises:
            FileNotFoundError, MemoryError, ValueError: See [`Responses.decode`].
        """
        with self._opened():
            pass

    def check_belongs(
        self,
        *,
        num_clusters: int,
        parameter_shapes: Mapping[str, tuple[int, ...]],
        num_steps: int,
        parameters_sha256: str,
    ) -> None:
        """Raises a `ValueError` unless they are of a synset with these clusters, parameters and steps."""
        if self.num_clusters != num_clusters or list(self.parameter_shapes.items()) != list(parameter_shapes.items()):
            what = f"{self.num_clusters} clusters and {self.num_parameters} parameters, or of other tensors or order"
        elif self.parameters_sha256 not in (None, parameters_sha256):
            what = f"a model with trained parameters {shortened(self.parameters_sha256)}"
        elif self.rewind_step > num_steps:
            what = f"a run that has a step {self.rewind_step}"
        else:
            return
        raise ValueError(
            f"The responses are of {what}; the synset has {num_clusters} clusters, "
            f"{sum(map(math.prod, parameter_shapes.values()))} trained parameters with SHA-256 "
            f"{parameters_sha256[:12]} and {num_steps} steps. Compute them for this synset, or set `responses` to "
            "None."
        )

    def describe(self) -> dict[str, Any]:
        """What `synset.json` says of them, JSON-safe."""
        return asdict(ResponsesDescription(self.precision, self.rewind_step, self.num_bytes, self.sha256))

    def write(self, path: Path, parameters_sha256: str) -> None:
        """
        Writes the file; one that they are in is checked and copied.

        Args:
            path (`Path`): The file.
            parameters_sha256 (`str`): Identity of the trained parameters, kept in the file.
        """
        if isinstance(self.source, ResponsesFile):
            self.check()
            shutil.copyfile(self.source.path(), path)
        else:
            metadata = header_metadata(self.precision, self.rewind_step, parameters_sha256)
            save_file(dict(self.source), path, metadata=metadata)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Callable[[str], Tensor]]:
        """Gives a function that reads stored tensors by name."""
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
    """
    Opens the responses of a synset, whose values are read when they are asked for, and from the Hub fetched then.

    Args:
        folder (`ArtefactFolder`): The folder of the synset.
        told (`ResponsesDescription`): What `synset.json` says of them.
        num_clusters (`int`): The synset's.
        parameter_shapes (`Mapping[str, tuple[int, ...]]`): Those of its recorded run.
        parameters_sha256 (`str`): Identity of its trained parameters.
        source (`str`): What says so, for errors.

    Raises:
        FileNotFoundError: If the file is missing from a local folder.
        MemoryError: If it is larger than the memory that is free.
        ValueError: If it is announced wrongly, or a file at hand is of something else.
    """
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
