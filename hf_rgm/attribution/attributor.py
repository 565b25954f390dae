"""Questions to a synset: scores of clusters and rows, and the model without some clusters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from hf_rgm.attribution.memory import DEFAULT_MEMORY, free_bytes
from hf_rgm.attribution.mixture import MixtureSuggestion, check_request, maximized_by_default, trusted_mixture
from hf_rgm.attribution.objectives import Objective, Queries, resolve_objective
from hf_rgm.attribution.options import UnlearningOptions, given, passes_options_to
from hf_rgm.attribution.replays import ENGINES_OF_ROWS, Replays
from hf_rgm.attribution.result import AttributionResult
from hf_rgm.attribution.runs import RecordedRun, check_options
from hf_rgm.attribution.scoring import Question, answer, replayed_values
from hf_rgm.attribution.training_rows import TrainingRows
from hf_rgm.attribution.unlearned import (
    UnlearnedModel,
    chosen_clusters,
    compare_losses,
    engine_without,
    groups_to_compare,
)
from hf_rgm.losses import LossFunction, RowLoss
from hf_rgm.modeling import FunctionalModel
from hf_rgm.out_of_memory import advice_on_memory
from hf_rgm.processes import Processes
from hf_rgm.rows import DataCollator, RowReader
from hf_rgm.synset.compatibility import check_samples, warn_unless_matched
from hf_rgm.synset.config import memory_bytes
from hf_rgm.synset.costs import CostEstimate
from hf_rgm.synset.inputs import SPACES, input_space
from hf_rgm.synset.synset import Synset


class Attributor:
    """
    Answers attribution questions about one trained model, without retraining.

    Args:
        model (`nn.Module`): The trained model the synset was distilled for.
        synset (`Synset`, `str` or `Path`): The synset, or its folder.
        device (`torch.device`, *optional*): Where to compute. Defaults to the model's device.
        row_loss (`Callable`, *optional*): The one the synset was distilled with, where it was; needed to score rows.
        max_memory (`str`, *optional*, defaults to `"4GB"`): Memory beside the model, the queries and the result. With
            less, more is done in parts: curvature is taken anew at every step, fewer models, queries or rows go
            together.
        force (`bool`, *optional*, defaults to `False`): Accept a model whose parameters are not the synset's.
        disable_tqdm (`bool`, *optional*, defaults to `False`): No progress bars.

    Raises:
        ParameterMismatchError: If model and synset do not belong together.
        ValueError: If the model does not take the synset's samples, or `max_memory` does not even hold the recorded
            states.
    """

    def __init__(
        self,
        model: nn.Module,
        synset: Synset | str | Path,
        *,
        device: torch.device | str | None = None,
        row_loss: LossFunction | None = None,
        max_memory: str = DEFAULT_MEMORY,
        force: bool = False,
        disable_tqdm: bool = False,
    ) -> None:
        max_bytes = memory_bytes(max_memory)
        self.synset = synset if isinstance(synset, Synset) else Synset.from_pretrained(synset)
        self._original = model
        names = tuple(self.synset.trajectory.parameter_shapes)
        self.model = FunctionalModel(model, trainable_names=names, device=device)
        self.synset.check_model(self.model, force=force)
        warn_unless_matched(self.synset.matched_states, self.synset.residuals)
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
        self._processes = Processes()
        free = free_bytes(max_bytes, max_memory, self.synset.trajectories, self.model.num_parameters)
        self._means: dict[str, Any] = {"max_bytes": free, "processes": self._processes}
        self._final = self.model.space.flatten(self.model.parameters())
        parts = (self.model, self.inputs, self.samples, self.synset.clusters)
        self._runs = [
            RecordedRun(Replays(*parts, trajectory, **self._means, disable_tqdm=disable_tqdm))
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
        output_dir: str | Path | None = None,
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
                synset's, and every row by the adjoint where the objective is differentiable. Not for
                `"plain_replay"`.
            data_collator (`Callable`, *optional*): Collates queries and rows. Defaults to `default_data_collator`.
            rewind (`float`, *optional*): Fraction of training to go back to. Defaults to the engine's; replays whose
                models drift start later, see [`~hf_rgm.attribution.drift.DriftMeter`]. The result's
                `metadata["rewind_step"]` says where they started.
            stride (`int`, *optional*): Training steps per integration step. Defaults to the engine's.
            num_masks (`int`, *optional*): For replay engines: regress on this many random halves of the clusters
                instead of leaving each out.
            seed (`int`, *optional*, defaults to `0`): Seed of the random masks.
            query_ids (`Sequence`, *optional*): Names of the queries. Defaults to their positions.
            output_dir (`str` or `Path`, *optional*): Folder for the scores of rows, which go there block by block as
                they are finished; a killed run continues there. The result's `row_scores` are then mapped from a file
                in it, which has to stay, and need not fit in memory.

        Under `torchrun` or `accelerate launch` the processes share the work, by cluster weights, queries and blocks of
        rows, and all of them get the whole result. All have to call this, and to see one `output_dir`.

        Returns:
            `AttributionResult`: positive where presence raises the objective.

        Raises:
            MemoryError: If memory runs out; says which setting to lower.
            RuntimeError: If another process failed.
            ValueError: If engine, objective, queries or rows do not fit each other, or the adjoint is asked for an
                objective without gradient.
        """
        check_options(engine, rows=rows, num_masks=num_masks)
        if output_dir is not None and rows is None:
            raise ValueError(
                "`output_dir` is for the scores of rows. Pass the training dataset as `rows`, or leave it out."
            )
        question = Question(
            engine,
            resolve_objective(objective),
            self._queries(queries, data_collator),
            self._training_rows(rows, data_collator),
            num_masks,
            seed,
            given(rewind=rewind, stride=stride),
        )
        with self.model.differentiable():
            return answer(
                question,
                self.synset,
                self.model,
                self._runs,
                self._processes,
                query_ids=query_ids,
                output_dir=output_dir,
                disable_tqdm=self.disable_tqdm,
            )

    def estimate(
        self,
        queries: Any,
        *,
        num_queries: int | None = None,
        engine: str = "linearized_replay",
        objective: str | Objective = "margin",
        rows: Any = None,
        data_collator: DataCollator | None = None,
        rewind: float | None = None,
        stride: int | None = None,
        num_masks: int | None = None,
    ) -> CostEstimate:
        """
        What [`Attributor.attribute`] will need, from a little of each part of the work on the first recorded run.

        Args:
            queries: Rows to explain, or a few of them.
            num_queries (`int`, *optional*): How many there will be. Defaults to those given.
            engine, objective, rows, data_collator, rewind, stride, num_masks: As in [`Attributor.attribute`].

        Returns:
            [`~hf_rgm.synset.costs.CostEstimate`]: its disk is that of the saved result.
        """
        check_options(engine, rows=rows, num_masks=num_masks)
        batch = self._queries(queries, data_collator)
        with self.model.differentiable():
            first = self._runs[0].estimate(
                engine,
                resolve_objective(objective),
                batch,
                num_queries=num_queries or len(batch),
                rows=self._training_rows(rows, data_collator),
                num_masks=num_masks,
                **given(rewind=rewind, stride=stride),
            )
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
        rewind: float | None = None,
        stride: int | None = None,
    ) -> np.ndarray:
        """
        The objective of models replayed under given cluster weights.

        Args:
            queries: Rows to evaluate.
            masks (`Tensor`): `(num_masks, num_clusters)`, weights, not negative: 1 for as it was, 0 for absent.
            objective (`str` or `Objective`, *optional*, defaults to `"margin"`): What to evaluate.
            engine (`str`, *optional*, defaults to `"linearized_replay"`): Or `"replay"`, `"plain_replay"`.
            rows (*optional*): The training dataset, for real cluster gradients (not for `"plain_replay"`).
            data_collator (`Callable`, *optional*): Collates queries and rows. Defaults to `default_data_collator`.
            rewind, stride (*optional*): As in [`Attributor.attribute`].

        Returns:
            `np.ndarray`: `(num_masks, num_values)`, float32. With several recorded runs, the mean over them; anchored
            engines add the mean change to the value of the model itself.
        """
        objective = resolve_objective(objective)
        batch = self._queries(queries, data_collator)
        training_rows = self._training_rows(rows, data_collator)
        settings = given(rewind=rewind, stride=stride)
        with self.model.differentiable():
            return replayed_values(self.model, self._runs, engine, objective, batch, masks, training_rows, settings)

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
            engine (`str`, *optional*): `"linearized_replay"`, the nearer one where little is removed, `"replay"`
                (anchored), the nearer one where about half of the data is, or `"plain_replay"`. Defaults to the first
                for up to a quarter of the rows, to the second for more.
            rows (*optional*): The training dataset: compares losses on the removed rows, and on the others. Linearised
                and anchored replay use their gradients in place of the synset's.
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
        chosen = chosen_clusters(clusters, self.synset.clusters)
        training_rows = self._training_rows(rows, data_collator)
        reader = None if queries is None else self._reader(queries, data_collator)
        groups = groups_to_compare(chosen, self.synset.clusters, training_rows and training_rows.reader, reader)
        engine = engine or engine_without(chosen, self.synset.clusters)
        mask = torch.ones(1, self.synset.num_clusters)
        mask[0, chosen] = 0
        with self.model.differentiable():
            replayed = self._runs[0].replays.parameters(
                engine, mask, rows=training_rows if engine in ENGINES_OF_ROWS else None, **given(rewind=rewind)
            )
            vector = replayed.values[0].to(self.model.device)
            checks = [compare_losses(self.model, self._final, vector, *group) for group in groups]
        return UnlearnedModel(
            model=self.model.module_with(self.model.space.unflatten(vector), like=self._original).eval(),
            clusters=[self.synset.clusters.names[k] for k in chosen],
            sizes=[int(self.synset.clusters.sizes[k]) for k in chosen],
            checks=checks,
            engine=engine,
            rewind_step=replayed.start,
            num_steps=self.synset.trajectory.num_steps,
            parameters_sha256=self.synset.parameters_sha256,
            model_name=self.synset.model_description.get("name_or_path"),
            fidelity=self.synset.fidelity,
        )

    @passes_options_to(unlearn)
    def model_without(self, clusters: Iterable[str | int], **options: Unpack[UnlearningOptions]) -> nn.Module:
        """
        The model had these clusters never been trained on: a copy of the same class, in evaluation mode.

        Args:
            clusters (`Iterable[str | int]`): Names or indices of the clusters to remove.
            options: As in [`Attributor.unlearn`], which also raises the same.
        """
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

        The objective is a function of the cluster weights p; the adjoint gives its gradient at p = 1, anchored replay
        its value at the suggested p. Weights follow the score per row; see [`mixture_weights`]. By default
        [`AttributionResult.top`] leaves out whole clusters and may rank otherwise: use it to drop, this to reweight.

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
        options: dict[str, Any] = {"objective": objective, "data_collator": data_collator, "rewind": rewind}
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
        reader = self._reader(queries, data_collator, predict_labels=True)
        return Queries(*reader.batch(range(len(reader))))

    def _reader(self, queries: Any, data_collator: DataCollator | None, **options: bool) -> RowReader:
        return RowReader(queries, self.model, data_collator=data_collator, what="queries", **options)

    def _training_rows(self, rows: Any, data_collator: DataCollator | None) -> TrainingRows | None:
        if rows is None:
            return None
        return TrainingRows(self.synset, self.model, self.row_loss, rows, data_collator, **self._means)
