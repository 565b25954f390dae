from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from datasets import IterableDataset
from scipy.stats import spearmanr

from hf_rgm.attribution.attributor import Attributor
from hf_rgm.engines.objectives import Objective
from hf_rgm.testing import TinyConfig, TinyModel, tiny_recorded_run, tiny_synset
from tests.vision import vit_run

RUN = tiny_recorded_run()


@pytest.fixture(scope="module")
def attributor():
    return Attributor(RUN.model, tiny_synset(), disable_tqdm=True)


@pytest.fixture(scope="module")
def by_rows(attributor):
    return attributor.attribute(RUN.queries, engine="adjoint", rows=RUN.train_dataset)


@pytest.fixture(scope="module")
def by_synset(attributor):
    return attributor.attribute(RUN.queries, engine="adjoint")


def mean_spearman(first, second):
    return np.mean([spearmanr(a, b).statistic for a, b in zip(first, second, strict=True)])


def test_row_scores_add_up_to_cluster_scores(by_rows):
    for cluster in range(6):
        total = by_rows.row_scores[:, RUN.clusters.rows(cluster)].sum(1)
        np.testing.assert_allclose(by_rows.scores[:, cluster], total, rtol=1e-4, atol=1e-6)


def test_scores_from_the_synset_are_close_to_those_from_rows(by_rows, by_synset):
    assert mean_spearman(by_synset.scores, by_rows.scores) > 0.95
    difference = np.abs(by_synset.scores - by_rows.scores).mean()
    assert difference < 0.05 * np.abs(by_rows.scores).mean()


def test_leaving_out_agrees_with_the_adjoint(attributor, by_synset):
    for engine in ("linearized_replay", "replay"):
        replayed = attributor.attribute(RUN.queries, engine=engine)
        assert replayed.engine == engine
        assert mean_spearman(replayed.scores, by_synset.scores) > 0.8
    assert replayed.metadata["rewind_step"] == 7


@pytest.mark.parametrize("engine", ["linearized_replay", "replay"])
def test_leave_one_out_is_with_minus_without(attributor, engine):
    result = attributor.attribute(RUN.queries, engine=engine)
    values = attributor.replayed_values(RUN.queries, 1 - torch.eye(6), engine=engine)
    np.testing.assert_allclose(result.scores, result.objective_values[:, None] - values.T, rtol=1e-5, atol=1e-6)
    everything = attributor.replayed_values(RUN.queries, torch.ones(1, 6), engine=engine)
    np.testing.assert_array_equal(everything[0], result.objective_values)


def test_random_masks_and_regression(attributor, by_synset):
    first, same, other = (
        attributor.attribute(RUN.queries, engine="replay", num_masks=24, seed=seed) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first.scores, same.scores)
    assert (first.scores != other.scores).any()
    assert first.metadata["num_masks"] == 24
    centred = [scores - scores.mean(1, keepdims=True) for scores in (first.scores, by_synset.scores)]
    assert mean_spearman(*centred) > 0.7


def test_own_class_helps(by_synset):
    """Clusters 2k and 2k + 1 hold class k."""
    labels = np.asarray(RUN.queries["labels"])
    own = np.stack([by_synset.scores[q, 2 * labels[q] : 2 * labels[q] + 2] for q in range(12)])
    assert (own.mean(1) > by_synset.scores.mean(1)).all()


def test_objective_values_are_those_of_the_model(by_synset):
    with torch.no_grad():
        logits = RUN.model(RUN.queries[:]["pixel_values"]).logits
    labels = RUN.queries[:]["labels"]
    p = logits.double().softmax(-1).gather(-1, labels[:, None])[:, 0]
    np.testing.assert_allclose(by_synset.objective_values, torch.log(p / (1 - p)), rtol=1e-4)


def test_queries_without_labels_explain_the_prediction(attributor):
    with torch.no_grad():
        predicted = RUN.model(RUN.queries[:]["pixel_values"]).logits.argmax(-1)
    without = RUN.queries.remove_columns("labels")
    named = without.add_column("labels", predicted.numpy())
    np.testing.assert_array_equal(attributor.attribute(without).scores, attributor.attribute(named).scores)


def test_queries_do_not_influence_each_other(attributor, by_synset):
    alone = attributor.attribute([RUN.queries[5]], engine="adjoint")
    np.testing.assert_allclose(alone.scores[0], by_synset.scores[5], rtol=1e-4, atol=1e-5)


