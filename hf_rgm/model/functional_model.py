"""A user's model seen as a pure function of its trainable parameters."""

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
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_rgm.model.sharding import is_split

logger = logging.getLogger(__name__)

LABEL_NAMES = ("labels", "label", "label_ids")
FROZEN_ELEMENTS = 1024
SOFT_TOKEN_IDS, SOFT_TOKEN_LOGITS = "soft_token_ids", "soft_token_logits"
"""Arguments of [`FunctionalModel.logits`] that stand for token ids: `(batch_size, num_tokens, num_choices)` each."""

ToVector = Callable[[Mapping[str, Tensor]], Tensor]
"""Makes a vector `(*batch, length)` of named gradients `(*batch, *shape)`."""


@dataclass(frozen=True)
class ParameterSpace:
    """
    The trainable parameters laid out as one vector.

    Args:
        names (`tuple[str, ...]`): Parameter names, as in `model.named_parameters()`.
        shapes (`tuple[torch.Size, ...]`): One shape per name.
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]

    @property
    def sizes(self) -> list[int]:
        """Number of elements of each parameter."""
        return [math.prod(shape) for shape in self.shapes]

    @property
    def num_parameters(self) -> int:
        """Length of the flat vector."""
        return sum(self.sizes)

    def flatten(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """
        Concatenates tensors of shape `(*batch, *shape)` into one of shape `(*batch, num_parameters)`.
        """
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
        """Views a tensor of shape `(*batch, num_parameters)` as named tensors of shape `(*batch, *shape)`."""
        pieces = vector.split(self.sizes, dim=-1)
        return {
            name: piece.reshape((*vector.shape[:-1], *shape))
            for name, shape, piece in zip(self.names, self.shapes, pieces, strict=True)
        }

    def expand_groups(self, values: Sequence[float], group_of: Callable[[str], int], device: torch.device) -> Tensor:
        """
        Spreads one value per optimizer group over the vector: shape `(num_parameters,)`, or `(1,)` if all are equal.
        """
        if len(set(values)) == 1:
            return torch.full((1,), values[0], dtype=torch.float32, device=device)
        return torch.cat(
            [
                torch.full((size,), values[group_of(name)], dtype=torch.float32, device=device)
                for name, size in zip(self.names, self.sizes, strict=True)
            ]
        )


class FunctionalModel:
    """
    Evaluates an unmodified model at any value of its trainable parameters, differentiably to any order.

    Works on a private float32 copy with eager attention in evaluation mode (no dropout, no gradient checkpointing), so
    that the user's model is left as it is. Frozen float32 parameters share their memory with the original.

    Args:
        model (`torch.nn.Module`): A `PreTrainedModel`, a PEFT model, or any module whose forward takes keyword
            arguments and returns logits or an output with `.logits`. Parameters with `requires_grad` are trainable.
        trainable_names (`Sequence[str]`, *optional*): Names of the trainable parameters, for a model loaded from disk,
            where `requires_grad` is lost.
        device (`torch.device`, *optional*): Where to compute. Defaults to the model's device.

    Raises:
        ValueError: If no parameter requires a gradient, a name is not the model's, or the model is split among
            processes.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        trainable_names: Sequence[str] | None = None,
        device: torch.device | str | None = None,
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
        shared = {
            id(parameter): nn.Parameter(parameter.detach(), requires_grad=False)
            for name, parameter in own.items()
            if name not in self.space.names and parameter.dtype == torch.float32 and parameter.device == self.device
        }
        self.module = _prepare(_copied(extract_model_from_parallel(model), shared)).to(self.device)
        self.module.requires_grad_(False)
        self._host = _TokenHost(self.module)
        self.ignores_padding: bool | None = None  # not known yet
        self._known_rows: dict[str, Tensor] = {}
        self._constants = {"use_cache": False} if "use_cache" in self.forward_arguments else {}

    @property
    def num_parameters(self) -> int:
        """Number of trainable parameters."""
        return self.space.num_parameters

    def frozen_sha256(self) -> str:
        """Identity of the parameters that were not trained, by up to 1,024 evenly spaced elements of each."""
        frozen = {
            name: parameter.flatten()[:: max(1, parameter.numel() // FROZEN_ELEMENTS)]
            for name, parameter in self.module.named_parameters()
            if name not in self.space.names
        }
        return parameters_sha256(frozen)

    @property
    def config(self) -> Any:
        """The Transformers configuration, or `None` for other modules."""
        return getattr(self.module, "config", None)

    @property
    def shifts_labels(self) -> bool:
        """Whether the label of a token is what its predecessor predicts, as in causal language models."""
        # By class name, as the Trainer decides it for label smoothing.
        return type(_base_model(self.module)).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()

    @property
    def embedding(self) -> nn.Module:
        """
        The embedding of tokens.

        Raises:
            TypeError: If the model has none.
        """
        return _embedding(self.module)

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens that the embedding knows."""
        return len(next(self.embedding.parameters()))

    @property
    def trains_embeddings(self) -> bool:
        """Whether the embedding of tokens has trainable parameters."""
        embedding = {id(parameter) for parameter in self.embedding.parameters()}
        own = dict(self.module.named_parameters())
        return any(id(own[name]) in embedding for name in self.space.names)

    def parameters(self) -> dict[str, Tensor]:
        """The trainable parameters of the model that was passed, float32, detached."""
        own = dict(self.module.named_parameters())
        return {name: own[name].detach() for name in self.space.names}

    def logits(self, parameters: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
        """
        Logits of a batch.

        Args:
            parameters (`dict[str, Tensor]`): Values of the trainable parameters; of embeddings, the rows that
                [`FunctionalModel.give_rows`] named are enough.
            inputs (`dict[str, Tensor]`): Keyword arguments of the forward, without labels. `soft_token_ids` and
                `soft_token_logits` among them are embedded as mixtures of tokens.

        Returns:
            `Tensor`: shape `(batch_size, ..., num_labels)`, float32.
        """
        partial = {
            id(parameters[name]): (known, self.module.get_parameter(name))
            for name, known in self._known_rows.items()
            if len(parameters[name]) < len(known)
        }
        with _PartialEmbeddings(partial) if partial else contextlib.nullcontext():
            output = functional_call(self._host, _hosted(parameters), (), {**self._constants, **inputs})
        if isinstance(output, Tensor):
            return output
        if hasattr(output, "logits"):
            return output.logits
        if isinstance(output, Mapping) and "logits" in output:
            return output["logits"]
        raise TypeError(
            f"The forward of {type(self.module).__name__} returned {type(output).__name__}. It must return a tensor "
            "of logits, or an output or dictionary with `logits`."
        )

    def give_rows(self, name: str, rows: Tensor) -> bool:
        """
        Prepares [`FunctionalModel.logits`] for some rows of an embedding in place of all: others are the model's own.

        Args:
            name (`str`): A trainable parameter.
            rows (`Tensor`): `(num_rows,)`, int64, which will be given.

        Returns:
            `bool`: whether the parameter is an embedding that nothing else uses, so that this can be done.
        """
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
        return (logits.softmax(-1)[..., None] * self.embed(parameters, ids)).sum(-2)

    def embed(self, parameters: Mapping[str, Tensor], ids: Tensor) -> Tensor:
        """Embeddings of token ids: `(*ids.shape, hidden_size)`, float32."""
        return functional_call(self._host, _hosted(parameters), (), {"embed_only": ids})

    @contextlib.contextmanager
    def differentiable(self) -> Iterator[None]:
        """Avoids fused kernels without second derivatives, or with wrong ones, while the context lasts."""
        with sdpa_kernel(SDPBackend.MATH), _PrimitiveLayerNorm():
            yield

    def module_with(self, parameters: Mapping[str, Tensor], like: nn.Module) -> nn.Module:
        """A deep copy of `like` whose trainable parameters have the given values (cast to their own dtype)."""
        clone = _copied(like)
        own = dict(clone.named_parameters())
        with torch.no_grad():
            for name in self.space.names:
                own[name].copy_(parameters[name])
        return clone


class _TokenHost(nn.Module):
    """Runs a model, on soft tokens where they are given."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *, embed_only: Tensor | None = None, **inputs: Tensor) -> Any:
        with _WithoutMarks():
            if embed_only is not None:
                return _embedding(self.module)(embed_only)
            if SOFT_TOKEN_IDS in inputs:
                embedded = _embedding(self.module)(inputs.pop(SOFT_TOKEN_IDS))
                shares = inputs.pop(SOFT_TOKEN_LOGITS).softmax(-1)
                inputs["inputs_embeds"] = (shares[..., None] * embedded).sum(-2)
            return self.module(**inputs)


class _WithoutMarks(TorchFunctionMode):
    """
    Ignores `requires_grad_`.

    Gradient checkpointing of PEFT models leaves hooks that mark embeddings so, which `torch.func` does not allow and
    does not need; Transformers forgets all but the last of them.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return args[0] if func is Tensor.requires_grad_ else func(*args, **(kwargs or {}))


def _embedding(module: nn.Module) -> nn.Module:
    get = getattr(module, "get_input_embeddings", None)
    if not callable(get):
        raise TypeError(
            f"{type(module).__name__} takes token ids but has no `get_input_embeddings`, which synthetic texts need. "
            "Give it that method and an `inputs_embeds` argument, as Transformers models have."
        )
    return get()  # type: ignore[return-value]


def _hosted(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"module.{name}": value for name, value in parameters.items()}


class _PartialEmbeddings(TorchFunctionMode):
    """
    Looks tokens up in embeddings of which some rows are given, the others in whole ones.

    Gradients of whole ones would be zeros nearly everywhere, and as large as all else together.

    Args:
        tables (`dict`): By the `id` of the given rows where each token is among them, or -1, `(num_tokens,)`, and the
            whole embedding.
    """

    def __init__(self, tables: Mapping[int, tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self._tables = tables

    def __torch_function__(self, func, types, args=(), kwargs=None):
        found = self._tables.get(id(args[1])) if func is nn.functional.embedding else None
        if found is None:
            return func(*args, **(kwargs or {}))
        known, whole = found
        ids, rows = args[0], args[1]
        among = known[ids]
        given = nn.functional.embedding(among.clamp_min(0), rows)
        return given.where((among >= 0)[..., None], nn.functional.embedding(ids, whole))


class _PrimitiveLayerNorm(TorchFunctionMode):
    """
    Layer normalisation from elementary operations.

    Under `vmap`, the backward of the fused one takes mean and deviation for constants, which makes second derivatives
    silently wrong (pytorch/functorch issue 534).
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return (_layer_norm if func is nn.functional.layer_norm else func)(*args, **(kwargs or {}))


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    dimensions = tuple(range(-len(normalized_shape), 0))
    centred = input - input.mean(dimensions, keepdim=True)
    result = centred * (centred.square().mean(dimensions, keepdim=True) + eps).rsqrt()
    result = result if weight is None else result * weight
    return result if bias is None else result + bias


def _copied(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """
    A deep copy whose modules run the forward of their class.

    Training may leave a wrapper of that forward on the object: mixed precision its autocast, TRL a fused loss. Such a
    wrapper may hold on to the original, whose parameters the copy would compute with.
    """
    clone = copy.deepcopy(model, memo)
    for module in clone.modules():
        own = vars(module).get("forward")
        if own is not None and _unwrapped(own) is _unwrapped(type(module).forward):
            del module.forward
    return clone


def _unwrapped(forward: Any) -> Any:
    forward = inspect.unwrap(forward)
    return getattr(forward, "__func__", forward)


def _prepare(module: nn.Module) -> nn.Module:
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules()):
        logger.warning(
            "%s has batch normalisation. Attribution evaluates it with the final running statistics; the effect a "
            "row has on the statistics of its batch is not attributed.",
            type(module).__name__,
        )
    inner = _base_model(module)
    if isinstance(inner, PreTrainedModel):
        inner.set_attn_implementation("eager")
    return module.float().eval()


def main_input_name(model: nn.Module) -> str:
    """
    Name of the forward argument that holds the data (`pixel_values`, `input_ids`, ...).

    It is what the model declares, if its forward takes that: a `PreTrainedModel` that declares nothing inherits
    `"input_ids"`. Otherwise it is the forward's first argument.
    """
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


def parameters_sha256(parameters: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and float32 values: the identity of a set of trained parameters."""
    digest = hashlib.sha256()
    for name in sorted(parameters):
        tensor = parameters[name].detach().to(device="cpu", dtype=torch.float32).contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
