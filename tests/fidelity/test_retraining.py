from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_rgm.attribution.objectives import log_odds_margin
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


def test_a_damaged_result_is_named(tmp_path):
    run(output_dir=tmp_path)
    path = sorted(tmp_path.iterdir())[0]
    path.write_bytes(path.read_bytes()[:-3])
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
    ],
)
def test_bad_subsets_are_refused_before_training(subsets, message):
    with pytest.raises(ValueError, match=message):
        run(refuse, subsets)


def test_no_seeds_are_refused():
    with pytest.raises(ValueError, match="`seeds` is empty"):
        run(refuse, seeds=())


def test_queries_without_labels_are_refused():
    with pytest.raises(ValueError, match="`queries` have no labels"):
        retrain(build, DATASET, SUBSETS[1:], QUERIES.remove_columns("labels"), disable_tqdm=True)
