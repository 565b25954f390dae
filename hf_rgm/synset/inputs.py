"""The continuous spaces in which synthetic inputs live."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from hf_rgm.model.functional_model import FunctionalModel
from hf_rgm.model.token_host import SOFT_TOKEN_IDS, SOFT_TOKEN_LOGITS
from hf_rgm.synset.samples import SyntheticSamples, smoothed_one_hot

TOKENS = "input_ids"
COMPANIONS = ("attention_mask", "token_type_ids", "position_ids")
"""What may come with token ids; synthetic samples have no padding and leave the rest to the model."""

FIRST_TOKEN_SMOOTHING = 0.2
ABSENT = 1e-9
"""How often an id that does not occur is taken to occur."""


class InputSpace(ABC):
    """
    How synthetic inputs become arguments of the forward, and where they start.

    Args:
        model (`FunctionalModel`): The model as a function of its parameters.
    """

    name: str
    """What the synset calls its inputs."""

    def __init__(self, model: FunctionalModel) -> None:
        self.model = model

    @abstractmethod
    def read(self, inputs: Mapping[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
        """
        Real rows in the shape of synthetic ones.

        Args:
            inputs (`dict[str, Tensor]`): A collated batch.
            labels (`Tensor`): `(batch_size, *positions)`, int64.

        Returns:
            `tuple[Tensor, Tensor]`: the rows `(batch_size, ...)` and their labels.
        """

    @abstractmethod
    def start(self, init: str, real: Tensor, chosen: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """
        First inputs of a cluster's samples.

        Args:
            init (`str`): One of [`~hf_rgm.distillation.config.INITIALISATIONS`].
            real (`Tensor`): The cluster's rows, as `read` gives them.
            chosen (`Tensor`): `(samples_per_cluster,)`, rows to start from.
            generator (`torch.Generator`): For noise.

        Returns:
            `dict[str, Tensor]`: `inputs` of [`SyntheticSamples`], with `input_ids` where the space has them; first
            dimension `samples_per_cluster`.
        """

    @abstractmethod
    def to_forward(self, samples: SyntheticSamples) -> dict[str, Tensor]:
        """The forward's keyword arguments for samples with one leading dimension."""

    def vectors(self, real: Tensor) -> Tensor:
        """Rows, as `read` gives them, where distances mean something: `(num_rows, ...)`, float32."""
        return real

    def sample_vectors(self, samples: SyntheticSamples) -> Tensor:
        """The same for samples with one leading dimension."""
        return samples.inputs

    def tokens(self, samples: SyntheticSamples) -> Tensor | None:
        """What synthetic texts say, `(num_samples, num_tokens)`, int64; nothing where samples are no texts."""
        return None

    def row_tokens(self, real: Tensor) -> Tensor | None:
        """What rows say, as `read` gives them."""
        return None


