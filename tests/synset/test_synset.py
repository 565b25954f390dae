from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_rgm.attribution.attributor import Attributor
from hf_rgm.exceptions import ParameterMismatchError
from hf_rgm.model.functional_model import parameters_sha256
from hf_rgm.synset.samples import SyntheticSamples
from hf_rgm.synset.synset import Synset
from hf_rgm.testing import TinyConfig, TinyModel, tiny_recorded_run, tiny_synset


@pytest.fixture
def folder(tmp_path):
    return tiny_synset().save_pretrained(tmp_path / "synset")


def test_save_and_load_is_identity_bit_for_bit(folder):
    synset, loaded = tiny_synset(), Synset.from_pretrained(folder)
    for first, second in zip(synset.samples.tensors(), loaded.samples.tensors(), strict=True):
        assert torch.equal(first, second)
    assert torch.equal(loaded.residuals, synset.residuals)
    assert loaded.clusters == synset.clusters
    for name in ("matched_states", "parameters_sha256", "input_name", "config", "metadata", "matching_error"):
        assert getattr(loaded, name) == getattr(synset, name)
    for step in synset.trajectory.state_steps:
        first, second = synset.trajectory.state(step), loaded.trajectory.state(step)
        assert parameters_sha256(first.parameters) == parameters_sha256(second.parameters)
    run = tiny_recorded_run()
    scores = [Attributor(run.model, s, disable_tqdm=True).attribute(run.queries).scores for s in (synset, loaded)]
    assert (scores[0] == scores[1]).all()


def test_which_rows_were_in_which_step_is_not_shared(folder):
    assert tiny_synset().trajectory.steps.rows is not None
    assert Synset.from_pretrained(folder).trajectory.steps.rows is None


def test_saving_over_itself_and_over_an_earlier_one_works(folder):
    loaded = Synset.from_pretrained(folder)
    (folder / "left-over").write_text("x")
    loaded.save_pretrained(folder)
    assert not (folder / "left-over").exists()
    assert (
        Synset.from_pretrained(folder).trajectory.final.parameters.keys() == loaded.trajectory.parameter_shapes.keys()
    )


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(FileExistsError, match="has no synset.json"):
        tiny_synset().save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("synset.json", "has no synset.json"),
        ("synset.safetensors", "has no synset.safetensors"),
        ("clusters", "clusters"),
        ("trajectories", "trajectories"),
    ],
)
def test_a_missing_part_is_named(folder, name, message):
    path = folder / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(FileNotFoundError, match=message):
        Synset.from_pretrained(folder)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Synset.from_pretrained(tmp_path / "nowhere")


def test_truncated_tensors_are_named(folder):
    path = folder / "synset.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match="synset.safetensors is damaged"):
        Synset.from_pretrained(folder)


def test_a_truncated_trajectory_is_named(folder):
    path = max((folder / "trajectories" / "0").rglob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=path.name):
        Synset.from_pretrained(folder)


ABSENT = object()


def change_json(folder, **changes):
    path = folder / "synset.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ABSENT}))


def test_another_format_version_is_refused(folder):
    change_json(folder, format_version=3)
    with pytest.raises(ValueError, match="format version 3, this release of hf_rgm reads 4.* record and distil again"):
        Synset.from_pretrained(folder)


def test_a_missing_field_is_named(folder):
    change_json(folder, parameters_sha256=ABSENT)
    with pytest.raises(ValueError, match="lacks parameters_sha256"):
        Synset.from_pretrained(folder)


def change_tensors(folder, **changes):
    path = folder / "synset.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()} | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not ABSENT}
    save_file(kept, path)
    return {name: list(tensor.shape) for name, tensor in kept.items()}


def test_a_missing_tensor_is_named(folder):
    announced = change_tensors(folder, targets=ABSENT)
    with pytest.raises(ValueError, match="has no tensor 'targets'"):
        Synset.from_pretrained(folder)
    change_json(folder, tensors=announced)
    with pytest.raises(ValueError, match="announces the tensors .*not those of a synset"):
        Synset.from_pretrained(folder)


@pytest.mark.parametrize("name", ["inputs", "targets", "log_weights"])
def test_values_that_are_not_finite_are_named_with_their_cluster(folder, name):
    tensor = load_file(folder / "synset.safetensors")[name].clone()
    tensor[2].view(-1)[0] = float("nan")
    change_tensors(folder, **{name: tensor})
    with pytest.raises(ValueError, match=f"{name} are NaN or infinite in clusters .'class 1, first half'"):
        Synset.from_pretrained(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"inputs": torch.zeros(5, 2, 1, 4, 4)},
        {"targets": torch.zeros(6, 3, 3)},
        {"log_weights": torch.zeros(6, 1)},
        {"residuals": torch.zeros(5, 7)},
        {"residuals": torch.zeros(4, 6)},
    ],
    ids=lambda changes: f"{next(iter(changes))} {tuple(next(iter(changes.values())).shape)}",
)
def test_tensors_that_do_not_belong_together_are_refused(folder, changes):
    announced = change_tensors(folder, **changes)
    with pytest.raises(ValueError, match=r"synset.safetensors has '\w+' of shape .* expected"):
        Synset.from_pretrained(folder)
    change_json(folder, tensors=announced)
    with pytest.raises(ValueError, match="do not belong together"):
        Synset.from_pretrained(folder)


def test_a_trajectory_of_another_run_is_refused(folder):
    """Replay would end at another model's parameters."""
    other = tiny_recorded_run().trajectory
    moved = {name: value + 1 for name, value in other.final.parameters.items()}
    states = {step: other.state(step) for step in other.state_steps}
    states[48] = dataclasses.replace(states[48], parameters=moved)
    other = type(other)(
        optimizer=other.optimizer,
        parameter_shapes=other.parameter_shapes,
        steps=other.steps,
        states=states,
        num_rows=48,
        dataset_fingerprint=other.dataset_fingerprint,
    )
    other.save(folder / "trajectories" / "0")
    with pytest.raises(ValueError, match="do not belong together"):
        Synset.from_pretrained(folder)


def test_another_models_parameters_are_refused_with_both_hashes(caplog):
    run, synset = tiny_recorded_run(), tiny_synset()
    other = TinyModel(TinyConfig(num_labels=3))
    found = parameters_sha256(dict(other.named_parameters()))
    with pytest.raises(ParameterMismatchError) as caught:
        Attributor(other, synset)
    assert synset.parameters_sha256[:12] in str(caught.value)
    assert found[:12] in str(caught.value)
    assert "force=True" in str(caught.value)
    assert not caplog.records
    result = Attributor(other, synset, force=True, disable_tqdm=True).attribute(run.queries)
    assert result.scores.shape == (12, 6)
    assert found[:12] in caplog.text
    Attributor(run.model, synset)


def test_the_table_has_a_line_for_each_sample(folder):
    table = tiny_synset().to_pandas()
    assert len(table) == tiny_synset().num_samples == 30
    assert table["label"].tolist() == [0] * 10 + [1] * 10 + [2] * 10
    assert table["cluster_size"].tolist() == [8] * 30
    assert torch.equal(torch.tensor(table["pixel_values"][7]), tiny_synset().samples.inputs[1, 2].flatten())
    assert (folder / "data" / "train.parquet").is_file()


def test_samples_of_another_number_of_clusters_are_refused():
    synset = tiny_synset()
    with pytest.raises(ValueError, match=r"inputs have shape \(5, .* but the cluster map has 6 clusters"):
        dataclasses.replace(synset, samples=SyntheticSamples(*(t[:5] for t in synset.samples.tensors())))
