"""Fidelity of an attributor to retraining, measured with a budget."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hf_rgm.agreement.budget import LDS_CLUSTERS, LDS_ROWS, LEAVE_CLUSTER_OUT, plan_retrainings
from hf_rgm.agreement.correlations import (
    Array,
    leave_cluster_out_correlation,
    linear_datamodeling_score,
    noise_ceiling,
    retrained_slope,
)
from hf_rgm.agreement.fidelity_figures import Agreement, FidelityFigures
from hf_rgm.agreement.subsets import kept_rows, random_masks
from hf_rgm.attribution.attributor import Attributor
from hf_rgm.clusters.cluster_map import ClusterMap
from hf_rgm.engines.objectives import Objective, resolve_objective
from hf_rgm.engines.registry import ENGINES
from hf_rgm.fidelity.launch import Launch
from hf_rgm.fidelity.retraining import BuildTrainer, retrain
from hf_rgm.model.functional_model import FunctionalModel
from hf_rgm.model.row_reader import DataCollator, RowReader

logger = logging.getLogger(__name__)

ByMeasure = dict[str, Array]


class FidelityReport(FidelityFigures):
    """
    How well an attributor's answers agree with retraining. Made by [`FidelityReport.measure`].

    Args:
        agreements (`dict[str, Agreement]`): By measure: `"lds_clusters"` and `"lds_rows"`, rank correlation over
            random halves of the clusters or rows; `"leave_cluster_out"`, over single clusters left out.
        engine (`str`): The engine that answered.
        objective (`str`): Name of the objective.
        num_queries (`int`): Values the correlations are averaged over: queries, or one for objectives over a set.
        seeds (`tuple[int, ...]`): Seeds of the retrainings.
        rows (`bool`): Whether the attributor was given the training rows.
        samples_sha256 (`str`): The synset that was measured, see [`Synset.samples_sha256`]; empty without a synset.
        parameters_sha256 (`str`, *optional*): The trained model that was measured.
        settings (`dict[str, float]`, *optional*): Settings of the engine other than its defaults.
        points (`dict[str, tuple[np.ndarray, np.ndarray]]`, *optional*): By measure, for plots: predicted values and
            retrained ones, mean over seeds, each `(num_values, num_subsets)`. Not kept in artefacts.

    Raises:
        ValueError: If there is no measure, or one is unknown.

    Example:

    ```python
    >>> from hf_rgm import Attributor, FidelityReport, Synset
    >>> from hf_rgm.testing import tiny_recorded_run, tiny_synset, tiny_trainer
    >>> run = tiny_recorded_run()
    >>> synset = Synset.from_pretrained(tiny_synset().save_pretrained("synset"))
    >>> report = FidelityReport.measure(
    ...     Attributor(run.model, synset), run.queries, tiny_trainer, run.train_dataset, budget=6, disable_tqdm=True
    ... )
    >>> print(report)
    Agreement of the linearized_replay engine on the synset alone with 6 retrainings (seed 1), objective margin, mean
    over 12 queries, 95% intervals:
    - random halves of the clusters (LDS): 0... [0..., ...] over 6 retrained subsets; retrained effects are ... times
    the scores
    1 is perfect agreement, 0 none. With one seed the noise ceiling, what retraining itself reaches, is unknown.
    >>> synset.fidelity = report.to_dict()
    >>> FidelityReport.from_dict(Synset.from_pretrained(synset.save_pretrained("synset")).fidelity) == report
    True

    ```
    """

    @classmethod
    def measure(
        cls,
        attributor: Attributor,
        queries: Any,
        build_trainer: BuildTrainer,
        train_dataset: Any,
        *,
        budget: int = 24,
        measures: Sequence[str] | None = None,
        seeds: Sequence[int] | None = None,
        engine: str | None = None,
        rows: bool = False,
        objective: str | Objective = "margin",
        rewind: float | None = None,
        data_collator: DataCollator | None = None,
        output_dir: str | Path | None = None,
        seed: int = 0,
        disable_tqdm: bool = False,
    ) -> FidelityReport:
        """
        Retrains on subsets, within a budget, and compares with the attributor's predictions for them.

        Random halves of the clusters come first, with two seeds from 24 retrainings on; then, from 48 and 72 on,
        single clusters left out and, with `rows=True`, random halves of the rows (see
        [`~hf_rgm.agreement.budget.plan_retrainings`]). Replay engines replay the subset of clusters itself; the
        adjoint, and every engine for subsets of rows, sums the scores of the kept clusters or rows. Under
        `torchrun` the retrainings are shared among processes, see [`~hf_rgm.fidelity.retraining.retrain`].

        Args:
            attributor (`Attributor`): The attributor to measure.
            queries: Rows with labels that were not used to choose settings.
            build_trainer (`Callable`): `build_trainer(dataset, seed)` returns a fresh `Trainer` with the recipe of the
                recorded run.
            train_dataset: The dataset of the recorded run.
            budget (`int`, *optional*, defaults to `24`): Models to train at most.
            measures (`Sequence[str]`, *optional*): Out of `"lds_clusters"`, `"leave_cluster_out"` and `"lds_rows"`
                (with `rows=True`); they share the budget. Defaults to what the budget allows.
            seeds (`Sequence[int]`, *optional*): Seeds of the retrainings; each subset is trained with each. Defaults
                to one or two, by the budget, other than the recorded runs'.
            engine (`str`, *optional*): As in [`Attributor.attribute`].
            rows (`bool`, *optional*, defaults to `False`): Whether an attributor without rows is given them, so that
                clusters are scored by their real gradients, and rows too. Otherwise the synset alone is measured.
            objective (`str` or `Objective`, *optional*, defaults to `"margin"`): The objective that is predicted.
            rewind (*optional*): As in [`Attributor.attribute`].
            data_collator (`Callable`, *optional*): Collates queries and rows. Defaults to `default_data_collator`.
            output_dir (`str` or `Path`, *optional*): Keeps finished retrainings, separately for other queries or
                another objective's name; another recipe needs another folder.
            seed (`int`, *optional*, defaults to `0`): Seed of the subsets and the bootstrap.
            disable_tqdm (`bool`, *optional*, defaults to `False`): No progress bar.

        Returns:
            [`FidelityReport`]

        Raises:
            ValueError: Before any training, if the budget is too small, queries have no labels, the dataset is not the
                recorded one, or the engine predicts the same for every subset.
        """
        with_rows = rows or attributor.rows is not None
        chosen = attributor.engine(engine, rows=train_dataset if rows else None, rewind=rewind)
        subject, objective = attributor.subject, resolve_objective(objective, attributor.model)
        clusters = subject.clusters
        recorded_seeds = {run.metadata.get("seeds", {}).get("seed") for run in subject.trajectories}
        num_points, seeds = plan_retrainings(
            budget,
            num_clusters=clusters.num_clusters,
            num_rows=clusters.num_rows,
            row_scores=with_rows and objective.differentiable,
            measures=measures,
            seeds=seeds,
            recorded_seeds=recorded_seeds,
        )
        for repeated in recorded_seeds.intersection(seeds):
            logger.warning(
                "Retraining with seed %s, that of a recorded run, agrees better than with others. Choose other "
                "`seeds` to learn about retraining in general.",
                repeated,
            )
        subject.trajectory.check_dataset(train_dataset)
        masks = {name: _subset_masks(name, count, clusters, seed) for name, count in num_points.items()}
        settings = {} if rewind is None else {"rewind": rewind}
        folder = None
        if output_dir is not None:
            folder = Path(output_dir) / _evaluation_identity(attributor.model, queries, objective, data_collator)
        # Once joined, processes could no longer retrain each on its own.
        with Launch.from_environment().alone():
            predicted, scored = _predicted_values(
                attributor,
                queries,
                masks,
                engine=chosen.name,
                objective=objective,
                rows=train_dataset if rows else None,
                data_collator=data_collator,
                **settings,
            )
        subsets = [kept_rows(part, None if name == LDS_ROWS else clusters) for name, part in masks.items()]
        values = retrain(
            build_trainer,
            train_dataset,
            sum(subsets, []),
            queries,
            seeds=seeds,
            objective=objective,
            data_collator=data_collator,
            row_loss=subject.row_loss.function,
            output_dir=folder,
            disable_tqdm=disable_tqdm,
        )
        ends = np.cumsum(list(num_points.values()))[:-1]
        parts = dict(zip(masks, np.split(values.transpose(1, 2, 0), ends, axis=2), strict=True))
        return cls(
            agreements={name: _agreement(name, predicted, scored, part, seed) for name, part in parts.items()},
            engine=chosen.name,
            objective=objective.name,
            num_queries=values.shape[2],
            seeds=seeds,
            rows=with_rows,
            samples_sha256=subject.samples_sha256,
            parameters_sha256=subject.parameters_sha256,
            settings=settings,
            points={name: (predicted[name], part.mean(0)) for name, part in parts.items()},
        )


def _agreement(name: str, predicted: ByMeasure, scored: ByMeasure, by_seed: Array, seed: int) -> Agreement:
    """`predicted` and `scored` are `(num_values, num_points)`, `by_seed` `(num_seeds, num_values, num_points)`."""
    correlate = leave_cluster_out_correlation if name == LEAVE_CLUSTER_OUT else linear_datamodeling_score
    measure = partial(correlate, seed=seed)
    return Agreement(
        measure(predicted[name], by_seed.mean(0)),
        by_seed.shape[2],
        noise_ceiling(by_seed, measure) if len(by_seed) > 1 else None,
        None if name not in scored else retrained_slope(scored[name], by_seed.mean(0), seed=seed),
    )


def _subset_masks(name: str, count: int, clusters: ClusterMap, seed: int) -> NDArray[np.bool_]:
    """Subsets of a measure: masks `(count, num_clusters)` or, for rows, `(count, num_rows)`, bool."""
    if name == LEAVE_CLUSTER_OUT:
        chosen = np.random.default_rng(seed).permutation(clusters.num_clusters)[:count]
        return ~np.eye(clusters.num_clusters, dtype=bool)[np.sort(chosen)]
    return random_masks(clusters.num_rows if name == LDS_ROWS else clusters.num_clusters, count, seed=seed)


def _evaluation_identity(
    model: FunctionalModel, queries: Any, objective: Objective, data_collator: DataCollator | None
) -> str:
    """Digest of queries and objective, which keeps retrainings of different ones apart."""
    reader = RowReader(queries, model, data_collator=data_collator, what="queries")
    inputs, labels = reader.batch(range(len(reader)))
    digest = hashlib.sha256(objective.name.encode())
    for name, tensor in sorted({**inputs, "labels": labels}.items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _predicted_values(
    attributor: Attributor, queries: Any, masks: dict[str, NDArray[np.bool_]], *, engine: str, **options: Any
) -> tuple[ByMeasure, ByMeasure]:
    """Predictions for subsets by measure, and sums of scores, `(num_values, num_masks)`, up to a constant for each."""
    weights = {name: mask.astype(np.float32) for name, mask in masks.items()}
    predicted, scored = {}, {}
    if ENGINES[engine].needs not in ("rows", "samples") or LDS_ROWS in weights:  # else a score takes a replay each
        result = attributor.attribute(queries, engine=engine, **options)
        scores = {LDS_ROWS: result.row_scores, LDS_CLUSTERS: result.scores, LEAVE_CLUSTER_OUT: result.scores}
        scored = {name: scores[name] @ weight.T for name, weight in weights.items()}
    for name, weight in weights.items():
        predicted[name] = scored.get(name)
        if engine != "adjoint" and name != LDS_ROWS:
            replayed = attributor.replayed_values(queries, torch.from_numpy(weight), engine=engine, **options)
            predicted[name] = replayed.T
    if LEAVE_CLUSTER_OUT in weights:
        scored.setdefault(LEAVE_CLUSTER_OUT, predicted[LEAVE_CLUSTER_OUT])
    for name, values in predicted.items():
        if (values == values[:, :1]).all():
            raise ValueError(
                f"The {engine} engine predicts the same of every subset of {name!r}: there is nothing to correlate. "
                "Check that the objective depends on the training data."
            )
    return predicted, scored
