"""Functions of one row applied to every row of a batch."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.func import vmap

logger = logging.getLogger(__name__)

MASK = "attention_mask"


def map_rows(function: Callable[..., Tensor], inputs: Mapping[str, Tensor], *others: Tensor) -> Tensor:
    """
    Applies a function to every row at once by `torch.func.vmap`, or to one after another where the model does not
    allow that.

    Rows with the same `attention_mask` go together and share it: Transformers asks whether all of a mask is set, which
    vmap cannot answer for masks that differ.

    Args:
        function (`Callable`): Takes one row's inputs by name and its slice of each of `others`; returns a tensor.
        inputs (`dict[str, Tensor]`): First dimension `batch_size`.
        others (`Tensor`): First dimension `batch_size`.

    Returns:
        `Tensor`: `(batch_size, ...)`.
    """
    if MASK not in inputs:
        return _apply(function, dict(inputs), others)
    masks, group_of = torch.unique(inputs[MASK], dim=0, return_inverse=True)
    rest = {name: value for name, value in inputs.items() if name != MASK}
    order, results = [], []
    for group, mask in enumerate(masks):
        members = torch.nonzero(group_of == group)[:, 0]
        with_mask = functools.partial(_with_mask, function, mask)
        own = {name: value[members] for name, value in rest.items()}
        results.append(_apply(with_mask, own, tuple(other[members] for other in others)))
        order.append(members)
    return torch.cat(results)[torch.cat(order).argsort()]


def order_by_mask(inputs: Mapping[str, Tensor]) -> Tensor:
    """
    An order of rows in which those with the same `attention_mask` follow each other, `(batch_size,)`, int64.

    So that [`map_rows`], given some rows after the others, finds many that go together.
    """
    if MASK not in inputs:
        first = next(iter(inputs.values()))
        return torch.arange(len(first), device=first.device)
    return torch.unique(inputs[MASK], dim=0, return_inverse=True)[1].argsort(stable=True)


def _with_mask(function: Callable[..., Tensor], mask: Tensor, inputs: dict[str, Tensor], *others: Tensor) -> Tensor:
    return function({**inputs, MASK: mask}, *others)


def _apply(function: Callable[..., Tensor], inputs: dict[str, Tensor], others: tuple[Tensor, ...]) -> Tensor:
    rows = range(len(next(iter(inputs.values()))))
    if len(rows) > 1:
        try:
            return vmap(function)(inputs, *others)
        except RuntimeError as error:
            if "vmap" not in str(error):
                raise
            _say_once(str(error).split(". ")[0])
    return torch.stack(
        [function({name: value[row] for name, value in inputs.items()}, *(o[row] for o in others)) for row in rows]
    )


@functools.cache
def _say_once(reason: str) -> None:
    logger.warning("Rows go through the model one by one, which is slow: it does not vectorise (%s).", reason)
