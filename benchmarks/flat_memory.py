"""
What large tasks take: row scores of a million rows, two thousand clusters, LoRA of a hundred million parameters.

    python -m benchmarks.flat_memory                          # what is missing: half an hour in all
    python -m benchmarks.flat_memory --cases "100000 rows"    # these only

Models, rows and queries are made in code, so quality is not looked at, only seconds and bytes. Every case runs in a
process of its own with one thread and is written to benchmarks/results/flat-memory.json as soon as it is there.

Memory is told twice: all that is resident, and what of it is private. The rest are pages of files that are mapped
(rows, scores), which the system takes back whenever it needs them.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification

from benchmarks.costs import Meter, folder_bytes, seconds_in
from benchmarks.report import RESULTS, Report, environment, versions
from benchmarks.tasks.images import build_trainer, image_dataset
from hf_rgm import Attributor, ClusterMap, DistillationConfig, ReverseGradientMatchingDistiller, TrajectoryCallback
from hf_rgm.distillation.learner import BlockLearner
from hf_rgm.engines import row_scores
from hf_rgm.testing import tiny_dataset, tiny_trainer

SEED = 0
CHUNK_ROWS = 50_000
RATE_OF_MAXRSS = 1024
"""Linux tells the largest resident set in units of so many bytes."""


class Steps:
    """
    Costs of the steps of a case.

    Attributes:
        costs (`dict`): By step: `cpu_seconds`, and `peak_bytes` and `private_peak_bytes` beyond what was held before.
    """

    def __init__(self) -> None:
        self.costs: dict[str, dict[str, float]] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Measures a step."""
        with Meter() as meter:
            yield
        self.costs[name] = {
            "cpu_seconds": meter.cpu_seconds,
            "peak_bytes": meter.peak_bytes,
            "private_peak_bytes": meter.private_peak_bytes,
        }
        print(f"  {name}: {self.costs[name]}", flush=True)


def large_dataset(num_rows: int, folder: Path) -> datasets.Dataset:
    """Rows of [`tiny_dataset`], other noise in every chunk of them, mapped from Arrow files."""
    parts = []
    for seed, start in enumerate(range(0, num_rows, CHUNK_ROWS)):
        chunk = folder / f"rows-{start}"
        tiny_dataset(min(CHUNK_ROWS, num_rows - start), seed=seed + 2).save_to_disk(chunk, max_shard_size="1GB")
        parts.append(datasets.load_from_disk(chunk))
    return datasets.concatenate_datasets(parts).with_format("torch")


def many_rows(num_rows: int, num_queries: int = 50, num_clusters: int = 30) -> dict[str, Any]:
    """Scores all rows of a memory-mapped dataset for a perceptron of 171 parameters, into a folder."""
    steps = Steps()
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent)
        train, queries = large_dataset(num_rows, folder), tiny_dataset(num_queries, seed=1)
        clusters = ClusterMap.from_ids(np.arange(num_rows) % num_clusters)
        callback = TrajectoryCallback(folder / "trajectory", num_states=3)
        trainer = tiny_trainer(train, callbacks=[callback], max_steps=100, per_device_train_batch_size=64)
        with steps.step("recording"):
            trainer.train()
        config = DistillationConfig(samples_per_cluster=2, num_iterations=20)
        with steps.step("distilling"):
            synset = ReverseGradientMatchingDistiller(
                trainer.model, folder / "trajectory", train, clusters, config=config, disable_tqdm=True
            ).distill()
        attributor = Attributor(trainer.model, synset, max_memory="500MB", disable_tqdm=True)
        with steps.step("scoring rows"):
            result = attributor.attribute(queries, engine="adjoint", rows=train, output_dir=folder / "scores")
        assert result.row_scores is not None
        return {
            "num_rows": num_rows,
            "num_queries": num_queries,
            "num_parameters": attributor.model.num_parameters,
            "num_states": len(synset.trajectory.state_steps) - 1,
            "score_bytes": result.row_scores.nbytes,
            "costs": steps.costs,
        }


