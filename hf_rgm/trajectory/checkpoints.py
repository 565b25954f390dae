"""Trajectory parts read from a `Trainer`'s own checkpoints, of a run that no callback recorded."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import nan
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerState
from transformers.utils.logging import set_tqdm_hook

from hf_rgm.model.architecture import architecture
from hf_rgm.model.functional_model import LABEL_NAMES, FunctionalModel, forward_arguments, frozen_sha256
from hf_rgm.model.losses import LOSSES_OF_NUMBERS, LossFunction, RowLoss
from hf_rgm.model.row_reader import DataCollator, RowReader
from hf_rgm.trajectory.description import FROM_CHECKPOINTS
from hf_rgm.trajectory.fingerprint import dataset_fingerprint
from hf_rgm.trajectory.optimizers import OptimizerRule
from hf_rgm.trajectory.row_digest import readable_rows, rows_sha256
from hf_rgm.trajectory.states import TrajectoryState
from hf_rgm.trajectory.steps import StepTable
from hf_rgm.trajectory.trained_loss import TrainedLoss

logger = logging.getLogger(__name__)

NORMS_MEASURED = 8
"""Updates at a checkpoint whose gradient norms stand for those that were not logged."""

_RECORD = "Record the next run with `TrajectoryCallback`."


@dataclass(frozen=True, eq=False)
class CheckpointState:
    """A recorded state in a checkpoint of the `Trainer`, read when asked for."""

    folder: Path
    step: int
    model: nn.Module
    parameters: Mapping[str, nn.Parameter]  # the trainable ones of the model, for their shapes
    groups: Sequence[Sequence[str]]  # names in the order in which the optimizer numbers them
    moment_names: tuple[str, ...]

    def read(self) -> TrajectoryState:
        """Parameters and moments, float32 on the CPU."""
        numbered, kept = [name for group in self.groups for name in group], saved_optimizer(self.folder)["state"]
        moments = {
            kind: {
                name: self._fitting(name, kept[number][kind])
                for number, name in enumerate(numbered)
                if isinstance(kept.get(number, {}).get(kind), Tensor)
            }
            for kind in self.moment_names
        }
        return TrajectoryState(self.step, self.read_parameters(), moments)

    @property
    def is_model(self) -> bool:
        """Whether the checkpoint holds the model's parameters."""
        saved = self.read_parameters()
        return all(torch.equal(saved[name], own.detach().cpu().float()) for name, own in self.parameters.items())

    def read_parameters(self) -> dict[str, Tensor]:
        """Parameters of the saved model, float32 on the CPU."""
        if isinstance(self.model, PreTrainedModel):  # its class knows by which names it saves what
            options: dict[str, Any] = {"use_safetensors": True, "output_loading_info": True}
            hook = set_tqdm_hook(lambda bar, arguments, settings: bar(*arguments, **settings | {"disable": True}))
            try:
                loaded, told = cast(Any, type(self.model)).from_pretrained(self.folder, **options)
            finally:
                set_tqdm_hook(hook)
            found = {name: p.detach() for name, p in loaded.named_parameters() if name not in told["missing_keys"]}
        else:
            found = self._read_by_name()
        missing = [n for n, own in self.parameters.items() if n not in found or found[n].shape != own.shape]
        if missing:
            raise ValueError(
                f"{self.folder} lacks {missing[0]!r}, or has it in another shape ({len(missing)} such parameters in "
                "all). Pass the model as it was trained: of the same class, and with what was frozen frozen."
            )
        return {name: found[name].float() for name in self.parameters}

    def _read_by_name(self) -> dict[str, Tensor]:
        """Tensors of adapters, or of a plain module, by the names of parameters."""
        saved: Mapping[str, Tensor] = self.model.state_dict()
        name_of_file = "model.safetensors"
        if hasattr(self.model, "peft_config"):
            from peft import get_peft_model_state_dict

            saved = get_peft_model_state_dict(cast(Any, self.model), save_embedding_layers=False)
            name_of_file = "adapter_model.safetensors"
        names = {parameter.data_ptr(): name for name, parameter in self.model.named_parameters()}
        keys = {key: names.get(tensor.data_ptr()) for key, tensor in saved.items()}
        content = load_file(self.folder / name_of_file)
        return {name: content[key] for key, name in keys.items() if name is not None and key in content}

    def _fitting(self, name: str, moment: Tensor) -> Tensor:
        if moment.shape != self.parameters[name].shape:
            raise ValueError(
                f"{self.folder}/optimizer.pt has moments of shape {tuple(moment.shape)} where that of {name!r} is "
                f"expected: parameters were given to the optimizer in another order than the Trainer's. {_RECORD}"
            )
        return moment.to(torch.float32, copy=True)


