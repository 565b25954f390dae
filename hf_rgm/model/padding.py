"""Texts without the padding that they do not need."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from hf_rgm.model.functional_model import FunctionalModel
from hf_rgm.model.losses import IGNORED_LABEL
from hf_rgm.model.vectorize import MASK, order_by_mask

OF_TOKENS = ("input_ids", MASK, "token_type_ids", "position_ids")
"""Inputs with a value for each token; of texts with any other, nothing is cut off."""

PROBED_ROWS = 4
TOLERANCE = 1e-4
"""By which logits may differ without the padding, relative to the largest."""


def batches_by_length(
    model: FunctionalModel,
    inputs: Mapping[str, Tensor],
    labels: Tensor,
    at_once: int,
    *,
    ignored: float = IGNORED_LABEL,
) -> Iterator[tuple[Tensor, dict[str, Tensor], Tensor]]:
    """
    Divides collated rows into batches of rows of one length, as far as there are enough, less what all of them pad.

    Columns on the right that are padding in every row of a batch are cut off, where the model's logits are seen not to
    depend on them. Rows without an `attention_mask` are divided as they are.

    Args:
        model (`FunctionalModel`): The model, at whose own parameters this is seen, once.
        inputs (`dict[str, Tensor]`): The forward's keyword arguments, first dimension `num_rows`.
        labels (`Tensor`): `(num_rows, *positions)`, labels or weights.
        at_once (`int`): Rows of a batch.
        ignored (`float`, *optional*, defaults to `-100`): Where these count for nothing.

    Returns:
        `Iterator`: positions of a batch's rows, `(batch_size,)`, its inputs and its labels.
    """
    cut = MASK in inputs and _can_be_cut(model, inputs)
    for part in order_by_mask(inputs).split(at_once):
        some = {name: value[part] for name, value in inputs.items()}
        yield (part, *(_without_padding(some, labels[part], ignored) if cut else (some, labels[part])))


def _without_padding(inputs: dict[str, Tensor], labels: Tensor, ignored: float) -> tuple[dict[str, Tensor], Tensor]:
    mask = inputs[MASK]
    padded = mask.shape[1]
    used = (mask != 0).any(0)
    if labels.shape == mask.shape:
        used = used | (labels != ignored).any(0)
    length = int(torch.nonzero(used)[-1]) + 1 if bool(used.any()) else padded
    if length == padded:
        return inputs, labels
    shorter = {name: value[:, :length] if name in OF_TOKENS else value for name, value in inputs.items()}
    return shorter, labels[:, :length] if labels.shape == mask.shape else labels


@torch.no_grad()
def _can_be_cut(model: FunctionalModel, inputs: Mapping[str, Tensor]) -> bool:
    """Whether logits are the same without the padding; looked at once for each model, on its shortest rows."""
    if model.ignores_padding is False:
        return False
    mask = inputs[MASK]
    if {*inputs} - {*OF_TOKENS} or any(value.shape != mask.shape for value in inputs.values()):
        return False
    if mask.dim() != 2 or bool((mask[:, -1] != 0).all()):
        return False  # nothing to be cut
    if model.ignores_padding:
        return True
    shortest = (mask != 0).sum(1).argsort(stable=True)[:PROBED_ROWS]
    some = {name: value[shortest] for name, value in inputs.items()}
    shorter, _ = _without_padding(some, shortest, 0)
    if shorter[MASK].shape == some[MASK].shape:
        return False
    try:
        whole, cut = (model.logits(model.parameters(), each) for each in (some, shorter))
    except (RuntimeError, ValueError, IndexError):
        model.ignores_padding = False
        return False
    if whole.dim() > 2 and whole.shape[1] == mask.shape[1]:
        seen = shorter[MASK] != 0
        whole, cut = whole[:, : cut.shape[1]][seen], cut[seen]
    same = whole.shape == cut.shape and bool((whole - cut).abs().max() <= TOLERANCE * whole.abs().max())
    model.ignores_padding = same
    return same
