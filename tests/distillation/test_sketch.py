from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_rgm import DistillationConfig, ReverseGradientMatchingDistiller
from hf_rgm.distillation.learner import cluster_residuals
from hf_rgm.distillation.sketch import CountSketch
from hf_rgm.model.row_gradients import cluster_gradients
from hf_rgm.testing import tiny_recorded_run, tiny_synset

RUN = tiny_recorded_run()
TOO_LITTLE = "13KiB"
"""Memory that holds sketches of 80 elements but not the gradients of one cluster at five states of 163."""


def test_every_element_goes_to_one_bucket_with_a_sign():
    sketch = CountSketch(7, 3)
    matrix = sketch(torch.eye(7))
    assert matrix.shape == (7, 3)
    assert matrix.abs().sum(1).tolist() == [1.0] * 7
    vectors = torch.randn(2, 4, 7)
    torch.testing.assert_close(sketch(vectors), vectors @ matrix)
    assert not torch.equal(matrix, CountSketch(7, 3, seed=1)(torch.eye(7)))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_inner_products_are_kept_within_five_standard_deviations(seed):
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.nn.functional.normalize(torch.randn(2, 5000, generator=generator).double())
    sketch = CountSketch(5000, 1000, seed=seed)
    assert abs(float(sketch(first) @ sketch(second) - first @ second)) < 5 * (2 / 1000) ** 0.5


def test_it_is_linear_and_differentiable():
    sketch = CountSketch(5, 3)
    assert torch.autograd.gradcheck(sketch, torch.randn(2, 5).double().requires_grad_())


def distil(**changes):
    config = DistillationConfig(num_iterations=200, tolerance=0.0, **changes)
    return ReverseGradientMatchingDistiller(
        RUN.model, RUN.trajectory, RUN.train_dataset, RUN.clusters, config=config, disable_tqdm=True
    )


def whole_error(synset):
    """Matching error of the samples on whole gradients."""
    work = distil()
    errors = []
    with work.model.differentiable():
        for matched in synset.matched_states:
            named = RUN.trajectory.state(matched.step).parameters
            state = work.model.space.flatten(named)
            real = cluster_gradients(work.model, [state], work.batches, range(6), 48)[0]
            errors.append(cluster_residuals(work._gradients(named, synset.samples).detach(), real).mean())
    return float(torch.stack(errors).mean())


def test_samples_learned_on_sketches_match_the_whole_gradients():
    exact = tiny_synset()
    assert distil()._plan.sketch_dimension is None
    sketched = distil(max_memory=TOO_LITTLE, sketch_dimension=80)
    assert sketched._plan.sketch_dimension == 80
    assert sketched._plan.chunk_size == 1
    synset = sketched.distill()
    # 80 numbers can be met better than the 163 they stand for, by samples that have 100 numbers of their own.
    assert synset.matching_error < whole_error(synset) < 3 * exact.matching_error


def test_too_little_memory_is_refused_before_work_starts():
    with pytest.raises(ValueError, match=r"`max_memory='1KiB'` is too little for 5 states .* Raise it"):
        distil(max_memory="1KiB")


@pytest.mark.parametrize("value", ["much", "-1GB", "0GB"])
def test_a_size_that_is_none_is_refused(value):
    with pytest.raises(ValueError, match="`max_memory` must be"):
        DistillationConfig(max_memory=value)
