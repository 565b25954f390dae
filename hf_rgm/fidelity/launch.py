"""Parallel retraining: each launched process trains alone, and no two train the same model."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from accelerate.utils import parse_flag_from_env, patch_environment
from accelerate.utils.other import get_free_port

SPLITTING_MODES = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM")


@dataclass(frozen=True)
class Launch:
    """Position of this process among those of `torchrun` or `accelerate launch`, in all and on this machine."""

    index: int
    count: int
    local_index: int

    @classmethod
    def from_environment(cls) -> Launch:
        """Reads `RANK`, `WORLD_SIZE` and `LOCAL_RANK`, which launchers set."""
        index, local_index = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
        return cls(index, int(os.environ.get("WORLD_SIZE", 1)), local_index)

    def order(self, num_jobs: int) -> list[int]:
        """All jobs, beginning with this process's share (every `count`-th)."""
        shares = [range((self.index + other) % self.count, num_jobs, self.count) for other in range(self.count)]
        return [job for share in shares for job in share]

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Lets a `Trainer` that is built in this context train on this process alone, on a device of its own."""
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
        # `TrainingArguments` joins processes by the launcher's environment, which here says that there is one process.
        # The local index chooses the device where there are several; Accelerate then opens a process group of one,
        # which stays. Without an index, the only device is used.
        num_devices = torch.accelerator.device_count()
        environment = {
            "RANK": 0,
            "WORLD_SIZE": 1,
            "LOCAL_RANK": self.local_index % num_devices if num_devices > 1 else -1,
            "LOCAL_WORLD_SIZE": 1,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": get_free_port(),
            "TORCHELASTIC_USE_AGENT_STORE": False,
        }
        with patch_environment(**environment):
            yield
