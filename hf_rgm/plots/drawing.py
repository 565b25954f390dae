"""Colours, axes and words that all plots share."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from hf_rgm.clusters.grouping import as_numpy
from hf_rgm.files.reading import printable

# Blue for positive scores (presence raises the objective), vermilion for negative ones: safe for the colour-blind.
POSITIVE = "#0072B2"
NEGATIVE = "#D55E00"
NEUTRAL = "#5B6470"
GRID = "#DDE1E6"
# Those of Okabe and Ito that are dark enough for lines on white.
LINES = (POSITIVE, NEGATIVE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
SIGNED = LinearSegmentedColormap.from_list("signed", [NEGATIVE, "#F3B48A", "#FFFFFF", "#8FC1E3", POSITIVE])
SCORE_LABEL = "score (positive: presence raises the objective)"


def new_axes(width: float, height: float) -> Axes:
    """Axes on a new figure of this size in inches, at most 16 each way."""
    return Figure(figsize=(min(width, 16), min(height, 16)), dpi=120, layout="constrained").add_subplot()


def titled(ax: Axes, title: str | None) -> Axes:
    """The axes with a title wrapped to the width of the figure."""
    if title:
        # A title wider than the figure would leave no room for the axes.
        width = max(24, int(7 * ax.figure.bbox.width / ax.figure.dpi))
        ax.set_title("\n".join(textwrap.wrap(one_line(title, 90), width)), fontsize=11, loc="left")
    return ax


def bare(ax: Axes, keep: tuple[str, ...]) -> Axes:
    """The axes with only some sides of their frame."""
    for side, spine in ax.spines.items():
        spine.set_visible(side in keep)
        spine.set_color(NEUTRAL)
    return ax


def colour_matrix(
    ax: Axes, values: np.ndarray, lines: Iterable[Any], columns: Iterable[Any], *, label: str, extend: str, **how: Any
) -> Axes:
    """The axes with a matrix as colours, names at both sides and a colour bar."""
    image = ax.imshow(values, aspect="auto", interpolation="nearest", **how)
    ax.set_xticks(range(values.shape[1]), [one_line(name, 28) for name in columns], rotation=90, fontsize=8)
    ax.set_yticks(range(values.shape[0]), [one_line(name, 28) for name in lines], fontsize=8)
    ax.tick_params(length=0)
    bar = ax.figure.colorbar(image, ax=ax, extend=extend, shrink=0.9, pad=0.02)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    return bare(ax, keep=())


def one_line(value: Any, length: int = 60) -> str:
    """One short line without control characters or formulas for matplotlib."""
    text = printable(" ".join(str(value).split()))
    text = text if len(text) <= length else f"{text[: length - 1]}…"
    return text.replace("$", r"\$")


def count(what: str, shown: int, total: int, measure: str) -> str:
    """What is shown, and of how many if not all."""
    return what if shown == total else f"{what} (the {shown} of {total} with the largest {measure})"


def finite(values: Any, name: str, num_dimensions: int | None = None) -> np.ndarray:
    """Values as a finite float64 array with at least one element."""
    array = as_numpy(values).astype(np.float64)
    if array.size == 0 or (num_dimensions is not None and array.ndim != num_dimensions):
        raise ValueError(
            f"`{name}` must have values in {num_dimensions or 'some'} dimensions, got shape {array.shape}."
        )
    if bad := int((~np.isfinite(array)).sum()):
        raise ValueError(f"`{name}` has {bad} NaN or infinite values of {array.size}. Find out why before plotting.")
    return array
