"""Mixture advice: suggested cluster weights, what they are predicted to do, and what retraining with them does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from numpy.typing import NDArray

from benchmarks import truth as ground_truth
from benchmarks.recorded import Recorded
from benchmarks.tasks import Task
from hf_rgm import Attributor, DistillationConfig, Objective
from hf_rgm.engines.objectives import Forward, Queries, log_odds_margin
from hf_rgm.fidelity.retraining import retrain
from hf_rgm.results.mixture import MixtureSuggestion, mixture_weights

SEEDS = (1, 2, 3, 4, 5)
CONTROL_SEED = 13


def _margins_and_losses(forward: Forward, queries: Queries) -> torch.Tensor:
    logits = forward(queries.inputs)
    losses = torch.nn.functional.cross_entropy(logits, queries.labels, reduction="none")
    return torch.cat([log_odds_margin(logits, queries.labels), losses])


MARGINS_AND_LOSSES = Objective("margins and losses", _margins_and_losses)
"""Each query's margin, then each query's loss."""


@dataclass(frozen=True)
class Case:
    """
    Something to do better on.

    Args:
        name (`str`): In results.
        objective (`str`): `"margin"` or `"mean_loss"`.
        asked (`NDArray[np.int64]`): Queries the mixture is suggested for, positions in [`all_queries`].
        held_out (`NDArray[np.int64]`): Others of the same kind, on which it is verified too.
        labels (`tuple[int, ...]`, *optional*): The classes, if it is about some of them: the obvious thing to do is to
            train on more of these.
    """

    name: str
    objective: str
    asked: NDArray[np.int64]
    held_out: NDArray[np.int64]
    labels: tuple[int, ...] = ()


def shifted(queries: Dataset) -> Dataset:
    """The pictures moved to the right by one pixel in eight, the left edge repeated."""
    pixels = np.asarray(queries[:]["pixel_values"])
    by = max(1, pixels.shape[-1] // 8)
    moved = np.concatenate([np.repeat(pixels[..., :1], by, axis=-1), pixels[..., :-by]], axis=-1)
    columns = {"pixel_values": moved, "labels": np.asarray(queries["labels"][:])}
    return Dataset.from_dict(columns, features=queries.features).with_format("torch")


def all_queries(task: Task) -> Dataset:
    """Reported and tuning queries, then the same shifted."""
    plain = concatenate_datasets([task.queries, task.tuning_queries])
    return concatenate_datasets([plain, shifted(plain.with_format("torch"))]).with_format("torch")


def cases(task: Task, margins: NDArray[np.floating]) -> list[Case]:
    """
    Mixtures are suggested for tuning queries and verified on the reported ones.

    Args:
        task (`Task`): The task.
        margins (`np.ndarray`): Of the recorded model on the tuning queries; the two classes with the lowest mean are
            one of the cases.
    """
    labels = np.asarray(task.tuning_queries["labels"][:])
    weakest = sorted(range(int(labels.max()) + 1), key=lambda label: margins[labels == label].mean())[:2]
    count, asked = len(task.queries), len(task.queries) + np.arange(len(labels))
    held_out, total = np.arange(count), count + len(labels)
    of_weakest = np.isin(np.asarray(task.queries["labels"][:]), weakest)
    name = f"classes {weakest[0]} and {weakest[1]}"
    return [
        Case(name, "margin", asked[np.isin(labels, weakest)], held_out[of_weakest], tuple(weakest)),
        Case("all queries", "mean_loss", asked, held_out),
        Case("shifted queries", "mean_loss", total + asked, total + held_out),
    ]


def run(recorded: Recorded, method_names: Sequence[str]) -> dict[str, Any]:
    """
    Suggests a mixture for each case and retrains with it and with controls, at the default settings.

    Args:
        recorded (`Recorded`): The recorded run.
        method_names: Not used: there is one way to suggest.

    Returns:
        `dict`: for each case the suggested weights, the predicted change, and the changes that retraining finds on
        the queries asked for and on others of the same kind: mean over seeds of the difference to training on
        everything once with the same seed, and its standard error.
    """
    task = recorded.task
    queries = all_queries(task)
    synset, _ = recorded.synset(DistillationConfig())
    attributor = Attributor(recorded.model, synset, disable_tqdm=True)
    margins = attributor.replayed_values(task.tuning_queries, torch.ones(1, synset.num_clusters))[0]
    before = _retrain(task, queries, None)
    result = {}
    for case in cases(task, margins):
        mixture = attributor.suggest_mixture(queries.select(case.asked), objective=case.objective)
        result[case.name] = _verified(task, queries, case, mixture, before)
    return result


def _verified(
    task: Task, queries: Dataset, case: Case, mixture: MixtureSuggestion, before: NDArray[np.float32]
) -> dict[str, Any]:
    part = 0 if case.objective == "margin" else 1
    changes = {}
    for name, applied in {"suggested": mixture, **controls(task, case, mixture)}.items():
        after = _retrain(task, queries, applied)
        for where, chosen in (("asked", case.asked), ("held_out", case.held_out)):
            changes[f"{name}, {where}"] = _mean((after - before)[:, part, chosen].mean(1))
    entry = {
        "objective": case.objective,
        "num_asked": len(case.asked),
        "num_held_out": len(case.held_out),
        "recorded_value": mixture.objective_value,
        "retrained_value": _mean(before[:, part, case.asked].mean(1)),
        "max_change": mixture.max_change,
        "linear_change": mixture.linear_change,
        "predicted_change": mixture.predicted_change,
        "retrained_changes": changes,
        "weights": mixture.weights.tolist(),
    }
    print(
        f"  {case.name}, {case.objective} {entry['retrained_value']['mean']:.3f}: predicted "
        f"{mixture.linear_change:+.3f} (first order), {mixture.predicted_change:+.3f} (replay), weights within a "
        f"factor of {mixture.max_change:.3g}"
    )
    for name, change in changes.items():
        print(f"    retrained with {name:22s} {change['mean']:+.3f} +- {change['standard_error']:.3f}", flush=True)
    return entry


def controls(task: Task, case: Case, mixture: MixtureSuggestion) -> dict[str, MixtureSuggestion]:
    """
    Weights within the same bounds that know less: the scores per row given to clusters at random, and, for a case
    about some classes, all clusters of these classes up and all others down.
    """
    sizes = mixture.clusters.sizes
    shuffled = np.random.default_rng(CONTROL_SEED).permutation(mixture.scores / sizes)
    chosen = {"shuffled": shuffled if mixture.maximize else -shuffled}
    if case.labels:
        labels = np.asarray(task.train["labels"][:])
        of_classes = np.isin(labels, case.labels).astype(float)
        chosen["those classes"] = np.bincount(mixture.clusters.cluster_ids, weights=of_classes) / sizes
    return {
        name: replace(
            mixture, weights=mixture_weights(per_row * sizes, sizes, mixture.max_change), replayed_change=None
        )
        for name, per_row in chosen.items()
    }


def _retrain(task: Task, queries: Dataset, mixture: MixtureSuggestion | None) -> NDArray[np.float32]:
    """Margins and losses after training on a mixture, drawn anew for each seed: `(num_seeds, 2, num_queries)`."""
    values = [
        retrain(
            task.build_trainer,
            task.train,
            [np.arange(len(task.train)) if mixture is None else mixture.resample(seed)],
            queries,
            seeds=(seed,),
            objective=MARGINS_AND_LOSSES,
            output_dir=ground_truth.CACHE / task.name / "mixture",
            disable_tqdm=True,
        )[0, 0]
        for seed in SEEDS
    ]
    return np.stack(values).reshape(len(SEEDS), 2, -1)


def _mean(values: NDArray[np.floating]) -> dict[str, float]:
    return {"mean": float(values.mean()), "standard_error": float(values.std(ddof=1) / np.sqrt(len(values)))}
