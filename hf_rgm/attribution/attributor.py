"""Questions about a model's training data: scores of clusters and rows, and the model without some clusters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_rgm.attribution.answers import completed, estimate, rows_first
from hf_rgm.attribution.details import DetailedScores
from hf_rgm.attribution.options import passes_options_to
from hf_rgm.attribution.subject import KnownRuns, subject_of_runs, subject_of_synset
from hf_rgm.attribution.unlearning import chosen_clusters, engine_without, without_clusters
from hf_rgm.clusters.cluster_map import ClusterMap
from hf_rgm.distillation.config import memory_bytes
from hf_rgm.engines.adjoint import AdjointEngine
from hf_rgm.engines.engine import Engine
from hf_rgm.engines.memory_shares import DEFAULT_MEMORY, free_bytes
from hf_rgm.engines.objectives import Objective, resolve_objective
from hf_rgm.engines.registry import check_engine, default_engine
from hf_rgm.engines.request import Evaluation
from hf_rgm.model.cost_estimates import CostEstimate
from hf_rgm.model.losses import LossFunction
from hf_rgm.model.out_of_memory import advice_on_memory
from hf_rgm.model.processes import Processes
from hf_rgm.model.row_reader import DataCollator
from hf_rgm.results.mixture import MixtureSuggestion, check_request, trusted_mixture
from hf_rgm.results.result import AttributionResult
from hf_rgm.results.unlearned import UnlearnedModel
from hf_rgm.synset.compatibility import warn_unless_matched
from hf_rgm.synset.synset import Synset
from hf_rgm.trajectory.trajectory import Trajectory


class Attributor(DetailedScores):
    """
    Answers attribution questions about one trained model, without retraining.

    It needs the recorded run, with the training rows and their clusters; or a synset, which stands for all three.

    Args:
        model (`nn.Module`): The trained model.
        synset (`Synset`, `str` or `Path`, *optional*): A synset that was distilled for it, or its folder.
        trajectory (`str`, `Path`, `Trajectory` or a list of them, *optional*): Without a synset: what
            `TrajectoryCallback` recorded, or the `output_dir` of a Trainer with checkpoints. Of several runs that
            differ in their seed only, the first is the model's; scores are means over the runs.
        rows (*optional*): The training dataset, same rows in the same order. With a synset it can be given at each
            call instead, or not at all.
        clusters (`ClusterMap`, *optional*): Without a synset: which row belongs to which cluster.
        data_collator (`Callable`, *optional*): Collates `rows`; a tokenizer does as a Trainer's `processing_class`
            pads. Defaults to `default_data_collator`.
        device (`torch.device`, *optional*): Where to compute. Defaults to the model's device.
        row_loss (`Callable`, *optional*): Loss of each row by logits and labels, where the Trainer computed its own.
        max_memory (`str`, *optional*, defaults to `"4GB"`): Memory beside the model, the queries and the result.
        force (`bool`, *optional*, defaults to `False`): Accept a model whose parameters are not those recorded.
        disable_tqdm (`bool`, *optional*, defaults to `False`): No progress bars.

    Raises:
        ParameterMismatchError: If model and synset do not belong together.
        ValueError: If neither a synset nor run, rows and clusters are given, these do not belong together, the model
            does not take the synset's samples, or `max_memory` is too little.

    Example:

    ```python
    >>> from hf_rgm import Attributor
    >>> from hf_rgm.testing import tiny_recorded_run
    >>> run = tiny_recorded_run()
    >>> attributor = Attributor(
    ...     run.model, trajectory=run.trajectory, rows=run.train_dataset, clusters=run.clusters, disable_tqdm=True
    ... )
    >>> result = attributor.attribute(run.queries)
    >>> result.scores.shape, result.row_scores.shape
    ((12, 6), (12, 48))

    ```
    """

    def __init__(
        self,
        model: nn.Module,
        synset: Synset | str | Path | None = None,
        *,
        trajectory: str | Path | Trajectory | Sequence[str | Path | Trajectory] | None = None,
        rows: Any = None,
        clusters: ClusterMap | None = None,
        data_collator: DataCollator | None = None,
        device: torch.device | str | None = None,
        row_loss: LossFunction | None = None,
        max_memory: str = DEFAULT_MEMORY,
        force: bool = False,
        disable_tqdm: bool = False,
    ) -> None:
        max_bytes = memory_bytes(max_memory)
        self._original = model
        self.disable_tqdm = disable_tqdm
        options: dict[str, Any] = {"device": device, "function": row_loss, "force": force}
        if synset is None:
            parts: dict[str, Any] = {"rows": rows, "clusters": clusters, "data_collator": data_collator}
            self.subject = subject_of_runs(model, trajectory, **parts, **options)
        elif trajectory is not None or clusters is not None:
            raise ValueError(
                "The synset knows its recorded run and its clusters. Pass either `synset=`, or `trajectory=`, `rows=` "
                "and `clusters=`."
            )
        else:
            self.subject = subject_of_synset(model, synset, **options)
        self.model, self.synset = self.subject.model, self.subject.synset
        max_bytes = free_bytes(max_bytes, max_memory, self.subject.trajectories, self.model.num_parameters)
        self._known_runs = KnownRuns(self.subject, max_bytes, Processes(), disable_tqdm)
        self.rows, self._collator = rows, data_collator
        if rows is not None:
            self._runs(None, None)  # rows that do not fit are seen now

    # Members of its own, which the reference shows.
    self_influence = DetailedScores.self_influence
    nearest_rows = DetailedScores.nearest_rows
    token_scores = DetailedScores.token_scores
    module_scores = DetailedScores.module_scores

    @advice_on_memory("Attributing", "Lower `Attributor(max_memory=...)`, or pass fewer queries at once.")
    def attribute(
        self,
        queries: Any,
        *,
        engine: str | None = None,
        objective: str | Objective = "margin",
        rows: Any = None,
        data_collator: DataCollator | None = None,
        rewind: float | None = None,
        num_masks: int | None = None,
        seed: int = 0,
        query_ids: Sequence[Any] | None = None,
        output_dir: str | Path | None = None,
        per_token: bool = False,
    ) -> AttributionResult:
        """
        Scores of every cluster, and of every row where the training rows are given.

        Args:
            queries: Rows to explain: a dataset, a list of dictionaries, or a dictionary of columns (`dataset[:3]`).
                Without labels, the model's own predictions are explained.
            engine (`str`, *optional*): What scores the clusters: `"linearized_replay"` (each left out, to first order
                in the parameters), `"adjoint"` (derivatives; its cost does not depend on the number of clusters),
                `"responses"` (what the synset's author computed with the rows), `"replay"` (anchored, by the synset)
                or `"training_on"` (from a recorded state, on the rows that are kept). Defaults to the synset's
                responses where it has them and neither rows nor `rewind` nor `num_masks` are given, else to the first;
                see docs/choosing.md.
            objective (`str` or `Objective`, *optional*, defaults to `"margin"`): What to explain (docs/choosing.md).
            rows (*optional*): The training dataset, if the attributor has none. Gradients and curvature are then
                theirs in place of the synset's, and every row is scored where the objective is differentiable.
            data_collator (`Callable`, *optional*): Collates queries and rows. Defaults to the attributor's.
            rewind (`float`, *optional*): Fraction of training to go back to. Defaults to the engine's; replays whose
                models drift start later, see [`~hf_rgm.engines.drift.DriftMeter`]. The result's
                `metadata["rewind_step"]` says where they started.
            num_masks (`int`, *optional*): For replay engines: regress on this many random halves of the clusters
                instead of leaving each out.
            seed (`int`, *optional*, defaults to `0`): Seed of the random masks.
            query_ids (`Sequence`, *optional*): Names of the queries. Defaults to their positions.
            output_dir (`str` or `Path`, *optional*): Folder for scores of rows, written block by block; a killed run
                continues there. The result's `row_scores` are then mapped from a file in it, which has to stay.
            per_token (`bool`, *optional*, defaults to `False`): Explain each token that has a label by itself; each is
                a query of the result, named by its position in the text. Their mean is what explains the text.

        Under `torchrun` or `accelerate launch` all processes must call this and see one `output_dir`; they share the
        work, and each gets the whole result.

        Returns:
            `AttributionResult`: positive where presence raises the objective.

        Raises:
            MemoryError: If memory runs out; says which setting to lower.
            RuntimeError: If another process failed.
            ValueError: If engine, objective, queries or rows do not fit each other, or the adjoint is asked for an
                objective without gradient.
        """
        chosen = self.engine(engine, rows=rows, rewind=rewind, num_masks=num_masks)
        if output_dir is not None and not self._available(rows)["rows"]:
            raise ValueError(
                "`output_dir` is for the scores of rows. Pass the training dataset as `rows`, or leave it out."
            )
        request = self._request(queries, data_collator, objective, rewind, num_masks, seed)
        if per_token:
            request, query_ids = self._per_token(request, query_ids)
        evaluations = [Evaluation(run, request) for run in self._runs(rows, data_collator)]
        with self.model.differentiable():
            by_run, _ = [], evaluations[0].values  # what does not fit fails before the work
            row_scores = rows_first(chosen, evaluations, self.subject, output_dir, self.disable_tqdm)
            for own in evaluations if row_scores is None or chosen is not AdjointEngine else ():
                by_run.append(chosen(own.run).scores(own))
            return completed(chosen, evaluations, by_run, row_scores, self.subject, query_ids)

    def estimate(
        self,
        queries: Any,
        *,
        num_queries: int | None = None,
        engine: str | None = None,
        objective: str | Objective = "margin",
        rows: Any = None,
        data_collator: DataCollator | None = None,
        rewind: float | None = None,
        num_masks: int | None = None,
    ) -> CostEstimate:
        """
        What [`Attributor.attribute`] will need, from a little of each part of the work on the first recorded run.

        Args:
            queries: Rows to explain, or a few of them.
            num_queries (`int`, *optional*): How many there will be. Defaults to those given.
            engine, objective, rows, data_collator, rewind, num_masks: As in [`Attributor.attribute`].

        Returns:
            [`~hf_rgm.model.cost_estimates.CostEstimate`]: its disk is that of the saved result.
        """
        chosen = self.engine(engine, rows=rows, rewind=rewind, num_masks=num_masks)
        request = self._request(queries, data_collator, objective, rewind, num_masks)
        runs = self._runs(rows, data_collator)
        with self.model.differentiable():
            return estimate(chosen, Evaluation(runs[0], request), num_queries=num_queries, num_runs=len(runs))

    def replayed_values(
        self,
        queries: Any,
        masks: Tensor,
        *,
        objective: str | Objective = "margin",
        engine: str | None = None,
        rows: Any = None,
        data_collator: DataCollator | None = None,
        rewind: float | None = None,
    ) -> np.ndarray:
        """
        The objective of models replayed under given cluster weights.

        Args:
            queries: Rows to evaluate.
            masks (`Tensor`): `(num_masks, num_clusters)`, weights, not negative: 1 for as it was, 0 for absent.
            objective (`str` or `Objective`, *optional*, defaults to `"margin"`): What to evaluate.
            engine (`str`, *optional*): As in [`Attributor.attribute`], but for `"adjoint"`.
            rows (*optional*): The training dataset, if the attributor has none.
            data_collator (`Callable`, *optional*): Collates queries and rows. Defaults to the attributor's.
            rewind (*optional*): As in [`Attributor.attribute`].

        Returns:
            `np.ndarray`: `(num_masks, num_values)`, float32. With several recorded runs the mean over them: anchored
            engines add the mean change to the value of the model itself.
        """
        chosen = self.engine(engine, rows=rows, rewind=rewind, replays=True)
        request = self._request(queries, data_collator, objective, rewind)
        evaluations = [Evaluation(run, request) for run in self._runs(rows, data_collator)]
        with self.model.differentiable():
            by_run = [chosen(own.run).values(own, masks).values for own in evaluations]
            if chosen.anchored:
                first, others = evaluations[0].values.cpu(), zip(by_run[1:], evaluations[1:], strict=True)
                by_run[1:] = [first + values - own.values.cpu() for values, own in others]
            return torch.stack(by_run).mean(0).numpy()

    def unlearn(
        self,
        clusters: Iterable[str | int],
        *,
        engine: str | None = None,
        rows: Any = None,
        queries: Any = None,
        data_collator: DataCollator | None = None,
        rewind: float | None = None,
    ) -> UnlearnedModel:
        """
        The model without some clusters, with what was removed and a check, ready to be saved or pushed.

        Args:
            clusters (`Iterable[str | int]`): Names or indices of the clusters to remove.
            engine (`str`, *optional*): As in [`Attributor.replayed_values`]. Defaults to `"linearized_replay"` (or
                the synset's responses, without rows) for up to a quarter of the rows; for more, or for so many
                parameters that `max_memory` holds them in short only, to `"training_on"` with rows, to `"replay"`
                without.
            rows (*optional*): The training dataset, if the attributor has none: compares losses on the removed rows,
                and on the others.
            queries (*optional*): Other rows to compare losses on.
            data_collator (`Callable`, *optional*): Collates rows. Defaults to `default_data_collator`.
            rewind (`float`, *optional*): Fraction of training to go back to. Defaults as in [`Attributor.attribute`].

        Returns:
            [`UnlearnedModel`]: its `model` is what [`Attributor.model_without`] gives.

        Raises:
            DivergenceError: If the replay explodes.
            KeyError, IndexError: If there is no cluster of a name or index.
            ValueError: If none or all are named, there is no such engine, or the rows are not the training set.
        """
        known = self.subject.clusters
        removed = chosen_clusters(clusters, known)
        run = self._runs(rows, data_collator)[0]
        available = self._available(rows)  # rows are for the checks too, whatever the engine takes
        name = engine or engine_without(run.exposure.share(removed), available, rewind=rewind, whole=run.form.is_whole)
        chosen = self._checked(name, available, replays=True)
        reader = None if queries is None else self._reader(queries, data_collator)
        with self.model.differentiable():
            return without_clusters(chosen(run), removed, rewind, reader, subject=self.subject, like=self._original)

    @passes_options_to(unlearn)
    def model_without(self, clusters: Iterable[str | int], **options: Any) -> nn.Module:
        """The model had these clusters never been trained on, in evaluation mode; see [`Attributor.unlearn`]."""
        return self.unlearn(clusters, **options).model

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

        The objective is a function of the cluster weights p; the adjoint gives its gradient at p = 1, a replay
        (anchored, or linearised without a synset) its value at the suggested p. Weights follow the score per row; see
        [`mixture_weights`]. By default [`AttributionResult.top`] leaves out whole clusters and may rank otherwise: use
        it to drop, this to reweight.

        Args:
            queries: Rows to do better on; the objective is the mean over them. Keep others to verify the result on.
            objective (`str` or `Objective`, *optional*, defaults to `"margin"`): What to improve; differentiable.
            maximize (`bool`, *optional*): Whether higher is better. Defaults to what the objective says.
            max_change (`float`, *optional*, defaults to `2.0`): No weight leaves `[1 / max_change, max_change]`.
            min_agreement (`float`, *optional*, defaults to `0.25`): The bound shrinks until the replayed change is at
                least this share of the first-order one. `None` does without replay and takes `max_change` as it is.
            rows (*optional*): The training dataset, if the attributor has none: the gradient is then the rows'.
            data_collator (`Callable`, *optional*): Collates queries and rows. Defaults to `default_data_collator`.
            rewind (`float`, *optional*): Fraction of training to go back to. Defaults to each engine's.

        Returns:
            [`MixtureSuggestion`]

        Raises:
            ValueError: If the objective is not differentiable, a number is out of range, there is one cluster only,
                all score alike, or no replay agrees with the first-order prediction.
        """
        objective = resolve_objective(objective, self.model)
        check_request(objective, self.subject.clusters.num_clusters, max_change, min_agreement)
        options: dict[str, Any] = {"objective": objective, "data_collator": data_collator, "rewind": rewind}
        result = self.attribute(queries, engine="adjoint", rows=rows, **options)
        value = float(result.objective_values.mean())
        checking = "linearized_replay" if self.synset is None else "replay"

        def replayed_change(weights: np.ndarray) -> float:
            masks = torch.from_numpy(weights[None]).float()
            return float(self.replayed_values(queries, masks, engine=checking, **options).mean()) - value

        return trusted_mixture(
            result.scores.mean(0).astype(np.float64),
            self.subject.clusters,
            objective.name,
            value,
            maximize=objective.maximize if maximize is None else maximize,
            max_change=max_change,
            min_agreement=min_agreement,
            replayed_change=replayed_change,
        )

    def engine(
        self,
        name: str | None,
        *,
        rows: Any = None,
        rewind: float | None = None,
        num_masks: int | None = None,
        replays: bool = False,
    ) -> type[Engine]:
        """The engine of a name, or the default, checked against what is asked; raises `ValueError` if it cannot."""
        available = self._available(rows)
        name = name or default_engine(available, rewind=rewind, num_masks=num_masks)
        return self._checked(
            name, available, rewind=rewind, num_masks=num_masks, rows_given=rows is not None, replays=replays
        )

    def _checked(self, name: str, available: dict[str, bool], **options: Any) -> type[Engine]:
        chosen = check_engine(name, available=available, **options)
        by_samples = chosen.needs != "responses" and not (available["rows"] and chosen.takes_rows)
        if self.synset is not None and by_samples:
            warn_unless_matched(self.synset.matched_states, self.synset.residuals)
        return chosen

    def _available(self, rows: Any) -> dict[str, bool]:
        synset, has_rows = self.synset, rows is not None or self.rows is not None
        responses = synset is not None and synset.responses is not None and len(synset.trajectories) == 1
        return {"rows": has_rows, "samples": synset is not None, "responses": responses}
