from __future__ import annotations

import copy
import json
import logging
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import load_dataset
from huggingface_hub import DatasetCard, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from transformers import AutoModelForImageClassification, pipeline

from hf_rgm import AttributionResult, Attributor, Synset
from hf_rgm.exceptions import ParameterMismatchError
from hf_rgm.hub import CardOptions
from hf_rgm.testing import tiny_recorded_run, tiny_synset
from tests.text import word_tokenizer
from tests.vision import vit_run

RUN = tiny_recorded_run()


@pytest.fixture(scope="module")
def result():
    return Attributor(RUN.model, tiny_synset(), disable_tqdm=True).attribute(RUN.queries, rows=RUN.train_dataset)


def same_synset(found, expected):
    for name, tensor in expected.samples.named_tensors().items():
        assert torch.equal(found.samples.named_tensors()[name], tensor)
    assert found.clusters == expected.clusters
    assert found.matched_states == expected.matched_states
    assert torch.equal(found.residuals, expected.residuals)
    for step in expected.trajectory.state_steps:
        torch.testing.assert_close(
            found.trajectory.state(step).parameters, expected.trajectory.state(step).parameters, rtol=0, atol=0
        )
    assert found.trajectory.steps.rows is None


def test_a_synset_comes_back_as_it_was_pushed(hub_in_process):
    info = tiny_synset().push_to_hub("me/synset", commit_message="First synset")
    assert info.repo_url.repo_id == "me/synset"
    assert [commit.title for commit in hub_in_process.commits("me/synset", "dataset")][0] == "First synset"
    same_synset(Synset.from_pretrained("me/synset"), tiny_synset())


def test_pushing_is_one_commit_that_replaces_what_was_there_and_nothing_else(hub_in_process):
    two = tiny_synset(2)
    two.push_to_hub("me/synset")
    hub_in_process.commit("me/synset", {"notes.md": b"mine"}, "dataset")
    before = len(hub_in_process.commits("me/synset", "dataset"))
    tiny_synset().push_to_hub("me/synset")
    assert len(hub_in_process.commits("me/synset", "dataset")) == before + 1
    files = set(hub_in_process.files("me/synset", "dataset"))
    assert "notes.md" in files
    assert any(name.startswith("trajectories/0/") for name in files)
    assert not any(name.startswith("trajectories/1/") for name in files)
    assert len(Synset.from_pretrained("me/synset").trajectories) == 1


def test_recorded_states_are_fetched_when_an_engine_needs_them(hub_in_process):
    hub = hub_in_process
    tiny_synset().push_to_hub("me/synset")
    steps = tiny_synset().trajectory.state_steps
    synset = Synset.from_pretrained("me/synset")

    def fetched():
        return [step for step in steps if hub.count(f"HEAD .*resolve/.*step-{step:08d}")]

    assert fetched() == [steps[-1]]
    expected = Attributor(RUN.model, tiny_synset(), disable_tqdm=True).attribute(RUN.queries, rewind=0.7)
    found = Attributor(RUN.model, synset, disable_tqdm=True).attribute(RUN.queries, rewind=0.7)
    np.testing.assert_array_equal(found.scores, expected.scores)
    assert len(fetched()) > 1
    assert steps[1] not in fetched()  # the first is: replays compare with what training began with


def test_a_revision_is_pinned_and_all_files_are_of_one_commit(hub_in_process, tmp_path):
    hub = hub_in_process
    tiny_synset().push_to_hub("me/synset")
    first = HfApi().dataset_info("me/synset").sha
    HfApi().create_tag("me/synset", tag="v1", repo_type="dataset")

    def push_another():
        tiny_synset(2).push_to_hub("me/synset")

    # The repository changes after synset.json was read: what follows is still of the first commit.
    hub.before("HEAD .*resolve/.*synset.safetensors", push_another)
    same_synset(Synset.from_pretrained("me/synset", cache_dir=tmp_path / "cold"), tiny_synset())
    assert len(Synset.from_pretrained("me/synset").trajectories) == 2
    for revision in (first, "v1"):
        assert len(Synset.from_pretrained("me/synset", revision=revision).trajectories) == 1
    with pytest.raises(RevisionNotFoundError):
        Synset.from_pretrained("me/synset", revision="v2")