def test_objectives_over_a_set_have_one_value(attributor):
    loss = attributor.attribute(RUN.queries, objective="mean_loss", engine="adjoint")
    assert loss.scores.shape == (1, 6)
    assert loss.query_ids == ["mean_loss 0"]
    each = attributor.attribute(RUN.queries, objective="loss", engine="adjoint")
    np.testing.assert_allclose(loss.scores[0], each.scores.mean(0), rtol=1e-3, atol=1e-5)


def test_accuracy_needs_replay(attributor):
    with pytest.raises(ValueError, match="'accuracy' is not differentiable"):
        attributor.attribute(RUN.queries, objective="accuracy", engine="adjoint")
    for engine in ("linearized_replay", "replay"):
        result = attributor.attribute(RUN.queries, objective="accuracy", engine=engine)
        assert result.scores.shape == (1, 6)
        assert np.allclose(result.scores * 12, np.round(result.scores * 12), atol=1e-5)
    assert attributor.attribute(RUN.queries, objective="accuracy", rows=RUN.train_dataset).row_scores is None


def test_an_objective_of_ones_own(attributor, by_synset):
    log_odds = Objective("mine", lambda f, q: f(q.inputs).log_softmax(-1)[torch.arange(len(q)), q.labels])
    named = attributor.attribute(RUN.queries, objective="log_probability")
    own = attributor.attribute(RUN.queries, objective=log_odds)
    np.testing.assert_allclose(own.scores, named.scores, rtol=1e-3, atol=1e-6)
    assert own.objective == "mine"


def test_query_ids_are_kept(attributor):
    result = attributor.attribute(RUN.queries.select([3, 1]), query_ids=["c", "a"])
    assert result.query_ids == ["c", "a"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"engine": "magic"}, ValueError, "Unknown engine 'magic'. Use one of linearized_replay, adjoint, replay"),
        (
            {"engine": "responses", "rows": RUN.train_dataset},
            ValueError,
            "`rows` are for engines linearized_replay, adjoint, replay and training_on, got 'responses'",
        ),
        ({"engine": "adjoint", "num_masks": 5}, ValueError, "`num_masks` = 5 is for replay engines"),
        ({"engine": "replay", "num_masks": 1}, ValueError, "`num_masks` must be at least 2, got 1"),
        ({"engine": "training_on"}, ValueError, "`engine='training_on'` needs the training dataset"),
        ({"rewind": 1.0}, ValueError, "`rewind` must be"),
        ({"objective": "f1"}, ValueError, "Unknown objective 'f1'"),
        ({"rows": RUN.train_dataset.select(range(40))}, ValueError, "40"),
        ({"rows": RUN.train_dataset.select(range(47, -1, -1))}, ValueError, "other rows or another order"),
        ({"rows": []}, ValueError, "empty"),
        ({"queries": []}, ValueError, "`queries` is empty"),
        ({"queries": IterableDataset.from_generator(lambda: iter([]))}, TypeError, "`queries` must be a map-style"),
        ({"queries": [{"pixel_values": torch.zeros(1, 4, 4), "labels": 3}]}, ValueError, "Label 3 is out of range"),
        (
            {"queries": [{"pixel_values": torch.full((1, 4, 4), np.nan), "labels": 0}]},
            ValueError,
            r"`queries` has NaN",
        ),
        ({"queries": [{"labels": 0}]}, TypeError, "pixel_values"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_requests_are_refused(attributor, options, error, message):
    queries = options.pop("queries", RUN.queries)
    with pytest.raises(error, match=message):
        attributor.attribute(queries, **options)


@pytest.mark.parametrize("engine", ["adjoint", "linearized_replay", "replay"])
def test_works_where_gradients_are_switched_off(attributor, engine):
    expected = attributor.attribute(RUN.queries, engine=engine).scores
    with torch.no_grad():
        np.testing.assert_array_equal(attributor.attribute(RUN.queries, engine=engine).scores, expected)


def test_a_synset_that_matches_nothing_is_told(caplog):
    """One cluster without a match is no reason; most of them are."""
    synset = tiny_synset()
    for bad, messages in ((1, 0), (4, 1)):
        residuals = synset.residuals.clone()
        residuals[2, :bad] = 3.0
        Attributor(RUN.model, dataclasses.replace(synset, residuals=residuals), disable_tqdm=True).attribute(
            RUN.queries
        )
        assert sum("synthetic samples of most clusters" in message for message in caplog.messages) == messages
    assert "At recorded step 29 the synthetic samples of most clusters" in caplog.text


def test_nothing_is_told_of_samples_that_nothing_depends_on(caplog):
    unmatched = torch.full_like(tiny_synset().residuals, 3.0)
    Attributor(RUN.model, dataclasses.replace(tiny_synset(), residuals=unmatched), rows=RUN.train_dataset)
    with_responses = dataclasses.replace(tiny_synset(responses="int8"), residuals=unmatched)
    assert with_responses.responses is not None
    Attributor(RUN.model, with_responses)
    assert not caplog.messages


def test_a_late_rewind_still_gives_scores(attributor):
    for engine in ("adjoint", "linearized_replay", "replay"):
        assert attributor.attribute(RUN.queries, engine=engine, rewind=0.999).scores.any()


def test_another_input_is_refused():
    class Renamed(TinyModel):
        main_input_name = "image"

        def forward(self, image, labels=None):
            return super().forward(image, labels)

    model = Renamed(TinyConfig(num_labels=3))
    model.load_state_dict(RUN.model.state_dict())
    with pytest.raises(ValueError, match="samples are `pixel_values`, the model takes `image`"):
        Attributor(model, tiny_synset())


def test_model_without_is_a_usable_model_of_the_same_class(tmp_path):
    run = vit_run()
    attributor = Attributor(run.model, run.synset, disable_tqdm=True)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    changed = attributor.model_without([0])
    assert type(changed) is type(run.model)
    assert not changed.training
    assert changed.config._attn_implementation == "sdpa"
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())
    assert any(not torch.equal(value, before[name]) for name, value in changed.state_dict().items())
    changed.save_pretrained(tmp_path)
    loaded = type(run.model).from_pretrained(tmp_path).eval()
    pixels = run.queries[:]["pixel_values"]
    assert torch.equal(loaded(pixels).logits, changed(pixels).logits)