def saved_optimizer(folder: Path) -> dict[str, Any]:
    """State of the optimizer in a checkpoint, loaded without executing what a pickle may hold."""
    path = folder / "optimizer.pt"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: the checkpoint was saved without its optimizer (`save_only_model=True`), or by FSDP "
            f"or DeepSpeed. {_RECORD}"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{path} is damaged, or holds more than tensors and numbers, which is not read. {_RECORD} "
            f"({str(error).splitlines()[0][:200]})"
        ) from error
    groups, state = (content.get(key) if isinstance(content, dict) else None for key in ("param_groups", "state"))
    if not isinstance(state, dict) or not groups or not all("params" in g and "lr" in g for g in groups):
        raise ValueError(f"{path} is not the state of a torch optimizer. {_RECORD}")
    return content


def trajectory_parts(
    output_dir: str | Path,
    model: nn.Module,
    train_dataset: Any,
    *,
    max_grad_norm: float,
    label_smoothing_factor: float,
    data_collator: DataCollator | None,
    row_loss: LossFunction | None,
    num_steps: int | None,
) -> dict[str, Any]:
    """Arguments of `Trajectory` for the run whose checkpoints are in a folder, up to a step or the model's."""
    states, rule = _states(output_dir, model, num_steps)
    final, num_rows = max(states), len(train_dataset)
    parameters, steps = states[final].parameters, np.arange(final)
    told = _told({step: state.folder for step, state in states.items()})
    epochs, batch_size = float(told.epoch or 1.0), told.train_batch_size or 1
    accumulation = max(1, round(num_rows * epochs / final / batch_size))  # times processes
    rates, logged, losses = (_logged(told.log_history, name) for name in ("learning_rate", "grad_norm", "loss"))
    norms = {step: np.array([norm]) for step, norm in logged.items()}
    functional = FunctionalModel(model, trainable_names=[*parameters])
    reader = RowReader(train_dataset, functional, data_collator=data_collator)
    name = None if row_loss is not None else _loss_of_numbers(reader)
    if max_grad_norm and not logged:
        function = row_loss if name is None else LOSSES_OF_NUMBERS[name]
        loss = RowLoss(reader.labels_per_row(), label_smoothing_factor, function)
        sizes = [batch_size] * accumulation
        norms = {step: _gradient_norms(state, reader, loss, sizes) for step, state in states.items()}
    clip_factors = {step: np.minimum(1.0, max_grad_norm / (own + 1e-6)).mean() for step, own in norms.items()}
    saved = {step: saved_optimizer(state.folder) for step, state in states.items()}
    updates = max((int(own["step"]) for own in saved[final]["state"].values() if "step" in own), default=final)
    measured = "" if logged else f", but {NORMS_MEASURED} measured at each checkpoint"
    assumed = [
        "all rows seen alike, in random order",
        f"learning rates interpolated between {len(rates)} logged ones and those of the checkpoints",
        f"clipping at {max_grad_norm:g} by {len(logged) or 'no'} logged gradient norms{measured}"
        if max_grad_norm
        else "no clipping",
        "the mean of `row_loss` as loss"
        if row_loss is not None
        else f"the mean {name.replace('_', ' ')} as loss"
        if name is not None
        else f"the mean cross entropy as loss, with label_smoothing_factor={label_smoothing_factor:g}",
        "the first logged loss to be that before training"
        if losses
        else "replays not to drift, as no loss was logged",
    ]
    logger.warning(
        "%s was not recorded: attribution knows it by %d checkpoints, and assumes %s. `TrajectoryCallback` would "
        "record all that.",
        *(output_dir, len(states), "; ".join(assumed)),
    )
    columns = sorted({*forward_arguments(model), *LABEL_NAMES} - {"args", "kwargs"})
    num_digested = readable_rows(train_dataset, columns)
    return {
        "optimizer": rule,
        "parameter_shapes": {name: tuple(parameter.shape) for name, parameter in parameters.items()},
        "steps": StepTable(
            epoch=(steps + 1) * (epochs / final),
            learning_rates=_learning_rates({step: own["param_groups"] for step, own in saved.items()}, rates, steps),
            gradient_norm=_interpolated(steps, {step: own.mean() for step, own in norms.items()}),
            clip_factor=_interpolated(steps, clip_factors) if max_grad_norm else np.ones(final),
            skipped=steps < final - updates,  # loss scaling begins too high
        ),
        "states": states,
        "num_rows": num_rows,
        "dataset_fingerprint": dataset_fingerprint(train_dataset, columns),
        "metadata": {
            FROM_CHECKPOINTS: assumed,
            "model": {"class": type(model).__name__},
            "architecture": architecture(model),
            "frozen_sha256": frozen_sha256({n: p for n, p in model.named_parameters() if n not in parameters}),
            "fingerprint_columns": columns,
            "num_digested_rows": num_digested,
            "rows_sha256": rows_sha256(train_dataset, columns, num_digested),
            "updates_before": max(0, updates - final),
            "label_smoothing_factor": label_smoothing_factor,
            "trained_loss": None if name is None else asdict(TrainedLoss(name=name)),
            "max_grad_norm": max_grad_norm,
            "initial_loss": losses[min(losses)] if losses else None,
            "per_device_train_batch_size": batch_size,
            "gradient_accumulation_steps": accumulation,
        },
    }


