"""Results of attribution: matrices, tables, plots, pages and folders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import datasets
import numpy as np
import pandas as pd

from hf_rgm.agreement.fidelity_figures import Factors, FidelityFigures, sizes_in_short
from hf_rgm.clusters.grouping import as_numpy, check_distinct
from hf_rgm.engines.objectives import OBJECTIVES
from hf_rgm.files.names import checked_names
from hf_rgm.files.reading import printable
from hf_rgm.files.writing import staged_folder
from hf_rgm.hub.artefact import CardOptions, DatasetArtefact
from hf_rgm.hub.cards import SIGN_CONVENTION
from hf_rgm.results.result_files import CONFIG_FILE, FILES, attribution_card, long_form, read_result, write_result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from transformers import PreTrainedTokenizerBase

    from hf_rgm.synset.synset import Synset


@dataclass(eq=False, repr=False)
class AttributionResult(DatasetArtefact):
    """
    The attribution matrix: how the presence of each cluster (or row) changes the objective of each query.
    A positive score means that the presence of the cluster raises the objective: score = f(with) - f(without).

    Args:
        scores (`np.ndarray`): `(num_queries, num_clusters)`, float32, in units of the objective.
        cluster_names (`Sequence[str]`): One for each cluster, all different.
        cluster_sizes (`np.ndarray`): Rows of each cluster, `(num_clusters,)`, int64.
        query_ids (`Sequence[str | int]`): One for each query, all different.
        objective (`str`): Name of the objective.
        objective_values (`np.ndarray`): The objective of each query for the trained model, `(num_queries,)`, float32.
        engine (`str`): Name of the engine that computed the scores.
        row_scores (`np.ndarray`, *optional*): `(num_queries, num_rows)`, float32; may be mapped from a file.
        cluster_ids (`np.ndarray`, *optional*): The cluster of each row, `(num_rows,)`, int64.
        metadata (`dict`, *optional*): Anything else to keep; must fit into JSON.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Reads tokens when the result is shown; not saved.

    Raises:
        TypeError: If the metadata does not fit into JSON.
        ValueError: If scores are NaN or infinite, shapes do not fit each other, or names or ids repeat.

    Example:

    ```python
    >>> import numpy as np
    >>> from hf_rgm.results.result import AttributionResult
    >>> result = AttributionResult(
    ...     scores=np.array([[0.5, -0.25], [0.1, 0.0]]),
    ...     cluster_names=["imdb", "yelp"],
    ...     cluster_sizes=np.array([100, 50]),
    ...     query_ids=["a", "b"],
    ...     objective="margin",
    ...     objective_values=np.array([2.0, 1.0]),
    ...     engine="adjoint",
    ... )
    >>> result.top(k=1, query="a")
      cluster  score  size
    0    imdb    0.5   100

    ```
    """

    marker: ClassVar = CONFIG_FILE
    files: ClassVar = FILES
    kind: ClassVar = "attributions"
    _read: ClassVar = staticmethod(read_result)

    SIGN_CONVENTION: ClassVar[str] = SIGN_CONVENTION

    scores: np.ndarray
    cluster_names: Sequence[str]
    cluster_sizes: np.ndarray
    query_ids: Sequence[str | int]
    objective: str
    objective_values: np.ndarray
    engine: str
    row_scores: np.ndarray | None = None
    cluster_ids: np.ndarray | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    tokenizer: PreTrainedTokenizerBase | None = None

    def __post_init__(self) -> None:
        self.cluster_names = checked_names(self.cluster_names, "a cluster")
        ids = [query.item() if isinstance(query, np.generic) else query for query in self.query_ids]
        numbered = all(isinstance(query, int) for query in ids)
        self.query_ids = ids if numbered else checked_names(ids, "a query")
        check_distinct(self.cluster_names, "cluster names")
        check_distinct(self.query_ids, "query ids")
        shape = (len(self.query_ids), len(self.cluster_names))
        if not all(shape):
            raise ValueError(f"A result needs at least one query and one cluster, got {shape[0]} and {shape[1]}.")
        self.scores = self._checked(self.scores, shape, "scores")
        self.objective_values = self._checked(self.objective_values, shape[:1], "objective_values")
        self.cluster_sizes = as_numpy(self.cluster_sizes).astype(np.int64)
        sizes = self.cluster_sizes.tolist()
        if self.cluster_sizes.shape != shape[1:] or min(sizes) < 0 or sum(sizes) >= 2**63:
            raise ValueError(f"`cluster_sizes` must be {shape[1]} numbers of rows, got {self.cluster_sizes}.")
        if self.cluster_ids is not None:
            self.cluster_ids = ids = as_numpy(self.cluster_ids).astype(np.int64)
            inside = ids[(ids >= 0) & (ids < shape[1])]
            if len(inside) < len(ids) or np.bincount(inside, minlength=shape[1]).tolist() != sizes:
                raise ValueError(
                    "`cluster_ids` do not give the `cluster_sizes`. Pass both from the `ClusterMap` of the synset."
                )
        if self.row_scores is not None:
            self.row_scores = self._checked(self.row_scores, (shape[0], sum(sizes)), "row_scores")
        try:
            self.metadata = json.loads(json.dumps(self.metadata))
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"`metadata` does not fit into JSON ({error}). Keep plain numbers and text in it."
            ) from None
        _ = self.factors  # raises if they cannot be known

    def _checked(self, values: Any, shape: tuple[int, ...], name: str) -> np.ndarray:
        array = as_numpy(values)
        # Row scores may be mapped from a file, and larger than memory.
        array = array.astype(np.float32, copy=name != "row_scores")
        if array.shape != shape:
            raise ValueError(
                f"`{name}` has shape {array.shape}, but must have {shape}: {len(self.query_ids)} queries, "
                f"{len(self.cluster_names)} clusters."
            )
        bad = [np.count_nonzero(~np.isfinite(values)) for values in array]
        if any(bad):
            first = self.query_ids[next(query for query, count in enumerate(bad) if count)]
            raise ValueError(
                f"`{name}` has {sum(bad)} NaN or infinite values of {array.size}, the first for query {first!r}."
                " The computation diverged: rewind less far."
            )
        return array

    @property
    def num_queries(self) -> int:
        """Number of queries."""
        return len(self.query_ids)

    @property
    def num_clusters(self) -> int:
        """Number of clusters."""
        return len(self.cluster_names)

    @property
    def maximize(self) -> bool:
        """Whether a higher objective is better, so that positive scores help."""
        told, known = self.metadata.get("maximize"), OBJECTIVES.get(self.objective)
        return told if isinstance(told, bool) else known is None or known.maximize

    @property
    def factors(self) -> Factors | None:
        """What scores of clusters, and of rows, were multiplied by; see [`AttributionResult.calibrated`]."""
        kept = self.metadata
        return FidelityFigures.from_dict(kept.get("fidelity") or {}).factors() if kept.get("calibrated") else None

    def calibrated(self, report: FidelityFigures | None = None) -> AttributionResult:
        """
        The result with scores multiplied by the slope of retrained effects on them, one for clusters, one for rows.

        Args:
            report ([`FidelityReport`], *optional*): Measured with this engine, objective and rows; defaults to that
                of the synset. Scores of rows stay as they are unless it has the measure `"lds_rows"`.

        Raises:
            ValueError: If there is no report, it is about other scores, a slope is not known to be positive, or scores
                are calibrated already.
        """
        kept = self.metadata
        if self.factors is not None:
            raise ValueError("These scores are calibrated already. Calibrate the result that they were computed from.")
        if report is None and kept.get("fidelity") is None:
            raise ValueError("No fidelity was measured with these scores. Pass the `FidelityReport` of their engine.")
        report = FidelityFigures.from_dict(kept["fidelity"]) if report is None else report
        clusters, rows = report.factors(
            engine=self.engine,
            objective=self.objective,
            rows=kept.get("used_rows"),
            settings={name: kept[name] for name in ("rewind", "num_masks") if kept.get(name) is not None},
            samples_sha256=None if kept.get("used_rows") else kept.get("samples_sha256"),
            parameters_sha256=kept.get("parameters_sha256"),
        )
        row_scores = self.row_scores
        return replace(
            self,
            scores=self.scores * np.float32(clusters.value),
            row_scores=row_scores if row_scores is None or rows is None else row_scores * np.float32(rows.value),
            metadata={**kept, "calibrated": True, "fidelity": report.to_dict()},
        )

    def query_index(self, query: str | int) -> int:
        """Position of the query with an id; raises a `KeyError` if there is none."""
        query = printable(query) if isinstance(query, str) else query
        if query not in self.query_ids:
            shown = ", ".join(repr(name) for name in self.query_ids[:5]) + ", ..." * (self.num_queries > 5)
            raise KeyError(f"No query has the id {query!r}. There are {self.num_queries}: {shown}.")
        return list(self.query_ids).index(query)

    def to_pandas(self) -> pd.DataFrame:
        """The matrix as a data frame: a line for each query, a column for each cluster."""
        index = pd.Index(self.query_ids, name="query_id")
        return pd.DataFrame(self.scores, index=index, columns=pd.Index(self.cluster_names, name="cluster"))

    def to_dataset(self, k: int | None = None) -> datasets.Dataset:
        """
        A line for each query and cluster, the highest score of each query first.

        Args:
            k (`int`, *optional*): Keep only the `k` highest and `k` lowest clusters of each query.

        Returns:
            `datasets.Dataset`: columns `query_id`, `rank` (from 1), `cluster`, `score`, `size` and, if the rows of
            clusters are known, `example_rows`: up to three of them; with row scores, those that push most in the
            direction of their cluster.

        Raises:
            ValueError: If `k` is smaller than 1.
        """
        if k is not None and k < 1:
            raise ValueError(f"`k` must be at least 1, got {k}. Leave it out for all clusters.")
        return datasets.Dataset.from_pandas(long_form(self, k), preserve_index=False)

    def to_list(self, k: int) -> list[list[dict[str, Any]]]:
        """
        The `k` clusters of each query with the largest scores, positive or negative, largest first.

        Returns:
            `list[list[dict]]`: for each query, dictionaries with `cluster`, `score` and `size`.

        Raises:
            ValueError: If `k` is smaller than 1.
        """
        if k < 1:
            raise ValueError(f"`k` must be at least 1, got {k}. It is the number of clusters to return.")
        chosen = np.argsort(-np.abs(self.scores), axis=1, kind="stable")[:, :k]
        return [
            [
                {"cluster": self.cluster_names[c], "score": float(scores[c]), "size": int(self.cluster_sizes[c])}
                for c in clusters
            ]
            for scores, clusters in zip(self.scores, chosen, strict=True)
        ]

    def top(
        self, k: int = 5, query: str | int | None = None, *, rows: bool = False, largest: bool = True
    ) -> pd.DataFrame:
        """
        The clusters, or rows, with the highest or lowest scores.

        Args:
            k (`int`, *optional*, defaults to `5`): How many.
            query (`str` or `int`, *optional*): Id of a query. Defaults to the mean over queries.
            rows (`bool`, *optional*, defaults to `False`): Rows in place of clusters. Take them as a
                group: neighbours in rank do not differ in a meaningful way.
            largest (`bool`, *optional*, defaults to `True`): Highest first; otherwise lowest first.

        Returns:
            `pd.DataFrame`: columns `cluster`, `score`, `size`, or `row`, `score` and, if known, `cluster`.

        Raises:
            KeyError: If there is no such query.
            ValueError: If `k` is smaller than 1 or there are no row scores.
        """
        if k < 1:
            raise ValueError(f"`k` must be at least 1, got {k}. It is the number of clusters or rows to return.")
        scores = self._scores_of(query, rows=rows)
        chosen = np.argsort(-scores if largest else scores, kind="stable")[:k]
        names = np.array(self.cluster_names, dtype=object)
        if not rows:
            return pd.DataFrame(
                {"cluster": names[chosen], "score": scores[chosen], "size": self.cluster_sizes[chosen]}
            )
        frame = pd.DataFrame({"row": chosen, "score": scores[chosen]})
        if self.cluster_ids is not None:
            frame["cluster"] = names[self.cluster_ids[chosen]]
        return frame

    def _scores_of(self, query: str | int | None, *, rows: bool) -> np.ndarray:
        matrix = self.row_scores if rows else self.scores
        if matrix is None:
            raise ValueError("This result has no row scores. Pass the training rows when attributing.")
        return matrix.mean(axis=0) if query is None else matrix[self.query_index(query)]

    def plot(
        self,
        kind: str = "heatmap",
        *,
        query: str | int | None = None,
        rows: bool = False,
        k: int = 8,
        ax: Axes | None = None,
        title: str | None = None,
    ) -> Axes:
        """
        Draws the matrix, or the highest and lowest scores.

        Args:
            kind (`str`, *optional*, defaults to `"heatmap"`): `"heatmap"` (queries by clusters) or `"bars"`.
            query, rows (*optional*): For bars, as in [`AttributionResult.top`].
            k (`int`, *optional*, defaults to `8`): For bars, how many of each end.
            ax (`Axes`, *optional*): Where to draw. Defaults to a new figure.
            title (`str`, *optional*): Title.

        Returns:
            `Axes`: `.figure` shows it in a notebook, `.figure.savefig(path)` writes it.

        Raises:
            ValueError: If the kind is unknown.
        """
        from hf_rgm.plots import plot_bars, plot_heatmap

        sizes = sizes_in_short(self.factors, rows=rows)
        shown: dict[str, Any] = {"ax": ax, "maximize": self.maximize, "sizes": sizes}
        if kind == "heatmap":
            title = title or f"How clusters change the {self.objective} of each query"
            return plot_heatmap(self.scores, self.query_ids, self.cluster_names, title=title, **shown)
        if kind != "bars":
            raise ValueError(f"Unknown kind {kind!r}. Use 'heatmap' or 'bars'.")
        scores = self._scores_of(query, rows=rows)
        names = [f"row {row}" for row in range(len(scores))] if rows else self.cluster_names
        if rows and self.cluster_ids is not None:
            names = [f"row {row} ({self.cluster_names[c]})" for row, c in enumerate(self.cluster_ids)]
        asked = f"mean over {self.num_queries} queries" if query is None else f"query {query}"
        return plot_bars(names, scores, k=k, title=title or f"{self.objective}, {asked}", **shown)

    def to_html(
        self,
        path: str | Path,
        *,
        title: str = "Training-data attribution",
        query_ids: Sequence[str | int] | None = None,
        queries: Any = None,
        rows: Any = None,
        synset: Synset | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> Path:
        """
        Writes a self-contained page: the heat map, and the clusters and rows that matter, on average and for some
        queries, with pictures or texts of the data that is passed.

        Args:
            path (`str` or `Path`): The file to write.
            title (`str`, *optional*): Title of the page.
            query_ids (`Sequence`, *optional*): Queries to show one by one. Defaults to the first four.
            queries, rows (*optional*): The dataset of the queries, in the order of the result, and the training
                dataset: shows what they look like.
            synset (`Synset`, *optional*): Shows synthetic samples beside real rows.
            tokenizer (`PreTrainedTokenizerBase`, *optional*): Reads synthetic texts, and tokens where a dataset has no
                texts. Defaults to that of the pipeline that computed the result.

        Returns:
            `Path`: the file.

        Raises:
            KeyError: If there is no such query.
            ValueError: If queries, rows or synset are not those of the result.
        """
        from hf_rgm.pages.exhibit import Exhibit
        from hf_rgm.pages.views import attribution_report

        exhibit = Exhibit(self, synset=synset, rows=rows, queries=queries, tokenizer=tokenizer)
        return attribution_report(exhibit, title=title, query_ids=query_ids).save(path)

    def save_pretrained(self, save_directory: str | Path, *, card: CardOptions | None = None) -> Path:
        """
        Writes the result to a folder: exact matrices, tables for viewers and a card. Replaces a result already there.

        Args:
            save_directory (`str` or `Path`): The folder.
            card (`CardOptions`, *optional*): Licence, links or another template for the card.

        Returns:
            `Path`: the folder.

        Raises:
            FileExistsError: If the folder holds something else.
        """
        text = attribution_card(self, card)
        with staged_folder(save_directory, CONFIG_FILE) as folder:
            write_result(self, folder, text)
        return Path(save_directory)

    def __repr__(self) -> str:
        rows = "" if self.row_scores is None else f", num_rows={self.row_scores.shape[1]}"
        return (
            f"AttributionResult(num_queries={self.num_queries}, num_clusters={self.num_clusters}{rows}, "
            f"objective={self.objective!r}, engine={self.engine!r}, {sizes_in_short(self.factors)})"
        )
