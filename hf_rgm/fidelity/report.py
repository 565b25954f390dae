"""How faithful an attributor is to retraining, measured with a budget."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_rgm.artefacts import printable
from hf_rgm.attribution.attributor import Attributor
from hf_rgm.engines.objectives import Objective, resolve_objective
from hf_rgm.fidelity.budget import LDS_CLUSTERS, LDS_ROWS, LEAVE_CLUSTER_OUT, MEASURES, plan_retrainings
from hf_rgm.fidelity.predictions import evaluation_identity, predicted_values, subset_masks
from hf_rgm.fidelity.processes import Launch
from hf_rgm.fidelity.retraining import BuildTrainer, retrain
from hf_rgm.fidelity.scores import Estimate, leave_cluster_out_correlation, linear_datamodeling_score, noise_ceiling
from hf_rgm.fidelity.subsets import kept_rows
from hf_rgm.rows import DataCollator

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
DESCRIPTIONS = {
    LDS_CLUSTERS: "random halves of the clusters (LDS)",
    LEAVE_CLUSTER_OUT: "single clusters left out",
    LDS_ROWS: "random halves of the rows (LDS)",
}


@dataclass(frozen=True)
class Agreement:
    """
    One measure of agreement with retraining.

    Args:
        estimate ([`Estimate`]): Mean over queries of the rank correlation of predicted with retrained values.
        num_points (`int`): Subsets that were retrained, once a seed.
        ceiling ([`Estimate`], *optional*): The same for one seed's retraining against the other seeds: what a perfect
            method could be expected to reach. `None` if there was one seed only.
    """

    estimate: Estimate
    num_points: int
    ceiling: Estimate | None = None


@dataclass(frozen=True)
class FidelityReport:
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
    - random halves of the clusters (LDS): 0... [0..., ...] over 6 retrained subsets
    1 is perfect agreement, 0 none. With one seed the noise ceiling, what retraining itself reaches, is unknown.
    >>> synset.fidelity = report.to_dict()
    >>> FidelityReport.from_dict(Synset.from_pretrained(synset.save_pretrained("synset")).fidelity) == report
    True

    ```
    """

    agreements: dict[str, Agreement]
    engine: str
    objective: str
    num_queries: int
    seeds: tuple[int, ...]
    rows: bool
    samples_sha256: str
    settings: dict[str, float] = field(default_factory=dict)
    points: dict[str, tuple[NDArray[np.floating], NDArray[np.floating]]] = field(
        default_factory=dict, compare=False, repr=False
    )

    def __post_init__(self) -> None:
        if not self.agreements or not set(self.agreements) <= set(MEASURES):
            raise ValueError(
                f"`agreements` must hold some of {', '.join(MEASURES)}, got {', '.join(self.agreements) or 'nothing'}."
            )

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
        Retrains on subsets, within a budget, and compares with what the attributor says of them.

        How the budget is spent, and why, is written at [`~hf_rgm.fidelity.budget.plan_retrainings`]: random halves of
        the clusters first, with two seeds from 24 retrainings on; then, from 48 and 72 on, single clusters left out
        and, with `rows=True`, random halves of the rows. Replay engines replay the very subset of clusters; the
        adjoint, and every engine for subsets of rows, predicts it by the sum of the scores of what is kept. Under
        `torchrun` the retrainings are shared among processes, see [`~hf_rgm.fidelity.retraining.retrain`].

        Args:
            attributor (`Attributor`): What to measure.
            queries: Rows with labels that were not used to choose any setting.
            build_trainer (`Callable`): `build_trainer(dataset, seed)` returns a fresh `Trainer` with the recipe of the
                recorded run.
            train_dataset: The dataset of the recorded run.
            budget (`int`, *optional*, defaults to `24`): Models to train at most.
            measures (`Sequence[str]`, *optional*): Out of `"lds_clusters"`, `"leave_cluster_out"` and `"lds_rows"`
                (with `rows=True`); they share the budget. Defaults to what the budget allows.
            seeds (`Sequence[int]`, *optional*): Seeds of the retrainings; each subset is trained with each. Defaults
                to one or two, by the budget, other than the recorded runs'.
            engine (`str`, *optional*): As in [`Attributor.attribute`].
            rows (`bool`, *optional*, defaults to `False`): Whether an attributor that has no rows is given them, so
                that clusters are scored by their real gradients, and rows too. Else the synset alone is measured,
                which is all that those have who are given it.
            objective (`str` or `Objective`, *optional*, defaults to `"margin"`): What is predicted.
            rewind (*optional*): As in [`Attributor.attribute`].
            data_collator (`Callable`, *optional*): Collates queries and rows. Defaults to `default_data_collator`.
            output_dir (`str` or `Path`, *optional*): Keeps finished retrainings, apart for other queries or another
                objective's name; another recipe needs another folder.
            seed (`int`, *optional*, defaults to `0`): Seed of the subsets and the bootstrap.
            disable_tqdm (`bool`, *optional*, defaults to `False`): No progress bar.

        Returns:
            [`FidelityReport`]

        Raises:
            ValueError: Before any training, if the budget is too small, queries have no labels, the dataset is not the
                recorded one, or the engine predicts the same of every subset.
        """
        with_rows = rows or attributor.rows is not None
        chosen = attributor.engine(engine, rows=train_dataset if rows else None, rewind=rewind)
        subject, objective = attributor.subject, resolve_objective(objective)
        clusters = subject.clusters
        recorded_seeds = {run.metadata.get("seeds", {}).get("seed") for run in subject.trajectories}
        plan = plan_retrainings(
            budget,
            num_clusters=clusters.num_clusters,
            num_rows=clusters.num_rows,
            row_scores=with_rows and objective.differentiable,
            measures=measures,
            seeds=seeds,
            recorded_seeds=recorded_seeds,
        )
        for repeated in recorded_seeds.intersection(plan.seeds):
            logger.warning(
                "Retraining with seed %s, that of a recorded run, agrees better than with others. Choose other "
                "`seeds` to learn about retraining in general.",
                repeated,
            )
        subject.trajectory.check_dataset(train_dataset)
        masks = {name: subset_masks(name, count, clusters, seed) for name, count in plan.num_points.items()}
        settings = {} if rewind is None else {"rewind": rewind}
        folder = None
        if output_dir is not None:
            folder = Path(output_dir) / evaluation_identity(attributor.model, queries, objective, data_collator)
        # Joined processes cannot retrain each on its own afterwards.
        with Launch.from_environment().alone():
            predicted = predicted_values(
                attributor,
                queries,
                masks,
                engine=chosen.name,
                objective=objective,
                rows=train_dataset if rows else None,
                data_collator=data_collator,
                **settings,
            )
        subsets = [
            subset
            for name, part in masks.items()
            for subset in kept_rows(part, None if name == LDS_ROWS else clusters)
        ]
        values = retrain(
            build_trainer,
            train_dataset,
            subsets,
            queries,
            seeds=plan.seeds,
            objective=objective,
            data_collator=data_collator,
            output_dir=folder,
            disable_tqdm=disable_tqdm,
        )
        ends = np.cumsum(list(plan.num_points.values()))[:-1]
        parts = dict(zip(masks, np.split(values.transpose(1, 2, 0), ends, axis=2), strict=True))
        return cls(
            agreements={name: _agreement(name, predicted[name], part, seed) for name, part in parts.items()},
            engine=chosen.name,
            objective=objective.name,
            num_queries=values.shape[2],
            seeds=plan.seeds,
            rows=with_rows,
            samples_sha256=subject.samples_sha256,
            settings=settings,
            points={name: (predicted[name], part.mean(0)) for name, part in parts.items()},
        )

    @property
    def num_retrainings(self) -> int:
        """Models that were trained."""
        return sum(agreement.num_points for agreement in self.agreements.values()) * len(self.seeds)

    @property
    def source(self) -> str:
        """What the engine had, in words."""
        if not self.rows:
            return "on the synset alone"
        return "on synset and training rows" if self.samples_sha256 else "on the training rows"

    def __str__(self) -> str:
        seeds = f"{'seeds' if len(self.seeds) > 1 else 'seed'} {' and '.join(map(str, self.seeds))}"
        queries = "1 query" if self.num_queries == 1 else f"{self.num_queries} queries"
        lines = [
            f"Agreement of the {self.engine} engine {self.source} with {self.num_retrainings} retrainings "
            f"({seeds}), objective {self.objective}, mean over {queries}, 95% intervals:"
        ]
        for name, agreement in self.agreements.items():
            ceiling = "" if agreement.ceiling is None else f"; noise ceiling {agreement.ceiling}"
            lines.append(
                f"- {DESCRIPTIONS[name]}: {agreement.estimate} over {agreement.num_points} retrained subsets{ceiling}"
            )
        scale = "1 is perfect agreement, 0 none."
        if len(self.seeds) > 1:
            lines.append(f"{scale} Noise ceiling: how well retraining with one seed agrees with the others.")
        else:
            lines.append(f"{scale} With one seed the noise ceiling, what retraining itself reaches, is unknown.")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-safe values, with a `format_version`."""
        content = asdict(replace(self, points={}))
        del content["points"]
        return {"format_version": FORMAT_VERSION, **content, "seeds": list(self.seeds)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> FidelityReport:
        """
        What [`FidelityReport.to_dict`] gave.

        Raises:
            ValueError: If it is of another format version, or not a whole report.
        """
        if not isinstance(content, Mapping) or content.get("format_version") != FORMAT_VERSION:
            found = content.get("format_version") if isinstance(content, Mapping) else type(content).__name__
            raise ValueError(
                f"The fidelity report has format version {found}, this release of hf_rgm reads {FORMAT_VERSION}. "
                "Install the release that wrote it, or measure again."
            )
        try:
            return cls(
                agreements={name: _read_agreement(part) for name, part in content["agreements"].items()},
                engine=printable(str(content["engine"])),
                objective=printable(str(content["objective"])),
                num_queries=int(content["num_queries"]),
                seeds=tuple(int(seed) for seed in content["seeds"]),
                rows=bool(content["rows"]),
                samples_sha256=str(content["samples_sha256"]),
                settings={printable(name): _number(value) for name, value in content["settings"].items()},
            )
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise ValueError(f"The fidelity report is damaged ({error!r}). Measure again.") from error


def check_kept_report(content: Mapping[str, Any] | None, where: str) -> None:
    """
    Checks the report that an artefact keeps, if it has one.

    Args:
        content (`Mapping`, *optional*): What [`FidelityReport.to_dict`] gave.
        where (`str`): How the error calls it.

    Raises:
        ValueError: See [`FidelityReport.from_dict`].
    """
    if content is not None:
        try:
            FidelityReport.from_dict(content)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error


def _agreement(name: str, predicted: NDArray[np.floating], by_seed: NDArray[np.floating], seed: int) -> Agreement:
    """`predicted` is `(num_values, num_points)`, `by_seed` `(num_seeds, num_values, num_points)`."""
    correlate = leave_cluster_out_correlation if name == LEAVE_CLUSTER_OUT else linear_datamodeling_score

    def measure(left: NDArray[np.floating], right: NDArray[np.floating]) -> Estimate:
        return correlate(left, right, seed=seed)

    return Agreement(
        measure(predicted, by_seed.mean(0)),
        predicted.shape[1],
        noise_ceiling(by_seed, measure) if len(by_seed) > 1 else None,
    )


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no number")
    return value


def _read_agreement(content: Mapping[str, Any]) -> Agreement:
    ceiling = content["ceiling"]
    return Agreement(
        _read_estimate(content["estimate"]),
        int(content["num_points"]),
        None if ceiling is None else _read_estimate(ceiling),
    )


def _read_estimate(content: Mapping[str, Any]) -> Estimate:
    value, low, high = (None if content[name] is None else float(content[name]) for name in ("value", "low", "high"))
    if value is None or not all(math.isfinite(bound) for bound in (value, low, high) if bound is not None):
        raise ValueError(f"{dict(content)} is not an estimate")
    return Estimate(value, low, high, int(content["num_nan"]))
