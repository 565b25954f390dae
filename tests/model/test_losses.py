from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers.trainer_pt_utils import LabelSmoother

from hf_rgm.model.functional_model import FunctionalModel
from hf_rgm.model.losses import CROSS_ENTROPY, RowLoss, check_labels
from hf_rgm.model.row_reader import RowReader
from tests.text import DECODERS, classifier, language_model, tagger, texts

CLOSE = {"atol": 1e-6, "rtol": 1e-6}
"""Float32 by another order of operations."""


def mean_of_rows(model, dataset, **settings):
    functional = FunctionalModel(model)
    reader = RowReader(dataset, functional)
    inputs, labels = reader.batch(range(len(reader)))
    logits = functional.logits(functional.parameters(), inputs)
    check_labels(logits, labels)
    return RowLoss(labels_per_row=reader.labels_per_row(), **settings)(logits, labels).mean()


def own_loss(model, dataset, smoothing=0.0):
    batch = dataset[:]
    with torch.no_grad():
        output = model(**batch)
    if not smoothing:
        return output.loss
    shift = "CausalLM" in type(model).__name__ or "LMHead" in type(model).__name__
    return LabelSmoother(epsilon=smoothing)(output, batch["labels"], shift_labels=shift)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize(
    ("model", "labels"),
    [
        (classifier("bert"), "class"),
        (classifier("gpt2"), "class"),
        (tagger("bert"), "tags"),
        *((language_model(kind), "text") for kind in DECODERS),
    ],
    ids=["bert", "gpt2", "tags", *(f"{kind} LM" for kind in DECODERS)],
)
def test_the_mean_over_rows_is_the_trainers_loss(model, labels, smoothing):
    dataset = texts(labels=labels)
    expected = own_loss(model, dataset, smoothing)
    torch.testing.assert_close(mean_of_rows(model, dataset, label_smoothing=smoothing), expected, **CLOSE)


def test_a_function_of_ones_own_takes_the_place_of_cross_entropy():
    loss = RowLoss(label_smoothing=0.5, function=lambda logits, labels: 2 * cross_entropy(logits, labels) * labels)
    logits, labels = torch.randn(3, 4), torch.tensor([0, 1, 2])
    assert torch.equal(loss(logits, labels), 2 * cross_entropy(logits, labels) * labels)


def test_an_ignored_label_counts_for_nothing():
    logits = torch.randn(2, 3)
    losses = CROSS_ENTROPY(logits, torch.tensor([1, -100]))
    torch.testing.assert_close(losses, torch.stack([cross_entropy(logits[:1], torch.tensor([1])), torch.tensor(0.0)]))


def test_rows_without_any_label_are_refused():
    dataset = texts(4, labels="text").map(lambda row: {"labels": [-100] * 6})
    with pytest.raises(ValueError, match="No row of `train_dataset` has a label other than -100"):
        RowReader(dataset, FunctionalModel(language_model("gpt2"))).labels_per_row()


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_out_of_range_is_named(label):
    with pytest.raises(ValueError, match=f"Label {label} is out of range for a model with 3 classes"):
        check_labels(torch.zeros(2, 3), torch.tensor([0, label]))


@pytest.mark.parametrize(
    ("logits", "labels"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 3)),
        (torch.zeros(2, 1), torch.zeros(2)),
        (torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(2, 4, 3), torch.zeros(2, dtype=torch.int64)),
    ],
    ids=["multi-label", "regression", "one label", "one label for many"],
)
def test_other_problems_are_refused(logits, labels):
    with pytest.raises(NotImplementedError, match="Labels are integers, one for each vector of logits"):
        check_labels(logits, labels)
