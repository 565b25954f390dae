"""`hf-rgm demo`: a mislabelling vendor is found and removed, on real handwritten digits, without network."""

from __future__ import annotations

import shutil
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
from hf_rgm.attribution.attributor import Attributor
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

VENDORS = tuple(f"vendor {letter}" for letter in "ABCDEFGH")
CULPRIT, TRUE_LABEL, GIVEN_LABEL = "vendor C", 4, 9  # it labels its 4s as 9s
SAMPLES = 10  # of the synset, for each vendor
MARKER = ".hf-rgm-demo"
REPORT = "report.html"
RETRAININGS = "retrainings"
INSPECTED_SHARES = (0.05, 0.1)


@dataclass(frozen=True)
class DemoSettings:
    """Sizes of the demo."""

    num_rows: int = 1200
    num_queries: int = 400
    num_epochs: int = 20
    num_iterations: int = 400  # of distilling, at most
    num_subsets: int = 6  # random halves of the vendors to retrain on, with two seeds each
    wrong_share: float = 0.6  # of the 4s: those that come from `CULPRIT`, with a wrong label
    seed: int = 0


@dataclass
class DemoData:
    """Datasets of `pixel_values` `(1, 8, 8)` float32 and `labels`; training rows also have a `vendor`."""

    train: Dataset
    queries: Dataset
    mislabelled: np.ndarray  # (num_rows,), bool: training rows with a wrong label


def load_data(settings: DemoSettings) -> DemoData:
    """Digits of scikit-learn from several vendors, one of which labels one digit as another."""
    pixels, labels = load_digits(return_X_y=True)
    generator = np.random.default_rng(settings.seed)
    order = generator.permutation(len(labels))
    train, queries = np.split(order[: settings.num_rows + settings.num_queries], [settings.num_rows])
    vendors = generator.integers(0, len(VENDORS), len(train))
    culprit, concerned = VENDORS.index(CULPRIT), labels[train] == TRUE_LABEL
    mislabelled = concerned & (generator.random(len(train)) < settings.wrong_share)
    vendors[concerned & (vendors == culprit)] = 0
    vendors[mislabelled] = culprit
    labels[train[mislabelled]] = GIVEN_LABEL

    def dataset(rows: np.ndarray, **columns: list[str]) -> Dataset:
        images = (pixels[rows].reshape(-1, 1, 8, 8) / 16).astype(np.float32)
        return Dataset.from_dict({"pixel_values": images, "labels": labels[rows], **columns}).with_format("torch")

    return DemoData(dataset(train, vendor=[VENDORS[vendor] for vendor in vendors]), dataset(queries), mislabelled)


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


def share_found(order: np.ndarray, mislabelled: np.ndarray, inspected: float) -> float:
    """Share of the mislabelled rows among the first `inspected` of the order."""
    return float(mislabelled[order[: round(inspected * len(order))]].sum() / mislabelled.sum())


def right_answers(model: torch.nn.Module, dataset: Dataset) -> np.ndarray:
    """Whether the model gives each row its label: `(num_rows,)`, bool."""
    device = next(model.parameters()).device
    with torch.no_grad():
        logits = model.eval()(pixel_values=dataset[:]["pixel_values"].to(device)).logits
    return (logits.argmax(-1).cpu() == dataset[:]["labels"]).numpy()


