from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
from huggingface_hub import DatasetCard, ModelCard
from torch import nn

from hf_rgm import AttributionResult
from hf_rgm.agreement.correlations import Estimate
from hf_rgm.agreement.fidelity_figures import Agreement
from hf_rgm.fidelity.report import FidelityReport
from hf_rgm.hub import CardOptions, cards
from hf_rgm.hub.cards import NOT_MEASURED, fidelity_section
from hf_rgm.results.result_files import attribution_card
from hf_rgm.results.unlearned import UnlearnedModel, UnlearningCheck, unlearned_model_card
from hf_rgm.synset.synset_files import synset_card
from hf_rgm.testing import tiny_synset

REPORT = FidelityReport(
    agreements={
        "lds_clusters": Agreement(Estimate(0.5, 0.25, 0.75), 12, Estimate(0.9, 0.8, 1.0)),
        "leave_cluster_out": Agreement(Estimate(0.4, 0.3, 0.5), 6),
    },
    engine="adjoint",
    objective="margin",
    num_queries=20,
    seeds=(1, 2),
    rows=True,
    samples_sha256=tiny_synset().samples_sha256,
)


def test_the_header_is_yaml_and_the_facts_are_there():
    card = synset_card(tiny_synset())
    assert DatasetCard(card).data.tags == ["hf-rgm", "data-attribution", "synset"]
    for part in (
        "# Synset",
        f"{tiny_synset().num_samples} of `pixel_values`",
        "| clusters | 6 |",
        "| 48 |",
        tiny_synset().parameters_sha256[:16],
    ):
        assert part in card
    assert "{{" not in card


def test_what_was_not_measured_is_said_so():
    assert fidelity_section(None) == NOT_MEASURED
    assert NOT_MEASURED in synset_card(tiny_synset())


def test_measured_fidelity_is_shown_with_intervals_and_how_it_was_measured():
    section = fidelity_section(REPORT.to_dict())
    assert "| random halves of the clusters (LDS) | 0.500 [0.250, 0.750] | 0.900 [0.800, 1.000] | 12 |" in section
    assert "| single clusters left out | 0.400 [0.300, 0.500] | not measured (one seed) | 6 |" in section
    assert "Engine: adjoint on synset and training rows. Objective: margin. Queries: 20." in section
    assert "Retrainings: 36, seeds 1, 2." in section
    assert section in synset_card(replace(tiny_synset(), fidelity=REPORT.to_dict()))


def test_a_damaged_report_is_refused():
    with pytest.raises(ValueError, match="fidelity report is damaged"):
        fidelity_section({"format_version": 1})


def test_templates_are_found_in_an_installed_package_and_in_a_source_tree(tmp_path, monkeypatch):
    for folder in (
        tmp_path / "installed" / "hf_rgm" / "model_card_templates",
        tmp_path / "source" / "model_card_templates",
    ):
        folder.mkdir(parents=True)
        (folder / "synset_card.md").write_text(
            f"---\n{{{{ card_data }}}}\n---\n{folder.parents[0].name}: {{{{ fidelity }}}}"
        )
    for place, expected in (("installed", "hf_rgm: Not"), ("source", "source: Not")):
        monkeypatch.setattr(cards, "PACKAGE", tmp_path / place / "hf_rgm")
        assert expected in synset_card(tiny_synset())


def result(**changes):
    arguments = {
        "scores": np.array([[0.5, -0.25], [0.1, 0.0]]),
        "cluster_names": ["imdb", "yelp"],
        "cluster_sizes": np.array([100, 50]),
        "query_ids": ["a", "b"],
        "objective": "margin",
        "objective_values": np.array([2.0, 1.0]),
        "engine": "adjoint",
    }
    return AttributionResult(**(arguments | changes))


def test_the_card_of_a_result_says_what_a_score_means():
    card = DatasetCard(attribution_card(result()))
    assert card.data.tags == ["hf-rgm", "data-attribution", "attribution"]
    assert [config["config_name"] for config in card.data.to_dict()["configs"]] == [
        "top",
        "scores",
        "clusters",
        "queries",
    ]
    assert AttributionResult.SIGN_CONVENTION in card.text
    assert "| objective | margin |" in card.text
    assert "| engine | adjoint |" in card.text
    assert "| imdb | +0.3 |" in card.text
    assert NOT_MEASURED in card.text
    measured = result(metadata={"fidelity": REPORT.to_dict()})
    assert fidelity_section(REPORT.to_dict()) in attribution_card(measured)


@pytest.mark.parametrize("card", [synset_card(tiny_synset()), attribution_card(result())])
def test_headers_hold_only_what_is_known(card):
    data = DatasetCard(card).data.to_dict()
    assert data["library_name"] == "hf_rgm"
    assert not {"license", "base_model", "model", "synset", "attribution"} & set(data)


def test_what_is_known_besides_is_in_the_header_and_linked():
    options = CardOptions(
        repo_id="me/synset", license="mit", model_id="me/model", synset_id="me/synset", attribution_id="me/answers"
    )
    card = DatasetCard(synset_card(tiny_synset(), options))
    data = card.data.to_dict()
    assert (data["license"], data["model"], data["attribution"]) == ("mit", "me/model", "me/answers")
    assert 'pipeline("data-attribution", model="me/model", synset="me/synset")' in card.text
    assert "[me/answers](https://huggingface.co/datasets/me/answers)" in card.text
    assert "inproceedings" in card.text


@pytest.mark.parametrize(
    ("name", "expected"),
    [("google/vit-base", "google/vit-base"), ("./results/checkpoint-10", None), ("", None), (None, None), (3, None)],
)
def test_the_base_model_is_named_only_if_it_is_a_repository(name, expected):
    synset = tiny_synset()
    trajectory = copy.copy(synset.trajectory)
    trajectory.metadata = {**trajectory.metadata, "model": {"class": "TinyModel", "name_or_path": name}}
    data = DatasetCard(synset_card(replace(synset, trajectories=(trajectory,)))).data.to_dict()
    assert data.get("base_model") == expected


def test_the_card_of_an_unlearned_model_says_what_was_removed_and_how_it_was_checked():
    unlearned = UnlearnedModel(
        model=nn.Linear(1, 1),
        clusters=["imdb", "yelp"],
        sizes=[100, 50],
        checks=[UnlearningCheck("removed rows", 150, 0.1, 1.25)],
        engine="replay",
        rewind_step=5,
        num_steps=20,
        parameters_sha256="f" * 64,
        model_name="google/vit-base",
    )
    card = ModelCard(unlearned_model_card(unlearned))
    assert card.data.base_model == "google/vit-base"
    assert card.data.library_name == "transformers"
    assert "| imdb | 100 |" in card.text
    assert "| removed rows | 150 | 0.1 | 1.25 |" in card.text
    assert "from training step 5 of 20" in card.text
    assert "guarantees nothing" in card.text


def test_a_template_of_ones_own(tmp_path):
    path = tmp_path / "mine.md"
    path.write_text("---\n{{ card_data }}\n---\nOurs: {{ num_clusters }} clusters")
    assert "Ours: 6 clusters" in synset_card(tiny_synset(), CardOptions(template=path))
