from __future__ import annotations

from dataclasses import replace

import pytest
from huggingface_hub import DatasetCard

from hf_rgm.fidelity.report import Agreement, FidelityReport
from hf_rgm.fidelity.scores import Estimate
from hf_rgm.hub import cards
from hf_rgm.hub.cards import NOT_MEASURED, fidelity_section, synset_card
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
