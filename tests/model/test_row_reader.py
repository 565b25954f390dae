from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import default_data_collator

from hf_rgm.model.functional_model import FunctionalModel
from hf_rgm.model.row_reader import CachedBatches, RowReader
from hf_rgm.testing import TinyConfig, TinyModel, tiny_dataset


@pytest.fixture(scope="module")
def model():
    return FunctionalModel(TinyModel(TinyConfig(num_labels=3)))


class TorchDataset(torch.utils.data.Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def items(count=6):
    return [{"pixel_values": row["pixel_values"], "labels": int(row["labels"])} for row in tiny_dataset(count, seed=0)]


@pytest.mark.parametrize(
    "dataset",
    [
        tiny_dataset(6, seed=0),
        tiny_dataset(6, seed=0).with_format(None),
        tiny_dataset(6, seed=0).rename_column("labels", "label"),
        tiny_dataset(6, seed=0).add_column("source", list("abcdef")),
        items(),
        TorchDataset(items()),
        [{**item, "pixel_values": item["pixel_values"].double(), "source": "x"} for item in items()],
    ],
    ids=["torch format", "plain lists", "label", "extra column", "list", "torch dataset", "float64"],
)
def test_every_kind_of_dataset_gives_the_same_batch(model, dataset):
    inputs, labels = RowReader(dataset, model).batch(np.array([4, 1]))
    expected = tiny_dataset(6, seed=0)[[4, 1]]
    assert list(inputs) == ["pixel_values"]
    assert inputs["pixel_values"].dtype == torch.float32
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
    assert labels.tolist() == [1, 1]
    assert labels.dtype == torch.int64


def test_the_given_collator_is_used(model):
    def collate(rows):
        pictures = torch.stack([row["pixel_values"] for row in rows])
        return {"pixel_values": 2 * pictures, "labels": torch.tensor([row["labels"] for row in rows])}

    reader = RowReader(items(), model, data_collator=collate)
    assert torch.equal(reader.batch([3])[0]["pixel_values"][0], 2 * items()[3]["pixel_values"])


def test_unused_columns_are_kept_on_demand(model):
    dataset = [{**item, "weight": torch.tensor(0.5)} for item in items()]
    assert "weight" not in RowReader(dataset, model).batch([0])[0]
    kept = RowReader(dataset, model, remove_unused_columns=False).batch([0, 1])[0]
    assert kept["weight"].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_are_named(model, value):
    dataset = items()
    dataset[4]["pixel_values"] = torch.full((1, 4, 4), value)
    reader = RowReader(dataset, model)
    reader.batch([0, 1])
    with pytest.raises(ValueError, match=r"`pixel_values` of `train_dataset` has NaN or infinite .* rows \[4\]"):
        reader.batch([5, 4])


def test_a_single_number_that_is_not_finite_is_named_too(model):
    dataset = [{**item, "weight": torch.tensor(float("nan") if i == 2 else 1.0)} for i, item in enumerate(items())]
    reader = RowReader(dataset, model, remove_unused_columns=False)
    with pytest.raises(ValueError, match=r"`weight` of .* rows \[2\]"):
        reader.batch([0, 2])


def test_an_empty_dataset_is_refused(model):
    for empty in ([], Dataset.from_dict({"pixel_values": [], "labels": []})):
        with pytest.raises(ValueError, match="`queries` is empty"):
            RowReader(empty, model, what="queries")


def test_a_streaming_dataset_is_refused(model):
    stream = IterableDataset.from_generator(lambda: iter(items()))
    with pytest.raises(TypeError, match="map-style dataset with a length, got IterableDataset.*from_list"):
        RowReader(stream, model)


def test_missing_labels_are_refused(model):
    with pytest.raises(ValueError, match="no labels / label / label_ids after collating.*pixel_values"):
        RowReader(tiny_dataset(6, seed=0).remove_columns("labels"), model).batch([0])


def test_a_dataset_without_any_known_column_is_refused(model):
    with pytest.raises(ValueError, match=r"columns x; .* takes none of them as input \(pixel_values, labels\)"):
        RowReader(Dataset.from_dict({"x": [1, 2]}), model).batch([0])


def test_a_dataset_with_labels_alone_is_refused(model):
    with pytest.raises(ValueError, match="columns x, labels; .* takes none of them as input"):
        RowReader(Dataset.from_dict({"x": [1, 2], "labels": [0, 1]}), model)


def test_missing_labels_are_predicted_on_demand(model):
    dataset = tiny_dataset(6, seed=0).remove_columns("labels")
    inputs, labels = RowReader(dataset, model, predict_labels=True).batch(range(6))
    assert torch.equal(labels, model.logits(model.parameters(), inputs).argmax(-1))


def test_a_column_that_is_not_a_tensor_is_refused(model):
    reader = RowReader(items(), model, data_collator=lambda rows: {"pixel_values": "text", "labels": torch.zeros(1)})
    with pytest.raises(TypeError, match="`pixel_values` of `train_dataset` is collated to str"):
        reader.batch([0])


@pytest.mark.parametrize("max_bytes", [0, 300, 2**30])
def test_cached_batches_cover_each_group_whatever_fits_in_memory(model, max_bytes):
    groups = [np.array([5, 0, 3]), np.array([1])]
    batches = CachedBatches(RowReader(items(), model), groups, batch_size=2, max_bytes=max_bytes)
    for _ in range(2):
        seen = [[x["pixel_values"] for x, _ in batches.group(k)] for k in range(len(batches))]
        assert [[len(x) for x in group] for group in seen] == [[2, 1], [1]]
        for group, rows in zip(seen, groups, strict=True):
            assert torch.equal(torch.cat(group), torch.stack([items()[row]["pixel_values"] for row in rows]))


def test_kept_batches_are_read_once(model):
    class Counting(TorchDataset):
        reads = 0

        def __getitem__(self, index):
            Counting.reads += 1
            return super().__getitem__(index)

    batches = CachedBatches(RowReader(Counting(items()), model), [range(6)], batch_size=4)
    for _ in range(3):
        list(batches.group(0))
    assert Counting.reads == 6


def random_mask(items):
    batch = default_data_collator(items)
    return batch | {"pixel_values": batch["pixel_values"] * (torch.rand(batch["pixel_values"].shape) < 0.5)}


def test_a_collator_that_draws_at_random_draws_the_same_for_the_same_rows(model, caplog):
    state = torch.get_rng_state()
    with caplog.at_level(logging.WARNING, logger="hf_rgm"):
        one, other = (RowReader(items(), model, data_collator=random_mask) for _ in range(2))
        one.warn_of_draws()
        first, again = one.batch([0, 2])[0]["pixel_values"], other.batch([0, 2])[0]["pixel_values"]
    assert torch.equal(first, again) and torch.equal(one.batch([0, 2])[0]["pixel_values"], first)
    assert not torch.equal(one.batch([2, 0])[0]["pixel_values"].flip(0), first)
    assert "are drawn at random when they are read" in caplog.text
    assert torch.equal(torch.get_rng_state(), state)


def test_a_collator_with_a_generator_of_its_own_is_told_of(model, caplog):
    generator = torch.Generator().manual_seed(0)

    def collate(items):
        batch = default_data_collator(items)
        return batch | {"pixel_values": torch.rand(batch["pixel_values"].shape, generator=generator)}

    with caplog.at_level(logging.WARNING, logger="hf_rgm"):
        RowReader(items(), model, data_collator=collate).warn_of_draws()
    assert "Scores will differ from call to call" in caplog.text


def test_rows_that_are_always_the_same_are_not_told_of(model, caplog):
    with caplog.at_level(logging.WARNING, logger="hf_rgm"):
        RowReader(items(), model).warn_of_draws()
    assert "drawn at random" not in caplog.text and "whenever they are read" not in caplog.text