class ContinuousInputs(InputSpace):
    """
    The main input itself, where it is continuous: `pixel_values`, `input_features`, `input_values`, table columns.

    Args:
        model (`FunctionalModel`): Its `main_input_name` names the tensor.
    """

    def __init__(self, model: FunctionalModel) -> None:
        super().__init__(model)
        self.name = model.main_input_name

    def read(self, inputs: Mapping[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
        """
        The main input, float32; see [`InputSpace.read`].

        Raises:
            ValueError: If the batch lacks the main input.
            NotImplementedError: If the main input is discrete, rows are padded, or other tensors come with it.
        """
        value = _main_input(inputs, self.name)
        if not value.is_floating_point():
            raise NotImplementedError(
                f"The main input `{self.name}` has dtype {value.dtype}. Synsets are for continuous inputs "
                f"(`pixel_values`, `input_features`, `input_values`) and for tokens named `{TOKENS}`."
            )
        mask = inputs.get("attention_mask")
        if mask is not None and not bool(mask.all()):
            raise NotImplementedError(
                f"Rows of `{self.name}` are padded (`attention_mask` has zeros); synthetic samples are of one length. "
                "Cut or repeat all rows to the same length before training and distilling."
            )
        others = sorted(set(inputs) - {self.name, "attention_mask"})
        if others:
            raise NotImplementedError(
                f"The forward takes {others} beside `{self.name}`; synsets hold one continuous input per sample. Drop "
                "these columns before training and distilling, or give the model a forward that does without them."
            )
        return value, labels

    def start(self, init: str, real: Tensor, chosen: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Rows, the rows' mean, or noise; see [`InputSpace.start`]."""
        noise = torch.randn((len(chosen), *real.shape[1:]), generator=generator).to(real)
        centre, deviation = real.mean(0), real.std(correction=0)
        # A little noise where samples of a cluster would be identical: they would stay so.
        if init in ("nearest", "random"):
            repeated = _repeated(chosen).reshape(-1, *[1] * (real.dim() - 1))
            return {"inputs": real[chosen] + 0.1 * deviation * noise * repeated}
        if init == "mean":
            return {"inputs": centre + 0.1 * deviation * noise}
        return {"inputs": real.mean() + deviation * noise}

    def to_forward(self, samples: SyntheticSamples) -> dict[str, Tensor]:
        """The main input."""
        return {self.name: samples.inputs}


class EmbeddedTokens(ContinuousInputs):
    """
    Free vectors in place of token embeddings, `(num_tokens, hidden_size)` a sample, for frozen embeddings.

    Args:
        model (`FunctionalModel`): A model that takes `inputs_embeds`.
        num_tokens (`int`, *optional*): Tokens of a synthetic sample; needed to start only.
    """

    def __init__(self, model: FunctionalModel, num_tokens: int = 1) -> None:
        super().__init__(model)
        self.name = "inputs_embeds"
        self.num_tokens = num_tokens

    def tokens(self, samples: SyntheticSamples) -> Tensor:
        """The tokens whose embeddings are nearest; see [`InputSpace.tokens`]."""
        return self.row_tokens(samples.inputs)

    def row_tokens(self, real: Tensor) -> Tensor:
        """The tokens of embeddings, see [`InputSpace.row_tokens`]."""
        vocabulary = torch.arange(self.model.vocabulary_size, device=real.device)
        with torch.no_grad():
            return nearest_tokens(real, self.model.embed(self.model.parameters(), vocabulary))

    def read(self, inputs: Mapping[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings of the rows' first tokens, `(batch_size, num_tokens, hidden_size)`; see [`InputSpace.read`]."""
        ids, labels = first_tokens(inputs, labels, self.num_tokens)
        with torch.no_grad():
            return self.model.embed(self.model.parameters(), ids), labels


class SoftTokens(InputSpace):
    """
    Each token a learned mixture of some vocabulary entries, embedded by the model itself, for trained embeddings.

    Free vectors would pass no gradient to the embedding matrix.

    Args:
        model (`FunctionalModel`): A model with an embedding of tokens.
        num_tokens (`int`, *optional*): Tokens of a synthetic sample; needed to start only.
        num_choices (`int`, *optional*): Vocabulary entries that each token mixes; needed to start only.
    """

    name = "soft_tokens"

    def __init__(self, model: FunctionalModel, num_tokens: int = 1, num_choices: int = 1) -> None:
        super().__init__(model)
        self.num_tokens = num_tokens
        self.num_choices = num_choices

    def read(self, inputs: Mapping[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
        """Ids of the rows' first tokens, `(batch_size, num_tokens)`; see [`InputSpace.read`]."""
        return first_tokens(inputs, labels, self.num_tokens)

    def start(self, init: str, real: Tensor, chosen: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """
        Mixtures of a row's token with others of the cluster, or of the cluster's tokens alone; see
        [`InputSpace.start`].
        """
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
        """Ids and logits of the mixtures, which [`FunctionalModel.logits`] embeds."""
        assert samples.input_ids is not None  # what `start` gives always has them
        return {SOFT_TOKEN_IDS: samples.input_ids, SOFT_TOKEN_LOGITS: samples.inputs}

    def vectors(self, real: Tensor) -> Tensor:
        """Embeddings, `(num_rows, num_tokens, hidden_size)`; see [`InputSpace.vectors`]."""
        with torch.no_grad():
            return self.model.embed(self.model.parameters(), real)

    def sample_vectors(self, samples: SyntheticSamples) -> Tensor:
        """Mixed embeddings, `(num_samples, num_tokens, hidden_size)`; see [`InputSpace.sample_vectors`]."""
        assert samples.input_ids is not None
        with torch.no_grad():
            return self.model.mix_tokens(self.model.parameters(), samples.input_ids, samples.inputs)

    def tokens(self, samples: SyntheticSamples) -> Tensor:
        """The likeliest tokens; see [`InputSpace.tokens`]."""
        assert samples.input_ids is not None
        return samples.input_ids.gather(-1, samples.inputs.argmax(-1, keepdim=True))[..., 0]

    def row_tokens(self, real: Tensor) -> Tensor:
        """The ids themselves; see [`InputSpace.row_tokens`]."""
        return real


SPACES: dict[str, type[EmbeddedTokens] | type[SoftTokens]] = {
    "inputs_embeds": EmbeddedTokens,
    "soft_tokens": SoftTokens,
}


def input_space(model: FunctionalModel, kind: str = "auto", **settings: int) -> InputSpace:
    """
    The space for a model.

    Args:
        model (`FunctionalModel`): The model.
        kind (`str`, *optional*, defaults to `"auto"`): For token models `"inputs_embeds"` or `"soft_tokens"`; `"auto"`
            takes the latter where the token embeddings are trained. Other models have their main input only.
        settings: `num_tokens` and, for soft tokens, `num_choices`.

    Raises:
        NotImplementedError: For encoder-decoder models.
    """
    if model.main_input_name != TOKENS:
        return ContinuousInputs(model)
    if getattr(model.config, "is_encoder_decoder", False):
        raise NotImplementedError(
            f"{type(model.module).__name__} is an encoder-decoder; synsets are for encoders and decoders. Use a model "
            "of one of the two kinds."
        )
    if kind == "auto":
        kind = "soft_tokens" if model.trains_embeddings else "inputs_embeds"
    space = SPACES[kind]
    if space is EmbeddedTokens:
        settings.pop("num_choices", None)
    return space(model, **settings)


def first_tokens(inputs: Mapping[str, Tensor], labels: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """
    The first tokens of each row without its padding, begun again where a row is shorter.

    Args:
        inputs (`dict[str, Tensor]`): A collated batch with `input_ids` and, where rows are padded, `attention_mask`.
        labels (`Tensor`): `(batch_size,)`, or `(batch_size, length)` for labels of tokens.
        num_tokens (`int`): How many.

    Returns:
        `tuple[Tensor, Tensor]`: ids `(batch_size, num_tokens)` and labels `(batch_size,)` or
        `(batch_size, num_tokens)`, int64.

    Raises:
        ValueError: If the batch lacks token ids or a row is all padding.
        NotImplementedError: If other tensors come with the tokens.
    """
    ids = _main_input(inputs, TOKENS)
    others = sorted(set(inputs) - {TOKENS, *COMPANIONS})
    if others:
        raise NotImplementedError(
            f"The forward takes {others} beside `{TOKENS}`; synthetic texts hold tokens only. Drop these columns "
            "before training and distilling."
        )
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
    """
    Ids to mix at each position: its own first, where given, then others drawn from a pool by how often they occur.

    Args:
        pool (`Tensor`): `(num_occurrences,)`, int64, ids with repetitions.
        own (`Tensor`, *optional*): `shape`, int64, the id each position has.
        shape (`tuple[int, ...]`): Positions.
        num_choices (`int`): At most this many ids for each position.
        num_ids (`int`): There are ids 0, 1, ... up to this; those outside the pool are taken where it is too small.
        generator (`torch.Generator`): Draws them.

    Returns:
        `Tensor`: `(*shape, min(num_choices, num_ids))`, int64, all different at each position.
    """
    # The Gumbel-top-k trick draws without replacement.
    noise = -torch.empty(torch.Size(shape).numel(), num_ids).exponential_(generator=generator).log()
    keys = noise.to(pool.device) + (torch.bincount(pool, minlength=num_ids) + ABSENT).log()
    if own is not None:
        keys.scatter_(1, own.reshape(-1, 1), torch.inf)
    return keys.topk(min(num_choices, num_ids), dim=1).indices.reshape(*shape, -1)


def nearest_tokens(vectors: Tensor, embedding: Tensor) -> Tensor:
    """
    Ids of the tokens whose embeddings are nearest.

    Args:
        vectors (`Tensor`): `(..., hidden_size)`.
        embedding (`Tensor`): `(vocabulary_size, hidden_size)`.

    Returns:
        `Tensor`: `(...)`, int64.
    """
    return torch.cdist(vectors.flatten(0, -2), embedding).argmin(1).reshape(vectors.shape[:-1])


def _main_input(inputs: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in inputs:
        raise ValueError(
            f"The model's main input `{name}` is not among the collated columns ({', '.join(inputs)}). "
            "Name the dataset column like the forward argument, or pass the `data_collator` that does so."
        )
    return inputs[name]


def _repeated(chosen: Tensor) -> Tensor:
    """Which of the chosen rows occur before in the list, `(num_chosen,)`, bool."""
    rows = chosen.tolist()
    return torch.tensor([row in rows[:position] for position, row in enumerate(rows)], device=chosen.device)
