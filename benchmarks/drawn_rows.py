"""
What anchored replay of random halves of the clusters lacks: is it that a few samples stand for each cluster?

    python -m benchmarks.drawn_rows --task fashion

Anchored replay with real rows in place of synthetic samples, five of each cluster: the same ones in every step, or
others, drawn anew. Along paths of 8 and 64 recorded states of the same training, from 27% of it, in steps of one, two
or four training steps. Agreement with retraining (LDS of clusters) is that on the first half-masks, by the tuning
queries, which are never reported. Writes benchmarks/results/drawn_rows.json.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks.halves import RecordedHalves
from benchmarks.report import RESULTS, Report, environment, versions
from hf_rgm import ClusterMap
from hf_rgm.attribution.replay import ReplayEngine
from hf_rgm.rows import RowReader
from hf_rgm.synset.inputs import InputSpace, input_space
from hf_rgm.synset.samples import SyntheticSamples, smoothed_one_hot

NUM_MASKS = 12
NUM_QUERIES = 60
REWIND = 0.27
ROWS_PER_CLUSTER = 5
SMOOTHING = 1e-6


@dataclass(frozen=True)
class Setting:
    """
    One way to replay.

    Args:
        num_states (`int`): Recorded states of the path.
        stride (`int`): Training steps per integration step.
        anew (`bool`): Whether every step has rows of its own.
    """

    num_states: int
    stride: int
    anew: bool

    def __str__(self) -> str:
        return f"{self.num_states} states, stride {self.stride}, rows {'anew' if self.anew else 'once'}"


SETTINGS = (
    Setting(8, 4, anew=True),
    Setting(8, 1, anew=True),
    Setting(64, 4, anew=True),
    Setting(64, 2, anew=True),
    Setting(64, 1, anew=True),
    Setting(64, 2, anew=False),
)


class DrawnRows:
    """
    Real rows as samples that stand for their clusters.

    Args:
        reader (`RowReader`): The training rows, one label each.
        clusters (`ClusterMap`): Their clusters.
        inputs (`InputSpace`): The space of the samples' inputs.
        num_labels (`int`): Length of the model's logits.
    """

    def __init__(self, reader: RowReader, clusters: ClusterMap, inputs: InputSpace, num_labels: int) -> None:
        self._inputs, self._labels = inputs.read(*reader.batch(range(len(reader))))
        self._rows = [clusters.rows(k) for k in range(clusters.num_clusters)]
        self._shares = torch.from_numpy(clusters.sizes / clusters.sizes.sum()).float()
        self._num_labels = num_labels

    def draw(self, count: int, generator: np.random.Generator) -> SyntheticSamples:
        """`count` rows of every cluster, each for an equal part of it; some more than once in clusters of fewer."""
        drawn = np.stack([generator.choice(rows, count, replace=len(rows) < count) for rows in self._rows])
        weights = (self._shares / count).log()[:, None].expand(-1, count)
        return SyntheticSamples(
            inputs=self._inputs[drawn],
            targets=smoothed_one_hot(self._labels[drawn], self._num_labels, SMOOTHING),
            log_weights=weights.contiguous(),
        )


class DrawnReplay(ReplayEngine):
    """Anchored replay by samples that every step draws anew."""

    def __init__(self, *parts: Any, draw: Callable[[np.random.Generator], SyntheticSamples], **settings: Any) -> None:
        self._draw = draw
        self._generator = np.random.default_rng(0)
        super().__init__(*parts, **settings)

    def _progress(self, steps: Any, num_masks: int) -> Iterator[Any]:
        for step in super()._progress(steps, num_masks):
            self.samples = self._draw(self._generator)
            yield step


def measure(name: str, folder: Path) -> dict[str, Any]:
    """LDS of clusters by setting, and the noise ceiling on the same masks."""
    num_states = {setting.num_states for setting in SETTINGS}
    halves = RecordedHalves(name, folder, num_states, num_masks=NUM_MASKS, num_queries=NUM_QUERIES)
    task, model, inputs = halves.task, halves.model, input_space(halves.model)
    with torch.no_grad():
        num_labels = model.logits(model.parameters(), halves.queries.inputs).shape[-1]
    rows = DrawnRows(RowReader(task.train, model), task.clusters, inputs, num_labels)
    results: dict[str, Any] = {"noise_ceiling": halves.noise_ceiling()}
    for setting in SETTINGS:
        start = time.process_time()
        parts = (model, inputs, rows.draw(ROWS_PER_CLUSTER, np.random.default_rng(0)))
        options = {"rewind": REWIND, "stride": setting.stride, "disable_tqdm": True}
        if setting.anew:
            draw = functools.partial(rows.draw, ROWS_PER_CLUSTER)
            engine = DrawnReplay(*parts, halves.trajectories[setting.num_states], draw=draw, **options)
        else:
            engine = ReplayEngine(*parts, halves.trajectories[setting.num_states], **options)
        with model.differentiable():
            found = halves.models(engine.parameters(halves.weights))
        results[str(setting)] = found | {"cpu_seconds": time.process_time() - start}
        print(f"{name}, {setting}: {found['lds_clusters']['value']:.3f}, deviation {found['mean_deviation']:.2f}")
    return results


def table(methods: dict[str, Any]) -> str:
    """Agreement, and how far the models are from the trained one, a row for each task and setting."""
    lines = ["| rows of a step | recorded states | stride | LDS of clusters | deviation |", "|---" * 5 + "|"]
    for task, entry in methods.items():
        for setting in SETTINGS:
            found = entry["results"][str(setting)]
            drawn = f"{task}, {'others each time' if setting.anew else 'always the same'}"
            cells = [drawn, setting.num_states, setting.stride, f"{found['lds_clusters']['value']:.3f}"]
            lines.append(f"| {' | '.join(map(str, cells))} | {found['mean_deviation']:.1f} |")
    return "\n".join(lines)


def main(arguments: argparse.Namespace) -> None:
    """Measures, and writes."""
    identity = {"queries": "tuning", "num_masks": NUM_MASKS, "settings": [str(setting) for setting in SETTINGS]}
    report = Report(
        arguments.output, {"identity": identity, "versions": versions()}, ["digits", "fashion"], anew=False
    )
    with tempfile.TemporaryDirectory() as folder:
        found = measure(arguments.task, Path(folder))
    report.put(arguments.task, {"results": found, "environment": environment()})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="fashion", choices=("digits", "fashion"))
    parser.add_argument("--output", type=Path, default=RESULTS / "drawn_rows.json", help="another JSON file")
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    main(given)
