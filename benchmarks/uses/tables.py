"""Tables of the uses of attributions, from benchmarks/results/uses-<task>.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.formats import markdown


def uses_tables(found: dict[str, Any]) -> str:
    """
    A table for each use that was measured.

    Args:
        found (`dict`): The JSON that `benchmarks.uses` writes.
    """
    tables = {"mislabels": mislabels, "brittleness": brittleness, "mixture": mixture}
    return "\n\n".join(table(found[use]["figures"]) for use, table in tables.items() if use in found)


def mislabels(figures: dict[str, Any]) -> str:
    """How soon each ranking finds the flipped rows."""
    rankings = figures["rankings"]
    keys = list(next(iter(rankings.values())))
    titles = ["mislabelled rows, ranking", *("area under the curve" if key == "area" else key for key in keys)]
    rows = [[name, *(_mean(values[key], spread="sd") for key in keys)] for name, values in rankings.items()]
    return (
        f"Labels of {figures['flipped_share']:.0%} of the rows are flipped, then rows inspected in the order of each "
        f"ranking: area under the curve of the share found (at best {figures['best_area']:.3f}, at random 0.5), and "
        f"the share found by then; mean ± standard deviation over {len(figures['seeds'])} seeds."
        f"\n\n{markdown(titles, rows)}"
    )


def brittleness(figures: dict[str, Any]) -> str:
    """What retraining without the top rows does to single predictions, and to the loss of all."""
    titles = ["brittleness, rows removed by", "rows", "predictions flipped", "fall of the gap", "rise of the loss"]
    rows = [
        [
            name,
            str(entry["removed"]),
            f"{entry['flipped']['mean']:.0%}",
            _mean(entry["gap_fall"]),
            _mean(entry["loss_rise"]),
        ]
        for name, entries in figures["removals"]["methods"].items()
        for entry in entries
    ]
    difference = figures["loss_difference"]
    random = np.array(difference["random_rises"])
    loss_rows = [[name, f"{rise:.4f}"] for name, rise in difference["rise"].items()]
    loss_rows.append(["random rows", f"{random.mean():.4f} ± {random.std(ddof=1) / np.sqrt(len(random)):.4f}"])
    loss_titles = [f"{difference['removed']} rows absent from the recorded run", "rise of the mean loss"]
    return (
        "The rows with the highest scores for one query are removed and the model retrained, for "
        f"{len(figures['removals']['queries'])} queries that are classified correctly (gap: logit of the label less "
        "the next; mean ± standard error).\n\n"
        f"{markdown(titles, rows)}\n\n"
        "The rows with the highest mean score for all queries are absent from the recorded run, whose mean loss is "
        f"{difference['loss']:.4f}.\n\n{markdown(loss_titles, loss_rows)}"
    )


def mixture(figures: dict[str, Any]) -> str:
    """Predicted change of the suggested mixture, and what retraining finds for it and for its controls."""
    titles = ["mixture for", "trained on", "predicted", "change, queries asked for", "change, other queries"]
    rows = []
    for case, entry in figures.items():
        changes = entry["retrained_changes"]
        for applied in dict.fromkeys(name.rpartition(", ")[0] for name in changes):
            predicted = f"{entry['predicted_change']:+.3f}" if applied == "suggested" else ""
            after = [_mean(changes[f"{applied}, {where}"], sign="+") for where in ("asked", "held_out")]
            rows.append([f"{case}, {entry['objective'].replace('_', ' ')}", applied, predicted, *after])
    return (
        "Clusters are weighted as suggested for some queries, at the same number of rows, and the model retrained: "
        "change of the mean objective against training on all rows once, mean over seeds ± standard error.\n\n"
        + markdown(titles, rows)
    )


def _mean(value: dict[str, Any], *, sign: str = "", spread: str = "standard_error") -> str:
    return f"{value['mean']:{sign}.3f} ± {value[spread]:.3f}"


def vendors(found: Mapping[str, dict[str, Any]]) -> str:
    """Who mislabels, and what the model would be without them, by task."""
    named, without = [], []
    for task, figures in found.items():
        named += [
            [task, name, ranking["named"], f"{ranking['auc']:.3f}", f"{ranking['auc_named_vendor_first']:.3f}"]
            for name, ranking in figures["rankings"].items()
        ]
        sizes, accuracy, cost = figures["sizes"], figures["accuracy"], figures["cost"]
        without.append(
            [
                task,
                f"{cost['vendors and rows / training']:.1f}",
                f"{cost['model without the culprit / training']:.2f}",
                f"{cost['peak_bytes'] / 1e9:.1f} GB",
                f"{cost['trajectory_bytes'] / 1e6:.0f} MB",
                *(f"{accuracy[part]:.1%}" for part in ("recorded", "retrained")),
                *(f"{accuracy[f'without the culprit, {part}']:.1%}" for part in ("predicted", "retrained")),
                *(f"{sizes[part][0]:.2f}" for part in ("agreement", "slope", "slope, calibrated")),
            ]
        )
    culprit = next(iter(found.values()))["culprit"]
    titles = ["task", "ranking", f"names (right: {culprit})", "rows, AUC", "rows, AUC, the named vendor's first"]
    costs = [
        "task",
        "asking / training",
        "model / training",
        "peak memory",
        "recording",
        "right: recorded",
        "retrained",
    ]
    costs += ["without it: predicted", "retrained", "agreement", "slope", "slope, calibrated"]
    return (
        "One of ten vendors labels its negative sentences as positive; MiniLM is fine-tuned in the usual way (three "
        "epochs, dropout, clipping at 1, AdamW), and asked which vendor and which rows made it get held-out sentences "
        "wrong. States are recorded in float32; EK-FAC has its own damping. AUC: area under the ROC curve of the "
        "wrong labels among all rows, and when rows of the vendor that a ranking names come first.\n\n"
        f"{markdown(titles, named)}\n\n"
        "Shares of held-out sentences that are classified rightly, by the recorded model and by models without the "
        "culprit; rank correlation of scores of vendors with retraining, slope of retrained changes on scores, and "
        "that slope when sizes were calibrated on other sentences (1 is best).\n\n"
        f"{markdown(costs, without)}"
    )
