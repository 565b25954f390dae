"""The loss that a recorded run trained, as measured before its first step."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from hf_rgm.model.losses import LOSSES_OF_NUMBERS
from hf_rgm.trajectory.optimizers import MAX_CONSTANT


@dataclass(frozen=True)
class TrainedLoss:
    """What the loss of a recorded run is in terms of the loss of rows, and how its rows were read."""

    scale: float = 1.0  # ratio of an update's gradient to that of the mean over its labels, or rows of `row_loss`
    adds_micro_batches: bool = False  # whether `scale` grows with the number of micro-batches of an update
    shifts_labels: bool | None = None
    counts_first: bool = (
        False  # whether it counts the first label of a text, which is not predicted (with a prompt, not)
    )
    custom: bool = False  # whether it was `TrajectoryCallback(row_loss=...)`
    name: str | None = None  # a key of `LOSSES_OF_NUMBERS`; otherwise the cross entropy, or a `row_loss`
    cosine: float = 1.0  # least cosine of the two gradients
    columns: list[str] = field(default_factory=list)
    remove_unused_columns: bool = True
    data_collator: str | None = None
    longest_input: int | None = None  # tokens, among some rows
    rows: list[int] = field(default_factory=list)  # some rows, and their losses at the last state
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not 1 / MAX_CONSTANT <= self.scale <= MAX_CONSTANT:  # NaN is not within bounds either
            raise ValueError(f"scale must be from {1 / MAX_CONSTANT:g} to {MAX_CONSTANT:g}, got {self.scale}")
        if self.name not in (None, *LOSSES_OF_NUMBERS):
            raise ValueError(f"name must be one of {', '.join(LOSSES_OF_NUMBERS)}, got {self.name!r}")
        if self.longest_input is not None and self.longest_input < 1:
            raise ValueError(f"longest_input must be at least 1, got {self.longest_input}")
        if len(self.rows) != len(self.losses) or min(self.rows, default=0) < 0:
            raise ValueError(f"{len(self.rows)} rows have {len(self.losses)} losses")
        if not all(math.isfinite(loss) for loss in self.losses):
            raise ValueError("losses are not all finite")
