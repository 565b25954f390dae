"""
What `estimate()` says beforehand against what is then measured.

    python -m benchmarks.estimates                        # what is missing: ten minutes in all
    python -m benchmarks.estimates --cases "digits CNN"   # this one only

Each case trains a small model built in code, in a process of its own: memory that one leaves behind would hide what
the next one needs. Each is written to benchmarks/results/estimates.json as soon as it is done.

Memory is the largest resident set beyond what the process held before, with what the allocator keeps and what
operators need while they run. Time is CPU time on one thread, for few iterations: the wall time that estimates are of,
but for other programs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from sklearn.datasets import load_digits
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    set_seed,
)

from benchmarks.costs import Meter, folder_bytes
from benchmarks.models import SmallCnnConfig, SmallCnnForImageClassification
from benchmarks.report import RESULTS, Report, environment, versions
from benchmarks.tasks.images import image_dataset
from benchmarks.tasks.texts import token_dataset
from benchmarks.tasks.trainers import quiet_trainer
from hf_rgm import Attributor, ClusterMap, DistillationConfig, ReverseGradientMatchingDistiller, TrajectoryCallback
from hf_rgm.model.cost_estimates import CostEstimate

VOCABULARY, LENGTH, NUM_LABELS = 2000, 24, 4
SEED = 0


@dataclass(frozen=True)
class Case:
    """
    A model, its rows, and how it is distilled and asked.

    Args:
        model (`str`): One of [`MODELS`].
        num_rows, num_clusters, num_queries, num_steps (`int`): Sizes.
        config (`dict`): Settings of the distillation.
        attribute (`dict`): Settings of the attribution; `"rows"` says whether the training rows are given.
    """

    model: str
    num_rows: int = 480
    num_clusters: int = 12
    num_queries: int = 20
    num_steps: int = 60
    config: dict[str, Any] = field(default_factory=dict)
    attribute: dict[str, Any] = field(default_factory=dict)


def digits_cnn(num_rows: int) -> tuple[PreTrainedModel, Dataset]:
    """A CNN of 6,090 parameters on handwritten digits."""
    images, labels = load_digits(return_X_y=True)
    images = (np.asarray(images[:num_rows], np.float32).reshape(-1, 1, 8, 8) - 4.9) / 6.0
    model = SmallCnnForImageClassification(SmallCnnConfig(image_size=8, num_labels=10))
    return model, image_dataset(images, np.asarray(labels[:num_rows]))


def random_texts(num_rows: int, labels: str) -> Dataset:
    """Rows of random tokens, each fourth one telling the label."""
    generator = np.random.default_rng(SEED)
    classes = np.arange(num_rows) % NUM_LABELS
    ids = generator.integers(10, VOCABULARY, (num_rows, LENGTH))
    ids[:, ::4] = classes[:, None]
    return token_dataset(ids, np.ones_like(ids), classes if labels == "class" else ids)


def bert(num_rows: int) -> tuple[PreTrainedModel, Dataset]:
    """A BERT of two layers and width 64, all of it trained."""
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    config.num_labels = NUM_LABELS
    return BertForSequenceClassification(config), random_texts(num_rows, "class")


def bert_lora(num_rows: int) -> tuple[Any, Dataset]:
    """The same BERT with LoRA on queries and values, and a trained classifier."""
    model, dataset = bert(num_rows)
    return get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"])), dataset


def gpt2(num_rows: int) -> tuple[PreTrainedModel, Dataset]:
    """A GPT-2 of two layers and width 64."""
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=LENGTH,
        n_embd=64,
        n_layer=2,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    return GPT2LMHeadModel(config), random_texts(num_rows, "text")


MODELS: dict[str, Callable[[int], tuple[Any, Dataset]]] = {
    "digits CNN": digits_cnn,
    "BERT": bert,
    "BERT, LoRA": bert_lora,
    "GPT-2": gpt2,
}

FEW = {"num_iterations": 30}
CASES: dict[str, Case] = {
    "digits CNN": Case("digits CNN", num_rows=1200, num_clusters=50, num_queries=100, num_steps=120, config=FEW),
    "digits CNN, adjoint, rows": Case(
        "digits CNN",
        num_rows=1200,
        num_clusters=50,
        num_queries=100,
        num_steps=120,
        config=FEW,
        attribute={"engine": "adjoint", "rows": True},
    ),
    "BERT": Case("BERT", config=FEW),
    "BERT, replay": Case("BERT", config=FEW, attribute={"engine": "replay"}),
    "BERT, 300 MB": Case("BERT", config={**FEW, "max_memory": "300MB"}),
    "BERT, 120 MB": Case("BERT", config={**FEW, "max_memory": "120MB"}),
    "BERT, 50 MB": Case("BERT", config={**FEW, "max_memory": "50MB"}),
    "BERT, LoRA": Case("BERT, LoRA", config=FEW),
    "BERT, LoRA, rows": Case("BERT, LoRA", config=FEW, attribute={"rows": True}),
    "GPT-2": Case("GPT-2", config={**FEW, "num_tokens": 12}, attribute={"objective": "log_probability"}),
}


def measure(case: Case) -> dict[str, Any]:
    """
    Trains, distils and attributes, each of the last two after an estimate.

    Returns:
        `dict`: `"num_parameters"`, and for `"distilling"` and `"attributing"` the seconds, bytes of memory and bytes
        on disk, `"told"` and `"measured"`.
    """
    set_seed(SEED)
    model, dataset = MODELS[case.model](case.num_rows + case.num_queries)
    train = dataset.select(range(case.num_rows))
    queries = dataset.select(range(case.num_rows, case.num_rows + case.num_queries))
    clusters = ClusterMap.from_ids(np.arange(case.num_rows) % case.num_clusters)
    with tempfile.TemporaryDirectory() as parent:
        recorded = Path(parent) / "trajectory"
        quiet_trainer(
            model,
            train,
            SEED,
            [TrajectoryCallback(recorded)],
            per_device_train_batch_size=32,
            learning_rate=1e-3,
            max_steps=case.num_steps,
        ).train()
        config = DistillationConfig(**case.config)

        def distiller() -> ReverseGradientMatchingDistiller:
            return ReverseGradientMatchingDistiller(model, recorded, train, clusters, config=config, disable_tqdm=True)

        with cpu_clock():
            told = distiller().estimate()
        work = distiller()
        with Meter() as meter:
            synset = work.distill()
        distilling = compared(told, meter, folder_bytes(synset.save_pretrained(Path(parent) / "synset")))
        del work
        attributor = Attributor(model, synset, disable_tqdm=True)
        settings: dict[str, Any] = case.attribute | ({"rows": train} if case.attribute.get("rows") else {})
        with cpu_clock():
            told = attributor.estimate(queries, **settings)
        with Meter() as meter:
            result = attributor.attribute(queries, **settings)
        attributing = compared(told, meter, folder_bytes(result.save_pretrained(Path(parent) / "result")))
    num_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"num_parameters": num_parameters, "distilling": distilling, "attributing": attributing}


def cpu_clock() -> Any:
    """Makes the clock of estimates one that stands still while other programs run."""
    return mock.patch("time.perf_counter", time.process_time)


def compared(told: CostEstimate, meter: Meter, disk_bytes: int) -> dict[str, Any]:
    """What was told and what was measured, as they are written down."""
    names = ("seconds", "memory_bytes", "disk_bytes")
    return {
        "told": {name: getattr(told, name) for name in (*names, "num_blocks", "sketched")},
        "measured": dict(zip(names, (meter.cpu_seconds, meter.peak_bytes, disk_bytes), strict=True)),
    }


def measure_apart(name: str) -> dict[str, Any]:
    """Measures a case in a process of its own."""
    with tempfile.TemporaryDirectory() as parent:
        output = Path(parent) / "case.json"
        command = [sys.executable, "-m", "benchmarks.estimates", "--cases", name, "--within", str(output)]
        subprocess.run(command, check=True)
        return json.loads(output.read_text(encoding="utf-8"))


def table(methods: dict[str, Any]) -> str:
    """Told / measured, and their ratio, as Markdown."""
    lines = [
        "| Case | | seconds | memory, MB | on disk, MB |",
        "|---|---|---|---|---|",
    ]
    for name, entry in methods.items():
        for stage in ("distilling", "attributing"):
            cells = []
            for quantity, unit in (("seconds", 1.0), ("memory_bytes", 1e6), ("disk_bytes", 1e6)):
                told, found = (entry[stage][kind][quantity] / unit for kind in ("told", "measured"))
                cells.append(f"{told:.3g} / {found:.3g} = {told / found:.2f}")
            lines.append(f"| {name} | {stage} | {' | '.join(cells)} |")
    return "\n".join(lines)


def open_report(path: Path, cases: dict[str, Case], *, anew: bool = False) -> Report:
    """The results so far; see [`Report`]."""
    header = {
        "identity": {"task": "estimates"},
        "versions": versions(),
        "cases": {name: asdict(case) for name, case in cases.items()},
    }
    return Report(path, header, list(cases), anew=anew)


def run(names: Iterable[str], report: Report) -> None:
    """Measures the cases that are missing, each written as soon as it is done."""
    for name in names:
        if report.entry(name) is None:
            start = time.perf_counter()
            report.put(name, measure_apart(name) | {"environment": environment()})
            print(f"{name}: {time.perf_counter() - start:.0f} s of wall time", flush=True)


def main(arguments: argparse.Namespace) -> None:
    """Measures the chosen cases and prints the table; or, for a process of its own, one case to a file."""
    if arguments.within is not None:
        arguments.within.write_text(json.dumps(measure(CASES[arguments.cases[0]])), encoding="utf-8")
        return
    report = open_report(arguments.output, CASES, anew=arguments.anew)
    run(arguments.cases, report)
    print(table(report.content["methods"]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--output", type=Path, default=RESULTS / "estimates.json", help="another JSON file")
    parser.add_argument("--anew", action="store_true", help="discard the results of an earlier run")
    parser.add_argument("--within", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    main(given)
