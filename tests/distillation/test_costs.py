from __future__ import annotations

import pytest

from hf_rgm import DistillationConfig, ReverseGradientMatchingDistiller
from hf_rgm.distillation.learner import BlockLearner
from hf_rgm.model.cost_estimates import CostEstimate, PieceOfWork
from hf_rgm.testing import tiny_recorded_run, tiny_synset

RUN = tiny_recorded_run()


def distiller(**settings):
    return ReverseGradientMatchingDistiller(
        RUN.model,
        RUN.trajectory,
        RUN.train_dataset,
        RUN.clusters,
        config=DistillationConfig(**settings),
        disable_tqdm=True,
    )


def test_the_size_on_disk_is_told_within_a_factor_of_two(tmp_path):
    folder = tiny_synset().save_pretrained(tmp_path / "synset")
    tensors = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    told = distiller().estimate().disk_bytes
    assert told / 2 < tensors < 2 * told


@pytest.mark.parametrize("settings", [{}, {"tolerance": 0.0}, {"max_memory": "13KiB"}])
def test_time_is_that_of_the_rows_and_the_iterations(monkeypatch, settings):
    measured = BlockLearner.time_iteration
    taken = []

    def one_second(learner, start):
        taken.append(measured(learner, start))
        return 1.0

    monkeypatch.setattr(BlockLearner, "time_iteration", one_second)
    monkeypatch.setattr(BlockLearner, "time_settling", lambda learner, start: 0.5)
    monkeypatch.setattr("hf_rgm.distillation.distiller.measure_rows", lambda *_: PieceOfWork(0.125, 0))
    estimate = distiller(num_iterations=100, cluster_block_size=3, sketch_dimension=80, **settings).estimate()
    assert taken[0] > 0
    rows, all_rounds, two_rounds = 0.125 * 48 * 5, 100 + 4 * 0.5, 30 + 2 * 0.5
    assert estimate.seconds == pytest.approx(rows + all_rounds * estimate.num_blocks)
    least = two_rounds if settings.get("tolerance", True) else all_rounds
    assert estimate.least_seconds == pytest.approx(rows + least * estimate.num_blocks)
    assert estimate.sketched == ("max_memory" in settings)


def test_smaller_blocks_need_less_memory_and_more_of_them():
    whole, half = (distiller(cluster_block_size=size).estimate() for size in (6, 3))
    assert (whole.num_blocks, half.num_blocks) == (1, 2)
    assert half.memory_bytes < whole.memory_bytes


def test_it_reads_well():
    estimate = CostEstimate(7300.0, 4_200_000_000, 900_000, 1, True)
    assert str(estimate) == ("2.0 h, 4.2 GB of memory, 900.0 kB on disk, in 1 block, on sketches of the gradients")
    assert str(CostEstimate(90.0, 10, 10, 1, least_seconds=5.0)).startswith("5.0 s to 1.5 min, ")
    assert str(CostEstimate(90.0, 10, 10, 1, least_seconds=90.0)).startswith("1.5 min, ")
