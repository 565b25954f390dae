"""A synset meets a model that is not its own."""

from __future__ import annotations

import pytest
import torch

from hf_rgm import Attributor
from hf_rgm.exceptions import ParameterMismatchError
from hf_rgm.testing import TinyConfig, TinyModel, tiny_recorded_run, tiny_synset
from tests.hub.hostile.artefacts import ENGINES, attribute


def test_other_weights(outcome_of):
    with pytest.raises(ParameterMismatchError, match="belongs to trained parameters"):
        Attributor(tiny_recorded_run(1).model, tiny_synset())
    outcome_of("Synset", "used with a model of other weights", "ParameterMismatchError")


def test_other_weights_by_force(outcome_of):
    run = tiny_recorded_run(1)
    attributor = Attributor(run.model, tiny_synset(), force=True, disable_tqdm=True)
    assert attributor.attribute(run.queries.select(range(2))).scores.shape == (2, 6)
    outcome_of("Synset", "used with a model of other weights, with `force=True`", "scores, and a warning")


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    ("what", "settings"), [("another width", {"hidden_size": 5}), ("another number of labels", {"num_labels": 7})]
)
def test_another_architecture(what, settings, force, outcome_of):
    model = TinyModel(TinyConfig(**{"num_labels": 3, **settings}))
    with pytest.raises(ParameterMismatchError, match="has shape"):
        Attributor(model, tiny_synset(), force=force)
    outcome_of("Synset", f"used with a model of {what}, with `force={force}`", "ParameterMismatchError")


def test_another_kind_of_model(outcome_of):
    with pytest.raises(ValueError, match="has no parameter 'hidden.weight'"):
        Attributor(torch.nn.Linear(16, 3), tiny_synset(), force=True)
    outcome_of("Synset", "used with a model of other parameters", "ValueError")


def test_the_own_model():
    """What the other cases would give, were nothing wrong."""
    assert attribute(tiny_synset()) == ["scores"] * len(ENGINES)
