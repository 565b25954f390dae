"""A user's model as a pure function of its trainable parameters."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import inspect
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_rgm.model.frozen_layers import kept_in_16_bits, to_float
from hf_rgm.model.sharding import is_split, whole
from hf_rgm.model.token_host import (
    PartialEmbeddings,
    PrimitiveLayerNorm,
    TokenHost,
    hosted,
    mix_embeddings,
    token_embedding,
)
from hf_rgm.model.warn_once import warn_once

logger = logging.getLogger(__name__)

LABEL_NAMES = ("labels", "label", "label_ids")
SPAN_NAMES = ("start_positions", "end_positions")
"""Labels of models that answer with a span of the text: the position of its first token, and of its last."""
FROZEN_ELEMENTS = 1024

ToVector = Callable[[Mapping[str, Tensor]], Tensor]
"""Makes a vector `(*batch, length)` of named gradients `(*batch, *shape)`."""


@dataclass(frozen=True)
class ParameterSpace:
    """The trainable parameters laid out as one vector, in the order of `model.named_parameters()`."""

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]

    @property
    def sizes(self) -> list[int]:
        return [math.prod(shape) for shape in self.shapes]

    @property
    def num_parameters(self) -> int:
        return sum(self.sizes)

    def flatten(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Concatenates tensors `(*batch, *shape)` to `(*batch, num_parameters)`."""
        return torch.cat(
            [
                parameters[name].flatten(parameters[name].dim() - len(shape))
                if shape
                else parameters[name].unsqueeze(-1)
                for name, shape in zip(self.names, self.shapes, strict=True)
            ],
            dim=-1,
        )

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """Views a tensor `(*batch, num_parameters)` as named tensors `(*batch, *shape)`."""
        pieces = vector.split(self.sizes, dim=-1)
        return {
            name: piece.reshape((*vector.shape[:-1], *shape))
            for name, shape, piece in zip(self.names, self.shapes, pieces, strict=True)
        }

    def expand_groups(self, values: Sequence[float], group_of: Callable[[str], int], device: torch.device) -> Tensor:
        """Spreads one value per optimizer group to `(num_parameters,)`, or to `(1,)` if all are equal."""
        if len(set(values)) == 1:
            return torch.full((1,), values[0], dtype=torch.float32, device=device)
        chosen = torch.tensor([values[group_of(name)] for name in self.names], dtype=torch.float32, device=device)
        return chosen.repeat_interleave(torch.tensor(self.sizes, device=device))


