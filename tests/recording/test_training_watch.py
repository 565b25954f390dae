"""Whatever else changes what is trained is refused, and the step is named."""

import copy
import functools

import pytest
import torch
from transformers import TrainerCallback

from hf_rgm.recording.callback import TrajectoryCallback
from hf_rgm.trajectory.trajectory import Trajectory
from tests.recording.helpers import MeanModel, assert_identical, make_trainer, train, trainable

AT = 3
"""The step, of 18, before which something is changed: not one of those that are computed again."""


class At(TrainerCallback):
    """Does something with model and optimizer at one event, from step `AT` on or in it alone."""

    def __init__(self, event, change, *, once=True):
        def act(args, state, control, model=None, optimizer=None, **kwargs):
            if state.global_step == AT or (state.global_step > AT and not once):
                change(model, getattr(optimizer, "optimizer", optimizer))

        setattr(self, event, act)


@torch.no_grad()
def clamp(model, optimizer):
    model.head.weight.clamp_(-0.1, 0.1)


@torch.no_grad()
def average(model, optimizer):
    for parameter in model.parameters():
        parameter.data.mul_(0.999)


def forget_moments(model, optimizer):
    optimizer.state.clear()


@torch.no_grad()
def zero_moments(model, optimizer):
    for state in optimizer.state.values():
        state["exp_avg_sq"].zero_()


def forget_one_gradient(model, optimizer):
    model.head.bias.grad = None


@torch.no_grad()
def add_noise(model, optimizer):
    model.head.weight.grad += 1e-3 * torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def reverse(model, optimizer):
    for parameter in model.parameters():
        parameter.grad.neg_()


def scale_by_hook(model, optimizer):
    model.head.weight.register_hook(lambda gradient: 2 * gradient)


def double(parameter):
    parameter.grad.mul_(2)


def scale_before_the_recorder(model, optimizer):
    model.head.weight.register_post_accumulate_grad_hook(double)


def reverse_by_module_hook(model, optimizer):
    model.head.register_full_backward_hook(lambda module, grad_input, grad_output: (-grad_input[0],))


def freeze(model, optimizer):
    model.layers.requires_grad_(False)


def decay_otherwise(model, optimizer):
    optimizer.param_groups[0]["weight_decay"] = 0.5


def regroup(model, optimizer):
    first, second = (group["params"] for group in optimizer.param_groups)
    first.append(second.pop())


def step_twice(model, optimizer):
    optimizer.step()


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize(
    ("event", "change", "message"),
    [
        ("on_step_end", clamp, f"outside of the optimizer's step before step {AT}"),
        ("on_step_begin", average, f"outside of the optimizer's step before step {AT}"),
        ("on_step_begin", forget_moments, f"outside of the optimizer's step before step {AT}"),
        ("on_step_begin", zero_moments, f"outside of the optimizer's step before step {AT}"),
        ("on_pre_optimizer_step", clamp, f"outside of the optimizer's step before step {AT}"),
        ("on_pre_optimizer_step", add_noise, f"the backward pass and the update of step {AT}"),
        ("on_pre_optimizer_step", reverse, f"the backward pass and the update of step {AT}"),
        ("on_pre_optimizer_step", forget_one_gradient, f"the backward pass and the update of step {AT}"),
        ("on_step_begin", scale_by_hook, r"gradient hooks on \['head.weight'\]"),
        ("on_step_begin", scale_before_the_recorder, r"gradient hooks on \['head.weight'\]"),
        ("on_step_begin", reverse_by_module_hook, r"gradient hooks on \['head'\]"),
        ("on_step_begin", freeze, rf"step {AT}, parameters \['layers.0.weight', .* are frozen from here on"),
        ("on_step_begin", decay_otherwise, f"`weight_decay` from 0.1 to 0.5|settings changed before step {AT}"),
        ("on_step_begin", regroup, f"before step {AT}: its parameter groups have other members"),
        ("on_pre_optimizer_step", step_twice, f"stepped 2 times in update {AT}"),
    ],
)
@pytest.mark.parametrize("max_grad_norm", [0.0, 0.3], ids=["unclipped", "clipped"])
def test_changes_by_others_are_refused(tmp_path, event, change, message, first, max_grad_norm):
    recorder, other = TrajectoryCallback(tmp_path / "trajectory"), At(event, change)
    callbacks = (other, recorder) if first else (recorder, other)
    trainer = make_trainer(tmp_path, MeanModel(), *callbacks, max_grad_norm=max_grad_norm)
    with pytest.raises(NotImplementedError, match=message):
        trainer.train()
    assert trainer.state.global_step <= AT + 1


def test_layers_that_are_thawed_on_the_way_are_refused(tmp_path):
    model = MeanModel()
    model.layers.requires_grad_(False)
    thaw = At("on_epoch_begin", lambda model, _: model.layers.requires_grad_(True), once=False)
    with pytest.raises(NotImplementedError, match="At step 6, .* are trained from here on, which were frozen"):
        train(tmp_path, model, thaw)