def test_branches_and_pull_requests(hub_in_process):
    tiny_synset().push_to_hub("me/synset")
    tiny_synset(2).push_to_hub("me/synset", revision="two-runs")
    info = tiny_synset(2).push_to_hub("me/synset", create_pr=True)
    assert info.pr_url
    assert len(Synset.from_pretrained("me/synset").trajectories) == 1
    assert len(Synset.from_pretrained("me/synset", revision="two-runs").trajectories) == 2
    assert len(Synset.from_pretrained("me/synset", revision=info.pr_revision).trajectories) == 2


def test_private_repositories_open_with_the_right_token_only(hub_in_process, monkeypatch):
    hub = hub_in_process
    tiny_synset().push_to_hub("me/secret", private=True)
    monkeypatch.delenv("HF_TOKEN")
    for wrong in (False, hub.other_token, "hf_wrong"):
        with pytest.raises((RepositoryNotFoundError, HfHubHTTPError)):
            Synset.from_pretrained("me/secret", token=wrong)
    assert Synset.from_pretrained("me/secret", token=hub.token).num_clusters == 6
    with pytest.raises(HfHubHTTPError, match="403"):
        tiny_synset().push_to_hub("me/secret", token=hub.read_token)


def test_offline_with_a_warm_and_with_a_cold_cache(hub_in_process, tmp_path, monkeypatch):
    tiny_synset().push_to_hub("me/synset")
    for step in tiny_synset().trajectory.state_steps:
        Synset.from_pretrained("me/synset").trajectory.state(step)
    with hub_in_process.unreachable():
        same_synset(Synset.from_pretrained("me/synset"), tiny_synset())
        same_synset(Synset.from_pretrained("me/synset", local_files_only=True), tiny_synset())
        with pytest.raises(FileNotFoundError, match="synset.json of the dataset repository me/synset is not in the"):
            Synset.from_pretrained("me/synset", cache_dir=tmp_path / "cold")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    same_synset(Synset.from_pretrained("me/synset"), tiny_synset())


def test_states_that_were_never_fetched_are_missed_by_name_when_offline(hub_in_process):
    tiny_synset().push_to_hub("me/synset")
    synset = Synset.from_pretrained("me/synset")
    with hub_in_process.unreachable():
        with pytest.raises(FileNotFoundError, match="step-00000000.safetensors"):
            synset.trajectory.state(0)
    synset.trajectory.state(0)


def test_an_interrupted_upload_leaves_the_old_and_a_retry_finishes(hub_in_process):
    hub = hub_in_process
    tiny_synset().push_to_hub("me/synset")
    commits = len(hub.commits("me/synset", "dataset"))
    hub.fail("PUT /objects/", 403)
    with pytest.raises(RuntimeError, match="Error while uploading"):
        tiny_synset(2).push_to_hub("me/synset")
    assert len(hub.commits("me/synset", "dataset")) == commits
    same_synset(Synset.from_pretrained("me/synset"), tiny_synset())
    tiny_synset(2).push_to_hub("me/synset")
    assert len(Synset.from_pretrained("me/synset").trajectories) == 2