@pytest.mark.parametrize("engine", ["replay", "training_on"])
def test_model_without_is_what_replay_scores(attributor, engine):
    options = {"engine": engine, "rows": RUN.train_dataset}
    result = attributor.attribute(RUN.queries, objective="loss", **options)
    everything = result.objective_values
    if engine == "training_on":
        everything = attributor.replayed_values(RUN.queries, torch.ones(1, 6), objective="loss", **options)[0]
    with torch.no_grad():
        model = attributor.model_without("class 1, first half", **options)
        logits = model(RUN.queries[:]["pixel_values"]).logits
    without = torch.nn.functional.cross_entropy(logits, RUN.queries[:]["labels"], reduction="none")
    np.testing.assert_allclose(result.scores[:, 2], everything - without.numpy(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("rows", [None, RUN.train_dataset], ids=["synset", "rows"])
def test_model_without_is_moved_as_linearised_replay_says(attributor, rows):
    logits = Objective("logits", lambda forward, queries: forward(queries.inputs).flatten(), differentiable=False)
    mask = torch.tensor([[1.0, 1, 0, 1, 1, 1]])
    expected = attributor.replayed_values(RUN.queries, mask, objective=logits, rows=rows)[0]
    with torch.no_grad():
        found = attributor.model_without([2], rows=rows)(RUN.queries[:]["pixel_values"]).logits.flatten()
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_clusters_are_named_or_numbered(attributor):
    names = RUN.clusters.names
    variants = [[2, 0], [names[0], names[2]], (names[2], 0, 0), np.array([0, 2])]
    states = [attributor.model_without(variant).state_dict() for variant in variants]
    for state in states[1:]:
        assert all(torch.equal(state[name], value) for name, value in states[0].items())


def test_clusters_that_are_not_there_are_refused(attributor):
    with pytest.raises(KeyError, match="class 9"):
        attributor.model_without(["class 9, first half"])
    with pytest.raises(IndexError, match="6"):
        attributor.model_without([6])
    for clusters in ([], range(6)):
        with pytest.raises(ValueError, match="of 6 clusters are to be removed"):
            attributor.model_without(clusters)


def test_an_objective_without_gradient_is_refused_by_the_adjoint():
    run = tiny_recorded_run()
    attributor = Attributor(run.model, tiny_synset(), disable_tqdm=True)
    hits = Objective("hits", lambda forward, queries: (forward(queries.inputs).argmax(-1) == queries.labels).float())
    with pytest.raises(ValueError, match="gradient of zero everywhere.*linearized_replay"):
        attributor.attribute(run.queries, objective=hits, engine="adjoint")
    assert attributor.attribute(run.queries, objective=hits, engine="replay").scores.shape == (12, 6)
