"""
Draws the README's picture from what `hf-rgm demo` left.

    hf-rgm demo && python docs/picture.py hf-rgm-demo
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from datasets import load_from_disk

from hf_rgm import AttributionResult
from hf_rgm.demo import CULPRIT

SHOWN = 5


def draw(demo: Path, target: Path) -> None:
    """The test digit that the culprit harms most, and the vendors and training rows that helped and harmed it."""
    result = AttributionResult.from_pretrained(demo / "attributions")
    queries, rows = (load_from_disk(demo / name) for name in ("queries", "rows"))
    query = result.query_ids[int(np.argmin(result.scores[:, result.cluster_names.index(CULPRIT)]))]
    position = result.query_index(query)
    figure = plt.figure(figsize=(10.5, 3.2), layout="constrained")
    left, middle, right = figure.subfigures(1, 3, width_ratios=(1.1, 2.7, 2.4))
    picture(left.subplots(), queries[position]["pixel_values"])
    label, margin = int(queries[position]["labels"]), result.objective_values[position]
    left.suptitle(f"a {label} that the model\ngets wrong\n(log-odds {margin:+.1f})", fontsize=10)
    bars = result.plot("bars", query=query, k=4, ax=middle.subplots(), title="vendors of training digits")
    low, high = bars.get_xlim()
    bars.set_xlim(low - 0.25 * (high - low), high)
    grid = right.subplots(2, SHOWN)
    right.suptitle("single training digits, and the labels they were given", fontsize=10)
    for axes, largest, words in zip(grid, (True, False), ("helped", "harmed"), strict=True):
        shown = result.top(SHOWN, query, rows=True, largest=largest)["row"]
        axes[0].set_ylabel(words, fontsize=10)
        for ax, row in zip(axes, shown, strict=True):
            picture(ax, rows[int(row)]["pixel_values"])
            ax.set_title(f"{int(rows[int(row)]['labels'])}", fontsize=10)
    figure.savefig(target, dpi=110)


def picture(ax, pixels) -> None:
    """A digit without axes."""
    ax.imshow(np.asarray(pixels)[0], cmap="gray_r")
    ax.set(xticks=[], yticks=[])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path)
    parser.add_argument("--target", type=Path, default=Path(__file__).with_name("demo.png"))
    arguments = parser.parse_args()
    draw(arguments.demo, arguments.target)
