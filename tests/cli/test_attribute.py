from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import DatasetDict

from hf_rgm import AttributionPipeline, AttributionResult
from hf_rgm.cli.attribute import ENGINE_NAMES
from hf_rgm.cli.loading import Loading
from hf_rgm.engines.registry import ENGINES
from tests.vision import train, vit, vit_run

SCORE_TOLERANCE = 1e-6
"""Of the same computation on a model that was saved and loaded."""


def test_the_scores_are_those_of_the_library(told, files, tmp_path):
    content = told(
        "attribute", files.model, files.synset, files.queries, "-o", tmp_path / "scores", "--rows", files.train,
        "--html", tmp_path / "report.html", "--num-queries", 3, "--top", 2,
    )  # fmt: skip
    run = vit_run()
    expected = AttributionPipeline(run.model, synset=run.synset, disable_tqdm=True)(
        run.queries.select(range(3)), rows=run.train_dataset
    )
    result = AttributionResult.from_pretrained(tmp_path / "scores")
    np.testing.assert_allclose(result.scores, expected.scores, atol=SCORE_TOLERANCE)
    np.testing.assert_allclose(result.row_scores, expected.row_scores, atol=SCORE_TOLERANCE)
    assert [query["clusters"] for query in content["queries"]] == result.to_list(2)
    assert content["sign_convention"] == result.SIGN_CONVENTION
    assert all(entry["score"] > 0 for entry in content["helped_most"])
    assert all(entry["score"] < 0 for entry in content["harmed_most"])
    assert len(content["helped_most"]) + len(content["harmed_most"]) >= 1
    assert "<html" in (tmp_path / "report.html").read_text()


def test_what_raises_a_loss_harms(told, files, tmp_path):
    content = told(
        "attribute", files.model, files.synset, files.queries, "-o", tmp_path / "scores", "--num-queries", 3,
        "--objective", "loss",
    )  # fmt: skip
    assert all(entry["score"] < 0 for entry in content["helped_most"])
    assert all(entry["score"] > 0 for entry in content["harmed_most"])
    assert content["helped_most"] + content["harmed_most"]


def test_the_probability_of_a_label_is_explained(told, files, tmp_path):
    content = told(
        "attribute", files.model, files.synset, files.queries, "-o", tmp_path / "scores", "--num-queries", 3,
        "--objective", "probability:2",
    )  # fmt: skip
    run = vit_run()
    pixels = torch.stack([row["pixel_values"] for row in run.queries.select(range(3))])
    expected = run.model(pixels).logits.softmax(-1)[:, 2].tolist()
    assert [query["objective"] for query in content["queries"]] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("options", [(), ("--engine", "adjoint")], ids=["default", "adjoint"])
def test_without_a_synset_the_recorded_run_and_its_rows_are_enough(told, files, tmp_path, options):
    content = told(
        "attribute", files.model, files.trajectory, files.queries, "-o", tmp_path / "scores", "--rows", files.train,
        "--cluster-column", "labels", "--html", tmp_path / "report.html", *options,
    )  # fmt: skip
    run = vit_run()
    known = {"trajectory": run.trajectory, "rows": run.train_dataset, "clusters": run.synset.clusters}
    expected = AttributionPipeline(run.model, **known, disable_tqdm=True)(
        run.queries, engine=options[-1] if options else None
    )
    result = AttributionResult.from_pretrained(tmp_path / "scores")
    np.testing.assert_allclose(result.scores, expected.scores, atol=SCORE_TOLERANCE)
    np.testing.assert_allclose(result.row_scores, expected.row_scores, atol=SCORE_TOLERANCE)
    assert content["engine"] == (options[-1] if options else "linearized_replay")
    assert "<html" in (tmp_path / "report.html").read_text()


def test_checkpoints_of_a_run_that_was_not_recorded_are_enough(told, files, tmp_path):
    run = vit_run()
    out = {"output_dir": str(tmp_path / "out"), "save_strategy": "epoch"}
    model = train(vit(), run.train_dataset, tmp_path / "trajectory", **out).model.eval()
    told(
        "attribute", tmp_path / "out" / "checkpoint-6", tmp_path / "out", files.queries, "-o", tmp_path / "scores",
        "--rows", files.train, "--cluster-column", "labels",
    )  # fmt: skip
    known = {"rows": run.train_dataset, "clusters": run.synset.clusters, "disable_tqdm": True}
    recorded = AttributionPipeline(model, trajectory=tmp_path / "trajectory", **known)(run.queries)
    result = AttributionResult.from_pretrained(tmp_path / "scores")
    assert np.corrcoef(result.scores.ravel(), recorded.scores.ravel())[0, 1] > 0.9
    assert result.metadata["from_checkpoints"] and not recorded.metadata["from_checkpoints"]


def test_what_attribution_without_a_synset_lacks_is_told(invoke, files, tmp_path):
    output = ("-o", tmp_path / "scores")
    cases = [
        ((files.trajectory, files.queries), "is a recorded run: scores by it need the training rows"),
        (
            (files.trajectory, files.queries, "--rows", files.train),
            "Say once which row belongs to which cluster: `--cluster-column NAME`",
        ),
        (
            (files.trajectory, files.queries, "--rows", files.train, "--cluster-column", "nothing"),
            "no column 'nothing'",
        ),
        (
            (files.trajectory, files.queries, "--rows", files.queries, "--cluster-column", "labels"),
            "`rows` has 4 rows, the recorded run had 24",
        ),
        (
            (
                files.trajectory,
                files.queries,
                "--rows",
                files.train,
                "--cluster-column",
                "source",
                "--engine",
                "replay",
            ),
            "`engine='replay'` needs a synset",
        ),
        ((files.synset, files.queries, "--cluster-column", "labels"), "is a synset, which knows its clusters"),
    ]
    for arguments, words in cases:
        result = invoke("attribute", files.model, *arguments, *output)
        assert result.exit_code == 1, result.output
        assert words in result.stderr, result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
        assert not (tmp_path / "scores").exists()


