"""Advice on which setting to lower when memory runs out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from accelerate.utils.memory import should_reduce_batch_size


@contextlib.contextmanager
def advice_on_memory(what: str, advice: str) -> Iterator[None]:
    """Turns errors of failed allocations into a `MemoryError` that says which setting to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError | torch.OutOfMemoryError) or should_reduce_batch_size(error)):
            raise
        first_line = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise MemoryError(f"{what} ran out of memory ({first_line}). {advice}") from error
