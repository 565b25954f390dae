"""Scores in detail add up to scores: the diagonal of a matrix, sums over tokens and over modules."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_rgm import Attributor, ClusterMap, Objective
from hf_rgm.engines import recorded_run
from hf_rgm.engines.adjoint import AdjointEngine
from hf_rgm.engines.details import module_of, one_label_each
from hf_rgm.engines.objectives import Queries
from hf_rgm.engines.request import Evaluation, Request
from hf_rgm.testing import tiny_recorded_run, tiny_synset
from tests.text import language_model, tagger, texts
from tests.training import recorded_model

CLOSE = {"rtol": 2e-4, "atol": 2e-6}
"""Float32 sums in another order."""

RUN = tiny_recorded_run()


def tiny(**changes):
    known = {"trajectory": RUN.trajectory, "rows": RUN.train_dataset, "clusters": RUN.clusters, **changes}
    return Attributor(RUN.model, **known, disable_tqdm=True)


@pytest.fixture(params=["tags", "text"], scope="module")
def of_texts(request, tmp_path_factory):
    """An attributor of texts with a label for each token, and queries."""
    folder, rows = tmp_path_factory.mktemp("run"), texts(labels=request.param)
    make = {"tags": tagger, "text": language_model}[request.param]
    model = recorded_model(make("gpt2" if request.param == "text" else "bert"), rows, folder, num_states=4)
    clusters = ClusterMap.from_ids(np.arange(24) % 3)
    known = {"trajectory": folder / "trajectory", "rows": rows, "clusters": clusters, "disable_tqdm": True}
    return Attributor(model, **known), texts(4, labels=request.param, seed=1)


@pytest.mark.parametrize("options", [{}, {"objective": "margin", "rewind": 0.5}])
@pytest.mark.parametrize("at_once", [7, 1000])
def test_self_influence_is_the_diagonal(options, at_once, monkeypatch):
    monkeypatch.setattr(AdjointEngine, "queries_at_once", at_once)
    asked = tiny(trajectory=[RUN.trajectory, tiny_recorded_run(1).trajectory])
    whole = asked.attribute(RUN.train_dataset, engine="adjoint", **{"objective": "loss", **options})
    found = asked.self_influence(**options)
    np.testing.assert_allclose(found, np.diagonal(whole.row_scores), **CLOSE)
    assert found.shape == (48,) and found.dtype == np.float32
    assert (found < 0).mean() > 0.9 if not options else (found > 0).mean() > 0.9


def test_nearest_rows_have_the_gradients_most_alike():
    asked = tiny()
    [first, *_] = found = asked.nearest_rows(RUN.queries, 5)
    assert len(found) == len(RUN.queries) and list(first) == ["row", "similarity", "cluster"]

    def gradient(row, sign):
        logits = RUN.model(pixel_values=row["pixel_values"][None]).logits[0]
        margin = logits[row["labels"]] - torch.cat([logits[: row["labels"]], logits[row["labels"] + 1 :]]).logsumexp(0)
        value = margin if sign > 0 else -torch.nn.functional.cross_entropy(logits, row["labels"])
        return torch.cat([part.flatten() for part in torch.autograd.grad(value, list(RUN.model.parameters()))])

    of_rows = torch.stack([gradient(row, -1) for row in RUN.train_dataset])
    for query, frame in zip(RUN.queries, found, strict=True):
        cosines = torch.nn.functional.cosine_similarity(gradient(query, 1)[None], of_rows).numpy()
        np.testing.assert_allclose(frame["similarity"], np.sort(cosines)[::-1][:5], **CLOSE)
        np.testing.assert_allclose(cosines[frame["row"]], frame["similarity"], **CLOSE)
        assert list(frame["cluster"]) == [RUN.clusters.names[RUN.clusters.cluster_ids[row]] for row in frame["row"]]
    with pytest.raises(ValueError, match="`k` must be at least 1, got 0"):
        asked.nearest_rows(RUN.queries, 0)


def test_self_influence_of_texts_is_the_diagonal_too(of_texts):
    asked, _ = of_texts
    whole = asked.attribute(asked.rows, engine="adjoint", objective="loss")
    np.testing.assert_allclose(asked.self_influence(), np.diagonal(whole.row_scores), **CLOSE)


def test_self_influence_needs_rows_and_an_objective_of_each_query():
    with pytest.raises(ValueError, match="Pass the training dataset as `rows`"):
        Attributor(RUN.model, tiny_synset(), disable_tqdm=True).self_influence()
    for objective in ("mean_loss", "accuracy"):
        with pytest.raises(ValueError, match=f"'{objective}' is not one of each query by itself"):
            tiny().self_influence(objective=objective)


@pytest.mark.parametrize("row", [0, 2, 5])
def test_tokens_of_a_row_add_up_to_its_scores(of_texts, row):
    asked, queries = of_texts
    whole = asked.attribute(queries, engine="adjoint")
    found = asked.token_scores(queries, row)
    np.testing.assert_allclose(found.sum(1), whole.row_scores[:, row], **CLOSE)
    length = int(asked.rows[row]["attention_mask"].sum())
    assert found.shape == (4, 6) and not found[:, length:].any()
    assert np.abs(found[:, 1:length]).min() > 0


def test_each_token_of_a_row_has_the_derivative_of_its_own_loss(of_texts):
    asked, queries = of_texts
    (run,) = asked._runs(None, None)
    engine, row, objective = AdjointEngine(run), 3, Objective("first", lambda f, q: f(q.inputs)[:, 0, :2].sum(-1))
    own = Evaluation(run, Request(objective, asked._request(queries, None, "margin").queries))
    directions = engine.directions(own.gradients(engine.form)(range(4)), engine.rewind)
    inputs, labels = run.rows.reader.batch([row])
    found, shift = asked.token_scores(queries, row, objective=objective), int(asked.model.shifts_labels)
    for position in range(6 - shift):
        expected = torch.zeros(4)
        for state, direction in directions.items():
            parameters = run.path(engine.rewind).state(state).clone().requires_grad_()
            logits = run.model.logits(run.model.space.unflatten(parameters), inputs)
            loss = torch.nn.functional.cross_entropy(logits[0, position], labels[0, position], reduction="sum")
            (gradient,) = torch.autograd.grad(loss * run.rows.row_loss.label_weight / 24, parameters)
            expected += direction @ gradient
        np.testing.assert_allclose(found[:, position + shift], expected, **CLOSE)


@pytest.mark.parametrize("engine", [None, "adjoint"])
def test_tokens_of_queries_explain_them_by_their_mean(of_texts, engine):
    asked, queries = of_texts
    whole = asked.attribute(queries, engine=engine)
    single = asked.attribute(queries, engine=engine, per_token=True, query_ids=list("abcd"))
    owners = np.array([name[0] for name in single.query_ids])
    for index, query in enumerate("abcd"):
        for name in ("scores", "row_scores", "objective_values"):
            mean = getattr(single, name)[owners == query].mean(0)
            np.testing.assert_allclose(mean, getattr(whole, name)[index], **CLOSE)
    first = asked.attribute(queries.select([1]), engine=engine, per_token=True)
    known = range(1 if asked.model.shifts_labels else 0, 5)  # the second row has five tokens
    assert list(first.query_ids) == [
        f"token {position}" for position in known if f"b, token {position}" in single.query_ids
    ]
    assert len(first.query_ids) == len(known)


def test_tokens_are_refused_where_there_are_none(of_texts):
    with pytest.raises(ValueError, match="needs queries with labels of tokens.*shape .12,. and 'margin'"):
        tiny().attribute(RUN.queries, per_token=True)
    with pytest.raises(ValueError, match="and 'mean_loss'"):
        of_texts[0].attribute(of_texts[1], per_token=True, objective="mean_loss")
    with pytest.raises(ValueError, match="Rows have one label each"):
        tiny().token_scores(RUN.queries, 0)
    with pytest.raises(IndexError, match="no row 48"):
        tiny().token_scores(RUN.queries, 48)
    with pytest.raises(ValueError, match="need not be a sum over tokens"):
        tiny(row_loss=lambda logits, labels: logits.sum(-1), force=True).token_scores(RUN.queries, 0)


def test_one_label_each():
    labels = torch.tensor([[4, -100, 5], [-100, -100, -100], [-100, 6, -100]])
    single, places = one_label_each(Queries({"input_ids": torch.arange(3)}, labels))
    assert single.inputs["input_ids"].tolist() == [0, 0, 2]
    assert single.labels.tolist() == [[4, -100, -100], [-100, -100, 5], [-100, 6, -100]]
    assert places.tolist() == [[0, 0], [0, 2], [2, 1]]


@pytest.mark.parametrize("at_once", [5, 1000])
def test_modules_add_up_to_the_scores(of_texts, at_once, monkeypatch):
    monkeypatch.setattr(AdjointEngine, "queries_at_once", at_once)
    for asked, queries in (of_texts, (tiny(), RUN.queries), (tiny_by_synset(), RUN.queries)):
        whole, found = asked.attribute(queries, engine="adjoint"), asked.module_scores(queries)
        assert len(found) > 1 and all(np.abs(part).max() > 0 for part in found.values())
        np.testing.assert_allclose(sum(found.values()), whole.scores, **CLOSE)


def tiny_by_synset():
    return Attributor(RUN.model, tiny_synset(), disable_tqdm=True)


def test_a_module_is_what_its_parameters_alone_give():
    """Without the hidden layer's parameters in the contraction, those of the classifier are left."""
    found, (run,) = tiny().module_scores(RUN.queries), tiny()._runs(None, None)
    assert [*found] == ["hidden", "classifier"]
    engine = AdjointEngine(run)
    own = Evaluation(
        run, Request(Objective("margin", tiny_margin), tiny()._request(RUN.queries, None, "margin").queries)
    )
    directions = engine.directions(own.gradients(engine.form)(range(12)), engine.rewind)
    of_clusters, start = engine.gradients(engine.rewind), 16 * 8 + 8
    expected = sum(own[:, start:] @ of_clusters(state, range(6))[:, start:].T for state, own in directions.items())
    np.testing.assert_allclose(found["classifier"], expected, **CLOSE)


