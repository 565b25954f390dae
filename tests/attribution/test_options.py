from __future__ import annotations

import inspect

import pytest
import torch
from transformers import pipeline

from hf_rgm import AttributionPipeline, Attributor
from hf_rgm.attribution.options import keywords_of
from hf_rgm.testing import tiny_recorded_run, tiny_synset

RUN = tiny_recorded_run()


@pytest.fixture(scope="module")
def attribute():
    return AttributionPipeline(RUN.model, synset=tiny_synset(), disable_tqdm=True)


@pytest.mark.parametrize(
    ("method", "target", "own"),
    [
        (AttributionPipeline.__call__, Attributor.attribute, {"top_k"}),
        (AttributionPipeline.unlearn, Attributor.unlearn, set()),
        (AttributionPipeline.model_without, Attributor.unlearn, set()),
        (Attributor.model_without, Attributor.unlearn, set()),
        (AttributionPipeline.suggest_mixture, Attributor.suggest_mixture, set()),
    ],
)
def test_help_lists_options_with_their_defaults(method, target, own):
    shown = keywords_of(method)
    passed = keywords_of(target)
    assert set(shown) == own | set(passed) and passed
    assert all(shown[name].default == option.default for name, option in passed.items())
    kinds = [parameter.kind for parameter in inspect.signature(method).parameters.values()]
    assert inspect.Parameter.VAR_KEYWORD not in kinds


def test_unknown_options_are_named(attribute):
    attributor, masks = attribute.attributor, torch.ones(1, 6)
    for call in (
        lambda **options: attribute(RUN.queries, **options),
        lambda **options: attribute.unlearn([0], **options),
        lambda **options: attribute.model_without([0], **options),
        lambda **options: attribute.suggest_mixture(RUN.queries, **options),
        lambda **options: attributor.model_without([0], **options),
        lambda **options: attributor.estimate(RUN.queries, **options),
        lambda **options: attributor.replayed_values(RUN.queries, masks, **options),
        lambda **options: pipeline(
            "data-attribution", model=RUN.model, synset=tiny_synset(), disable_tqdm=True, **options
        ),
    ):
        with pytest.raises(TypeError, match="rewnid"):
            call(rewnid=0.5)
