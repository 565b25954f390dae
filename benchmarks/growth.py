"""
How costs grow with rows, clusters and parameters, and shrink with processes, on Fashion-MNIST.

    python -m benchmarks.growth                        # what is missing, then the plots: an hour in all
    python -m benchmarks.growth --axes rows processes  # these axes only

One quantity grows while the others stay at 10,000 rows, 50 clusters and a CNN of 20,490 parameters; those with other
numbers of parameters are CNNs of four convolutions. Each point is written to benchmarks/results/growth.json as soon as
it is there, and all are drawn in docs/growth.png. Run one process at a time.

Everything has the default settings and one thread, and times are CPU seconds: of several processes, those of the one
that takes most, which is what they would take with a core each. Processes distil blocks of 13 clusters. Trainings are
short and take the same steps whatever the number of rows, so the ratios to them are those of a short training. The
iterations of distilling are measured in part and scaled up (its gradients of real rows are computed whole).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from benchmarks.costs import Meter, folder_bytes, seconds_in
from benchmarks.growth_plots import draw
from benchmarks.launched import launched
from benchmarks.recorded import synset_bytes
from benchmarks.report import RESULTS, ROOT, Report, environment, versions
from benchmarks.tasks.fashion import load_images
from benchmarks.tasks.images import build_trainer, image_dataset
from hf_rgm import Attributor, ClusterMap, DistillationConfig, ReverseGradientMatchingDistiller, TrajectoryCallback
from hf_rgm.distillation.learner import BlockLearner
from hf_rgm.trajectory.trajectory import Trajectory

SEED = 0
WARM_UP_STEPS = 2
FIGURE = ROOT / "docs" / "growth.png"
BLOCK_SIZE = 13
"""Clusters in a block where processes share them: four blocks of 50."""


@dataclass(frozen=True)
class Recipe:
    """
    What is the same at every point.

    Args:
        num_steps, batch_size (`int`): Of the training.
        num_queries (`int`): Queries that are attributed.
        num_iterations (`int`): Iterations of distilling that are measured; costs are those of the default number.
        max_memory (`str`): Of distiller and attributor.
    """

    num_steps: int = 100
    batch_size: int = 128
    num_queries: int = 200
    num_iterations: int = 20
    max_memory: str = "4GB"


@dataclass(frozen=True)
class Setup:
    """
    A point.

    Args:
        num_rows, num_clusters (`int`): Training rows, and the random parts of the classes they are split into.
        hidden_sizes (`tuple[int, ...]`): Channels of the CNN's convolutions.
        num_processes (`int`): Processes that are launched to distil and attribute; with 0 this one does it.
    """

    num_rows: int = 10_000
    num_clusters: int = 50
    hidden_sizes: tuple[int, ...] = (16, 32)
    num_processes: int = 0

    @property
    def name(self) -> str:
        """In the results."""
        channels = "-".join(map(str, self.hidden_sizes))
        launched = f", processes {self.num_processes}" if self.num_processes else ""
        return f"{self.num_rows} rows, {self.num_clusters} clusters, channels {channels}{launched}"


AXES: dict[str, list[Setup]] = {
    "rows": [Setup(num_rows=count) for count in (2_500, 5_000, 10_000, 20_000, 40_000)],
    "clusters": [Setup(num_clusters=count) for count in (10, 50, 100, 200, 400)],
    "parameters": [Setup(hidden_sizes=(w, 2 * w, 4 * w, 8 * w)) for w in (5, 9, 16, 29, 52)],
    "processes": [Setup(num_processes=count) for count in (1, 2, 4)],
}


@dataclass(frozen=True)
class Pictures:
    """
    Args:
        images, labels (`np.ndarray`): To train on, `(num_images, side, side)` and `(num_images,)`, in random order.
        query_images, query_labels (`np.ndarray`): To ask about.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    query_images: NDArray[np.uint8]
    query_labels: NDArray[np.uint8]

    def datasets(self, num_rows: int, num_queries: int) -> tuple[Any, Any]:
        """The first rows and the first queries, standardised by the rows."""
        rows, queries = (
            part[:count, None].astype(np.float32)
            for part, count in ((self.images, num_rows), (self.query_images, num_queries))
        )
        mean, deviation = rows.mean(), rows.std()
        return (
            image_dataset((rows - mean) / deviation, self.labels[:num_rows].astype(np.int64)),
            image_dataset((queries - mean) / deviation, self.query_labels[:num_queries].astype(np.int64)),
        )


def parts_of_classes(labels: NDArray[np.integer], num_clusters: int) -> ClusterMap:
    """
    Splits every class into parts of equal size, dealt out in the order of the rows.

    Raises:
        ValueError: If the number of clusters is no multiple of the number of classes.
    """
    num_labels = int(labels.max()) + 1
    if num_clusters % num_labels:
        raise ValueError(f"`num_clusters` must be a multiple of the {num_labels} classes, got {num_clusters}.")
    parts = num_clusters // num_labels
    rank = np.zeros(len(labels), dtype=np.int64)
    for label in range(num_labels):
        rank[labels == label] = np.arange((labels == label).sum())
    return ClusterMap.from_ids(labels.astype(np.int64) * parts + rank % parts)


