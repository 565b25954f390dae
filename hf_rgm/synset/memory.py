"""How much of a distillation fits in memory at once."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_rgm.synset.config import DistillationConfig
from hf_rgm.synset.matching import SynsetGradients
from hf_rgm.synset.samples import SyntheticSamples

logger = logging.getLogger(__name__)

BACKWARD_FACTOR = 2
"""Memory of the backward pass of a matching, in units of the graph it goes through."""


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
        num_probes (`int`): Directions in which the curvature is matched.
        graph_bytes (`int`): What the graph of one cluster's gradient holds.
    """

    num_parameters: int
    num_states: int
    num_clusters: int
    block_size: int
    chunk_size: int
    sketch_dimension: int | None
    num_probes: int
    graph_bytes: int

    @property
    def num_blocks(self) -> int:
        """Blocks distilled one after another by a single process."""
        return -(-self.num_clusters // self.block_size)

    @property
    def memory_bytes(self) -> int:
        """Peak memory beside the model, the rows and the interpreter."""
        vector = 4 * self.num_parameters
        graph = self.chunk_size * (BACKWARD_FACTOR * self.graph_bytes + vector)
        probes = 2 * self.num_states * self.num_probes * vector
        if self.sketch_dimension is None:
            return vector * self.num_states * (1 + self.block_size) + graph + probes
        # A state, a gradient and what is added to it; an index and a sign for each element.
        sketching = 3 * vector + 5 * self.num_parameters
        return sketching + 4 * self.sketch_dimension * self.num_states * self.block_size + graph + probes


def plan_memory(
    config: DistillationConfig,
    *,
    num_parameters: int,
    num_states: int,
    num_clusters: int,
    num_probes: int,
    graph_bytes: int,
) -> MemoryPlan:
    """
    As many clusters at once as fit in `config.max_memory`; sketches of their gradients where not even one fits.

    Args:
        config (`DistillationConfig`): `max_memory`, `cluster_block_size`, `sketch_dimension` and
            `total_gradient_weight` matter here.
        num_parameters, num_states, num_clusters (`int`): Sizes of the task.
        num_probes (`int`): Directions in which the curvature is matched, 0 if it is not.
        graph_bytes (`int`): What [`graph_bytes`] says of one cluster.

    Returns:
        `MemoryPlan`

    Raises:
        ValueError: If not even one cluster's sketch fits.
    """
    largest = min(config.cluster_block_size, num_clusters)

    def plan(block_size: int, chunk_size: int, sketch_dimension: int | None) -> MemoryPlan:
        sizes = (num_parameters, num_states, num_clusters)
        return MemoryPlan(*sizes, block_size, chunk_size, sketch_dimension, num_probes, graph_bytes)

    for size in _halvings(largest):
        exact = plan(size, size, None)
        if exact.memory_bytes <= config.max_bytes:
            return exact
    # The match of the total gradient needs the whole block in one graph.
    chunks = (1,) if not config.total_gradient_weight else (largest,)
    for size in _halvings(largest):
        sketched = plan(size, min(size, chunks[0]), config.sketch_dimension)
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


def graph_bytes(gradients: SynsetGradients, parameters: dict[str, Tensor], samples: SyntheticSamples) -> int:
    """
    What the graph of one cluster's gradient holds, parameters left out.

    Args:
        gradients (`SynsetGradients`): Computes it.
        parameters (`dict[str, Tensor]`): Where.
        samples (`SyntheticSamples`): Of any clusters; the first one counts.

    Returns:
        `int`: bytes.
    """
    leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}
    own = {value.untyped_storage().data_ptr() for value in leaves.values()}
    held: dict[int, int] = {}

    def look(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = max(held.get(storage.data_ptr(), 0), storage.nbytes())
        return tensor

    one = samples[:1].detach()
    one.inputs.requires_grad_()
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(look, lambda tensor: tensor):
        loss = gradients.loss(leaves, {name: value[0] for name, value in one.named_tensors().items()})
        kept = torch.autograd.grad(loss, list(leaves.values()), create_graph=True, materialize_grads=True)
    return sum(held.values()) + sum(tensor.untyped_storage().nbytes() for tensor in kept)
