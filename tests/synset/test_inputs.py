from __future__ import annotations

import pytest
import torch

from hf_rgm.modeling import FunctionalModel
from hf_rgm.synset.inputs import ContinuousInputs
from hf_rgm.testing import TinyConfig, TinyModel


@pytest.fixture(scope="module")
def inputs():
    return ContinuousInputs(FunctionalModel(TinyModel(TinyConfig(num_labels=3))))


def test_there_and_back(inputs):
    pixels = torch.randn(2, 1, 4, 4)
    assert inputs.name == "pixel_values"
    assert torch.equal(inputs.to_forward(inputs.from_batch({"pixel_values": pixels}))["pixel_values"], pixels)


def test_a_missing_main_input_is_refused(inputs):
    with pytest.raises(ValueError, match=r"main input `pixel_values` is not among the collated columns \(image\)"):
        inputs.from_batch({"image": torch.zeros(1)})


def test_tokens_are_refused(inputs):
    with pytest.raises(NotImplementedError, match="dtype torch.int64: synsets for token models"):
        inputs.from_batch({"pixel_values": torch.zeros(1, 4, dtype=torch.int64)})


def test_a_second_input_is_refused(inputs):
    with pytest.raises(NotImplementedError, match=r"\['bool_masked_pos'\] beside `pixel_values`"):
        inputs.from_batch({"pixel_values": torch.zeros(1, 1, 4, 4), "bool_masked_pos": torch.zeros(1, 4)})