class FunctionalModel:
    """A private float32 copy of a model, evaluated at any values of its trainable parameters, differentiably."""

    def __init__(
        self,
        model: nn.Module,
        *,
        trainable_names: Sequence[str] | None = None,
        device: torch.device | str | None = None,
        shifts_labels: bool | None = None,
    ) -> None:
        if is_split(model):
            raise ValueError(
                f"`model` ({type(model).__name__}) is split among processes. Save it with `trainer.save_model()`, and "
                "pass the whole model: `from_pretrained(...)`."
            )
        own = dict(model.named_parameters())
        if trainable_names is None:
            trainable_names = [name for name, parameter in own.items() if parameter.requires_grad]
        missing = [name for name in trainable_names if name not in own]
        if missing:
            raise ValueError(
                f"`model` ({type(model).__name__}) has no parameter {missing[0]!r}"
                f"{f' and {len(missing) - 1} others' if missing[1:] else ''} that the recorded run trained. Pass the "
                "model that was trained, of the same architecture."
            )
        trainable = [(name, own[name]) for name in trainable_names]
        if not trainable:
            raise ValueError(
                f"`model` ({type(model).__name__}) has no parameter with `requires_grad=True`: nothing was "
                "trained. Pass the model as it was trained (PEFT: `PeftModel.from_pretrained(.., is_trainable=True)`)."
            )
        self.device = torch.device(device) if device is not None else trainable[0][1].device
        self.space = ParameterSpace(tuple(n for n, _ in trainable), tuple(p.shape for _, p in trainable))
        self.main_input_name = main_input_name(model)
        self.forward_arguments = forward_arguments(model)
        kept = kept_in_16_bits(model, self.space.names)
        shared = {  # with the original, to save memory
            id(parameter): nn.Parameter(parameter.detach(), requires_grad=False)
            for name, parameter in own.items()
            if id(parameter) in kept
            or (name not in self.space.names and parameter.dtype == torch.float32 and parameter.device == self.device)
        }
        copied = _copied(extract_model_from_parallel(model), dict(shared))
        self.module = to_float(_prepared(copied), {id(shared[key]) for key in kept}).to(self.device)
        self.module.requires_grad_(False)
        self._host = TokenHost(self.module)
        self.ignores_padding: bool | None = None  # not known yet
        self.has_forward_mode: bool | None = None
        # Virtual tokens before a causal text: the last of them predicts its first token, so that logits are taken from
        # there on and no label needs to be shifted.
        self.prompt_length = _prompt_length(self.module)
        # Whether each token predicts the label of the next one, as in causal language models.
        shifts = _is_causal(self.module) and not self.prompt_length
        self.shifts_labels = shifts if shifts_labels is None else shifts_labels
        self._known_rows: dict[str, Tensor] = {}
        self._constants = {"use_cache": False} if "use_cache" in self.forward_arguments else {}

    @property
    def num_parameters(self) -> int:
        return self.space.num_parameters

    def frozen_sha256(self) -> str:
        """Identity of the frozen parameters, by up to 1,024 evenly spaced elements of each."""
        return frozen_sha256({n: p for n, p in self.module.named_parameters() if n not in self.space.names})

    @property
    def config(self) -> Any:
        """The Transformers configuration, or `None` for other modules."""
        return getattr(self.module, "config", None)

    @property
    def predicts_spans(self) -> bool:
        """Whether the model answers with a span of the text."""
        return {*SPAN_NAMES} <= {*self.forward_arguments}

    @property
    def vocabulary_size(self) -> int:
        return len(next(token_embedding(self.module).parameters()))

    @property
    def trains_embeddings(self) -> bool:
        embedding = {id(parameter) for parameter in token_embedding(self.module).parameters()}
        own = dict(self.module.named_parameters())
        return any(id(own[name]) in embedding for name in self.space.names)

    def parameters(self) -> dict[str, Tensor]:
        """Trainable parameters of the original model, float32, detached."""
        own = dict(self.module.named_parameters())
        return {name: own[name].detach() for name in self.space.names}

    def logits(self, parameters: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
        """
        Logits `(batch_size, ..., num_labels)` of the forward's inputs, float32; soft tokens are embedded first.

        Of spans `(batch_size, 2, length)`: each end of a span is one of the positions.
        """
        partial = {
            id(parameters[name]): (known, self.module.get_parameter(name))
            for name, known in self._known_rows.items()
            if len(parameters[name]) < len(known)
        }
        with PartialEmbeddings(partial) if partial else contextlib.nullcontext():
            output = functional_call(self._host, hosted(parameters), (), {**self._constants, **inputs})
        if isinstance(output, Tensor):
            return output
        names = ("start_logits", "end_logits", "logits")
        start, end, logits = (
            output.get(name) if isinstance(output, Mapping) else getattr(output, name, None) for name in names
        )
        if start is not None and end is not None:
            return torch.stack([start, end], dim=1)
        if logits is None:
            raise TypeError(
                f"The forward of {type(self.module).__name__} returned {type(output).__name__}. It must return a "
                "tensor of logits, or an output or dictionary with `logits`."
            )
        if self.prompt_length:
            return logits[:, self.prompt_length - 1 : -1]
        return logits

    def give_rows(self, name: str, rows: Tensor) -> bool:
        """Lets `logits` take only these rows `(num_rows,)` of an embedding; `False` if that is not possible."""
        module = self.module.get_submodule(name.rpartition(".")[0])
        weight = getattr(module, "weight", None)
        uses = sum(other is weight for _, other in self.module.named_parameters(remove_duplicate=False))
        if type(module) is not nn.Embedding or uses != 1 or module.max_norm is not None or module.scale_grad_by_freq:
            return False
        known = torch.full((module.num_embeddings,), -1, dtype=torch.int64, device=self.device)
        known[rows] = torch.arange(len(rows), device=self.device)
        self._known_rows[name] = known
        return True

    def mix_tokens(self, parameters: Mapping[str, Tensor], ids: Tensor, logits: Tensor) -> Tensor:
        """Embeddings of soft tokens, `(*ids.shape[:-1], hidden_size)`, float32."""
        return mix_embeddings(self.embed(parameters, ids), logits)

    def embed(self, parameters: Mapping[str, Tensor], ids: Tensor) -> Tensor:
        """Embeddings of token ids, `(*ids.shape, hidden_size)`, float32."""
        return functional_call(self._host, hosted(parameters), (), {"embed_only": ids})

    @contextlib.contextmanager
    def differentiable(self) -> Iterator[None]:
        """Avoids fused kernels whose second derivatives are missing or wrong."""
        with sdpa_kernel(SDPBackend.MATH), PrimitiveLayerNorm():
            yield

    def module_with(self, parameters: Mapping[str, Tensor], like: nn.Module) -> nn.Module:
        """A deep copy of `like` with these values of the trainable parameters, in their own dtype."""
        clone = _copied(like)
        own = dict(clone.named_parameters())
        with torch.no_grad():
            for name in self.space.names:
                own[name].copy_(parameters[name])
        return clone


def _copied(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    # Training may leave a wrapper of a module's forward on the object: mixed precision its autocast, TRL a fused loss.
    # It may hold the original, whose parameters the copy would then compute with: the copy runs its class's forward.
    clone = copy.deepcopy(model, memo)
    for module in clone.modules():
        own = vars(module).get("forward")
        if own is not None and _unwrapped(own) is _unwrapped(type(module).forward):
            del module.forward
    return clone


def _unwrapped(forward: Any) -> Any:
    forward = inspect.unwrap(forward)
    return getattr(forward, "__func__", forward)


def _prepared(module: nn.Module) -> nn.Module:
    """The module with eager attention, without dropout and gradient checkpointing."""
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules()):
        warn_once(
            logger,
            "%s has batch normalisation. Attribution evaluates it with the final running statistics; the effect a "
            "row has on the statistics of its batch is not attributed.",
            type(module).__name__,
        )
    inner = _base_model(module)
    if isinstance(inner, PreTrainedModel):
        inner.set_attn_implementation("eager")
    return module.eval()


def main_input_name(model: nn.Module) -> str:
    """Name of the forward argument that holds the data (`pixel_values`, `input_ids`, ...)."""
    # A `PreTrainedModel` that declares nothing inherits "input_ids", which its forward may not take.
    declared = getattr(model, "main_input_name", None)
    arguments = inspect.signature(_base_model(model).forward).parameters.values()
    named = [
        a.name for a in arguments if a.kind not in (a.VAR_POSITIONAL, a.VAR_KEYWORD) and a.name not in LABEL_NAMES
    ]
    if isinstance(declared, str) and (declared in named or not named):
        return declared
    return named[0] if named else next(a.name for a in arguments)


def forward_arguments(model: nn.Module) -> tuple[str, ...]:
    """Names of the forward's arguments, as the Trainer uses them to drop unused dataset columns."""
    return tuple(inspect.signature(_base_model(model).forward).parameters)


def _base_model(model: nn.Module) -> nn.Module:
    """The Transformers model inside a PEFT wrapper, or the model itself."""
    get_base_model = getattr(model, "get_base_model", None)
    return get_base_model() if callable(get_base_model) else model  # type: ignore[return-value]


def frozen_sha256(frozen: Mapping[str, Tensor]) -> str:
    """Identity of parameters, by up to 1,024 evenly spaced elements of each; all processes of a split model call."""
    return parameters_sha256(
        {name: whole(p.detach()).flatten()[:: max(1, p.numel() // FROZEN_ELEMENTS)] for name, p in frozen.items()}
    )


def _prompt_length(model: nn.Module) -> int:
    """Virtual tokens that PEFT puts before every text of a causal language model, each with logits of its own."""
    config: Any = getattr(model, "active_peft_config", None)
    of_prompt = getattr(config, "peft_type", None) in ("PROMPT_TUNING", "P_TUNING") and _is_causal(model)
    return int(config.num_virtual_tokens) if of_prompt else 0


def _is_causal(model: nn.Module) -> bool:
    """Whether a model is a causal language model of Transformers, or derived from one."""
    kinds = {kind.__name__ for kind in type(_base_model(model)).__mro__}
    return not kinds.isdisjoint(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())


def parameters_sha256(parameters: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and float32 values: the identity of a set of trained parameters."""
    digest = hashlib.sha256()
    for name in sorted(parameters):
        tensor = parameters[name].detach().to(device="cpu", dtype=torch.float32).contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