@pytest.mark.parametrize("event", ["on_step_end", "on_epoch_end", "on_train_end"])
def test_what_is_moved_after_the_last_update_is_refused(tmp_path, event):
    class Average(TrainerCallback):
        pass

    def act(args, state, control, model=None, **kwargs):
        if state.global_step == state.max_steps:
            average(model, None)

    callback = Average()
    setattr(callback, event, act)
    trainer = make_trainer(tmp_path, MeanModel(), callback, TrajectoryCallback(tmp_path / "trajectory"))
    with pytest.raises(NotImplementedError, match="outside of the optimizer's step before step 18"):
        trainer.train()


def test_a_teacher_inside_of_the_model_is_refused(tmp_path):
    model = MeanModel()
    model.teacher = copy.deepcopy(model.head).requires_grad_(False)

    class Follow(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            model.teacher.weight.lerp_(model.head.weight.detach(), 0.1)

    with pytest.raises(NotImplementedError, match="that the optimizer does not train changed"):
        train(tmp_path, model, Follow())


@torch.no_grad()
def clamp_after(optimizer, args, kwargs):
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.clamp_(-0.05, 0.05)


def test_an_optimizer_that_does_something_else_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, MeanModel(), TrajectoryCallback(tmp_path / "trajectory"))
    trainer.create_optimizer()
    trainer.optimizer.register_step_post_hook(clamp_after)
    with pytest.raises(NotImplementedError, match="step 0 did not do what its rule"):
        trainer.train()


def test_gradients_changed_by_a_later_hook_of_the_step_are_refused(tmp_path):
    class Hook(TrainerCallback):
        def on_train_begin(self, args, state, control, optimizer=None, model=None, **kwargs):
            inner = getattr(optimizer, "optimizer", optimizer)
            inner.register_step_pre_hook(lambda *_: double(model.head.weight))

    with pytest.raises(NotImplementedError, match="step [01] did not do what its rule"):
        train(tmp_path, MeanModel(), Hook())


def test_rates_that_a_callback_sets_last_are_recorded(tmp_path):
    def halve(model, optimizer):
        for group in optimizer.param_groups:
            group["lr"] = 0.005

    _, trajectory = train(tmp_path, MeanModel(), At("on_pre_optimizer_step", halve, once=False))
    rates = trajectory.steps.learning_rates[:, 0]
    assert (rates[AT:] == 0.005).all() and (rates[:AT] > 0.005).all()


@pytest.mark.parametrize("multiple", [0.5, 3.0])
def test_one_factor_for_all_gradients_is_recorded(tmp_path, multiple):
    def scale(model, optimizer):
        for parameter in model.parameters():
            parameter.grad.mul_(multiple)

    _, trajectory = train(tmp_path, MeanModel(), At("on_pre_optimizer_step", scale), max_grad_norm=0.0)
    factors = trajectory.steps.clip_factor
    assert factors[AT] == pytest.approx(multiple, rel=1e-6)
    assert (factors[:AT] == 1).all() and (factors[AT + 1 :] == 1).all()


class Evaluating(TrainerCallback):
    """Evaluates with averaged parameters and puts the others back, as averages that are kept beside the model do."""

    @torch.no_grad()
    def on_step_end(self, args, state, control, model=None, **kwargs):
        own = copy.deepcopy(model.state_dict())
        average(model, None)
        model.load_state_dict(own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_torch_fused", "sgd"])
def test_training_that_is_what_it_seems_goes_on_undisturbed(tmp_path, dtype, optimizer):
    class Model(MeanModel):
        def forward(self, features, labels=None, row=None):
            return super().forward(features.to(self.head.weight.dtype), labels, row)

    settings = {"max_grad_norm": 0.3, "optim": optimizer, "gradient_accumulation_steps": 2, "num_train_epochs": 12}
    trainer, _ = train(tmp_path, Model(dropout=0.1).to(dtype), Evaluating(), **settings)
    bare = make_trainer(tmp_path, Model(dropout=0.1).to(dtype), **settings)
    bare.train()
    assert_identical(trainable(trainer.model), trainable(bare.model))


def test_two_recorders_do_not_disturb_each_other(tmp_path):
    callbacks = [TrajectoryCallback(tmp_path / name, num_states=2) for name in ("one", "two")]
    make_trainer(tmp_path, MeanModel(), *callbacks).train()
    one, two = (Trajectory.load(tmp_path / name) for name in ("one", "two"))
    assert_identical(one.final.parameters, two.final.parameters)


def test_hooks_are_gone_after_training(tmp_path):
    trainer, _ = train(tmp_path, MeanModel())
    inner = functools.reduce(getattr, ["optimizer", "optimizer"], trainer)
    assert not inner._optimizer_step_pre_hooks and not inner._optimizer_step_post_hooks
    assert not any(parameter._post_accumulate_grad_hooks for parameter in trainer.model.parameters())
