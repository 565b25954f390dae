"""Power laws fitted to the growth of costs, as a table and as plots on logarithmic axes."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.formats import markdown, ratio, signless, size
from hf_rgm.plots import GRID, LINES, NEUTRAL

COUNTS = {"rows": "training rows", "clusters": "clusters", "parameters": "parameters", "processes": "processes"}
TRAINING = {"training_seconds": "one training"}
TIMES = {
    "recording_seconds": "recording",
    "distilling_seconds": "distilling",
    "online_seconds": "scoring the queries",
}
"""Relative to one training."""
BYTES = {
    "kept_bytes": "kept: the synset",
    "training_peak_bytes": "peak memory, training",
    "distilling_peak_bytes": "peak memory, distilling",
    "online_peak_bytes": "peak memory, scoring",
}
STYLES = {
    "recording_seconds": (LINES[0], "o"),
    "kept_bytes": (LINES[0], "o"),
    "distilling_seconds": (LINES[1], "s"),
    "distilling_peak_bytes": (LINES[1], "s"),
    "online_seconds": (LINES[2], "D"),
    "online_peak_bytes": (LINES[2], "D"),
    "training_peak_bytes": (NEUTRAL, "^"),
}
LETTERS_A_COLUMN = 48
LEGEND_ROOM = 40  # the upper limit is raised by this factor
TITLE = "Costs of hf_rgm beside one training of {num_steps} steps, {num_queries} queries"


@dataclass(frozen=True)
class PowerLaw:
    """
    `y = factor * x ** exponent`.

    Args:
        exponent, factor (`float`): By least squares of the logarithms.
        last_exponent (`float`): Between the two largest x alone: where constants count least.
    """

    exponent: float
    factor: float
    last_exponent: float


def power_law(x: Sequence[float], y: Sequence[float]) -> PowerLaw:
    """
    Fits a power law.

    Raises:
        ValueError: If there are fewer than two points, or values that are not positive.
    """
    if len(x) < 2 or min(*x, *y) <= 0:
        raise ValueError(
            f"A power law needs at least two points with positive values, got {list(zip(x, y, strict=False))}."
        )
    log_x, log_y = np.log(np.asarray(x, dtype=float)), np.log(np.asarray(y, dtype=float))
    exponent, constant = np.polyfit(log_x, log_y, 1)
    before, last = np.argsort(log_x)[-2:]
    slope = (log_y[last] - log_y[before]) / (log_x[last] - log_x[before])
    return PowerLaw(float(exponent), float(np.exp(constant)), float(slope))


def series(report: dict[str, Any], axis: str, cost: str) -> tuple[list[float], list[float]]:
    """
    What grows and what it costs, at the points of an axis that are measured, the smallest first.

    Times are relative to one training at the same point.
    """
    found = [report["methods"][name] for name in report["axes"][axis] if name in report["methods"]]
    unit = "training_seconds" if cost in TIMES else None
    points = sorted(
        (entry[f"num_{axis}"], entry["costs"][cost] / (entry["costs"][unit] if unit else 1)) for entry in found
    )
    return [x for x, _ in points], [y for _, y in points]


def measured_axes(report: dict[str, Any]) -> list[str]:
    """Axes with at least two points."""
    return [axis for axis in report["axes"] if len(series(report, axis, "training_seconds")[0]) > 1]


def growth_table(report: dict[str, Any]) -> str:
    """Costs at both ends of each axis, and the exponents of their growth."""
    rows = []
    for axis in measured_axes(report):
        for cost, label in (TRAINING | TIMES | BYTES).items():
            x, y = series(report, axis, cost)
            law = power_law(x, y)
            show = size if cost in BYTES else ratio if cost in TIMES else "{:.1f} s".format
            what = f"{x[0]:,} to {x[-1]:,} {COUNTS[axis]}"
            rows.append([what, label, show(y[0]), show(y[-1]), signless(law.exponent), signless(law.last_exponent)])
    titles = ["what grows", "cost", "smallest", "largest", "exponent", "exponent, last two points"]
    return markdown(titles, rows)


def draw(report: dict[str, Any], path: Path) -> None:
    """Draws times above and bytes below, one column for each axis with at least two points."""
    axes = measured_axes(report)
    if not axes:
        return
    figure = Figure(figsize=(4.6 * len(axes), 8.4), layout="constrained")
    panels = figure.subplots(2, len(axes), squeeze=False, sharey="row", sharex="col")
    for row, costs, label in zip(panels, (TIMES, BYTES), ("CPU time / one training", "bytes"), strict=True):
        for panel, axis in zip(row, axes, strict=True):
            _draw_panel(panel, report, axis, costs)
        row[0].set_ylabel(label)
        low, high = row[0].get_ylim()
        row[0].set_ylim(low, high * LEGEND_ROOM)
    for panel, axis in zip(panels[1], axes, strict=True):
        panel.set_xlabel(COUNTS[axis])
    figure.suptitle(textwrap.fill(TITLE.format(**report["identity"]), width=LETTERS_A_COLUMN * len(axes)))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _draw_panel(panel: Axes, report: dict[str, Any], axis: str, costs: dict[str, str]) -> None:
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.grid(color=GRID)
    for cost, label in costs.items():
        x, y = series(report, axis, cost)
        law = power_law(x, y)
        color, marker = STYLES[cost]
        panel.plot(x, y, marker, color=color, label=f"{label}: exponent {signless(law.exponent)}")
        panel.plot(x, law.factor * np.asarray(x, dtype=float) ** law.exponent, color=color, linewidth=1)
        panel.set_xticks(x, labels=[f"{count:,}" for count in x], fontsize="small")
    panel.minorticks_off()
    panel.legend(fontsize="small", loc="upper left", framealpha=0.85)
