"""Pictures of scores and of synthetic samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from scipy.cluster.hierarchy import leaves_list, linkage

from hf_rgm.plots.drawing import (
    GRID,
    NEGATIVE,
    NEUTRAL,
    POSITIVE,
    SCORE_LABEL,
    SIGNED,
    bare,
    colour_matrix,
    count,
    finite,
    new_axes,
    one_line,
    titled,
)


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
    The attribution matrix `(num_queries, num_clusters)` as colours.

    Hierarchical clustering puts similar queries and clusters beside each other, unless `ordered` is false. Of more
    than `max_queries` or `max_clusters`, those with the largest scores are shown.
    """
    scores = finite(scores, "scores", num_dimensions=2)
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
        ax = new_axes(3.5 + 0.2 * len(clusters), max(3.6, 2.4 + 0.2 * len(queries)))
    largest = float(np.abs(shown).max())
    limit = (float(np.quantile(np.abs(shown), 0.99)) if shown.size >= 200 else largest) or largest or 1.0
    colour_matrix(
        ax,
        shown,
        [query_names[q] for q in queries],
        [cluster_names[k] for k in clusters],
        label=SCORE_LABEL.replace(" (", "\n("),
        extend="both" if largest > limit else "neither",
        cmap=SIGNED,
        vmin=-limit,
        vmax=limit,
    )
    ax.set_xlabel(count("clusters", len(clusters), len(cluster_names), "scores"))
    ax.set_ylabel(count("queries", len(queries), len(query_names), "scores"))
    return titled(ax, title)


def plot_bars(
    names: Sequence[Any], scores: np.ndarray, *, k: int = 8, ax: Axes | None = None, title: str | None = None
) -> Axes:
    """The `k` highest and `k` lowest scores, `(len(names),)`, as bars coloured by sign."""
    scores = finite(scores, "scores", num_dimensions=1)
    if len(scores) != len(names) or k < 1:
        raise ValueError(
            f"Cannot show {k} bars of {len(scores)} scores and {len(names)} names. Pass one name for each score and "
            "`k` of at least 1."
        )
    order = np.argsort(-scores, kind="stable")
    left_out = max(0, len(order) - 2 * k)
    # `None` is the line that counts what is left out between both ends.
    lines = [*order[:k], None, *order[-k:]] if left_out else list(order)
    if ax is None:
        ax = new_axes(7.0, 1.1 + 0.27 * len(lines))
    for line, index in enumerate(lines):
        if index is None:
            ax.text(0, line, f"  {left_out} more", va="center", ha="left", fontsize=8, color=NEUTRAL, style="italic")
            continue
        value = float(scores[index])
        color, side, shift = (POSITIVE, "left", 3) if value >= 0 else (NEGATIVE, "right", -3)
        ax.barh(line, value, height=0.72, color=color, zorder=2)
        text, place = f"{value:+.3g}".replace("-", "−"), {"xytext": (shift, 0), "textcoords": "offset points"}
        ax.annotate(text, (value, line), va="center", ha=side, fontsize=8, color=NEUTRAL, **place)
    ax.set_yticks(range(len(lines)), ["" if i is None else one_line(names[i], 44) for i in lines], fontsize=9)
    ax.set_ylim(len(lines) - 0.4, -0.6)
    lowest, highest = min(0.0, float(scores.min())), max(0.0, float(scores.max()))
    room = 0.13 * ((highest - lowest) or 1.0)  # for the numbers at the ends
    ax.set_xlim(lowest - room * (lowest < 0), highest + room * (highest > 0 or lowest == 0))
    ax.axvline(0, color=NEUTRAL, linewidth=0.8, zorder=3)
    ax.set_xlabel(SCORE_LABEL, fontsize=9)
    ax.grid(axis="x", color=GRID, zorder=0)
    ax.tick_params(axis="y", length=0)
    return titled(bare(ax, keep=("bottom",)), title)


def plot_synset_gallery(
    images: Any, titles: Sequence[Any], *, columns: int = 10, ax: Axes | None = None, title: str | None = None
) -> Axes:
    """
    Pictures in a grid, each stretched to its own range of brightness.

    `images` is `(num_images, 1 or 3, height, width)` or `(num_images, height, width)`, with one title each.
    """
    pictures = _pictures(images)
    if len(titles) != len(pictures) or columns < 1:
        raise ValueError(
            f"Cannot show {len(pictures)} images with {len(titles)} titles in {columns} columns. Pass one title for "
            "each image and at least 1 column."
        )
    columns = min(columns, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    height = pictures.shape[1] / pictures.shape[2]
    # In widths of a picture, with a line of text above each.
    across, down = 1.12, height + 0.24
    if ax is None:
        ax = new_axes(max(3.0, 1.1 * across * columns + 0.1), 1.1 * down * rows + (0.4 if title else 0.1))
    for number, (picture, name) in enumerate(zip(pictures, titles, strict=True)):
        x, y = (number % columns) * across, (number // columns) * down
        # The y axis points down: the upper edge is the smaller number.
        ax.imshow(picture, extent=(x, x + 1, y + height, y), cmap="gray", interpolation="nearest")
        ax.text(x + 0.5, y - 0.03, one_line(name, 17), ha="center", va="bottom", fontsize=7)
    ax.set_xlim(-0.06, columns * across - 0.06)
    ax.set_ylim((rows - 1) * down + height + 0.04, -0.2)
    ax.set_aspect("equal")
    ax.set_axis_off()
    return titled(ax, title)


def _strongest(strength: np.ndarray, count: int) -> np.ndarray:
    return np.sort(np.argsort(-strength, kind="stable")[:count])


def _similarity_order(rows: np.ndarray) -> np.ndarray:
    if len(rows) < 3:
        return np.arange(len(rows))
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    directions = rows / np.where(lengths > 0, lengths, 1.0)
    return leaves_list(linkage(directions, method="average", optimal_ordering=True))


def _pictures(images: Any) -> np.ndarray:
    array = finite(images, "images")
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
