"""
Single-run truth: what the recorded run itself would have become without some rows.

Same initialisation, same batches in the same order, same divisors; rows that are absent only stop contributing to the
loss. There is no seed noise, so no noise ceiling either: the exact derivative along the run would score near 1 where
removals are small. This is the form in which some other benchmarks report.

    python -m benchmarks.single_run --task digits                 # retrains what is not cached, scores all methods
    python -m benchmarks.single_run --task digits --shard 0/2     # retrains half of it and scores nothing
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from datasets import Dataset, concatenate_datasets
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from transformers import Trainer

from benchmarks import truth as ground_truth
from benchmarks.methods import METHODS
from benchmarks.recorded import RECORDED_SEED, Entrant, Method, Prediction, Recorded
from benchmarks.report import RESULTS, Report, environment, versions
from benchmarks.tasks import Task
from hf_rgm.agreement.correlations import Estimate, leave_cluster_out_correlation, linear_datamodeling_score
from hf_rgm.agreement.subsets import kept_rows, random_masks
from hf_rgm.fidelity.retraining import retrain
from hf_rgm.model.functional_model import parameters_sha256

ABSENT = -100
NUM_REMOVALS = 60
REMOVED_SHARE = 0.01
NUM_HALVES = 40
REMOVAL_SEED = 9


@dataclass
class SingleRunTruth:
    """
    Margins of the recorded run without some rows.

    Args:
        leave_out (`np.ndarray`): `(num_queries, num_clusters)`, f(all) - f(without cluster).
        removals (`np.ndarray`): `(num_queries, num_removals)`, f without a random 1% of the rows.
        halves (`np.ndarray`): `(num_queries, num_halves)`, f with a random half of the rows.
    """

    leave_out: NDArray[np.float32]
    removals: NDArray[np.float32]
    halves: NDArray[np.float32]

    def first(self, count: int) -> SingleRunTruth:
        """The truth on the first `count` queries."""
        return SingleRunTruth(self.leave_out[:count], self.removals[:count], self.halves[:count])


def present_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Sum of the cross entropies of the rows that are present, over the number of all rows of the batch."""
    return F.cross_entropy(outputs.logits, labels, ignore_index=ABSENT, reduction="none").mean()


def single_run_trainer(task: Task) -> Callable[[Dataset, int], Trainer]:
    """
    A `build_trainer` for `retrain`: given some rows of [`numbered`], trains on all rows, the others absent.
    """
    labels = np.asarray(task.train["labels"][:])

    def build(kept: Dataset, seed: int) -> Trainer:
        rows = np.asarray(kept["row"][:])
        masked = np.full_like(labels, ABSENT)
        masked[rows] = labels[rows]
        dataset = task.train.remove_columns("labels").add_column("labels", masked)  # type: ignore[arg-type]
        trainer = task.build_trainer(dataset, seed)
        trainer.compute_loss_func = present_loss
        return trainer

    return build


def numbered(dataset: Dataset) -> Dataset:
    """The dataset with the position of each row in a column `row`."""
    return dataset.add_column("row", np.arange(len(dataset)))  # type: ignore[arg-type]


def removals(task: Task) -> NDArray[np.bool_]:
    """Masks without a random 1% of the rows, `(NUM_REMOVALS, num_rows)`."""
    return ~random_masks(len(task.train), NUM_REMOVALS, keep=REMOVED_SHARE, seed=REMOVAL_SEED)


def subsets(task: Task) -> dict[str, list[NDArray[np.int64]]]:
    """Rows that are present in each retraining."""
    return {
        "leave_out": ground_truth.subsets(task)["leave_out"],
        "removals": kept_rows(removals(task)),
        "halves": kept_rows(task.row_masks()[:NUM_HALVES]),
    }


def compute(
    task: Task, *, shard: tuple[int, int] = (0, 1), disable_tqdm: bool = False
) -> dict[str, NDArray[np.float32]]:
    """Values `(num_subsets, num_queries + num_tuning_queries)` of each part, from the cache or anew."""
    queries = concatenate_datasets([task.queries, task.tuning_queries]).with_format("torch")
    return {
        part: retrain(
            single_run_trainer(task),
            numbered(task.train),
            rows[shard[0] :: shard[1]],
            queries,
            seeds=(RECORDED_SEED,),
            output_dir=ground_truth.CACHE / f"{task.name}-single-run",
            disable_tqdm=disable_tqdm,
        )[:, 0]
        for part, rows in subsets(task).items()
    }


