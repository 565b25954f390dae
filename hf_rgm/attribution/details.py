"""Scores in detail, a part of the attributor: of rows on themselves, of tokens, and of modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch

from hf_rgm.attribution.subject import KnownRuns, Subject
from hf_rgm.engines.adjoint import AdjointEngine
from hf_rgm.engines.details import gradient_cosines, label_scores, module_scores, one_label_each, self_scores
from hf_rgm.engines.objectives import Objective, Queries, resolve_objective
from hf_rgm.engines.recorded_run import RecordedRun
from hf_rgm.engines.request import Evaluation, Request
from hf_rgm.model.functional_model import FunctionalModel
from hf_rgm.model.row_reader import DataCollator, RowReader


class DetailedScores:
    """Scores in detail, by the adjoint engine; base class of [`Attributor`]."""

    model: FunctionalModel
    subject: Subject
    rows: Any
    _collator: DataCollator | None
    _known_runs: KnownRuns
    tokenizer: Any = None
    """The pipeline's, by which single tokens are named."""

    def self_influence(
        self,
        *,
        objective: str | Objective = "loss",
        rows: Any = None,
        data_collator: DataCollator | None = None,
        rewind: float | None = None,
    ) -> np.ndarray:
        """
        The score of every training row on itself, for about what scoring all rows for a few queries costs.

        With `"loss"` scores are negative, and most so for rows that only their own presence explains: outliers and
        wrong labels. They are the diagonal of the matrix that `attribute(rows, engine="adjoint", objective="loss")`
        would compute.

        Args:
            objective (`str` or `Objective`, *optional*, defaults to `"loss"`): Differentiable, with a value for each
                query by itself (`per_query`).
            rows, data_collator, rewind (*optional*): As in [`Attributor.attribute`].

        Returns:
            `np.ndarray`: `(num_rows,)`, float32, in units of the objective; with several runs the mean.

        Raises:
            ValueError: If there are no rows, or the objective is none of each query by itself.
        """
        chosen = resolve_objective(objective, self.model)
        if not (chosen.per_query and chosen.differentiable):
            raise ValueError(
                f'Objective {chosen.name!r} is not one of each query by itself. Use "loss" or "margin", or declare '
                "your own `per_query=True`."
            )
        scored = [AdjointEngine(run) for run in self._runs_with_rows(rows, data_collator)]
        with self.model.differentiable():
            by_run = [self_scores(own, chosen, own.rewind if rewind is None else rewind) for own in scored]
        return torch.stack(by_run).mean(0).numpy()

    def nearest_rows(
        self,
        queries: Any,
        k: int = 10,
        *,
        objective: str | Objective = "margin",
        rows: Any = None,
        data_collator: DataCollator | None = None,
    ) -> list[pd.DataFrame]:
        """
        The training rows whose gradients point most as each query's do: what it is like, not what helped it.

        Args:
            queries: Rows to compare.
            k (`int`, *optional*, defaults to `10`): Rows for each.
            objective, rows, data_collator (*optional*): As in [`Attributor.attribute`].

        Returns:
            `list[pandas.DataFrame]`: for each value of the objective the columns `row`, `similarity` (cosine of the
            direction that betters the objective with that of a step on the row, at the trained model; of several runs,
            of the first; of sketches in the optimizer's scale where `max_memory` does not hold gradients) and
            `cluster`, the most similar first.

        Raises:
            ValueError: If there are no rows, or `k` is not positive.
        """
        if k < 1:
            raise ValueError(f"`k` must be at least 1, got {k}.")
        chosen = resolve_objective(objective, self.model)
        found = self._by_run(
            (queries, chosen, data_collator, None),
            self._runs_with_rows(rows, data_collator)[:1],
            lambda engine, own, _: gradient_cosines(engine, own.gradients(engine.form)),
        )
        cosines = found[0] if chosen.maximize else -found[0]
        similarity, order = (each.numpy() for each in cosines.topk(min(k, cosines.shape[1])))
        clusters = self.subject.clusters
        names = np.asarray(clusters.names, dtype=object)[clusters.cluster_ids]
        return [
            pd.DataFrame({"row": own, "similarity": value, "cluster": names[own]})
            for own, value in zip(order, similarity, strict=True)
        ]

    def token_scores(
        self,
        queries: Any,
        row: int,
        *,
        objective: str | Objective = "margin",
        rows: Any = None,
        data_collator: DataCollator | None = None,
        rewind: float | None = None,
    ) -> np.ndarray:
        """
        What each token of one training row adds to the row's scores: its loss is a sum over labels, and so are they.

        For the tokens of a query see `attribute(..., per_token=True)`.

        Args:
            queries: Rows to explain.
            row (`int`): The training row.
            objective, rows, data_collator, rewind (*optional*): As in [`Attributor.attribute`].

        Returns:
            `np.ndarray`: `(num_queries, length)`, float32: the share of each token's label, 0 where there is none. In
            causal language models the label is the token itself. Sums are the `row_scores` of `attribute(queries,
            engine="adjoint")`.

        Raises:
            IndexError: If there is no such row.
            ValueError: If rows have one label each, their loss is not the cross entropy, or there are no rows.
        """
        runs = self._runs_with_rows(rows, data_collator)
        source = runs[0].rows
        if source is None or source.row_loss.function is not None:
            raise ValueError(
                "The rows' loss is not the cross entropy: it need not be a sum over tokens, so that it has no parts."
            )
        if not 0 <= row < len(source.reader):
            raise IndexError(f"There is no row {row}; there are {len(source.reader)}, counted from 0.")
        found = self._by_run(
            (queries, objective, data_collator, rewind),
            runs,
            lambda engine, own, start: label_scores(engine, own.gradients(engine.form), row, start),
        )
        scores = torch.stack(found).mean(0)
        return (scores.roll(1, -1) if self.model.shifts_labels else scores).numpy()

    def module_scores(
        self,
        queries: Any,
        *,
        objective: str | Objective = "margin",
        rows: Any = None,
        data_collator: DataCollator | None = None,
        rewind: float | None = None,
    ) -> dict[str, np.ndarray]:
        """
        What the parameters of each module add to the scores of clusters, which are inner products over parameters.

        Args:
            queries: Rows to explain.
            objective, rows, data_collator, rewind (*optional*): As in [`Attributor.attribute`].

        Returns:
            `dict[str, np.ndarray]`: for each numbered block (`"encoder.layer.3"`), and each layer that is in none,
            `(num_queries, num_clusters)`, float32. They add up to the `scores` of `attribute(queries,
            engine="adjoint")`.

        Raises:
            ValueError: If there are so many parameters that `max_memory` holds gradients in short only.
        """
        found = self._by_run(
            (queries, objective, data_collator, rewind),
            self._runs(rows, data_collator),
            lambda engine, own, start: module_scores(engine, own.gradients(engine.form), start),
        )
        return {name: torch.stack([own[name] for own in found]).mean(0).numpy() for name in found[0]}

    def _by_run(
        self,
        question: tuple[Any, str | Objective, DataCollator | None, float | None],
        runs: list[RecordedRun],
        answer: Callable[[AdjointEngine, Evaluation, float], Any],
    ) -> list[Any]:
        """Answers of the adjoint along each run, from where it goes back to."""
        queries, objective, data_collator, rewind = question
        request = self._request(queries, data_collator, objective, rewind)
        with self.model.differentiable():
            engines = [AdjointEngine(run) for run in runs]
            return [answer(own, Evaluation(own.run, request), own.rewind_of(request)) for own in engines]

    def _per_token(self, request: Request, query_ids: Sequence[Any] | None) -> tuple[Request, list[str]]:
        """A query for each label of those asked about, and their names."""
        queries, objective = request.queries, request.objective
        tokens = queries.inputs.get("input_ids")
        of_tokens = queries.labels.dim() == 2 and (tokens is None or tokens.shape == queries.labels.shape)
        if not of_tokens or queries.labels.is_floating_point() or not objective.per_query:
            raise ValueError(
                "`per_token=True` needs queries with labels of tokens, and an objective of each query by itself: got "
                f"labels of shape {tuple(queries.labels.shape)} and {objective.name!r}."
            )
        single, places = one_label_each(queries)
        # Labels of causal language models stand where they are predicted.
        told = [(query, position + bool(self.model.shifts_labels)) for query, position in places.tolist()]
        if query_ids is None:
            names = [f"{index}, " for index in range(len(queries))] if len(queries) > 1 else [""]
        else:
            names = [f"{name}, " for name in query_ids]
        if len(names) != len(queries):
            raise ValueError(f"`query_ids` has {len(names)} names for {len(queries)} queries. Pass one each.")
        tokenizer, words = self.tokenizer, [""] * len(told)
        if tokenizer is not None and tokens is not None:
            words = [f" {tokenizer.decode(tokens[place])!r}" for place in told]
        ids = [f"{names[at]}token {position}{word}" for (at, position), word in zip(told, words, strict=True)]
        return replace(request, queries=single), ids

    def _request(
        self, queries: Any, data_collator: DataCollator | None, objective: str | Objective, *options: Any
    ) -> Request:
        reader = self._reader(queries, data_collator, predict_labels=True)
        collated = Queries(*reader.batch(range(len(reader))), self.subject.row_loss.function)
        return Request(resolve_objective(objective, self.model), collated, *options)

    def _reader(self, queries: Any, data_collator: DataCollator | None, **options: Any) -> RowReader:
        options |= {**self.subject.trajectory.reader_options, "data_collator": data_collator or self._collator}
        return RowReader(queries, self.model, what="queries", **options)

    def _runs(self, rows: Any, data_collator: DataCollator | None) -> list[RecordedRun]:
        return self._known_runs.of(self.rows if rows is None else rows, data_collator or self._collator)

    def _runs_with_rows(self, rows: Any, data_collator: DataCollator | None) -> list[RecordedRun]:
        if rows is None and self.rows is None:
            raise ValueError("These are scores of training rows. Pass the training dataset as `rows`.")
        return self._runs(rows, data_collator)
