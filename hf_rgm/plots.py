"""
All plots. Every function draws on the `ax` it is given, or on a new figure that pyplot does not know, and returns the
axes: `ax.figure` shows it in a notebook, `ax.figure.savefig(path)` writes it.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from scipy.cluster.hierarchy import leaves_list, linkage

from hf_rgm.agreement.correlations import linear_datamodeling_score
from hf_rgm.agreement.fidelity_figures import NOT_CALIBRATED
from hf_rgm.clusters.grouping import as_numpy
from hf_rgm.files.reading import printable

# Blue for what helps, vermilion for what harms: safe for the colour-blind.
HELPS = "#0072B2"
HARMS = "#D55E00"
NEUTRAL = "#5B6470"
GRID = "#DDE1E6"
# Those of Okabe and Ito that are dark enough for lines on white.
LINES = (HELPS, HARMS, "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
SIGNED = LinearSegmentedColormap.from_list("signed", [HARMS, "#F3B48A", "#FFFFFF", "#8FC1E3", HELPS])
SCORE_LABEL = "score (positive: presence raises the objective)\nblue helps, orange harms; "
OUTLYING = 3.0  # times the median query's largest score: beyond this, colours are the same


def plot_heatmap(
    scores: np.ndarray,
    query_names: Sequence[Any],
    cluster_names: Sequence[str],
    *,
    ax: Axes | None = None,
    title: str | None = None,
    max_queries: int = 40,
    max_clusters: int = 50,
    maximize: bool = True,
    sizes: str = NOT_CALIBRATED,
) -> Axes:
    """
    The attribution matrix `(num_queries, num_clusters)` as colours: blue helps, whether more is better or not.

    Hierarchical clustering puts similar queries and clusters beside each other. Of more than `max_queries` or
    `max_clusters`, those with the largest scores are shown.
    """
    scores = _finite(scores, "scores")
    strength = -np.abs(scores)
    queries = np.sort(np.argsort(strength.mean(axis=1), kind="stable")[:max_queries])
    clusters = np.sort(np.argsort(strength.mean(axis=0), kind="stable")[:max_clusters])
    shown = scores[np.ix_(queries, clusters)]
    by_query, by_cluster = _similarity_order(shown), _similarity_order(shown.T)
    queries, clusters, shown = queries[by_query], clusters[by_cluster], shown[np.ix_(by_query, by_cluster)]
    if ax is None:
        ax = _new_axes(3.5 + 0.2 * len(clusters), max(3.6, 2.4 + 0.2 * len(queries)))
    by_size = np.abs(shown)
    largest, typical = float(by_size.max()), float(np.quantile(by_size.max(axis=1), 0.5, method="lower"))
    limit = float(np.quantile(by_size, 0.99)) if shown.size >= 200 else largest
    limit = min(limit, OUTLYING * typical) or largest or 1.0
    _colour_matrix(
        ax,
        shown,
        [query_names[q] for q in queries],
        [cluster_names[k] for k in clusters],
        label=SCORE_LABEL.replace(" (", "\n(") + sizes,
        extend="both" if largest > limit else "neither",
        cmap=SIGNED if maximize else SIGNED.reversed(),
        vmin=-limit,
        vmax=limit,
    )
    ax.set_xlabel(_count("clusters", len(clusters), len(cluster_names), "scores"))
    ax.set_ylabel(_count("queries", len(queries), len(query_names), "scores"))
    return _titled(ax, title)


def plot_bars(
    names: Sequence[Any],
    scores: np.ndarray,
    *,
    k: int = 8,
    ax: Axes | None = None,
    title: str | None = None,
    maximize: bool = True,
    sizes: str = NOT_CALIBRATED,
) -> Axes:
    """The `k` highest and `k` lowest scores, `(len(names),)`, as bars: blue helps, whether more is better or not."""
    if k < 1:
        raise ValueError(f"`k` must be at least 1, got {k}. It is the number of bars at each end.")
    scores = _finite(scores, "scores")
    order = np.argsort(-scores, kind="stable")
    left_out = max(0, len(order) - 2 * k)
    # `None` is the line that counts what is left out between both ends.
    lines = [*order[:k], None, *order[-k:]] if left_out else list(order)
    if ax is None:
        ax = _new_axes(7.0, 1.1 + 0.27 * len(lines))
    for line, index in enumerate(lines):
        if index is None:
            ax.text(0, line, f"  {left_out} more", va="center", ha="left", fontsize=8, color=NEUTRAL, style="italic")
            continue
        value = float(scores[index])
        color = HELPS if (value >= 0) == maximize else HARMS
        side, shift = ("left", 3) if value >= 0 else ("right", -3)
        ax.barh(line, value, height=0.72, color=color, zorder=2)
        text, place = f"{value:+.3g}".replace("-", "−"), {"xytext": (shift, 0), "textcoords": "offset points"}
        ax.annotate(text, (value, line), va="center", ha=side, fontsize=8, color=NEUTRAL, **place)
    ax.set_yticks(range(len(lines)), ["" if i is None else _one_line(names[i], 44) for i in lines], fontsize=9)
    ax.set_ylim(len(lines) - 0.4, -0.6)
    lowest, highest = min(0.0, float(scores.min())), max(0.0, float(scores.max()))
    room = 0.13 * ((highest - lowest) or 1.0)  # for the numbers at the ends
    ax.set_xlim(lowest - room * (lowest < 0), highest + room * (highest > 0 or lowest == 0))
    ax.axvline(0, color=NEUTRAL, linewidth=0.8, zorder=3)
    ax.set_xlabel(SCORE_LABEL + sizes, fontsize=9)
    ax.grid(axis="x", color=GRID, zorder=0)
    ax.tick_params(axis="y", length=0)
    return _titled(_bare(ax, keep=("bottom",)), title)


def plot_synset_gallery(
    images: Any, titles: Sequence[Any], *, columns: int = 10, ax: Axes | None = None, title: str | None = None
) -> Axes:
    """
    Pictures in a grid, each stretched to its own range of brightness.

    `images` is `(num_images, 1 or 3, height, width)` or `(num_images, height, width)`, with one title each.
    """
    pictures = _pictures(images)
    columns = min(columns, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    height = pictures.shape[1] / pictures.shape[2]
    # In widths of a picture, with a line of text above each.
    across, down = 1.12, height + 0.24
    if ax is None:
        ax = _new_axes(max(3.0, 1.1 * across * columns + 0.1), 1.1 * down * rows + (0.4 if title else 0.1))
    for number, (picture, name) in enumerate(zip(pictures, titles, strict=True)):
        x, y = (number % columns) * across, (number // columns) * down
        # The y axis points down: the upper edge is the smaller number.
        ax.imshow(picture, extent=(x, x + 1, y + height, y), cmap="gray", interpolation="nearest")
        ax.text(x + 0.5, y - 0.03, _one_line(name, 17), ha="center", va="bottom", fontsize=7)
    ax.set_xlim(-0.06, columns * across - 0.06)
    ax.set_ylim((rows - 1) * down + height + 0.04, -0.2)
    ax.set_aspect("equal")
    ax.set_axis_off()
    return _titled(ax, title)


def _similarity_order(rows: np.ndarray) -> np.ndarray:
    if len(rows) < 3:
        return np.arange(len(rows))
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    directions = rows / np.where(lengths > 0, lengths, 1.0)
    return leaves_list(linkage(directions, method="average", optimal_ordering=True))


def _pictures(images: Any) -> np.ndarray:
    array = _finite(images, "images")
    if array.ndim == 4 and array.shape[1] in (1, 3):
        array = array[:, 0] if array.shape[1] == 1 else array.transpose(0, 2, 3, 1)
    elif array.ndim != 3:
        raise ValueError(
            f"`images` must have shape (num_images, 1 or 3, height, width) or (num_images, height, width), got "
            f"{array.shape}."
        )
    axes = tuple(range(1, array.ndim))
    lowest = array.min(axis=axes, keepdims=True)
    reach = array.max(axis=axes, keepdims=True) - lowest
    return (array - lowest) / np.where(reach > 0, reach, 1.0)


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
    errors = _finite(residuals, "residuals")
    order = np.argsort(-errors.mean(axis=0), kind="stable")[:max_clusters]
    if ax is None:
        ax = _new_axes(4.2 + 0.2 * len(order), 2.4 + 0.24 * len(states))
    label, names = "relative squared error\n(0: gradients are equal)", [cluster_names[k] for k in order]
    _colour_matrix(ax, errors[:, order], states, names, label=label, extend="neither", cmap="Blues", vmin=0)
    ax.set_xlabel(_count("clusters", len(order), len(cluster_names), "errors"))
    return _titled(ax, title)


def plot_predicted_against_actual(
    predicted: np.ndarray, actual: np.ndarray, *, ax: Axes | None = None, title: str | None = None
) -> Axes:
    """Predicted changes against those of retraining, both `(num_queries, num_subsets)`, with their LDS."""
    x, y = _finite(actual, "actual"), _finite(predicted, "predicted")
    agreement = (
        f"rank correlation {linear_datamodeling_score(y, x)}\nmean over {len(x)} queries, {x.shape[1]} points each"
    )
    x, y = x.ravel(), y.ravel()
    ax = ax or _new_axes(4.8, 4.6)
    lowest, highest = min(x.min(), y.min()), max(x.max(), y.max())
    margin = 0.06 * (highest - lowest) or 1.0
    limits = (float(lowest - margin), float(highest + margin))
    ax.axhline(0, color=GRID, zorder=0)
    ax.axvline(0, color=GRID, zorder=0)
    ax.plot(limits, limits, color=NEUTRAL, linewidth=0.9, linestyle="--", zorder=1, label="equal")
    ax.scatter(x, y, s=float(np.clip(4000 / len(x), 6, 30)), color=HELPS, alpha=0.65, linewidths=0, zorder=2)
    ax.set_xlim(limits)
    ax.set_ylim(limits)
    ax.set_aspect("equal")
    ax.set_xlabel("actual change of the objective (retrained)")
    ax.set_ylabel("predicted change of the objective")
    behind = {"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 2.0}
    ax.text(0.03, 0.97, agreement, transform=ax.transAxes, va="top", fontsize=9, bbox=behind)
    ax.legend(loc="lower right", frameon=False, fontsize=8)
    return _titled(_bare(ax, keep=("bottom", "left")), title)


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
    fractions = _finite(fractions, "fractions")
    ax = ax or _new_axes(6.0, 4.0)
    for number, (method, found) in enumerate(found_by_method.items()):
        found = _finite(found, f"found_by_method['{method}']")
        style, color = ("-", "--", "-.", ":")[number % 4], LINES[number % len(LINES)]
        ax.plot(100 * fractions, 100 * found, style, color=color, linewidth=2, label=_one_line(method))
    reach, dotted = 100 * float(fractions.max()), (0, (1, 3))
    ax.plot([0, reach], [0, reach], color=NEUTRAL, linewidth=0.9, linestyle=dotted, label="random order, expected")
    ax.set_xlabel("rows inspected (%)")
    ax.set_ylabel(f"{_one_line(what)} found (%)")
    ax.set_ylim(0, 103)
    ax.set_xlim(0, reach or 1)
    ax.grid(color=GRID)
    ax.set_axisbelow(True)
    ax.legend(frameon=False, fontsize=9)
    return _titled(_bare(ax, keep=("bottom", "left")), title)


def _new_axes(width: float, height: float) -> Axes:
    """Axes on a new figure of this size in inches, at most 16 each way."""
    return Figure(figsize=(min(width, 16), min(height, 16)), dpi=120, layout="constrained").add_subplot()


def _titled(ax: Axes, title: str | None) -> Axes:
    """The axes with a title wrapped to the width of the figure."""
    if title:
        # A title wider than the figure would leave no room for the axes.
        width = max(24, int(7 * ax.figure.bbox.width / ax.figure.dpi))
        ax.set_title("\n".join(textwrap.wrap(_one_line(title, 90), width)), fontsize=11, loc="left")
    return ax


def _bare(ax: Axes, keep: tuple[str, ...]) -> Axes:
    """The axes with only some sides of their frame."""
    for side, spine in ax.spines.items():
        spine.set_visible(side in keep)
        spine.set_color(NEUTRAL)
    return ax


def _colour_matrix(
    ax: Axes, values: np.ndarray, lines: Iterable[Any], columns: Iterable[Any], *, label: str, extend: str, **how: Any
) -> Axes:
    """The axes with a matrix as colours, names at both sides and a colour bar."""
    image = ax.imshow(values, aspect="auto", interpolation="nearest", **how)
    ax.set_xticks(range(values.shape[1]), [_one_line(name, 28) for name in columns], rotation=90, fontsize=8)
    ax.set_yticks(range(values.shape[0]), [_one_line(name, 28) for name in lines], fontsize=8)
    ax.tick_params(length=0)
    bar = ax.figure.colorbar(image, ax=ax, extend=extend, shrink=0.9, pad=0.02)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    return _bare(ax, keep=())


def _one_line(value: Any, length: int = 60) -> str:
    """One short line without control characters or formulas for matplotlib."""
    text = printable(" ".join(str(value).split()))
    text = text if len(text) <= length else f"{text[: length - 1]}…"
    return text.replace("$", r"\$")


def _count(what: str, shown: int, total: int, measure: str) -> str:
    """Axis label that says how many of the total are shown."""
    return what if shown == total else f"{what} (the {shown} of {total} with the largest {measure})"


def _finite(values: Any, name: str) -> np.ndarray:
    """Values as a finite float64 array with at least one element."""
    array = as_numpy(values).astype(np.float64)
    if array.size == 0:
        raise ValueError(f"`{name}` has no values, but shape {array.shape}.")
    if bad := int((~np.isfinite(array)).sum()):
        raise ValueError(f"`{name}` has {bad} NaN or infinite values of {array.size}. Find out why before plotting.")
    return array
