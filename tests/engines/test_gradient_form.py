"""Gradients in short against whole ones."""

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import hf_rgm.engines.recorded_run as run_module
from hf_rgm import Attributor
from hf_rgm.engines.adjoint import AdjointEngine
from hf_rgm.engines.gradient_form import SketchedGradients, WholeGradients
from hf_rgm.engines.linear import LinearEngine
from hf_rgm.model.functional_model import FunctionalModel
from hf_rgm.testing import tiny_recorded_run
from tests.engines.parts import FLOAT_TOLERANCE, MASKS, flat, row_run, sample_run
from tests.recorded import TinyNet, record

RUN = tiny_recorded_run()


@pytest.fixture
def in_short(monkeypatch):
    """Even small models are followed in short, in so many buckets."""

    def set_length(length):
        monkeypatch.setattr(run_module, "ENOUGH_ROWS", 10**12)
        monkeypatch.setattr(run_module, "SKETCH_LENGTH", length)

    return set_length


def test_whole_gradients_are_those_of_the_parameter_space():
    run = sample_run(record("sgd"))
    form = WholeGradients(run.model.space)
    named = run.model.space.unflatten(run.final)
    assert torch.equal(form(named), run.final) and form.length == len(run.final)
    assert form == WholeGradients(run.model.space)


@pytest.mark.parametrize("optimizer", ["sgd", "nesterov"])
@pytest.mark.parametrize("make", [sample_run, row_run], ids=["samples", "rows"])
def test_with_a_bucket_for_every_parameter_nothing_is_lost(optimizer, make):
    """The preconditioner of SGD is the same in all segments, up to a factor."""
    recorded = record(optimizer, model_class=TinyNet)
    whole, short = make(recorded), make(recorded)
    short.form = SketchedGradients(short.model, short.path(0.0), short.model.num_parameters + 7)
    queries = torch.randn(3, whole.model.num_parameters, generator=torch.Generator().manual_seed(0))
    named = short.model.space.unflatten(queries)
    changes = LinearEngine(whole).replay(MASKS, 0.0) @ queries.T
    torch.testing.assert_close(
        LinearEngine(short).replay(MASKS, 0.0) @ short.form(named).T, changes, rtol=1e-4, atol=FLOAT_TOLERANCE
    )
    expected = AdjointEngine(whole).cluster_scores(queries, 0.0)
    torch.testing.assert_close(
        AdjointEngine(short).cluster_scores(short.form(named), 0.0), expected, rtol=1e-4, atol=FLOAT_TOLERANCE
    )


def test_adam_s_preconditioner_is_shared_by_all_segments():
    """What is lost by that is little: its elements change much less than they differ."""
    recorded = record("adamw", model_class=TinyNet)
    whole, short = row_run(recorded), row_run(recorded)
    short.form = SketchedGradients(short.model, short.path(0.0), short.model.num_parameters)
    queries = torch.randn(6, whole.model.num_parameters, generator=torch.Generator().manual_seed(0))
    named = short.model.space.unflatten(queries)
    expected = AdjointEngine(whole).cluster_scores(queries, 0.3)
    found = AdjointEngine(short).cluster_scores(short.form(named), 0.3)
    assert (found - expected).norm() < 0.2 * expected.norm()
    assert (found - expected).norm() > 1e-4 * expected.norm()  # or nothing was shared


def test_inner_products_are_kept_on_average():
    run = sample_run(record("sgd"))
    one, other = torch.randn(2, run.model.num_parameters, generator=torch.Generator().manual_seed(0))
    found = []
    for seed in range(400):
        form = SketchedGradients(run.model, run.path(0.0), 5, seed=seed)
        a, b = form(run.model.space.unflatten(torch.stack([one, other])))
        assert a.shape == (5,)
        found.append(a @ b / form._metric[0])
    found = torch.stack(found)
    error = found.std() / len(found) ** 0.5
    assert abs(found.mean() - one @ other) < 4 * error


def test_what_never_moved_is_left_out():
    recorded = record("adamw")
    run = sample_run(recorded)
    form = SketchedGradients(run.model, run.path(0.0), 64)
    form._metric[:] = 0
    form._metric[-1] = 4.0
    gradient = torch.ones(run.model.num_parameters)
    assert form(run.model.space.unflatten(gradient)).abs().sum() == 2


def small_bert():
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=50,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
            max_position_embeddings=12,
        )
    )


