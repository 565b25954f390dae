"""Which runs can be recorded, and how their settings are described."""

from __future__ import annotations

import inspect
import logging
from importlib.metadata import version
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch import nn
from transformers import TrainingArguments

from hf_rgm.model.architecture import architecture
from hf_rgm.model.functional_model import LABEL_NAMES, forward_arguments
from hf_rgm.model.sharding import is_sharded, is_split, model_class

logger = logging.getLogger(__name__)

_DATA_PARALLEL = ("NO", "FSDP", "MULTI_CPU", "MULTI_GPU", "MULTI_NPU", "MULTI_XPU")
"""Values of `DistributedType` under which every process has other rows."""


def check_supported(args: TrainingArguments, model: nn.Module, lr_scheduler: Any) -> None:
    """Refuses set-ups whose training cannot be recorded."""
    way_out = (
        "Train with `torchrun` or `accelerate launch` with the whole model on every device, or with FSDP2 "
        '(`fsdp=True, fsdp_config={"version": 2}`).'
    )
    if args.deepspeed:
        raise NotImplementedError(
            "DeepSpeed steps its optimizer inside the backward pass, where it cannot be recorded. Train without "
            "`deepspeed`."
        )
    kind = args.distributed_state.distributed_type if args.distributed_state is not None else DistributedType.NO
    by_fsdp = bool(args.fsdp) or kind == DistributedType.FSDP
    if by_fsdp and not is_sharded(model):
        raise NotImplementedError(f"Recording under FSDP1 is not supported, got fsdp={args.fsdp!r}. {way_out}")
    otherwise_split = is_split(model) and not by_fsdp
    if otherwise_split or args.parallelism_config is not None or (getattr(model, "tp_size", None) or 1) > 1:
        raise NotImplementedError(
            f"Recording a model that is split over devices by other means than FSDP2 is not supported. {way_out}"
        )
    if kind.value not in _DATA_PARALLEL:
        raise NotImplementedError(f"Recording under {kind.value} is not supported. {way_out}")
    if args.world_size > 1 and loss_reduction(model) == "update" and not args.average_tokens_across_devices:
        raise NotImplementedError(
            f"With `average_tokens_across_devices=False`, each of the {args.world_size} processes divides its loss by "
            "its own number of items, which is not recorded. Leave it at its default."
        )
    if args.n_gpu > 1:
        raise NotImplementedError(
            f"Recording with DataParallel on {args.n_gpu} GPUs is not supported. Set CUDA_VISIBLE_DEVICES=0."
        )
    strategy = getattr(args, "packing_strategy", None)
    packed = getattr(args, "packing", False) and strategy != "wrapped"
    if packed or getattr(args, "padding_free", False):
        setting = f"packing_strategy={strategy!r}" if packed else "padding_free=True"
        raise NotImplementedError(
            f"{type(args).__name__}({setting}) flattens the rows of a batch into one sequence, where one cannot be "
            'told from another. Train with `packing=False`, or with `packing_strategy="wrapped"`, whose packed rows '
            "count as rows; in either case with `padding_free=False`."
        )
    if getattr(lr_scheduler, "cycle_momentum", False):
        raise NotImplementedError(
            f"{type(lr_scheduler).__name__} changes the momentum at every step, which is not recorded. Create it with "
            "`cycle_momentum=False`."
        )
    if args.neftune_noise_alpha:
        logger.warning(
            "NEFTune (neftune_noise_alpha=%s) adds noise to embeddings, which attribution leaves out: its gradients "
            "are less like those of training than without.",
            args.neftune_noise_alpha,
        )


def inner_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The torch optimizer that Accelerate wraps."""
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer


def loss_scaler(optimizer: torch.optim.Optimizer) -> torch.amp.GradScaler | None:
    """The loss scaler of fp16 training, if any."""
    return optimizer.scaler if isinstance(optimizer, AcceleratedOptimizer) else None


def loss_reduction(model: nn.Module) -> str:
    """How the loss of an update is reduced: `update` (over all its items) or `micro_batch` (mean of batch means)."""
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    accepts = getattr(inner, "accepts_loss_kwargs", None)
    if accepts is None:
        parameters = inspect.signature(inner.forward).parameters.values()
        accepts = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    return "update" if accepts else "micro_batch"


def fingerprint_columns(args: TrainingArguments, model: nn.Module) -> list[str]:
    """Dataset columns that reach the model, as the `Trainer` selects them."""
    return sorted({*forward_arguments(model), *LABEL_NAMES, *(args.label_names or ())} - {"args", "kwargs"})


def describe_run(args: TrainingArguments, model: nn.Module, *, batch_size: int, sampler_seed: int | None) -> dict:
    """JSON-safe description of a run: model, seeds, loss and library versions."""
    config = getattr(model, "config", None)
    return {
        "model": {
            "class": model_class(model).__name__,
            "name_or_path": getattr(config, "name_or_path", None) or None,
            # Transformers keeps the Hub commit of a loaded model nowhere else.
            "commit_hash": getattr(config, "_commit_hash", None),
        },
        "architecture": architecture(model),
        "fingerprint_columns": fingerprint_columns(args, model),
        "seeds": {"seed": args.seed, "data_seed": args.data_seed, "sampler_seed": sampler_seed},
        "loss_reduction": loss_reduction(model),
        # TRL's name for the loss of its trainers.
        "loss_type": getattr(args, "loss_type", None),
        "label_smoothing_factor": args.label_smoothing_factor,
        "max_grad_norm": args.max_grad_norm,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "per_device_train_batch_size": batch_size,
        "num_processes": args.world_size,
        "bf16": args.bf16,
        "fp16": args.fp16,
        "versions": {name: version(name) for name in ("torch", "transformers", "accelerate")},
    }
