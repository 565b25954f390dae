"""Where synthetic samples start."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_rgm.distillation.config import DistillationConfig
from hf_rgm.model.losses import IGNORED_LABEL, RowLoss
from hf_rgm.model.row_reader import CachedBatches
from hf_rgm.synset.inputs import ContinuousInputs, choose_ids
from hf_rgm.synset.samples import SyntheticSamples, smoothed_one_hot

MAX_ROWS = 2000
"""Rows drawn from a larger cluster, which need not fit in memory."""

UNLABELLED_LOG_WEIGHT = -3.0
"""Added to the log-weight of a position that starts from a token without a label."""


def initial_samples(
    batches: CachedBatches,
    clusters: Sequence[int],
    inputs: ContinuousInputs,
    num_labels: int,
    row_loss: RowLoss,
    config: DistillationConfig,
) -> SyntheticSamples:
    """First synthetic samples of some clusters: `(len(clusters), samples_per_cluster, ...)` each."""
    count = config.samples_per_cluster
    num_rows = sum(map(batches.num_rows, range(len(batches))))
    parts = []
    for cluster in clusters:
        # A generator per cluster: the start does not depend on which clusters are distilled together.
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + cluster)
        pieces = [inputs.read(x, y) for x, y in batches.sample(cluster, MAX_ROWS, generator)]
        real = torch.cat([x for x, _ in pieces])
        labels = torch.cat([y for _, y in pieces])
        chosen = _chosen(config, inputs, real, generator).to(real.device)
        samples = inputs.start(config.init, real, chosen, generator)
        own = None if config.init in ("mean", "noise") else labels[chosen]
        samples |= _targets(labels, own, num_labels, config, generator)
        positions = labels[chosen] if own is not None else labels.new_zeros(count, *labels.shape[1:])
        # The samples of a cluster weigh together what its rows, or the labels of these, weigh in the mean loss.
        weight = math.log(batches.num_rows(cluster) / num_rows / count)
        labelled = max(1.0, float((labels != IGNORED_LABEL).sum()))
        weight += math.log(labelled / labels.numel() * row_loss.label_weight)
        samples["log_weights"] = weight + UNLABELLED_LOG_WEIGHT * (positions == IGNORED_LABEL).float()
        parts.append(samples)
    return SyntheticSamples(**{name: torch.stack([part[name] for part in parts]).contiguous() for name in parts[0]})


def _chosen(config: DistillationConfig, inputs: ContinuousInputs, real: Tensor, generator: torch.Generator) -> Tensor:
    count = config.samples_per_cluster
    chosen = torch.randint(len(real), (count,), generator=generator)
    if len(real) >= count:
        chosen = torch.randperm(len(real), generator=generator)[:count]
    if config.init == "nearest":
        vectors = inputs.vectors(real).flatten(1)
        nearest = int((vectors - vectors.mean(0)).norm(dim=1).argmin())
        chosen = torch.cat([torch.tensor([nearest]), chosen[chosen != nearest], chosen])[:count]
    return chosen


def _targets(
    labels: Tensor, own: Tensor | None, num_labels: int, config: DistillationConfig, generator: torch.Generator
) -> dict[str, Tensor]:
    """Logits of the targets, over `num_target_choices` of the labels where there are more."""
    count, smoothing = config.samples_per_cluster, config.target_smoothing
    shape = (count, *labels.shape[1:])
    known = labels[labels != IGNORED_LABEL]
    if num_labels <= config.num_target_choices:
        if own is not None:
            return {"targets": smoothed_one_hot(own.clamp_min(0), num_labels, smoothing)}
        share = torch.nn.functional.one_hot(known, num_labels).float().mean(0)
        return {"targets": (share * (1 - smoothing) + smoothing / num_labels).log().expand(*shape, num_labels)}
    if own is not None:
        # A position without a label starts from any of the cluster's.
        own = torch.where(own == IGNORED_LABEL, known[0], own)
    ids = choose_ids(known, own, shape, config.num_target_choices, num_labels, generator)
    if own is None:
        return {"targets": torch.zeros(ids.shape, device=ids.device), "target_ids": ids}
    return {"targets": smoothed_one_hot(torch.zeros_like(own), ids.shape[-1], smoothing), "target_ids": ids}