def test_engines_are_those_of_the_library():
    """The command names them without loading what it takes seconds to load."""
    assert set(ENGINE_NAMES) == set(ENGINES)


def test_finished_attributions_are_replaced_only_if_so_asked(invoke, files, tmp_path):
    output, report = tmp_path / "scores", tmp_path / "report.html"
    command = ("attribute", files.model, files.synset, files.queries, "-o", output, "--num-queries", 1)
    assert invoke(*command).exit_code == 0
    before = (output / "attribution.json").read_bytes()
    refused = invoke(*command, "--engine", "adjoint")
    assert refused.exit_code == 1
    assert f"{output} holds finished work already (attribution.json)" in refused.stderr
    assert "or replace it by `--overwrite`" in refused.stderr
    assert (output / "attribution.json").read_bytes() == before
    assert invoke(*command, "--engine", "adjoint", "--overwrite").exit_code == 0
    assert AttributionResult.from_pretrained(output).engine == "adjoint"
    report.write_text("mine")
    refused = invoke(*command[:-4], "-o", tmp_path / "other", "--html", report)
    assert refused.exit_code == 1
    assert f"{report} exists already" in refused.stderr
    assert report.read_text() == "mine" and not (tmp_path / "other").exists()


def test_it_tells_the_top_clusters(invoke, files, script, tmp_path):
    output = tmp_path / "scores"
    result = invoke(
        "attribute", files.model, files.synset, files.queries, "-o", output, "--engine", "adjoint",
        "--objective", f"{script}:first", "--top", 1, "--prepare", f"{script}:first_half",
        "--data-collator", f"{script}:collate",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("2 queries, 3 clusters. A positive score means")
    saved = AttributionResult.from_pretrained(output)
    assert (saved.engine, saved.objective) == ("adjoint", "first")
    best = saved.top(1)
    name, score = best["cluster"].iloc[0], best["score"].iloc[0]
    assert score <= 0 or f"  {score:+.4g}  {name} (8 rows)" in result.stdout
    assert f"hf-rgm info {output}" in result.stdout


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"model": "/nowhere/at-all"}, "There is no folder /nowhere/at-all here. Check the path"),
        ({"model": "./modle"}, "There is no folder ./modle here. Check the path; a repository on the Hub is named"),
        (
            {"model": "runs/modle"},
            "There is no folder runs/modle here, and no repository of this name on the Hub",
        ),
        ({"synset": "no such synset"}, "is no folder that exists"),
        ({"queries": "rows.txt"}, "its name must end in .parquet, .json, .jsonl, .csv"),
        ({"options": ("--engine", "guess")}, "guess"),
        ({"options": ("--objective", "no_module_of_this_name:x")}, "No module named"),
        ({"options": ("--objective", "hf_rgm:nothing")}, "hf_rgm has no 'nothing'"),
        ({"options": ("--objective", "missing.py:x")}, "There is no file missing.py"),
    ],
)
def test_what_is_wrong_is_one_line(invoke, files, tmp_path, monkeypatch, changed, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.txt").write_text("x")
    given = {"model": files.model, "synset": files.synset, "queries": files.queries, "options": ()} | changed
    result = invoke(
        "attribute", given["model"], given["synset"], given["queries"], "-o", tmp_path / "scores", *given["options"]
    )
    assert result.exit_code == 1, result.output
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "scores").exists()


def test_datasets_are_read_from_files_and_folders(files, script, tmp_path):
    rows = vit_run().queries.select_columns(["labels"])
    rows.to_csv(tmp_path / "rows.csv")
    rows.to_json(tmp_path / "rows.jsonl")
    rows.save_to_disk(tmp_path / "saved")
    DatasetDict({"test": rows, "other": rows.select([0])}).save_to_disk(tmp_path / "parts")
    for name in ("rows.csv", "rows.jsonl", "saved", "parts"):
        loaded = Loading().queries(str(tmp_path / name), None)
        assert loaded.with_format(None)["labels"][:] == [0, 1, 2, 0]
    parts = str(tmp_path / "parts")
    assert len(Loading().queries(parts, "other")) == 1
    assert len(Loading(prepare=f"{script}:first_half").queries(parts, None)) == 2
    with pytest.raises(ValueError, match="no split 'dev'. It has: test, other"):
        Loading().queries(parts, "dev")
    with pytest.raises(FileNotFoundError, match="no file or folder .*nothing here, and no dataset repository"):
        Loading().queries(str(tmp_path / "nothing"), None)


def test_a_model_whose_class_is_not_known_can_be_named(files, tmp_path):
    vit_run().model.config.from_pretrained(files.model, architectures=["MyViT"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="--model-class MODULE:CLASS"):
        Loading().model(str(tmp_path))
    loaded = Loading(model_class="transformers:ViTForImageClassification").model(files.model)
    assert type(loaded) is type(vit_run().model)
    (tmp_path / "config.json").write_text('{"model_type": "mine"}')
    with pytest.raises(ValueError, match="name it: `--model-class MODULE:CLASS`. transformers says: .*`mine`"):
        Loading().model(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="is a PEFT adapter, whose base has to be made first"):
        Loading().model(str(tmp_path))


def test_rows_of_tokens_are_padded_by_the_model_s_tokenizer(files, tmp_path):
    rows = vit_run().queries.add_column("input_ids", [[1], [2, 3], [4], [5]])
    with pytest.raises(OSError, match="has no tokenizer to pad them"):
        Loading().collator(rows, files.model)
    assert Loading().collator(vit_run().queries, files.model) is None
