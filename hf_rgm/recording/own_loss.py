"""The loss that a Trainer trains, found by calling it."""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import Trainer

from hf_rgm.model.random_state import random_state_kept

FP16_SCALE = 2.0**10
_DROPOUTS = {
    getattr(nn.functional, name)
    for name in ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")
}


def calling_trainer() -> Trainer | None:
    """The Trainer in whose training this is called, as callbacks are not told."""
    # `f_locals` of this frame would hold a reference to the frame, and so keep the Trainer alive.
    own = inspect.currentframe()
    frame = None if own is None else own.f_back
    del own
    try:
        while frame is not None:
            owner = frame.f_locals.get("self")
            if isinstance(owner, Trainer):
                return owner
            frame = frame.f_back
        return None
    finally:
        del frame


def described_loss(trainer: Trainer, model: nn.Module) -> str:
    """What computes the loss that a Trainer trains, in words."""
    kind = type(trainer)
    if getattr(trainer, "compute_loss_func", None) is not None:
        return "The loss of `compute_loss_func`"
    for name in ("compute_loss", "training_step"):
        if getattr(kind, name) is not getattr(Trainer, name) and not kind.__module__.startswith("trl."):
            return f"The loss of {kind.__name__}.{name}"
    own, loss_type = f"The loss that {type(model).__name__} computes", getattr(trainer.args, "loss_type", None)
    if loss_type is not None:
        return f"{own} (`loss_type={loss_type!r}`)"
    if getattr(getattr(model, "config", None), "output_router_logits", False):
        return f"{own} (`output_router_logits=True` adds a penalty of the router)"
    return own


class OwnLoss:
    """The loss that the Trainer's training step hands to `backward`, without dropout; training is not disturbed."""

    # Called on a shallow copy of the Trainer whose accelerator keeps the loss: subclassed steps and losses, functions
    # of losses and divisions for gradient accumulation all count.

    def __init__(self, trainer: Trainer, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        self._trainer = trainer
        self._model = model
        self._parameters = dict(parameters)

    @contextlib.contextmanager
    def moved(self, parameters: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """A block with other values of the trained parameters; gives them as the model holds them, float32."""
        before = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        try:
            self._set(parameters)
            yield {name: parameter.detach().float() for name, parameter in self._parameters.items()}
        finally:
            self._set(before)

    @torch.no_grad()
    def _set(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])

    def gradient(self, batch: Mapping[str, Any], *, times: int = 1) -> dict[str, Tensor]:
        """Gradient, float32, of an update that consists of a collated batch so many times."""
        scale = FP16_SCALE if self._trainer.args.fp16 else 1.0
        with torch.enable_grad(), _undisturbed(self._model):
            loss = self._loss(batch, times) * scale
            gradients = torch.autograd.grad(loss, list(self._parameters.values()), materialize_grads=True)
        named = zip(self._parameters, gradients, strict=True)
        return {name: _dense(gradient).float() * (times / scale) for name, gradient in named}

    def value(self, batch: Mapping[str, Any], *, training_seed: int | None = None) -> float:
        """The loss of a collated batch, in evaluation mode or, with a seed, in training mode without dropout."""
        training = training_seed is not None
        with torch.no_grad(), _undisturbed(self._model, training=training), _WithoutDropout():
            if training_seed is not None:
                torch.manual_seed(training_seed)
            return float(self._loss(batch, 1))

    def _loss(self, batch: Mapping[str, Any], times: int) -> Tensor:
        twin: Any = copy.copy(self._trainer)
        for name, value in vars(twin).items():  # what logs are made of
            if isinstance(value, dict | list) and _is_plain(value):
                setattr(twin, name, copy.deepcopy(value))
        twin.accelerator = keeping = _KeepingAccelerator(self._trainer.accelerator)
        _, count = twin.get_batch_samples(iter([dict(batch)] * times), times, twin.args.device)
        twin.current_gradient_accumulation_steps = times
        twin.training_step(self._model, dict(batch), count)
        if keeping.loss is None:
            raise NotImplementedError(
                f"{type(self._trainer).__name__}.training_step does not hand its loss to `self.accelerator.backward`, "
                "so that what is trained cannot be compared with what is recorded. Let it do so."
            )
        return keeping.loss


class _KeepingAccelerator:
    """Keeps the loss that it is asked to differentiate; all else is the accelerator's."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self.loss: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)

    def backward(self, loss: Tensor, **_: Any) -> None:
        self.loss = loss if self.loss is None else self.loss + loss


class _WithoutDropout(TorchFunctionMode):
    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func is nn.functional.scaled_dot_product_attention and "dropout_p" in kwargs:
            kwargs["dropout_p"] = 0.0
        return func(*args, **kwargs)


@contextlib.contextmanager
def _undisturbed(model: nn.Module, *, training: bool = False) -> Iterator[None]:
    """A block with the model in one mode, after which modes, buffers and random states are as before."""
    modules = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module, _ in modules
        for name, buffer in module.named_buffers(recurse=False)
    ]
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    for module, _ in modules:
        # Batch statistics are not compared: attribution takes the running ones.
        module.training = training and not isinstance(module, nn.modules.batchnorm._BatchNorm)
    own_train = vars(model).get("train")
    model.train = lambda mode=True: model  # the training step calls it
    try:
        with random_state_kept(devices=devices):
            yield
    finally:
        del model.train
        if own_train is not None:
            model.train = own_train
        for module, mode in modules:
            module.training = mode
        with torch.no_grad():
            for module, name, buffer, before in buffers:
                buffer.copy_(before)
                setattr(module, name, buffer)


def _dense(gradient: Tensor) -> Tensor:
    return gradient.to_dense() if gradient.is_sparse else gradient


def _is_plain(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return True
