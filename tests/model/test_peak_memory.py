"""Peak memory of tensors, as it is measured."""

from __future__ import annotations

import torch
from torch.func import grad, vmap

from hf_rgm.model.peak_memory import HEAP_BLOCK_BYTES, PeakTensors


class TestPeakTensors:
    def test_what_is_freed_does_not_count_and_views_count_once(self):
        outside = torch.ones(1000)
        with PeakTensors() as memory:
            first = outside * 2
            view = first.view(10, 100)
            second = view + 1
            del first, view
            outside.add_(1)
            third = second[:3] * 2
            del second, third
            outside[:500] + 1
        assert memory.peak_bytes == 8000

    def test_small_blocks_leave_holes_and_large_ones_none(self):
        with PeakTensors() as memory:
            torch.ones(1000)
            large = torch.ones(HEAP_BLOCK_BYTES // 4)
        assert memory.peak_bytes == memory.alive_bytes == large.nbytes
        assert memory.resident_bytes == large.nbytes + 4000

    def test_graphs_count_until_they_are_gone(self):
        weight = torch.ones(100, requires_grad=True)
        with PeakTensors() as memory:
            value = weight.exp().exp().exp()
            value.sum().backward()
        assert 4 * 400 <= memory.peak_bytes <= 6 * 400

    def test_sees_below_vmap(self):
        weight, rows = torch.ones(50, 50), torch.ones(7, 50)
        with PeakTensors() as memory:
            vmap(grad(lambda w, x: (w @ x).sum()), (None, 0))(weight, rows)
        assert memory.peak_bytes >= 7 * 4 * 50 * 50

    def test_memory_taken_again_counts_again(self):
        with PeakTensors() as memory:
            for size in (10, 1000, 10):
                torch.ones(size)
        assert memory.peak_bytes == 4000
