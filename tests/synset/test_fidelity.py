"""The fidelity that a synset carries."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from hf_rgm.agreement.correlations import Estimate
from hf_rgm.agreement.fidelity_figures import Agreement
from hf_rgm.fidelity.report import FidelityReport
from hf_rgm.synset.synset import Synset
from hf_rgm.testing import tiny_synset


@pytest.fixture
def report():
    return FidelityReport(
        agreements={"lds_clusters": Agreement(Estimate(0.5, 0.25, 0.75), 6)},
        engine="adjoint",
        objective="margin",
        num_queries=20,
        seeds=(1,),
        rows=False,
        samples_sha256=tiny_synset().samples_sha256,
    )


def test_fidelity_is_kept(tmp_path, report):
    synset = replace(tiny_synset(), fidelity=report.to_dict())
    loaded = Synset.from_pretrained(synset.save_pretrained(tmp_path / "synset"))
    assert FidelityReport.from_dict(loaded.fidelity) == report
    assert loaded.samples_sha256 == synset.samples_sha256
    assert "0.500 [0.250, 0.750]" in (tmp_path / "synset" / "README.md").read_text()


def test_without_a_measurement_there_is_none_and_the_card_says_so(tmp_path):
    folder = tiny_synset().save_pretrained(tmp_path / "synset")
    assert Synset.from_pretrained(folder).fidelity is None
    assert "Not measured" in (folder / "README.md").read_text()


def test_the_fidelity_of_another_synset_is_refused(tmp_path, report):
    other = replace(report, samples_sha256="0" * 64).to_dict()
    with pytest.raises(ValueError, match="measured for the samples 000000000000, the synset's are"):
        replace(tiny_synset(), fidelity=other)
    folder = replace(tiny_synset(), fidelity=report.to_dict()).save_pretrained(tmp_path / "synset")
    config = json.loads((folder / "synset.json").read_text())
    (folder / "synset.json").write_text(json.dumps({**config, "fidelity": other}))
    with pytest.raises(ValueError, match="measured for the samples 000000000000"):
        Synset.from_pretrained(folder)


def test_a_report_that_was_not_turned_into_a_dictionary_is_refused_before_anything_is_written(tmp_path, report):
    synset = replace(tiny_synset())
    synset.fidelity = report
    with pytest.raises(ValueError, match=r"got FidelityReport. Use `FidelityReport.to_dict\(\)`"):
        synset.save_pretrained(tmp_path / "synset")
    synset.fidelity = {**report.to_dict(), "agreements": {}}
    with pytest.raises(ValueError, match="fidelity report is damaged"):
        synset.save_pretrained(tmp_path / "synset")
    assert not list(tmp_path.iterdir())