def test_concurrent_pushes_leave_one_of_them_whole(hub_in_process):
    tiny_synset().push_to_hub("me/synset")
    errors = []

    def push(synset):
        try:
            synset.push_to_hub("me/synset")
        except HfHubHTTPError as error:
            errors.append(error)

    threads = [threading.Thread(target=push, args=(synset,)) for synset in (tiny_synset(), tiny_synset(2)) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    files = hub_in_process.files("me/synset", "dataset")
    found = Synset.from_pretrained("me/synset")
    assert len(found.trajectories) in (1, 2)
    # Nothing of the other is left beside it.
    assert any(name.startswith("trajectories/1/") for name in files) == (len(found.trajectories) == 2)


def test_a_commit_in_between_is_noticed(hub_in_process):
    hub = hub_in_process
    tiny_synset(2).push_to_hub("me/synset")

    def somebody_else():
        hub.commit("me/synset", {"trajectories/7/old.txt": b"left over"}, "dataset")

    hub.before("POST .*/commit/", somebody_else)
    tiny_synset().push_to_hub("me/synset")
    assert not any(name.startswith("trajectories/7/") for name in hub.files("me/synset", "dataset"))


def test_what_is_no_synset_is_said_so(hub_in_process, tmp_path):
    hub_in_process.commit("me/other", {"README.md": b"hello"}, "dataset")
    with pytest.raises(FileNotFoundError, match="me/other has no synset.json"):
        Synset.from_pretrained("me/other")
    with pytest.raises(RepositoryNotFoundError):
        Synset.from_pretrained("me/nowhere")
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        Synset.from_pretrained(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="no folder that exists"):
        Synset.from_pretrained("a/b/c")
    asked = len(hub_in_process.requests)
    with pytest.raises(FileNotFoundError, match="'snyset' is no folder that exists"):
        Synset.from_pretrained("snyset")
    assert len(hub_in_process.requests) == asked


def test_results_come_back_and_all_their_tables_load(hub_in_process, result):
    result.push_to_hub("me/attributions", card=CardOptions(synset_id="me/synset", license="mit"))
    found = AttributionResult.from_pretrained("me/attributions")
    np.testing.assert_array_equal(found.scores, result.scores)
    np.testing.assert_array_equal(found.row_scores, result.row_scores)
    assert found.metadata == result.metadata
    top = load_dataset("me/attributions", split="train")
    assert top.column_names == ["query_id", "rank", "cluster", "score", "size", "example_rows"]
    assert len(load_dataset("me/attributions", "scores", split="train")) == 12
    assert load_dataset("me/attributions", "clusters", split="train")["cluster"][:] == list(RUN.clusters.names)
    assert load_dataset("me/attributions", "queries", split="train").num_rows == 12
    card = DatasetCard.load("me/attributions")
    assert card.data.license == "mit"
    assert card.data.synset == "me/synset"
    card.validate()


def test_the_tables_of_a_synset_load(hub_in_process):
    run = vit_run()
    run.synset.push_to_hub("me/synset")
    samples = load_dataset("me/synset", split="train")
    assert len(samples) == run.synset.num_samples
    assert samples[0]["image"].size == tuple(run.synset.samples.inputs.shape[-1:-3:-1])
    clusters = load_dataset("me/synset", "clusters", split="train")
    assert clusters["cluster_id"][:] == run.synset.clusters.cluster_ids.tolist()


def test_the_pipeline_takes_model_and_synset_from_the_hub(hub_in_process, caplog):
    run = vit_run()
    run.model.push_to_hub("me/model")
    attribute = pipeline("data-attribution", model=run.model, synset=run.synset, disable_tqdm=True)
    expected = attribute(run.queries)
    addresses = attribute.push_to_hub("me/synset", results=expected, model_id="me/model", token=hub_in_process.token)
    assert addresses == {
        "synset": f"{hub_in_process.endpoint}/datasets/me/synset",
        "attributions": f"{hub_in_process.endpoint}/datasets/me/synset-attributions",
        "model": f"{hub_in_process.endpoint}/me/model",
    }
    for repo_id in ("me/synset", "me/synset-attributions"):
        data = DatasetCard.load(repo_id).data
        assert (data.model, data.synset, data.attribution) == ("me/model", "me/synset", "me/synset-attributions")
    data = ModelCard.load("me/model").data
    assert (data.synset, data.attribution) == ("me/synset", "me/synset-attributions")

    loaded = pipeline("data-attribution", model="me/model", synset="me/synset", disable_tqdm=True)
    np.testing.assert_allclose(loaded(run.queries).scores, expected.scores, rtol=1e-5, atol=1e-7)
    one_by_one = np.concatenate([loaded([row], batch_size=1).scores for row in list(run.queries)[:3]])
    np.testing.assert_allclose(one_by_one, expected.scores[:3], rtol=1e-4, atol=1e-5)
    # The model came from the Hub: its repository is known without being told.
    weights = hub_in_process.files("me/model", "model")["model.safetensors"]
    assert loaded.push_to_hub("me/again") == {
        "synset": f"{hub_in_process.endpoint}/datasets/me/again",
        "model": f"{hub_in_process.endpoint}/me/model",
    }
    assert hub_in_process.files("me/model", "model")["model.safetensors"] == weights


def test_a_model_of_somebody_else_is_not_linked_but_said_so(hub_in_process, caplog):
    hub = hub_in_process
    run = vit_run()
    run.model.push_to_hub(f"{hub.other_user}/model", token=hub.other_token)
    attribute = pipeline("data-attribution", model=run.model, synset=run.synset, disable_tqdm=True)
    with caplog.at_level(logging.WARNING):
        addresses = attribute.push_to_hub("me/synset", model_id=f"{hub.other_user}/model")
    assert set(addresses) == {"synset"}
    assert "metadata_update" in caplog.text


def test_a_model_is_pushed_when_asked_and_another_is_refused(hub_in_process, result):
    run = vit_run()
    attribute = pipeline("data-attribution", model=run.model, synset=run.synset, disable_tqdm=True)
    with pytest.raises(ValueError, match="pass `model_id`"):
        attribute.push_to_hub("me/synset", push_model=True)
    with pytest.raises(ValueError, match="not computed by this pipeline"):
        attribute.push_to_hub("me/synset", results=result)
    assert not hub_in_process.count("POST /api/repos/create")
    attribute.push_to_hub("me/synset", push_model=True, model_id="me/model")
    loaded = AutoModelForImageClassification.from_pretrained("me/model")
    for name, parameter in run.model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter)
    with torch.no_grad():
        next(loaded.parameters()).add_(1e-3)
    loaded.push_to_hub("me/changed")
    with pytest.raises(ParameterMismatchError):
        pipeline("data-attribution", model="me/changed", synset="me/synset")


