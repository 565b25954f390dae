"""Runs tasks in processes that are killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Outcome(NamedTuple):
    """
    What became of a worker.

    Attributes:
        killed (`bool`): whether `SIGKILL` ended it; otherwise it finished, with or without an error.
        seconds (`float`, *optional*): what the task took, if it finished.
        operations (`list[str]`, *optional*): the changes of files it made, if they were counted and it finished.
        error (`dict`, *optional*): type, text and traceback of its exception.
    """

    killed: bool
    seconds: float | None
    operations: list[str] | None
    error: dict[str, str] | None


class Workers:
    """
    Worker processes, forked by a process that has imported and prepared everything. A context manager.

    Args:
        environment (`Mapping[str, str]`, *optional*): Variables of that process, instead of this one's.
        model (`str`, *optional*, defaults to `"tiny"`): Which of `tests.crash.models.MODELS` the tasks are about.
    """

    def __init__(self, environment: Mapping[str, str] | None = None, model: str = "tiny") -> None:
        self.model = model
        self._environment = dict(environment or os.environ) | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def __enter__(self) -> Workers:
        self._scratch = tempfile.TemporaryDirectory()
        self._log = open(Path(self._scratch.name) / "log", "w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.child", self.model],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=self._scratch.name,
            env=self._environment | {"TMPDIR": self._scratch.name},
        )
        self._answer()
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.communicate(timeout=60)
        self._log.close()
        self._scratch.cleanup()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            self._log.seek(0)
            raise RuntimeError(f"The process that forks workers has died:\n{self._log.read()}")
        return json.loads(line)

    def run(
        self,
        task: str,
        *,
        seconds: float | None = None,
        watch: Path | None = None,
        operation: int | None = None,
        full_from: int | None = None,
        largest_file: int | None = None,
        started: Callable[[int], object] | None = None,
        **arguments: Any,
    ) -> Outcome:
        """
        Runs a task of `tests.crash.tasks` to its end, bitter or not.

        Args:
            task (`str`): Its name.
            seconds (`float`, *optional*): Kill it after this time.
            watch (`Path`, *optional*): Count what it changes below this folder.
            operation (`int`, *optional*): Kill it at this change.
            full_from (`int`, *optional*): The disk takes nothing more from this change on.
            largest_file (`int`, *optional*): Bytes that a file may have.
            started (`Callable`, *optional*): Called with the worker's process id.
            arguments: What the task is called with.

        Raises:
            `RuntimeError`: if it fails though the disk does not.
        """
        order = {
            "task": task,
            "arguments": {name: str(v) if isinstance(v, Path) else v for name, v in arguments.items()},
            "seconds": seconds,
            "watch": str(watch) if watch else None,
            "operation": operation,
            "full_from": full_from,
            "largest_file": largest_file,
        }
        assert self._process.stdin is not None
        print(json.dumps(order), file=self._process.stdin, flush=True)
        worker = self._answer()["worker"]
        if started:
            started(worker)
        answer = self._answer()
        outcome = Outcome(*(answer[name] for name in Outcome._fields))
        if not outcome.killed and answer["status"]:
            raise RuntimeError(f"The worker ended with status {answer['status']}.")
        if outcome.error and largest_file is None and full_from is None:
            raise RuntimeError(f"{task} failed: {outcome.error['traceback']}")
        return outcome
