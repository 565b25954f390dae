from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers import Trainer

from hf_rgm import ClusterMap, DistillationConfig, FidelityReport, ReverseGradientMatchingDistiller, Synset
from hf_rgm.hub import CardOptions
from tests.vision import vit_run


@pytest.fixture(scope="module")
def six_clusters() -> Synset:
    run = vit_run()
    config = DistillationConfig(num_iterations=3, samples_per_cluster=1)
    clusters = ClusterMap.from_ids(np.arange(24) % 6)
    return ReverseGradientMatchingDistiller(
        run.model, run.trajectory, run.train_dataset, clusters, config=config, disable_tqdm=True
    ).distill()


@pytest.fixture
def arguments(six_clusters, files, script, tmp_path):
    """Of `hf-rgm validate`, with a synset of its own."""
    synset = six_clusters.save_pretrained(tmp_path / "synset", card=CardOptions(license="mit"))
    options = ("--build-trainer", f"{script}:build_trainer", "--budget", 5)
    return ("validate", files.model, synset, files.queries, files.train, *options)


def test_the_synset_keeps_the_figures(invoke, told, arguments, tmp_path, monkeypatch):
    synset = tmp_path / "synset"
    content = told(*arguments)
    kept = Synset.from_pretrained(synset)
    assert kept.fidelity == content
    report = FidelityReport.from_dict(content)
    assert report.num_retrainings == 5
    assert str(report.agreements["lds_clusters"].estimate) in (synset / "README.md").read_text()
    assert "license: mit" in (synset / "README.md").read_text()
    assert "lds_clusters 0" in invoke("info", synset).output or "lds_clusters -" in invoke("info", synset).output

    monkeypatch.setattr(Trainer, "train", lambda self: pytest.fail("trained again"))
    (synset / "README.md").write_text((synset / "README.md").read_text() + "\nMy own notes.\n")
    figures = (synset / "synset.json").read_bytes()
    refused = invoke(*arguments, "--engine", "adjoint")
    assert refused.exit_code == 1
    assert f"{synset} keeps figures that were measured already" in refused.stderr and "--overwrite" in refused.stderr
    assert (synset / "synset.json").read_bytes() == figures
    again = invoke(*arguments, "--overwrite")
    assert again.exit_code == 0, again.output
    assert str(report) in again.stdout
    assert "but not on its card, which was edited" in again.stdout
    assert "My own notes." in (synset / "README.md").read_text()


def test_after_ctrl_c_it_goes_on(invoke, arguments, tmp_path, monkeypatch):
    train, trained = Trainer.train, []

    def counted(self):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(self)
        return train(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train", counted)
        result = invoke(*arguments)
    assert result.exit_code == 130
    assert f"kept in {tmp_path / 'synset-retrainings'}; run the same command again" in result.stderr
    assert Synset.from_pretrained(tmp_path / "synset").fidelity is None
    kept = list(Path(tmp_path / "synset-retrainings").rglob("*.npy"))
    assert len(kept) == 2


def test_a_budget_too_small_is_refused(invoke, arguments):
    result = invoke(*arguments[:-1], 1)
    assert result.exit_code == 1
    assert "budget" in result.stderr
