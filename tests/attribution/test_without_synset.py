"""Attribution by the recorded run, the training rows and their clusters, without a synset."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import pipeline

from hf_rgm import Attributor, ClusterMap, FidelityReport
from hf_rgm.engines import gradient_sources as sources
from hf_rgm.engines import recorded_run as run_module
from hf_rgm.exceptions import ParameterMismatchError
from hf_rgm.recording.callback import TrajectoryCallback
from hf_rgm.results.result import AttributionResult
from hf_rgm.testing import tiny_dataset, tiny_recorded_run, tiny_synset, tiny_trainer
from tests.vision import vit_run

RUN = tiny_recorded_run()
KNOWN = {"trajectory": RUN.trajectory, "rows": RUN.train_dataset, "clusters": RUN.clusters}


def attributor(**changes):
    return Attributor(RUN.model, **{**KNOWN, "disable_tqdm": True, **changes})


@pytest.fixture
def passes(monkeypatch):
    """How often the clusters' gradients were taken from the rows, and the curvature's rows at a state."""
    found = {"gradients": 0, "curvature": 0}
    gradients, rows = sources.cluster_gradients, run_module.curvature_rows

    def taken(*arguments, **options):
        found["gradients"] += 1
        return gradients(*arguments, **options)

    def made(*arguments, **options):
        found["curvature"] += 1
        return rows(*arguments, **options)

    monkeypatch.setattr(sources, "cluster_gradients", taken)
    monkeypatch.setattr(run_module, "curvature_rows", made)
    return found


@pytest.mark.parametrize("engine", [None, "linearized_replay", "adjoint"])
def test_scores_are_those_of_a_synset_with_rows(engine):
    """With the rows at hand gradients and curvature are theirs, so that the synset says nothing."""
    found = attributor().attribute(RUN.queries, engine=engine)
    expected = Attributor(RUN.model, tiny_synset(), disable_tqdm=True).attribute(
        RUN.queries, engine=engine, rows=RUN.train_dataset
    )
    np.testing.assert_array_equal(found.scores, expected.scores)
    np.testing.assert_array_equal(found.row_scores, expected.row_scores)
    assert found.engine == (engine or "linearized_replay")
    assert found.metadata["used_rows"] and found.metadata["parameters_sha256"] == tiny_synset().parameters_sha256


def test_several_runs_count_by_their_mean():
    both = [RUN.trajectory, tiny_recorded_run(1).trajectory]
    found = attributor(trajectory=both).attribute(RUN.queries)
    expected = Attributor(RUN.model, tiny_synset(2), disable_tqdm=True).attribute(RUN.queries, rows=RUN.train_dataset)
    np.testing.assert_array_equal(found.scores, expected.scores)
    assert found.metadata["num_runs"] == 2
    assert not np.array_equal(found.scores, attributor().attribute(RUN.queries).scores)


def test_a_folder_a_trajectory_and_a_list_of_one_are_the_same():
    expected = attributor().attribute(RUN.queries).scores
    for trajectory in (RUN.trajectory.folder, str(RUN.trajectory.folder), [RUN.trajectory]):
        np.testing.assert_array_equal(attributor(trajectory=trajectory).attribute(RUN.queries).scores, expected)


@pytest.mark.parametrize(
    ("missing", "named"),
    [(["rows"], "`rows`"), (["clusters"], "`clusters`"), (["trajectory", "rows"], "`trajectory`, `rows`")],
)
def test_each_missing_argument_is_named(missing, named):
    with pytest.raises(ValueError, match=f"missing: {named}. Pass `trajectory=`"):
        attributor(**dict.fromkeys(missing))
    with pytest.raises(ValueError, match="missing: `trajectory`, `rows`, `clusters`"):
        Attributor(RUN.model)


def test_a_synset_and_a_run_are_one_too_many():
    for name in ("trajectory", "clusters"):
        with pytest.raises(ValueError, match="The synset knows its recorded run and its clusters"):
            Attributor(RUN.model, tiny_synset(), **{name: KNOWN[name]})


def test_what_does_not_belong_together_is_refused_before_any_gradient(passes, tmp_path):
    other = tiny_trainer(tiny_dataset(48, seed=5), callbacks=[TrajectoryCallback(tmp_path / "other")])
    other.train()
    cases = [
        ({"rows": RUN.train_dataset.select(range(47, -1, -1))}, "other rows or another order"),
        ({"rows": RUN.train_dataset.select(range(40))}, "`rows` has 40 rows, but the clusters have 48"),
        ({"clusters": ClusterMap.from_ids([0, 1] * 20)}, "`rows` has 48 rows, but the clusters have 40"),
        ({"trajectory": tiny_recorded_run(1).trajectory}, "is not what the recorded run ended with"),
        ({"trajectory": [RUN.trajectory, tmp_path / "other"]}, "dataset"),
        ({"trajectory": []}, "`trajectory` is an empty list"),
        ({"max_memory": "7KB"}, "`max_memory='7KB'` is"),
    ]
    for changes, message in cases:
        with pytest.raises(ValueError, match=message):
            attributor(**changes)
    with pytest.raises(FileNotFoundError):
        attributor(trajectory=tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"leaves room for \d+ rows of curvature of 163 parameters"):
        attributor(max_memory="40KB").attribute(RUN.queries)
    assert passes == {"gradients": 0, "curvature": 0}


def test_a_model_that_was_not_recorded_is_taken_by_force():
    forced = Attributor(tiny_recorded_run(1).model, **KNOWN, force=True, disable_tqdm=True)
    assert np.isfinite(forced.attribute(RUN.queries).scores).all()
    assert issubclass(ParameterMismatchError, ValueError)


def test_engines_that_need_a_synset_say_so():
    with pytest.raises(ValueError, match="`engine='replay'` needs a synset"):
        attributor().attribute(RUN.queries, engine="replay")


def test_repeated_questions_read_the_rows_once(passes):
    asked = attributor()
    asked.attribute(RUN.queries)
    assert passes == {"gradients": 1, "curvature": 5}
    asked.attribute(RUN.queries, objective="loss", engine="adjoint")
    asked.replayed_values(RUN.queries, 1 - torch.eye(6))
    asked.unlearn([0])
    asked.suggest_mixture(RUN.queries)
    asked.attribute(RUN.queries, rewind=0.5)
    asked.attribute(RUN.queries, rows=RUN.train_dataset)
    assert passes == {"gradients": 1, "curvature": 5}


def test_scoring_rows_gives_the_gradients_of_many_clusters_too(monkeypatch):
    clusters, asked_for = ClusterMap.from_ids([i % 12 for i in range(48)]), []
    original = sources.cluster_gradients
    monkeypatch.setattr(
        sources, "cluster_gradients", lambda *a, **k: asked_for.append((len(a[1]), len(a[3]))) or original(*a, **k)
    )
    asked = attributor(clusters=clusters)
    found = asked.attribute(RUN.queries)
    halves = asked.replayed_values(RUN.queries, torch.eye(12))
    assert set(asked_for) == {(1, 1)}  # of the probes, one by one
    assert len(asked_for) == 4 * len(asked._runs(None, None)[0].segments(0.14))
    asked = attributor(clusters=clusters)
    run = asked._runs(None, None)[0]
    run.source.gradients(run.path(0.14), run.form)
    expected = asked.attribute(RUN.queries)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.row_scores, expected.row_scores, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(halves, asked.replayed_values(RUN.queries, torch.eye(12)), rtol=1e-4, atol=1e-5)


def test_rows_at_the_call_are_read_once_with_a_synset_too(passes):
    asked = Attributor(RUN.model, tiny_synset(), disable_tqdm=True)
    for _ in range(2):
        asked.attribute(RUN.queries, rows=RUN.train_dataset)
    assert passes["gradients"] == 1


def test_leave_one_out_is_with_minus_without_and_everything_is_the_model():
    asked = attributor()
    result = asked.attribute(RUN.queries)
    values = asked.replayed_values(RUN.queries, torch.cat([1 - torch.eye(6), torch.ones(1, 6)]))
    np.testing.assert_allclose(result.scores, result.objective_values[:, None] - values[:-1].T, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(values[-1], result.objective_values)


def test_unlearning_and_mixtures_do_without():
    asked = attributor()
    little, much = asked.unlearn([0]), asked.unlearn([0, 1])
    assert (little.engine, much.engine) == ("linearized_replay", "training_on")
    assert [check.what for check in little.checks] == ["removed rows", "the other training rows"]
    assert much.checks[0].loss_after > much.checks[0].loss_before
    suggestion = asked.suggest_mixture(RUN.queries)
    assert len(suggestion.weights) == 6 and suggestion.weights.max() > 1 > suggestion.weights.min()


def test_the_estimate_takes_the_rows():
    told = attributor().estimate(RUN.queries)
    with_synset = Attributor(RUN.model, tiny_synset(), disable_tqdm=True).estimate(RUN.queries)
    assert told.disk_bytes > with_synset.disk_bytes and told.seconds > 0


def test_scores_of_rows_go_to_a_folder_and_come_back(tmp_path):
    asked = attributor()
    result = asked.attribute(RUN.queries, output_dir=tmp_path / "scores")
    assert isinstance(result.row_scores.base, np.memmap)
    loaded = AttributionResult.from_pretrained(result.save_pretrained(tmp_path / "result"))
    np.testing.assert_array_equal(loaded.scores, result.scores)


def test_the_report_says_what_was_measured():
    report = FidelityReport.measure(
        attributor(), RUN.queries, tiny_trainer, RUN.train_dataset, budget=6, disable_tqdm=True
    )
    assert report.rows and report.samples_sha256 == ""
    assert "Agreement of the linearized_replay engine on the training rows with 6 retrainings" in str(report)
    assert FidelityReport.from_dict(report.to_dict()) == report


def test_the_pipeline_takes_them_too():
    found = vit_run()
    known = {"trajectory": found.trajectory, "rows": found.train_dataset, "clusters": found.synset.clusters}
    attribute = pipeline("data-attribution", model=found.model, **known, disable_tqdm=True)
    expected = Attributor(found.model, **known, disable_tqdm=True).attribute(found.queries)
    np.testing.assert_array_equal(attribute(found.queries).scores, expected.scores)
    np.testing.assert_array_equal(attribute(found.queries).row_scores, expected.row_scores)
    with pytest.raises(ValueError, match="works by the training rows, without a synset"):
        _ = attribute.synset


def test_a_pipeline_without_a_synset_saves_the_model_alone(tmp_path):
    attribute = pipeline("data-attribution", model=RUN.model, **KNOWN, disable_tqdm=True)
    attribute.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "config.json").is_file() and not (tmp_path / "model" / "synset").exists()
    with pytest.raises(ValueError, match="works by the training rows, without a synset"):
        attribute.push_to_hub("me/synset")
