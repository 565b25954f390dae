"""Attribution from a Trainer's own checkpoints, against the recording of the same training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from hf_rgm import Attributor, Trajectory, TrajectoryCallback
from hf_rgm.testing import tiny_dataset, tiny_recorded_run, tiny_trainer
from tests.text import classifier, language_model, texts
from tests.training import recorded_model

EXACT = {"rtol": 1e-4, "atol": 1e-6}
"""Rounding of logged learning rates and norms."""

ROWS, QUERIES, CLUSTERS = tiny_dataset(48, seed=0), tiny_dataset(12, seed=1), tiny_recorded_run().clusters


def trained(folder: Path, **settings):
    """A model, its recorded trajectory of a state an epoch, and the output folder with a checkpoint an epoch."""
    callback = TrajectoryCallback(folder / "trajectory", num_states=9)
    settings = {"save_strategy": "epoch", "logging_strategy": "steps", "logging_steps": 1, **settings}
    trainer = tiny_trainer(ROWS, callbacks=[callback], output_dir=str(folder / "out"), **settings)
    trainer.train()
    return trainer.model.eval(), Trajectory.load(folder / "trajectory"), folder / "out"


def scores(model, trajectory, **options):
    known = {"trajectory": trajectory, "rows": ROWS, "clusters": CLUSTERS, "disable_tqdm": True}
    return Attributor(model, **known).attribute(QUERIES, **options)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("run"))


@pytest.fixture
def copied(run, tmp_path):
    """The same run with a folder of its own, to be damaged."""
    shutil.copytree(run[2], tmp_path / "out")
    return run[0], tmp_path / "out"


@pytest.mark.parametrize(
    "settings",
    [
        {"max_grad_norm": 0.3},
        {"max_grad_norm": 0.0, "warmup_steps": 10, "weight_decay": 0.1},
        {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.05, "lr_scheduler_type": "cosine"},
    ],
)
def test_where_every_step_is_logged_the_scores_are_those_of_the_recording(tmp_path, settings):
    model, recorded, out = trained(tmp_path, **settings)
    found = Trajectory.from_checkpoints(out, model, ROWS, max_grad_norm=settings.get("max_grad_norm", 1.0))
    assert found.state_steps == recorded.state_steps[1:]
    np.testing.assert_allclose(found.steps.learning_rates, recorded.steps.learning_rates, rtol=1e-6)
    np.testing.assert_allclose(found.steps.clip_factor, recorded.steps.clip_factor, rtol=1e-4)
    assert found.optimizer == recorded.optimizer
    for step in found.state_steps:
        own, expected = found.state(step), recorded.state(step)
        assert all(torch.equal(own.parameters[name], expected.parameters[name]) for name in expected.parameters)
        assert {kind: {*own.moments[kind]} for kind in own.moments} == {k: {*m} for k, m in expected.moments.items()}
    own, expected = scores(model, found, engine="adjoint"), scores(model, recorded, engine="adjoint")
    np.testing.assert_allclose(own.scores, expected.scores, **EXACT)
    np.testing.assert_allclose(own.row_scores, expected.row_scores, **EXACT)


def test_with_few_checkpoints_and_no_logs_scores_rank_as_those_of_the_recording(tmp_path):
    settings = {"max_grad_norm": 0.3, "logging_strategy": "no", "save_strategy": "steps", "save_steps": 16}
    model, recorded, out = trained(tmp_path, **settings)
    by_default = scores(model, str(out))
    own = scores(model, Trajectory.from_checkpoints(out, model, ROWS, max_grad_norm=0.3))
    expected = scores(model, recorded)
    assert not np.allclose(by_default.scores, own.scores, rtol=0.1)  # clipping matters
    for name in ("scores", "row_scores"):
        by_query = [
            float(spearmanr(*pair).statistic) for pair in zip(getattr(own, name), getattr(expected, name), strict=True)
        ]
        assert min(by_query) > 0.9, name
    assert own.metadata["rewind_step"] == expected.metadata["rewind_step"] and own.metadata["drift"] < 1e-9
    assert any("replays not to drift" in told for told in own.metadata["from_checkpoints"])
    assert any("by no logged gradient norms, but 8 measured" in told for told in own.metadata["from_checkpoints"])
    found = Trajectory.from_checkpoints(out, model, ROWS, max_grad_norm=0.3)
    assert found.steps.clip_factor[16:].mean() == pytest.approx(recorded.steps.clip_factor[16:].mean(), rel=0.1)


def test_drift_is_measured_by_the_first_logged_loss(run):
    model, recorded, out = run
    masks = 1 - torch.eye(6)
    known = {"rows": ROWS, "clusters": CLUSTERS, "disable_tqdm": True}
    own, expected = (Attributor(model, trajectory=each, **known)._runs(None, None)[0] for each in (out, recorded))
    changed = expected.final + 0.1 * torch.randn(6, 163, generator=torch.Generator().manual_seed(0))
    first = expected.trajectory.state(0).parameters
    before = float(expected.source.losses(expected.model.space.flatten(first)).sum())
    # One batch logged it, and clusters share the progress alike.
    assert own.trajectory.metadata["initial_loss"] == pytest.approx(before, rel=0.15)
    drifts = [each.drift_meter.drifts(changed, masks) for each in (own, expected)]
    np.testing.assert_allclose(*drifts, rtol=0.5)


def test_a_pickle_with_code_is_not_executed(copied, tmp_path):
    model, out = copied

    class Harmful:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    torch.save({"state": Harmful(), "param_groups": []}, out / "checkpoint-48" / "optimizer.pt")
    torch.save(Harmful(), out / "checkpoint-48" / "training_args.bin")
    with pytest.raises(ValueError, match="holds more than tensors and numbers, which is not read"):
        Trajectory.from_checkpoints(out, model, ROWS)
    assert not (tmp_path / "executed").exists()


def _other_log(out):
    file = out / "checkpoint-12" / "trainer_state.json"
    content = json.loads(file.read_text())
    content["log_history"][0]["loss"] += 1
    file.write_text(json.dumps(content))


def _other_optimizer(**changes):
    def change(out):
        file = out / "checkpoint-48" / "optimizer.pt"
        content = torch.load(file, weights_only=True)
        for group in content["param_groups"]:
            group.update(changes)
        if not changes:
            content["state"] = {number: {"square_avg": own["exp_avg_sq"]} for number, own in content["state"].items()}
        torch.save(content, file)

    return change


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (
            lambda out: [shutil.rmtree(out / f"checkpoint-{s}") for s in range(6, 48, 6)],
            ValueError,
            "has 1 checkpoints",
        ),
        (lambda out: (out / "checkpoint-24" / "optimizer.pt").unlink(), FileNotFoundError, "without its optimizer"),
        (
            lambda out: (out / "checkpoint-48" / "model.safetensors").unlink(),
            OSError,
            "no file named model.safetensors",
        ),
        (lambda out: shutil.rmtree(out / "checkpoint-48"), ValueError, "none of the checkpoints"),
        (
            lambda out: [shutil.rmtree(out / f"checkpoint-{s}") for s in (6, 12, 48)],
            ValueError,
            "none of the checkpoints .24, 30, 36, 42.",
        ),
        (_other_log, ValueError, "checkpoint-12 is of another run"),
        (_other_optimizer(), NotImplementedError, "keeps .'square_avg'."),
        (_other_optimizer(amsgrad=True), NotImplementedError, "amsgrad=True"),
        (_other_optimizer(params=[0, 1, 2]), ValueError, "has groups of .3, 3. parameters"),
    ],
)
def test_what_cannot_be_followed_is_refused(copied, damage, error, message):
    model, out = copied
    damage(out)
    with pytest.raises(error, match=message):
        Trajectory.from_checkpoints(out, model, ROWS)


def test_the_trajectory_ends_at_the_checkpoint_of_the_model(run):
    model = type(run[0]).from_pretrained(run[2] / "checkpoint-30")
    found = Trajectory.from_checkpoints(run[2], model, ROWS)
    assert found.num_steps == 30 and found.state_steps == (6, 12, 18, 24, 30)
    np.testing.assert_allclose(found.steps.learning_rates, run[1].steps.learning_rates[:30], rtol=1e-6)


def test_what_is_assumed_is_told_once_and_kept(run, tmp_path, caplog):
    trajectory = Trajectory.from_checkpoints(run[2], run[0], ROWS)
    (record,) = [record for record in caplog.records if "was not recorded" in record.message]
    assert "48 logged gradient norms;" in record.message
    trajectory.save(tmp_path / "saved")
    loaded = Trajectory.load(tmp_path / "saved")
    assert loaded.metadata == trajectory.metadata and loaded.metadata["from_checkpoints"]
    own, expected = scores(run[0], loaded), scores(run[0], trajectory)
    np.testing.assert_array_equal(own.scores, expected.scores)
    assert own.metadata["from_checkpoints"] == trajectory.metadata["from_checkpoints"]
    own.save_pretrained(tmp_path / "result")
    assert "training known by its checkpoints" in (tmp_path / "result" / "README.md").read_text()
    scores(run[0], run[1]).save_pretrained(tmp_path / "recorded")
    assert "checkpoints" not in (tmp_path / "recorded" / "README.md").read_text()


def test_several_runs_are_known_by_their_checkpoints(run, tmp_path):
    settings = {"save_strategy": "epoch", "logging_strategy": "steps", "logging_steps": 1}
    tiny_trainer(ROWS, seed=1, output_dir=str(tmp_path / "other"), **settings).train()
    other = type(run[0]).from_pretrained(tmp_path / "other" / "checkpoint-48")
    both = scores(run[0], [str(run[2]), str(tmp_path / "other")], engine="adjoint")
    alone = scores(run[0], run[2], engine="adjoint").scores
    expected = scores(run[0], [run[2], Trajectory.from_checkpoints(tmp_path / "other", other, ROWS)], engine="adjoint")
    np.testing.assert_allclose(both.scores, expected.scores, **EXACT)
    assert np.abs(both.scores - alone).max() > 1e-3
    with pytest.raises(ValueError, match="has no checkpoint at step 47"):
        Trajectory.from_checkpoints(tmp_path / "other", run[0], ROWS, num_steps=47)


def test_a_plain_module_has_its_parameters_by_name(tmp_path):
    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden, self.classifier = torch.nn.Linear(16, 4), torch.nn.Linear(4, 3)

        def forward(self, pixel_values, labels=None):
            logits = self.classifier(self.hidden(pixel_values.flatten(1)).tanh())
            loss = None if labels is None else torch.nn.functional.cross_entropy(logits, labels)
            return {"loss": loss, "logits": logits}

    model, out = recorded_model(Plain(), ROWS, tmp_path, save_strategy="epoch", num_states=4), tmp_path / "out"
    recorded, found = Trajectory.load(tmp_path / "trajectory"), Trajectory.from_checkpoints(out, model, ROWS)
    for name, parameter in recorded.state(12).parameters.items():
        assert torch.equal(found.state(12).parameters[name], parameter)
    other = Plain()
    other.classifier = torch.nn.Linear(4, 5)
    with pytest.raises(ValueError, match="lacks 'classifier.weight', or has it in another shape .2 such"):
        Trajectory.from_checkpoints(tmp_path / "out", other, ROWS)


def test_adapters_frozen_layers_and_tied_weights_are_found_by_name(tmp_path):
    from peft import LoraConfig, get_peft_model

    adapted = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"], modules_to_save=["classifier"])
    frozen = classifier("bert")
    frozen.bert.embeddings.requires_grad_(False)
    models = {
        "class": (get_peft_model(classifier("bert"), adapted), frozen),
        "text": (language_model("llama", tie_word_embeddings=True),),
    }
    for labels, several in models.items():
        for number, model in enumerate(several):
            folder, rows = tmp_path / f"{labels}-{number}", texts(labels=labels)
            settings = {"save_strategy": "epoch", "logging_strategy": "steps", "logging_steps": 1, "num_states": 4}
            trained = recorded_model(model, rows, folder, **settings)
            recorded = Trajectory.load(folder / "trajectory")
            found = Trajectory.from_checkpoints(folder / "out", trained, rows)
            assert found.parameter_shapes == recorded.parameter_shapes and found.optimizer == recorded.optimizer
            for kind, members in recorded.state(6).moments.items():
                own = found.state(6).moments[kind]
                assert all(torch.equal(own[name], moment) for name, moment in members.items())