def load(task: Task, *, tuning: bool = False) -> SingleRunTruth:
    """The truth on the reported queries, or on the tuning queries."""
    count = len(task.queries)
    chosen = slice(count, None) if tuning else slice(0, count)
    values = {part: array.T[chosen] for part, array in compute(task).items()}
    leave_out = values["leave_out"]
    return SingleRunTruth(leave_out[:, :1] - leave_out[:, 1:], values["removals"], values["halves"])


def figures(task: Task, truth: SingleRunTruth, prediction: Prediction) -> dict[str, Any]:
    """Leave-cluster-out correlation, and LDS of 1% removals and of halves where there are row scores."""
    result = {"leave_cluster_out": leave_cluster_out_correlation(prediction.cluster_scores, truth.leave_out)}
    if prediction.row_scores is not None:
        for part, masks in (("removals", removals(task)), ("halves", task.row_masks()[:NUM_HALVES])):
            # Sums over what is absent: those over what is present differ by a constant and lose precision.
            predicted = -prediction.row_scores @ (~masks).T.astype(np.float32)
            result[f"lds_{part}"] = linear_datamodeling_score(predicted, getattr(truth, part))
    return {name: asdict(estimate) for name, estimate in result.items()}


def chosen_setting(task: Task, entrant: Entrant) -> str:
    """
    The setting of a method that `benchmarks.run` chose on the tuning queries.

    Raises:
        ValueError: If the method has several settings and none was chosen yet.
    """
    if len(entrant.grid) == 1:
        return next(iter(entrant.grid))
    path = RESULTS / f"{task.name}.json"
    found = json.loads(path.read_text(encoding="utf-8"))["methods"] if path.is_file() else {}
    setting = found.get(entrant.name, {}).get("tuning", {}).get("chosen")
    if setting not in entrant.grid:
        raise ValueError(
            f"{path} holds no chosen setting of {entrant.name!r}. Run `python -m benchmarks.run --task {task.name} "
            f'--methods "{entrant.name}"` first.'
        )
    return setting


def chosen_method(task: Task, name: str) -> Method:
    """A method of the benchmark by name, at its chosen setting; see [`chosen_setting`]."""
    entrant = METHODS[name]
    return entrant.grid[chosen_setting(task, entrant)]


def main(task_name: str, method_names: list[str], *, anew: bool) -> None:
    """Scores methods on the single-run truth, each written as soon as it is done."""
    task = ground_truth.load_task(task_name)
    truth = load(task)
    with tempfile.TemporaryDirectory() as folder:
        recorded = Recorded(task, Path(folder) / "trajectory")
        header = {
            "identity": {
                "task": task.name,
                "num_queries": len(task.queries),
                "recorded_parameters": parameters_sha256(dict(recorded.model.named_parameters())),
            },
            "versions": versions(),
            "seeds": {"recorded": RECORDED_SEED},
            "num_removals": NUM_REMOVALS,
            "removed_share": REMOVED_SHARE,
            "num_halves": NUM_HALVES,
        }
        report = Report(RESULTS / f"single-run-{task.name}.json", header, list(METHODS), anew=anew)
        for name in method_names:
            setting = chosen_setting(task, METHODS[name])
            method, limit = METHODS[name].grid[setting], len(task.queries)
            if METHODS[name].dear and task.num_dear_queries:
                limit = task.num_dear_queries
            prediction = method(recorded, task.queries.select(range(limit)))
            values = figures(task, truth.first(limit), prediction)
            report.put(
                name, {"setting": setting, "num_queries": limit, "figures": values, "environment": environment()}
            )
            print(
                f"{name:44s} " + "  ".join(f"{key} {Estimate(**value)}" for key, value in values.items()), flush=True
            )
    print(f"Written to {report.path}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, metavar="METHOD")
    parser.add_argument("--shard", help="i/n: only retrain, every n-th, starting with the i-th; score nothing")
    parser.add_argument("--anew", action="store_true", help="discard the results of an earlier run")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    if arguments.shard:
        torch.set_num_threads(1)
        index, count = map(int, arguments.shard.split("/"))
        compute(ground_truth.load_task(arguments.task), shard=(index, count))
    else:
        main(arguments.task, arguments.methods, anew=arguments.anew)
