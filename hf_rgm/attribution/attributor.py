"""Questions to a synset: scores of clusters and rows, and the model without some clusters."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_rgm.attribution.linearized import LinearizedReplayEngine
from hf_rgm.attribution.mixture import MixtureSuggestion, check_request, maximized_by_default, trusted_mixture
from hf_rgm.attribution.objectives import Objective, Queries, resolve_objective
from hf_rgm.attribution.replay import ReplayEngine
from hf_rgm.attribution.result import AttributionResult
from hf_rgm.attribution.runs import RecordedRun, check_options, read_training_rows, warn_unless_matched
from hf_rgm.attribution.unlearned import UnlearnedModel, compare_losses
from hf_rgm.losses import LossFunction, RowLoss
from hf_rgm.modeling import FunctionalModel
from hf_rgm.out_of_memory import advice_on_memory
from hf_rgm.rows import DataCollator, RowReader
from hf_rgm.synset.compatibility import check_samples
from hf_rgm.synset.costs import CostEstimate
from hf_rgm.synset.inputs import SPACES, input_space
from hf_rgm.synset.synset import Synset

logger = logging.getLogger(__name__)


class Attributor:
    """
    Answers attribution questions about one trained model, without retraining.

    Args:
        model (`nn.Module`): The trained model the synset was distilled for.
        synset (`Synset`, `str` or `Path`): The synset, or its folder.
        device (`torch.device`, *optional*): Where to compute. Defaults to the model's device.
        row_loss (`Callable`, *optional*): The one the synset was distilled with, where it was; needed to score rows.
        force (`bool`, *optional*, defaults to `False`): Accept a model whose parameters are not the synset's.
        disable_tqdm (`bool`, *optional*, defaults to `False`): No progress bars.

    Raises:
        ParameterMismatchError: If model and synset do not belong together.
        ValueError: If the model does not take the synset's samples.
    """

    def __init__(
        self,
        model: nn.Module,
        synset: Synset | str | Path,
        *,
        device: torch.device | str | None = None,
        row_loss: LossFunction | None = None,
        force: bool = False,
        disable_tqdm: bool = False,
    ) -> None:
        self.synset = synset if isinstance(synset, Synset) else Synset.from_pretrained(synset)
        self._original = model
        names = tuple(self.synset.trajectory.parameter_shapes)
        self.model = FunctionalModel(model, trainable_names=names, device=device)
        self.synset.check_model(self.model, force=force)
        warn_unless_matched(self.synset)
        name = self.synset.input_name
        self.inputs = input_space(self.model, name if name in SPACES else "auto")
        if self.inputs.name != name:
            raise ValueError(
                f"The synset's samples are `{name}`, the model takes `{self.inputs.name}`. Pass the "
                "model that was recorded."
            )
        check_samples(self.model, self.inputs, self.synset.samples)
        self.samples = self.synset.samples.map(lambda tensor: tensor.to(self.model.device))
        self.row_loss = RowLoss(
            labels_per_row=float(self.synset.metadata.get("labels_per_row", 1.0)),
            label_smoothing=float(self.synset.metadata.get("label_smoothing_factor", 0.0)),
            function=row_loss,
        )
        self.disable_tqdm = disable_tqdm
        self._final = self.model.space.flatten(self.model.parameters())
        self._runs = [
            RecordedRun(
                self.model,
                self.inputs,
                self.samples,
                self.synset.clusters,
                trajectory,
                self.row_loss,
                disable_tqdm=disable_tqdm,
            )
            for trajectory in self.synset.trajectories
        ]

    @advice_on_memory("Attributing", "Lower `Attributor(max_memory=...)`, or pass fewer queries at once.")
    def attribute(
        self,
        queries: Any,
        *,
        engine: str = "linearized_replay",
        objective: str | Objective = "margin",
        rows: Any = None,
        data_collator: DataCollator | None = None,
        rewind: float | None = None,
        stride: int | None = None,
        num_masks: int | None = None,
        seed: int = 0,
        query_ids: Sequence[Any] | None = None,
    ) -> AttributionResult:
        """
        Scores of every cluster, and of every row where the training rows are given.

        Args:
            queries: Rows to explain: a dataset, or a list of dictionaries. Without labels, the model's own predictions
                are explained.
            engine (`str`, *optional*, defaults to `"linearized_replay"`): What scores the clusters:
                `"linearized_replay"` (each left out, to first order in the parameters), `"adjoint"` (derivatives; its
                cost does not depend on the number of clusters), `"replay"` (anchored) or `"plain_replay"`.
            objective (`str` or `Objective`, *optional*, defaults to `"margin"`): What to explain.
            rows (*optional*): The training dataset. Clusters are then scored by their real gradients in place of the
                synset's, and every row by the adjoint where the objective is differentiable. For
                `"linearized_replay"` and `"adjoint"`.
            data_collator (`Callable`, *optional*): Collates queries and rows. Defaults to `default_data_collator`.
            rewind (`float`, *optional*): Fraction of training to go back to. Defaults to the engine's.
            stride (`int`, *optional*): Training steps per integration step. Defaults to the engine's.
            num_masks (`int`, *optional*): For replay engines: regress on this many random halves of the clusters
                instead of leaving each out.
            seed (`int`, *optional*, defaults to `0`): Seed of the random masks.
            query_ids (`Sequence`, *optional*): Names of the queries. Defaults to their positions.

        Returns:
            `AttributionResult`: positive where presence raises the objective.

        Raises:
            MemoryError: If memory runs out; says which setting to lower.
            ValueError: If engine, objective, queries or rows do not fit each other, or the adjoint is asked for an
                objective without gradient.
        """
        check_options(engine, rows=rows, num_masks=num_masks)
        objective = resolve_objective(objective)
        batch = self._queries(queries, data_collator)
        row_reader = self._row_reader(rows, data_collator) if rows is not None else None
        settings = {name: value for name, value in {"rewind": rewind, "stride": stride}.items() if value is not None}
        with self.model.differentiable():
            values = objective.values(self.model, self._final, batch)
            runs = [
                run.scores(engine, objective, batch, row_reader=row_reader, num_masks=num_masks, seed=seed, **settings)
                for run in self._runs
            ]
        scores = torch.stack([run.scores for run in runs]).mean(0)
        row_scores = None
        if runs[0].row_scores is not None:
            row_scores = torch.stack([run.row_scores for run in runs if run.row_scores is not None]).mean(0)
        if query_ids is None:
            per_query = len(values) == len(batch)
            query_ids = range(len(values)) if per_query else [f"{objective.name} {i}" for i in range(len(values))]
        return AttributionResult(
            scores=scores.cpu().numpy(),
            row_scores=None if row_scores is None else row_scores.cpu().numpy(),
            cluster_names=self.synset.clusters.names,
            cluster_sizes=self.synset.clusters.sizes,
            cluster_ids=self.synset.clusters.cluster_ids,
            query_ids=list(query_ids),
            objective=objective.name,
            objective_values=values.cpu().numpy(),
            engine=engine,
            metadata={
                "rewind_step": runs[0].start,
                "stride": runs[0].stride,
                "num_steps": self.synset.trajectory.num_steps,
                "num_runs": len(runs),
                "num_masks": num_masks,
                "used_rows": rows is not None,
                "model": self.synset.model_description,
                "fidelity": self.synset.fidelity,
                "parameters_sha256": self.synset.parameters_sha256,
            },
        )

    def estimate(self, queries: Any, *, num_queries: int | None = None, **settings: Any) -> CostEstimate:
        """
        What [`Attributor.attribute`] will need, from a little of each part of the work on the first recorded run.

        Args:
            queries: Rows to explain, or a few of them.
            num_queries (`int`, *optional*): How many there will be. Defaults to those given.
            settings: As in [`Attributor.attribute`], but for `seed` and `query_ids`.

        Returns:
            [`~hf_rgm.synset.costs.CostEstimate`]: its disk is that of the saved result.
        """
        given = {name: value for name, value in settings.items() if value is not None}
        options = {"engine": "linearized_replay", "num_masks": None, "rows": None, **given}
        check_options(options["engine"], rows=options["rows"], num_masks=options["num_masks"])
        objective, collator = resolve_objective(options.pop("objective", "margin")), options.pop("data_collator", None)
        batch, rows = self._queries(queries, collator), options.pop("rows")
        options |= {"objective": objective, "queries": batch, "num_queries": num_queries or len(batch)}
        options["row_reader"] = self._row_reader(rows, collator) if rows is not None else None
        with self.model.differentiable():
            first = self._runs[0].estimate(**options)
        return replace(first, seconds=len(self._runs) * first.seconds)

    def replayed_values(
        self,
        queries: Any,
        masks: Tensor,
        *,
        objective: str | Objective = "margin",
        engine: str = "linearized_replay",
        rows: Any = None,
        data_collator: DataCollator | None = None,
        **settings: Any,
    ) -> np.ndarray:
        """
        The objective of models replayed under given cluster weights.

        Args:
            queries: Rows to evaluate.
            masks (`Tensor`): `(num_masks, num_clusters)`, weights, not negative: 1 for as it was, 0 for absent.
            objective (`str` or `Objective`, *optional*, defaults to `"margin"`): What to evaluate.
            engine (`str`, *optional*, defaults to `"linearized_replay"`): Or `"replay"`, `"plain_replay"`.
            rows (*optional*): The training dataset, for real cluster gradients (`"linearized_replay"` only).
            data_collator (`Callable`, *optional*): Collates queries and rows. Defaults to `default_data_collator`.
            settings: `rewind` and `stride` of the engine.

        Returns:
            `np.ndarray`: `(num_masks, num_values)`, float32. With several recorded runs, the mean over them; anchored
            engines add the mean change to the value of the model itself.
        """
        objective = resolve_objective(objective)
        batch = self._queries(queries, data_collator)
        row_reader = self._row_reader(rows, data_collator) if rows is not None else None
        with self.model.differentiable():
            values = objective.values(self.model, self._final, batch)
            by_run = []
            for run in self._runs:
                replay = run.replay_engine(engine, row_reader=row_reader, **settings)
                replayed = run.replayed_values(replay, objective, batch, masks)
                if replay.anchored and run is not self._runs[0]:
                    replayed = values + replayed - objective.values(self.model, run.final, batch)
                by_run.append(replayed)
        return torch.stack(by_run).mean(0).cpu().numpy()

    def model_without(self, clusters: Iterable[str | int], *, rewind: float | None = None) -> nn.Module:
        """
        The model as it would be had these clusters never been trained on, by anchored replay.

        Args:
            clusters (`Iterable[str | int]`): Names or indices of the clusters to remove.
            rewind (`float`, *optional*): Fraction of training to go back to. Defaults to the engine's.

        Returns:
            `nn.Module`: a copy of the model of the same class, in evaluation mode.

        Raises:
            KeyError, IndexError: If there is no cluster of a name or index.
            ValueError: If none or all are named.
        """
        return self._module(self._without(self._chosen(clusters), rewind)[0])

    def unlearn(
        self,
        clusters: Iterable[str | int],
        *,
        rows: Any = None,
        queries: Any = None,
        data_collator: DataCollator | None = None,
        rewind: float | None = None,
    ) -> UnlearnedModel:
        """
        The model without some clusters, with what was removed and a check, ready to be saved or pushed.

        Args:
            clusters (`Iterable[str | int]`): Names or indices of the clusters to remove.
            rows (*optional*): The training dataset: compares losses on the removed rows, and on the others.
            queries (*optional*): Other rows to compare losses on.
            data_collator (`Callable`, *optional*): Collates rows. Defaults to `default_data_collator`.
            rewind (`float`, *optional*): Fraction of training to go back to. Defaults to the engine's.

        Returns:
            [`UnlearnedModel`]: its `model` is what [`Attributor.model_without`] gives.

        Raises:
            KeyError, IndexError: If there is no cluster of a name or index.
            ValueError: If none or all are named, or the rows are not the training set.
        """
        chosen = self._chosen(clusters)
        cluster_map = self.synset.clusters
        groups: list[tuple[str, RowReader, np.ndarray]] = []
        if rows is not None:
            removed = np.isin(cluster_map.cluster_ids, chosen)
            reader = self._row_reader(rows, data_collator)
            groups.append(("removed rows", reader, np.flatnonzero(removed)))
            groups.append(("the other training rows", reader, np.flatnonzero(~removed)))
        if queries is not None:
            reader = RowReader(queries, self.model, data_collator=data_collator, what="queries")
            groups.append(("queries", reader, np.arange(len(reader))))
        vector, engine = self._without(chosen, rewind)
        with self.model.differentiable():
            checks = [compare_losses(self.model, self._final, vector, *group) for group in groups]
        return UnlearnedModel(
            model=self._module(vector),
            clusters=[cluster_map.names[k] for k in chosen],
            sizes=[int(cluster_map.sizes[k]) for k in chosen],
            checks=checks,
            engine="replay",
            rewind_step=engine.path.start,
            num_steps=self.synset.trajectory.num_steps,
            parameters_sha256=self.synset.parameters_sha256,
            model_name=self.synset.model_description.get("name_or_path"),
            fidelity=self.synset.fidelity,
        )

    def _chosen(self, clusters: Iterable[str | int]) -> list[int]:
        """Indices of clusters that are to be removed."""
        named = [clusters] if isinstance(clusters, str | int) else clusters
        chosen = sorted({self.synset.clusters.index(cluster) for cluster in named})
        if not 0 < len(chosen) < self.synset.num_clusters:
            raise ValueError(
                f"{len(chosen)} of {self.synset.num_clusters} clusters are to be removed. Name at least one, and "
                "leave at least one."
            )
        return chosen

    def _without(
        self, chosen: list[int], rewind: float | None
    ) -> tuple[Tensor, ReplayEngine | LinearizedReplayEngine]:
        """Parameters without some clusters, `(num_parameters,)`, and the engine used."""
        mask = torch.ones(1, self.synset.num_clusters)
        mask[0, chosen] = 0
        settings: dict[str, Any] = {} if rewind is None else {"rewind": rewind}
        engine = self._runs[0].replay_engine("replay", **settings)
        return engine.parameters(mask)[0], engine

    def _module(self, vector: Tensor) -> nn.Module:
        return self.model.module_with(self.model.space.unflatten(vector), like=self._original).eval()

    def suggest_mixture(
        self,
        queries: Any,
        *,
        objective: str | Objective = "margin",
        maximize: bool | None = None,
        max_change: float = 2.0,
        min_agreement: float | None = 0.25,
        rows: Any = None,
        data_collator: DataCollator | None = None,
        rewind: float | None = None,
    ) -> MixtureSuggestion:
        """
        Which clusters to train on more, and which less, at the same amount of data.

        The objective is a function of the cluster weights p; the adjoint gives its gradient at p = 1, anchored replay
        its value at the suggested p. Weights follow the score per row; see [`mixture_weights`].

        Args:
            queries: Rows to do better on; the objective is the mean over them. Keep others to verify the result on.
            objective (`str` or `Objective`, *optional*, defaults to `"margin"`): What to improve; differentiable.
            maximize (`bool`, *optional*): Whether higher is better. Defaults to `False` for the built-in `"loss"` and
                `"mean_loss"`, to `True` for every other objective, your own included.
            max_change (`float`, *optional*, defaults to `2.0`): No weight leaves `[1 / max_change, max_change]`.
            min_agreement (`float`, *optional*, defaults to `0.25`): The bound shrinks until the replayed change is at
                least this share of the first-order one. `None` does without replay and takes `max_change` as it is.
            rows (*optional*): The training dataset, for a gradient from the rows in place of the synset.
            data_collator (`Callable`, *optional*): Collates queries and rows. Defaults to `default_data_collator`.
            rewind (`float`, *optional*): Fraction of training to go back to. Defaults to each engine's.

        Returns:
            [`MixtureSuggestion`]

        Raises:
            ValueError: If the objective is not differentiable, a number is out of range, there is one cluster only,
                all score alike, or no replay agrees with the first-order prediction.
        """
        objective = resolve_objective(objective)
        clusters = self.synset.clusters
        check_request(objective, clusters.num_clusters, max_change, min_agreement)
        options: dict[str, Any] = {"objective": objective, "data_collator": data_collator}
        if rewind is not None:
            options["rewind"] = rewind
        result = self.attribute(queries, engine="adjoint", rows=rows, **options)
        value = float(result.objective_values.mean())

        def replayed_change(weights: np.ndarray) -> float:
            masks = torch.from_numpy(weights[None]).float()
            replayed = self.replayed_values(queries, masks, engine="replay", **options)
            return float(replayed.mean()) - value

        return trusted_mixture(
            result.scores.mean(0).astype(np.float64),
            clusters,
            objective.name,
            value,
            maximize=maximized_by_default(objective) if maximize is None else maximize,
            max_change=max_change,
            min_agreement=min_agreement,
            replayed_change=replayed_change,
        )

    def _queries(self, queries: Any, data_collator: DataCollator | None) -> Queries:
        reader = RowReader(queries, self.model, data_collator=data_collator, what="queries", predict_labels=True)
        return Queries(*reader.batch(range(len(reader))))

    def _row_reader(self, rows: Any, data_collator: DataCollator | None) -> RowReader:
        return read_training_rows(self.synset, self.model, self.row_loss, rows, data_collator)
