"""
Writing artefacts so that nothing half-written is ever taken for whole, and nothing whole is ever lost.

Files and folders are written in a hidden folder beside their target (`.name.hf-rgm-saving`), flushed to disk and put
into place by one rename. A killed process leaves the target as it was. The next one that writes the target removes the
hidden folder, unless a lock of the operating system, which ends with its process, says that it is in use.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from safetensors import SafetensorError

logger = logging.getLogger(__name__)

MAX_JSON_BYTES = 32_000_000
_WORKSPACE = ".hf-rgm-saving"
_LOCK = ".lock"
_NEW_FILE = ".new"
FOLDER_LOCK = ".hf-rgm.lock"
_EXCHANGE, _CURRENT_FOLDER = 2, -100  # RENAME_EXCHANGE and AT_FDCWD of Linux
_CANNOT_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS)


def format_size(num_bytes: float) -> str:
    """A number of bytes in words: `1.8 MB`."""
    power = 0
    while num_bytes >= 1000 and power < 4:
        num_bytes, power = num_bytes / 1000, power + 1
    return f"{num_bytes:.{min(power, 1)}f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path that takes the place of a file, flushed to disk, if the block ends without error."""
    with _explained(path), _workspace(path) as workspace:
        yield workspace / path.name
        _finish(workspace / path.name, workspace)
        os.replace(workspace / path.name, path)
        _flush(path.parent)


@contextlib.contextmanager
def staged_folder(target: str | Path, marker: str) -> Iterator[Path]:
    """
    Yields a temporary folder that takes the place of `target` (of a link, its target) if the block ends without error.

    An existing target is replaced only if it is empty or holds the file `marker`.
    """
    target = Path(target).resolve()
    with _explained(target):
        finish_replacement(target)
        check_replaceable(target, marker)
        with _workspace(target) as workspace:
            staging = workspace / "new"
            staging.mkdir()
            yield staging
            for path in (*staging.rglob("*"), staging):
                _finish(path, workspace)
            _put_in_place(staging, target, retired=workspace / "old")
            _flush(target.parent)


class FolderLock:
    """
    Keeps other processes from writing to a folder, until it is released or this process ends, however that ends.

    Within one process the last to acquire it holds it: earlier holders have failed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        # One object for one folder and process: a former holder that failed may still be alive.
        self._lock = FileLock(self.folder / FOLDER_LOCK, is_singleton=True, thread_local=False)

    def acquire(self) -> None:
        """Takes the lock, or raises a `RuntimeError` if another process has it."""
        with _explained(self.folder / FOLDER_LOCK):
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire(blocking=False)
            except Timeout as error:
                raise RuntimeError(
                    f"Another process is recording into {self.folder}. Choose another folder, or wait until it has "
                    f"ended. (If there is none: where the file system knows no locks, a killed process leaves "
                    f"{self._lock.lock_file} behind, which can then be deleted.)"
                ) from error

    def release(self) -> None:
        """Releases the lock, if this process has it."""
        if self._lock.is_locked:
            with contextlib.suppress(PermissionError):  # Windows keeps open files
                Path(self._lock.lock_file).unlink(missing_ok=True)
            self._lock.release(force=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file whole or not at all; NaN and infinity are errors."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    if len(text) > MAX_JSON_BYTES:
        raise ValueError(
            f"{path} would have {format_size(len(text))}, more than the {format_size(MAX_JSON_BYTES)} that are read "
            "again. Use fewer clusters, shorter names, or fewer tokens."
        )
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def order_metadata(path: Path) -> None:
    """Sorts the metadata of a safetensors file, which are in random order: equal content, then, is equal bytes."""
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) <= length:  # else a name is escaped in another way than `json` does
            file.seek(8)
            file.write(text.ljust(length))


def seal(path: Path) -> None:
    """Adds the SHA-256 of a file of an array to its end, where NumPy does not look."""
    with open(path, "ab") as file:
        file.write(_sha256(path, path.stat().st_size))


def read_sealed(path: Path, *, mmap_mode: Any = None) -> np.ndarray:
    """The array of a file, mapped or read; a `ValueError` if anything in it has changed since it was sealed."""
    try:
        array: Any = np.load(path, mmap_mode=mmap_mode or "r", allow_pickle=False)
        end, told = array.offset + array.nbytes, path.stat()
        if told.st_size > end:  # earlier releases did not seal
            _check_seal(path, end, told.st_mtime_ns)
    except (ValueError, EOFError, SyntaxError, tokenize.TokenError) as error:  # NumPy reads headers as Python
        raise ValueError(f"{path} is damaged ({str(error)!r}). Delete it; it will be computed again.") from error
    return array if mmap_mode else np.array(array)


@functools.lru_cache(maxsize=256)
def _check_seal(path: Path, end: int, changed: int) -> None:
    with open(path, "rb") as file:
        file.seek(end)
        if file.read() != _sha256(path, end):
            raise ValueError("its content changed")


def _sha256(path: Path, length: int) -> bytes:
    content: Any = np.memmap(path, mode="r", shape=(length,))
    return hashlib.sha256(content).digest()


def make_folder(folder: Path) -> None:
    """Makes a folder for work that is to go on there, or says why it cannot be."""
    with _explained(folder):
        folder.mkdir(parents=True, exist_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Removes what killed processes left half-written in a folder, but nothing that a live one is writing."""
    for name in sorted({path.name.removesuffix(_LOCK) for path in folder.glob(f".*{_WORKSPACE}*")}):
        finish_replacement(folder / name.removeprefix(".").removesuffix(_WORKSPACE))
        with contextlib.suppress(Timeout), locked(folder / name, blocking=False):
            if (folder / name).exists():
                shutil.rmtree(folder / name)