def measure(setup: Setup, recipe: Recipe, pictures: Pictures) -> dict[str, Any]:
    """
    Trains twice, once recorded, distils and attributes.

    Returns:
        `dict`: what grows (`"num_rows"`, `"num_clusters"`, `"num_parameters"`, `"num_processes"`) and `"costs"`: CPU
        seconds, those that were measured in part scaled up; bytes kept, and the largest resident set beyond what was
        held before, of several processes that of the largest; wall time as it was, not scaled up.
    """
    train, _ = pictures.datasets(setup.num_rows, recipe.num_queries)
    build = partial(
        build_trainer,
        image_size=pictures.images.shape[-1],
        batch_size=recipe.batch_size,
        hidden_sizes=setup.hidden_sizes,
        max_steps=recipe.num_steps,
    )
    build(train, SEED, max_steps=WARM_UP_STEPS).train()
    plain = build(train, SEED)
    with Meter() as training:
        plain.train()
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "trajectory"
        trainer = build(train, SEED, callbacks=[TrajectoryCallback(folder)])
        trainer.train()
        recording = Trajectory.load(folder).metadata["recording"]
        trajectory_bytes = folder_bytes(folder)
        if setup.num_processes:
            trainer.model.save_pretrained(folder.with_name("model"))
            np.savez(folder.with_name("pictures.npz"), **vars(pictures))
            parts = launched(folder.parent, asdict(setup), asdict(recipe))
            worked = {cost: max(part[cost] for part in parts) for cost in parts[0]}
        else:
            worked = distil_and_attribute(trainer.model, folder, setup, recipe, pictures)
    # The callback knows wall time only, its own and the whole training's: their ratio is what can be used.
    share = recording["recording_seconds"] / (recording["training_seconds"] - recording["recording_seconds"])
    return {
        "num_rows": setup.num_rows,
        "num_clusters": setup.num_clusters,
        "num_parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "num_processes": max(1, setup.num_processes),
        "costs": {
            "training_seconds": training.cpu_seconds,
            "recording_seconds": share * training.cpu_seconds,
            "trajectory_bytes": trajectory_bytes,
            "training_peak_bytes": training.peak_bytes,
            **worked,
        },
    }


def distil_and_attribute(
    model: Any, trajectory: Path, setup: Setup, recipe: Recipe, pictures: Pictures
) -> dict[str, float]:
    """Costs of this process, alone or among others."""
    train, queries = pictures.datasets(setup.num_rows, recipe.num_queries)
    clusters = parts_of_classes(pictures.labels[: setup.num_rows], setup.num_clusters)
    blocks = {"cluster_block_size": BLOCK_SIZE} if setup.num_processes else {}
    config = DistillationConfig(num_iterations=recipe.num_iterations, max_memory=recipe.max_memory, **blocks)
    with seconds_in(BlockLearner, "learn") as learning, Meter() as distilling:
        synset = ReverseGradientMatchingDistiller(
            model, trajectory, train, clusters, config=config, disable_tqdm=True
        ).distill()
    with Meter() as online:
        attributor = Attributor(model, synset, max_memory=recipe.max_memory, disable_tqdm=True)
        attributor.attribute(queries)
    gradients = distilling.cpu_seconds - sum(learning)
    return {
        "distilling_seconds": gradients + sum(learning) * DistillationConfig().num_iterations / recipe.num_iterations,
        "distilling_gradients_seconds": gradients,
        "online_seconds": online.cpu_seconds,
        "distilling_wall_seconds": distilling.seconds,
        "online_wall_seconds": online.seconds,
        "kept_bytes": synset_bytes(synset),
        "distilling_peak_bytes": distilling.peak_bytes,
        "online_peak_bytes": online.peak_bytes,
    }


def open_report(path: Path, recipe: Recipe, axes: dict[str, list[Setup]], *, anew: bool = False) -> Report:
    """The results so far; see [`Report`]."""
    header = {
        "identity": {"task": "growth", **asdict(recipe)},
        "versions": versions(),
        "axes": {axis: [setup.name for setup in setups] for axis, setups in axes.items()},
    }
    return Report(path, header, [setup.name for setups in axes.values() for setup in setups], anew=anew)


def run(setups: Iterable[Setup], recipe: Recipe, pictures: Pictures, report: Report) -> None:
    """Measures the points that are missing, each written as soon as it is done."""
    for setup in setups:
        if report.entry(setup.name) is None:
            start = time.perf_counter()
            report.put(setup.name, measure(setup, recipe, pictures) | {"environment": environment()})
            print(f"{setup.name}: {time.perf_counter() - start:.0f} s of wall time", flush=True)


def main(arguments: argparse.Namespace) -> None:
    """Measures the chosen axes and draws what there is."""
    recipe = Recipe()
    report = open_report(arguments.output, recipe, AXES, anew=arguments.anew)
    setups = [setup for axis in arguments.axes for setup in AXES[axis]]
    run(setups, recipe, Pictures(*load_images()), report)
    figure = FIGURE if arguments.output == RESULTS / "growth.json" else arguments.output.with_suffix(".png")
    draw(report.content, figure)
    print(f"Written to {arguments.output} and {figure}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", default=list(AXES), choices=AXES)
    parser.add_argument("--output", type=Path, default=RESULTS / "growth.json", help="another JSON file")
    parser.add_argument("--anew", action="store_true", help="discard the results of an earlier run")
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    main(given)