def test_some_rows_of_an_embedding_stand_for_all():
    name = "bert.embeddings.word_embeddings.weight"
    model = FunctionalModel(small_bert())
    ids = torch.tensor([[3, 7, 9, 48], [0, 7, 7, 2]])
    rows = torch.tensor([3, 7, 9])
    whole = model.parameters()
    expected = model.logits(whole, {"input_ids": ids})
    gradients = torch.func.grad(lambda p: model.logits(p, {"input_ids": ids}).square().sum())(whole)
    assert model.give_rows(name, rows)
    some = {**whole, name: whole[name][rows]}
    torch.testing.assert_close(model.logits(some, {"input_ids": ids}), expected)
    found = torch.func.grad(lambda p: model.logits(p, {"input_ids": ids}).square().sum())(some)
    torch.testing.assert_close(found[name], gradients[name][rows])
    torch.testing.assert_close(found["classifier.weight"], gradients["classifier.weight"])
    torch.testing.assert_close(model.logits(whole, {"input_ids": ids}), expected)


def test_what_is_no_embedding_or_used_elsewhere_is_given_whole():
    model = FunctionalModel(small_bert())
    assert not model.give_rows("classifier.weight", torch.tensor([0]))

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, features):
            return self.head(self.embed(features).mean(1))

    assert not FunctionalModel(Tied()).give_rows("embed.weight", torch.tensor([0]))


class TestAttribution:
    @pytest.fixture
    def attributor(self):
        return Attributor(
            RUN.model, trajectory=RUN.trajectory, rows=RUN.train_dataset, clusters=RUN.clusters, disable_tqdm=True
        )

    def test_scores_are_those_of_whole_gradients(self, attributor, in_short):
        expected = attributor.attribute(RUN.queries, rewind=0.3)
        in_short(100)
        short = Attributor(
            RUN.model, trajectory=RUN.trajectory, rows=RUN.train_dataset, clusters=RUN.clusters, disable_tqdm=True
        )
        found = short.attribute(RUN.queries, rewind=0.3)
        for one, other in ((found.scores, expected.scores), (found.row_scores, expected.row_scores)):
            assert spearmanr(one.ravel(), other.ravel())[0] > 0.9
        assert not short._runs(None, None)[0].form.is_whole
        assert found.metadata["drift"] == pytest.approx(expected.metadata["drift"], rel=0.4)

    def test_rows_are_scored_from_what_clusters_took(self, attributor, in_short, monkeypatch):
        in_short(100)
        found = attributor.attribute(RUN.queries)
        monkeypatch.setattr("hf_rgm.engines.row_scores.row_derivatives", lambda *_: pytest.fail("rows read again"))
        again = attributor.attribute(RUN.queries)
        assert (again.row_scores == found.row_scores).all()

    def test_rows_that_are_not_kept_are_scored_alike(self, attributor, in_short, monkeypatch):
        in_short(100)
        found = attributor.attribute(RUN.queries)
        other = Attributor(
            RUN.model, trajectory=RUN.trajectory, rows=RUN.train_dataset, clusters=RUN.clusters, disable_tqdm=True
        )
        monkeypatch.setattr("hf_rgm.engines.gradient_sources.RowSource.keeps_rows", lambda *_: False)
        again = other.attribute(RUN.queries)
        assert spearmanr(again.row_scores.ravel(), found.row_scores.ravel())[0] > 0.99

    def test_there_are_no_models_but_by_training_on(self, attributor, in_short):
        in_short(64)
        with pytest.raises(ValueError, match='in short, .* Use `engine="training_on"`, or raise'):
            attributor.unlearn([0], engine="linearized_replay")
        assert attributor.unlearn([0]).engine == "training_on"

    def test_an_objective_without_gradient_is_refused(self, attributor, in_short):
        in_short(64)
        with pytest.raises(ValueError, match="'accuracy' has no gradient, and changes of"):
            attributor.attribute(RUN.queries, objective="accuracy")

    def test_an_estimate_is_given(self, attributor, in_short):
        in_short(64)
        assert attributor.estimate(RUN.queries).seconds > 0


def test_decay_through_adam_s_gradient_is_refused():
    run = sample_run(record("adam", model_class=TinyNet))
    form = SketchedGradients(run.model, run.path(0.0), 64)
    with pytest.raises(NotImplementedError, match="Weight decay of adam goes through the gradient"):
        form.segments(run.path(0.0))
    run.form = form
    with pytest.raises(NotImplementedError, match="Weight decay of adam"):  # before any row is read
        LinearEngine(run)


def test_flat_is_named_whole():
    run = sample_run(record("sgd"))
    assert torch.equal(run.form(run.form.named(flat(run, 3))), flat(run, 3))
