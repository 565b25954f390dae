"""The measurement of what recording costs."""

from functools import partial

import pytest

from benchmarks.recording_overhead import CLOCKS, measure, overheads
from hf_rgm.testing import tiny_trainer
from tests.benchmarks.tiny import task


def test_runs_are_timed_in_pairs(capsys):
    runs = measure(task(build_trainer=partial(tiny_trainer, num_train_epochs=5)), num_states=3, repeats=2)
    assert [len(runs[kind]) for kind in ("without", "with")] == [2, 2]
    assert all(0 < run[clock] < 10 for kind in runs for run in runs[kind] for clock in CLOCKS)
    assert capsys.readouterr().out.count("ms a step without") == 2


def test_overheads_are_ratios_of_pairs():
    without = [dict.fromkeys(CLOCKS, seconds) for seconds in (1.0, 2.0, 4.0)]
    runs = {"without": without, "with": [{clock: 1.05 * run[clock] for clock in CLOCKS} for run in without]}
    found = overheads(runs)
    assert set(found) == set(CLOCKS)
    for values in found.values():
        assert values["overhead"] == pytest.approx(0.05)
        assert values["interval"] == pytest.approx([0.05, 0.05])
