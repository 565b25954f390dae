"""Settings that change what a model computes count; those that do not, do not."""

import copy

import pytest
import torch
from torch import nn
from transformers import BertForSequenceClassification

from hf_rgm import Attributor, ReverseGradientMatchingDistiller
from hf_rgm.model.architecture import architecture, difference
from hf_rgm.model.functional_model import FunctionalModel
from hf_rgm.testing import tiny_recorded_run, tiny_synset
from tests.text import classifier

RUN = tiny_recorded_run()


class Scaled(nn.Module):
    def __init__(self, scale=1.0, activation=nn.ReLU, stride=1):
        super().__init__()
        self.convolution = nn.Conv1d(2, 2, 3, stride=stride)
        self.activation = activation()
        self.scale = scale


@pytest.mark.parametrize("change", [{"scale": 2.0}, {"activation": nn.Tanh}, {"stride": 2}])
def test_settings_of_layers_count(change):
    assert difference(architecture(Scaled()), Scaled()) is None
    assert difference(architecture(Scaled()), Scaled(**change)) is not None


def bert(**settings):
    model = copy.deepcopy(classifier("bert"))
    for name, value in settings.items():
        setattr(model.config, name, value)
    return type(model)(model.config)


@pytest.mark.parametrize("change", [{"layer_norm_eps": 1e-3}, {"hidden_act": "relu"}, {"is_decoder": True}])
def test_values_of_the_configuration_count(change):
    assert next(iter(change)) in difference(architecture(bert()), bert(**change))


def test_what_does_not_change_the_function_does_not_count(tmp_path):
    model = bert()
    recorded = architecture(model)
    model.train()
    model.save_pretrained(tmp_path)
    loaded = BertForSequenceClassification.from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.bfloat16)
    for other in (loaded, FunctionalModel(model).module, bert(hidden_dropout_prob=0.5, use_cache=False)):
        assert difference(recorded, other) is None


def misconfigured():
    model = copy.deepcopy(RUN.model)
    model.hidden.alpha = 2.0
    return model


def test_a_model_that_is_configured_otherwise_is_refused():
    with pytest.raises(ValueError, match="model's configuration is not that of the recorded one: `hidden` is"):
        ReverseGradientMatchingDistiller(misconfigured(), RUN.trajectory, RUN.train_dataset, RUN.clusters)
    with pytest.raises(ValueError, match="model's configuration is not that of the recorded one: `hidden` is"):
        Attributor(misconfigured(), tiny_synset())
    Attributor(misconfigured(), tiny_synset(), force=True)
