"""Estimated costs of distilling and attributing."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from hf_rgm.files.writing import format_size
from hf_rgm.model.peak_memory import PeakTensors

LONG_SECONDS = 1.0
"""From here on, the costs of watching and of the first run do not matter."""


@dataclass(frozen=True)
class PieceOfWork:
    """Wall time of a piece of work, the peak memory of its tensors, and the bytes its result keeps."""

    seconds: float
    peak_bytes: int
    held_bytes: int = 0


def measured(work: Callable[[], object]) -> PieceOfWork:
    """Measures a piece of work, run once to watch its memory and, if short, again for the time."""
    begun = time.perf_counter()
    with PeakTensors() as memory:
        result = work()
    seconds, held = time.perf_counter() - begun, memory.alive_bytes
    del result
    if seconds < LONG_SECONDS:
        begun = time.perf_counter()
        work()
        seconds = time.perf_counter() - begun
    return PieceOfWork(seconds, memory.resident_bytes, held)


@dataclass(frozen=True)
class CostEstimate:
    """
    Expected time, memory and disk of distilling or attributing.

    Args:
        seconds (`float`): Wall time on the processes at hand.
        memory_bytes (`int`): Peak memory of a process, beside the model, the dataset and the libraries.
        disk_bytes (`int`): Size of the saved result: the synset, with the recorded states it needs, or the scores.
        num_blocks (`int`): Parts done one after another because they do not fit in memory together: blocks of clusters
            (each finished one survives a crash), of replayed cluster weights, or of queries.
        sketched (`bool`, *optional*, defaults to `False`): Whether sketches are matched because gradients do not fit
            in memory.
        least_seconds (`float`, *optional*): Shortest wall time, where the work may end early; `seconds` is then the
            longest.

    Example:

    ```python
    >>> from hf_rgm.model.cost_estimates import CostEstimate
    >>> print(CostEstimate(90.0, 2_000_000_000, 5_000_000, 3))
    1.5 min, 2.0 GB of memory, 5.0 MB on disk, in 3 blocks

    ```
    """

    seconds: float
    memory_bytes: int
    disk_bytes: int
    num_blocks: int
    sketched: bool = False
    least_seconds: float | None = None

    def __str__(self) -> str:
        blocks = f"{self.num_blocks} block{'s' if self.num_blocks > 1 else ''}"
        memory, disk = format_size(self.memory_bytes), format_size(self.disk_bytes)
        sketched = ", on sketches of the gradients" if self.sketched else ""
        duration = _duration(self.seconds)
        if self.least_seconds is not None and _duration(self.least_seconds) != duration:
            duration = f"{_duration(self.least_seconds)} to {duration}"
        return f"{duration}, {memory} of memory, {disk} on disk, in {blocks}{sketched}"


def _duration(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"