def test_a_pushed_model_brings_its_tokenizer(hub_in_process):
    run = vit_run()
    tokenizer = word_tokenizer(["some words"])
    attribute = pipeline(
        "data-attribution", model=run.model, tokenizer=tokenizer, synset=run.synset, disable_tqdm=True
    )
    attribute.push_to_hub("me/synset", push_model=True, model_id="me/model")
    again = pipeline("data-attribution", model="me/model", synset="me/synset", disable_tqdm=True)
    assert again.tokenizer.get_vocab() == tokenizer.get_vocab()


def test_an_unlearned_model_says_what_was_removed_and_loads_like_any_other(hub_in_process):
    run = vit_run()
    attributor = Attributor(run.model, run.synset, disable_tqdm=True)
    name = run.synset.clusters.names[0]
    unlearned = attributor.unlearn([name], rows=run.train_dataset, queries=run.queries)
    unlearned.push_to_hub("me/without", card=CardOptions(model_id="me/model"))
    loaded = AutoModelForImageClassification.from_pretrained("me/without")
    expected = attributor.model_without([name], rows=run.train_dataset)
    for parameter_name, parameter in expected.named_parameters():
        assert torch.equal(loaded.get_parameter(parameter_name), parameter)
    card = ModelCard.load("me/without")
    card.validate(repo_type="model")
    assert card.data.base_model == "me/model"
    assert "## What was removed" in card.text
    assert [check.what for check in unlearned.checks] == ["removed rows", "the other training rows", "queries"]
    told = json.loads(hub_in_process.files("me/without", "model")["unlearning.json"])
    assert told["removed"] == {name: int(run.synset.clusters.sizes[0])}


