"""
The vendor that mislabels: who made the model get queries wrong, which rows did, and what it would say without them.

Asked about the held-out queries that the recorded model gets wrong, as users do. Rankings are by the reported ones;
sizes are calibrated on the tuning queries, and measured on the reported ones. The cost is that of asking about both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import nn

from benchmarks import truth as ground_truth
from benchmarks.costs import Meter, folder_bytes
from benchmarks.methods import METHODS
from benchmarks.recorded import Recorded
from benchmarks.tasks.sentences import EMBEDDING_BATCH_SIZE, sentence_embeddings
from benchmarks.tasks.vendors import VendorTask
from hf_rgm import Attributor
from hf_rgm.agreement.correlations import leave_cluster_out_correlation, retrained_slope
from hf_rgm.fidelity.retraining import retrain

NUM_NEIGHBOURS = 20
OURS = "hf_rgm"


def run(recorded: Recorded, method_names: Sequence[str]) -> dict[str, Any]:
    """
    Vendors and rows by our scores, by those of peers, by training loss and by neighbours among embeddings.

    Returns:
        `dict`: `"rankings"`, for each: the vendor it names, the area under the ROC curve of its rows, and of its rows
        when those of the vendor it names come first; `"sizes"`: rank correlation of our scores of vendors with
        retraining, and slopes of retrained changes before and after calibration; `"accuracy"` of the recorded model,
        of ours without the culprit and of retrained ones; `"cost"` in trainings, memory and bytes.
    """
    task = recorded.task
    if not isinstance(task, VendorTask) or task.mislabelled is None:
        raise ValueError(f"Task {task.name!r} has no vendors. Choose vendors_lora or vendors_full.")
    wrong = {part: ~right_answers(recorded.model, queries) for part, queries in _parts(task).items()}
    asked = {part: _parts(task)[part].select(np.flatnonzero(wrong[part])) for part in wrong}
    with Meter() as meter:
        attributor = Attributor(
            recorded.model,
            trajectory=recorded.folder,
            rows=task.train,
            clusters=task.clusters,
            max_memory=task.max_memory,
            disable_tqdm=True,
        )
        both = concatenate_datasets(list(asked.values())).with_format("torch")
        result = attributor.attribute(both, objective=task.objective)
    count = len(asked["reported"])
    scores = {"reported": result.scores[:count], "tuning": result.scores[count:]}
    rows = {OURS: None if result.row_scores is None else result.row_scores[:count]}
    for name in method_names:
        method = next(iter(METHODS[name].grid.values()))
        rows[name] = method(recorded, asked["reported"]).row_scores
    suspicions = {name: -np.minimum(scores, 0).mean(0) for name, scores in rows.items() if scores is not None}
    suspicions |= without_queries(recorded)
    rankings = {name: _ranking(task, values) for name, values in suspicions.items()}
    truth = _leave_out(task)
    with Meter() as removal:
        without = attributor.model_without([task.culprit])
    accuracy = {
        "recorded": 1 - wrong["reported"].mean(),
        "without the culprit, predicted": right_answers(without, task.queries).mean(),
        **_retrained_accuracies(task),
    }
    figures = {
        "num_wrong": {part: int(found.sum()) for part, found in wrong.items()},
        "culprit": task.culprit,
        "mean_scores": dict(zip(task.clusters.names, scores["reported"].mean(0).tolist(), strict=True)),
        "rankings": rankings,
        "sizes": _sizes(
            scores,
            {part: truth[part][:, found] for part, found in wrong.items()},
        ),
        "accuracy": {name: float(value) for name, value in accuracy.items()},
        "cost": {
            "vendors and rows / training": meter.cpu_seconds / recorded.retraining_seconds,
            "model without the culprit / training": removal.cpu_seconds / recorded.retraining_seconds,
            "peak_bytes": meter.peak_bytes,
            "trajectory_bytes": folder_bytes(recorded.folder),
        },
    }
    print(figures, flush=True)
    return figures


def right_answers(model: nn.Module, queries: Dataset) -> NDArray[np.bool_]:
    """Whether the model gives each query its label, `(num_queries,)`."""
    model.eval()
    right = []
    for batch in queries.iter(EMBEDDING_BATCH_SIZE):
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        right.append(logits.argmax(-1) == batch["labels"])
    return torch.cat(right).numpy()


def without_queries(recorded: Recorded) -> dict[str, NDArray[np.floating]]:
    """Suspicions that need no queries, `(num_rows,)` each: training loss, and labels unlike those of neighbours."""
    train = recorded.task.train
    labels = np.asarray(train["labels"][:])
    recorded.model.eval()
    losses = []
    for batch in train.iter(EMBEDDING_BATCH_SIZE):
        with torch.no_grad():
            logits = recorded.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        losses.append(nn.functional.cross_entropy(logits, batch["labels"], reduction="none"))
    embeddings = sentence_embeddings(train)
    similarities = embeddings @ embeddings.T
    np.fill_diagonal(similarities, -np.inf)
    neighbours = np.argsort(-similarities, axis=1)[:, :NUM_NEIGHBOURS]
    return {
        "training loss": torch.cat(losses).numpy(),
        "neighbours of embeddings": (labels[neighbours] != labels[:, None]).mean(1),
    }


def _parts(task: VendorTask) -> dict[str, Dataset]:
    return {"reported": task.queries, "tuning": task.tuning_queries}


def _ranking(task: VendorTask, suspicion: NDArray[np.floating]) -> dict[str, Any]:
    ids = task.clusters.cluster_ids
    means = np.array([suspicion[ids == vendor].mean() for vendor in range(task.clusters.num_clusters)])
    named = int(means.argmax())
    first = np.where(ids == named, suspicion - suspicion.min(), suspicion - suspicion.max() - 1)
    return {
        "named": task.clusters.names[named],
        "lead": float((means[named] - means.mean()) / np.delete(means, named).std()),
        "auc": float(roc_auc_score(task.mislabelled, suspicion)),
        "auc_named_vendor_first": float(roc_auc_score(task.mislabelled, first)),
    }


def _retrain(task: VendorTask, kept: list[NDArray[np.int64]]) -> NDArray[np.float32]:
    """Margins of reported and tuning queries, `(num_subsets, num_seeds, num_queries)`; cached with the truth."""
    return retrain(
        task.build_trainer,
        task.train,
        kept,
        concatenate_datasets(list(_parts(task).values())).with_format("torch"),
        seeds=task.seeds,
        objective=task.objective,
        output_dir=ground_truth.CACHE / task.name,
        disable_tqdm=True,
    )


def _leave_out(task: VendorTask) -> dict[str, NDArray[np.float32]]:
    """What each vendor's presence changes in retraining, `(num_seeds, num_queries, num_vendors)`."""
    values = _retrain(task, ground_truth.subsets(task)["leave_out"]).transpose(1, 2, 0)
    changes = values[:, :, :1] - values[:, :, 1:]
    count = len(task.queries)
    return {"reported": changes[:, :count], "tuning": changes[:, count:]}


def _retrained_accuracies(task: VendorTask) -> dict[str, float]:
    """Of models trained anew with and without the culprit: a margin of two labels is positive where it is right."""
    culprit = task.clusters.names.index(task.culprit)
    values = _retrain(task, [np.arange(len(task.train)), task.leave_out_subsets()[culprit]])
    means = (values[:, :, : len(task.queries)] > 0).mean((1, 2))
    return {"retrained": float(means[0]), "without the culprit, retrained": float(means[1])}


def _sizes(scores: dict[str, NDArray[np.float32]], changes: dict[str, NDArray[np.float32]]) -> dict[str, Any]:
    """Agreement with retraining, `(num_seeds, num_wrong, num_vendors)`, before and after calibration."""
    slopes = {part: retrained_slope(scores[part], changes[part].mean(0)) for part in scores}
    calibrated = retrained_slope(scores["reported"] * slopes["tuning"].value, changes["reported"].mean(0))
    agreement = leave_cluster_out_correlation(scores["reported"], changes["reported"].mean(0))
    named = {"agreement": agreement, "slope": slopes["reported"], "slope, calibrated": calibrated}
    return {name: [each.value, each.low, each.high] for name, each in named.items()}
