"""Which rows synthetic samples can stand for."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.func import grad

from hf_rgm.model.functional_model import FunctionalModel

TOKENS = "input_ids"
COMPANIONS = ("attention_mask", "token_type_ids", "position_ids")
"""Arguments that may come with token ids. Synthetic samples have no padding and leave the others to the model."""


def check_kind(model: FunctionalModel) -> None:
    """Refuses encoder-decoders of tokens."""
    if model.main_input_name == TOKENS and getattr(model.config, "is_encoder_decoder", False):
        raise NotImplementedError(
            f"{type(model.module).__name__} is an encoder-decoder; synsets are for encoders and decoders. Use a model "
            "of one of the two kinds."
        )


def check_inputs(name: str, inputs: Mapping[str, Tensor]) -> None:
    """Refuses collated rows with other inputs than synthetic samples have, beside the main one, `name`."""
    if name not in inputs:
        raise ValueError(
            f"The model's main input `{name}` is not among the collated columns ({', '.join(inputs)}). "
            "Name the dataset column like the forward argument, or pass the `data_collator` that does so."
        )
    if name == TOKENS:
        _check_tokens(inputs)
    else:
        _check_continuous(name, inputs)


def _check_tokens(inputs: Mapping[str, Tensor]) -> None:
    ids = inputs[TOKENS]
    if ids.dim() != 2:
        raise NotImplementedError(
            f"Rows of `{TOKENS}` have shape {tuple(ids.shape[1:])}: multiple choice, or several texts a row. "
            "Synthetic texts are single ones. Attribute from the trajectory and the rows."
        )
    others = sorted(set(inputs) - {TOKENS, *COMPANIONS})
    if others:
        raise NotImplementedError(
            f"The forward takes {others} beside `{TOKENS}`; synthetic texts hold tokens only. Drop these columns "
            "before training and distilling."
        )


def _check_continuous(name: str, inputs: Mapping[str, Tensor]) -> None:
    value = inputs[name]
    if not value.is_floating_point():
        raise NotImplementedError(
            f"The main input `{name}` has dtype {value.dtype}. Synsets are for continuous inputs "
            f"(`pixel_values`, `input_features`, `input_values`) and for tokens named `{TOKENS}`."
        )
    mask = inputs.get("attention_mask")
    if mask is not None and not bool(mask.all()):
        raise NotImplementedError(
            f"Rows of `{name}` are padded (`attention_mask` has zeros); synthetic samples are of one length. "
            "Cut or repeat all rows to the same length before training and distilling."
        )
    others = sorted(set(inputs) - {name, "attention_mask"})
    if others:
        raise NotImplementedError(
            f"The forward takes {others} beside `{name}`; synsets hold one continuous input per sample. Drop "
            "these columns before training and distilling, or give the model a forward that does without them."
        )


def _check_labels(model: FunctionalModel, labels: Tensor) -> None:
    """Refuses labels that synthetic samples have no targets for."""
    if labels.is_floating_point() or model.predicts_spans:
        what = "positions in the text" if model.predicts_spans else "numbers, not classes"
        raise NotImplementedError(
            f"The labels are {what}, and synthetic samples stand for classes. Attribute from the trajectory and the "
            "rows: `Attributor(model, trajectory=..., rows=..., clusters=...)`."
        )


def check_distillable(model: FunctionalModel, inputs: Mapping[str, Tensor], labels: Tensor) -> None:
    """Refuses rows and models that cannot be distilled, by the second derivative that distilling takes, on one row."""
    check_kind(model)
    _check_labels(model, labels)
    check_inputs(model.main_input_name, inputs)
    name, parameters = model.main_input_name, model.parameters()
    one = inputs[name][:1]
    try:
        with torch.enable_grad(), model.differentiable():
            sample = (model.embed(parameters, one) if name == TOKENS else one).detach().requires_grad_()
            sample_name = "inputs_embeds" if name == TOKENS else name
            gradients = grad(lambda p: model.logits(p, {sample_name: sample}).log_softmax(-1).sum())(parameters)
            energy = torch.stack([gradient.square().sum() for gradient in gradients.values()]).sum()
            torch.autograd.grad(energy, sample, materialize_grads=True)
    except (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError, AttributeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise NotImplementedError(
            f"{type(model.module).__name__} does not take synthetic samples of `{name}`, or has no second derivative "
            f"in them: {str(error).split('. ')[0]}. Attribute by the rows, without a synset."
        ) from error
