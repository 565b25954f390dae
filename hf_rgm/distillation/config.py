"""Settings of the distiller."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

INITIALISATIONS = ("nearest", "random", "mean", "noise")
TOKEN_INPUTS = ("auto", "inputs_embeds", "soft_tokens")
RESPONSES = ("int8", "bfloat16", "none")
PRESETS: dict[str, dict[str, Any]] = {"quick": {"samples_per_cluster": 2, "tolerance": 0.1}, "accurate": {}}
"""Changes that each preset makes to the defaults."""


def memory_bytes(max_memory: str) -> int:
    """A memory setting such as `"4GB"` (10^9 bytes each) or `"500MiB"` in bytes."""
    from accelerate.utils import convert_file_size_to_int  # imports torch

    try:
        size = convert_file_size_to_int(max_memory)
    except ValueError as error:
        raise ValueError(f"`max_memory` must be a size such as '4GB' or '500MB', got {max_memory!r}.") from error
    if size < 1:
        raise ValueError(f"`max_memory` must be at least one byte, got {max_memory!r}.")
    return size


@dataclass(frozen=True)
class DistillationConfig:
    """
    Settings of the distiller.

    Args:
        samples_per_cluster (`int`, *optional*, defaults to `5`): Synthetic samples for each cluster.
        tolerance (`float`, *optional*, defaults to `0.03`): When to stop. A block of clusters is done if, after a
            round of iterations, its matching error and 1 minus the rank correlation of first-order scores by synthetic
            and real gradients are at most this, or if the round lowered both by at most this. 0 makes all iterations.
        num_iterations (`int`, *optional*, defaults to `600`): Maximum number of Adam iterations, in rounds of 10, 20,
            40, ...
        states_per_iteration (`int`, *optional*, defaults to `1`): Recorded states matched in an iteration. All states
            take turns.
        init (`str`, *optional*, defaults to `"random"`): Where samples start: `"nearest"` (the real row nearest the
            cluster's centre, and random rows), `"random"` rows, the cluster's `"mean"`, or `"noise"` with the data's
            mean and deviation. Only the last two do not start from real rows.
        token_inputs (`str`, *optional*, defaults to `"auto"`): What a synthetic text is, for token models:
            `"inputs_embeds"`, free vectors in place of embeddings, or `"soft_tokens"`, mixtures of vocabulary entries,
            which trained embeddings need. `"auto"` takes soft tokens if the embeddings are trained.
        num_tokens (`int`, *optional*, defaults to `16`): Length of a synthetic text, for token models.
        num_token_choices (`int`, *optional*, defaults to `16`): Vocabulary entries that a soft token mixes.
        num_target_choices (`int`, *optional*, defaults to `64`): Labels that a target chooses from; all labels if
            there are no more.
        input_learning_rate (`float`, *optional*, defaults to `0.04`): Adam's rate for inputs, in standard deviations
            of the inputs.
        target_learning_rate (`float`, *optional*, defaults to `0.3`): Adam's rate for target logits.
        weight_learning_rate (`float`, *optional*, defaults to `0.03`): Adam's rate for log-weights.
        solve_weights (`bool`, *optional*, defaults to `True`): Solve for the samples' weights in closed form after
            each round: no cluster is then worse than without samples.
        target_smoothing (`float`, *optional*, defaults to `0.1`): Mass that the first targets take from the label.
        batch_size (`int`, *optional*, defaults to `256`): Real rows in one backward pass.
        cluster_block_size (`int`, *optional*, defaults to `128`): Clusters distilled together. A killed run keeps its
            finished blocks.
        max_memory (`str`, *optional*, defaults to `"4GB"`): Memory for states, gradients and their graphs. If they
            need more, fewer clusters are distilled together; if one cluster alone needs more, sketches of gradients
            are matched.
        sketch_dimension (`int`, *optional*, defaults to `65536`): Length of such a sketch.
        responses (`str`, *optional*, defaults to `"int8"`): Precision of the responses, which say what leaving out
            each cluster changes in the trained parameters. They are computed from the rows and kept in the synset:
            `"int8"`, `"bfloat16"` or `"none"`.
        seed (`int`, *optional*, defaults to `0`): Seed of everything random.

    Raises:
        ValueError: If a setting is out of range.
    """

    samples_per_cluster: int = field(default=5, metadata={"help": "Synthetic samples for each cluster."})
    tolerance: float = field(default=0.03, metadata={"help": "When a block is done; 0: after all iterations."})
    num_iterations: int = field(default=600, metadata={"help": "Adam iterations at most."})
    states_per_iteration: int = field(default=1, metadata={"help": "Recorded states matched in an iteration."})
    init: str = field(default="random", metadata={"help": f"Where samples start: {', '.join(INITIALISATIONS)}."})
    token_inputs: str = field(default="auto", metadata={"help": f"One of {', '.join(TOKEN_INPUTS)}."})
    num_tokens: int = field(default=16, metadata={"help": "Tokens of a synthetic text."})
    num_token_choices: int = field(default=16, metadata={"help": "Vocabulary entries that a soft token mixes."})
    num_target_choices: int = field(default=64, metadata={"help": "Labels that a target chooses from."})
    input_learning_rate: float = field(default=0.04, metadata={"help": "In standard deviations of the inputs."})
    target_learning_rate: float = field(default=0.3, metadata={"help": "Adam's rate for target logits."})
    weight_learning_rate: float = field(default=0.03, metadata={"help": "Adam's rate for log-weights."})
    solve_weights: bool = field(default=True, metadata={"help": "Solve for weights after each round."})
    target_smoothing: float = field(default=0.1, metadata={"help": "Mass the first targets take from the label."})
    batch_size: int = field(default=256, metadata={"help": "Real rows in one backward pass."})
    cluster_block_size: int = field(default=128, metadata={"help": "Clusters distilled together."})
    max_memory: str = field(default="4GB", metadata={"help": "Memory for states, gradients and their graphs."})
    sketch_dimension: int = field(default=2**16, metadata={"help": "Length of a gradient's sketch, where needed."})
    responses: str = field(default="int8", metadata={"help": f"Precision of responses: {', '.join(RESPONSES)}."})
    seed: int = field(default=0, metadata={"help": "Seed of everything random."})

    def __post_init__(self) -> None:
        # Annotations are strings here; every integer but the seed is a count.
        for name in (item.name for item in fields(self) if item.type == "int" and item.name != "seed"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"`tolerance` must be at least 0 and less than 1, got {self.tolerance}.")
        for name in ("input_learning_rate", "target_learning_rate", "weight_learning_rate"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"`{name}` must be a positive number, got {getattr(self, name)}.")
        if not 0 < self.target_smoothing < 1:
            raise ValueError(f"`target_smoothing` must lie between 0 and 1, got {self.target_smoothing}.")
        for name, choices in (("init", INITIALISATIONS), ("token_inputs", TOKEN_INPUTS), ("responses", RESPONSES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {getattr(self, name)!r}.")
        memory_bytes(self.max_memory)

    @property
    def max_bytes(self) -> int:
        """`max_memory` in bytes."""
        return memory_bytes(self.max_memory)

    @classmethod
    def from_preset(cls, name: str, **settings: Any) -> DistillationConfig:
        """
        Settings of a preset, with other settings on top.

        Args:
            name (`str`): `"accurate"` (the defaults) or `"quick"` (two samples per cluster, a tolerance of 0.1).
            settings: Fields to set differently.
        """
        if name not in PRESETS:
            raise ValueError(f"Unknown preset {name!r}. Use one of {', '.join(PRESETS)}.")
        return cls(**{**PRESETS[name], **settings})

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe dictionary."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DistillationConfig:
        """The inverse of [`DistillationConfig.to_dict`]."""
        unknown = set(values) - set(cls.__dataclass_fields__)
        if unknown:
            raise ValueError(f"Unknown distillation settings: {', '.join(sorted(unknown))}.")
        return cls(**values)
