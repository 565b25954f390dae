from __future__ import annotations

from functools import partial

import pytest

from benchmarks import path_states
from benchmarks import truth as ground_truth
from hf_rgm import DistillationConfig
from tests.benchmarks import tiny


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ground_truth, "CACHE", tmp_path_factory.mktemp("cache"))
        patch.setattr(ground_truth, "load_task", lambda name: tiny.task())
        patch.setattr(path_states, "NUM_STATES", (2, 4))
        patch.setattr(path_states, "NUM_MASKS", 4)
        short = partial(DistillationConfig, num_iterations=3, samples_per_cluster=1)
        patch.setattr(path_states, "DistillationConfig", short)
        found = path_states.measure("tiny", tmp_path_factory.mktemp("runs"))
        return found, path_states.table({"tiny": {"results": found}})


def test_every_number_of_states_is_replayed_from_every_point(results):
    found, _ = results
    assert {name for name in found if name != "noise_ceiling"} == {
        f"{count} states, {rewind}" for count in (2, 4) for rewind in path_states.REWINDS
    }
    assert found["2 states, 0.14"]["drift"] != found["4 states, 0.14"]["drift"]


def test_a_line_for_each_number_of_states(results):
    found, table = results
    lines = table.splitlines()
    assert lines[0] == "| recorded states | from 14% | from 27% | from 40% |"
    one = found["4 states, 0.27"]
    assert lines[3].split(" | ")[2] == f"{one['lds_clusters']['value']:.3f} ({one['drift']:.2f})"
    assert path_states._cell({"error": "it diverged"}) == "diverged"
