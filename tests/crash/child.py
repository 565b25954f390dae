"""
A process that imports everything once and then forks a worker for each task, as importing takes seconds.

It reads orders as lines of JSON from standard input, whose keys are the arguments of `Workers.run`. It answers each
with two lines: the worker's process id, and what became of it. Its own argument names the model.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from tests.crash.operations import Operations
from tests.crash.tasks import TASKS, prepare


def work(order: dict[str, Any]) -> dict[str, Any]:
    """Does a task in this process."""
    watched = order["watch"]
    operations = None
    if watched:
        operations = Operations(Path(watched), kill_at=order["operation"], full_from=order["full_from"])
    if order["largest_file"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["largest_file"], resource.RLIM_INFINITY))
    start = time.perf_counter()
    error = None
    try:
        TASKS[order["task"]](sys.argv[1], **order["arguments"])
    except Exception as problem:  # noqa: BLE001 (it is reported)
        error = {"type": type(problem).__name__, "text": str(problem), "traceback": traceback.format_exc()}
    return {
        "seconds": time.perf_counter() - start,
        "operations": operations.names if operations else None,
        "error": error,
    }


def run(order: dict[str, Any], answers: Any) -> None:
    """Forks a worker, kills it when it is time, and tells what became of it."""
    reading, writing = os.pipe()
    worker = os.fork()
    if worker == 0:
        os.close(reading)
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        report = work(order)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        os.write(writing, json.dumps(report).encode())
        os._exit(0)
    os.close(writing)
    print(json.dumps({"worker": worker}), file=answers, flush=True)
    if order["seconds"] is not None:
        time.sleep(order["seconds"])
        os.kill(worker, signal.SIGKILL)
    with os.fdopen(reading, "rb") as pipe:
        report = pipe.read()
    _, status = os.waitpid(worker, 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    finished = json.loads(report) if report else {"seconds": None, "operations": None, "error": None}
    print(json.dumps({"killed": killed, "status": status, **finished}), file=answers, flush=True)


def main() -> None:
    """Serves orders until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    prepare(sys.argv[1])
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        run(json.loads(line), answers)


if __name__ == "__main__":
    main()
