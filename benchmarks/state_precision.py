"""
What recorded states in fewer bits cost in fidelity, and save on disk.

    python -m benchmarks.state_precision --task digits

One synset is distilled, saved with its states in each precision, loaded again and scored like a method of
`benchmarks.run`, on the task's reported queries. Writes benchmarks/results/state-precision-<task>.json.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import transformers

from benchmarks import truth as ground_truth
from benchmarks.costs import folder_bytes
from benchmarks.figures import figures
from benchmarks.methods.ours import adjoint, replay
from benchmarks.recorded import Method, Recorded
from benchmarks.report import RESULTS, environment, versions
from benchmarks.tasks import Task
from hf_rgm import DistillationConfig, Synset
from hf_rgm.files.writing import write_json
from hf_rgm.trajectory.precision import PRECISIONS

FORMAT_VERSION = 1
METHODS: dict[str, Method] = {
    "synset and rows": replay(with_rows=True),
    "synset alone": replay(distillation={"responses": "none"}),
    "anchored replay": replay(engine="replay"),
    "adjoint": adjoint(),
}


class Reloaded:
    """The recorded run with a synset that came from a folder."""

    def __init__(self, recorded: Recorded, synset: Synset) -> None:
        self.task: Task = recorded.task
        self.model = recorded.model
        self._synset = synset

    def synset(self, config: DistillationConfig, *, num_runs: int = 1) -> tuple[Synset, float]:
        """The synset, whatever the settings, and no seconds."""
        del config, num_runs
        return self._synset, 0.0


def measure(recorded: Recorded, truth: ground_truth.Truth) -> dict[str, Any]:
    """
    Bytes and figures by precision; for each method also the correlation of its scores with those of float32.

    Returns:
        `dict`: by precision `"kept_bytes"`, `"states_bytes"` and `"methods"`.
    """
    synset, _ = recorded.synset(DistillationConfig())
    queries = recorded.task.queries.with_format("torch")
    results: dict[str, Any] = {}
    exact: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as parent:
        for precision in PRECISIONS:
            folder = synset.save_pretrained(Path(parent) / precision, state_precision=precision)
            states = [*folder.glob("trajectories/*/states/*")]
            scored = {}
            for name, method in METHODS.items():
                prediction = method(Reloaded(recorded, Synset.from_pretrained(folder)), queries)  # type: ignore[arg-type]
                scores = exact.setdefault(name, prediction.cluster_scores)
                agreement = float(np.corrcoef(scores.ravel(), prediction.cluster_scores.ravel())[0, 1])
                scored[name] = figures(recorded.task, truth, prediction) | {"correlation_with_float32": agreement}
                print(f"{precision}, {name}: correlation with float32 {agreement:.5f}", flush=True)
            results[precision] = {
                "kept_bytes": folder_bytes(folder),
                "states_bytes": sum(path.stat().st_size for path in states),
                "methods": scored,
            }
    return results


def main(task_name: str, output: Path | None) -> None:
    """Measures and writes."""
    task = ground_truth.load_task(task_name)
    path = output or RESULTS / f"state-precision-{task.name}.json"
    truth = ground_truth.load(task)
    with tempfile.TemporaryDirectory() as folder:
        results = measure(Recorded(task, Path(folder) / "trajectory"), truth)
    write_json(
        path,
        {
            "format_version": FORMAT_VERSION,
            "task": task.name,
            "precisions": results,
            "environment": environment(),
            "versions": versions(),
        },
    )
    print(f"Written to {path}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True)
    parser.add_argument("--output", type=Path, help="another JSON file")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    main(arguments.task, arguments.output)
