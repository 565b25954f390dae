"""The most memory that tensors made within a block hold at once."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HEAP_BLOCK_BYTES = 2**25
"""From here on glibc takes a block from the system and gives it back (the largest its threshold becomes); smaller ones
it keeps when they are freed."""


class PeakTensors(TorchDispatchMode):
    """
    The most memory that tensors made within a block held at once.

    Sees every operator below autograd and `torch.func`: graphs, tangents and vectorised intermediates count, each
    storage once and until it is freed. What an operator needs only while it runs does not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = 0
        self.alive_bytes = 0
        self._sizes: dict[int, int] = {}
        self._small = self._small_peak = 0

    @property
    def resident_bytes(self) -> int:
        """Peak memory of the process: an allocator also keeps small blocks, with holes between them."""
        return self.peak_bytes + self._small_peak

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping | None = None
    ) -> Any:
        given = {place for tensor in tree_leaves((args, kwargs)) if (place := _place(tensor)) is not None}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            place = _place(tensor)
            if place is not None and place not in given and place not in self._sizes:
                self._add(place, tensor.untyped_storage())
        return result

    def _add(self, place: int, storage: torch.UntypedStorage) -> None:
        size = self._sizes[place] = storage.nbytes()
        self.alive_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.alive_bytes)
        if size < HEAP_BLOCK_BYTES:
            self._small += size
            self._small_peak = max(self._small_peak, self._small)
        weakref.finalize(storage, self._remove, place).atexit = False

    def _remove(self, place: int) -> None:
        size = self._sizes.pop(place)
        self.alive_bytes -= size
        self._small -= size if size < HEAP_BLOCK_BYTES else 0


def _place(value: Any) -> int | None:
    """Address of a tensor's memory, or `None` for wrappers such as those of `torch.func`."""
    if not isinstance(value, Tensor):
        return None
    try:
        return value.untyped_storage().data_ptr() or None
    except RuntimeError:
        return None