def tiny_margin(forward, queries):
    logits = forward(queries.inputs)
    others = logits.masked_fill(torch.nn.functional.one_hot(queries.labels, 3).bool(), -torch.inf)
    return logits.gather(1, queries.labels[:, None])[:, 0] - others.logsumexp(1)


def test_modules_cannot_be_told_apart_in_short(monkeypatch):
    monkeypatch.setattr(recorded_run, "SKETCH_LENGTH", 64)
    monkeypatch.setattr(recorded_run, "ENOUGH_ROWS", 10**9)
    with pytest.raises(ValueError, match="held in short, in which modules cannot be told"):
        tiny().module_scores(RUN.queries)
    whole = tiny().attribute(RUN.train_dataset, engine="adjoint", objective="loss")
    found = tiny().self_influence()
    np.testing.assert_allclose(found, np.diagonal(whole.row_scores), rtol=0.05, atol=1e-4)  # kept in bfloat16 there


def test_names_of_modules():
    names = {
        "bert.encoder.layer.3.attention.self.query.lora_A.default.weight": "bert.encoder.layer.3",
        "bert.embeddings.word_embeddings.weight": "bert.embeddings.word_embeddings",
        "classifier.bias": "classifier",
        "0.weight": "0",
        "scale": "scale",
    }
    assert {name: module_of(name) for name in names} == names