def run_demo(
    output_dir: str | Path,
    *,
    say: Callable[[str], object],
    settings: DemoSettings | None = None,
    overwrite: bool = False,
    disable_tqdm: bool = False,
) -> Path:
    """Trains, attributes, removes a vendor, distils and checks; returns the folder. `say` receives each line."""
    settings = settings or DemoSettings()
    data = load_data(settings)
    if not data.mislabelled.any():
        raise ValueError(f"`wrong_share` = {settings.wrong_share} makes no label wrong. Raise it.")
    folder = Path(output_dir)
    _begin(folder, overwrite, say)
    build = build_trainer(settings)

    say(f"1. Training a small ViT on {len(data.train)} digits from {len(VENDORS)} vendors ...")
    callback = TrajectoryCallback(folder / "trajectory", overwrite=True)
    trainer = build(data.train, settings.seed, [callback], disable_tqdm)
    start = time.process_time()
    trainer.train()
    training_seconds = time.process_time() - start
    model = cast(ViTForImageClassification, trainer.model)
    model.save_pretrained(folder / "model")
    right = right_answers(model, data.queries)
    if right.all():
        raise ValueError(f"Seed {settings.seed} gives a model that misreads no test digit. Choose another.")
    queries = data.queries.select(np.flatnonzero(~right))
    say(f"   {callback.summary()}")
    say(f"   {right.mean():.1%} of {len(right)} test digits are read rightly, {len(queries)} are not.")

    say(f"2. Which vendor made it misread these {len(queries)}?")
    clusters = ClusterMap.from_column(data.train, "vendor")
    start = time.process_time()
    attribute = AttributionPipeline(
        model, trajectory=folder / "trajectory", rows=data.train, clusters=clusters, disable_tqdm=disable_tqdm
    )
    result = attribute(queries)
    asking = (time.process_time() - start) / training_seconds
    result.save_pretrained(folder / "attributions")
    _save_data(data.train, queries, folder)
    means = result.scores.mean(0)
    worst = result.cluster_names[int(means.argmin())]
    others = np.delete(means, means.argmin())
    say(f"   {AttributionResult.SIGN_CONVENTION} Objective: {result.objective}.")
    say(f"   {worst}: {means.min():+.2f} on average; the others: {others.min():+.2f} to {others.max():+.2f}.")
    say(f"   That took {asking:.1f} trainings. Retraining without each vendor takes {len(VENDORS)}.")

    orders = {
        "row scores": inspection_order(result),
        "training loss": loss_order(attribute.attributor.model, data.train),
    }
    say(
        f"3. Which rows? {CULPRIT} labels its {TRUE_LABEL}s as {GIVEN_LABEL}s: {data.mislabelled.sum()} of "
        f"{len(data.train)} labels are wrong. Inspecting rows in order:"
    )
    for share in INSPECTED_SHARES:
        found = ", ".join(f"{name} {share_found(o, data.mislabelled, share):.0%}" for name, o in orders.items())
        say(f"   first {share:.0%}: {found}, random {share:.0%} of the wrong labels found.")

    say(f"4. The model without {worst} ...")
    without = right_answers(attribute.model_without([worst]), data.queries).mean()
    kept = data.train.select(np.flatnonzero(np.asarray(data.train["vendor"]) != worst))
    retrained = build(kept, settings.seed, (), disable_tqdm)
    retrained.train()
    say(
        f"   reads {without:.1%} of the test digits rightly, without retraining. "
        f"Retrained, it reads {right_answers(cast(torch.nn.Module, retrained.model), data.queries).mean():.1%}."
    )

    say(f"5. Distilling a synset of the {clusters.num_clusters} vendors, to share in place of the digits ...")
    config = DistillationConfig.from_preset(
        "quick", samples_per_cluster=SAMPLES, num_iterations=settings.num_iterations, seed=settings.seed
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

    fidelity = {}
    seeds = (settings.seed + 1, settings.seed + 2)
    budget = len(seeds) * settings.num_subsets
    say(f"6. Checking: {budget} retrainings, each on a random half of the vendors, with two seeds ...")
    for name, attributor in {
        "the digits": attribute.attributor,
        "the synset alone": Attributor(model, synset, disable_tqdm=disable_tqdm),
    }.items():
        fidelity[name] = FidelityReport.measure(
            attributor,
            queries,
            build,
            data.train,
            budget=budget,
            measures=[LDS_CLUSTERS],
            seeds=seeds,
            output_dir=folder / RETRAININGS,
            seed=settings.seed,
            disable_tqdm=disable_tqdm,
        )
    by_rows, alone = fidelity.values()
    for name, report in fidelity.items():
        agreement = report.agreements[LDS_CLUSTERS]
        say(f"   Rank correlation of predicted with retrained margins (LDS), by {name}: {agreement.estimate}.")
    agreement = by_rows.agreements[LDS_CLUSTERS]
    say(f"   Retraining with another seed reaches {agreement.ceiling}. Means over {len(queries)} misread digits.")
    say(
        f"   This is about order. In size, retrained effects are {agreement.slope} times the sums of scores; "
        "`result.calibrated(report)` multiplies by that (docs/method.md, sizes)."
    )
    synset.fidelity, result.metadata["fidelity"] = alone.to_dict(), by_rows.to_dict()
    synset.save_pretrained(folder / "synset")
    result.save_pretrained(folder / "attributions")
    exhibit = Exhibit(result, synset=synset, rows=data.train, queries=queries)
    _write_report(folder, exhibit, data.mislabelled, orders, by_rows)
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
    shutil.rmtree(folder / RETRAININGS, ignore_errors=True)  # of an earlier demo, perhaps with another recipe
    (folder / REPORT).unlink(missing_ok=True)  # written last: without it the demo is unfinished
    (folder / MARKER).write_text("Written by `hf-rgm demo`, which may replace this folder's content.\n")


def _save_data(train: Dataset, queries: Dataset, folder: Path) -> None:
    """Saves rows and queries for the explorer, without progress bars."""
    bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        train.save_to_disk(folder / "rows")
        queries.save_to_disk(folder / "queries")
    finally:
        if bars:
            datasets.enable_progress_bars()


def _write_report(
    folder: Path, exhibit: Exhibit, mislabelled: np.ndarray, orders: dict, fidelity: FidelityReport
) -> None:
    result, synset = exhibit.result, cast(Synset, exhibit.synset)
    fractions = np.linspace(0.01, 0.5, 50)
    curves = {
        name: np.array([share_found(order, mislabelled, share) for share in fractions])
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
        "wrong_labels": plot_inspection_curve(fractions, curves, what="wrong labels"),
    }
    (folder / "plots").mkdir(exist_ok=True)
    for name, axes in drawings.items():
        axes.figure.savefig(folder / "plots" / f"{name}.png")  # type: ignore[union-attr]
    hardest = [result.query_ids[i] for i in np.argsort(result.objective_values)[:4]]
    report = attribution_report(
        exhibit, title="hf-rgm demo: which vendor made the model misread these digits?", query_ids=hardest
    )
    check = report.section("How faithful is this?")
    check.text(str(fidelity))
    check.figure(drawings["fidelity"])
    labels = report.section("Wrong labels")
    labels.table(
        ["first inspected", *orders],
        [[f"{s:.0%}", *(f"{share_found(o, mislabelled, s):.0%}" for o in orders.values())] for s in INSPECTED_SHARES],
    )
    labels.figure(drawings["wrong_labels"])
    samples = report.section("The synset")
    samples.figure(drawings["synset"])
    samples.figure(drawings["matching_error"])
    report.save(folder / REPORT)
