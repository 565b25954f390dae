"""The continuous spaces of synthetic inputs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hf_rgm.model.functional_model import FunctionalModel
from hf_rgm.model.synthetic_inputs import TOKENS, check_inputs, check_kind
from hf_rgm.model.token_host import SOFT_TOKEN_IDS, SOFT_TOKEN_LOGITS
from hf_rgm.synset.samples import SyntheticSamples, smoothed_one_hot

EMBEDDINGS, SOFT_TOKENS = SPACES = ("inputs_embeds", "soft_tokens")
FIRST_TOKEN_SMOOTHING = 0.2
ABSENT = 1e-9
"""Count assumed for ids that do not occur."""


class ContinuousInputs:
    """The main input itself, if it is continuous: `pixel_values`, `input_features`, `input_values`, table columns."""

    def __init__(self, model: FunctionalModel) -> None:
        self.model = model
        self.name = model.main_input_name  # what synsets call these inputs

    def read(self, inputs: Mapping[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of a collated batch in the shape of synthetic ones, `(batch_size, ...)`, and their labels."""
        check_inputs(self.name, inputs)
        return inputs[self.name], labels

    def start(self, init: str, real: Tensor, chosen: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """First `inputs`, and `input_ids` if any, of a cluster's samples, by its rows `real` and those `chosen`."""
        noise = torch.randn((len(chosen), *real.shape[1:]), generator=generator).to(real)
        centre, deviation = real.mean(0), real.std(correction=0)
        # Identical samples of a cluster would stay identical, so they get a little noise.
        if init in ("nearest", "random"):
            repeated = _repeated(chosen).reshape(-1, *[1] * (real.dim() - 1))
            return {"inputs": real[chosen] + 0.1 * deviation * noise * repeated}
        if init == "mean":
            return {"inputs": centre + 0.1 * deviation * noise}
        return {"inputs": real.mean() + deviation * noise}

    def to_forward(self, samples: SyntheticSamples) -> dict[str, Tensor]:
        """Keyword arguments of the forward for samples with one leading dimension."""
        return {self.name: samples.inputs}

    def vectors(self, real: Tensor) -> Tensor:
        """Rows as vectors whose distances are meaningful: `(num_rows, ...)`, float32."""
        return real

    def sample_vectors(self, samples: SyntheticSamples) -> Tensor:
        """Samples with one leading dimension, as vectors whose distances are meaningful."""
        return samples.inputs

    def tokens(self, samples: SyntheticSamples) -> Tensor | None:
        """Token ids of synthetic texts, `(num_samples, num_tokens)`; `None` if samples are not texts."""
        return None

    def row_tokens(self, real: Tensor) -> Tensor | None:
        """Token ids of rows, `(num_rows, num_tokens)`; `None` if rows are not texts."""
        return None


class EmbeddedTokens(ContinuousInputs):
    """Free vectors in place of frozen token embeddings, `(num_tokens, hidden_size)` a sample."""

    def __init__(self, model: FunctionalModel, num_tokens: int = 1) -> None:
        super().__init__(model)
        self.name = EMBEDDINGS
        self.num_tokens = num_tokens

    def tokens(self, samples: SyntheticSamples) -> Tensor:
        """Tokens with the nearest embeddings."""
        return self.row_tokens(samples.inputs)

    def row_tokens(self, real: Tensor) -> Tensor:
        vocabulary = torch.arange(self.model.vocabulary_size, device=real.device)
        with torch.no_grad():
            embedding = self.model.embed(self.model.parameters(), vocabulary)
            return torch.cdist(real.flatten(0, -2), embedding).argmin(1).reshape(real.shape[:-1])

    def read(self, inputs: Mapping[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
        ids, labels = first_tokens(inputs, labels, self.num_tokens)
        with torch.no_grad():
            return self.model.embed(self.model.parameters(), ids), labels


class SoftTokens(ContinuousInputs):
    """Learned mixtures of vocabulary entries as tokens, embedded by the model itself, for trained embeddings."""

    # Free vectors would pass no gradient to the embedding matrix.

    def __init__(self, model: FunctionalModel, num_tokens: int = 1, num_choices: int = 1) -> None:
        super().__init__(model)
        self.name = SOFT_TOKENS
        self.num_tokens = num_tokens
        self.num_choices = num_choices

    def read(self, inputs: Mapping[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
        return first_tokens(inputs, labels, self.num_tokens)

    def start(self, init: str, real: Tensor, chosen: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Mixtures of a row's token with others of the cluster, or of the cluster's tokens alone."""
        own = real[chosen] if init in ("nearest", "random") else None
        shape = (len(chosen), self.num_tokens)
        ids = choose_ids(real.flatten(), own, shape, self.num_choices, self.model.vocabulary_size, generator)
        if own is None:
            scale = 1.0 if init == "noise" else 0.1
            return {"inputs": scale * torch.randn(ids.shape, generator=generator).to(ids.device), "input_ids": ids}
        first = torch.zeros(shape, dtype=torch.int64, device=ids.device)
        logits = smoothed_one_hot(first, ids.shape[-1], FIRST_TOKEN_SMOOTHING)
        noise = torch.randn(ids.shape, generator=generator).to(logits)
        return {"inputs": logits + 0.1 * noise * _repeated(chosen)[:, None, None], "input_ids": ids}

    def to_forward(self, samples: SyntheticSamples) -> dict[str, Tensor]:
        assert samples.input_ids is not None  # what `start` gives always has them
        return {SOFT_TOKEN_IDS: samples.input_ids, SOFT_TOKEN_LOGITS: samples.inputs}

    def vectors(self, real: Tensor) -> Tensor:
        with torch.no_grad():
            return self.model.embed(self.model.parameters(), real)

    def sample_vectors(self, samples: SyntheticSamples) -> Tensor:
        assert samples.input_ids is not None
        with torch.no_grad():
            return self.model.mix_tokens(self.model.parameters(), samples.input_ids, samples.inputs)

    def tokens(self, samples: SyntheticSamples) -> Tensor:
        """The likeliest tokens."""
        assert samples.input_ids is not None
        return samples.input_ids.gather(-1, samples.inputs.argmax(-1, keepdim=True))[..., 0]

    def row_tokens(self, real: Tensor) -> Tensor:
        return real


def input_space(
    model: FunctionalModel, kind: str = "auto", *, num_tokens: int = 1, num_choices: int = 1
) -> ContinuousInputs:
    """The input space of a model; `kind` matters for token models, numbers for starts in token spaces."""
    check_kind(model)
    if model.main_input_name != TOKENS:
        return ContinuousInputs(model)
    if kind == SOFT_TOKENS or kind == "auto" and model.trains_embeddings:
        return SoftTokens(model, num_tokens, num_choices)
    return EmbeddedTokens(model, num_tokens)


def first_tokens(inputs: Mapping[str, Tensor], labels: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """First tokens `(batch_size, num_tokens)` of rows without padding, repeated in short rows, and their labels."""
    check_inputs(TOKENS, inputs)
    ids = inputs[TOKENS]
    mask = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    if not bool(mask.any(1).all()):
        raise ValueError(f"A row of `{TOKENS}` is all padding. Drop empty texts before training and distilling.")
    positions = torch.stack(
        [own[torch.arange(num_tokens, device=ids.device) % len(own)] for own in (m.nonzero()[:, 0] for m in mask)]
    )
    return ids.gather(1, positions), labels.gather(1, positions) if labels.dim() == 2 else labels


def choose_ids(
    pool: Tensor,
    own: Tensor | None,
    shape: tuple[int, ...],
    num_choices: int,
    num_ids: int,
    generator: torch.Generator,
) -> Tensor:
    """Ids to mix at each position: its own first, if given, then others drawn from a pool by frequency."""
    # pool: (num_occurrences,), ids with repetitions. own: of the positions' shape. The result,
    # (*shape, min(num_choices, num_ids)), has different ids at each position; if the pool has too few, others.
    # The Gumbel-top-k trick draws without replacement.
    noise = -torch.empty(torch.Size(shape).numel(), num_ids).exponential_(generator=generator).log()
    keys = noise.to(pool.device) + (torch.bincount(pool, minlength=num_ids) + ABSENT).log()
    if own is not None:
        keys.scatter_(1, own.reshape(-1, 1), torch.inf)
    return keys.topk(min(num_choices, num_ids), dim=1).indices.reshape(*shape, -1)


def _repeated(chosen: Tensor) -> Tensor:
    """Whether a chosen row occurs earlier in the list: `(num_chosen,)`, bool."""
    rows = chosen.tolist()
    return torch.tensor([row in rows[:position] for position, row in enumerate(rows)], device=chosen.device)
