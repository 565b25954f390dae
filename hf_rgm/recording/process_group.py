"""Checks among processes that train together, so that none waits for one that failed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from accelerate.utils import gather_object


class FailingTogether:
    """A block, entered by every process, that fails on all if it fails on one."""

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
    """Checks that all processes have the same JSON-safe values."""
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
