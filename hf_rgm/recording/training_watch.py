"""Notices what is not the optimizer's doing: layers frozen on the way, gradients or parameters that others change."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.utils.hooks import RemovableHandle

from hf_rgm.model.sharding import local, named_parameters
from hf_rgm.recording.gradient_norms import GradientNorms
from hf_rgm.trajectory.optimizers import OptimizerRule, apply_update

NORM_ELEMENTS = 2**24
"""Elements whose norm is taken together: few enough that float32 shows when one of them moves."""
REPLAYED_ELEMENTS = 64
"""Elements of each parameter for which updates 1, 2, 4, 8, ... are computed again."""
REPLAY_TOLERANCE = 1e-3
_CONSTANTS = ("betas", "eps", "weight_decay", "momentum", "dampening", "nesterov", "amsgrad", "maximize")
_MOVED = (
    "Parameters, or the optimizer's moments, changed outside of the optimizer's step before step {step} (averaging, "
    "clamping, or a state that was loaded?). Such changes are not recorded, so attributions would be wrong. Change "
    "copies (`copy.deepcopy(model)`), or do it once training has ended."
)
_ALTERED = (
    "Gradients changed between the backward pass and the update of step {step} by other means than clipping. The "
    "record has the rows' gradients and one clipping factor for all of them, so attributions would be wrong. Train "
    "without the callback that changes them."
)
_OTHER_UPDATE = (
    "The optimizer's step {step} did not do what its rule ({rule}) says, so it cannot be replayed. Remove hooks and "
    "wrappers of `optimizer.step` that change gradients or parameters."
)


class TrainingWatch:
    """Compares every update with what is recorded of it, by hooks around the optimizer's step."""

    # Comparisons of tensors stay on the device until `settle`, which raises the first problem.

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        rule: OptimizerRule,
        *,
        first_step: int,
        note_update: Callable[[], Tensor],
    ) -> None:
        named = named_parameters(model)
        self._trained = {name: p for name, p in named.items() if p.requires_grad}
        self._frozen = {name: p for name, p in named.items() if not p.requires_grad}
        self._parameters = list(self._trained.values())
        self._modules = dict(model.named_modules())
        self._optimizer, self._rule = optimizer, rule
        self._constants = self._read_constants()
        self._note_update = note_update
        self._step = first_step
        self._made = 0
        self._updates = 0
        self.seconds = 0.0
        self._problem: str | None = None
        self._flags: list[tuple[str, int, Tensor]] = []
        self._sample: dict[str, dict[str, Any]] = {}
        self._norms = self._parameter_norms()
        self._handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(lambda *_: self._before_update()),
            optimizer.register_step_post_hook(lambda *_: self._after_update()),
        ]

    def _before_update(self) -> None:
        start = time.perf_counter()
        self._made += 1
        self._problem = self._problem or self._trained_otherwise() or self._hooked() or self._set_otherwise()
        self.compare_parameters()
        self._updates += 1
        self._flags.append((_ALTERED, self._step, self._note_update()))
        self._sample = self._elements() if self._is_milestone else {}
        self.seconds += time.perf_counter() - start

    def _after_update(self) -> None:
        start = time.perf_counter()
        if self._sample:
            self._flags.append((_OTHER_UPDATE, self._step, self._updated_otherwise()))
        self._norms = self._parameter_norms()
        self.seconds += time.perf_counter() - start

    @property
    def _is_milestone(self) -> bool:
        return self._updates & (self._updates - 1) == 0

    def end_update(self, *, skipped: bool) -> None:
        """Counts the step that the Trainer made; tells of problems at once where nothing waits for them."""
        if not self._made:
            self._note_update()
        if self._made > 1 or (not self._made and not skipped):
            self._problem = self._problem or (
                f"The optimizer was stepped {self._made} times in update {self._step}, which cannot be recorded. Let "
                "the Trainer alone step the optimizer that `create_optimizer` or `Trainer(optimizers=...)` gave it."
            )
        self._made = 0
        self._step += 1

    def settle(self, *, now: bool = True) -> None:
        """Raises the first problem; if not `now`, only of what is known without waiting for a device."""
        if self._problem is not None:
            raise NotImplementedError(self._problem)
        if not now and self._norms.device.type != "cpu" and not self._is_milestone:
            return
        flags, self._flags = self._flags, []
        found = torch.stack([flag.to(self._norms.device) for *_, flag in flags]).tolist() if flags else []
        for (text, step, _), flag in zip(flags, found, strict=True):
            if flag:
                raise NotImplementedError(text.format(step=step, rule=self._rule.name))

    def compare_parameters(self) -> None:
        """Compares the parameters with those that the last update left."""
        norms = self._parameter_norms()
        if norms.shape != self._norms.shape:
            self._problem = self._problem or _MOVED.format(step=self._step)
            return
        same = (norms == self._norms) | (norms.isnan() & self._norms.isnan())
        self._flags.append((_MOVED, self._step, ~same.all()))

    def _parameter_norms(self) -> Tensor:
        """Norms of all parameters in few parts, and of one parameter's moments, another one after every update."""
        turn = self._parameters[self._updates % len(self._parameters)]
        # Moments are so small that they would not show in a norm with parameters.
        parts, room = [[moment] for moment in self._moments(turn).values()], 0
        for tensor in map(local, self._parameters):
            if tensor.numel() > room:
                parts.append([])
                room = NORM_ELEMENTS
            parts[-1].append(tensor)
            room -= tensor.numel()
        norms = [_norm(part) for part in parts]
        return torch.stack([norm.to(norms[0].device) for norm in norms])

    def _moments(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self._optimizer.state.get(parameter, {})
        return {kind: local(state[kind]) for kind in self._rule.moment_names if state.get(kind) is not None}

    def _trained_otherwise(self) -> str | None:
        thawed = [name for name, p in self._frozen.items() if p.requires_grad]
        frozen = [name for name, p in self._trained.items() if not p.requires_grad]
        if not thawed and not frozen:
            return None
        were, are = ("frozen", "trained") if thawed else ("trained", "frozen")
        return (
            f"At step {self._step}, parameters {(thawed or frozen)[:3]} ({len(thawed or frozen)} in all) are {are} "
            f"from here on, which were {were} when training began. Only parameters that are trained from the first "
            "to the last step are recorded. Freeze before `trainer.train()` and leave it so, or train in parts, each "
            "with a Trainer and a recording of its own."
        )

    def _hooked(self) -> str | None:
        own = [name for name, p in self._trained.items() if _has_hooks(p)]
        names = own or [name for name, m in self._modules.items() if m._backward_hooks or m._backward_pre_hooks]
        if not names:
            return None
        return (
            f"There are gradient hooks on {names[:3]} ({len(names)} in all), which may change gradients, and no "
            "record would show it. Remove them before training (`handle.remove()`; for Weights & Biases, "
            '`WANDB_WATCH="false"`).'
        )

    def _read_constants(self) -> list[dict[str, Any]]:
        return [
            {key: group[key] for key in _CONSTANTS if key in group} | {"params": [*map(id, group["params"])]}
            for group in self._optimizer.param_groups
        ]

    def _set_otherwise(self) -> str | None:
        found = self._read_constants()
        if found == self._constants:
            return None
        pairs = zip(found, self._constants, strict=False)
        changed = [
            f"`{key}` from {old[key]} to {new[key]}"
            for new, old in pairs
            for key in old
            if key != "params" and new[key] != old[key]
        ]
        return (
            f"The optimizer's settings changed before step {self._step}: "
            f"{', '.join(changed[:3]) or 'its parameter groups have other members'}. Only learning rates are "
            "recorded at every step. Leave the others as they are."
        )

    def _elements(self) -> dict[str, dict[str, Any]]:
        """Some elements of every parameter that is updated now, with gradient and moments."""
        if getattr(self._optimizer, "grad_scale", None) is not None:  # a fused optimizer divides by it itself
            return {}
        found = {}
        for name, parameter in self._trained.items():
            if parameter.grad is not None and not parameter.grad.is_sparse:
                count = self._optimizer.state.get(parameter, {}).get("step", 0)
                found[name] = {
                    "parameter": _some(parameter),
                    "gradient": _some(parameter.grad),
                    "moments": {kind: _some(moment) for kind, moment in self._moments(parameter).items()},
                    "rates": [float(group["lr"]) for group in self._optimizer.param_groups],
                    "step": int(count) + 1,
                }
        return found

    def _updated_otherwise(self) -> Tensor:
        """Whether elements are elsewhere than the rule leads them."""
        found = []
        for name, was in self._sample.items():
            moments = {kind: {name: moment} for kind, moment in was["moments"].items()}
            parameters, gradients = {name: was["parameter"]}, {name: was["gradient"]}
            rates, step = was["rates"], was["step"]
            new, _ = apply_update(self._rule, parameters, gradients, moments, learning_rates=rates, step=step)
            expected, is_now = new[name], _some(self._trained[name])
            rounding = 4 * torch.finfo(self._trained[name].dtype).eps
            moved = (expected - was["parameter"]).abs()
            allowed = max(REPLAY_TOLERANCE, rounding) * (moved + moved.mean()) + rounding * expected.abs()
            found.append(((is_now - expected).abs() > allowed).any())
        self._sample = {}
        return torch.stack([flag.to(self._norms.device) for flag in found]).any()

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _norm(tensors: Iterable[Tensor]) -> Tensor:
    tensors = [t.detach() for t in tensors]
    if len(tensors) > 1 and all(t.dtype == torch.float32 for t in tensors):
        return get_total_norm(tensors)
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(t, dtype=torch.float32) for t in tensors]))


def _some(tensor: Tensor) -> Tensor:
    """Up to 64 elements, float32, a copy."""
    flat = local(tensor.detach()).reshape(-1)
    return flat[:: max(1, math.ceil(flat.numel() / REPLAYED_ELEMENTS))].to(torch.float32, copy=True)


def _has_hooks(parameter: nn.Parameter) -> bool:
    """Whether a parameter has hooks other than those of recorders."""
    others = (parameter._post_accumulate_grad_hooks or {}).values()
    return bool(parameter._backward_hooks) or not all(GradientNorms.is_own(hook) for hook in others)
