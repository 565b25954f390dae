"""Warnings appear where scores suffer from what they tell, and once."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from hf_rgm import Attributor, DistillationConfig, Objective, ReverseGradientMatchingDistiller, TrajectoryCallback
from hf_rgm.distillation import distiller as distilling
from hf_rgm.model.functional_model import FunctionalModel
from hf_rgm.testing import tiny_recorded_run, tiny_synset, tiny_trainer

RUN = tiny_recorded_run()
NOISE = "scores by the samples alone will be noise"


def unmatched(responses):
    synset = copy.copy(tiny_synset(responses=responses))
    synset.residuals = torch.full_like(synset.residuals, 2.0)
    return synset


def asked(attributor, **options):
    return attributor.attribute(RUN.queries, **options)


@pytest.mark.parametrize(
    ("responses", "options"),
    [("none", {"rows": RUN.train_dataset}), ("bfloat16", {}), ("bfloat16", {"rows": RUN.train_dataset})],
)
def test_unmatched_samples_are_no_matter_where_scores_do_not_come_from_them(responses, options, caplog):
    attributor = Attributor(RUN.model, unmatched(responses), disable_tqdm=True)
    asked(attributor, **options)
    attributor.unlearn([0], **options)
    assert NOISE not in caplog.text


@pytest.mark.parametrize(("responses", "options"), [("none", {}), ("bfloat16", {"rewind": 0.5})])
def test_scores_by_unmatched_samples_are_warned_of_once(responses, options, caplog):
    attributor = Attributor(RUN.model, unmatched(responses), disable_tqdm=True)
    assert NOISE not in caplog.text
    asked(attributor, **options)
    asked(attributor, **options)
    assert caplog.text.count(NOISE) == 1


@pytest.mark.parametrize(("responses", "count"), [("none", 1), ("int8", 0)])
def test_distilling_warns_of_unmatched_samples_unless_responses_are_kept(responses, count, caplog, monkeypatch):
    warn = distilling.warn_unless_matched
    monkeypatch.setattr(distilling, "warn_unless_matched", lambda states, errors: warn(states, errors + 2))
    config = DistillationConfig(num_iterations=10, responses=responses)
    ReverseGradientMatchingDistiller(
        RUN.model, RUN.trajectory, RUN.train_dataset, RUN.clusters, config=config, disable_tqdm=True
    ).distill()
    assert caplog.text.count(NOISE) == count


def test_flat_objectives_are_told_once_for_all_runs(caplog):
    def known_of_some(forward, queries):
        logits = forward(queries.inputs)
        return logits[:, 0] * (torch.arange(len(logits)) > 2)

    runs = [RUN.trajectory, tiny_recorded_run(1).trajectory]
    given = {"rows": RUN.train_dataset, "clusters": RUN.clusters, "disable_tqdm": True}
    Attributor(RUN.model, trajectory=runs, **given).attribute(
        RUN.queries, objective=Objective("first logit", known_of_some)
    )
    assert caplog.text.count("has a gradient of zero for 3 of its values") == 1


def test_batch_normalisation_is_told_once_for_all_models(caplog):
    for _ in range(3):
        FunctionalModel(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    assert caplog.text.count("has batch normalisation") == 1


class Noisy(Dataset):
    """Rows that are drawn anew whenever they are read."""

    def __len__(self):
        return len(RUN.train_dataset)

    def __getitem__(self, index):
        row = RUN.train_dataset[index]
        return {**row, "pixel_values": row["pixel_values"] + 0.01 * torch.randn(1, 4, 4)}


def test_rows_drawn_at_random_are_told_once(tmp_path, caplog):
    trainer = tiny_trainer(Noisy(), callbacks=[TrajectoryCallback(tmp_path / "trajectory", num_states=4)])
    trainer.train()
    attributor = Attributor(
        trainer.model,
        trajectory=tmp_path / "trajectory",
        rows=Noisy(),
        clusters=RUN.clusters,
        disable_tqdm=True,
    )
    asked(attributor)
    asked(attributor)
    assert caplog.text.count("are drawn at random when they are read") == 1
    assert caplog.text.count("differ when they are read again") == 1
