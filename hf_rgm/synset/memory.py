"""How much of a distillation fits in memory at once."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_rgm.synset.config import DistillationConfig
from hf_rgm.synset.matching import SynsetGradients, matching_error
from hf_rgm.synset.samples import SyntheticSamples

logger = logging.getLogger(__name__)

HEAP_BLOCK_BYTES = 2**25
"""From here on glibc takes a block from the system and gives it back (the largest its threshold becomes); smaller ones
it keeps when they are freed."""


class PeakTensors(TorchDispatchMode):
    """
    The most memory that tensors made within a block held at once.

    Sees every operator below autograd and `torch.func`, so graphs, tangents and vectorised intermediates count, each
    storage once and until it is freed. What an operator needs only while it runs does not.

    Attributes:
        peak_bytes (`int`): Largest sum of the storages that were alive together.
        alive_bytes (`int`): Sum of those that are alive now.
        resident_bytes (`int`): The peak, and once more that of the storages below 32 MiB. An allocator keeps those,
            and where the next ones have other sizes, it holds the holes beside them.

    Example:

    ```python
    >>> import torch
    >>> from hf_rgm.synset.memory import PeakTensors
    >>> with PeakTensors() as memory:
    ...     total = (torch.ones(1000) + 1).sum()
    >>> memory.peak_bytes
    8000

    ```
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = 0
        self.alive_bytes = 0
        self._sizes: dict[int, int] = {}
        self._small = self._small_peak = 0

    @property
    def resident_bytes(self) -> int:
        """What a process holds for it at most."""
        return self.peak_bytes + self._small_peak

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping | None = None
    ) -> Any:
        given = {place for tensor in tree_leaves((args, kwargs)) if (place := _place(tensor)) is not None}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            place = _place(tensor)
            if place is not None and place not in given and place not in self._sizes:
                self._add(place, tensor.untyped_storage())
        return result

    def _add(self, place: int, storage: torch.UntypedStorage) -> None:
        size = self._sizes[place] = storage.nbytes()
        self.alive_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.alive_bytes)
        if size < HEAP_BLOCK_BYTES:
            self._small += size
            self._small_peak = max(self._small_peak, self._small)
        weakref.finalize(storage, self._remove, place).atexit = False

    def _remove(self, place: int) -> None:
        size = self._sizes.pop(place)
        self.alive_bytes -= size
        self._small -= size if size < HEAP_BLOCK_BYTES else 0


def _place(value: Any) -> int | None:
    """Address of a tensor's memory; nothing for what has none of its own, as the wrappers of `torch.func`."""
    if not isinstance(value, Tensor):
        return None
    try:
        return value.untyped_storage().data_ptr() or None
    except RuntimeError:
        return None


@dataclass(frozen=True)
class MatchMemory:
    """
    What one match of gradients, its graph and its backward pass need at once, measured.

    Args:
        fixed_bytes (`int`): However many clusters are matched together.
        cluster_bytes (`int`): For each of them.
    """

    fixed_bytes: int
    cluster_bytes: int

    def __call__(self, num_clusters: int) -> int:
        """Bytes for some clusters in one backward pass."""
        return self.fixed_bytes + num_clusters * self.cluster_bytes


def measure_match(gradients: SynsetGradients, parameters: dict[str, Tensor], samples: SyntheticSamples) -> MatchMemory:
    """
    Matches one cluster and then two, and sees what the second adds.

    Args:
        gradients (`SynsetGradients`): Computes the clusters' gradients.
        parameters (`dict[str, Tensor]`): Where.
        samples (`SyntheticSamples`): Of any clusters; the first one counts.

    Returns:
        `MatchMemory`
    """

    def match(num_clusters: int) -> int:
        leaves = samples[torch.zeros(num_clusters, dtype=torch.int64)].detach()
        for tensor in leaves.tensors():
            tensor.requires_grad_()
        with PeakTensors() as memory:
            synthetic = gradients(parameters, leaves)
            one = synthetic.new_ones(())
            matching_error(synthetic, one.expand_as(synthetic), one, 0.0).backward()
        return memory.resident_bytes

    with torch.enable_grad():
        gradients(parameters, samples[torch.zeros(2, dtype=torch.int64)].detach())  # decides how to vectorise
        one, two = match(1), match(2)
    return MatchMemory(fixed_bytes=max(0, 2 * one - two), cluster_bytes=max(0, two - one))


