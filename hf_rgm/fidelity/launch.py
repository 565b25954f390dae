"""Retrainings side by side: every launched process trains alone, and no two of them the same model."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import parse_flag_from_env, patch_environment
from filelock import FileLock, Timeout

SPLITTING_MODES = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM")


@dataclass(frozen=True)
class Launch:
    """
    Which of the processes of `torchrun` or `accelerate launch` this is.

    Args:
        index, count (`int`): Position among all processes, and their number.
        local_index (`int`): Position among the processes of this machine.
    """

    index: int
    count: int
    local_index: int

    @classmethod
    def from_environment(cls) -> Launch:
        """Reads what launchers set: `RANK`, `WORLD_SIZE` and `LOCAL_RANK`."""
        index, local_index = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
        return cls(index, int(os.environ.get("WORLD_SIZE", 1)), local_index)

    def order(self, num_jobs: int) -> list[int]:
        """All jobs, this process's share (every `count`-th) first."""
        shares = [range((self.index + other) % self.count, num_jobs, self.count) for other in range(self.count)]
        return [job for share in shares for job in share]

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """
        Lets a `Trainer` built in this context train on this process alone, on a device of its own.

        A `Trainer` joins its fellow processes because `TrainingArguments` reads the launcher's environment. Here that
        environment says that there is one process: without an index where there is at most one device, and with this
        process's local index, which chooses the device, where there are several (Accelerate then opens a process group
        of one, which stays).

        Raises:
            NotImplementedError: If the launcher was told to split models over processes.
            RuntimeError: If the process is in one process group with others already.
        """
        if self.count == 1:
            yield
            return
        for mode in SPLITTING_MODES:
            if parse_flag_from_env(mode):
                raise NotImplementedError(
                    f"{mode} is set, but retraining gives every process a whole model of its own. Launch without it."
                )
        joined = torch.distributed.is_available() and torch.distributed.is_initialized()
        if joined and torch.distributed.get_world_size() > 1:
            raise RuntimeError(
                f"Retraining splits the work over {self.count} processes itself, but they have been joined already: "
                "an `Accelerator`, `PartialState` or `TrainingArguments` was made before. Retrain in a script of its "
                "own, build everything that a `Trainer` needs inside `build_trainer`, or call "
                "`torch.distributed.destroy_process_group()` first."
            )
        num_devices = torch.accelerator.device_count()
        environment = {
            "RANK": 0,
            "WORLD_SIZE": 1,
            "LOCAL_RANK": self.local_index % num_devices if num_devices > 1 else -1,
            "LOCAL_WORLD_SIZE": 1,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": _free_port(),
            "TORCHELASTIC_USE_AGENT_STORE": False,
        }
        with patch_environment(**environment):
            yield


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """
    Whether this process may now write a file that is missing: yields `False` where another is at it.

    The claim is a lock of the operating system on a file beside it, so that it ends with its process, however that
    ends. Where the file system knows no locks, a file takes their place that a killed process leaves behind.
    """
    lock = FileLock(path.with_suffix(".lock"))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        with contextlib.suppress(PermissionError):  # Windows keeps open files
            os.unlink(lock.lock_file)
        lock.release()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
