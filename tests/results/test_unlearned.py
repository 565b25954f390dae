from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from hf_rgm import Attributor
from hf_rgm.results.unlearned import UnlearnedModel
from hf_rgm.testing import TinyModel, tiny_recorded_run, tiny_synset

RUN = tiny_recorded_run()
NAMES = RUN.clusters.names[:2]
"""A third of the rows."""


@pytest.fixture(scope="module")
def attributor():
    return Attributor(RUN.model, tiny_synset(), disable_tqdm=True)


@pytest.fixture(scope="module")
def unlearned(attributor):
    return attributor.unlearn(NAMES, rows=RUN.train_dataset, queries=RUN.queries)


def losses(model, dataset, rows):
    batch = dataset[rows]
    with torch.no_grad():
        logits = model(pixel_values=batch["pixel_values"]).logits
    return float(nn.functional.cross_entropy(logits, batch["labels"]))


def test_it_is_the_model_without_and_says_what_was_removed(attributor, unlearned):
    expected = attributor.model_without(NAMES, rows=RUN.train_dataset)
    for name, parameter in expected.named_parameters():
        assert torch.equal(unlearned.model.get_parameter(name), parameter)
    assert list(unlearned.clusters) == list(NAMES)
    assert list(unlearned.sizes) == [8, 8]
    assert (unlearned.num_steps, unlearned.engine) == (48, "training_on")
    assert 0 < unlearned.rewind_step < 48


def test_little_is_removed_by_linearised_replay_and_much_by_anchored_or_training_on(attributor):
    for count, engine, with_rows in (
        (1, "linearized_replay", "linearized_replay"),
        (2, "replay", "training_on"),
        (5, "replay", "training_on"),
    ):
        assert attributor.unlearn(range(count)).engine == engine
        assert attributor.unlearn(range(count), rows=RUN.train_dataset).engine == with_rows
    for rows in (None, RUN.train_dataset):
        assert attributor.unlearn([0], engine="replay", rows=rows).engine == "replay"
    with pytest.raises(ValueError, match="Unknown engine 'adjoint'"):
        attributor.unlearn([0], engine="adjoint")


def test_checks_are_mean_losses_under_both_models(unlearned):
    removed = [row for name in NAMES for row in RUN.clusters.rows(name).tolist()]
    others = sorted(set(range(48)) - set(removed))
    for check, dataset, rows in zip(
        unlearned.checks,
        (RUN.train_dataset, RUN.train_dataset, RUN.queries),
        (removed, others, list(range(12))),
        strict=True,
    ):
        assert check.num_rows == len(rows)
        assert check.loss_before == pytest.approx(losses(RUN.model, dataset, rows), rel=1e-4)
        assert check.loss_after == pytest.approx(losses(unlearned.model, dataset, rows), rel=1e-4)
    assert unlearned.checks[0].loss_after > 2 * unlearned.checks[0].loss_before


def test_saved_it_loads_like_any_model_and_tells_its_story(unlearned, tmp_path):
    folder = unlearned.save_pretrained(tmp_path / "model")
    loaded = TinyModel.from_pretrained(folder)
    for name, parameter in unlearned.model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter)
    told = json.loads((folder / "unlearning.json").read_text())
    assert told["removed"] == dict.fromkeys(NAMES, 8)
    assert [check["what"] for check in told["checks"]] == ["removed rows", "the other training rows", "queries"]
    unlearned.save_pretrained(folder)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="left alone"):
        unlearned.save_pretrained(tmp_path)


def test_without_rows_nothing_is_claimed(attributor, tmp_path):
    unchecked = attributor.unlearn(NAMES[0])
    assert unchecked.checks == []
    assert "Not checked" in (unchecked.save_pretrained(tmp_path / "model") / "README.md").read_text()


def test_foreign_rows_and_models_that_cannot_be_saved_are_refused(attributor, tmp_path):
    with pytest.raises(ValueError, match="has 12 rows, but the clusters have 48"):
        attributor.unlearn(NAMES, rows=RUN.queries)
    plain = UnlearnedModel(nn.Linear(2, 2), ["a"], [1], [], "replay", 1, 2, "0" * 64)
    with pytest.raises(TypeError, match="Linear has no `save_pretrained`"):
        plain.save_pretrained(tmp_path / "model")
