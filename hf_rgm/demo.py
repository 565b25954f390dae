"""`hf-rgm demo`: training to attribution on real handwritten digits, without network, in a few minutes."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import datasets
import numpy as np
import torch
from datasets import Dataset
from sklearn.datasets import load_digits
from transformers import PrinterCallback, Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

from hf_rgm.agreement.budget import LDS_CLUSTERS
from hf_rgm.attribution.pipeline import AttributionPipeline
from hf_rgm.clusters.cluster_map import ClusterMap
from hf_rgm.distillation.config import DistillationConfig
from hf_rgm.distillation.distiller import ReverseGradientMatchingDistiller
from hf_rgm.fidelity.report import FidelityReport
from hf_rgm.model.functional_model import FunctionalModel
from hf_rgm.model.losses import label_losses
from hf_rgm.model.row_reader import CachedBatches, RowReader
from hf_rgm.pages.exhibit import Exhibit
from hf_rgm.pages.views import attribution_report
from hf_rgm.plots import plot_inspection_curve, plot_matching_error, plot_predicted_against_actual, plot_synset_gallery
from hf_rgm.recording.callback import TrajectoryCallback
from hf_rgm.results.result import AttributionResult
from hf_rgm.synset.synset import Synset

CELLS_PER_CLASS = 3
MARKER = ".hf-rgm-demo"
REPORT = "report.html"
INSPECTED_SHARES = (0.05, 0.1)


@dataclass(frozen=True)
class DemoSettings:
    """Sizes of the demo."""

    num_rows: int = 1200
    num_queries: int = 120
    num_epochs: int = 15
    num_iterations: int = 400  # of distilling, at most
    num_subsets: int = 6  # random halves of the clusters to retrain on, with two seeds each
    flipped_share: float = 0.05  # of the training labels
    seed: int = 0


@dataclass
class DemoData:
    """Datasets of `pixel_values` `(1, 8, 8)` float32 and `labels`; `flipped` marks rows whose label is wrong."""

    train: Dataset
    queries: Dataset
    flipped: np.ndarray  # (num_rows,), bool


def load_data(settings: DemoSettings) -> DemoData:
    """Digits of scikit-learn, with a share of the training labels flipped to another class."""
    pixels, labels = load_digits(return_X_y=True)
    generator = np.random.default_rng(settings.seed)
    order = generator.permutation(len(labels))
    train, queries = np.split(order[: settings.num_rows + settings.num_queries], [settings.num_rows])
    flipped = np.zeros(len(train), dtype=bool)
    flipped[generator.permutation(len(train))[: round(settings.flipped_share * len(train))]] = True
    labels[train[flipped]] = (labels[train[flipped]] + generator.integers(1, 10, flipped.sum())) % 10

    def dataset(rows: np.ndarray) -> Dataset:
        images = (pixels[rows].reshape(-1, 1, 8, 8) / 16).astype(np.float32)
        return Dataset.from_dict({"pixel_values": images, "labels": labels[rows]}).with_format("torch")

    return DemoData(dataset(train), dataset(queries), flipped)


def build_trainer(settings: DemoSettings) -> Callable[..., Trainer]:
    """Function of dataset and seed that builds a fresh `Trainer` for a small vision Transformer."""

    def build(dataset: Dataset, seed: int, callbacks=(), disable_tqdm: bool = True) -> Trainer:
        set_seed(seed)
        config = ViTConfig(
            image_size=8,
            patch_size=2,
            num_channels=1,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        config.num_labels = 10
        arguments = TrainingArguments(
            output_dir=tempfile.mkdtemp(prefix="hf-rgm-demo-"),
            num_train_epochs=settings.num_epochs,
            per_device_train_batch_size=50,
            learning_rate=3e-3,
            warmup_steps=20,
            max_grad_norm=0.0,
            seed=seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=disable_tqdm,
            use_cpu=not torch.cuda.is_available(),
        )
        model = ViTForImageClassification(config)
        trainer = Trainer(model, arguments, train_dataset=dataset, callbacks=list(callbacks))
        trainer.remove_callback(PrinterCallback)
        return trainer

    return build


def inspection_order(result: AttributionResult) -> np.ndarray:
    """Training rows, the one that harms the queries most first: `(num_rows,)`, int64."""
    if result.row_scores is None:
        raise ValueError("The result has no row scores. Pass the training rows when attributing.")
    return np.argsort(result.row_scores.mean(0), kind="stable")


def loss_order(model: FunctionalModel, train: Dataset) -> np.ndarray:
    """Training rows, the one with the highest loss first: `(num_rows,)`, int64."""
    batches = CachedBatches(RowReader(train, model), [range(len(train))], batch_size=256)
    with torch.no_grad():
        losses = [label_losses(model.logits(model.parameters(), x), y) for x, y in batches.group(0)]
    return np.argsort(-torch.cat(losses).cpu().numpy(), kind="stable")


def share_found(order: np.ndarray, flipped: np.ndarray, inspected: float) -> float:
    """Share of the flipped rows among the first `inspected` of the order."""
    return float(flipped[order[: round(inspected * len(order))]].sum() / flipped.sum())


def run_demo(
    output_dir: str | Path,
    *,
    say: Callable[[str], object],
    settings: DemoSettings | None = None,
    overwrite: bool = False,
    disable_tqdm: bool = False,
) -> Path:
    """Trains, records, distils, attributes and checks; returns the folder with all of it. `say` receives each line."""
    settings = settings or DemoSettings()
    data = load_data(settings)
    num_flipped = int(data.flipped.sum())
    if not num_flipped:
        raise ValueError(f"`flipped_share` = {settings.flipped_share} flips no label of {len(data.train)}. Raise it.")
    folder = Path(output_dir)
    _begin(folder, overwrite, say)
    say(f"1. Training a small ViT on {len(data.train)} digits, {num_flipped} of them with a flipped label ...")
    callback = TrajectoryCallback(folder / "trajectory", overwrite=True)
    trainer = build_trainer(settings)(data.train, settings.seed, [callback], disable_tqdm)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    model = cast(ViTForImageClassification, trainer.model)
    model.save_pretrained(folder / "model")
    say(f"   {callback.summary()}")

    images = np.asarray(data.train["pixel_values"]).reshape(len(data.train), -1)
    clusters = ClusterMap.from_embeddings(
        images, labels=np.asarray(data.train["labels"]), num_clusters_per_class=CELLS_PER_CLASS, seed=settings.seed
    )
    say(f"2. Distilling {clusters.num_clusters} clusters (class x k-means) into a synset ...")
    config = DistillationConfig.from_preset(
        "quick", tolerance=0.01, num_iterations=settings.num_iterations, seed=settings.seed
    )
    synset = ReverseGradientMatchingDistiller(
        model, folder / "trajectory", data.train, clusters, config=config, disable_tqdm=disable_tqdm
    ).distill()
    synset.save_pretrained(folder / "synset")
    size = sum(path.stat().st_size for path in (folder / "synset").rglob("*") if path.is_file())
    say(
        f"   {synset.num_samples} synthetic digits stand in for {len(data.train)} real ones: matching error "
        f"{synset.matching_error:.3f}, {size / 1e3:.0f} kB with everything needed to use it."
    )

    say(f"3. Attributing {len(data.queries)} test digits to clusters and rows ...")
    attribute = AttributionPipeline(model, synset=synset, disable_tqdm=disable_tqdm)
    result = attribute(data.queries, rows=data.train)
    result.save_pretrained(folder / "attributions")
    _save_data(data, folder)
    _tell_queries(result, data, say)

    orders = {
        "row scores": inspection_order(result),
        "training loss": loss_order(attribute.attributor.model, data.train),
    }
    say(f"4. Finding the {num_flipped} flipped labels by inspecting rows in order:")
    for share in INSPECTED_SHARES:
        found = ", ".join(f"{name} {share_found(order, data.flipped, share):.0%}" for name, order in orders.items())
        say(f"   first {share:.0%} inspected: {found}, random {share:.0%} of them found.")

    seeds = (settings.seed + 1, settings.seed + 2)
    budget = len(seeds) * settings.num_subsets
    say(
        f"5. Checking: {budget} retrainings, each on a random half of the clusters, with two seeds: about "
        f"{budget * seconds / 60:.1f} minutes ..."
    )
    fidelity = FidelityReport.measure(
        attribute.attributor,
        data.queries,
        build_trainer(settings),
        data.train,
        budget=budget,
        measures=[LDS_CLUSTERS],
        seeds=seeds,
        rows=True,
        seed=settings.seed,
        disable_tqdm=disable_tqdm,
    )
    agreement = fidelity.agreements[LDS_CLUSTERS]
    say(
        f"   Rank correlation of predicted with retrained margins (LDS): {agreement.estimate}, mean over "
        f"{len(data.queries)} queries; retraining with another seed reaches {agreement.ceiling}."
    )
    say(
        f"   This is about order. In size, retrained effects are {agreement.slope} times the sums of scores; "
        "`result.calibrated(report)` multiplies by that (docs/method.md, sizes)."
    )
    synset.fidelity = result.metadata["fidelity"] = fidelity.to_dict()
    synset.save_pretrained(folder / "synset")
    result.save_pretrained(folder / "attributions")
    exhibit = Exhibit(result, synset=synset, rows=data.train, queries=data.queries)
    _write_report(folder, exhibit, data, orders, fidelity)
    say(f"Written to {folder.resolve()}: open report.html, or look into synset/, attributions/ and plots/.")
    return folder


def _begin(folder: Path, overwrite: bool, say: Callable[[str], object]) -> None:
    """Makes the folder, or marks an earlier demo in it as unfinished."""
    if folder.exists() and not (folder.is_dir() and ((folder / MARKER).is_file() or not any(folder.iterdir()))):
        raise FileExistsError(f"{folder} holds something else than an earlier demo and is left alone. Choose another.")
    if (folder / REPORT).exists() and not overwrite:
        raise FileExistsError(
            f"{folder} holds a finished demo. Choose another folder, or replace it: `overwrite=True`, on the command "
            "line `--overwrite`."
        )
    if (folder / MARKER).is_file() and not (folder / REPORT).exists():
        say(f"{folder} holds a demo that was cut short, which begins again.")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / REPORT).unlink(missing_ok=True)  # written last: without it the demo is unfinished
    (folder / MARKER).write_text("Written by `hf-rgm demo`, which may replace this folder's content.\n")


def _save_data(data: DemoData, folder: Path) -> None:
    """Saves rows and queries for the explorer, without progress bars."""
    bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        data.train.save_to_disk(folder / "rows")
        data.queries.save_to_disk(folder / "queries")
    finally:
        if bars:
            datasets.enable_progress_bars()


def _tell_queries(result: AttributionResult, data: DemoData, say: Callable[[str], object]) -> None:
    say(f"   {AttributionResult.SIGN_CONVENTION} Objective: {result.objective}.")

    def words(query: str | int, largest: bool) -> str:
        frame = result.top(2, query, largest=largest)
        return ", ".join(f"{c} ({s:+.2f})" for c, s in zip(frame["cluster"], frame["score"], strict=True))

    for position in np.argsort(result.objective_values)[:3]:
        query = result.query_ids[position]
        label = int(data.queries[int(position)]["labels"])
        say(
            f"   test digit {query} (a {label}, margin {result.objective_values[position]:+.2f}): "
            f"helped most by {words(query, True)}; harmed most by {words(query, False)}"
        )


def _write_report(folder: Path, exhibit: Exhibit, data: DemoData, orders: dict, fidelity: FidelityReport) -> None:
    result, synset = exhibit.result, cast(Synset, exhibit.synset)
    fractions = np.linspace(0.01, 0.5, 50)
    curves = {
        name: np.array([share_found(order, data.flipped, share) for share in fractions])
        for name, order in orders.items()
    }
    inputs = synset.samples.inputs.flatten(0, 1).numpy()
    names = [name for name in synset.clusters.names for _ in range(synset.samples.log_weights.shape[1])]
    drawings = {
        "heatmap": result.plot("heatmap"),
        "bars": result.plot("bars"),
        "synset": plot_synset_gallery(inputs, names, title="The synset"),
        "matching_error": plot_matching_error(
            synset.residuals, synset.matched_states, synset.clusters.names, title="Matching error of the synset"
        ),
        "fidelity": plot_predicted_against_actual(
            *(values - result.objective_values[:, None] for values in fidelity.points[LDS_CLUSTERS]),
            title="Predicted against retrained",
        ),
        "flipped_labels": plot_inspection_curve(fractions, curves, what="flipped labels"),
    }
    (folder / "plots").mkdir(exist_ok=True)
    for name, axes in drawings.items():
        axes.figure.savefig(folder / "plots" / f"{name}.png")  # type: ignore[union-attr]
    hardest = [result.query_ids[i] for i in np.argsort(result.objective_values)[:4]]
    report = attribution_report(exhibit, title="hf-rgm demo: which digits taught the model this?", query_ids=hardest)
    check = report.section("How faithful is this?")
    check.text(str(fidelity))
    check.figure(drawings["fidelity"])
    flips = report.section("Flipped labels")
    flips.table(
        ["first inspected", *orders],
        [[f"{s:.0%}", *(f"{share_found(o, data.flipped, s):.0%}" for o in orders.values())] for s in INSPECTED_SHARES],
    )
    flips.figure(drawings["flipped_labels"])
    samples = report.section("The synset")
    samples.figure(drawings["synset"])
    samples.figure(drawings["matching_error"])
    report.save(folder / REPORT)
