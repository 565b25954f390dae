"""
Fidelity of attribution methods against retraining, and what they cost.

    python -m benchmarks.truth --task digits      # once; the expensive part
    python -m benchmarks.run --task digits        # all methods that have no result yet
    python -m benchmarks.run --task digits --methods "synset alone"               # these, again

Every method's result is written to a JSON file under benchmarks/results/ as soon as it is there; see
benchmarks/README.md for what each figure is. `--tuning` scores on the tuning queries instead, which are never
reported.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from datasets import Dataset

from benchmarks import truth as ground_truth
from benchmarks.costs import Meter
from benchmarks.figures import MEASURES, ceilings, figures, first_queries, mean_figure, unperturbed
from benchmarks.methods import ABLATIONS, METHODS
from benchmarks.recorded import RECORDED_SEED, Entrant, Method, Prediction, Recorded
from benchmarks.report import RESULTS, Report, environment, versions
from benchmarks.tasks import CLUSTER_MASK_SEED, ROW_MASK_SEED, Task
from benchmarks.truth import Truth
from hf_rgm.agreement.correlations import Estimate
from hf_rgm.model.functional_model import parameters_sha256

TUNING_QUERIES = 60
DEAR_TUNING_QUERIES = 10
FIRST_QUERIES = 30


class Benchmark:
    """
    Scores methods on one recorded run.

    Args:
        recorded (`Recorded`): The recorded run.
        queries (`Dataset`): The queries that are scored.
        truth (`Truth`): The truth on them.
        tuning_truth (`Truth`): The truth on the task's tuning queries, on which settings are chosen.
        name (`str`, *optional*, defaults to `"reported"`): What the scored queries are.
        num_tuning_queries (`int`, *optional*, defaults to `60`): How many of the tuning queries.
    """

    def __init__(
        self,
        recorded: Recorded,
        queries: Dataset,
        truth: Truth,
        tuning_truth: Truth,
        *,
        name: str = "reported",
        num_tuning_queries: int = TUNING_QUERIES,
    ) -> None:
        self.recorded = recorded
        self.task: Task = recorded.task
        self.queries = queries
        self.truth = truth
        self.name = name
        self.tuning_truth = tuning_truth
        self.num_tuning_queries = min(num_tuning_queries, len(self.task.tuning_queries))
        self.num_first = min(FIRST_QUERIES, len(queries))

    def header(self) -> dict[str, Any]:
        """What the results depend on, and the figures that belong to no method."""
        first = self.truth.first(self.num_first)
        return {
            "identity": {
                "task": self.task.name,
                "queries": self.name,
                "num_queries": len(self.queries),
                "recorded_parameters": parameters_sha256(dict(self.recorded.model.named_parameters())),
                "truth": self.truth.sha256(),
            },
            "versions": versions(),
            "seeds": {
                "recorded": RECORDED_SEED,
                "truth": list(self.task.seeds),
                "cluster_masks": CLUSTER_MASK_SEED,
                "row_masks": ROW_MASK_SEED,
            },
            "num_states": self.recorded.num_states,
            "noise_ceiling": ceilings(self.truth),
            "unperturbed": unperturbed(self.recorded, self.queries, self.truth),
            "first_queries": {"num_queries": self.num_first, "noise_ceiling": ceilings(first)},
        }

    def score(self, entrant: Entrant) -> dict[str, Any]:
        """
        Chooses the setting of a method, runs it on the queries and scores it.

        Whatever the method raises becomes its result.
        """
        entry: dict[str, Any] = {"family": entrant.family}
        setting = next(iter(entrant.grid))
        if len(entrant.grid) > 1:
            entry["tuning"] = tuning = self._tune(entrant)
            setting = tuning["chosen"]
        if setting is None:
            entry["error"] = "; ".join(dict.fromkeys(values["error"] for values in tuning["settings"].values()))
        else:
            try:
                entry |= self._run(entrant.grid[setting], self._limit(entrant, len(self.queries)))
            except Exception as error:  # a peer may raise anything; the run goes on and the result says so
                entry["error"] = _failure(error)
        entry["environment"] = environment() | {
            "training_seconds": self.recorded.training_seconds,
            "retraining_seconds": self.recorded.retraining_seconds,
        }
        return entry

    def _limit(self, entrant: Entrant, count: int) -> int:
        limit = self.task.num_dear_queries
        return count if limit is None or not entrant.dear else min(count, limit)

    def _tune(self, entrant: Entrant) -> dict[str, Any]:
        """Figures of every setting on the tuning queries, and the best by their mean (`None` if all failed)."""
        count = self.num_tuning_queries
        if self._limit(entrant, count) < count:
            count = min(count, DEAR_TUNING_QUERIES)
        queries, truth = self.task.tuning_queries.select(range(count)), self.tuning_truth.first(count)
        start = time.process_time()
        settings: dict[str, Any] = {}
        for label, method in entrant.grid.items():
            try:
                values = figures(self.task, truth, method(self.recorded, queries))
                settings[label] = {"mean": mean_figure(values), **{k: values[k] for k in MEASURES if k in values}}
            except Exception as error:  # as above; the other settings may work
                settings[label] = {"error": _failure(error)}
        means = {label: values["mean"] for label, values in settings.items() if "mean" in values}
        return {
            "num_queries": count,
            "settings": settings,
            "chosen": max(means, key=means.__getitem__) if means else None,
            "seconds": time.process_time() - start,
        }

    def _run(self, method: Method, num_queries: int) -> dict[str, Any]:
        self.recorded.reused_bytes = 0
        with Meter() as meter:
            prediction = method(self.recorded, self.queries.select(range(num_queries)))
        first = min(self.num_first, num_queries)
        peak = max(meter.peak_bytes, self.recorded.reused_bytes)
        return {
            "num_queries": num_queries,
            "figures": figures(self.task, self.truth.first(num_queries), prediction),
            "first_queries": {
                "num_queries": first,
                "figures": figures(self.task, self.truth.first(first), first_queries(prediction, first)),
            },
            "costs": self._costs(prediction, peak),
            "details": {name: value for name, value in prediction.details.items() if name != "kept_bytes"},
        }

    def _costs(self, prediction: Prediction, peak_bytes: int) -> dict[str, Any]:
        training, retraining = self.recorded.training_seconds, self.recorded.retraining_seconds
        model = prediction.model_seconds
        return {
            "offline_seconds": prediction.offline_seconds,
            "offline_over_training": prediction.offline_seconds / training,
            "online_seconds": prediction.online_seconds,
            "online_over_retraining": prediction.online_seconds / retraining,
            "model_seconds": model,
            "model_over_retraining": None if model is None else model / retraining,
            "kept_bytes": prediction.details.get("kept_bytes"),
            "peak_bytes": peak_bytes,
            "stages_over_training": {name: seconds / training for name, seconds in prediction.stages.items()},
        }


def _failure(error: Exception) -> str:
    """What the results say of an error; where it came from is printed, unless a package is only missing."""
    if not isinstance(error, ImportError):
        traceback.print_exc()
    return f"{type(error).__name__}: {error}"


def line(name: str, values: dict[str, Any]) -> str:
    """A line of the printed table."""
    cells = [str(Estimate(**values[key])) if key in values else "" for key in MEASURES]
    return f"{name:44s} " + " ".join(f"{cell:22s}" for cell in cells)


def _costs_line(entry: dict[str, Any]) -> str:
    costs = entry["costs"]
    setting = f", {entry['tuning']['chosen']}" if "tuning" in entry else ""
    return (
        f" offline {costs['offline_over_training']:.1f}, online {costs['online_over_retraining']:.1f} trainings for "
        f"{entry['num_queries']} queries{setting}"
    )


def run(benchmark: Benchmark, entrants: Sequence[Entrant], report: Report, *, again: bool) -> list[str]:
    """
    Scores methods one after another, each written as soon as it is done.

    Args:
        benchmark (`Benchmark`): What to score on.
        entrants (`Sequence[Entrant]`): The methods.
        report (`Report`): Where results go.
        again (`bool`): Also score methods that have a result.

    Returns:
        `list[str]`: the methods that failed.
    """
    failed = []
    print(f"{'':44s} leave-cluster-out      LDS clusters           LDS rows")
    print(line("noise ceiling (one seed)", report.content["noise_ceiling"]))
    for entrant in entrants:
        before = report.entry(entrant.name)
        if before is not None and "error" not in before and not again:
            print(line(entrant.name, before["figures"]) + f" kept, of commit {before['environment']['commit']}")
            continue
        entry = benchmark.score(entrant)
        report.put(entrant.name, entry)
        if "error" in entry:
            failed.append(entrant.name)
            print(f"{entrant.name:44s} FAILED: {entry['error']}", flush=True)
            continue
        print(line(entrant.name, entry["figures"]) + _costs_line(entry), flush=True)
    return failed


def main(arguments: argparse.Namespace) -> None:
    """Loads the task and its truth, records the run, scores the methods."""
    task = ground_truth.load_task(arguments.task)
    tuning_truth = ground_truth.load(task, tuning=True)
    queries, truth = task.queries, ground_truth.load(task)
    if arguments.tuning:
        queries = task.tuning_queries.select(range(arguments.num_queries or len(task.tuning_queries)))
        truth = tuning_truth.first(len(queries))
    path = arguments.output or RESULTS / f"{task.name}{'-tuning' if arguments.tuning else ''}.json"
    with tempfile.TemporaryDirectory() as folder:
        benchmark = Benchmark(
            Recorded(task, Path(folder) / "trajectory"),
            queries,
            truth,
            tuning_truth,
            name="tuning" if arguments.tuning else "reported",
            num_tuning_queries=arguments.num_tuning_queries,
        )
        entrants = {**METHODS, **ABLATIONS}
        report = Report(path, benchmark.header(), list(entrants), anew=arguments.anew)
        chosen = [entrants[name] for name in arguments.methods or METHODS]
        failed = run(benchmark, chosen, report, again=bool(arguments.methods))
    print(f"Written to {path}" + (f"; failed: {', '.join(failed)}" if failed else ""))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True)
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, *ABLATIONS], metavar="METHOD")
    parser.add_argument("--tuning", action="store_true", help="score on the tuning queries")
    parser.add_argument("--num-queries", type=int, help="with --tuning: only the first so many")
    parser.add_argument("--num-tuning-queries", type=int, default=TUNING_QUERIES, help="to choose settings on")
    parser.add_argument("--output", type=Path, help="another JSON file")
    parser.add_argument("--anew", action="store_true", help="discard the results of an earlier run")
    given = parser.parse_args()
    if given.num_queries and not given.tuning:
        parser.error("--num-queries is for --tuning: reported figures are those of all queries.")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    main(given)
