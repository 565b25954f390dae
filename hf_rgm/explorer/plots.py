"""
Pictures of attributions and synsets.

Every function draws on the `ax` it is given, or on a figure of its own that is not registered with pyplot, and returns
the axes: `ax.figure` shows it in a notebook, `ax.figure.savefig(path)` writes it. Blue stands for positive scores
(presence raises the objective) and vermilion for negative ones; the pair is safe for the colour-blind.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.stats import spearmanr

from hf_rgm.artefacts import printable
from hf_rgm.grouping import as_numpy

POSITIVE = "#0072B2"
NEGATIVE = "#D55E00"
NEUTRAL = "#5B6470"
GRID = "#DDE1E6"
# Okabe and Ito's colours that are dark enough for lines on white.
LINES = (POSITIVE, NEGATIVE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
SIGNED = LinearSegmentedColormap.from_list("signed", [NEGATIVE, "#F3B48A", "#FFFFFF", "#8FC1E3", POSITIVE])
SCORE_LABEL = "score (positive: presence raises the objective)"


def plot_heatmap(
    scores: np.ndarray,
    query_names: Sequence[Any],
    cluster_names: Sequence[str],
    *,
    ax: Axes | None = None,
    title: str | None = None,
    max_queries: int = 40,
    max_clusters: int = 50,
    ordered: bool = True,
) -> Axes:
    """
    The attribution matrix as colours, with queries and clusters that behave alike beside each other.

    Args:
        scores (`np.ndarray`): `(num_queries, num_clusters)`, in units of the objective.
        query_names (`Sequence`): One for each query.
        cluster_names (`Sequence[str]`): One for each cluster.
        ax (`Axes`, *optional*): Where to draw.
        title (`str`, *optional*): Title.
        max_queries (`int`, *optional*, defaults to `40`): If there are more, those with the largest scores are shown,
            and the label says so.
        max_clusters (`int`, *optional*, defaults to `50`): The same for clusters.
        ordered (`bool`, *optional*, defaults to `True`): Order both sides by hierarchical clustering. Otherwise as
            given.

    Returns:
        `Axes`

    Raises:
        ValueError: If shapes do not fit or scores are not finite.
    """
    scores = _finite(scores, "scores", num_dimensions=2)
    if scores.shape != (len(query_names), len(cluster_names)):
        raise ValueError(
            f"`scores` have shape {scores.shape} for {len(query_names)} queries and {len(cluster_names)} clusters. "
            "Pass one name for each."
        )
    strength = np.abs(scores)
    queries = _strongest(strength.mean(axis=1), max_queries)
    clusters = _strongest(strength.mean(axis=0), max_clusters)
    shown = scores[np.ix_(queries, clusters)]
    if ordered:
        by_query, by_cluster = _similarity_order(shown), _similarity_order(shown.T)
        queries, clusters, shown = queries[by_query], clusters[by_cluster], shown[np.ix_(by_query, by_cluster)]
    if ax is None:
        ax = _new_axes(3.5 + 0.2 * len(clusters), max(3.6, 2.4 + 0.2 * len(queries)))
    largest = float(np.abs(shown).max())
    limit = (float(np.quantile(np.abs(shown), 0.99)) if shown.size >= 200 else largest) or largest or 1.0
    image = ax.imshow(shown, cmap=SIGNED, vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    ax.set_xticks(range(len(clusters)), [_text(cluster_names[k], 28) for k in clusters], rotation=90, fontsize=8)
    ax.set_yticks(range(len(queries)), [_text(query_names[q], 28) for q in queries], fontsize=8)
    ax.set_xlabel(_count("clusters", len(clusters), len(cluster_names)))
    ax.set_ylabel(_count("queries", len(queries), len(query_names)))
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    bar = ax.figure.colorbar(image, ax=ax, extend="both" if largest > limit else "neither", shrink=0.9, pad=0.02)
    bar.set_label(SCORE_LABEL.replace(" (", "\n("), fontsize=8)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    return _titled(ax, title)


def plot_bars(
    names: Sequence[Any],
    scores: np.ndarray,
    *,
    k: int = 8,
    ax: Axes | None = None,
    title: str | None = None,
) -> Axes:
    """
    The highest and the lowest scores as bars, coloured by sign.

    Args:
        names (`Sequence`): What the scores belong to.
        scores (`np.ndarray`): `(len(names),)`, in units of the objective.
        k (`int`, *optional*, defaults to `8`): Show this many of each end; all if there are no more than `2 * k`.
        ax (`Axes`, *optional*): Where to draw.
        title (`str`, *optional*): Title.

    Returns:
        `Axes`

    Raises:
        ValueError: If lengths differ, scores are not finite or `k` is smaller than 1.
    """
    scores = _finite(scores, "scores", num_dimensions=1)
    if len(scores) != len(names) or k < 1:
        raise ValueError(
            f"Cannot show {k} bars of {len(scores)} scores and {len(names)} names. Pass one name for each score and "
            "`k` of at least 1."
        )
    order = np.argsort(-scores, kind="stable")
    left_out = max(0, len(order) - 2 * k)
    # One empty line stands for what is left out between both ends.
    lines = [*order[:k], None, *order[-k:]] if left_out else list(order)
    if ax is None:
        ax = _new_axes(7.0, 1.1 + 0.27 * len(lines))
    reach = float(np.abs(scores).max()) or 1.0
    for line, index in enumerate(lines):
        if index is None:
            ax.text(0, line, f"  {left_out} more", va="center", ha="left", fontsize=8, color=NEUTRAL, style="italic")
            continue
        value = float(scores[index])
        ax.barh(line, value, height=0.72, color=POSITIVE if value >= 0 else NEGATIVE, zorder=2)
        side = 1 if value >= 0 else -1
        ax.annotate(
            f"{value:+.3g}".replace("-", "−"),
            (value, line),
            xytext=(3 * side, 0),
            textcoords="offset points",
            va="center",
            ha="left" if side > 0 else "right",
            fontsize=8,
            color=NEUTRAL,
        )
    ax.set_yticks(range(len(lines)), ["" if i is None else _text(names[i], 44) for i in lines], fontsize=9)
    ax.set_ylim(len(lines) - 0.4, -0.6)
    lowest, highest = min(0.0, float(scores.min())), max(0.0, float(scores.max()))
    ax.set_xlim(lowest - 0.16 * reach * (lowest < 0), highest + 0.16 * reach * (highest > 0 or lowest == 0))
    ax.axvline(0, color=NEUTRAL, linewidth=0.8, zorder=3)
    ax.set_xlabel(SCORE_LABEL, fontsize=9)
    ax.grid(axis="x", color=GRID, zorder=0)
    ax.tick_params(axis="y", length=0)
    return _titled(_bare(ax, keep=("bottom",)), title)


def plot_synset_gallery(
    images: Any,
    titles: Sequence[Any],
    *,
    columns: int = 10,
    ax: Axes | None = None,
    title: str | None = None,
) -> Axes:
    """
    Pictures in a grid, each stretched to its own range of brightness.

    Args:
        images (`np.ndarray` or `torch.Tensor`): `(num_images, channels, height, width)` with 1 or 3 channels, or
            `(num_images, height, width)`.
        titles (`Sequence`): One for each picture.
        columns (`int`, *optional*, defaults to `10`): Pictures in a line.
        ax (`Axes`, *optional*): Where to draw.
        title (`str`, *optional*): Title.

    Returns:
        `Axes`

    Raises:
        ValueError: If there are no pictures, shapes do not fit or values are not finite.
    """
    pictures = _pictures(images)
    if len(titles) != len(pictures) or columns < 1:
        raise ValueError(
            f"Cannot show {len(pictures)} images with {len(titles)} titles in {columns} columns. Pass one title for "
            "each image and at least 1 column."
        )
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    height = pictures.shape[1] / pictures.shape[2]
    # In units of a picture's width; every picture has a line of text above it.
    across, down = 1.12, height + 0.24
    if ax is None:
        ax = _new_axes(max(3.0, 1.1 * across * columns + 0.1), 1.1 * down * rows + (0.4 if title else 0.1))
    for number, (picture, name) in enumerate(zip(pictures, titles, strict=True)):
        x, y = (number % columns) * across, (number // columns) * down
        # The y axis points down, so the upper edge is the smaller number.
        ax.imshow(picture, extent=(x, x + 1, y + height, y), cmap="gray", interpolation="nearest")
        ax.text(x + 0.5, y - 0.03, _text(name, 17), ha="center", va="bottom", fontsize=7)
    ax.set_xlim(-0.06, columns * across - 0.06)
    ax.set_ylim((rows - 1) * down + height + 0.04, -0.2)
    ax.set_aspect("equal")
    ax.set_axis_off()
    return _titled(ax, title)


def plot_predicted_against_actual(
    predicted: np.ndarray,
    actual: np.ndarray,
    *,
    ax: Axes | None = None,
    title: str | None = None,
    unit: str = "change of the objective",
) -> Axes:
    """
    Predicted changes against those found by retraining, with their rank correlation and the number of points.

    Args:
        predicted (`np.ndarray`): Any shape.
        actual (`np.ndarray`): The same shape and unit.
        ax (`Axes`, *optional*): Where to draw.
        title (`str`, *optional*): Title; the correlation stands in the corner.
        unit (`str`, *optional*, defaults to `"change of the objective"`): What both measure.

    Returns:
        `Axes`

    Raises:
        ValueError: If shapes differ, there are fewer than 2 points or values are not finite.
    """
    x, y = _finite(actual, "actual"), _finite(predicted, "predicted")
    if x.shape != y.shape or x.size < 2:
        raise ValueError(
            f"`predicted` {y.shape} and `actual` {x.shape} must have the same shape and at least 2 points."
        )
    x, y = x.ravel(), y.ravel()
    ax = ax or _new_axes(4.8, 4.6)
    varied = np.ptp(x) > 0 and np.ptp(y) > 0
    correlation = f"Spearman {spearmanr(x, y)[0]:.2f}" if varied else "Spearman undefined (constant)"
    lowest, highest = min(x.min(), y.min()), max(x.max(), y.max())
    margin = 0.06 * (highest - lowest) or 1.0
    limits = (float(lowest - margin), float(highest + margin))
    ax.axhline(0, color=GRID, zorder=0)
    ax.axvline(0, color=GRID, zorder=0)
    ax.plot(limits, limits, color=NEUTRAL, linewidth=0.9, linestyle="--", zorder=1, label="equal")
    ax.scatter(x, y, s=float(np.clip(4000 / len(x), 6, 30)), color=POSITIVE, alpha=0.65, linewidths=0, zorder=2)
    ax.set_xlim(limits)
    ax.set_ylim(limits)
    ax.set_aspect("equal")
    ax.set_xlabel(_text(f"actual {unit} (retrained)", 60))
    ax.set_ylabel(_text(f"predicted {unit}", 60))
    ax.text(0.03, 0.97, f"{correlation}\n{len(x)} points", transform=ax.transAxes, va="top", fontsize=9)
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
    How much of what is sought is found when rows are inspected in the order of a score.

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
    fractions = _finite(fractions, "fractions", num_dimensions=1)
    if not found_by_method:
        raise ValueError("`found_by_method` is empty. Pass at least one curve.")
    ax = ax or _new_axes(6.0, 4.0)
    for number, (method, found) in enumerate(found_by_method.items()):
        found = _finite(found, f"found_by_method['{method}']", num_dimensions=1)
        if len(found) != len(fractions):
            raise ValueError(f"'{method}' has {len(found)} points for {len(fractions)} fractions. Pass one for each.")
        style = ("-", "--", "-.", ":")[number % 4]
        ax.plot(
            100 * fractions, 100 * found, style, color=LINES[number % len(LINES)], linewidth=2, label=_text(method)
        )
    ax.set_xlabel("rows inspected (%)")
    ax.set_ylabel(f"{_text(what)} found (%)")
    ax.set_ylim(0, 103)
    ax.set_xlim(0, 100 * float(fractions.max()) or 1)
    ax.grid(color=GRID)
    ax.set_axisbelow(True)
    ax.legend(frameon=False, fontsize=9)
    return _titled(_bare(ax, keep=("bottom", "left")), title)


def _new_axes(width: float, height: float) -> Axes:
    return Figure(figsize=(min(width, 16), min(height, 16)), dpi=120, layout="constrained").add_subplot()


def _titled(ax: Axes, title: str | None) -> Axes:
    if title:
        # A line wider than the figure would leave no room for the axes.
        width = max(24, int(7 * ax.figure.bbox.width / ax.figure.dpi))
        ax.set_title("\n".join(textwrap.wrap(_text(title, 90), width)), fontsize=11, loc="left")
    return ax


def _bare(ax: Axes, keep: tuple[str, ...]) -> Axes:
    for side, spine in ax.spines.items():
        spine.set_visible(side in keep)
        spine.set_color(NEUTRAL)
    return ax


def _text(value: Any, length: int = 60) -> str:
    """One short line without control characters, in which matplotlib sees no formulas."""
    text = printable(" ".join(str(value).split()))
    text = text if len(text) <= length else f"{text[: length - 1]}…"
    return text.replace("$", r"\$")


def _count(what: str, shown: int, total: int) -> str:
    return what if shown == total else f"{what} (the {shown} of {total} with the largest scores)"


def _strongest(strength: np.ndarray, count: int) -> np.ndarray:
    return np.sort(np.argsort(-strength, kind="stable")[:count])


def _similarity_order(rows: np.ndarray) -> np.ndarray:
    if len(rows) < 3:
        return np.arange(len(rows))
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    directions = rows / np.where(lengths > 0, lengths, 1.0)
    return leaves_list(linkage(directions, method="average", optimal_ordering=True))


def _finite(values: Any, name: str, num_dimensions: int | None = None) -> np.ndarray:
    array = as_numpy(values).astype(np.float64)
    if array.size == 0 or (num_dimensions is not None and array.ndim != num_dimensions):
        raise ValueError(
            f"`{name}` must have values in {num_dimensions or 'some'} dimensions, got shape {array.shape}."
        )
    if bad := int((~np.isfinite(array)).sum()):
        raise ValueError(f"`{name}` has {bad} NaN or infinite values of {array.size}. Find out why before plotting.")
    return array


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
