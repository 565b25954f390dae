"""How much of a distillation fits in memory at once."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_rgm.distillation.config import DistillationConfig
from hf_rgm.distillation.learner import matching_error
from hf_rgm.model.peak_memory import PeakTensors
from hf_rgm.synset.samples import SynsetGradients, SyntheticSamples

logger = logging.getLogger(__name__)


def measure_match(
    gradients: SynsetGradients, parameters: dict[str, Tensor], samples: SyntheticSamples
) -> tuple[int, int]:
    """Bytes that one match of gradients needs with its graph: fixed, and for each cluster."""

    def match(num_clusters: int) -> int:
        leaves = samples[torch.zeros(num_clusters, dtype=torch.int64)].leaves()
        with PeakTensors() as memory:
            synthetic = gradients(parameters, leaves)
            one = synthetic.new_ones(())
            matching_error(synthetic, one.expand_as(synthetic), one).backward()
        return memory.resident_bytes

    with torch.enable_grad():
        gradients(parameters, samples[torch.zeros(2, dtype=torch.int64)].detach())  # decides how to vectorise
        one, two = match(1), match(2)
    # Every further cluster adds as much as the second.
    return max(0, 2 * one - two), max(0, two - one)


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of a distillation in blocks of clusters, matched in chunks, by whole gradients or by sketches."""

    num_parameters: int
    num_states: int
    num_clusters: int
    block_size: int
    chunk_size: int
    sketch_dimension: int | None
    samples_per_cluster: int
    match_bytes: tuple[int, int]  # fixed, and for each cluster of a chunk

    @property
    def num_blocks(self) -> int:
        return math.ceil(self.num_clusters / self.block_size)

    @property
    def held_bytes(self) -> int:
        """Memory held while a block is distilled: states, gradients and the sketch."""
        vector = 4 * self.num_parameters  # float32
        if self.sketch_dimension is None:
            return vector * self.num_states * (1 + self.block_size)
        # One state at a time; an index (int32) and a sign (int8) for each element.
        gradients = 4 * self.sketch_dimension * self.num_states * self.block_size
        return vector + 5 * self.num_parameters + gradients

    @property
    def step_bytes(self) -> int:
        """Memory on top at the worst moment."""
        # A match, or the single samples' gradients after a round, or a state being read with its two moments.
        vector = 4 * self.num_parameters
        match = self.match_bytes[0] + self.match_bytes[1] * self.chunk_size
        together = max(self.samples_per_cluster, self.chunk_size)
        products = 8 * self.num_states * self.block_size**2 * self.samples_per_cluster  # float64
        if self.sketch_dimension is None:
            return max(match, (together + self.chunk_size) * vector + products, 3 * vector)
        # The gradients times their signs, and the same in the backward pass.
        single = 4 * together * self.sketch_dimension + 2 * self.chunk_size * vector
        return max(match + 2 * self.chunk_size * vector, single + products, 3 * vector)

    @property
    def memory_bytes(self) -> int:
        """Peak memory beside the model, the rows and the interpreter."""
        return self.held_bytes + self.step_bytes


def plan_memory(
    config: DistillationConfig, num_parameters: int, num_states: int, num_clusters: int, match_bytes: tuple[int, int]
) -> MemoryPlan:
    """As many clusters at once as fit in `config.max_memory`; sketches of their gradients if not even one fits."""
    sizes = _halvings(min(config.cluster_block_size, num_clusters))
    exact = [(size, chunk_size, None) for size in sizes for chunk_size in _halvings(size)]
    sketched = [(size, 1, config.sketch_dimension) for size in sizes]
    task = (num_parameters, num_states, num_clusters)
    plans = [MemoryPlan(*task, *shape, config.samples_per_cluster, match_bytes) for shape in exact + sketched]
    for plan in plans:
        if plan.memory_bytes <= config.max_bytes:
            if plan.sketch_dimension is not None:
                logger.info(
                    "Gradients of %d parameters at %d states do not fit in `max_memory=%r`: matching sketches of %d.",
                    *(num_parameters, num_states, config.max_memory, config.sketch_dimension),
                )
            return plan
    needed = plans[-1].memory_bytes
    raise ValueError(
        f"`max_memory={config.max_memory!r}` is too little for {num_states} states of {num_parameters} parameters: "
        f"one cluster needs {needed / 1e9:.1f} GB. Raise it, train fewer parameters (LoRA), record fewer states "
        "(`TrajectoryCallback(num_states=...)`), or lower `sketch_dimension` or `samples_per_cluster`."
    )


def _halvings(largest: int) -> list[int]:
    sizes = [largest]
    while sizes[-1] > 1:
        sizes.append(math.ceil(sizes[-1] / 2))
    return sizes
