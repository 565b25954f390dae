"""All rows count, however they are kept; lazy ones as far as time allows."""

import logging
import random

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from hf_rgm.trajectory import row_digest
from hf_rgm.trajectory.fingerprint import dataset_fingerprint
from hf_rgm.trajectory.row_digest import readable_rows, rows_sha256

NUM_ROWS = 300
ROWS = [
    {"ids": [row, *range(row % 4)], "x": [[0.1 * row], [1.0]], "text": f"t{row}", "labels": row % 3, "source": "s"}
    for row in range(NUM_ROWS)
]
COLUMNS = ["ids", "x", "text", "labels"]


class Lazy:
    """A map-style dataset that is neither a list nor a `datasets.Dataset`."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def digest(dataset, columns=COLUMNS):
    return rows_sha256(dataset, columns, len(dataset))


def test_containers_precision_and_other_columns_do_not_count():
    expected = digest(ROWS)
    stored = datasets.Dataset.from_list(ROWS)
    tensors = [row | {"ids": torch.tensor(row["ids"]), "x": np.array(row["x"])} for row in ROWS]
    assert digest(Lazy(ROWS)) == digest(tensors) == expected
    assert digest(stored) == digest(stored.with_format("torch")) == digest(stored.remove_columns("source")) == expected
    mixed = [299, *range(299)]
    assert digest(stored.select(mixed)) == digest([ROWS[row] for row in mixed]) != expected


@pytest.mark.parametrize("container", [list, Lazy, datasets.Dataset.from_list])
@pytest.mark.parametrize(
    "change",
    [{"labels": 0.5}, {"ids": [1]}, {"x": [[0.0], [1.0]]}, {"x": [[0.0, 1.0]]}, {"text": "other"}],
    ids=["kind", "length", "value", "shape", "text"],
)
def test_one_row_that_the_fingerprint_does_not_see_counts(container, change):
    other = [*ROWS]
    other[201] = ROWS[201] | change
    assert digest(container(other)) != digest(container(ROWS))
    if "labels" not in change:
        assert dataset_fingerprint(container(other)) == dataset_fingerprint(container(ROWS))


def test_rows_that_are_swapped_count():
    other = [*ROWS]
    other[201], other[202] = other[202], other[201]
    assert digest(other) != digest(ROWS)


def pictures(folder, colour="red", name="one"):
    path = folder / f"{name}.png"
    Image.new("RGB", (2, 2), colour).save(path)
    return datasets.Dataset.from_dict({"image": [str(path)] * 3}).cast_column("image", datasets.Image())


def test_pictures_count_by_their_bytes_and_are_not_decoded(tmp_path, monkeypatch):
    red, elsewhere, blue = pictures(tmp_path), pictures(tmp_path, name="two"), pictures(tmp_path, "blue", "three")
    monkeypatch.setattr(datasets.Image, "decode_example", None)
    assert digest(red, ["image"]) == digest(elsewhere, ["image"]) != digest(blue, ["image"])
    embedded = red.map(lambda row: row, batched=True)
    assert digest(embedded, ["image"]) == digest(red, ["image"])


def test_a_transform_does_not_run_and_all_stored_columns_count():
    def fail(batch):
        raise AssertionError

    stored = datasets.Dataset.from_list(ROWS)
    other = datasets.Dataset.from_list([*ROWS[:-1], ROWS[-1] | {"source": "other"}])
    assert digest(stored.with_transform(fail)) != digest(other.with_transform(fail))


def test_rows_need_not_be_dictionaries():
    rows = [(torch.ones(2), row) for row in range(5)]
    assert digest(rows) == digest([([1.0, 1.0], row) for row in range(5)]) != digest(rows[::-1])


def test_time_bounds_the_number_of_lazy_rows(caplog, monkeypatch):
    assert readable_rows(Lazy(ROWS), COLUMNS) == readable_rows(ROWS, COLUMNS) == NUM_ROWS
    assert not caplog.text
    monkeypatch.setattr(row_digest, "MAX_SECONDS", 1e-9)
    with caplog.at_level(logging.WARNING, logger="hf_rgm"):
        assert readable_rows(Lazy(ROWS), COLUMNS) < NUM_ROWS
    assert "will be compared with the rows given for attribution" in caplog.text
    assert readable_rows(datasets.Dataset.from_list(ROWS), COLUMNS) == NUM_ROWS


class Augmented(Lazy):
    def __getitem__(self, index):
        return {"x": torch.rand(2), "y": random.random()}


def test_rows_drawn_at_random_do_not_count_and_draws_go_on_as_before():
    state = random.getstate(), torch.get_rng_state()
    assert readable_rows(Augmented(ROWS), COLUMNS) == 0
    assert rows_sha256(Augmented(ROWS), COLUMNS, 0) == rows_sha256(Augmented(ROWS), COLUMNS, 0)
    assert random.getstate() == state[0] and torch.equal(torch.get_rng_state(), state[1])
