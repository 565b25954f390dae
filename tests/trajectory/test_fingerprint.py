import logging
import random

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from hf_rgm.trajectory.fingerprint import dataset_fingerprint
from tests.recording.helpers import dataset

ROWS = [{"x": [0.1 * row, 1.0], "labels": row % 3, "source": f"s{row}"} for row in range(100)]
COLUMNS = ["x", "labels", "unused"]


def changed(row, **values):
    return [item | values if index == row else item for index, item in enumerate(ROWS)]


def test_containers_and_precision_do_not_count():
    expected = dataset_fingerprint(ROWS)
    tensors = [
        {"x": torch.tensor(row["x"]), "labels": torch.tensor(row["labels"]), "source": row["source"]} for row in ROWS
    ]
    arrays = [{"x": np.array(row["x"]), "labels": np.int32(row["labels"]), "source": row["source"]} for row in ROWS]
    assert len(expected) == 64
    assert dataset_fingerprint(tensors) == expected
    assert dataset_fingerprint(arrays) == expected
    assert dataset_fingerprint(datasets.Dataset.from_list(ROWS)) == expected
    assert dataset_fingerprint(datasets.Dataset.from_list(ROWS).with_format("torch")) == expected


def test_only_the_given_columns_count():
    full = datasets.Dataset.from_list(ROWS)
    expected = dataset_fingerprint(full, COLUMNS)
    assert dataset_fingerprint(full.remove_columns("source"), COLUMNS) == expected
    assert dataset_fingerprint(full.select_columns(["labels", "x"]), COLUMNS[::-1]) == expected
    assert dataset_fingerprint(full) != expected


def test_all_columns_count_if_none_of_the_given_is_there():
    assert dataset_fingerprint(ROWS, ["pixel_values"]) == dataset_fingerprint(ROWS)


@pytest.mark.parametrize(
    "other",
    [
        ROWS[:-1],
        changed(0, labels=2),
        changed(99, x=[9.9, 1.5]),
        changed(0, x=[[0.0, 1.0]]),
        changed(0, source="other"),
        changed(0, labels=0.5),
        [{"y": row["x"], "labels": row["labels"], "source": row["source"]} for row in ROWS],
    ],
    ids=["length", "label", "value", "shape", "text", "kind", "name"],
)
def test_content_counts(other):
    assert dataset_fingerprint(other) != dataset_fingerprint(ROWS)


@pytest.mark.parametrize(
    ("one", "same", "other"),
    [
        ([[1, 2], [3]], [np.array([1, 2]), [3]], [[1], [2, 3]]),
        ([torch.ones(2, dtype=torch.bfloat16), "a"], [[1.0, 1.0], "a"], [[1.0, 1.0], "b"]),
        ({"a": [], "b": None}, {"b": None, "a": torch.empty(0)}, {"a": [], "b": 0}),
        (True, 1, 2),
        (Image.new("RGB", (2, 2), "red"), Image.new("RGB", (2, 2), "red"), Image.new("RGB", (2, 2), "blue")),
        ((torch.ones(3), 1), (np.ones(3), 1), (torch.ones(3), 0)),
        (b"ab", "ab", b"ba"),
        (np.array(["a", None], dtype=object), ["a", None], ["b", None]),
    ],
)
def test_kinds_of_values(one, same, other):
    assert dataset_fingerprint([{"v": one}]) == dataset_fingerprint([{"v": same}])
    assert dataset_fingerprint([{"v": one}]) != dataset_fingerprint([{"v": other}])


def test_rows_need_not_be_dictionaries():
    rows = [(row["features"], row["labels"]) for row in dataset()]
    assert dataset_fingerprint(rows) == dataset_fingerprint(list(rows))
    assert dataset_fingerprint(rows) != dataset_fingerprint(rows[::-1])


class Augmented:
    """Draws from every global generator, as augmentations do."""

    def __len__(self):
        return 5

    def __getitem__(self, index):
        return {"x": torch.rand(2), "y": np.random.rand(), "z": random.random()}


def test_random_rows_count_by_length_only(caplog):
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    with caplog.at_level(logging.WARNING, logger="hf_rgm"):
        first, second = dataset_fingerprint(Augmented()), dataset_fingerprint(Augmented())
    assert first == second
    assert "covers only its length, 5" in caplog.text
    assert random.getstate() == state[0]
    assert np.random.get_state()[1].tolist() == state[1]
    assert torch.equal(torch.get_rng_state(), state[2])


def test_dataset_without_length_is_refused():
    with pytest.raises(TypeError, match="got generator"):
        dataset_fingerprint(row for row in ROWS)


def test_empty_dataset_has_a_fingerprint():
    assert dataset_fingerprint([]) != dataset_fingerprint(ROWS)
