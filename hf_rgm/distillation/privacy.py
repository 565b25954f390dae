"""How near synthetic samples are to training rows, measured."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_rgm.model.row_reader import CachedBatches
from hf_rgm.synset.inputs import ContinuousInputs
from hf_rgm.synset.samples import SyntheticSamples

MAX_ROWS = 2000
"""Only the first rows of a cluster are compared, at most this many."""


def measure_privacy(inputs: ContinuousInputs, samples: SyntheticSamples, batches: CachedBatches) -> dict[str, Any]:
    """Distances of samples to the nearest rows of their clusters, and of those rows to each other, JSON-safe."""
    # This is a measurement, no guarantee: a sample far from every row may still tell something about one.
    distances, between, kept = [], [], []
    for cluster in range(len(batches)):
        pieces: list[Tensor] = []
        for x, y in batches.group(cluster):
            pieces.append(inputs.read(x, y)[0])
            if sum(map(len, pieces)) >= MAX_ROWS:
                break
        real = torch.cat(pieces)[:MAX_ROWS]
        own = SyntheticSamples(**{name: tensor[cluster] for name, tensor in samples.named_tensors().items()})
        own = own.map(lambda tensor, like=real: tensor.to(like.device))
        rows = inputs.vectors(real).flatten(1)
        distances.append(torch.cdist(inputs.sample_vectors(own).flatten(1), rows).amin(1))
        if len(rows) > 1:
            between.append(torch.cdist(rows, rows).fill_diagonal_(torch.inf).amin(1))
        tokens, row_tokens = inputs.tokens(own), inputs.row_tokens(real)
        if tokens is not None and row_tokens is not None:
            # Tokens that stand where the most similar row has them.
            kept.append((tokens[:, None] == row_tokens[None]).sum(-1).amax(1))
    nearest = torch.cat(distances)
    typical = float(torch.cat(between).median()) if between else None  # no cluster has two rows
    result: dict[str, Any] = {
        "distance": float(nearest.median()),
        "row_distance": typical,
        "share_nearer": None if typical is None else float((nearest < typical).float().mean()),
    }
    if kept:
        result |= {"kept_tokens": float(torch.cat(kept).float().mean()), "num_tokens": samples.inputs.shape[2]}
    return result
