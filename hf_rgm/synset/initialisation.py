"""Where synthetic samples start."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hf_rgm.rows import CachedBatches, RowReader
from hf_rgm.synset.config import DistillationConfig
from hf_rgm.synset.inputs import ContinuousInputs, soft_labels
from hf_rgm.synset.matching import SyntheticSamples


def initial_samples(
    reader: RowReader,
    batches: CachedBatches,
    rows: Sequence[np.ndarray],
    clusters: Sequence[int],
    inputs: ContinuousInputs,
    num_labels: int,
    config: DistillationConfig,
) -> SyntheticSamples:
    """
    First values of the synthetic samples of some clusters.

    Each cluster draws from its own generator, seeded with the config's seed and the cluster's index, so that the
    result does not depend on which clusters are distilled together.

    Args:
        reader (`RowReader`): The training rows.
        batches (`CachedBatches`): The same rows, grouped by cluster.
        rows (`Sequence[np.ndarray]`): Row indices of every cluster.
        clusters (`Sequence[int]`): The clusters to start.
        inputs (`ContinuousInputs`): The continuous input space.
        num_labels (`int`): Length of the target logits.
        config (`DistillationConfig`): `init`, `samples_per_cluster`, `target_smoothing` and `seed` matter here.

    Returns:
        `SyntheticSamples`: `(len(clusters), samples_per_cluster, ...)` each.
    """
    count = config.samples_per_cluster
    samples, targets, log_weights = [], [], []
    for cluster in clusters:
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + cluster)
        pieces = [(inputs.from_batch(x), y) for x, y in batches.group(cluster)]
        real = torch.cat([x for x, _ in pieces])
        labels = torch.cat([y for _, y in pieces])
        chosen = torch.randint(len(real), (count,), generator=generator)
        if len(real) >= count:
            chosen = torch.randperm(len(real), generator=generator)[:count]
        if config.init == "nearest":
            nearest = int((real - real.mean(0)).flatten(1).norm(dim=1).argmin())
            chosen = torch.cat([torch.tensor([nearest]), chosen[chosen != nearest], chosen])[:count]
        chosen = chosen.to(real.device)
        samples.append(_start(config.init, real, chosen, generator))
        if config.init in ("mean", "noise"):
            share = torch.nn.functional.one_hot(labels, num_labels).float().mean(0)
            smoothed = share * (1 - config.target_smoothing) + config.target_smoothing / num_labels
            targets.append(smoothed.log().expand(count, num_labels))
        else:
            targets.append(soft_labels(labels[chosen], num_labels, config.target_smoothing))
        log_weights.append(torch.full((count,), math.log(len(rows[cluster]) / len(reader) / count)))
    return SyntheticSamples(
        torch.stack(samples).contiguous(),
        torch.stack(targets).contiguous(),
        torch.stack(log_weights).to(samples[0].device),
    )


def _start(init: str, real: Tensor, chosen: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn((len(chosen), *real.shape[1:]), generator=generator).to(real)
    centre, deviation = real.mean(0), real.std(correction=0)
    # A little noise where samples of a cluster would be identical: they would stay so.
    if init in ("nearest", "random"):
        rows = chosen.tolist()
        repeated = torch.tensor([row in rows[:position] for position, row in enumerate(rows)], device=real.device)
        return real[chosen] + 0.1 * deviation * noise * repeated.reshape(-1, *[1] * (real.dim() - 1))
    if init == "mean":
        return centre + 0.1 * deviation * noise
    return real.mean() + deviation * noise
