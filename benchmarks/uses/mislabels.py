"""
Mislabelled rows: flip some labels, rank the rows by suspicion, and see how soon an inspector finds them.

A row is suspicious if its presence harms held-out queries; if its presence alone raises its own margin a lot
(self-influence, memorisation); or if its margin would be low without it: the margin the trained model gives the row's
label, less what the row's own presence contributed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import Trainer

from benchmarks.methods import METHODS
from benchmarks.recorded import Recorded
from benchmarks.single_run import chosen_method
from benchmarks.tasks import Task
from hf_rgm import Attributor, ClusterMap, DistillationConfig, Trajectory
from hf_rgm.engines.objectives import Queries, resolve_objective
from hf_rgm.model.functional_model import FunctionalModel
from hf_rgm.model.row_gradients import row_gradients
from hf_rgm.model.row_reader import RowReader

FLIPPED_SHARE = 0.1
INSPECTED = (0.05, 0.1, 0.2)
SEEDS = (1, 2, 3)
OURS = "hf_rgm"


def run(recorded: Recorded, method_names: Sequence[str]) -> dict[str, Any]:
    """
    Area under the inspection curve, and shares found early, of every ranking.

    Args:
        recorded (`Recorded`): Its task is recorded anew for each seed, with labels flipped.
        method_names: Names of [`METHODS`]; our own scores are always among the rankings.

    Returns:
        `dict`: for each ranking `"area"` (0.5 for a random order, `"best_area"` for a perfect one) and `"found"`, the
        share of the flipped rows among the first inspected: mean over seeds, standard deviation and all values.
    """
    by_seed: list[dict[str, dict[str, float]]] = []
    for seed in SEEDS:
        flipped_rows, flipped = flipped_task(recorded.task, seed)
        with tempfile.TemporaryDirectory() as folder:
            found = suspicions(Recorded(flipped_rows, Path(folder) / "trajectory"), method_names)
        by_seed.append({name: inspection(values, flipped) for name, values in found.items()})
    rankings: dict[str, Any] = {}
    for name in by_seed[0]:
        rankings[name] = {key: _over_seeds([one[name][key] for one in by_seed]) for key in by_seed[0][name]}
        shown = ", ".join(f"{key} {value['mean']:.4f} (sd {value['sd']:.4f})" for key, value in rankings[name].items())
        print(f"  {name:52s} {shown}", flush=True)
    return {
        "flipped_share": FLIPPED_SHARE,
        "seeds": list(SEEDS),
        "best_area": 1 - FLIPPED_SHARE / 2,
        "rankings": rankings,
    }


def flipped_task(task: Task, seed: int) -> tuple[Task, NDArray[np.bool_]]:
    """
    The task with a share of its training labels changed to another class, and which rows: `(num_rows,)`, bool.

    Clusters are made anew from the changed labels, all that a user would have, and every seed is moved by `seed`.
    """
    labels = np.asarray(task.train["labels"][:])
    num_classes = int(labels.max()) + 1
    generator = np.random.default_rng(seed)
    flipped = np.zeros(len(labels), dtype=bool)
    flipped[generator.permutation(len(labels))[: round(FLIPPED_SHARE * len(labels))]] = True
    labels = np.where(flipped, (labels + generator.integers(1, num_classes, len(labels))) % num_classes, labels)
    train = task.train.remove_columns("labels").add_column("labels", labels)  # type: ignore[arg-type]
    pixels = np.asarray(train[:]["pixel_values"]).reshape(len(train), -1)
    clusters = ClusterMap.from_embeddings(pixels, labels=labels, seed=0)
    moved = partial(_with_moved_seed, task.build_trainer, seed)
    return replace(task, train=train, clusters=clusters, build_trainer=moved), flipped


def _with_moved_seed(
    build_trainer: Callable[..., Trainer], offset: int, dataset: Any, seed: int, **options
) -> Trainer:
    return build_trainer(dataset, seed + offset, **options)


def suspicions(recorded: Recorded, method_names: Sequence[str]) -> dict[str, NDArray[np.floating]]:
    """How suspicious each training row is, `(num_rows,)`, by every ranking; held out are the tuning queries."""
    train, held_out = recorded.task.train, recorded.task.tuning_queries
    model = FunctionalModel(recorded.model)
    reader = RowReader(train, model)
    rows = Queries(*reader.batch(range(len(reader))))
    trajectory = Trajectory.load(recorded.folder)
    margin = resolve_objective("margin")
    margins = np.stack(
        [
            margin.values(model, model.space.flatten(trajectory.state(step).parameters), rows).numpy()
            for step in trajectory.state_steps
        ]
    )
    with torch.no_grad():
        gradients = row_gradients(model, model.parameters(), rows.inputs, rows.labels)
    synset, _ = recorded.synset(DistillationConfig())
    attributor = Attributor(recorded.model, synset, disable_tqdm=True)
    options: dict[str, Any] = {"rows": train, "engine": "adjoint"}
    own = self_scores(attributor.attribute(train, **options).row_scores)
    result = {
        "training loss": -margins[-1],
        "gradient norm": gradients.norm(dim=1).numpy(),
        "mean margin over the recorded states": -margins.mean(0),
        f"{OURS}, margin without the row": own - margins[-1],
        f"{OURS}, self-influence": own,
        f"{OURS}, harm to held-out queries": harm(attributor.attribute(held_out, **options).row_scores),
    }
    for name in method_names:
        if METHODS[name].family != "ours":
            method = chosen_method(recorded.task, name)
            result[f"{name}, harm to held-out queries"] = harm(method(recorded, held_out).row_scores)
            if not METHODS[name].dear:
                result[f"{name}, self-influence"] = self_scores(method(recorded, train).row_scores)
    return result


def harm(row_scores: NDArray[np.floating] | None) -> NDArray[np.floating]:
    """
    How much each row's presence harms the queries it harms: `(num_rows,)`.

    Means of all scores find fewer: a mislabelled row harms the class it belongs to and helps the class it claims.
    """
    if row_scores is None:
        raise ValueError("The method gives no row scores. Choose methods that do.")
    return -np.minimum(row_scores, 0).mean(0)


def self_scores(row_scores: NDArray[np.floating] | None) -> NDArray[np.floating]:
    """Score of each row for its own objective: the diagonal."""
    if row_scores is None:
        raise ValueError("The method gives no row scores. Choose methods that do.")
    return row_scores.diagonal()


def inspection(suspicion: NDArray[np.floating], flipped: NDArray[np.bool_]) -> dict[str, float]:
    """
    Area under the curve of the share of flipped rows found, over the share of rows inspected, most suspicious first;
    and that share at some points.
    """
    order = np.argsort(-suspicion, kind="stable")
    found = np.concatenate([[0.0], np.cumsum(flipped[order]) / flipped.sum()])
    area = float(((found[1:] + found[:-1]) / 2).mean())
    shares = {f"found at {share:.0%}": float(found[round(share * len(flipped))]) for share in INSPECTED}
    return {"area": area, **shares}


def _over_seeds(values: list[float]) -> dict[str, Any]:
    return {"mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1)), "values": values}
