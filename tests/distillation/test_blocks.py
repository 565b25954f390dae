from __future__ import annotations

import pytest
import torch

from hf_rgm.distillation.blocks import BlockStore

BLOCK = range(2, 4)


def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "inputs": torch.randn(2, 1, 3, generator=generator),
        "targets": torch.randn(2, 1, 3, generator=generator).transpose(0, 1).contiguous().transpose(0, 1),
        "log_weights": torch.zeros(2, 1),
        "residuals": torch.ones(5, 2),
    }


def test_a_block_comes_back_bit_for_bit(tmp_path):
    store = BlockStore(tmp_path / "blocks", {"seed": 0})
    assert store.read(BLOCK) is None
    store.write(BLOCK, tensors())
    again = BlockStore(tmp_path / "blocks", {"seed": 0}).read(BLOCK)
    assert again is not None
    assert all(torch.equal(again[name], value) for name, value in tensors().items())
    assert [path.name for path in (tmp_path / "blocks").iterdir()] == ["block-000002-000004.safetensors"]
    assert store.read(range(0, 2)) is None


def test_blocks_of_another_distillation_are_refused_and_kept(tmp_path):
    BlockStore(tmp_path, {"seed": 0}).write(BLOCK, tensors())
    with pytest.raises(FileExistsError, match="block-000002-000004.safetensors belongs to another distillation"):
        BlockStore(tmp_path, {"seed": 1})
    assert BlockStore(tmp_path, {"seed": 0}).read(BLOCK) is not None


@pytest.mark.parametrize("damage", [lambda data: data[:-7], lambda data: data[:4], lambda data: b""])
def test_a_damaged_block_is_named(tmp_path, damage):
    BlockStore(tmp_path, {"seed": 0}).write(BLOCK, tensors())
    path = next(tmp_path.iterdir())
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="block-000002-000004.safetensors is damaged .* Delete it"):
        BlockStore(tmp_path, {"seed": 0})


def test_a_damaged_block_sends_no_commands_to_the_terminal(tmp_path):
    BlockStore(tmp_path, {"seed": 0}).write(BLOCK, tensors())
    path = next(tmp_path.iterdir())
    path.write_bytes(path.read_bytes().replace(b"F32", "\u202e".encode(), 1))  # three bytes, too
    with pytest.raises(ValueError, match="is damaged") as caught:
        BlockStore(tmp_path, {"seed": 0})
    assert "\\u202e" in str(caught.value) and "\u202e" not in str(caught.value)


@pytest.mark.parametrize("damage", [lambda data: data[:-4] + bytes(4), lambda data: data[:-1] + b"\x7f"])
def test_a_block_whose_values_changed_is_named(tmp_path, damage):
    BlockStore(tmp_path, {"seed": 0}).write(BLOCK, tensors())
    path = next(tmp_path.iterdir())
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="block-000002-000004.safetensors is damaged: its content changed. Delete it"):
        BlockStore(tmp_path, {"seed": 0}).read(BLOCK)


def test_an_unfinished_write_is_not_taken_for_a_block(tmp_path):
    unfinished = tmp_path / ".block-000002-000004.safetensors.hf-rgm-saving"
    unfinished.mkdir()
    (unfinished / "block-000002-000004.safetensors").write_bytes(b"half")
    assert BlockStore(tmp_path, {"seed": 0}).read(BLOCK) is None
    assert not list(tmp_path.iterdir())
