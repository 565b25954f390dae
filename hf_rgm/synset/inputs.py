"""The continuous input space in which synthetic samples live."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hf_rgm.modeling import FunctionalModel


class ContinuousInputs:
    """
    Maps a collated batch to one float tensor per row, and back to the forward's keyword arguments.

    Covers every model whose main input is already continuous: `pixel_values`, `input_features`, `input_values`,
    tabular features.

    Args:
        model (`FunctionalModel`): Its `main_input_name` names the tensor.
    """

    def __init__(self, model: FunctionalModel) -> None:
        self.name = model.main_input_name

    def from_batch(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """
        The continuous representation of a batch, shape `(batch_size, *input_shape)`, float32.

        Raises:
            ValueError: If the batch lacks the main input.
            NotImplementedError: If the main input is discrete, or other tensors come with it.
        """
        if self.name not in inputs:
            raise ValueError(
                f"The model's main input `{self.name}` is not among the collated columns ({', '.join(inputs)}). "
                "Name the dataset column like the forward argument, or pass the `data_collator` that does so."
            )
        value = inputs[self.name]
        if not value.is_floating_point():
            raise NotImplementedError(
                f"The main input `{self.name}` has dtype {value.dtype}: synsets for token models are not supported "
                "yet. Models with continuous inputs (`pixel_values`, `input_features`, `input_values`) are."
            )
        others = sorted(set(inputs) - {self.name})
        if others:
            raise NotImplementedError(
                f"The forward takes {others} beside `{self.name}`; synsets hold one continuous input per sample. Drop "
                "these columns before training and distilling, or give the model a forward that does without them."
            )
        return value

    def to_forward(self, samples: Tensor) -> dict[str, Tensor]:
        """The forward's keyword arguments for samples of shape `(batch_size, *input_shape)`."""
        return {self.name: samples}


def soft_labels(labels: Tensor, num_labels: int, smoothing: float) -> Tensor:
    """
    Target logits whose softmax is the label with the rest of the mass spread evenly: shape `(*labels, num_labels)`.
    """
    one_hot = torch.nn.functional.one_hot(labels, num_labels).float()
    return torch.log(one_hot * (1 - smoothing) + smoothing / num_labels)
