"""Functions of one row applied to every row of a batch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.func import vmap

from hf_rgm.model.warn_once import warn_once

logger = logging.getLogger(__name__)

MASK = "attention_mask"


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
    rows = range(len(next(iter(inputs.values()))))
    if len(rows) > 1:
        try:
            return vmap(function)(inputs, *others)
        except RuntimeError as error:
            if "vmap" not in str(error):
                raise
            reason = str(error).split(". ")[0]
            told = "Rows go through the model one by one, which is slow: it does not vectorise (%s)."
            warn_once(logger, told, reason)
    return torch.stack(
        [function({name: value[row] for name, value in inputs.items()}, *(o[row] for o in others)) for row in rows]
    )
