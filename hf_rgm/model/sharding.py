"""Models whose parameters FSDP2 splits among processes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 (`fully_shard`) has split the model."""
    return isinstance(model, FSDPModule)


def is_split(model: nn.Module) -> bool:
    """Whether any parameter is split over devices."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def model_class(model: nn.Module) -> type:
    """Class of a model before FSDP2 derived one from it."""
    return next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by their names before the model was wrapped."""
    # FSDP's activation checkpointing adds a wrapper module.
    wrapper = "_checkpoint_wrapped_module."
    return {name.replace(wrapper, ""): parameter for name, parameter in model.named_parameters()}


def whole(tensor: Tensor, *, keep: bool = True) -> Tensor:
    """Gathers a split tensor on the CPU, where every process must call it; others are returned unchanged."""
    if not isinstance(tensor, DTensor):
        return tensor
    full = tensor.full_tensor().detach()
    return full.cpu() if keep else torch.empty(0)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a split tensor; others are returned unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
