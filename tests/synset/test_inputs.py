from __future__ import annotations

import pytest
import torch

from hf_rgm.model.functional_model import FunctionalModel
from hf_rgm.synset.inputs import ContinuousInputs
from hf_rgm.synset.samples import SyntheticSamples
from hf_rgm.testing import TinyConfig, TinyModel

LABELS = torch.zeros(2, dtype=torch.int64)


@pytest.fixture(scope="module")
def inputs():
    return ContinuousInputs(FunctionalModel(TinyModel(TinyConfig(num_labels=3))))


def test_there_and_back(inputs):
    pixels = torch.randn(2, 1, 4, 4)
    assert inputs.name == "pixel_values"
    read, labels = inputs.read({"pixel_values": pixels, "attention_mask": torch.ones(2, 4)}, LABELS)
    assert labels is LABELS
    samples = SyntheticSamples(read, torch.zeros(2, 3), torch.zeros(2))
    assert torch.equal(inputs.to_forward(samples)["pixel_values"], pixels)


def test_a_missing_main_input_is_refused(inputs):
    with pytest.raises(ValueError, match=r"main input `pixel_values` is not among the collated columns \(image\)"):
        inputs.read({"image": torch.zeros(1)}, LABELS)


def test_integers_under_another_name_than_tokens_are_refused(inputs):
    with pytest.raises(NotImplementedError, match="dtype torch.int64. Synsets are for continuous inputs"):
        inputs.read({"pixel_values": torch.zeros(1, 4, dtype=torch.int64)}, LABELS)


def test_a_second_input_is_refused(inputs):
    with pytest.raises(NotImplementedError, match=r"\['bool_masked_pos'\] beside `pixel_values`"):
        inputs.read({"pixel_values": torch.zeros(1, 1, 4, 4), "bool_masked_pos": torch.zeros(1, 4)}, LABELS)


def test_padded_rows_are_refused(inputs):
    mask = torch.tensor([[1, 1], [1, 0]])
    with pytest.raises(NotImplementedError, match="Rows of `pixel_values` are padded"):
        inputs.read({"pixel_values": torch.zeros(2, 2), "attention_mask": mask}, LABELS)
