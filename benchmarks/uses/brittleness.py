"""Brittleness: remove the rows that help a prediction most, retrain, and see whether it falls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch.nn import functional as F

from benchmarks import truth as ground_truth
from benchmarks.recorded import RECORDED_SEED, Recorded
from benchmarks.single_run import REMOVED_SHARE, chosen_method, numbered, single_run_trainer
from benchmarks.tasks import Task
from hf_rgm import Objective
from hf_rgm.engines.objectives import Forward, Queries
from hf_rgm.fidelity.retraining import retrain
from hf_rgm.model.functional_model import FunctionalModel
from hf_rgm.model.row_reader import RowReader

NUM_QUERIES = 20
REMOVED_SHARES = (0.0025, 0.01, 0.04)
NUM_RANDOM = 10
SEED = 12
RANDOM, RANDOM_OF_LABEL = "random rows", "random rows of the query's label"


def _gaps_and_losses(forward: Forward, queries: Queries) -> torch.Tensor:
    logits = forward(queries.inputs)
    own = torch.arange(logits.shape[-1], device=logits.device) == queries.labels[:, None]
    gaps = logits[own] - logits.masked_fill(own, float("-inf")).amax(-1)
    return torch.cat([gaps, F.cross_entropy(logits, queries.labels, reduction="none")])


GAPS_AND_LOSSES = Objective("gaps and losses", _gaps_and_losses)
"""For each query the label's logit less the largest other (negative: misclassified), then each query's loss."""


def run(recorded: Recorded, method_names: Sequence[str]) -> dict[str, Any]:
    """
    Removals by each method and at random, each followed by a retraining.

    Returns:
        `dict`: `"removals"`, for single queries: for each method and share of removed rows the share of predictions
        that flip, the mean fall of the gap between the label's logit and the next, and the mean rise of the loss.
        `"loss_difference"`, for all queries at once and the recorded run itself: rise of the mean loss when the 1%
        of rows with the highest mean score are absent.
    """
    scores = {name: _row_scores(recorded, name) for name in method_names}
    return {"removals": _removals(recorded, scores), "loss_difference": loss_difference(recorded, scores)}


def _row_scores(recorded: Recorded, name: str) -> NDArray[np.float32]:
    scores = chosen_method(recorded.task, name)(recorded, recorded.task.queries).row_scores
    if scores is None:
        raise ValueError(f"{name!r} gives no row scores. Choose methods that do.")
    return scores


def top(scores: NDArray[np.floating], count: int) -> NDArray[np.int64]:
    """Rows with the highest scores, the highest first: `(count,)`."""
    return np.argsort(-scores, kind="stable")[:count]


def _without(num_rows: int, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.setdiff1d(np.arange(num_rows), rows)


def _removals(recorded: Recorded, scores: dict[str, NDArray[np.float32]]) -> dict[str, Any]:
    task = recorded.task
    seed = task.seeds[0]
    generator = np.random.default_rng(SEED)
    num_rows, labels = len(task.train), np.asarray(task.train["labels"][:])
    query_labels = np.asarray(task.queries["labels"][:])
    before = _retrain(task, [np.arange(num_rows)], seed)[0]
    correct = (before[0] > 0) & (evaluate(recorded, task.queries)[0] > 0)
    chosen = np.sort(generator.permutation(np.flatnonzero(correct))[:NUM_QUERIES])
    result: dict[str, Any] = {}
    for share in REMOVED_SHARES:
        count = max(1, round(share * num_rows))
        removed = {name: [top(matrix[query], count) for query in chosen] for name, matrix in scores.items()}
        removed[RANDOM] = [generator.permutation(num_rows)[:count] for _ in chosen]
        removed[RANDOM_OF_LABEL] = [
            generator.permutation(np.flatnonzero(labels == query_labels[query]))[:count] for query in chosen
        ]
        for name, rows in removed.items():
            after = _retrain(task, [_without(num_rows, some) for some in rows], seed)
            gaps, losses = (after[np.arange(len(chosen)), part, chosen] for part in (0, 1))
            entry = {
                "removed": count,
                "flipped": _mean((gaps < 0).astype(float)),
                "gap_fall": _mean(before[0, chosen] - gaps),
                "loss_rise": _mean(losses - before[1, chosen]),
            }
            result.setdefault(name, []).append(entry)
            print(
                f"  {name:40s} {count:4d} rows removed: {entry['flipped']['mean']:.0%} of {len(chosen)} predictions "
                f"flip, gap falls by {_text(entry['gap_fall'])}, loss rises by {_text(entry['loss_rise'])}",
                flush=True,
            )
    return {"seed": seed, "queries": chosen.tolist(), "methods": result}


def loss_difference(recorded: Recorded, scores: dict[str, NDArray[np.float32]]) -> dict[str, Any]:
    """See [`run`]."""
    task = recorded.task
    num_rows = len(task.train)
    count = round(REMOVED_SHARE * num_rows)
    generator = np.random.default_rng(SEED)
    # Scores are of the margin m, and the loss is log(1 + exp(-m)): its derivative is -(1 - p) times the margin's.
    doubt = 1 - np.exp(-evaluate(recorded, task.queries)[1])
    removed = [top(doubt @ matrix, count) for matrix in scores.values()]
    removed += [generator.permutation(num_rows)[:count] for _ in range(NUM_RANDOM)]
    kept = [np.arange(num_rows), *(_without(num_rows, rows) for rows in removed)]
    values = retrain(
        single_run_trainer(task),
        numbered(task.train),
        kept,
        task.queries,
        seeds=(RECORDED_SEED,),
        objective=GAPS_AND_LOSSES,
        output_dir=ground_truth.CACHE / f"{task.name}-single-run" / "brittleness",
    )[:, 0]
    losses = values.reshape(len(kept), 2, -1)[:, 1].mean(1)
    rises = losses[1:] - losses[0]
    result: dict[str, Any] = dict(zip(scores, rises.tolist(), strict=False))
    random = rises[len(scores) :]
    for name, rise in result.items():
        print(
            f"  {name:40s} {count:4d} rows absent from the recorded run: mean loss of all queries rises by {rise:.4f}"
        )
    print(f"  {'random rows':40s} {count:4d} rows absent: by {_text(_mean(random))}", flush=True)
    return {"removed": count, "loss": float(losses[0]), "rise": result, "random_rises": random.tolist()}


def _retrain(task: Task, kept: list[NDArray[np.int64]], seed: int) -> NDArray[np.float32]:
    """Gaps and losses of all queries, `(num_retrainings, 2, num_queries)`."""
    values = retrain(
        task.build_trainer,
        task.train,
        kept,
        task.queries,
        seeds=(seed,),
        objective=GAPS_AND_LOSSES,
        output_dir=ground_truth.CACHE / task.name / "brittleness",
        disable_tqdm=True,
    )
    return values[:, 0].reshape(len(kept), 2, -1)


def evaluate(recorded: Recorded, queries: Dataset) -> NDArray[np.float32]:
    """Gaps and losses of the recorded model, `(2, num_queries)`."""
    model = FunctionalModel(recorded.model)
    reader = RowReader(queries, model, what="queries")
    batch = Queries(*reader.batch(range(len(reader))))
    return GAPS_AND_LOSSES.values(model, model.space.flatten(model.parameters()), batch).reshape(2, -1).numpy()


def _mean(values: NDArray[np.floating]) -> dict[str, float]:
    return {"mean": float(values.mean()), "standard_error": float(values.std(ddof=1) / np.sqrt(len(values)))}


def _text(value: dict[str, float]) -> str:
    return f"{value['mean']:.3f} +- {value['standard_error']:.3f}"
