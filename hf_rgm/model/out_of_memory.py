"""Saying which setting to lower when memory runs out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from accelerate.utils.memory import should_reduce_batch_size


@contextlib.contextmanager
def advice_on_memory(what: str, advice: str) -> Iterator[None]:
    """
    Says of errors of memory what ran out of it and how it needs less. Also a decorator of functions.

    Args:
        what (`str`): What needs the memory, at the beginning of the message.
        advice (`str`): Whole sentences that name the setting to lower.

    Raises:
        MemoryError: In place of what torch, its devices and NumPy raise when an allocation fails. Other errors pass.

    Example:

    ```python
    >>> from hf_rgm.model.out_of_memory import advice_on_memory
    >>> with advice_on_memory("Distilling", "Lower `max_memory`."):
    ...     raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
    Traceback (most recent call last):
        ...
    MemoryError: Distilling ran out of memory (CUDA out of memory. Tried to allocate 2 GiB). Lower `max_memory`.

    ```
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        first_line = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise MemoryError(f"{what} ran out of memory ({first_line}). {advice}") from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that an allocation failed, on a device or on the CPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or should_reduce_batch_size(error)
