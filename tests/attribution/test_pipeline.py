from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from datasets import IterableDataset
from transformers import pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from hf_rgm.attribution.attributor import Attributor
from hf_rgm.attribution.pipeline import TASK, AttributionPipeline, register
from hf_rgm.exceptions import ParameterMismatchError
from hf_rgm.testing import tiny_recorded_run, tiny_synset
from tests.vision import vit, vit_run

RUN = tiny_recorded_run()


@pytest.fixture(scope="module")
def attribute():
    return pipeline("data-attribution", model=RUN.model, synset=tiny_synset(), disable_tqdm=True)


@pytest.fixture(scope="module")
def expected():
    return Attributor(RUN.model, tiny_synset(), disable_tqdm=True).attribute(RUN.queries)


def test_registered_once():
    before = list(PIPELINE_REGISTRY.get_supported_tasks())
    register()
    register()
    assert list(PIPELINE_REGISTRY.get_supported_tasks()) == before
    assert before.count(TASK) == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda q: q,
        list,
        lambda q: (row for row in q),
        lambda q: [{**row, "pixel_values": row["pixel_values"].tolist()} for row in q],
        lambda q: q.with_format(None),
    ],
    ids=["dataset", "list", "generator", "plain lists", "plain dataset"],
)
def test_every_kind_of_queries_gives_the_same_scores(attribute, expected, make):
    assert isinstance(attribute, AttributionPipeline)
    np.testing.assert_allclose(attribute(make(RUN.queries)).scores, expected.scores, rtol=1e-6)


def test_one_query_alone(attribute, expected):
    result = attribute(RUN.queries[4])
    np.testing.assert_allclose(result.scores, expected.scores[4:5], rtol=1e-4, atol=1e-5)


def test_a_batch_size_changes_nothing(attribute, expected):
    np.testing.assert_array_equal(attribute(RUN.queries, batch_size=2, num_workers=0).scores, expected.scores)


def test_options_at_the_call_and_at_construction(attribute):
    called = attribute(RUN.queries, engine="replay", objective="loss", rewind=0.5)
    built = pipeline(
        "data-attribution",
        model=RUN.model,
        synset=tiny_synset(),
        engine="replay",
        objective="loss",
        rewind=0.1,
        batch_size=2,
        disable_tqdm=True,
    )
    assert built(RUN.queries).engine == "replay"
    np.testing.assert_array_equal(built(RUN.queries, rewind=0.5).scores, called.scores)
    assert attribute(RUN.queries).engine == "linearized_replay"


def test_model_and_synset_from_folders(tmp_path):
    run = vit_run()
    run.model.save_pretrained(tmp_path / "model")
    run.synset.save_pretrained(tmp_path / "synset")
    attribute = pipeline(
        "data-attribution", model=str(tmp_path / "model"), synset=tmp_path / "synset", disable_tqdm=True
    )
    assert type(attribute.model) is type(run.model)
    direct = Attributor(run.model, run.synset, disable_tqdm=True).attribute(run.queries)
    np.testing.assert_allclose(attribute(run.queries).scores, direct.scores, rtol=1e-5, atol=1e-7)
    assert attribute.synset.clusters == run.synset.clusters
    assert type(attribute.model_without(["label=0" if "label=0" in attribute.synset.clusters.names else 0])) is type(
        run.model
    )


def test_another_model_is_refused(tmp_path):
    vit(seed=1).save_pretrained(tmp_path)
    with pytest.raises(ParameterMismatchError):
        pipeline("data-attribution", model=str(tmp_path), synset=vit_run().synset)


def test_a_plain_module_is_refused_with_the_way_out():
    with pytest.raises(TypeError, match=r"Linear is a plain module. Use `hf_rgm.Attributor\(model, ...\)`"):
        pipeline(TASK, model=torch.nn.Linear(2, 2), synset=tiny_synset())


def test_streaming_queries_are_refused_with_the_way_out(attribute):
    stream = IterableDataset.from_generator(lambda: iter(list(RUN.queries)))
    with pytest.raises(TypeError, match="`queries` must be a map-style dataset.*from_list"):
        attribute(stream)


def test_unknown_options_are_refused(attribute):
    with pytest.raises(TypeError, match="temperature"):
        attribute(RUN.queries, temperature=1)


def test_top_k_gives_a_list_for_each_query(attribute, expected):
    found = attribute(RUN.queries, top_k=2)
    assert len(found) == 12
    for query, entries in enumerate(found):
        scores = expected.scores[query]
        order = np.argsort(-np.abs(scores))[:2]
        assert [entry["cluster"] for entry in entries] == [expected.cluster_names[k] for k in order]
        np.testing.assert_allclose([entry["score"] for entry in entries], scores[order], rtol=1e-6)
        assert {entry["size"] for entry in entries} == {8}
    with pytest.raises(ValueError, match="`top_k` must be at least 1, got 0"):
        attribute(RUN.queries, top_k=0)


def test_saved_it_loads_without_trusting_any_code(tmp_path):
    run = vit_run()
    attribute = pipeline("data-attribution", model=run.model, synset=run.synset, disable_tqdm=True)
    attribute.save_pretrained(tmp_path / "saved")
    assert not list((tmp_path / "saved").rglob("*.py"))
    assert "custom_pipelines" not in (tmp_path / "saved" / "config.json").read_text()
    again = pipeline(
        "data-attribution",
        model=str(tmp_path / "saved"),
        synset=str(tmp_path / "saved" / "synset"),
        disable_tqdm=True,
    )
    np.testing.assert_allclose(again(run.queries).scores, attribute(run.queries).scores, rtol=1e-5, atol=1e-7)


def test_device_and_dtype_reach_the_model(tmp_path):
    run = vit_run()
    run.model.save_pretrained(tmp_path / "model")
    load = partial(pipeline, "data-attribution", model=str(tmp_path / "model"), synset=run.synset, disable_tqdm=True)
    attribute = load(device="cpu", dtype="float32")
    assert {parameter.dtype for parameter in attribute.model.parameters()} == {torch.float32}
    assert attribute.device.type == attribute.attributor.model.device.type == "cpu"
    with pytest.raises(ParameterMismatchError, match="in the dtype they were trained in"):
        load(dtype=torch.bfloat16)
    forced = load(dtype=torch.bfloat16, force=True)
    near = load()(run.queries).scores
    np.testing.assert_allclose(forced(run.queries).scores, near, rtol=0.2, atol=0.05 * np.abs(near).max())
