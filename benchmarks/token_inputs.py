"""
Which synthetic texts match best for the same CPU time: free vectors or soft tokens, and how many of which length?

    python -m benchmarks.token_inputs            # what is missing: ten minutes in all
    python -m benchmarks.token_inputs --tasks lora

Where token embeddings are frozen, both kinds are possible. A small BERT learns the sentiment of 1,200 sentences; then,
of 600 others, an adapter (LoRA) or all but the embeddings do. Clusters are source x label. Each setting distils with
the iterations that a budget of CPU seconds allows, at every other recorded state, with three seeds. Measured are the
error at the recorded states in between, all clusters' squared differences over all clusters' squared gradients, and
the correlation of the adjoint's cluster scores of held-out sentences by the synset alone with those by the rows, whose
curvature both share. Written to benchmarks/results/token_inputs.json.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, set_seed

from benchmarks.costs import Meter
from benchmarks.estimates import cpu_clock
from benchmarks.report import RESULTS, Report, environment, versions
from benchmarks.tasks.lm import build_tokenizer
from benchmarks.tasks.texts import Sentence, codes, load_sentences, token_dataset
from benchmarks.tasks.trainers import quiet_trainer
from hf_rgm import (
    Attributor,
    ClusterMap,
    DistillationConfig,
    ReverseGradientMatchingDistiller,
    Synset,
    TrajectoryCallback,
)
from hf_rgm.model.row_gradients import cluster_gradients
from hf_rgm.synset.inputs import input_space
from hf_rgm.synset.samples import SynsetGradients
from hf_rgm.trajectory.trajectory import Trajectory

TASKS = ("lora", "frozen embeddings")
SEEDS = (0, 1, 2)
REWIND = 0.5


@dataclass(frozen=True)
class Recipe:
    """
    What is the same for all settings.

    Args:
        seconds (`float`): CPU time for the iterations of one distillation.
        num_known, num_rows, num_queries (`int`): Sentences learned first, then by the recorded run, and asked about.
        num_epochs (`int`): Of either training.
        hidden_size (`int`): Of the BERT.
    """

    seconds: float = 5.0
    num_known: int = 1200
    num_rows: int = 600
    num_queries: int = 20
    num_epochs: int = 5
    hidden_size: int = 64


@dataclass(frozen=True)
class Setting:
    """
    What a synthetic text is.

    Args:
        token_inputs, num_tokens, samples_per_cluster, init: As in [`~hf_rgm.DistillationConfig`].
    """

    token_inputs: str
    num_tokens: int
    samples_per_cluster: int
    init: str = "random"

    @property
    def name(self) -> str:
        """In the results."""
        return f"{self.token_inputs}, {self.samples_per_cluster} of {self.num_tokens} tokens, {self.init}"


SETTINGS = [
    Setting(kind, num_tokens, samples)
    for kind in ("inputs_embeds", "soft_tokens")
    for num_tokens, samples in ((8, 5), (8, 24), (16, 12))
] + [Setting("inputs_embeds", 16, 12, "nearest")]


@dataclass
class Recorded:
    """A model, its recorded run, its rows and queries, and the scores by the rows."""

    model: Any
    trajectory: Trajectory
    train: Dataset
    queries: Dataset
    clusters: ClusterMap


def record(task: str, recipe: Recipe, folder: Path) -> Recorded:
    """Trains the small BERT, then records the run that is asked about."""
    sentences = load_sentences()
    tokenizer = build_tokenizer([sentence.text for sentence in sentences[: recipe.num_known]])

    def part(start: int, count: int) -> tuple[Dataset, list[Sentence]]:
        own = sentences[start : start + count]
        encoded = tokenizer.encode_batch([sentence.text for sentence in own])
        ids, masks = ([getattr(one, name) for one in encoded] for name in ("ids", "attention_mask"))
        return token_dataset(np.array(ids), np.array(masks), np.array([one.label for one in own])), own

    known, _ = part(0, recipe.num_known)
    train, own = part(recipe.num_known, recipe.num_rows)
    queries, _ = part(recipe.num_known + recipe.num_rows, recipe.num_queries)
    ids, names = codes([f"{sentence.source}, {sentence.label}" for sentence in own])
    set_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=recipe.hidden_size,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=2 * recipe.hidden_size,
            max_position_embeddings=64,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            initializer_range=0.1,
        )
    )
    length: dict[str, Any] = {"num_train_epochs": recipe.num_epochs, "per_device_train_batch_size": 16}
    quiet_trainer(model, known, 0, [], learning_rate=5e-4, **length).train()
    if task == "lora":
        model: Any = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"]))
    else:
        model.get_input_embeddings().requires_grad_(False)
    callback = TrajectoryCallback(folder, num_states=9)
    rate = 1e-3 if task == "lora" else 2e-4
    quiet_trainer(model, train, 0, [callback], learning_rate=rate, **length).train()
    return Recorded(model.eval(), Trajectory.load(folder), train, queries, ClusterMap.from_ids(ids, names=names))


def thinned(trajectory: Trajectory) -> tuple[Trajectory, list[int]]:
    """Every other state, the last among them, and the steps of those in between."""
    kept = trajectory.state_steps[::-2][::-1]
    between = [step for step in trajectory.state_steps if step not in kept and step > kept[0]]
    thin = Trajectory(
        optimizer=trajectory.optimizer,
        parameter_shapes=trajectory.parameter_shapes,
        steps=trajectory.steps,
        states={step: trajectory.state(step) for step in kept},
        num_rows=trajectory.num_rows,
        dataset_fingerprint=trajectory.dataset_fingerprint,
        metadata=trajectory.metadata,
    )
    return thin, between


def measure(recorded: Recorded, setting: Setting, seed: int, recipe: Recipe) -> dict[str, float]:
    """
    Distils within the budget.

    Returns:
        `dict`: `"iterations"`, `"seconds"` of CPU time they and the rows' gradients took, `"held_out_error"`, and the
        `"agreement"` of scores, Pearson's correlation over queries and clusters.
    """
    trajectory, between = thinned(recorded.trajectory)

    def distiller(num_iterations: int) -> ReverseGradientMatchingDistiller:
        config = DistillationConfig(**asdict(setting), num_iterations=num_iterations, seed=seed)
        return ReverseGradientMatchingDistiller(
            recorded.model, trajectory, recorded.train, recorded.clusters, config=config, disable_tqdm=True
        )

    with cpu_clock():
        one, many = (distiller(count).estimate().seconds for count in (1, 10_000))
    num_iterations = max(1, round(recipe.seconds * 9_999 / max(many - one, 1e-9)))
    work = distiller(num_iterations)
    with Meter() as meter:
        synset = work.distill()
    attributor = Attributor(recorded.model, synset, disable_tqdm=True)
    alone, by_rows = (
        attributor.attribute(recorded.queries, engine="adjoint", rows=rows, rewind=REWIND).scores.ravel()
        for rows in (None, recorded.train)
    )
    return {
        "iterations": num_iterations,
        "seconds": meter.cpu_seconds,
        "held_out_error": held_out_error(work, attributor, synset, recorded.trajectory, between),
        "agreement": float(np.corrcoef(alone, by_rows)[0, 1]),
    }


def held_out_error(
    work: ReverseGradientMatchingDistiller,
    attributor: Attributor,
    synset: Synset,
    trajectory: Trajectory,
    steps: Iterable[int],
) -> float:
    """Squared differences of all clusters' gradients over their squares, mean over states."""
    model, clusters = attributor.model, range(synset.num_clusters)
    gradients = SynsetGradients(model, input_space(model, synset.input_name))
    errors = []
    with torch.enable_grad(), model.differentiable():
        for step in steps:
            parameters = trajectory.state(step).parameters
            state = [model.space.flatten(parameters)]
            real = cluster_gradients(model, state, work.batches, clusters, len(work.reader), work.row_loss)[0]
            difference = gradients(parameters, synset.samples).detach() - real
            errors.append(float(difference.square().sum() / real.square().sum()))
    return float(np.mean(errors))


