"""
How far back replays can go: agreement with retraining, and drift, from several points of training.

    python -m benchmarks.rewinds --tasks digits fashion sentences
    python -m benchmarks.rewinds --tasks fashion --engines replay --preset accurate --rows --rewinds 0.27 0.4 0.6 \\
        --output benchmarks/results/rewinds-accurate.json

On tuning queries, with the quick preset and no rows (`--rows`: clusters' gradients by their rows). Drift, which needs
no retraining, is what replays without a `rewind` choose theirs by; see hf_rgm/attribution/drift.py. Writes
benchmarks/results/rewinds.json, task by task.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks import truth as ground_truth
from benchmarks.figures import figures
from benchmarks.recorded import Prediction, Recorded
from benchmarks.report import RESULTS, Report, environment, versions
from benchmarks.run import TUNING_QUERIES
from hf_rgm import Attributor, DistillationConfig
from hf_rgm.engines.objectives import Queries, resolve_objective
from hf_rgm.engines.perturbations import leave_one_out
from hf_rgm.attribution.replays import Replays
from hf_rgm.attribution.runs import RecordedRun
from hf_rgm.attribution.training_rows import TrainingRows
from hf_rgm.exceptions import DivergenceError
from hf_rgm.processes import Processes
from hf_rgm.rows import RowReader
from hf_rgm.synset.config import PRESETS

REWINDS = (0.14, 0.27, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
ENGINES = {"linearized_replay": "linearised", "replay": "anchored"}
MAX_BYTES = 4 * 10**9


def measure(
    task_name: str, folder: Path, engines: list[str], rewinds: Sequence[float], *, preset: str, with_rows: bool
) -> dict[str, Any]:
    """Figures and drifts by engine and rewind."""
    task = ground_truth.load_task(task_name)
    count = min(TUNING_QUERIES, len(task.tuning_queries))
    truth = ground_truth.load(task, tuning=True).first(count)
    recorded = Recorded(task, folder / "trajectory")
    synset, _ = recorded.synset(DistillationConfig.from_preset(preset))
    attributor = Attributor(recorded.model, synset, disable_tqdm=True)  # type: ignore[arg-type]
    model = attributor.model
    settings = {"max_bytes": MAX_BYTES, "processes": Processes(), "disable_tqdm": True}
    parts = (model, attributor.inputs, attributor.samples, synset.clusters, synset.trajectory)
    run = RecordedRun(Replays(*parts, **settings))
    reader = RowReader(task.tuning_queries.select(range(count)), model, what="queries")
    queries, objective = Queries(*reader.batch(range(count))), resolve_objective(task.objective)
    rows = None
    if with_rows:
        options = {"max_bytes": MAX_BYTES, "processes": Processes()}
        rows = TrainingRows(synset, model, attributor.row_loss, task.train, None, **options)
    halves = task.cluster_masks()
    halves = halves * task.clusters.sizes.sum() / (halves @ task.clusters.sizes)[:, None]
    results: dict[str, Any] = {}
    for engine in engines:
        for rewind in rewinds:
            start = time.process_time()
            entry: dict[str, Any] = {}
            try:
                with model.differentiable():
                    values = objective.values(model, run.final, queries).cpu()
                    alone, subsets = (
                        run.replayed_values(engine, objective, queries, masks, rows=rows, rewind=rewind)
                        for masks in (leave_one_out(synset.num_clusters), torch.from_numpy(halves).float())
                    )
                scores = (values - alone.values).T.numpy()
                found = figures(task, truth, Prediction(scores, cluster_subset_values=subsets.values.T.numpy()))
                entry = {
                    "leave_cluster_out": found["leave_cluster_out"],
                    "lds_clusters": found["lds_clusters"],
                    "drift_leave_cluster_out": alone.drift,
                    "drift_halves": subsets.drift,
                }
                told = [f"{found[name]['value']:.3f}" for name in ("leave_cluster_out", "lds_clusters")]
                told += [f"{alone.drift:.3f}", f"{subsets.drift:.3f}"]
            except DivergenceError as error:
                entry["error"] = str(error)
                told = ["diverged"]
            seconds = time.process_time() - start
            results[f"{engine}, {rewind}"] = entry | {"cpu_seconds": seconds}
            print(f"{task_name:12s} {engine:18s} from {rewind:.2f}: {' '.join(told)} ({seconds:.0f} s)", flush=True)
    return results


def table(methods: dict[str, Any]) -> str:
    """Agreement and drift, a column for each task and engine."""
    columns = {}
    for task, entry in methods.items():
        for key, found in entry["rewinds"].items():
            engine, rewind = key.split(", ")
            columns.setdefault(f"{task}, {ENGINES[engine]}", {})[float(rewind)] = found
    lines = [f"| from | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for rewind in sorted({rewind for column in columns.values() for rewind in column}):
        cells = [_cell(column[rewind]) for column in columns.values()]
        lines.append(f"| {rewind:.0%} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(found: dict[str, Any]) -> str:
    if "error" in found:
        return "diverged"
    single, half = found["drift_leave_cluster_out"], found["drift_halves"]
    values = [found[name]["value"] for name in ("leave_cluster_out", "lds_clusters")]
    return f"{values[0]:.3f} ({single:.2f}), {values[1]:.3f} ({half:.2f})"


def main(arguments: argparse.Namespace) -> None:
    """Measures task by task, writes, and prints the table."""
    header = {
        "identity": {"queries": "tuning", "preset": arguments.preset, "rewinds": list(arguments.rewinds)},
        "versions": versions(),
    }
    name = "{} with rows" if arguments.rows else "{}"
    report = Report(arguments.output, header, [name.format(task) for task in arguments.tasks], anew=False)
    for task in arguments.tasks:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(
                task,
                Path(folder),
                arguments.engines,
                arguments.rewinds,
                preset=arguments.preset,
                with_rows=arguments.rows,
            )
        report.put(name.format(task), {"rewinds": found, "environment": environment()})
    print(table(report.content["methods"]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["digits", "fashion", "sentences"])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--rewinds", nargs="+", type=float, default=REWINDS)
    parser.add_argument("--preset", choices=PRESETS, default="quick", help="of distilling")
    parser.add_argument("--rows", action="store_true", help="take clusters' gradients by their rows")
    parser.add_argument("--output", type=Path, default=RESULTS / "rewinds.json", help="another JSON file")
    transformers.logging.set_verbosity_error()
    main(parser.parse_args())
