from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from hf_rgm.testing import tiny_recorded_run
from hf_rgm.trajectory.precision import (
    BLOCK_SIZE,
    dequantize,
    dequantize_logarithm,
    quantize,
    quantize_logarithm,
    scale_shape,
)
from hf_rgm.trajectory.trajectory import Trajectory

SHAPES = st.lists(st.integers(0, 20), max_size=3).map(tuple)
BFLOAT16_ERROR = 2.0**-8


def randn(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=60)
@given(SHAPES, st.integers(0, 100), st.floats(1e-8, 1e8))
def test_even_rounding_is_within_half_a_level_of_each_block(shape, seed, size):
    tensor = randn(shape, seed) * size
    values, scale = quantize(tensor)
    assert values.dtype == torch.int8
    assert values.shape == tensor.shape
    assert scale.shape == scale_shape("parameters", shape)
    error = (dequantize(values, scale) - tensor).abs().flatten()
    bound = scale.repeat_interleave(BLOCK_SIZE)[: tensor.numel()] / 2
    assert (error <= bound * (1 + 1e-5)).all()


def test_a_large_value_spoils_its_own_block_only():
    tensor = torch.full((3 * BLOCK_SIZE,), 1e-3)
    tensor[0] = 1e3
    found = dequantize(*quantize(tensor))
    torch.testing.assert_close(found[BLOCK_SIZE:], tensor[BLOCK_SIZE:], rtol=1e-5, atol=0)
    assert not found[1:BLOCK_SIZE].any()


@settings(deadline=None, max_examples=60)
@given(SHAPES, st.integers(0, 100), st.floats(0, 20))
def test_rounding_of_logarithms_is_within_half_a_level(shape, seed, spread):
    tensor = 10 ** (spread * randn(shape, seed).clamp(-1, 1))
    values, scale = quantize_logarithm(tensor)
    assert values.dtype == torch.uint8
    assert scale.shape == scale_shape("exp_avg_sq", shape)
    found = dequantize_logarithm(values, scale)
    error = (found.log2() - tensor.log2()).abs()
    assert (error <= float(scale[1]) / 2 + 1e-4).all()


def test_what_is_zero_stays_zero_and_alone_stays_exact():
    tensor = torch.tensor([0.0, 3e-12, 0.0])
    torch.testing.assert_close(dequantize_logarithm(*quantize_logarithm(tensor)), tensor, rtol=1e-5, atol=0)
    assert not dequantize_logarithm(*quantize_logarithm(torch.zeros(4))).any()
    assert not dequantize(*quantize(torch.zeros(4))).any()


@pytest.fixture(scope="module")
def trajectory():
    return tiny_recorded_run().trajectory


@pytest.mark.parametrize(("precision", "share"), [("bfloat16", 0.51), ("int8", 0.35)])
def test_states_in_fewer_bits_are_near_smaller_and_end_exactly(trajectory, tmp_path, precision, share):
    trajectory.save(tmp_path / precision, precision=precision)
    found = Trajectory.load(tmp_path / precision)
    final = trajectory.final.parameters
    for step in trajectory.state_steps:
        expected, state = trajectory.state(step), found.state(step)
        assert state.moments.keys() == expected.moments.keys()
        for name, parameter in expected.parameters.items():
            if step == trajectory.num_steps:
                assert torch.equal(state.parameters[name], parameter)
                continue
            moved = (parameter - final[name]).abs().max()
            error = (state.parameters[name] - parameter).abs().max()
            assert error <= max(BFLOAT16_ERROR if precision == "bfloat16" else 0.5 / 127, 1e-7) * moved + 1e-7
            if not expected.moments:
                continue
            square, near = expected.moments["exp_avg_sq"][name], state.moments["exp_avg_sq"][name]
            assert ((near > 0) == (square > 0)).all()
            assert (near[square > 0] / square[square > 0]).log2().abs().max() < 0.1
    large, small = (tensor_bytes(folder / "states") for folder in (trajectory.folder, tmp_path / precision))
    assert small < share * large


def tensor_bytes(folder):
    """Of all tensors but those of the last state; headers are most of such tiny files."""
    return sum(tensor.nbytes for path in sorted(folder.glob("*"))[:-1] for tensor in load_file(path).values())


def test_copies_keep_their_precision_and_can_be_made_exact_again(trajectory, tmp_path):
    trajectory.save(tmp_path / "small", precision="int8")
    Trajectory.load(tmp_path / "small").save(tmp_path / "copy")
    Trajectory.load(tmp_path / "small").save(tmp_path / "large", precision="float32")
    names = sorted(path.name for path in (tmp_path / "small" / "states").glob("*"))
    for name in names:
        original, copy = (load_file(tmp_path / folder / "states" / name) for folder in ("small", "copy"))
        assert {key: tensor.dtype for key, tensor in original.items()} == {k: t.dtype for k, t in copy.items()}
    step = trajectory.state_steps[1]
    small, large = (Trajectory.load(tmp_path / folder).state(step) for folder in ("small", "large"))
    torch.testing.assert_close(small.parameters, large.parameters, rtol=0, atol=0)
    assert {t.dtype for t in load_file(tmp_path / "large" / "states" / names[1]).values()} == {torch.float32}


def test_unknown_precisions_are_refused_before_anything_is_written(trajectory, tmp_path):
    with pytest.raises(ValueError, match="one of float32, bfloat16, int8, got 'int4'"):
        trajectory.save(tmp_path / "new", precision="int4")
    assert not (tmp_path / "new").exists()


def test_a_file_that_says_otherwise_is_refused(trajectory, tmp_path):
    trajectory.save(tmp_path / "small", precision="int8")
    path = sorted((tmp_path / "small" / "states").glob("*"))[1]
    tensors = load_file(path)
    save_file(tensors, path, metadata={"precision": "int4"})
    with pytest.raises(ValueError, match="states in 'int4'"):
        Trajectory.load(tmp_path / "small")
    missing = {name: tensor for name, tensor in tensors.items() if not name.startswith("parameters_scale")}
    save_file(missing, path, metadata={"precision": "int8"})
    with pytest.raises(ValueError, match="other scales than tensors"):
        Trajectory.load(tmp_path / "small")
    short = {n: t[:0] if n == "parameters_scale.hidden.weight" else t for n, t in tensors.items()}
    save_file(short, path, metadata={"precision": "int8"})
    loaded = Trajectory.load(tmp_path / "small")
    with pytest.raises(ValueError, match=r"'parameters_scale.hidden.weight' of shape \(0,\)"):
        loaded.state(trajectory.state_steps[1])
