"""Plots of checks: the matching error of a synset, predictions against retraining, inspection curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from hf_rgm.agreement.correlations import MIN_POINTS, linear_datamodeling_score
from hf_rgm.plots.drawing import (
    GRID,
    LINES,
    NEUTRAL,
    POSITIVE,
    bare,
    colour_matrix,
    count,
    finite,
    new_axes,
    one_line,
    titled,
)


def plot_matching_error(
    residuals: Any,
    states: Sequence[Any],
    cluster_names: Sequence[str],
    *,
    ax: Axes | None = None,
    title: str | None = None,
    max_clusters: int = 50,
) -> Axes:
    """
    The relative error of the synthetic samples' gradients, `(num_states, num_clusters)`, by cluster and matched state.

    Clusters with the largest mean error come first; of more than `max_clusters`, only these are shown.
    """
    errors = finite(residuals, "residuals", num_dimensions=2)
    if errors.shape != (len(states), len(cluster_names)):
        raise ValueError(
            f"`residuals` have shape {errors.shape} for {len(states)} states and {len(cluster_names)} clusters. Pass "
            "one name for each."
        )
    order = np.argsort(-errors.mean(axis=0), kind="stable")[:max_clusters]
    if ax is None:
        ax = new_axes(4.2 + 0.2 * len(order), 2.4 + 0.24 * len(states))
    label, names = "relative squared error\n(0: gradients are equal)", [cluster_names[k] for k in order]
    colour_matrix(ax, errors[:, order], states, names, label=label, extend="neither", cmap="Blues", vmin=0)
    ax.set_xlabel(count("clusters", len(order), len(cluster_names), "errors"))
    return titled(ax, title)


def plot_predicted_against_actual(
    predicted: np.ndarray,
    actual: np.ndarray,
    *,
    error: np.ndarray | None = None,
    ax: Axes | None = None,
    title: str | None = None,
    unit: str = "change of the objective",
) -> Axes:
    """
    Predicted changes against those of retraining, with their rank correlation and its 95% interval.

    Shape `(num_queries, num_subsets)` gives the LDS; any other, the correlation of all points. `error` (same shape)
    is the half-width of the interval of `actual`.
    """
    x, y = finite(actual, "actual"), finite(predicted, "predicted")
    spread = None if error is None else finite(error, "error")
    if x.shape != y.shape or x.size < MIN_POINTS or (spread is not None and spread.shape != x.shape):
        raise ValueError(
            f"`predicted` {y.shape}, `actual` {x.shape} and `error` {None if spread is None else spread.shape} must "
            f"have the same shape and at least {MIN_POINTS} points."
        )
    agreement = _agreement(y, x)
    x, y = x.ravel(), y.ravel()
    ax = ax or new_axes(4.8, 4.6)
    lowest, highest = min(x.min(), y.min()), max(x.max(), y.max())
    margin = 0.06 * (highest - lowest) or 1.0
    limits = (float(lowest - margin), float(highest + margin))
    ax.axhline(0, color=GRID, zorder=0)
    ax.axvline(0, color=GRID, zorder=0)
    ax.plot(limits, limits, color=NEUTRAL, linewidth=0.9, linestyle="--", zorder=1, label="equal")
    if spread is not None:
        ax.errorbar(x, y, xerr=spread.ravel(), fmt="none", ecolor=POSITIVE, alpha=0.3, linewidth=0.8, zorder=1)
    ax.scatter(x, y, s=float(np.clip(4000 / len(x), 6, 30)), color=POSITIVE, alpha=0.65, linewidths=0, zorder=2)
    ax.set_xlim(limits)
    ax.set_ylim(limits)
    ax.set_aspect("equal")
    ax.set_xlabel(one_line(f"actual {unit} (retrained)", 60))
    ax.set_ylabel(one_line(f"predicted {unit}", 60))
    behind = {"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 2.0}
    ax.text(0.03, 0.97, agreement, transform=ax.transAxes, va="top", fontsize=9, bbox=behind)
    ax.legend(loc="lower right", frameon=False, fontsize=8)
    return titled(bare(ax, keep=("bottom", "left")), title)


def _agreement(predicted: np.ndarray, actual: np.ndarray) -> str:
    by_query = predicted.ndim == 2 and len(predicted) > 1 and predicted.shape[1] >= MIN_POINTS
    if not by_query:
        predicted, actual = predicted.reshape(1, -1), actual.reshape(1, -1)
    points = f"{predicted.shape[1]} points"
    if by_query:
        points = f"mean over {len(predicted)} queries, {points} each"
    if not np.any((np.ptp(predicted, axis=1) > 0) & (np.ptp(actual, axis=1) > 0)):
        return f"rank correlation undefined (constant)\n{points}"
    return f"rank correlation {linear_datamodeling_score(predicted, actual)}\n{points}"


def plot_inspection_curve(
    fractions: np.ndarray,
    found_by_method: Mapping[str, np.ndarray],
    *,
    ax: Axes | None = None,
    title: str | None = None,
    what: str = "mislabelled rows",
) -> Axes:
    """
    The share of `what` that is found when rows are inspected in the order of a score, and what chance would find.

    `fractions` of the rows inspected and, by method, fractions found: `(num_points,)`, in [0, 1].
    """
    fractions = finite(fractions, "fractions", num_dimensions=1)
    if not found_by_method:
        raise ValueError("`found_by_method` is empty. Pass at least one curve.")
    ax = ax or new_axes(6.0, 4.0)
    for number, (method, found) in enumerate(found_by_method.items()):
        found = finite(found, f"found_by_method['{method}']", num_dimensions=1)
        if len(found) != len(fractions):
            raise ValueError(f"'{method}' has {len(found)} points for {len(fractions)} fractions. Pass one for each.")
        style, color = ("-", "--", "-.", ":")[number % 4], LINES[number % len(LINES)]
        ax.plot(100 * fractions, 100 * found, style, color=color, linewidth=2, label=one_line(method))
    reach, dotted = 100 * float(fractions.max()), (0, (1, 3))
    ax.plot([0, reach], [0, reach], color=NEUTRAL, linewidth=0.9, linestyle=dotted, label="random order, expected")
    ax.set_xlabel("rows inspected (%)")
    ax.set_ylabel(f"{one_line(what)} found (%)")
    ax.set_ylim(0, 103)
    ax.set_xlim(0, reach or 1)
    ax.grid(color=GRID)
    ax.set_axisbelow(True)
    ax.legend(frameon=False, fontsize=9)
    return titled(bare(ax, keep=("bottom", "left")), title)
