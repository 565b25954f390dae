"""What a method costs: seconds, memory, and bytes a user keeps."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import psutil

SAMPLING_SECONDS = 0.02


class Meter:
    """
    Wall time of a block and the most memory it held beyond what the process held before.

    Memory is the process's resident set, sampled by a thread. Free memory is given back to the system first, so that
    a block does not seem to need less because an earlier one left some behind.

    Attributes:
        seconds (`float`): Wall time, set when the block ends.
        cpu_seconds (`float`): Processor time of all threads, set when the block ends: other programs hardly change it.
        peak_bytes (`int`): Largest resident set within the block less the one at its start, set when the block ends.
        private_peak_bytes (`int`): The same without pages of mapped files, which the system takes back when it needs
            them; where it does not tell (outside Linux), `peak_bytes`.
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    private_peak_bytes: int

    def __enter__(self) -> Meter:
        self._process = psutil.Process()
        _give_back()
        self._before = self._largest = self._held()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        self._start, self._cpu_start = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *exception) -> None:
        self.seconds, self.cpu_seconds = time.perf_counter() - self._start, time.process_time() - self._cpu_start
        self._stop.set()
        self._thread.join()
        self._look()
        self.peak_bytes, self.private_peak_bytes = (
            int(most - before) for most, before in zip(self._largest, self._before, strict=True)
        )

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLING_SECONDS):
            self._look()

    def _look(self) -> None:
        self._largest = tuple(map(max, self._largest, self._held()))

    def _held(self) -> tuple[int, ...]:
        memory = self._process.memory_info()
        return memory.rss, memory.rss - getattr(memory, "shared", 0)


class Stages:
    """
    CPU seconds of each stage of a method.

    Args:
        known: Those that are known already, by name.

    Attributes:
        seconds (`dict[str, float]`): By stage, in order.
    """

    def __init__(self, **known: float) -> None:
        self.seconds: dict[str, float] = dict(known)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measures a stage."""
        start = time.process_time()
        yield
        self.seconds[name] = time.process_time() - start


@contextmanager
def seconds_in(owner: Any, method: str) -> Iterator[list[float]]:
    """CPU seconds of each call of a method, or of a function of a module, within."""
    seconds: list[float] = []
    original = getattr(owner, method)

    def timed(*arguments: Any, **options: Any) -> Any:
        start = time.process_time()
        result = original(*arguments, **options)
        seconds.append(time.process_time() - start)
        return result

    with mock.patch.object(owner, method, timed):
        yield seconds


def _give_back() -> None:
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; other C libraries have none
        if trim is not None:
            trim(0)


def folder_bytes(folder: str | Path) -> int:
    """Size of all files in a folder."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
