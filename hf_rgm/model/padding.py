"""Batches of texts without needless padding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from hf_rgm.model.functional_model import FunctionalModel
from hf_rgm.model.losses import IGNORED_LABEL
from hf_rgm.model.vectorize import MASK, order_by_mask

OF_TOKENS = ("input_ids", MASK, "token_type_ids", "position_ids")
"""Inputs with one value per token; with any other input, nothing is cut off."""

PROBED_ROWS = 4
TOLERANCE = 1e-4
"""Largest difference of logits without padding, relative to the largest logit."""


def batches_by_length(
    model: FunctionalModel,
    inputs: Mapping[str, Tensor],
    labels: Tensor,
    at_once: int,
    *,
    ignored: float = IGNORED_LABEL,
) -> Iterator[tuple[Tensor, dict[str, Tensor], Tensor]]:
    """Batches of rows of similar length as `(positions, inputs, labels)`, without padding that all of them share."""
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
    """Whether logits are the same without the padding; tried once per model, on the shortest rows."""
    mask = inputs[MASK]
    if {*inputs} - {*OF_TOKENS} or any(value.shape != mask.shape for value in inputs.values()) or mask.dim() != 2:
        return False
    if model.ignores_padding is False or bool((mask[:, -1] != 0).all()):
        return False
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
