from __future__ import annotations

import dataclasses
import json
import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from hf_rgm.files.reading import TensorFile
from hf_rgm.model.functional_model import ParameterSpace
from hf_rgm.synset.responses import RESPONSES_FILE, Responses
from hf_rgm.synset.synset import Synset
from hf_rgm.testing import tiny_recorded_run, tiny_synset
from tests.hub.hostile.edits import bad_value, set_json, tensor, tensors
from tests.responses import REWIND_STEP, tiny_deviations, tiny_responses, with_responses

SHAPES = st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), min_size=1, max_size=4)
FLOAT_ROUNDING = 1e-5
BFLOAT16_ERROR = 2.0**-8


@pytest.fixture(params=["int8", "bfloat16"])
def folder(request, tmp_path):
    return with_responses(request.param).save_pretrained(tmp_path / "synset")


@pytest.fixture
def int8_folder(tmp_path):
    return with_responses().save_pretrained(tmp_path / "synset")


def stored(responses, kind):
    with responses._opened() as read:
        return {name: read(f"{kind}.{name}") for name in responses.parameter_shapes}


def pieces(matrix, shapes):
    return matrix.split([math.prod(shape) for shape in shapes.values()], dim=1)


@settings(deadline=None, max_examples=60)
@given(SHAPES, st.integers(1, 4), st.integers(0, 100), st.floats(1e-20, 1e20))
def test_int8_is_within_half_a_step_of_each_cluster_and_tensor(shapes, num_clusters, seed, size):
    shapes = {f"layer.{index}": shape for index, shape in enumerate(shapes)}
    generator = torch.Generator().manual_seed(seed)
    deviations = size * torch.randn(num_clusters, sum(map(math.prod, shapes.values())), generator=generator)
    responses = Responses.encode(deviations, shapes, rewind_step=0)
    found = responses.decode()
    assert found.dtype == torch.float32 and found.shape == deviations.shape
    for name, before, after in zip(shapes, pieces(deviations, shapes), pieces(found, shapes), strict=True):
        scales = stored(responses, "scales")[name]
        assert scales.shape == (num_clusters,)
        # A step is the 127th part of the largest magnitude: an independent account of the scale.
        largest = before.abs().amax(1) if before.shape[1] else torch.zeros(num_clusters)
        torch.testing.assert_close(scales, largest / 127)
        assert ((after - before).abs() <= (1 + FLOAT_ROUNDING) * scales[:, None] / 2).all()
        assert stored(responses, "values")[name].shape == (num_clusters, *shapes[name])


def test_bfloat16_is_within_its_relative_error():
    deviations = tiny_deviations()
    responses = tiny_responses("bfloat16")
    assert not [name for name in responses.source if name.startswith("scales")]
    assert ((responses.decode() - deviations).abs() <= BFLOAT16_ERROR * deviations.abs()).all()


def test_vectors_are_laid_out_as_flat_parameters_are():
    run = tiny_recorded_run()
    shapes = run.trajectory.parameter_shapes
    space = ParameterSpace(tuple(shapes), tuple(map(torch.Size, shapes.values())))
    parts = {name: torch.full((2, *shape), float(index)) for index, (name, shape) in enumerate(shapes.items())}
    flat = space.flatten(parts)
    responses = Responses.encode(flat, shapes, rewind_step=0)
    torch.testing.assert_close(responses.decode(), flat)
    scales = stored(responses, "scales")
    for name, values in stored(responses, "values").items():
        torch.testing.assert_close(values * scales[name].view(-1, *[1] * len(shapes[name])), parts[name])


def test_the_size_is_that_of_what_is_stored(folder):
    responses = Synset.from_pretrained(folder).responses
    assert responses is not None
    kinds = ["values", "scales"] if responses.precision == "int8" else ["values"]
    tensors = [tensor for kind in kinds for tensor in stored(responses, kind).values()]
    assert responses.num_bytes == sum(tensor.nbytes for tensor in tensors)
    assert responses.num_bytes < 0.6 * 4 * tiny_deviations().numel()


@pytest.mark.parametrize("chosen", [slice(None), slice(2, 4), slice(5, None), slice(0, 0), slice(-2, None), slice(1)])
def test_parts_are_rows_of_the_whole(folder, chosen):
    for responses in (Synset.from_pretrained(folder).responses, tiny_responses()):
        assert torch.equal(responses.decode(chosen), responses.decode()[chosen])


def test_a_zero_stays_a_zero():
    responses = Responses.encode(torch.zeros(2, 3), {"w": (3,)}, rewind_step=0)
    assert not responses.decode().any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("precision", ["int8", "bfloat16"])
def test_deviations_that_are_not_finite_are_refused_with_their_cluster(value, precision):
    deviations, synset = tiny_deviations(), tiny_synset()
    deviations[2, 7] = value
    shapes, names = synset.trajectory.parameter_shapes, synset.clusters.names
    with pytest.raises(ValueError, match=r"clusters \['class 1, first half'\] are NaN, infinite"):
        Responses.encode(deviations, shapes, precision, rewind_step=0, cluster_names=names)
    with pytest.raises(ValueError, match=r"clusters \[2\] are NaN"):
        Responses.encode(deviations, shapes, precision, rewind_step=0)


