"""Processes that train together: they agree on what is recorded, and none waits for one that has failed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from accelerate.utils import gather_object


class FailingTogether:
    """
    A block that fails on all processes if it fails on one, so that no process goes on and waits for one that is gone.

    Every process must enter the block. With one process it does nothing.

    Args:
        num_processes (`int`): Processes that train together.

    Raises:
        RuntimeError: On the processes that did not fail, naming one that did and its error.

    Example:

    ```python
    >>> from hf_rgm.recording.process_group import FailingTogether
    >>> with FailingTogether(1):
    ...     int("1")
    1

    ```
    """

    def __init__(self, num_processes: int) -> None:
        self._num_processes = num_processes

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        interrupted = error is not None and not isinstance(error, Exception)
        if self._num_processes == 1 or interrupted:
            return
        told = gather_object([None if error is None else f"{type(error).__name__}: {error}"])
        failed = [index for index, text in enumerate(told) if text is not None]
        if error is None and failed:
            raise RuntimeError(f"Recording failed on process {failed[0]}, so that all stop: {told[failed[0]]}")


def check_same(values: Mapping[str, Any], num_processes: int) -> None:
    """
    Checks that all processes have the same values.

    Args:
        values (`Mapping[str, Any]`): JSON-safe values by name, the same names on every process.
        num_processes (`int`): Processes that train together.

    Raises:
        RuntimeError: On every process, naming values that differ.
    """
    if num_processes == 1:
        return
    own = {
        key: hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest() for key, value in values.items()
    }
    everyone = gather_object([own])
    differing = sorted(key for key in own if len({digests[key] for digests in everyone}) > 1)
    if differing:
        raise RuntimeError(
            f"The {num_processes} processes that train together differ in `{'`, `'.join(differing)}`, so that what "
            "they do is not one run. Give every process the same data, settings and seeds."
        )
