"""Every kind of run is recorded exactly or refused: the page `docs/runs.md`."""

import re

import pytest
import torch
from transformers import TrainerCallback

from hf_rgm.model.functional_model import FunctionalModel
from hf_rgm.model.row_reader import RowReader
from hf_rgm.recording.callback import TrajectoryCallback
from hf_rgm.synset.compatibility import row_loss_of
from hf_rgm.trajectory.optimizers import apply_update
from hf_rgm.trajectory.trajectory import Trajectory
from tests.recording.helpers import StopAt, make_trainer
from tests.recording.runs import KINDS, PAGE, render

STEPS, LOOK = 4, 2
"""Steps of a run, and the one that is checked."""
REPLAY_TOLERANCE = 1e-5
MIN_COSINE = 0.999
# In bf16, gradients are rounded to 3 digits.
LENGTH_TOLERANCE = {False: 2e-3, True: 2e-2}
CASES = {f"{title}: {name}": kind for title, kinds in KINDS.items() for name, kind in kinds.items()}


class Gradients(TrainerCallback):
    """Keeps the gradients that the optimizer gets at one step."""

    def __init__(self):
        self.kept = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == LOOK:
            named = model.named_parameters()
            self.kept = {name: p.grad.detach().float().clone() for name, p in named if p.grad is not None}


def built(folder, kind, *callbacks):
    model, optimizers = kind.model(), (None, None)
    if kind.optimizer is not None:
        optimizers = (kind.optimizer(model), None)
    settings = {"max_steps": STEPS, "per_device_train_batch_size": 6, "max_grad_norm": 0.0, "learning_rate": 5e-3}
    if kind.resumed:
        settings |= {"save_strategy": "steps", "save_steps": 2}
    made = make_trainer(folder, model, train_dataset=kind.data(), **settings | dict(kind.arguments))
    recorder = TrajectoryCallback(folder / "trajectory", num_states=STEPS + 1, row_loss=kind.row_loss)
    others = [kind.callback] if kind.callback is not None else []
    return kind.kind(
        model,
        made.args,
        train_dataset=made.train_dataset,
        eval_dataset=made.eval_dataset,
        callbacks=[recorder, *others, *callbacks],
        optimizers=optimizers,
        **kind.trainer,
    )


@pytest.mark.parametrize("case", CASES)
def test_a_kind_of_run_is_exact_or_refused(tmp_path, case):
    kind, gradients = CASES[case], Gradients()
    if kind.refused is not None:
        trainer = built(tmp_path, kind)
        before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        with pytest.raises((NotImplementedError, ValueError), match=re.escape(kind.refused)):
            trainer.train()
        if kind.at_step:
            assert 0 < trainer.state.global_step < STEPS
            return
        assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
        assert not (tmp_path / "trajectory" / "trajectory.json").exists()
        return
    if kind.resumed:
        built(tmp_path, kind, StopAt(2)).train()
    trainer = built(tmp_path, kind, gradients)
    trainer.train(resume_from_checkpoint=kind.resumed or None)
    trajectory = Trajectory.load(tmp_path / "trajectory")
    assert trajectory.num_steps == STEPS and trajectory.state_steps == tuple(range(STEPS + 1))
    assert_replayed(trajectory, gradients.kept)
    assert_attributed(trainer, trajectory, kind, gradients.kept)


def assert_replayed(trajectory, gradients):
    """The recorded rule makes the next state of a state and the gradients that were trained."""
    before, after = trajectory.state(LOOK), trajectory.state(LOOK + 1)
    new, _ = apply_update(
        trajectory.optimizer,
        before.parameters,
        gradients,
        before.moments,
        learning_rates=trajectory.steps.learning_rates[LOOK].tolist(),
        step=int(trajectory.update_numbers[LOOK]),
    )
    moved = 0.0
    for name, expected in after.parameters.items():
        torch.testing.assert_close(new[name], expected, rtol=0, atol=REPLAY_TOLERANCE)
        moved = max(moved, float((expected - before.parameters[name]).abs().max()))
    assert moved > 10 * REPLAY_TOLERANCE


def assert_attributed(trainer, trajectory, kind, gradients):
    """The gradient of the attributed loss on the step's rows is the one that was trained."""
    names = [*trajectory.parameter_shapes]
    model = FunctionalModel(trainer.model, trainable_names=names, shifts_labels=trajectory.shifts_labels)
    reader = RowReader(
        kind.data(),
        model,
        data_collator=trainer.data_collator,
        remove_unused_columns=trainer.args.remove_unused_columns,
    )
    row_loss = row_loss_of([trajectory], reader, kind.row_loss)
    parameters = {name: value.requires_grad_() for name, value in trajectory.state(LOOK).parameters.items()}
    inputs, labels = reader.batch(trajectory.steps.rows[LOOK])
    loss = row_loss(model.logits(parameters, inputs), labels).mean() * trajectory.gradient_scales[LOOK]
    ours = torch.autograd.grad(loss, [parameters[name] for name in names], materialize_grads=True)
    ours = torch.cat([gradient.flatten() for gradient in ours])
    theirs = torch.cat([gradients.get(name, torch.zeros_like(parameters[name])).flatten() for name in names])
    assert float(torch.cosine_similarity(ours, theirs, dim=0)) > MIN_COSINE
    assert float(ours.norm() / theirs.norm()) == pytest.approx(1, abs=LENGTH_TOLERANCE[trainer.args.bf16])


def test_the_page_is_of_these_kinds():
    assert len(CASES) >= 40
    assert PAGE.read_text(encoding="utf-8") == render(), "Write it anew: python -m tests.recording.runs"
