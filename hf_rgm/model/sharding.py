"""Models whose parameters FSDP2 splits among the processes that train together."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

_CHECKPOINT_WRAPPER = "_checkpoint_wrapped_module."
"""What FSDP's activation checkpointing puts into parameter names."""


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 (`fully_shard`) has split the model."""
    return isinstance(model, FSDPModule)


def is_split(model: nn.Module) -> bool:
    """Whether any parameter is split over devices, by whatever means."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def model_class(model: nn.Module) -> type:
    """The class of a model as it was before FSDP2 derived one from it."""
    return next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters under the names that they have in the model before it is wrapped."""
    return {name.replace(_CHECKPOINT_WRAPPER, ""): parameter for name, parameter in model.named_parameters()}


def whole(tensor: Tensor, *, keep: bool = True) -> Tensor:
    """
    A tensor that is split among processes, put together on the CPU; any other one as it is.

    Every process must ask for it.

    Args:
        tensor (`Tensor`): Of any shape, dtype and device.
        keep (`bool`, *optional*, defaults to `True`): Whether this process needs it. Without, an empty tensor takes
            the place of one that is put together.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    full = tensor.full_tensor().detach()
    return full.cpu() if keep else torch.empty(0)
