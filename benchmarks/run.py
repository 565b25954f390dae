"""
Fidelity of attribution methods against retraining.

    python -m benchmarks.truth --task digits      # once; the expensive part
    python -m benchmarks.run --task digits        # all methods; or --methods "adjoint, 2 per cluster"

Writes one JSON under benchmarks/results/ and prints a table. `--tuning` scores on the tuning queries instead, which
are never reported.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import transformers

from benchmarks import truth as ground_truth
from benchmarks.methods import ABLATIONS, METHODS
from benchmarks.recorded import Prediction, Recorded
from benchmarks.tasks import Task
from hf_rgm.fidelity.scores import leave_cluster_out_correlation, linear_datamodeling_score, noise_ceiling

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "datasets", "accelerate", "numpy", "scikit-learn")


def figures(task: Task, truth: ground_truth.Truth, prediction: Prediction) -> dict:
    """Leave-cluster-out correlation and LDS of clusters and rows, with intervals."""
    subsets = prediction.cluster_subset_values
    if subsets is None:
        subsets = prediction.cluster_scores @ task.cluster_masks().T.astype(np.float32)
    result = {
        "leave_cluster_out": leave_cluster_out_correlation(prediction.cluster_scores, truth.leave_out.mean(0)),
        "lds_clusters": linear_datamodeling_score(subsets, truth.cluster_subsets.mean(0)),
    }
    if prediction.row_scores is not None:
        predicted = prediction.row_scores @ task.row_masks().T.astype(np.float32)
        result["lds_rows"] = linear_datamodeling_score(predicted, truth.row_subsets.mean(0))
    return {name: asdict(estimate) for name, estimate in result.items()}


def ceilings(truth: ground_truth.Truth) -> dict:
    """The same figures for one retraining seed against the others."""
    return {
        "leave_cluster_out": asdict(noise_ceiling(truth.leave_out, leave_cluster_out_correlation)),
        "lds_clusters": asdict(noise_ceiling(truth.cluster_subsets, linear_datamodeling_score)),
        "lds_rows": asdict(noise_ceiling(truth.row_subsets, linear_datamodeling_score)),
    }


def line(name: str, values: dict) -> str:
    """A line of the printed table."""
    cells = [
        f"{values[key]['value']:.3f} [{values[key]['low']:.3f}, {values[key]['high']:.3f}]" if key in values else ""
        for key in ("leave_cluster_out", "lds_clusters", "lds_rows")
    ]
    return f"{name:40s} " + " ".join(f"{cell:22s}" for cell in cells)


def main(task_name: str, method_names: list[str], *, tuning: bool) -> None:
    """Runs the methods and writes the results."""
    task = ground_truth.load_task(task_name)
    truth = ground_truth.load(task, tuning=tuning)
    queries = task.tuning_queries if tuning else task.queries
    with tempfile.TemporaryDirectory() as folder:
        recorded = Recorded(task, Path(folder) / "trajectory")
        report = {
            "task": task.name,
            "queries": "tuning" if tuning else "reported",
            "num_queries": len(queries),
            "truth_seeds": list(task.seeds),
            "recorded_seed": 0,
            "training_seconds": recorded.training_seconds,
            "recording": recorded.summary,
            "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
            "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
            "noise_ceiling": ceilings(truth),
            "methods": {},
        }
        print(line("", {}).rstrip() + "leave-cluster-out      LDS clusters           LDS rows")
        print(line("noise ceiling (one seed)", report["noise_ceiling"]))
        for name in method_names:
            prediction = {**METHODS, **ABLATIONS}[name](recorded, queries)
            report["methods"][name] = {
                **figures(task, truth, prediction),
                "offline_over_training": prediction.offline_seconds / recorded.training_seconds,
                "online_over_training": prediction.online_seconds / recorded.training_seconds,
                **prediction.details,
            }
            costs = report["methods"][name]
            print(
                line(name, costs) + f" offline {costs['offline_over_training']:.1f}, online "
                f"{costs['online_over_training']:.1f} trainings",
                flush=True,
            )
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{task.name}{'-tuning' if tuning else ''}.json"
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"Written to {path}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=[*METHODS, *ABLATIONS])
    parser.add_argument("--tuning", action="store_true")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    main(arguments.task, arguments.methods, tuning=arguments.tuning)
