"""Checks among processes that train together, so that none waits for one that failed."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from accelerate.utils import gather_object


@contextlib.contextmanager
def failing_together(num_processes: int) -> Iterator[None]:
    """A block, entered by every process, that fails on all if it fails on one."""
    try:
        yield
    except Exception as error:
        if num_processes > 1:
            gather_object([f"{type(error).__name__}: {error}"])
        raise
    told = gather_object([None]) if num_processes > 1 else []
    for index, text in enumerate(told):
        if text is not None:
            raise RuntimeError(f"Recording failed on process {index}, so that all stop: {text}")


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