def many_clusters(num_clusters: int = 2_000, rows_per_cluster: int = 10) -> dict[str, Any]:
    """Distils a cluster for every ten rows for a CNN of 100,000 parameters, and scores them by the adjoint."""
    steps, generator = Steps(), np.random.default_rng(SEED)
    num_rows, num_queries, max_memory = num_clusters * rows_per_cluster, 5, "1GB"
    patterns = generator.standard_normal((10, 28, 28), dtype=np.float32)
    labels = np.arange(num_rows) % 10
    pixels = patterns[labels] + generator.standard_normal((num_rows, 28, 28), dtype=np.float32)
    train = image_dataset(pixels[:, None], labels.astype(np.int64))
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "trajectory"
        trainer = build_trainer(
            train,
            SEED,
            image_size=28,
            batch_size=64,
            hidden_sizes=(16, 32, 64, 128),
            max_steps=40,
            callbacks=[TrajectoryCallback(folder, num_states=3)],
        )
        with steps.step("recording"):
            trainer.train()
        config = DistillationConfig(samples_per_cluster=1, num_iterations=2, max_memory=max_memory)
        clusters = ClusterMap.from_ids(np.arange(num_rows) // rows_per_cluster)
        with steps.step("distilling"):
            distiller = ReverseGradientMatchingDistiller(
                trainer.model, folder, train, clusters, config=config, disable_tqdm=True
            )
            told = distiller.estimate()
            synset = distiller.distill()
        attributor = Attributor(trainer.model, synset, max_memory=max_memory, disable_tqdm=True)
        queries = train.select(range(num_queries))
        with steps.step("scoring clusters"):
            attributor.attribute(queries, engine="adjoint", rewind=0.75)
        return {
            "num_rows": num_rows,
            "num_clusters": num_clusters,
            "num_queries": num_queries,
            "num_iterations": config.num_iterations,
            "num_parameters": attributor.model.num_parameters,
            "num_states": len(synset.matched_states),
            "max_memory": max_memory,
            "gradient_bytes": 4 * num_clusters * attributor.model.num_parameters * len(synset.matched_states),
            "estimated_memory_bytes": told.memory_bytes,
            "num_blocks": told.num_blocks,
            "costs": steps.costs,
        }


def large_model(num_rows: int = 64, num_tokens: int = 32, num_clusters: int = 4) -> dict[str, Any]:
    """Records, distils and attributes LoRA on a BERT of 110 million parameters with random weights."""
    steps, generator = Steps(), torch.Generator().manual_seed(SEED)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        base = BertForSequenceClassification(BertConfig(num_labels=2))
        model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["query", "value"]))
    ids = torch.randint(1000, 30_000, (num_rows, num_tokens), generator=generator)
    rows = {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
    train = datasets.Dataset.from_dict({**rows, "labels": (ids[:, 0] % 2).tolist()}).with_format("torch")
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "trajectory"
        arguments = transformers.TrainingArguments(
            output_dir=parent,
            max_steps=8,
            per_device_train_batch_size=8,
            learning_rate=1e-3,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        callback = TrajectoryCallback(folder, num_states=3)
        trainer = transformers.Trainer(model, arguments, train_dataset=train, callbacks=[callback])
        with steps.step("recording"):
            trainer.train()
        trajectory_bytes = folder_bytes(folder)
        config = DistillationConfig(samples_per_cluster=1, num_iterations=4, num_tokens=8, batch_size=8)
        clusters = ClusterMap.from_ids(np.arange(num_rows) % num_clusters)
        with seconds_in(BlockLearner, "learn") as learning, steps.step("distilling"):
            synset = ReverseGradientMatchingDistiller(
                trainer.model, folder, train, clusters, config=config, disable_tqdm=True
            ).distill()
        attributor = Attributor(trainer.model, synset, disable_tqdm=True)
        few, many = train.select(range(2)), train.select(range(6))
        with steps.step("scoring clusters"):
            told = attributor.attribute(few, engine="adjoint").metadata
        # Up to four directions are followed in forward mode; more are products with the gradients of rows.
        with seconds_in(row_scores, "row_scores") as forward, steps.step("scoring rows, two queries"):
            attributor.attribute(few, engine="adjoint", rows=train)
        with seconds_in(row_scores, "row_scores") as by_gradients, steps.step("scoring rows, six queries"):
            attributor.attribute(many, engine="adjoint", rows=train)
        return {
            "num_rows": num_rows,
            "num_tokens": num_tokens,
            "num_clusters": num_clusters,
            "num_queries": len(few),
            "num_iterations": config.num_iterations,
            "forward_rows_cpu_seconds": sum(forward),
            "gradient_rows_cpu_seconds": sum(by_gradients),
            "num_tokens_of_samples": config.num_tokens,
            "states_per_iteration": config.states_per_iteration,
            "iterations_cpu_seconds": sum(learning),
            "num_steps": arguments.max_steps,
            "num_integration_steps": told["num_steps"] - told["rewind_step"],
            "batch_size": arguments.per_device_train_batch_size,
            "num_parameters": attributor.model.num_parameters,
            "num_frozen_parameters": sum(p.numel() for p in base.parameters() if not p.requires_grad),
            "num_states": len(synset.matched_states),
            "trajectory_bytes": trajectory_bytes,
            "costs": steps.costs,
        }


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "100000 rows": partial(many_rows, 100_000),
    "1000000 rows": partial(many_rows, 1_000_000),
    "2000 clusters": many_clusters,
    "LoRA of 110 million parameters": large_model,
}


def measure(name: str) -> dict[str, Any]:
    """A case, with the largest resident set of the whole process, libraries included."""
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    found = CASES[name]()
    peak = RATE_OF_MAXRSS * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found | {"process_peak_bytes": peak, "environment": environment()}


def main(arguments: argparse.Namespace) -> None:
    """Measures the chosen cases, each in a process of its own."""
    header = {"identity": {"task": "flat memory"}, "versions": versions()}
    report = Report(arguments.output, header, list(CASES), anew=arguments.anew)
    spawn = multiprocessing.get_context("spawn")
    for name in arguments.cases:
        if report.entry(name) is None:
            print(name, flush=True)
            with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as pool:
                report.put(name, pool.submit(measure, name).result())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--output", type=Path, default=RESULTS / "flat-memory.json", help="another JSON file")
    parser.add_argument("--anew", action="store_true", help="discard the results of an earlier run")
    main(parser.parse_args())
