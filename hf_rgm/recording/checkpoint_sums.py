"""Checksums of what a checkpoint holds, so that a run that is resumed is seen to go on where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from hf_rgm.model.sharding import local
from hf_rgm.trajectory.optimizers import OptimizerRule

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checkpoint_sums(
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    rule: OptimizerRule,
    *,
    is_sharded: bool,
) -> dict[str, str]:
    """Digests of the parameters and of each kind of moment; where the model is split, all processes must call this."""
    tensors: dict[str, dict[str, Tensor]] = {"parameters": dict(parameters)}
    for kind in rule.moment_names:
        moments = {name: optimizer.state.get(p, {}).get(kind) for name, p in parameters.items()}
        tensors[kind] = {name: moment for name, moment in moments.items() if moment is not None}
    sums = {
        kind: {name: _sum_of_bits(tensor) for name, tensor in members.items()} for kind, members in tensors.items()
    }
    everyone = gather_object([sums]) if is_sharded else [sums]
    found = {}
    for kind, members in sums.items():
        total = {name: sum(own[kind][name] for own in everyone) % 2**64 for name in members}
        found[kind] = hashlib.sha256(json.dumps(total, sort_keys=True).encode()).hexdigest()[:16]
    return found


def _sum_of_bits(tensor: Tensor) -> int:
    """Sum of the elements' bits as integers: exact on every device, and the sum over the parts of a split tensor."""
    own = local(tensor.detach()).contiguous()
    return int(own.view(_INTEGERS[own.element_size()]).sum(dtype=torch.int64)) if own.numel() else 0
