"""Pictures of how far to trust: the matching error of a synset, and predictions against what really happens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from hf_rgm.agreement.correlations import MIN_POINTS, linear_datamodeling_score
from hf_rgm.plots.drawing import GRID, LINES, NEUTRAL, POSITIVE, bare, count, finite, new_axes, one_line, titled


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
    How far the gradients of synthetic samples are from those of the data, by cluster and matched state.

    Args:
        residuals (`np.ndarray` or `torch.Tensor`): `(num_states, num_clusters)`, `synset.residuals`.
        states (`Sequence`): One name for each state, `synset.matched_states`.
        cluster_names (`Sequence[str]`): One for each cluster, `synset.clusters.names`.
        ax (`Axes`, *optional*): Where to draw.
        title (`str`, *optional*): Title.
        max_clusters (`int`, *optional*, defaults to `50`): If there are more, those with the largest errors are shown,
            and the label says so.

    Returns:
        `Axes`: clusters with the largest mean error first.

    Raises:
        ValueError: If shapes do not fit or errors are not finite.
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
    image = ax.imshow(errors[:, order], cmap="Blues", vmin=0, aspect="auto", interpolation="nearest")
    ax.set_xticks(range(len(order)), [one_line(cluster_names[k], 28) for k in order], rotation=90, fontsize=8)
    ax.set_yticks(range(len(states)), [one_line(state, 28) for state in states], fontsize=8)
    ax.set_xlabel(count("clusters", len(order), len(cluster_names), "errors"))
    ax.tick_params(length=0)
    bar = ax.figure.colorbar(image, ax=ax, shrink=0.95, pad=0.02)
    bar.set_label("relative squared error\n(0: gradients are equal)", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    return titled(bare(ax, keep=()), title)


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
    Predicted changes against those found by retraining, with their rank correlation and its 95% interval.

    Args:
        predicted (`np.ndarray`): `(num_queries, num_subsets)`, for the mean over queries of the correlation over
            subsets, the LDS; or any other shape, for the correlation of all points together.
        actual (`np.ndarray`): The same shape and unit.
        error (`np.ndarray`, *optional*): The same shape: how far to either side the interval of `actual` reaches, such
            as 1.96 standard errors over seeds. Drawn as bars.
        ax (`Axes`, *optional*): Where to draw.
        title (`str`, *optional*): Title; the correlation stands in the corner.
        unit (`str`, *optional*, defaults to `"change of the objective"`): What both measure.

    Returns:
        `Axes`

    Raises:
        ValueError: If shapes differ, there are fewer than 3 points or values are not finite.
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
    How much of what is sought is found when rows are inspected in the order of a score, and what chance would find.

    Args:
        fractions (`np.ndarray`): Fractions of the rows inspected, `(num_points,)`, in [0, 1].
        found_by_method (`Mapping[str, np.ndarray]`): Method to the fraction found, `(num_points,)`, in [0, 1].
        ax (`Axes`, *optional*): Where to draw.
        title (`str`, *optional*): Title.
        what (`str`, *optional*, defaults to `"mislabelled rows"`): What is sought.

    Returns:
        `Axes`

    Raises:
        ValueError: If there is no method, lengths differ or values are not finite.
    """
    fractions = finite(fractions, "fractions", num_dimensions=1)
    if not found_by_method:
        raise ValueError("`found_by_method` is empty. Pass at least one curve.")
    ax = ax or new_axes(6.0, 4.0)
    for number, (method, found) in enumerate(found_by_method.items()):
        found = finite(found, f"found_by_method['{method}']", num_dimensions=1)
        if len(found) != len(fractions):
            raise ValueError(f"'{method}' has {len(found)} points for {len(fractions)} fractions. Pass one for each.")
        style = ("-", "--", "-.", ":")[number % 4]
        ax.plot(
            100 * fractions, 100 * found, style, color=LINES[number % len(LINES)], linewidth=2, label=one_line(method)
        )
    reach = 100 * float(fractions.max())
    ax.plot(
        [0, reach], [0, reach], color=NEUTRAL, linewidth=0.9, linestyle=(0, (1, 3)), label="random order, expected"
    )
    ax.set_xlabel("rows inspected (%)")
    ax.set_ylabel(f"{one_line(what)} found (%)")
    ax.set_ylim(0, 103)
    ax.set_xlim(0, reach or 1)
    ax.grid(color=GRID)
    ax.set_axisbelow(True)
    ax.legend(frameon=False, fontsize=9)
    return titled(bare(ax, keep=("bottom", "left")), title)
