"""How much of a distillation fits in memory at once."""

from __future__ import annotations

import pytest
import torch

from hf_rgm import DistillationConfig
from hf_rgm.distillation.learner import matching_error
from hf_rgm.distillation.memory_plan import measure_match, plan_memory
from hf_rgm.model.functional_model import FunctionalModel
from hf_rgm.model.peak_memory import PeakTensors
from hf_rgm.synset.inputs import ContinuousInputs
from hf_rgm.synset.samples import SynsetGradients
from hf_rgm.testing import tiny_recorded_run, tiny_synset

MATCH = (1_000, 20_000)
SIZES = {"num_parameters": 1_000, "num_states": 4, "num_clusters": 8}


def plan(max_bytes, **settings):
    config = DistillationConfig(max_memory=f"{max_bytes // 1_000}KB", sketch_dimension=100, **settings)
    return plan_memory(config, match_bytes=MATCH, **SIZES)


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
