"""
What recording adds to the time of a training step.

    python -m benchmarks.recording_overhead [--task fashion] [--num-states 32] [--repeats 7]

Trains the task's model with and without the callback, in turn, so that other programs on the machine slow both. Steps
are timed one by one; the first ones, which warm up, do not count. Writes benchmarks/results/recording-overhead.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from transformers import TrainerCallback

from benchmarks import truth as ground_truth
from benchmarks.report import RESULTS, environment, versions
from benchmarks.tasks import Task
from hf_rgm import TrajectoryCallback
from hf_rgm.files.writing import write_json

FORMAT_VERSION = 1
NUM_WARM_UP_STEPS = 10
NUM_RESAMPLES = 2000
WITHOUT, WITH = "without", "with"


CLOCKS = {
    "wall": time.perf_counter,
    "training_thread": time.thread_time,
    "all_threads": time.process_time,
}
"""Wall time, and the processor's time for the thread that trains and for all: other programs hardly change these."""


class StepTimes(TrainerCallback):
    """Looks at the clocks whenever a step begins and when training ends. Comes after the recorder."""

    def __init__(self) -> None:
        self.times: list[list[float]] = []

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        """The step before has ended."""
        self.times.append([clock() for clock in CLOCKS.values()])

    def on_train_end(self, args, state, control, **kwargs) -> None:
        """All is written by now."""
        self.times.append([clock() for clock in CLOCKS.values()])


def train(task: Task, callback: TrajectoryCallback | None) -> dict[str, float]:
    """
    Trains once.

    Returns:
        `dict[str, float]`: seconds of a step by clock, the mean over the steps after the warm-up and the end of
        training, where all that is not written yet is.
    """
    times = StepTimes()
    trainer = task.build_trainer(task.train, 0, callbacks=[*([callback] if callback else []), times])
    trainer.train()
    counted = np.array(times.times)[NUM_WARM_UP_STEPS:]
    return dict(zip(CLOCKS, ((counted[-1] - counted[0]) / (len(counted) - 1)).tolist(), strict=True))


def measure(task: Task, num_states: int, repeats: int) -> dict[str, list[dict[str, float]]]:
    """Times of `repeats` trainings without and with the callback, in turn, each pair in the other order."""
    runs: dict[str, list[dict[str, float]]] = {WITHOUT: [], WITH: []}
    train(task, None)
    for repeat in range(repeats):
        for kind in (WITHOUT, WITH) if repeat % 2 == 0 else (WITH, WITHOUT):
            with tempfile.TemporaryDirectory() as parent:
                folder = Path(parent) / "trajectory"
                callback = TrajectoryCallback(folder, num_states=num_states) if kind == WITH else None
                runs[kind].append(train(task, callback))
        latest = {kind: 1000 * values[-1]["wall"] for kind, values in runs.items()}
        print(f"{repeat}: {latest[WITHOUT]:.2f} ms a step without, {latest[WITH]:.2f} ms with", flush=True)
    return runs


def overheads(runs: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, Any]]:
    """By clock: how much longer a step takes with the callback, and an interval of 95% over pairs of runs."""
    generator = np.random.default_rng(0)
    results: dict[str, dict[str, Any]] = {}
    for key in runs[WITH][0]:
        pairs = np.array([[run[key] for run in runs[kind]] for kind in (WITHOUT, WITH)])
        drawn = pairs[:, generator.integers(pairs.shape[1], size=(NUM_RESAMPLES, pairs.shape[1]))].sum(-1)
        results[key] = {
            "overhead": float(pairs[1].sum() / pairs[0].sum() - 1),
            "interval": np.quantile(drawn[1] / drawn[0] - 1, [0.025, 0.975]).tolist(),
        }
    return results


def main(task_name: str, num_states: int, repeats: int, output: Path) -> None:
    """Measures and writes."""
    task = ground_truth.load_task(task_name)
    runs = measure(task, num_states, repeats)
    results = overheads(runs)
    write_json(
        output,
        {
            "format_version": FORMAT_VERSION,
            "task": task.name,
            "num_states": num_states,
            "overheads": results,
            "runs": runs,
            "environment": environment(),
            "versions": versions(),
        },
    )
    print(json.dumps(results, indent=2))
    print(f"Written to {output}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="fashion")
    parser.add_argument("--num-states", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, default=RESULTS / "recording-overhead.json", help="another JSON file")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    main(arguments.task, arguments.num_states, arguments.repeats, arguments.output)
