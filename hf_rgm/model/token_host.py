"""The forward that `FunctionalModel` runs: soft tokens, and torch function modes that replace single operators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

SOFT_TOKEN_IDS, SOFT_TOKEN_LOGITS = "soft_token_ids", "soft_token_logits"
"""Forward arguments in place of token ids, each `(batch_size, num_tokens, num_choices)`."""


class TokenHost(nn.Module):
    """Runs a model, on soft tokens where they are given."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *, embed_only: Tensor | None = None, **inputs: Tensor) -> Any:
        with _WithoutMarks():
            if embed_only is not None:
                return token_embedding(self.module)(embed_only)
            if SOFT_TOKEN_IDS in inputs:
                embedded = token_embedding(self.module)(inputs.pop(SOFT_TOKEN_IDS))
                inputs["inputs_embeds"] = mix_embeddings(embedded, inputs.pop(SOFT_TOKEN_LOGITS))
            return self.module(**inputs)


def hosted(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters under the names that they have in the host."""
    return {f"module.{name}": value for name, value in parameters.items()}


def mix_embeddings(embedded: Tensor, logits: Tensor) -> Tensor:
    """Mixtures `(..., hidden_size)` of embeddings `(..., num_choices, hidden_size)` by the softmax of logits."""
    return (logits.softmax(-1)[..., None] * embedded).sum(-2)


def token_embedding(module: nn.Module) -> nn.Module:
    """The token embedding of a model; a `TypeError` for models without one."""
    get = getattr(module, "get_input_embeddings", None)
    if not callable(get):
        raise TypeError(
            f"{type(module).__name__} takes token ids but has no `get_input_embeddings`, which synthetic texts need. "
            "Give it that method and an `inputs_embeds` argument, as Transformers models have."
        )
    return get()  # type: ignore[return-value]


class _WithoutMarks(TorchFunctionMode):
    # Ignores `requires_grad_`: gradient checkpointing of PEFT models leaves hooks that call it on embeddings, which
    # `torch.func` neither allows nor needs, and Transformers can remove only the last of these hooks.
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return args[0] if func is Tensor.requires_grad_ else func(*args, **(kwargs or {}))


class PartialEmbeddings(TorchFunctionMode):
    """Looks up tokens in the given rows of embeddings, and in the whole embedding where a row is not given."""

    # Gradients of whole embeddings would be zero nearly everywhere, and larger than all other gradients together.

    def __init__(self, tables: Mapping[int, tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self._tables = tables  # `id` of the given rows -> each token's row or -1, `(num_tokens,)`, and the whole

    def __torch_function__(self, func, types, args=(), kwargs=None):
        found = self._tables.get(id(args[1])) if func is nn.functional.embedding else None
        if found is None:
            return func(*args, **(kwargs or {}))
        known, whole = found
        ids, rows = args[0], args[1]
        among = known[ids]
        given = nn.functional.embedding(among.clamp_min(0), rows)
        return given.where((among >= 0)[..., None], nn.functional.embedding(ids, whole))


class PrimitiveLayerNorm(TorchFunctionMode):
    """Layer normalisation from elementary operations."""

    # Under `vmap`, the backward of the fused one treats mean and deviation as constants, so that second derivatives
    # are silently wrong (pytorch/functorch issue 534).

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
