from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from benchmarks import single_run, tables
from benchmarks import truth as ground_truth
from benchmarks.recorded import Entrant
from benchmarks.single_run import SingleRunTruth, chosen_setting, figures, numbered, removals, single_run_trainer
from hf_rgm.files.writing import write_json
from hf_rgm.testing import tiny_trainer
from tests.benchmarks import tiny

LEARNING_RATE = 0.5
FLOAT_TOLERANCE = 1e-6


def trained(trainer):
    trainer.train()
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


def test_with_every_row_present_it_is_the_recorded_run_to_the_bit():
    task = tiny.task()
    recorded = trained(task.build_trainer(task.train, 0))
    single = trained(single_run_trainer(task)(numbered(task.train), 0))
    assert all(torch.equal(single[name], value) for name, value in recorded.items())


def test_absent_rows_only_stop_contributing():
    """One step of gradient descent on all rows: the sum over present rows, over the number of all rows."""
    build = partial(
        tiny_trainer,
        max_steps=1,
        per_device_train_batch_size=tiny.NUM_ROWS,
        optim="sgd",
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
    )
    task = tiny.task(build_trainer=build)
    present = np.array([0, 3, 4, 11, 20])
    trainer = single_run_trainer(task)(numbered(task.train).select(present), 0)
    start = {name: value.detach().clone().requires_grad_() for name, value in trainer.model.named_parameters()}
    rows = task.train[present]
    logits = torch.func.functional_call(trainer.model, start, (rows["pixel_values"],)).logits
    loss = F.cross_entropy(logits, rows["labels"], reduction="sum") / tiny.NUM_ROWS
    slopes = torch.autograd.grad(loss, list(start.values()))
    final = trained(trainer)
    for (name, value), slope in zip(start.items(), slopes, strict=True):
        torch.testing.assert_close(final[name], value - LEARNING_RATE * slope, atol=FLOAT_TOLERANCE, rtol=0)


def test_a_batch_without_a_present_row_gives_no_nan():
    """One row is present, in one of two batches."""
    build = partial(
        tiny_trainer, num_train_epochs=1, per_device_train_batch_size=12, optim="sgd", lr_scheduler_type="constant"
    )
    task = tiny.task(build_trainer=build)
    trainer = single_run_trainer(task)(numbered(task.train).select([5]), 0)
    assert all(torch.isfinite(value).all() for value in trained(trainer).values())
    assert trainer.state.global_step == 2


def additive_truth(task):
    rows = tiny.effects(task.queries)
    everything = 5.0 + rows.sum(1, keepdims=True)
    return SingleRunTruth(
        tiny.by_cluster(rows),
        everything - rows @ (~removals(task)).T,
        5.0 + rows @ task.row_masks()[: single_run.NUM_HALVES].T,
    )


@pytest.mark.parametrize(("method", "expected"), [(tiny.exact, 1.0), (tiny.opposite, -1.0)])
def test_exact_scores_get_full_marks(monkeypatch, method, expected):
    monkeypatch.setattr("hf_rgm.agreement.correlations.NUM_RESAMPLES", 3)
    monkeypatch.setattr(single_run, "REMOVED_SHARE", 0.1)
    task = tiny.task()
    found = figures(task, additive_truth(task), method(None, task.queries))
    assert [found[key]["value"] for key in ("leave_cluster_out", "lds_removals", "lds_halves")] == pytest.approx(
        [expected] * 3
    )


def test_removals_take_one_percent(monkeypatch):
    monkeypatch.setattr(single_run, "NUM_REMOVALS", 5)
    masks = removals(tiny.task(train=tiny.tiny_dataset(300, seed=0)))
    assert masks.shape == (5, 300)
    assert ((~masks).sum(1) == 3).all()
    assert len({mask.tobytes() for mask in masks}) == 5


def test_the_truth_is_cached_and_split_by_queries(monkeypatch, tmp_path):
    monkeypatch.setattr(ground_truth, "CACHE", tmp_path)
    monkeypatch.setattr(single_run, "NUM_REMOVALS", 2)
    monkeypatch.setattr(single_run, "REMOVED_SHARE", 0.1)
    monkeypatch.setattr(single_run, "NUM_HALVES", 1)
    task = tiny.task(build_trainer=partial(tiny_trainer, max_steps=2))
    reported, tuning = single_run.load(task), single_run.load(task, tuning=True)
    shapes = [truth.leave_out.shape + truth.removals.shape + truth.halves.shape for truth in (reported, tuning)]
    assert shapes == [(8, 6, 8, 2, 8, 1), (5, 6, 5, 2, 5, 1)]
    assert len(list((tmp_path / "tiny-single-run").glob("*.npy"))) == 1 + 6 + 2 + 1
    np.testing.assert_array_equal(reported.first(3).removals, reported.removals[:3])
    monkeypatch.setattr(task, "build_trainer", None)
    np.testing.assert_array_equal(single_run.load(task).leave_out, reported.leave_out)


def test_settings_are_those_the_benchmark_chose(monkeypatch, tmp_path):
    monkeypatch.setattr(single_run, "RESULTS", tmp_path)
    task, entrant = tiny.task(), Entrant("grid", "tests", {"a": tiny.exact, "b": tiny.opposite})
    assert chosen_setting(task, Entrant("one", "tests", {"": tiny.exact})) == ""
    with pytest.raises(ValueError, match="no chosen setting of 'grid'.*benchmarks.run --task tiny"):
        chosen_setting(task, entrant)
    write_json(tmp_path / "tiny.json", {"methods": {"grid": {"tuning": {"chosen": "b"}}}})
    assert chosen_setting(task, entrant) == "b"


def test_the_script_writes_what_the_tables_read(monkeypatch, tmp_path):
    monkeypatch.setattr(ground_truth, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(ground_truth, "load_task", lambda name: tiny.task(name=name))
    monkeypatch.setattr(single_run, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(single_run, "NUM_REMOVALS", 3)
    monkeypatch.setattr(single_run, "REMOVED_SHARE", 0.1)
    monkeypatch.setattr(single_run, "NUM_HALVES", 3)
    monkeypatch.setattr("hf_rgm.agreement.correlations.NUM_RESAMPLES", 3)
    monkeypatch.setitem(single_run.METHODS, "exact", Entrant("exact", "tests", {"": tiny.exact}))
    single_run.main("made-up", ["exact"], anew=False)
    found = json.loads((tmp_path / "results" / "single-run-made-up.json").read_text())
    assert found["identity"]["num_queries"] == found["methods"]["exact"]["num_queries"] == tiny.NUM_QUERIES
    table = tables.single_run({"single_run": found}).splitlines()
    assert table[0].startswith("| made-up, 8 queries | leave-cluster-out |")
    value = found["methods"]["exact"]["figures"]["lds_halves"]["value"]
    assert table[2].startswith("| exact |") and table[2].endswith(f"| {value:.3f} |")
