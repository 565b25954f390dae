from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from hf_rgm.engines.objectives import Objective, log_odds_margin
from hf_rgm.fidelity.retraining import retrain
from hf_rgm.testing import tiny_dataset, tiny_trainer

DATASET, QUERIES = tiny_dataset(12, seed=0), tiny_dataset(5, seed=1)
SUBSETS = [np.arange(12), [0, 1, 2, 5, 8]]


def build(dataset, seed):
    return tiny_trainer(dataset, seed, num_train_epochs=1)


def refuse(dataset, seed):
    raise AssertionError("nothing is left to train")


def run(builder=build, subsets=SUBSETS, **settings):
    return retrain(builder, DATASET, subsets, QUERIES, disable_tqdm=True, **{"seeds": (0, 1), **settings})


def test_values_are_those_of_models_trained_directly():
    values = run()
    assert values.shape == (2, 2, 5)
    assert values.dtype == np.float32
    for s, rows in enumerate(SUBSETS):
        for seed in (0, 1):
            trainer = build(DATASET.select(rows), seed)
            trainer.train()
            with torch.no_grad():
                logits = trainer.model.eval()(QUERIES[:]["pixel_values"]).logits
            expected = log_odds_margin(logits, QUERIES[:]["labels"])
            np.testing.assert_allclose(values[s, seed], expected.numpy(), rtol=1e-4, atol=1e-5)


def test_what_is_finished_is_not_trained_again(tmp_path):
    first = run(output_dir=tmp_path)
    np.testing.assert_array_equal(run(refuse, output_dir=tmp_path), first)
    np.testing.assert_array_equal(run(refuse, [SUBSETS[1]], seeds=(1,), output_dir=tmp_path), first[1:, 1:])
    with pytest.raises(AssertionError, match="nothing is left"):
        run(refuse, output_dir=tmp_path, seeds=(2,))
    assert len(list(tmp_path.iterdir())) == 4


def test_an_interrupted_retraining_keeps_what_was_finished(tmp_path):
    calls = []

    def dying(dataset, seed):
        calls.append(seed)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return build(dataset, seed)

    with pytest.raises(KeyboardInterrupt):
        run(dying, output_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    np.testing.assert_array_equal(run(output_dir=tmp_path), run())


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-3],
        lambda data: bytes(len(data)),
        lambda data: data[:-40] + bytes(8) + data[-32:],
        lambda _: b"",
    ],
)
def test_a_damaged_result_is_named(tmp_path, damage):
    run(output_dir=tmp_path)
    path = sorted(tmp_path.iterdir())[0]
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"{path.name} is damaged.*Delete it"):
        run(output_dir=tmp_path)


def test_objectives_over_a_set_and_lists_of_rows():
    values = retrain(build, list(DATASET), SUBSETS, list(QUERIES), objective="accuracy", disable_tqdm=True)
    assert values.shape == (2, 1, 1)
    assert np.allclose(values * 5, np.round(values * 5), atol=1e-5)


@pytest.mark.parametrize(
    ("subsets", "message"),
    [
        ([[0, 1], []], "Subset 1 is empty"),
        ([[0, 12]], "Subset 0 names rows 0 to 12; rows must lie in 0 to 11"),
        ([[-1, 3]], "Subset 0 names rows -1 to 3"),
        ([], "`subsets` is empty"),
        ([np.ones(12, dtype=bool)], r"Subset 0 must be a list of row indices, got bool of shape \(12,\)"),
        ([[0.0, 1.0]], "Subset 0 must be a list of row indices, got float64"),
        ([[[0, 1]]], r"Subset 0 must be a list of row indices, got int64 of shape \(1, 2\)"),
    ],
)
def test_bad_subsets_are_refused_before_training(subsets, message):
    with pytest.raises(ValueError, match=message):
        run(refuse, subsets)


def test_rows_named_twice_are_there_twice():
    seen = []

    def counting(dataset, seed):
        seen.append(len(dataset))
        return build(dataset, seed)

    values = run(counting, [[0, 1, 2], [2, 0, 1, 1]], seeds=(0,))
    assert seen == [3, 4]
    assert (values[0] != values[1]).all()
    np.testing.assert_array_equal(run(build, [[1, 1, 0, 2]], seeds=(0,)), values[1:])


def test_a_subset_that_repeats_is_trained_once():
    seen = []

    def counting(dataset, seed):
        seen.append(seed)
        return build(dataset, seed)

    values = run(counting, [[0, 1, 2], [2, 1, 0]], seeds=(3,))
    assert seen == [3]
    np.testing.assert_array_equal(values[0], values[1])


def test_files_of_earlier_releases_are_read(tmp_path):
    expected = run(output_dir=tmp_path)
    for path in tmp_path.iterdir():
        np.save(path, np.load(path))
    np.testing.assert_array_equal(run(refuse, output_dir=tmp_path), expected)


def test_files_are_named_by_the_sorted_rows(tmp_path):
    """Other names would make every cache that exists worthless."""
    run(build, [[8, 5, 0, 2, 1]], seeds=(7,), output_dir=tmp_path)
    digest = hashlib.sha256(np.array([0, 1, 2, 5, 8], dtype="<i8").tobytes()).hexdigest()[:20]
    assert [path.name for path in tmp_path.iterdir()] == [f"{digest}-7.npy"]


def test_files_of_other_queries_are_noticed(tmp_path):
    run(subsets=SUBSETS[:1], output_dir=tmp_path)
    other = tiny_dataset(4, seed=2)
    with pytest.raises(ValueError, match="hold 4 and 5 values each: some are of other queries"):
        retrain(build, DATASET, SUBSETS, other, seeds=(0,), output_dir=tmp_path, disable_tqdm=True)


def test_no_seeds_are_refused():
    with pytest.raises(ValueError, match="`seeds` is empty"):
        run(refuse, seeds=())


def untrainable(dataset, seed):
    trainer = build(dataset, seed)
    trainer.train = refuse
    return trainer


def test_bad_queries_and_objectives_show_before_the_first_training():
    with pytest.raises(ValueError, match="`queries` have no labels"):
        retrain(untrainable, DATASET, SUBSETS[1:], QUERIES.remove_columns("labels"), disable_tqdm=True)
    matrix = Objective("matrix", lambda forward, queries: forward(queries.inputs))
    with pytest.raises(ValueError, match="must return a tensor of shape"):
        run(untrainable, objective=matrix)
