"""
When to stop distilling: iterations, processor time, matching error and agreement with retraining.

    python -m benchmarks.stopping --tasks digits
    python -m benchmarks.stopping --tasks fashion --cost-only

By linearised replay of the synset alone, on tuning queries; `--cost-only` needs no retrainings. Time is that of the
processor, real gradients included, in trainings timed the same way; use one thread. Writes
benchmarks/results/stopping.json. Entries named "as before" were measured by this script on commit 40675a6, the
last one without a tolerance: copy the script there and pass `--before`.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks import truth as ground_truth
from benchmarks.costs import Meter
from benchmarks.figures import figures
from benchmarks.methods.ours import replay
from benchmarks.recorded import Recorded
from benchmarks.report import RESULTS, Report, environment, versions
from benchmarks.tasks import Task
from hf_rgm import DistillationConfig
from hf_rgm.distillation.config import PRESETS

BEFORE: dict[str, dict[str, Any]] = {
    f"{count} iterations, as before": {"num_iterations": count} for count in (600, 100, 30)
}
SETTINGS: dict[str, dict[str, Any]] = {
    "600 iterations": {"num_iterations": 600, "tolerance": 0.0},
    "tolerance 0.01": {"tolerance": 0.01},
    "accurate preset (tolerance 0.03)": {},
    "quick preset (2 samples, tolerance 0.1)": PRESETS["quick"],
}


def measure(task: Task, folder: Path, settings: dict[str, dict[str, Any]], *, cost_only: bool) -> dict[str, Any]:
    """Costs by setting, with agreement unless `cost_only`."""
    task = dataclasses.replace(task, num_distances=0)
    recorded = Recorded(task, folder / "trajectory")
    plain = task.build_trainer(task.train, task.seeds[0])
    with Meter() as training:
        plain.train()
    results = {}
    for name, changes in settings.items():
        config = DistillationConfig(**changes)
        with Meter() as meter:
            synset, _ = recorded.synset(config)
        made = synset.metadata.get("iterations", [config.num_iterations])
        entry: dict[str, Any] = {
            "iterations": max(made),
            "cpu_seconds": meter.cpu_seconds,
            "training_cpu_seconds": training.cpu_seconds,
            "matching_error": synset.matching_error,
            "worst_cluster_error": float(synset.residuals.mean(0).max()),
        }
        if not cost_only:
            truth = ground_truth.load(task, tuning=True)
            prediction = replay(distillation=changes)(recorded, task.tuning_queries.with_format("torch"))
            found = figures(task, truth, prediction)
            entry |= {measure: found[measure] for measure in ("leave_cluster_out", "lds_clusters")}
        results[name] = entry
        print(f"{task.name}: {_line(name, entry)}", flush=True)
    return results


def table(methods: dict[str, Any]) -> str:
    """A line for each task and setting."""
    lines = [
        "| task, setting | iterations | CPU / training | matching error | worst cluster | leave-cluster-out "
        "| LDS clusters |",
        "|---" * 7 + "|",
    ]
    lines += [_line(name, entry) for name, entry in methods.items()]
    return "\n".join(lines)


def _line(name: str, entry: dict[str, Any]) -> str:
    scores = [f"{entry[m]['value']:.3f}" if m in entry else "" for m in ("leave_cluster_out", "lds_clusters")]
    cost = f"{entry['cpu_seconds'] / entry['training_cpu_seconds']:.2g}"
    errors = [f"{entry[name]:.3f}" for name in ("matching_error", "worst_cluster_error")]
    return f"| {' | '.join([name, str(entry['iterations']), cost, *errors, *scores])} |"


def main(arguments: argparse.Namespace) -> None:
    """Measures task by task, writes, and prints the table."""
    settings = BEFORE if arguments.before else {name: SETTINGS[name] for name in arguments.settings}
    order = [f"{task}, {name}" for task in ("digits", "fashion") for name in (*BEFORE, *SETTINGS)]
    report = Report(arguments.output, {"identity": {"queries": "tuning"}, "versions": versions()}, order)
    for name in arguments.tasks:
        with tempfile.TemporaryDirectory() as folder:
            task = ground_truth.load_task(name)
            found = measure(task, Path(folder), settings, cost_only=arguments.cost_only)
        for setting, entry in found.items():
            report.put(f"{name}, {setting}", entry | {"environment": environment()})
    print(table(report.content["methods"]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["digits", "fashion"])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--cost-only", action="store_true", help="no agreement with retraining")
    parser.add_argument("--before", action="store_true", help="of the distiller without a tolerance")
    parser.add_argument("--output", type=Path, default=RESULTS / "stopping.json", help="another JSON file")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    main(parser.parse_args())
