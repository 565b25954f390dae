"""What fits in memory at once, and how it is measured."""

from __future__ import annotations

import pytest
import torch
from torch.func import grad, vmap

from hf_rgm import DistillationConfig
from hf_rgm.distillation.learner import matching_error
from hf_rgm.distillation.memory_plan import measure_match, plan_memory
from hf_rgm.model.functional_model import FunctionalModel
from hf_rgm.model.peak_memory import HEAP_BLOCK_BYTES, PeakTensors
from hf_rgm.synset.inputs import ContinuousInputs
from hf_rgm.synset.samples import SynsetGradients
from hf_rgm.testing import tiny_recorded_run, tiny_synset

MATCH = (1_000, 20_000)
SIZES = {"num_parameters": 1_000, "num_states": 4, "num_clusters": 8}


def plan(max_bytes, **settings):
    config = DistillationConfig(max_memory=f"{max_bytes // 1_000}KB", sketch_dimension=100, **settings)
    return plan_memory(config, match_bytes=MATCH, **SIZES)


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


def test_a_match_is_linear_in_its_clusters():
    """Measured on one and two clusters, it tells what six need."""
    model, synset = FunctionalModel(tiny_recorded_run().model), tiny_synset()
    gradients = SynsetGradients(model, ContinuousInputs(model))
    fixed, each = measure_match(gradients, model.parameters(), synset.samples)
    leaves = synset.samples.leaves()
    with PeakTensors() as memory:
        synthetic = gradients(model.parameters(), leaves)
        matching_error(synthetic, torch.ones_like(synthetic[0]), torch.ones(())).backward()
    assert fixed + 6 * each == pytest.approx(memory.resident_bytes, rel=0.02)
    assert each > 4 * 3 * model.num_parameters


class TestPlan:
    def test_everything_at_once_where_it_fits(self):
        whole = plan(400_000)
        assert (whole.block_size, whole.chunk_size, whole.num_blocks) == (8, 8, 1)
        assert whole.memory_bytes == 4 * 4 * 1_000 * 9 + 1_000 + 8 * 20_000

    def test_smaller_chunks_come_before_smaller_blocks_and_those_before_sketches(self):
        found = []
        for max_bytes in (300_000, 200_000, 90_000, 60_000):
            one = plan(max_bytes)
            assert one.memory_bytes <= max_bytes
            found.append((one.block_size, one.chunk_size, one.sketch_dimension))
        assert found == [(8, 4, None), (8, 2, None), (2, 2, None), (1, 1, None)]
        sketched = plan(50_000)
        assert (sketched.block_size, sketched.chunk_size, sketched.sketch_dimension) == (4, 1, 100)
        assert sketched.memory_bytes <= 50_000

    def test_reading_a_state_counts_where_matches_are_small(self):
        config = DistillationConfig(max_memory="1MB", cluster_block_size=1, samples_per_cluster=1)
        small = plan_memory(config, match_bytes=(0, 1), **SIZES)
        assert small.step_bytes == 3 * 4 * 1_000

    def test_gradients_of_single_samples_count_where_matches_are_small(self):
        config = DistillationConfig(max_memory="1MB", cluster_block_size=2, samples_per_cluster=5)
        small = plan_memory(config, match_bytes=(0, 1), **SIZES)
        assert small.step_bytes == (5 + 2) * 4 * 1_000 + 8 * 4 * 2**2 * 5

    def test_too_little_is_refused(self):
        with pytest.raises(ValueError, match=r"`max_memory='10KB'` is too little for 4 states of 1000 .* Raise it"):
            plan(10_000)