@dataclass(frozen=True)
class MemoryPlan:
    """
    What is in memory at once.

    Args:
        num_parameters, num_states, num_clusters (`int`): Sizes of the task.
        block_size (`int`): Clusters distilled together.
        chunk_size (`int`): Clusters of a block whose gradients are matched in one backward pass.
        sketch_dimension (`int`, *optional*): Length of the sketches that stand for gradients, if they do. States are
            then read from disk at every use.
        samples_per_cluster (`int`): Synthetic samples of a cluster.
        match (`MatchMemory`): What a match needs.
    """

    num_parameters: int
    num_states: int
    num_clusters: int
    block_size: int
    chunk_size: int
    sketch_dimension: int | None
    samples_per_cluster: int
    match: MatchMemory

    @property
    def num_blocks(self) -> int:
        """Blocks distilled one after another by a single process."""
        return -(-self.num_clusters // self.block_size)

    @property
    def held_bytes(self) -> int:
        """What stays in memory while a block is distilled: states, gradients and the sketch."""
        vector = 4 * self.num_parameters
        if self.sketch_dimension is None:
            return vector * self.num_states * (1 + self.block_size)
        # One state at a time; an index (int32) and a sign (int8) for each element.
        gradients = 4 * self.sketch_dimension * self.num_states * self.block_size
        return vector + 5 * self.num_parameters + gradients

    @property
    def step_bytes(self) -> int:
        """
        What comes on top at the worst moment: a match, the gradients of single samples after a round, or a state being
        read with its two moments.
        """
        vector = 4 * self.num_parameters
        together = max(self.samples_per_cluster, self.chunk_size)
        products = 8 * self.num_states * self.block_size**2 * self.samples_per_cluster
        if self.sketch_dimension is None:
            return max(self.match(self.chunk_size), (together + self.chunk_size) * vector + products, 3 * vector)
        # The gradients times their signs, and the same in the backward pass.
        single = 4 * together * self.sketch_dimension + 2 * self.chunk_size * vector
        return max(self.match(self.chunk_size) + 2 * self.chunk_size * vector, single + products, 3 * vector)

    @property
    def memory_bytes(self) -> int:
        """Peak memory beside the model, the rows and the interpreter."""
        return self.held_bytes + self.step_bytes


def plan_memory(
    config: DistillationConfig,
    *,
    num_parameters: int,
    num_states: int,
    num_clusters: int,
    match: MatchMemory,
) -> MemoryPlan:
    """
    As many clusters at once as fit in `config.max_memory`; sketches of their gradients where not even one fits.

    Args:
        config (`DistillationConfig`): `max_memory`, `cluster_block_size`, `sketch_dimension`, `samples_per_cluster`
            and `total_gradient_weight` matter here.
        num_parameters, num_states, num_clusters (`int`): Sizes of the task.
        match (`MatchMemory`): What a match needs.

    Returns:
        `MemoryPlan`

    Raises:
        ValueError: If not even one cluster's sketch fits.
    """
    largest = min(config.cluster_block_size, num_clusters)

    def plan(block_size: int, chunk_size: int, sketch_dimension: int | None) -> MemoryPlan:
        sizes = (num_parameters, num_states, num_clusters)
        return MemoryPlan(*sizes, block_size, chunk_size, sketch_dimension, config.samples_per_cluster, match)

    for size in _halvings(largest):
        # The match of the total gradient needs the whole block in one graph.
        for chunk_size in _halvings(size) if not config.total_gradient_weight else [size]:
            exact = plan(size, chunk_size, None)
            if exact.memory_bytes <= config.max_bytes:
                return exact
    for size in _halvings(largest):
        sketched = plan(size, size if config.total_gradient_weight else 1, config.sketch_dimension)
        if sketched.memory_bytes <= config.max_bytes:
            logger.info(
                "Gradients of %d parameters at %d states do not fit in `max_memory=%r`: matching sketches of %d.",
                num_parameters,
                num_states,
                config.max_memory,
                config.sketch_dimension,
            )
            return sketched
    needed = plan(1, 1, config.sketch_dimension).memory_bytes
    raise ValueError(
        f"`max_memory={config.max_memory!r}` is too little for {num_states} states of {num_parameters} parameters: "
        f"one cluster needs {needed / 1e9:.1f} GB. Raise it, train fewer parameters (LoRA), record fewer states "
        "(`TrajectoryCallback(num_states=...)`), or lower `sketch_dimension` or `samples_per_cluster`."
    )


def _halvings(largest: int) -> list[int]:
    sizes = [largest]
    while sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // 2))
    return sizes