def finish_replacement(target: Path) -> None:
    """Puts in place the finished folder of a process that was killed when it had moved the old one away."""
    new, old = (_workspace_of(target) / name for name in ("new", "old"))
    if target.exists() or not (new.is_dir() and old.is_dir()):
        return
    with locked(_workspace_of(target)):
        if not target.exists() and new.is_dir() and old.is_dir():
            os.rename(new, target)
            _flush(target.parent)


def exchange(first: Path, second: Path) -> bool:
    """Swaps two folders in one step; `False` where that cannot be done: outside Linux and on some network disks."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if renameat2 is None:
        return False
    if renameat2(_CURRENT_FOLDER, os.fsencode(first), _CURRENT_FOLDER, os.fsencode(second), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(second))


def _put_in_place(new: Path, target: Path, *, retired: Path) -> None:
    if not target.exists():
        os.rename(new, target)
        return
    if exchange(new, target):
        return
    os.rename(target, retired)
    try:
        os.rename(new, target)
    except BaseException:
        os.rename(retired, target)
        raise


def check_replaceable(target: Path, marker: str) -> None:
    """Refuses a target that `staged_folder` would refuse, before work is done whose result could not be kept."""
    if not target.exists():
        return
    if not target.is_dir():
        raise FileExistsError(f"{target} is a file. Choose a folder that does not exist yet.")
    if any(target.iterdir()) and not (target / marker).is_file():
        raise FileExistsError(
            f"{target} is not empty and has no {marker}, so it is left alone. Choose another folder."
        )
    if os.path.ismount(target):
        raise OSError(errno.EBUSY, f"{target} is a mount point, which is not replaced. Choose a folder in it.")


def _workspace_of(target: Path) -> Path:
    # `.` has no name of its own.
    absolute = Path(os.path.abspath(target))
    return absolute.with_name(f".{absolute.name}{_WORKSPACE}")


@contextlib.contextmanager
def _workspace(target: Path) -> Iterator[Path]:
    """An empty hidden folder beside the target, for this process alone."""
    target.parent.mkdir(parents=True, exist_ok=True)
    workspace = _workspace_of(target)
    with locked(workspace):
        if workspace.exists():
            shutil.rmtree(workspace)
        workspace.mkdir()
        try:
            yield workspace
        finally:
            # An error here must not hide that all is done: the next writer tries again. A predecessor that could not
            # be put back stays; see `finish_replacement`.
            if target.exists() or not (workspace / "old").exists():
                shutil.rmtree(workspace, ignore_errors=True)


@contextlib.contextmanager
def locked(path: Path, *, blocking: bool = True) -> Iterator[None]:
    """Holds the lock of a path, which ends with its process; a `Timeout` if another has it and this must not wait."""
    # Where the file system has no locks, a file takes the lock's place, which a killed process leaves behind.
    lock = FileLock(f"{path}{_LOCK}")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        if not blocking:
            raise
        logger.info("Waiting for another process that writes beside %s.", path)
        lock.acquire()
    try:
        yield
    finally:
        with contextlib.suppress(PermissionError):  # Windows keeps open files
            os.unlink(lock.lock_file)
        lock.release()


def _finish(path: Path, workspace: Path) -> None:
    """Gives a file the mode of new files, which safetensors does not, and flushes it to the disk."""
    if path.is_file():
        (workspace / _NEW_FILE).touch()
        path.chmod((workspace / _NEW_FILE).stat().st_mode)
        (workspace / _NEW_FILE).unlink()
    _flush(path)


def _flush(path: Path) -> None:
    """Flushes a file, or the names in a folder, to the disk."""
    is_folder = path.is_dir()
    if is_folder and os.name == "nt":  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not is_folder or error.errno != errno.EINVAL:  # some file systems flush no folders
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _explained(target: Path) -> Iterator[None]:
    """Explains errors of the disk: what they mean for the target and what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        code = _error_number(error)
        if code is None or not _concerns(error, target):
            raise
        if code in _NO_SPACE:
            free = shutil.disk_usage(_existing(target.parent)).free
            reason = f"it needs more than the {format_size(free)} that are free there. Make room"
        elif code == errno.EFBIG:
            reason = "a file in it is larger than files may be there. Raise the limit (`ulimit -f`)"
        elif code in _NO_ACCESS:
            reason = f"files must be made in {target.parent}. Allow it"
        else:
            raise
        raise OSError(
            code,
            f"{os.strerror(code)}: {target} is not written, {reason} or choose another folder. What was there before "
            "is untouched.",
        ) from error


def _error_number(error: BaseException) -> int | None:
    """The system's number of an error, which safetensors has only in the message."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def _concerns(error: BaseException, target: Path) -> bool:
    """Whether an error is about the folder that is written, or one above, not about something that is read."""
    names = [getattr(error, attribute, None) for attribute in ("filename", "filename2")]
    paths = [Path(os.path.abspath(name)) for name in names if isinstance(name, str | os.PathLike)]
    folder = Path(os.path.abspath(target.parent))
    return not paths or any(path.is_relative_to(folder) or folder.is_relative_to(path) for path in paths)


def _existing(folder: Path) -> Path:
    return next(parent for parent in (folder, *folder.parents) if parent.is_dir())