def _states(
    output_dir: str | Path, model: nn.Module, num_steps: int | None
) -> tuple[dict[int, CheckpointState], OptimizerRule]:
    """States by step, the last of them the model's unless it is named, and the update rule."""
    folders = _folders(Path(output_dir))
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not parameters:
        raise ValueError(
            f"`model` ({type(model).__name__}) has no parameter with `requires_grad=True`. Pass it as it was trained: "
            "adapters as `PeftModel.from_pretrained(..., is_trainable=True)`."
        )
    latest = folders[max(folders)]
    groups = _grouped_names(saved_optimizer(latest), model, [*parameters], latest)
    rule = _rule(saved_optimizer(latest), groups, model, parameters)
    known = model, parameters, groups, rule.moment_names
    states = {step: CheckpointState(folder, step, *known) for step, folder in sorted(folders.items())}
    if num_steps is not None and (num_steps not in states or num_steps == min(states)):
        raise ValueError(
            f"{output_dir} has no checkpoint at step {num_steps} after others, but at {[*states]}. Runs that differ "
            "in their seed only have the same ones."
        )
    final = num_steps or next((step for step in reversed(states) if states[step].is_model), None)
    if final is None or final == min(states):
        raise ValueError(
            f"The model is none of the checkpoints {[*states][1:]} in {output_dir}. Pass the model of one of them: "
            "`from_pretrained(...)` of its folder, in the dtype it was trained in."
        )
    return {step: state for step, state in states.items() if step <= final}, rule


def _folders(output_dir: Path) -> dict[int, Path]:
    """Folders of the checkpoints by step, at least two."""
    folders = [path.parent for path in output_dir.glob("checkpoint-*/trainer_state.json")]
    numbered = {folder.name.removeprefix("checkpoint-"): folder for folder in folders}
    found = {int(number): folder for number, folder in numbered.items() if number.isdecimal() and int(number) > 0}
    if len(found) < 2:
        raise ValueError(
            f"{output_dir} has {len(found)} checkpoints of a Trainer (`checkpoint-*` with `trainer_state.json`); at "
            'least 2 are needed. Train with `save_strategy="epoch"` and without `save_total_limit`, or record the run '
            "with `TrajectoryCallback`."
        )
    return found


def _grouped_names(saved: Mapping[str, Any], model: nn.Module, names: Sequence[str], folder: Path) -> list[list[str]]:
    """Names of the parameters in each group of a saved optimizer, which only numbers them."""
    decayed = {*Trainer.get_decay_parameter_names(cast(Any, None), model)}
    split = [[name for name in names if (name in decayed) == decays] for decays in (True, False)]
    sizes = [len(group["params"]) for group in saved["param_groups"]]
    for groups in (split, [[*names]]):
        if [*map(len, groups)] == sizes:
            return groups
    raise ValueError(
        f"{folder}/optimizer.pt has groups of {sizes} parameters; the Trainer would make groups of "
        f"{[*map(len, split)]} of this model. Freeze what was frozen in training (`requires_grad_(False)`). Other "
        f"groups are not known by name. {_RECORD}"
    )


def _rule(
    saved: Mapping[str, Any], groups: Sequence[Sequence[str]], model: nn.Module, parameters: Mapping[str, nn.Parameter]
) -> OptimizerRule:
    """Update rule by the constants of a saved optimizer, whose class is not saved."""
    keys, kinds = set(saved["param_groups"][0]), {kind for own in saved["state"].values() for kind in own}
    if {"betas", "amsgrad"} <= keys and kinds <= {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}:
        kind: Any = torch.optim.Adam
    elif {"momentum", "dampening"} <= keys and kinds <= {"momentum_buffer"}:
        kind = torch.optim.SGD
    else:
        raise NotImplementedError(
            f"The optimizer of the checkpoints keeps {sorted(kinds)}; only torch's SGD, Adam and AdamW can be "
            'followed. Train with `TrainingArguments(optim="adamw_torch")` or `optim="sgd"`.'
        )
    optimizer = kind([{"params": [parameters[name] for name in group]} for group in groups], lr=1.0)
    # torch calls AdamW an Adam with decoupled decay; where its version did not say, it was the Trainer's AdamW.
    with_decay = [{"decoupled_weight_decay": True, **group} for group in saved["param_groups"]]
    optimizer.load_state_dict({"state": {}, "param_groups": with_decay})
    rule = OptimizerRule.from_torch(optimizer, model.named_parameters())
    rule.check_alike()
    return rule


