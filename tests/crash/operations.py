"""Counts what a process does to files below a folder, and kills it there, or lets the disk be full from there on."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pyarrow.parquet as pq
import safetensors.numpy
import safetensors.torch
from safetensors import SafetensorError

import hf_rgm.files.writing

MAKING = ("os.mkdir", "shutil.copyfile")
CHANGING = ("os.rename", "os.remove", "os.rmdir", "os.chmod")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def die() -> NoReturn:
    """Ends this process as `kill -9` does: nothing is tidied up."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise RuntimeError("unreachable: the process is dead")


class Operations:
    """
    Numbers every change of a file or folder below `folder` from 1 on, in this process and for the rest of its life.

    Python tells its audit hooks of every file that is opened, renamed or removed. Flushes, exchanged folders, and
    files that safetensors and Arrow write in one go are numbered by wrapping the functions that do it.

    Args:
        folder (`Path`): What to watch.
        kill_at (`int`, *optional*): Number of the operation that the process dies at: just before it, or with half of
            it done where that is a file written in one go.
        full_from (`int`, *optional*): Number of the operation from which on the disk takes nothing more.

    Attributes:
        names (`list[str]`): what was done so far.
    """

    def __init__(self, folder: Path, *, kill_at: int | None, full_from: int | None) -> None:
        self.names: list[str] = []
        self._folder = str(folder)
        self._kill_at = kill_at
        self._full_from = full_from
        self._wrap(os, "fsync")
        self._wrap(hf_rgm.files.writing, "exchange")
        for module in (safetensors.torch, safetensors.numpy):
            self._tear(module, "serialize_file", 1, SafetensorError(f"I/O error: {FULL} (os error {FULL.errno})"))
        self._tear(pq, "write_table", 1, FULL)
        self._tear(Path, "write_text", 0, FULL)
        sys.addaudithook(self._hear)

    def _is_last(self, name: str) -> bool:
        self.names.append(name)
        return len(self.names) == self._kill_at

    @property
    def _is_full(self) -> bool:
        return self._full_from is not None and len(self.names) >= self._full_from

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            concerns = isinstance(path, str) and path.startswith(self._folder) and flags & WRITING
        elif event in MAKING or event in CHANGING:
            # `shutil.rmtree` names files relative to an open folder, and nothing else here does.
            in_folder = event in ("os.remove", "os.rmdir") and arguments[1] != -1
            concerns = in_folder or os.fspath(arguments[0]).startswith(self._folder)
        else:
            return
        if not concerns:
            return
        if self._is_last(event):
            die()
        if self._is_full and event in MAKING:
            raise OSError(FULL.errno, FULL.strerror, os.fspath(arguments[0]))

    def _wrap(self, module: Any, name: str) -> None:
        original: Callable[..., Any] = getattr(module, name)

        def counted(*arguments: Any) -> Any:
            if self._is_last(name):
                die()
            return original(*arguments)

        setattr(module, name, counted)

    def _tear(self, module: Any, name: str, position: int, full: Exception) -> None:
        original: Callable[..., Any] = getattr(module, name)

        def torn(*arguments: Any, **options: Any) -> Any:
            # pandas hands an open file to Arrow: there, nothing is written at all.
            path = arguments[position] if isinstance(arguments[position], str | Path) else None
            last = self._is_last(name)
            if self._is_full and (path is None or str(path).startswith(self._folder)):
                raise full
            if last and path is None:
                die()
            result = original(*arguments, **options)
            if last:
                os.truncate(path, os.path.getsize(path) // 2)
                die()
            return result

        setattr(module, name, torn)
