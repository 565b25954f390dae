"""
What more recorded states bring to anchored replay of random halves of the clusters.

    python -m benchmarks.path_states --task fashion

Replays follow the recorded path, which is taken to be straight between recorded states. Here one training is recorded
with several numbers of states at once, and the synset is distilled on the fewest of them, so that nothing but the
path differs. Agreement with retraining (LDS of clusters) is that on the first half-masks, by the tuning queries, which
are never reported; replays use the synset alone. Writes benchmarks/results/path_states.json.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.halves import RecordedHalves
from benchmarks.report import RESULTS, Report, environment, versions
from hf_rgm import Attributor, DistillationConfig, ReverseGradientMatchingDistiller
from hf_rgm.attribution.replays import Replays
from hf_rgm.exceptions import DivergenceError
from hf_rgm.processes import Processes

NUM_STATES = (8, 16, 64)
REWINDS = (0.14, 0.27, 0.4)
NUM_MASKS = 12
NUM_QUERIES = 60
MAX_BYTES = 4 * 10**9


def measure(name: str, folder: Path) -> dict[str, Any]:
    """LDS of clusters and drift by number of states and rewind, and the noise ceiling on the same masks."""
    halves = RecordedHalves(name, folder, NUM_STATES, num_masks=NUM_MASKS, num_queries=NUM_QUERIES)
    task, model = halves.task, halves.model
    distiller = ReverseGradientMatchingDistiller(
        halves.trainer_model,
        halves.trajectories[min(NUM_STATES)],
        task.train,
        task.clusters,
        config=DistillationConfig(),
        disable_tqdm=True,
    )
    attributor = Attributor(halves.trainer_model, distiller.distill(), disable_tqdm=True)
    results: dict[str, Any] = {"noise_ceiling": halves.noise_ceiling()}
    for count, trajectory in halves.trajectories.items():
        parts = (model, attributor.inputs, attributor.samples, task.clusters, trajectory)
        replays = Replays(*parts, max_bytes=MAX_BYTES, processes=Processes(), disable_tqdm=True)
        for rewind in REWINDS:
            start = time.process_time()
            try:
                with model.differentiable():
                    found = replays.values(
                        "replay", halves.objective, halves.queries, halves.weights, gradients=None, rewind=rewind
                    )
                entry = {"lds_clusters": halves.agreement(found.values), "drift": found.drift}
                told = f"{entry['lds_clusters']['value']:.3f}, drift {found.drift:.2f}"
            except DivergenceError as error:
                entry, told = {"error": str(error)}, "diverged"
            results[f"{count} states, {rewind}"] = entry | {"cpu_seconds": time.process_time() - start}
            print(f"{name}, {count} states, from {rewind:.0%}: {told}", flush=True)
    return results


def table(methods: dict[str, Any]) -> str:
    """Agreement and drift, a row for each task and number of states."""
    lines = [f"| recorded states | {' | '.join(f'from {rewind:.0%}' for rewind in REWINDS)} |", "|---" * 4 + "|"]
    for task, entry in methods.items():
        for count in NUM_STATES:
            cells = [_cell(entry["results"][f"{count} states, {rewind}"]) for rewind in REWINDS]
            lines.append(f"| {task}, {count} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(found: dict[str, Any]) -> str:
    return "diverged" if "error" in found else f"{found['lds_clusters']['value']:.3f} ({found['drift']:.2f})"


def main(arguments: argparse.Namespace) -> None:
    """Measures, and writes."""
    identity = {"queries": "tuning", "num_masks": NUM_MASKS, "num_states": list(NUM_STATES), "rewinds": list(REWINDS)}
    report = Report(
        arguments.output, {"identity": identity, "versions": versions()}, ["digits", "fashion"], anew=False
    )
    with tempfile.TemporaryDirectory() as folder:
        found = measure(arguments.task, Path(folder))
    report.put(arguments.task, {"results": found, "environment": environment()})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="fashion", choices=("digits", "fashion"))
    parser.add_argument("--output", type=Path, default=RESULTS / "path_states.json", help="another JSON file")
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    main(given)
