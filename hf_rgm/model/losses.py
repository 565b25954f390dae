"""The loss of each training row, as the `Trainer` computes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

IGNORED_LABEL = -100

LossFunction = Callable[[Tensor, Tensor], Tensor]
"""Takes logits `(batch_size, *positions, num_labels)` and labels `(batch_size, *positions)` and returns the loss of
each row, `(batch_size,)`; called under `torch.func.vmap`, `grad` and `hessian`."""


@dataclass(frozen=True)
class RowLoss:
    """Loss of each row: the sum over its labels, divided by the mean number of labels of a row, times a scale."""

    # The Trainer averages over all labels of a batch, so a row with more labels weighs more.

    labels_per_row: float = 1.0
    label_smoothing: float = 0.0
    function: LossFunction | None = None
    scale: float = 1.0  # ratio of the trained loss to the mean over labels, or over rows of `function`

    @property
    def label_weight(self) -> float:
        """Weight of one label in its row's loss."""
        return self.scale / self.labels_per_row

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Losses `(batch_size,)`, of logits with one dimension more than labels `(batch_size, *positions)`."""
        if self.function is not None:
            return self.scale * self.function(logits, labels)
        losses = label_losses(logits, labels, label_smoothing=self.label_smoothing)
        return losses.reshape(len(labels), -1).sum(1) * self.label_weight


CROSS_ENTROPY = RowLoss()
"""The plain cross entropy of classification."""


def label_losses(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Cross entropy at each label, in the shape of `labels`; 0 where the label is -100."""
    log_probabilities = logits.log_softmax(-1)
    losses = -log_probabilities.gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    if label_smoothing:
        losses = (1 - label_smoothing) * losses - label_smoothing * log_probabilities.mean(-1)
    return losses.masked_fill(labels == IGNORED_LABEL, 0.0)


def squared_errors(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean squared error of each row's numbers, `(batch_size,)`: the loss of regression in Transformers."""
    return (logits.reshape(labels.shape) - labels).square().reshape(len(labels), -1).mean(1)


def binary_cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean binary cross entropy of each row's labels, `(batch_size,)`: the loss of multi-label classification."""
    losses = F.binary_cross_entropy_with_logits(logits.reshape(labels.shape), labels, reduction="none")
    return losses.reshape(len(labels), -1).mean(1)


LOSSES_OF_NUMBERS: dict[str, LossFunction] = {
    "squared_error": squared_errors,
    "binary_cross_entropy": binary_cross_entropies,
}
"""Losses of rows whose labels are numbers, by the name that a recorded run keeps."""


def check_labels(logits: Tensor, labels: Tensor) -> None:
    """Checks that labels are class indices, one for each vector of logits."""
    num_labels = logits.shape[-1]
    if logits.dim() < 2 or logits.shape[:-1] != labels.shape or labels.is_floating_point() or num_labels < 2:
        raise NotImplementedError(
            f"Logits of shape {tuple(logits.shape)} with {labels.dtype} labels of shape {tuple(labels.shape)} are not "
            "supported. Labels are integers, one for each vector of logits (classification, language models), or "
            "floats, one for each logit (regression, several labels a row). Pass any other loss of each row as "
            "`row_loss`."
        )
    outside = labels[((labels < 0) & (labels != IGNORED_LABEL)) | (labels >= num_labels)]
    if outside.numel():
        raise ValueError(
            f"Label {int(outside[0])} is out of range for a model with {num_labels} classes (labels 0 to "
            f"{num_labels - 1}). Set `num_labels` in the model's config to the number of classes, or fix the column."
        )
