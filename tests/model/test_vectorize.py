from __future__ import annotations

import logging

import torch

from hf_rgm.model.vectorize import map_rows


def test_rows_with_the_same_mask_go_together_and_come_back_in_order():
    values = torch.randn(5, 3)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 1], [1, 1, 0], [1, 0, 0]])
    seen = []

    def function(inputs, other):
        seen.append(inputs["attention_mask"].tolist())
        if inputs["attention_mask"].all():
            return inputs["values"].sum() + other
        return (inputs["values"] * inputs["attention_mask"]).sum() + other

    got = map_rows(function, {"values": values, "attention_mask": mask}, torch.arange(5))
    torch.testing.assert_close(got, (values * mask).sum(1) + torch.arange(5))
    assert sorted(seen) == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]


def test_what_does_not_vectorise_goes_row_by_row_and_says_so(caplog):
    values = torch.tensor([[1.0, -1.0], [2.0, 3.0]])

    def function(inputs):
        return inputs["values"].sum() if inputs["values"].min() > 0 else inputs["values"].prod()

    with caplog.at_level(logging.WARNING):
        assert map_rows(function, {"values": values}).tolist() == [-1.0, 5.0]
    assert "one by one, which is slow" in caplog.text


def test_other_errors_are_not_hidden():
    def function(inputs):
        return inputs["values"] @ torch.zeros(7)

    try:
        map_rows(function, {"values": torch.zeros(2, 3)})
    except RuntimeError as error:
        assert "size" in str(error)
    else:
        raise AssertionError("The product of vectors of different lengths was hidden.")