def table(methods: dict[str, Any]) -> str:
    """Means over seeds, with the range of the error, as Markdown."""
    lines = ["| Task | Synthetic texts | iterations | error at held-out states | agreement |", "|---|---|---|---|---|"]
    for name, entry in methods.items():
        task, _, setting = name.partition(": ")
        runs = entry["seeds"].values()
        errors = [run["held_out_error"] for run in runs]
        iterations, agreement = (np.mean([run[key] for run in runs]) for key in ("iterations", "agreement"))
        told = f"{np.mean(errors):.3f} ({min(errors):.3f} to {max(errors):.3f})"
        lines.append(f"| {task} | {setting} | {iterations:.0f} | {told} | {agreement:.3f} |")
    return "\n".join(lines)


def open_report(path: Path, recipe: Recipe, *, anew: bool = False) -> Report:
    """The results so far; see [`Report`]."""
    header = {"identity": {"task": "token_inputs", **asdict(recipe)}, "versions": versions()}
    return Report(path, header, [f"{task}: {setting.name}" for task in TASKS for setting in SETTINGS], anew=anew)


def run(tasks: Iterable[str], settings: Iterable[Setting], recipe: Recipe, report: Report) -> None:
    """Measures what is missing, each setting written as soon as it is done."""
    for task in tasks:
        missing = [setting for setting in settings if report.entry(f"{task}: {setting.name}") is None]
        if not missing:
            continue
        with tempfile.TemporaryDirectory() as parent:
            recorded = record(task, recipe, Path(parent) / "trajectory")
            for setting in missing:
                seeds = {str(seed): measure(recorded, setting, seed, recipe) for seed in SEEDS}
                report.put(f"{task}: {setting.name}", {"seeds": seeds, "environment": environment()})
                print(f"{task}: {setting.name}", flush=True)


def main(arguments: argparse.Namespace) -> None:
    """Measures the chosen tasks and prints the table."""
    recipe = Recipe()
    report = open_report(arguments.output, recipe, anew=arguments.anew)
    run(arguments.tasks, SETTINGS, recipe, report)
    print(table(report.content["methods"]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--output", type=Path, default=RESULTS / "token_inputs.json", help="another JSON file")
    parser.add_argument("--anew", action="store_true", help="discard the results of an earlier run")
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    main(given)
