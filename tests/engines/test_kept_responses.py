"""Responses: computed with the rows, kept in the synset, answered from."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hf_rgm import Attributor, DistillationConfig, Objective, ReverseGradientMatchingDistiller
from hf_rgm.testing import tiny_recorded_run, tiny_synset

RUN = tiny_recorded_run()
SYNSET = tiny_synset(responses="int8")
ROWS = {"trajectory": RUN.trajectory, "rows": RUN.train_dataset, "clusters": RUN.clusters}
LOO = 1 - torch.eye(6)


@pytest.fixture
def alone():
    return Attributor(RUN.model, SYNSET, disable_tqdm=True)


@pytest.fixture
def without_work(monkeypatch):
    """Fails where gradients or curvature are taken."""

    def refuse(*arguments, **options):
        raise AssertionError("responses need neither gradients nor curvature")

    monkeypatch.setattr("hf_rgm.engines.recorded_run.curvature_rows", refuse)
    monkeypatch.setattr("hf_rgm.engines.gradient_sources.cluster_gradients", refuse)


def test_they_are_what_the_linear_engine_finds_with_the_rows():
    outcome = Attributor(RUN.model, **ROWS, disable_tqdm=True)
    run = outcome._runs(None, None)[0]
    with outcome.model.differentiable():
        models = outcome.engine("linearized_replay")(run).parameters(LOO, None)
    deviations = models.values - run.final
    responses = SYNSET.responses
    assert responses.rewind_step == models.start
    kept = responses.decode()
    sizes = [math.prod(shape) for shape in RUN.trajectory.parameter_shapes.values()]
    for exact, rounded in zip(deviations.split(sizes, dim=1), kept.split(sizes, dim=1), strict=True):
        half_a_level = exact.abs().amax(1, keepdim=True) / 127 / 2
        assert ((exact - rounded).abs() <= 1.001 * half_a_level + 1e-6).all()


def test_a_synset_alone_answers_as_the_rows_do(alone, without_work):
    result = alone.attribute(RUN.queries)
    assert (result.engine, result.row_scores) == ("responses", None)
    assert result.metadata["rewind_step"] == SYNSET.responses.rewind_step
    assert result.metadata["used_rows"] is False


def test_its_scores_are_those_of_the_rows(alone):
    by_rows = Attributor(RUN.model, **ROWS, disable_tqdm=True).attribute(RUN.queries)
    np.testing.assert_allclose(alone.attribute(RUN.queries).scores, by_rows.scores, rtol=0.02, atol=0.02)


def test_objectives_without_gradient_are_asked_of_the_models(alone, without_work):
    accuracy = alone.attribute(RUN.queries, objective="accuracy").scores
    models = alone.replayed_values(RUN.queries, LOO, objective="accuracy")
    own = alone.replayed_values(RUN.queries, torch.ones(1, 6), objective="accuracy")
    np.testing.assert_allclose(accuracy, (own - models).T)
    sure = Objective("sure", lambda forward, queries: forward(queries.inputs).softmax(-1).amax(-1), per_query=True)
    assert np.isfinite(alone.attribute(RUN.queries, objective=sure).scores).all()


def test_the_model_without_a_cluster_is_immediate(alone, without_work):
    unlearned = alone.unlearn([2])
    assert unlearned.engine == "responses"
    names, own = list(RUN.trajectory.parameter_shapes), RUN.trajectory.final.parameters
    found = torch.cat([dict(unlearned.model.named_parameters())[name].flatten() for name in names])
    own = torch.cat([own[name].flatten() for name in names])
    torch.testing.assert_close(found.detach(), own + SYNSET.responses.decode(slice(2, 3))[0])


def test_several_absent_clusters_add_up(alone):
    mask = torch.tensor([[0.0, 1, 0.5, 1, 1, 1]])
    value = alone.replayed_values(RUN.queries, mask, engine="responses")
    single = alone.replayed_values(RUN.queries, LOO, engine="responses")
    own = alone.replayed_values(RUN.queries, torch.ones(1, 6), engine="responses")
    np.testing.assert_allclose(value - own, (single[:1] - own) + 0.5 * (single[2:3] - own), atol=1e-5)


def test_questions_that_they_do_not_answer_go_to_linearised_replay(alone):
    for options in ({"rows": RUN.train_dataset}, {"rewind": 0.5}, {"num_masks": 12}):
        assert alone.attribute(RUN.queries, **options).engine == "linearized_replay"


def test_what_cannot_be_had_is_said(alone):
    with pytest.raises(ValueError, match=r"`rewind` = 0.5 cannot be had of responses.*linearized_replay"):
        alone.attribute(RUN.queries, engine="responses", rewind=0.5)
    with pytest.raises(ValueError, match="`engine='responses'` needs a synset that keeps responses"):
        Attributor(RUN.model, tiny_synset(), disable_tqdm=True).attribute(RUN.queries, engine="responses")
    with pytest.raises(ValueError, match="`rows` are for engines"):
        alone.attribute(RUN.queries, engine="responses", rows=RUN.train_dataset)
    with pytest.raises(ValueError, match=r"`responses` must be one of int8, bfloat16, none, got 'int4'"):
        DistillationConfig(responses="int4")


def test_several_runs_keep_none():
    assert tiny_synset(2, responses="int8").responses is None


@pytest.mark.parametrize("precision", ["bfloat16", "none"])
def test_their_precision_is_a_setting(precision):
    config = DistillationConfig(num_iterations=10, responses=precision)
    found = ReverseGradientMatchingDistiller(
        RUN.model, RUN.trajectory, RUN.train_dataset, RUN.clusters, config=config, disable_tqdm=True
    ).distill()
    assert found.responses is None if precision == "none" else found.responses.precision == precision


def test_those_that_do_not_fit_are_left_out(caplog):
    from hf_rgm.engines.kept_responses import compute_responses

    run = Attributor(RUN.model, **ROWS, disable_tqdm=True)._runs(None, None)[0]
    run.max_bytes = 8 * 6 * run.model.num_parameters - 1
    assert compute_responses(run, precision="int8", parameters_sha256="") is None
    assert "Responses of 6 clusters in 163 parameters do not fit" in caplog.text


def test_the_distiller_uses_the_gradients_it_has_taken(monkeypatch):
    """One pass over the rows of each cluster, for the match and for the responses."""
    passes = []
    for module in ("hf_rgm.distillation.distiller", "hf_rgm.engines.gradient_sources"):
        from hf_rgm.model.row_gradients import cluster_gradients

        monkeypatch.setattr(
            f"{module}.cluster_gradients",
            lambda *arguments, _module=module, **options: (
                passes.append(_module),
                cluster_gradients(*arguments, **options),
            )[1],
        )
    ReverseGradientMatchingDistiller(
        RUN.model,
        RUN.trajectory,
        RUN.train_dataset,
        RUN.clusters,
        config=DistillationConfig(num_iterations=10),
        disable_tqdm=True,
    ).distill()
    assert passes == ["hf_rgm.distillation.distiller"]