def test_commands_find_what_was_pushed(hub_in_process, hub_shell):
    tiny_synset().push_to_hub("me/synset")
    hub_shell.command("hf", "download", "me/synset", "--repo-type", "dataset", "--local-dir", "copy")
    same_synset(Synset.from_pretrained(hub_shell.folder / "copy"), tiny_synset())


def test_what_is_not_ours_on_the_hub_is_left_alone(hub_in_process, result):
    hub = hub_in_process
    hub.commit("me/rows", {"README.md": b"rows", "data/train-00000.parquet": b"PAR1"}, "dataset")
    with pytest.raises(ValueError, match="me/rows holds something else: data/train-00000.parquet"):
        tiny_synset().push_to_hub("me/rows")
    tiny_synset().push_to_hub("me/synset")
    with pytest.raises(ValueError, match="me/synset holds something else: synset.json"):
        result.push_to_hub("me/synset")
    assert set(hub.files("me/rows", "dataset")) == {"README.md", "data/train-00000.parquet"}
    same_synset(Synset.from_pretrained("me/synset"), tiny_synset())


def test_an_unlearned_model_replaces_weights_beside_it_only(hub_in_process):
    run = vit_run()
    unlearned = Attributor(run.model, run.synset, disable_tqdm=True).unlearn([run.synset.clusters.names[0]])
    unlearned.push_to_hub("me/without")
    ours = {"model-00001-of-00002.safetensors": b"old", "onnx/model.safetensors": b"theirs", "notes.txt": b"mine"}
    hub_in_process.commit("me/without", ours, "model")
    unlearned.push_to_hub("me/without")
    files = set(hub_in_process.files("me/without", "model"))
    assert {"onnx/model.safetensors", "notes.txt", "model.safetensors", "unlearning.json"} <= files
    assert "model-00001-of-00002.safetensors" not in files


def test_the_base_model_is_not_taken_for_the_trained_one(hub_in_process, monkeypatch):
    run = vit_run()
    run.model.push_to_hub("me/base")
    card = hub_in_process.files("me/base", "model")["README.md"]
    trajectory = copy.copy(run.synset.trajectory)
    trajectory.metadata = {**trajectory.metadata, "model": {"class": "ViT", "name_or_path": "me/base"}}
    monkeypatch.setattr(run.model.config, "_name_or_path", "me/base", raising=False)
    monkeypatch.setattr(run.model, "name_or_path", "me/base", raising=False)
    synset = replace(run.synset, trajectories=(trajectory,))
    attribute = pipeline("data-attribution", model=run.model, synset=synset, disable_tqdm=True)
    assert run.model.config.name_or_path == "me/base"
    assert set(attribute.push_to_hub("me/synset")) == {"synset"}
    with pytest.raises(ValueError, match="pass `model_id`"):
        attribute.push_to_hub("me/synset", push_model=True)
    assert hub_in_process.files("me/base", "model")["README.md"] == card
    assert DatasetCard.load("me/synset").data.to_dict()["base_model"] == "me/base"
    told = attribute.push_to_hub("me/synset", card=CardOptions(model_id="me/tuned"))
    assert set(told) == {"synset"}
    assert DatasetCard.load("me/synset").data.model == "me/tuned"


def test_a_pull_request_is_opened_everywhere(hub_in_process):
    run = vit_run()
    run.model.push_to_hub("me/model")
    attribute = pipeline("data-attribution", model=run.model, synset=run.synset, disable_tqdm=True)
    result = attribute(run.queries)
    attribute.push_to_hub("me/synset", results=result, model_id="me/model")
    before = {name: hub_in_process.files(name, kind) for name, kind in REPOSITORIES}
    attribute.push_to_hub("me/synset", results=result, model_id="me/model", push_model=True, create_pr=True)
    assert {name: hub_in_process.files(name, kind) for name, kind in REPOSITORIES} == before


REPOSITORIES = (("me/synset", "dataset"), ("me/synset-attributions", "dataset"), ("me/model", "model"))
