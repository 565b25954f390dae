"""
What a large task would take, from what small ones took: the tables of docs/scaling.md.

    python -m benchmarks.scaling_plan    # prints them

Nothing here is measured on a large machine. Costs are multiples of the user's own training, whose speed anybody can
measure: a token that is read for its cluster's gradient, or scored, costs so many times what a token costs in
training, in benchmarks/results/flat-memory.json (LoRA on a BERT of 110 million parameters, one thread of a CPU).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.formats import markdown
from benchmarks.report import RESULTS
from hf_rgm import DistillationConfig
from hf_rgm.engines.memory_shares import MemoryShares
from hf_rgm.files.writing import format_size as size
from hf_rgm.trajectory.path import MAX_INTEGRATION_STEPS

SOURCE = RESULTS / "flat-memory.json"
CASE = "LoRA of 110 million parameters"


@dataclass(frozen=True)
class Task:
    """
    The task that is planned: a causal language model of 7 billion parameters with LoRA of rank 16 on queries and
    values of its 32 layers, 4,096 wide.

    Args:
        num_rows, num_tokens, num_epochs (`int`): Of the training; tokens are those of a row.
        num_parameters (`int`): Trainable ones.
        num_base_parameters (`int`): Frozen ones, kept in 32 bits while distilling and attributing.
        num_clusters, num_queries (`int`): Of the attribution.
        num_states (`int`): Recorded states that are matched and used.
        num_processes (`int`): GPUs.
        training_hours (`float`): Of all epochs on all GPUs: an assumption, to be replaced by one's own.
        max_bytes (`int`): `max_memory` of the attributor on each GPU, beside the model.
    """

    num_rows: int = 1_000_000
    num_tokens: int = 512
    num_epochs: int = 1
    num_parameters: int = 32 * 2 * 2 * 16 * 4_096
    num_base_parameters: int = 7_000_000_000
    num_clusters: int = 1_000
    num_queries: int = 100
    num_states: int = 4
    num_processes: int = 8
    training_hours: float = 10.0
    max_bytes: int = 40_000_000_000

    @property
    def training_tokens(self) -> int:
        """Tokens of one epoch."""
        return self.num_rows * self.num_tokens

    @property
    def query_groups(self) -> int:
        """How often scoring goes through the rows: once for as many queries as have directions that fit."""
        per_query = 4 * self.num_parameters * (self.num_states + 4)
        return -(-self.num_queries // (MemoryShares.of(self.max_bytes, with_rows=True).vectors // per_query))


@dataclass(frozen=True)
class UnitCosts:
    """
    Seconds of a CPU core for one token of one thing.

    Args:
        training (`float`): Forward and back through the model in a recorded training.
        gradients (`float`): A row's part in its cluster's gradient, at one state.
        matching (`float`): A synthetic sample in one iteration of distilling, at one state.
        following (`float`): A synthetic sample in one step of the adjoint, for one query.
        scoring_forward (`float`): Scoring a row at one state, for one query: up to four queries.
        scoring (`float`): Scoring a row at one state, for any number of queries beyond.
    """

    training: float
    gradients: float
    matching: float
    following: float
    scoring_forward: float
    scoring: float

    @classmethod
    def measured(cls, entry: dict[str, Any]) -> UnitCosts:
        """From the costs of a case of `benchmarks.flat_memory`; what comes once is counted in."""
        costs = {name: step["cpu_seconds"] for name, step in entry["costs"].items()}
        row_tokens = entry["num_rows"] * entry["num_tokens"]
        sample_tokens = entry["num_clusters"] * entry["num_tokens_of_samples"]
        iterations = entry["num_iterations"] * entry["states_per_iteration"]
        states = entry["num_states"]
        return cls(
            training=costs["recording"] / (entry["num_steps"] * entry["batch_size"] * entry["num_tokens"]),
            gradients=(costs["distilling"] - entry["iterations_cpu_seconds"]) / (row_tokens * states),
            matching=entry["iterations_cpu_seconds"] / (iterations * sample_tokens),
            following=costs["scoring clusters"]
            / (entry["num_queries"] * entry["num_integration_steps"] * sample_tokens),
            scoring_forward=entry["forward_rows_cpu_seconds"] / (row_tokens * states * entry["num_queries"]),
            scoring=entry["gradient_rows_cpu_seconds"] / (row_tokens * states),
        )


UNITS = {
    "training": "one token, forward and back",
    "gradients": "clusters' gradients: one token of a row at one state",
    "matching": "distilling: one token of a synthetic text, one iteration, one state",
    "following": "adjoint: one token of a synthetic text, one step, one query",
    "scoring_forward": "row scores, up to four queries: one token of a row, one state, one query",
    "scoring": "row scores, more queries: one token of a row, one state",
}


def unit_table(units: UnitCosts) -> str:
    """What was measured, and as multiples of training."""
    rows = [
        [what, f"{1000 * getattr(units, name):.2f} ms", f"{getattr(units, name) / units.training:.2f}"]
        for name, what in UNITS.items()
    ]
    return markdown(["what", "of one CPU core", "times training"], rows)


def time_table(units: UnitCosts, task: Task) -> str:
    """Hours of each stage on all processes together, and how often training goes through as many tokens."""
    config = DistillationConfig()
    sample_tokens = task.num_clusters * config.samples_per_cluster * config.num_tokens
    rows_at_states = task.training_tokens * task.num_states
    tokens = {
        "training itself (assumed)": ("training", task.num_epochs * task.training_tokens),
        "clusters' gradients": ("gradients", rows_at_states),
        "distilling": ("matching", sample_tokens * config.num_iterations * config.states_per_iteration),
        "adjoint of all queries": ("following", sample_tokens * MAX_INTEGRATION_STEPS * task.num_queries),
        "scores of all rows, all queries": ("scoring", rows_at_states * task.query_groups),
        "scores of all rows, one query": ("scoring_forward", rows_at_states),
    }
    hours_per_token = task.training_hours / (task.num_epochs * task.training_tokens)
    rows = []
    for stage, (unit, count) in tokens.items():
        times = getattr(units, unit) / units.training
        rows.append([stage, f"{count:.1e}", f"{times:.2f}", f"{count * times * hours_per_token:.1f} h"])
    return markdown(["stage", "tokens", "times training", f"on {task.num_processes} GPUs"], rows)


def byte_table(task: Task) -> str:
    """What is held and kept, counted from shapes."""
    config = DistillationConfig()
    vector = 4 * task.num_parameters
    hidden, choices = 4_096, config.num_target_choices
    sample = 4 * config.num_tokens * (hidden + choices + choices * 2 + 1)
    rows = [
        ["recorded states: parameters and two moments", "disk", size(3 * vector * task.num_states)],
        ["the frozen model in 16 bits", "each GPU", size(2 * task.num_base_parameters)],
        ["states, and exact gradients of one cluster at each", "each GPU", size(2 * vector * task.num_states)],
        [
            "the same for all clusters at once, which is never held",
            "nowhere",
            size(vector * task.num_states * (1 + task.num_clusters)),
        ],
        ["the synset's samples", "disk", size(sample * task.num_clusters * config.samples_per_cluster)],
        [
            f"directions of all queries, in {task.query_groups} groups",
            "each GPU",
            size(vector * task.num_states * task.num_queries),
        ],
        ["scores of all rows", "disk, mapped", size(4 * task.num_rows * task.num_queries)],
        ["scores of all clusters", "memory", size(4 * task.num_clusters * task.num_queries)],
    ]
    return markdown(["what", "where", "bytes"], rows)


def case_table(entries: dict[str, dict[str, Any]]) -> str:
    """Time and memory of each step of each case."""
    rows = []
    for name, entry in entries.items():
        for step, costs in entry["costs"].items():
            memory = [size(costs["peak_bytes"]), size(costs["private_peak_bytes"])]
            rows.append([name, step, f"{costs['cpu_seconds']:.0f} s", *memory, size(entry["process_peak_bytes"])])
            name = ""
    return markdown(["case", "step", "CPU time", "peak", "private peak", "whole process"], rows)


def plan(path: Path = SOURCE) -> dict[str, str]:
    """All tables, by name."""
    entries = json.loads(path.read_text(encoding="utf-8"))["methods"]
    units = UnitCosts.measured(entries[CASE])
    return {
        "cases": case_table(entries),
        "units": unit_table(units),
        "time": time_table(units, Task()),
        "bytes": byte_table(Task()),
    }


if __name__ == "__main__":
    print("\n\n".join(plan().values()))