def test_what_would_overflow_when_decoded_is_refused():
    deviations = torch.tensor([[1.0], [3.4e38]])
    for precision in ("int8", "bfloat16"):
        with pytest.raises(ValueError, match=r"clusters \[1\] are .* too large"):
            Responses.encode(deviations, {"w": (1,)}, precision, rewind_step=0)


@pytest.mark.parametrize(
    ("deviations", "options", "message"),
    [
        (torch.zeros(2, 4), {}, r"must have shape \(num_clusters, 3\).*got \(2, 4\)"),
        (torch.zeros(3), {}, r"got \(3,\)"),
        (torch.zeros(0, 3), {}, r"got \(0, 3\)"),
        (torch.zeros(2, 3), {"precision": "int4"}, "must be one of bfloat16, int8, got int4"),
        (torch.zeros(2, 3), {"rewind_step": -1}, "rewind_step is -1, no training step"),
    ],
)
def test_what_cannot_be_encoded_is_refused(deviations, options, message):
    with pytest.raises(ValueError, match=message):
        Responses.encode(deviations, {"w": (3,)}, **{"rewind_step": 0, **options})


def test_save_and_load_is_identity_bit_for_bit(folder):
    responses = Synset.from_pretrained(folder).responses
    expected = tiny_responses(responses.precision)
    for name in ("precision", "rewind_step", "num_clusters", "num_bytes", "sha256", "parameter_shapes"):
        assert getattr(responses, name) == getattr(expected, name)
    assert list(responses.parameter_shapes) == list(expected.parameter_shapes)
    assert torch.equal(responses.decode(), expected.decode())
    assert responses.parameters_sha256 == tiny_synset().parameters_sha256


def test_saving_again_and_over_itself_keeps_them(folder, tmp_path):
    loaded = Synset.from_pretrained(folder)
    expected = (folder / RESPONSES_FILE).read_bytes()
    loaded.save_pretrained(tmp_path / "copy")
    loaded.save_pretrained(folder)
    for place in (tmp_path / "copy", folder):
        assert (place / RESPONSES_FILE).read_bytes() == expected
        assert torch.equal(
            Synset.from_pretrained(place).responses.decode(),
            tiny_responses(loaded.responses.precision).decode(),  # type: ignore[union-attr]
        )


def test_they_are_left_out_when_asked(folder):
    synset = Synset.from_pretrained(folder)
    synset.save_pretrained(folder, with_responses=False)
    assert synset.responses is not None
    assert not (folder / RESPONSES_FILE).exists()
    assert "Responses" not in (folder / "README.md").read_text()
    assert Synset.from_pretrained(folder).responses is None


def test_a_synset_written_before_there_were_responses_loads(tmp_path):
    folder = tiny_synset().save_pretrained(tmp_path / "synset")
    content = json.loads((folder / "synset.json").read_text())
    assert content.pop("responses") is None
    (folder / "synset.json").write_text(json.dumps(content))
    assert Synset.from_pretrained(folder).responses is None


def test_the_file_says_whose_they_are(folder):
    with safe_open(folder / RESPONSES_FILE, framework="pt") as file:
        told = file.metadata()
    assert told["parameters_sha256"] == tiny_synset().parameters_sha256
    assert told["rewind_step"] == str(REWIND_STEP)


def test_values_are_read_when_asked_for_and_all_of_them_once_only(int8_folder, monkeypatch):
    read: list[str] = []
    whole = TensorFile.read

    def noted(self, name, **options):
        read.append(name)
        return whole(self, name, **options)

    monkeypatch.setattr(TensorFile, "read", noted)
    responses = Synset.from_pretrained(int8_folder).responses
    assert not [name for name in read if name.startswith(("values.", "scales."))]
    counts = []
    for cluster in range(3):
        read.clear()
        responses.decode(slice(cluster, cluster + 1))
        counts.append(len(read))
    assert counts[0] > counts[1] == counts[2] == 2 * len(responses.parameter_shapes)


def test_a_file_that_changes_after_it_was_read_is_noticed(int8_folder):
    synset = Synset.from_pretrained(int8_folder)
    synset.responses.decode()
    tensor(RESPONSES_FILE, "values.hidden.bias", lambda values: -values)(int8_folder)
    os.utime(int8_folder / RESPONSES_FILE, ns=(1, 1))
    with pytest.raises(ValueError, match="the file was changed, or is another synset's. Copy it again"):
        synset.responses.decode()


def edited(folder, edit):
    edit(folder)
    return folder


