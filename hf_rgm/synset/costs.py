"""What a distillation will cost, told beforehand."""

from __future__ import annotations

from dataclasses import dataclass

from hf_rgm.files import format_size


@dataclass(frozen=True)
class CostEstimate:
    """
    What a distillation is expected to need.

    Args:
        seconds (`float`): Wall time on the processes at hand.
        memory_bytes (`int`): Peak memory of a process, beside the model, the dataset and the libraries.
        disk_bytes (`int`): Size of the saved synset, with the recorded states it needs.
        num_blocks (`int`): Blocks of clusters distilled one after another; each finished one survives a crash.
        sketched (`bool`): Whether sketches of gradients are matched because gradients do not fit in memory.

    Example:

    ```python
    >>> from hf_rgm.synset.costs import CostEstimate
    >>> print(CostEstimate(90.0, 2_000_000_000, 5_000_000, 3, False))
    1.5 min, 2.0 GB of memory, 5.0 MB on disk, in 3 blocks of clusters

    ```
    """

    seconds: float
    memory_bytes: int
    disk_bytes: int
    num_blocks: int
    sketched: bool

    def __str__(self) -> str:
        blocks = f"{self.num_blocks} block{'s' if self.num_blocks > 1 else ''} of clusters"
        memory, disk = format_size(self.memory_bytes), format_size(self.disk_bytes)
        sketched = ", on sketches of the gradients" if self.sketched else ""
        return f"{_duration(self.seconds)}, {memory} of memory, {disk} on disk, in {blocks}{sketched}"


def _duration(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"
