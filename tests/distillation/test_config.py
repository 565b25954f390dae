from __future__ import annotations

import json

import pytest

from hf_rgm.distillation.config import DistillationConfig


def test_round_trip_through_json():
    config = DistillationConfig(samples_per_cluster=3, init="noise", tolerance=0.1)
    assert DistillationConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_every_field_has_its_help():
    assert all(f.metadata["help"] for f in DistillationConfig.__dataclass_fields__.values())


@pytest.mark.parametrize(
    "values",
    [
        {"samples_per_cluster": 0},
        {"num_iterations": 0},
        {"states_per_iteration": -1},
        {"batch_size": 0},
        {"cluster_block_size": 0},
        {"input_learning_rate": 0.0},
        {"target_learning_rate": float("nan")},
        {"weight_learning_rate": float("inf")},
        {"target_smoothing": 0.0},
        {"target_smoothing": 1.0},
        {"tolerance": -0.1},
        {"tolerance": float("nan")},
        {"init": "zeros"},
    ],
    ids=str,
)
def test_bad_settings_are_refused_by_name(values):
    with pytest.raises(ValueError, match=f"`{next(iter(values))}` must .* got {next(iter(values.values()))!r}"):
        DistillationConfig(**values)


def test_unknown_settings_are_refused():
    with pytest.raises(ValueError, match="Unknown distillation settings: depth"):
        DistillationConfig.from_dict({"depth": 1})


def test_presets():
    quick = DistillationConfig.from_preset("quick", seed=3)
    assert (quick.samples_per_cluster, quick.seed) == (2, 3)
    assert quick.samples_per_cluster < DistillationConfig().samples_per_cluster
    assert DistillationConfig.from_preset("accurate") == DistillationConfig()
    with pytest.raises(ValueError, match="Unknown preset 'best'. Use one of quick, accurate"):
        DistillationConfig.from_preset("best")