def test_a_changed_value_is_noticed_when_read_and_is_not_saved_on(int8_folder, tmp_path):
    edit = tensor(RESPONSES_FILE, "values.hidden.bias", lambda values: values + (values < 100).to(values.dtype))
    synset = Synset.from_pretrained(edited(int8_folder, edit))
    for use in (synset.responses.decode, synset.responses.check):
        with pytest.raises(ValueError, match="SHA-256 .* over its responses, the synset announces"):
            use()
    with pytest.raises(ValueError, match="SHA-256"):
        synset.save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize(
    "edit",
    [
        tensor(RESPONSES_FILE, "scales.hidden.bias", bad_value(-1.0)),
        tensor(RESPONSES_FILE, "scales.hidden.bias", bad_value(float("nan"))),
        tensor(RESPONSES_FILE, "scales.hidden.bias", bad_value(float("inf"))),
        tensor(RESPONSES_FILE, "scales.hidden.bias", bad_value(3e38)),
        tensor(RESPONSES_FILE, "scales.hidden.bias", bad_value(0.0)),
    ],
    ids=["negative", "NaN", "infinite", "too large", "zero with values"],
)
def test_scales_that_are_none_are_refused(int8_folder, edit):
    synset = Synset.from_pretrained(edited(int8_folder, edit))
    with pytest.raises(ValueError, match=r"impossible scales, in clusters \[0\]"):
        synset.responses.decode(slice(3, 4))


def test_values_that_are_not_finite_are_refused(tmp_path):
    folder = with_responses("bfloat16").save_pretrained(tmp_path / "synset")
    synset = Synset.from_pretrained(
        edited(folder, tensor(RESPONSES_FILE, "values.classifier.bias", bad_value(float("nan"))))
    )
    with pytest.raises(ValueError, match=r"NaN or infinite responses of 'classifier.bias'"):
        synset.responses.decode()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (tensor(RESPONSES_FILE, "values.hidden.bias", lambda x: x[:5]), r"shape \(5, 8\).*expected \(6, 8\)"),
        (tensor(RESPONSES_FILE, "values.hidden.bias", lambda x: x[:, :7]), r"shape \(6, 7\).*expected \(6, 8\)"),
        (tensor(RESPONSES_FILE, "values.hidden.bias", torch.Tensor.float), "dtype F32; expected .* I8"),
        (tensor(RESPONSES_FILE, "scales.hidden.bias", torch.Tensor.double), "dtype F64; expected .* F32"),
        (tensors(RESPONSES_FILE, lambda x: x.pop("scales.hidden.bias")), "has no tensor 'scales.hidden.bias'"),
        (tensors(RESPONSES_FILE, lambda x: x.update(values=x["scales.hidden.bias"] + 1)), "too many"),
        (set_json("synset.json", ("responses", "rewind_step"), 11), "has rewind_step 10, the synset's is 11"),
        (set_json("synset.json", ("responses", "rewind_step"), 49), "has rewind_step 10, the synset's is 49"),
        (set_json("synset.json", ("responses", "precision"), "bfloat16"), "announces responses of"),
        (set_json("synset.json", ("responses", "precision"), "int4"), "must be one of bfloat16, int8, got int4"),
        (set_json("synset.json", ("responses", "num_bytes"), 10**12), "do not belong together"),
        (lambda folder: (folder / RESPONSES_FILE).unlink(), "has no responses.safetensors"),
    ],
)
def test_files_of_something_else_are_refused_when_the_synset_is_loaded(int8_folder, edit, message):
    edit(int8_folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Synset.from_pretrained(int8_folder)


def test_responses_of_another_model_are_refused(int8_folder, tmp_path):
    other = tiny_responses()
    other.write(int8_folder / RESPONSES_FILE, "f" * 64)
    with pytest.raises(ValueError, match="parameters_sha256 f+, the synset's is .*another model"):
        Synset.from_pretrained(int8_folder)
    with pytest.raises(ValueError, match="of a model with trained parameters f"):
        dataclasses.replace(tiny_synset(), responses=dataclasses.replace(other, parameters_sha256="f" * 64))


def test_responses_of_other_clusters_parameters_or_steps_are_refused():
    shapes, deviations = tiny_synset().trajectory.parameter_shapes, tiny_deviations()
    for responses, message in (
        (Responses.encode(deviations[:5], shapes, rewind_step=0), "of 5 clusters and 163 parameters"),
        (Responses.encode(deviations, {"w": (163,)}, rewind_step=0), "or of other tensors or order"),
        (Responses.encode(deviations, dict(reversed(shapes.items())), rewind_step=0), "or of other tensors or order"),
        (Responses.encode(deviations, shapes, rewind_step=49), "a run that has a step 49"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(tiny_synset(), responses=responses)


def test_what_is_too_large_to_decode_is_said_so(monkeypatch):
    responses = tiny_responses()
    monkeypatch.setattr(
        "hf_rgm.files.reading.psutil.virtual_memory", lambda: type("Memory", (), {"available": 1000})()
    )
    with pytest.raises(MemoryError, match="Decoding responses needs 3.9 kB"):
        responses.decode()
    responses.decode(slice(0, 1))
