"""One synset for several recorded runs."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from hf_rgm import Attributor, DistillationConfig, ReverseGradientMatchingDistiller, Synset, Trajectory
from hf_rgm.recording.callback import TrajectoryCallback
from hf_rgm.synset.matched_states import MatchedState, matched_states
from hf_rgm.synset.samples import SynsetGradients
from hf_rgm.testing import tiny_dataset, tiny_recorded_run, tiny_synset, tiny_trainer

RUN, OTHER = tiny_recorded_run(0), tiny_recorded_run(1)


def distiller(trajectories, **settings):
    return ReverseGradientMatchingDistiller(
        RUN.model, trajectories, RUN.train_dataset, RUN.clusters, disable_tqdm=True, **settings
    )


@pytest.fixture(scope="module")
def shared():
    return tiny_synset(2)


def test_states_are_in_training_order_with_all_final_ones_last():
    states = matched_states([RUN.trajectory, OTHER.trajectory], RUN.clusters)
    steps = [step for step in RUN.trajectory.state_steps if step > 0]
    assert states == tuple(MatchedState(run, step) for step in steps for run in (0, 1))
    assert str(states[-1]) == "recorded step 48 of run 1" and str(states[-2]) == "recorded step 48"


def test_both_runs_are_matched(shared):
    assert shared.residuals.shape == (10, 6)
    for run in (0, 1):
        mine = [index for index, state in enumerate(shared.matched_states) if state.run == run]
        assert shared.residuals[mine].mean() < 0.1
    assert tiny_synset().residuals.mean() < 0.1


def test_saved_and_loaded(shared, tmp_path):
    loaded = Synset.from_pretrained(shared.save_pretrained(tmp_path / "synset"))
    assert loaded.matched_states == shared.matched_states
    assert len(loaded.trajectories) == 2
    for before, after in zip(shared.trajectories, loaded.trajectories, strict=True):
        for name, value in before.final.parameters.items():
            assert torch.equal(value, after.final.parameters[name])


@pytest.mark.parametrize("options", [{}, {"engine": "adjoint"}, {"engine": "replay"}, {"rows": RUN.train_dataset}])
def test_scores_are_the_mean_over_the_runs(shared, options):
    """The same samples along each run alone, by a synset that knows only that run."""
    both = Attributor(RUN.model, shared, disable_tqdm=True).attribute(RUN.queries, **options)
    apart = [alone(shared, run).attribute(RUN.queries, **options) for run in (0, 1)]
    np.testing.assert_allclose(both.scores, (apart[0].scores + apart[1].scores) / 2, rtol=1e-4, atol=1e-6)
    assert not np.allclose(apart[0].scores, apart[1].scores, atol=1e-2)
    if both.row_scores is not None:
        expected = (apart[0].row_scores + apart[1].row_scores) / 2
        np.testing.assert_allclose(both.row_scores, expected, rtol=1e-4, atol=1e-6)
    assert both.metadata["num_runs"] == 2
    np.testing.assert_array_equal(both.objective_values, apart[0].objective_values)


def test_replayed_values_add_the_mean_change_to_the_models_own(shared):
    attributor = Attributor(RUN.model, shared, disable_tqdm=True)
    masks = torch.cat([torch.ones(1, 6), 1 - torch.eye(6)[:2]])
    values = attributor.replayed_values(RUN.queries, masks)
    own = attributor.attribute(RUN.queries).objective_values
    np.testing.assert_allclose(values[0], own, atol=1e-5)
    changes = [alone(shared, run).replayed_values(RUN.queries, masks) for run in (0, 1)]
    changes = [change[1:] - change[:1] for change in changes]
    np.testing.assert_allclose(values[1:], own + (changes[0] + changes[1]) / 2, rtol=1e-4, atol=1e-4)


def alone(shared, run):
    """An attributor of one run, on the shared samples."""
    recorded = (RUN, OTHER)[run]
    matched = [index for index, state in enumerate(shared.matched_states) if state.run == run]
    synset = Synset(
        samples=shared.samples,
        clusters=shared.clusters,
        trajectories=(shared.trajectories[run],),
        residuals=shared.residuals[matched],
        matched_states=tuple(MatchedState(0, shared.matched_states[index].step) for index in matched),
        parameters_sha256=shared.parameters_sha256,
        input_name=shared.input_name,
    )
    return Attributor(recorded.model, synset, force=True, disable_tqdm=True)


def test_the_same_run_twice_is_refused():
    with pytest.raises(ValueError, match="Runs 0 and 2 end at the same parameters"):
        distiller([RUN.trajectory, OTHER.trajectory, RUN.trajectory])


def test_no_run_is_refused():
    with pytest.raises(ValueError, match="`trajectory` is an empty list"):
        distiller([])


def test_the_first_run_must_be_the_models():
    with pytest.raises(ValueError, match="is not what the recorded run ended with"):
        distiller([OTHER.trajectory, RUN.trajectory])


def test_a_run_on_other_data_is_refused(tmp_path):
    other = tiny_trainer(tiny_dataset(48, seed=5), 1, callbacks=[TrajectoryCallback(tmp_path / "other")])
    other.train()
    with pytest.raises(ValueError, match="dataset"):
        distiller([RUN.trajectory, tmp_path / "other"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"label_smoothing_factor": 0.1},
            r"Run 1 .*`label_smoothing_factor=0.1`, run 0 .*`label_smoothing_factor=0.0`",
        ),
        ({"loss_type": "dft"}, "Run 1 .*`loss_type='dft'`, run 0 .*`loss_type='nll'`"),
    ],
)
def test_a_run_with_another_loss_is_refused_before_any_gradient(settings, message, monkeypatch):
    other = copy.copy(OTHER.trajectory)
    other.metadata = {**OTHER.trajectory.metadata, **settings}
    monkeypatch.setattr(SynsetGradients, "loss", lambda *_: pytest.fail("a gradient was taken"))
    with pytest.raises(ValueError, match=message):
        distiller([RUN.trajectory, other])


def test_the_names_of_one_loss_are_the_same():
    other = copy.copy(OTHER.trajectory)
    other.metadata = {**OTHER.trajectory.metadata, "loss_type": "nll", "label_smoothing_factor": None}
    assert len(distiller([RUN.trajectory, other]).trajectories) == 2


def test_blocks_of_other_runs_are_not_reused(tmp_path):
    config = DistillationConfig(num_iterations=2)
    one = distiller(RUN.trajectory, config=config, output_dir=tmp_path).distill()
    two = distiller([RUN.trajectory, OTHER.trajectory], config=config, output_dir=tmp_path / "two").distill()
    assert len(one.matched_states) == 5 and len(two.matched_states) == 10
    with pytest.raises(FileExistsError, match="another distillation"):
        distiller([RUN.trajectory, OTHER.trajectory], config=config, output_dir=tmp_path)


def test_states_that_no_engine_uses_are_not_matched(tmp_path):
    """A short training is looked at in three states, however many were recorded."""
    trainer = tiny_trainer(RUN.train_dataset, callbacks=[TrajectoryCallback(tmp_path / "run")], num_train_epochs=2)
    trainer.train()
    trajectory = Trajectory.load(tmp_path / "run")
    assert len(trajectory.state_steps) > 4
    states = matched_states([trajectory], RUN.clusters)
    assert len(states) == 3 and states[-1].step == trajectory.num_steps
    attributor = Attributor(
        trainer.model, trajectory=trajectory, rows=RUN.train_dataset, clusters=RUN.clusters, disable_tqdm=True
    )
    assert {state.step for state in states} >= {s for s, _, _ in attributor._runs(None, None)[0].path(0.0).segments()}
