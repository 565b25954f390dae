"""
What more synthetic samples bring to anchored replay of random halves of the clusters: all at once, or some at a time.

    python -m benchmarks.drawn_samples --task fashion

A synset of twenty samples a cluster, distilled on 8 recorded states, is replayed along paths of 8 and 64 states of the
same training, from 27% of it: by all samples in every step, or by five of each cluster, drawn anew in every step, in
the time of replays by a synset of five (those of benchmarks.path_states). Agreement with retraining (LDS of clusters)
is that on the first half-masks, by the tuning queries, which are never reported. Writes
benchmarks/results/drawn_samples.json.
"""

from __future__ import annotations

import argparse
import functools
import math
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks.drawn_rows import DrawnReplay
from benchmarks.halves import RecordedHalves
from benchmarks.report import RESULTS, Report, environment, versions
from hf_rgm import Attributor, DistillationConfig, ReverseGradientMatchingDistiller
from hf_rgm.synset.samples import SyntheticSamples

NUM_MASKS = 12
NUM_QUERIES = 60
REWIND = 0.27
NUM_ITERATIONS = 300
SAMPLES_PER_CLUSTER = 20


@dataclass(frozen=True)
class Setting:
    """
    One way to replay.

    Args:
        drawn (`int`): Samples of each cluster in a step.
        num_states (`int`): Recorded states of the path.
        stride (`int`): Training steps per integration step.
    """

    drawn: int
    num_states: int
    stride: int

    def __str__(self) -> str:
        return f"{self.drawn} of {SAMPLES_PER_CLUSTER}, {self.num_states} states, stride {self.stride}"


SETTINGS = (Setting(5, 8, 4), Setting(5, 64, 2), Setting(20, 64, 4))


def draw(samples: SyntheticSamples, count: int, generator: np.random.Generator) -> SyntheticSamples:
    """`count` samples of every cluster, none twice, that stand for all of them."""
    num_clusters, every = samples.log_weights.shape[:2]
    chosen = torch.from_numpy(generator.permuted(np.tile(np.arange(every), (num_clusters, 1)), axis=1)[:, :count])
    rows = torch.arange(num_clusters)[:, None]
    drawn = samples.map(lambda tensor: tensor[rows, chosen])
    return replace(drawn, log_weights=drawn.log_weights + math.log(every / count))


def measure(name: str, folder: Path) -> dict[str, Any]:
    """LDS of clusters by setting, the matching error, and the noise ceiling on the same masks."""
    num_states = {setting.num_states for setting in SETTINGS}
    halves = RecordedHalves(name, folder, num_states, num_masks=NUM_MASKS, num_queries=NUM_QUERIES)
    start = time.process_time()
    synset = ReverseGradientMatchingDistiller(
        halves.trainer_model,
        halves.trajectories[min(num_states)],
        halves.task.train,
        halves.task.clusters,
        config=DistillationConfig(samples_per_cluster=SAMPLES_PER_CLUSTER, num_iterations=NUM_ITERATIONS),
        disable_tqdm=True,
    ).distill()
    attributor = Attributor(halves.trainer_model, synset, disable_tqdm=True)
    results: dict[str, Any] = {
        "noise_ceiling": halves.noise_ceiling(),
        "matching_error": synset.matching_error,
        "distilling_cpu_seconds": time.process_time() - start,
    }
    print(f"{name}: matching error {synset.matching_error:.4f}", flush=True)
    for setting in SETTINGS:
        start = time.process_time()
        engine = DrawnReplay(
            halves.model,
            attributor.inputs,
            attributor.samples,
            halves.trajectories[setting.num_states],
            draw=functools.partial(draw, attributor.samples, setting.drawn),
            rewind=REWIND,
            stride=setting.stride,
            disable_tqdm=True,
        )
        with halves.model.differentiable():
            found = halves.models(engine.parameters(halves.weights))
        results[str(setting)] = found | {"cpu_seconds": time.process_time() - start}
        told = f"{found['lds_clusters']['value']:.3f}, deviation {found['mean_deviation']:.2f}"
        print(f"{name}, {setting}: {told}", flush=True)
    return results


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
    parser.add_argument("--output", type=Path, default=RESULTS / "drawn_samples.json", help="another JSON file")
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    main(given)