def _told(folders: Mapping[int, Path]) -> TrainerState:
    """What the last checkpoint says of the run; refuses checkpoints of several runs."""
    told = {step: TrainerState.load_from_json(str(folder / "trainer_state.json")) for step, folder in folders.items()}
    last = told[max(told)]
    for step, own in told.items():
        if repr(own.log_history) != repr(last.log_history[: len(own.log_history)]):  # NaN is not equal to itself
            raise ValueError(
                f"{folders[step]} is of another run than {folders[max(told)]}: it logged other things. Keep the "
                "checkpoints of one run in the folder."
            )
    return last


def _loss_of_numbers(rows: RowReader) -> str | None:
    """The key of `LOSSES_OF_NUMBERS` that is the loss of the model itself; `None` if labels are classes."""
    model, collated = rows.model, rows.collated([0])
    inputs, labels = rows.tensors(collated, [0])
    if not labels.is_floating_point():
        return None
    given = {name: value.to(model.device) for name, value in collated.items() if isinstance(value, Tensor)}
    with torch.no_grad():
        output, logits = model.module(**given), model.logits(model.parameters(), inputs)
        own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        for name, loss in LOSSES_OF_NUMBERS.items():
            if own is not None and logits.numel() == labels.numel():
                if torch.allclose(own.mean().float(), loss(logits, labels).mean(), rtol=1e-3):
                    return name
    raise NotImplementedError(
        f"The labels are numbers, and the loss that {type(model.module).__name__} computes is none of "
        f"{', '.join(LOSSES_OF_NUMBERS)}. Pass the loss of each row as `row_loss`."
    )


def _gradient_norms(state: CheckpointState, rows: RowReader, row_loss: RowLoss, sizes: Sequence[int]) -> np.ndarray:
    """Gradient norms of some random updates at a checkpoint, each of micro-batches of these sizes."""
    generator, norms, model = np.random.default_rng(state.step), [], rows.model
    named = {name: p.to(model.device).requires_grad_() for name, p in state.read_parameters().items()}
    for _ in range(NORMS_MEASURED):
        total = [torch.zeros_like(parameter) for parameter in named.values()]
        for size in sizes:
            inputs, labels = rows.batch(generator.integers(len(rows), size=size))
            loss = row_loss(model.logits(named, inputs), labels).mean() / len(sizes)
            gradients = torch.autograd.grad(loss, list(named.values()), materialize_grads=True)
            total = [before + own for before, own in zip(total, gradients, strict=True)]
        norms.append(float(torch.nn.utils.get_total_norm(total)))
    return np.array(norms)


def _interpolated(steps: np.ndarray, known: Mapping[int, Any]) -> np.ndarray:
    """Values at all steps, NaN if none is known."""
    return (
        np.interp(steps, sorted(known), [known[step] for step in sorted(known)]) if known else np.full(len(steps), nan)
    )


def _logged(log: Sequence[Mapping[str, Any]], name: str) -> dict[int, float]:
    """Finite logged values of some kind, by the number of the step whose update they belong to."""
    found = {int(entry["step"]) - 1: float(entry[name]) for entry in log if name in entry and entry.get("step")}
    return {step: value for step, value in found.items() if np.isfinite(value)}


def _learning_rates(
    saved: Mapping[int, Sequence[Mapping[str, Any]]], logged: Mapping[int, float], steps: np.ndarray
) -> np.ndarray:
    """Learning rates `(num_steps, num_groups)`, interpolated between those that checkpoints and logs tell."""
    columns, first = [], saved[min(saved)]
    initial = [float(group.get("initial_lr", group["lr"])) for group in first]
    for index, largest in enumerate(initial):
        known = {step: rate * largest / (initial[0] or 1.0) for step, rate in logged.items()}  # of the first group
        known |= {step: float(groups[index]["lr"]) for step, groups in saved.items()}  # of the next update
        start, second = sorted(known)[:2]
        slope = (known[second] - known[start]) / (second - start)
        known.setdefault(0, float(np.clip(known[start] - slope * start, 0.0, largest)))
        columns.append(_interpolated(steps, known))
    return np.stack(columns, axis=1)
