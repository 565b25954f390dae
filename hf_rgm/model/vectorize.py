"""Functions of one row applied to every row of a batch, and their gradients."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

logger = logging.getLogger(__name__)

MASK = "attention_mask"

OLD_FUNCTION = "setup_context"
"""What PyTorch's error names where a model has an `autograd.Function` that `torch.func` cannot go through."""

_told: set[str] = set()


def grad(function: Callable[..., Tensor]) -> Callable[..., dict[str, Tensor]]:
    """Gradient of a scalar in its first argument, named tensors: by `torch.func`, or else by a plain backward pass."""

    def gradient(parameters: Mapping[str, Tensor], *others: Any) -> dict[str, Tensor]:
        try:
            return torch.func.grad(function)(dict(parameters), *others)
        except RuntimeError as error:
            found = _by_passes(lambda p: function(p, *others)[None], parameters, error)
        return {name: rows[0] for name, rows in found.items()}

    return gradient


def jacobian(function: Callable[[dict[str, Tensor]], Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Derivatives `(num_values, *shape)` of values `(num_values,)` in named tensors, in the same two ways."""
    try:
        return torch.func.jacrev(function)(dict(parameters))
    except RuntimeError as error:
        return _by_passes(function, parameters, error)


def _by_passes(
    function: Callable[[dict[str, Tensor]], Tensor], parameters: Mapping[str, Tensor], error: RuntimeError
) -> dict[str, Tensor]:
    """Derivatives by a plain backward pass each, where `torch.func` gave this error for want of `setup_context`."""
    if OLD_FUNCTION not in str(error):
        raise error
    try:
        leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}
    except RuntimeError:  # within `vmap`, which goes on row by row
        raise error from None
    with torch.enable_grad():
        values = function(leaves)
        own = [*leaves.values()]
        rows = [torch.autograd.grad(v, own, retain_graph=True, materialize_grads=True) for v in values]
    return {name: torch.stack(of_name) for name, of_name in zip(leaves, zip(*rows, strict=True), strict=True)}


def map_rows(function: Callable[..., Tensor], inputs: Mapping[str, Tensor], *others: Tensor) -> Tensor:
    """Applies a function of one row to all rows: `(batch_size, ...)`, by `vmap` or, if that fails, one by one."""
    if MASK not in inputs:
        return _apply(function, dict(inputs), others)
    # Rows with one mask share it: Transformers asks whether a mask is all set, which `vmap` cannot answer for several.
    masks, group_of = torch.unique(inputs[MASK], dim=0, return_inverse=True)
    rest = {name: value for name, value in inputs.items() if name != MASK}
    order, results = [], []
    for group, mask in enumerate(masks):
        members = torch.nonzero(group_of == group)[:, 0]
        own = {name: value[members] for name, value in rest.items()}

        def with_mask(x: dict[str, Tensor], *slices: Tensor, mask: Tensor = mask) -> Tensor:
            return function({**x, MASK: mask}, *slices)

        results.append(_apply(with_mask, own, tuple(other[members] for other in others)))
        order.append(members)
    return torch.cat(results)[torch.cat(order).argsort()]


def order_by_mask(inputs: Mapping[str, Tensor]) -> Tensor:
    """Order of rows, `(batch_size,)`, in which rows with the same `attention_mask` are neighbours."""
    if MASK not in inputs:
        first = next(iter(inputs.values()))
        return torch.arange(len(first), device=first.device)
    return torch.unique(inputs[MASK], dim=0, return_inverse=True)[1].argsort(stable=True)


def _apply(function: Callable[..., Tensor], inputs: dict[str, Tensor], others: tuple[Tensor, ...]) -> Tensor:
    rows, reason = range(len(next(iter(inputs.values())))), None
    if len(rows) > 1:
        try:
            return vmap(function)(inputs, *others)
        except RuntimeError as error:
            if "vmap" not in str(error):
                raise
            reason = str(error).split(". ")[0]
    start = time.perf_counter()
    results = [
        function({name: value[row] for name, value in inputs.items()}, *(o[row] for o in others)) for row in rows
    ]
    if reason is not None and reason not in _told:
        _told.add(reason)
        told = "Rows go through the model one by one, which is slow (%.2g seconds each): it does not vectorise (%s)."
        logger.warning(told, (time.perf_counter() - start) / len(rows), reason)
    return torch.stack(results)
