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

from benchmarks import truth as ground_truth
from benchmarks.recorded import RECORDED_SEED
from benchmarks.report import RESULTS, Report, environment, versions
from hf_rgm import Attributor, DistillationConfig, ReverseGradientMatchingDistiller, TrajectoryCallback
from hf_rgm.attribution.objectives import Queries, resolve_objective
from hf_rgm.attribution.replays import Replays
from hf_rgm.exceptions import DivergenceError
from hf_rgm.fidelity.scores import linear_datamodeling_score, noise_ceiling
from hf_rgm.processes import Processes
from hf_rgm.rows import RowReader
from hf_rgm.trajectory import Trajectory

NUM_STATES = (8, 16, 64)
REWINDS = (0.14, 0.27, 0.4)
NUM_MASKS = 12
NUM_QUERIES = 60
MAX_BYTES = 4 * 10**9


def measure(name: str, folder: Path) -> dict[str, Any]:
    """LDS of clusters and drift by number of states and rewind, and the noise ceiling on the same masks."""
    task = ground_truth.load_task(name)
    truth = ground_truth.first_halves(task, NUM_MASKS, NUM_QUERIES)
    folders = {count: folder / str(count) for count in NUM_STATES}
    callbacks = [TrajectoryCallback(path, num_states=count) for count, path in folders.items()]
    trainer = task.build_trainer(task.train, RECORDED_SEED, callbacks=callbacks)
    trainer.train()
    distiller = ReverseGradientMatchingDistiller(
        trainer.model,  # type: ignore[arg-type]
        folders[min(NUM_STATES)],
        task.train,
        task.clusters,
        config=DistillationConfig(),
        disable_tqdm=True,
    )
    attributor = Attributor(trainer.model, distiller.distill(), disable_tqdm=True)  # type: ignore[arg-type]
    model = attributor.model
    reader = RowReader(task.tuning_queries.select(range(truth.shape[1])), model, what="queries")
    queries, objective = Queries(*reader.batch(range(len(reader)))), resolve_objective(task.objective)
    masks = task.cluster_masks()[:NUM_MASKS]
    weights = torch.from_numpy(masks * task.clusters.sizes.sum() / (masks @ task.clusters.sizes)[:, None]).float()
    results: dict[str, Any] = {"noise_ceiling": vars(noise_ceiling(truth, linear_datamodeling_score))}
    for count, path in folders.items():
        parts = (model, attributor.inputs, attributor.samples, task.clusters, Trajectory.load(path))
        replays = Replays(*parts, max_bytes=MAX_BYTES, processes=Processes(), disable_tqdm=True)
        for rewind in REWINDS:
            start = time.process_time()
            try:
                with model.differentiable():
                    found = replays.values("replay", objective, queries, weights, gradients=None, rewind=rewind)
                agreement = linear_datamodeling_score(found.values.T.numpy(), truth.mean(0))
                entry = {"lds_clusters": vars(agreement), "drift": found.drift}
                told = f"{agreement.value:.3f}, drift {found.drift:.2f}"
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
