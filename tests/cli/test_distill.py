from __future__ import annotations

import dataclasses

import numpy as np

from hf_rgm import DistillationConfig, ReverseGradientMatchingDistiller, Synset
from tests.vision import vit_run

BRIEF = ("--num-iterations", 3, "--samples-per-cluster", 1)


def distil(invoke, files, output, *options):
    return invoke("distill", files.trajectory, files.model, files.train, "-o", output, *BRIEF, *options)


def test_the_synset_is_that_of_the_library(told, files, tmp_path):
    description = distil(told, files, tmp_path / "synset", "--cluster-column", "labels", "--seed", 3)
    assert (description["kind"], description["whole"]) == ("synset", True)
    run = vit_run()
    expected = ReverseGradientMatchingDistiller(
        run.model,
        run.trajectory,
        run.train_dataset,
        run.synset.clusters,
        config=DistillationConfig(num_iterations=3, samples_per_cluster=1, seed=3),
        disable_tqdm=True,
    ).distill()
    synset = Synset.from_pretrained(tmp_path / "synset")
    assert synset.samples_sha256 == expected.samples_sha256
    assert synset.clusters == expected.clusters
    assert [path.name for path in tmp_path.iterdir()] == ["synset"]


def test_presets_and_settings_on_top(told, files, tmp_path):
    distil(told, files, tmp_path / "synset", "--cluster-column", "source", "--preset", "quick")
    synset = Synset.from_pretrained(tmp_path / "synset")
    expected = DistillationConfig.from_preset("quick", num_iterations=3, samples_per_cluster=1)
    assert DistillationConfig.from_dict(synset.config) == expected
    assert synset.clusters.names == ("books", "mail", "web")


def test_clusters_by_ids_and_by_embeddings(told, invoke, files, tmp_path):
    np.savetxt(tmp_path / "ids.txt", np.arange(24) % 2, fmt="%d")
    np.save(tmp_path / "ids.npy", np.arange(24) % 2)
    vit_run().synset.clusters.save(tmp_path / "map")
    for number, options in enumerate(
        (
            ("--cluster-ids", tmp_path / "ids.txt"),
            ("--cluster-ids", tmp_path / "ids.npy"),
            ("--cluster-ids", tmp_path / "map"),
            ("--cluster-embeddings", "pixel_values", "--label-column", "labels", "--num-clusters-per-class", 2),
            ("--cluster-column", "source", "--cluster-column", "labels"),
        )
    ):
        cost = distil(told, files, tmp_path / f"synset-{number}", *options, "--estimate")
        assert cost["seconds"] > 0
        assert not (tmp_path / f"synset-{number}").exists()
    (tmp_path / "words.txt").write_text("one\ntwo\n")
    for options, words in (
        ((), "Say once which row belongs to which cluster"),
        (("--cluster-ids", tmp_path / "ids.npy", "--cluster-column", "source"), "Say once"),
        (("--cluster-ids", tmp_path / "words.txt"), "must hold an integer a line"),
        (("--cluster-column", "author"), "no column 'author'. It has: pixel_values, labels, source"),
        (("--cluster-embeddings", "vectors", "--num-clusters", 2), "no column 'vectors'"),
        (("--cluster-column", "source", "--preset", "hasty"), "Unknown preset 'hasty'"),
        (("--cluster-column", "source", "--prepare", "nothing"), "must be MODULE:NAME"),
    ):
        result = distil(invoke, files, tmp_path / "x", *options)
        assert result.exit_code == 1
        assert words in result.stderr
        assert "Traceback" not in result.output


def test_other_rows_than_those_of_training_are_refused(invoke, files, script, tmp_path, monkeypatch):
    options = ("--cluster-column", "source", "--prepare", f"{script}:first_half")
    result = distil(invoke, files, tmp_path / "x", *options)
    assert result.exit_code == 1
    assert "has 12 rows, the recorded run had 24" in result.stderr
    monkeypatch.setenv("HF_RGM_DEBUG", "1")
    shown = invoke("distill", files.trajectory, files.model, files.train, "-o", tmp_path / "x", *options)
    assert isinstance(shown.exception, ValueError)


def test_what_cannot_be_written_is_said_before_the_work(invoke, files, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    result = distil(invoke, files, tmp_path, "--cluster-column", "source")
    assert result.exit_code == 1
    assert "is not empty and has no synset.json" in result.stderr


def test_after_ctrl_c_it_goes_on(invoke, files, tmp_path, monkeypatch):
    distill_block = ReverseGradientMatchingDistiller._distill_block
    blocks = []

    def interrupted(self, block, *arguments):
        if len(blocks) == 1:
            raise KeyboardInterrupt
        blocks.append(block)
        return distill_block(self, block, *arguments)

    options = ("--cluster-column", "labels", "--cluster-block-size", 1)
    with monkeypatch.context() as patch:
        patch.setattr(ReverseGradientMatchingDistiller, "_distill_block", interrupted)
        result = distil(invoke, files, tmp_path / "synset", *options)
    assert result.exit_code == 130
    assert f"kept in {tmp_path / 'synset-unfinished'}; run the same command again" in result.stderr
    assert not (tmp_path / "synset").exists()

    def counted(self, block, *arguments):
        blocks.append(block)
        return distill_block(self, block, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ReverseGradientMatchingDistiller, "_distill_block", counted)
        assert distil(invoke, files, tmp_path / "synset", *options).exit_code == 0
    assert [block.start for block in blocks] == [0, 1, 2]
    before = (tmp_path / "synset" / "synset.json").read_bytes()
    refused = distil(invoke, files, tmp_path / "synset", *options)
    assert refused.exit_code == 1
    assert f"{tmp_path / 'synset'} holds finished work already (synset.json)" in refused.stderr
    assert (tmp_path / "synset" / "synset.json").read_bytes() == before
    assert distil(invoke, files, tmp_path / "synset", *options, "--estimate").exit_code == 0
    assert distil(invoke, files, tmp_path / "synset", *options, "--overwrite").exit_code == 0
    assert not (tmp_path / "synset-unfinished").exists()
    assert distil(invoke, files, tmp_path / "whole", *options, "--work-dir", tmp_path / "work").exit_code == 0
    assert len(list((tmp_path / "work").glob("block-*"))) == 3
    assert (
        Synset.from_pretrained(tmp_path / "synset").samples_sha256
        == Synset.from_pretrained(tmp_path / "whole").samples_sha256
    )


def test_every_setting_is_an_option(invoke):
    shown = invoke("distill", "--help").output
    for field in dataclasses.fields(DistillationConfig):
        assert f"--{field.name.replace('_', '-')} " in shown
