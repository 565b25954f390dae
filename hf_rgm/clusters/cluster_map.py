"""The cluster of every training row."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from hf_rgm.clusters.cluster_files import CONFIG_FILE, read_clusters, write_clusters
from hf_rgm.clusters.grouping import (
    as_numpy,
    as_points,
    checked_partition,
    group_by_columns,
    group_by_embeddings,
    k_means_cells,
)
from hf_rgm.files.names import checked_names, warn_of_names
from hf_rgm.files.reading import ArtefactFolder, printable
from hf_rgm.files.writing import staged_folder


@dataclass(frozen=True, eq=False, repr=False)
class ClusterMap:
    """
    A partition of the training rows into named clusters, the unit of attribution. No cluster is empty.

    Make one with `from_column`, `from_ids`, `from_embeddings` or `from_rows`.

    Args:
        cluster_ids (`np.ndarray`): The cluster of each row, `(num_rows,)`, int64.
        names (`tuple[str, ...]`): The name of each cluster, all different. Control characters are escaped.
        parents (`np.ndarray`, *optional*): The cluster of the coarser map that [`ClusterMap.refine`] split,
            `(num_clusters,)`, int64.
        parent_names (`tuple[str, ...]`, *optional*): Names of the coarser map's clusters.

    Raises:
        ValueError: If there are no rows, a cluster is empty or missing, names repeat, or ids are negative.

    Example:

    ```python
    >>> from hf_rgm import ClusterMap
    >>> rows = [{"source": "imdb"}, {"source": "yelp"}, {"source": "imdb"}]
    >>> clusters = ClusterMap.from_column(rows, "source")
    >>> clusters
    ClusterMap(num_rows=3, num_clusters=2, names=('imdb', 'yelp'))
    >>> clusters.rows("imdb")
    array([0, 2])
    ```
    """

    cluster_ids: np.ndarray
    names: tuple[str, ...]
    parents: np.ndarray | None = None
    parent_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        names = tuple(checked_names(self.names, "a cluster"))
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "cluster_ids", checked_partition(self.cluster_ids, names, what="cluster"))
        if (self.parents is None) != (self.parent_names is None):
            raise ValueError("`parents` and `parent_names` belong together. Pass both or neither.")
        if self.parents is not None and self.parent_names is not None:
            parent_names = tuple(checked_names(self.parent_names, "a parent cluster"))
            if len(self.parents) != len(names):
                raise ValueError(
                    f"`parents` has {len(self.parents)} entries for {len(names)} clusters. Pass one each."
                )
            object.__setattr__(self, "parent_names", parent_names)
            object.__setattr__(self, "parents", checked_partition(self.parents, parent_names, what="parent cluster"))

    @classmethod
    def from_column(cls, dataset: Any, columns: str | Sequence[str]) -> ClusterMap:
        """
        One cluster per value of a column, or per combination of values of several columns.

        Args:
            dataset: A `datasets.Dataset`, a list of dictionaries, or a map-style dataset whose items are dictionaries.
            columns (`str` or `Sequence[str]`): One column, whose text, `ClassLabel` names or `"label=3"` name the
                clusters, or several (`"source=imdb, label=1"`). Clusters are in sorted order.

        Raises:
            KeyError: If the dataset has no such column.
            TypeError: If the dataset has no length, its items are not dictionaries, or values cannot be compared.
            ValueError: If the dataset is empty or a value is missing.
        """
        ids, names = group_by_columns(dataset, [columns] if isinstance(columns, str) else list(columns))
        return cls(ids, tuple(names))

    @classmethod
    def from_ids(cls, ids: Any, names: Sequence[str] | None = None) -> ClusterMap:
        """
        Clusters from the cluster number of each row.

        Args:
            ids (`np.ndarray` or `Sequence[int]`): `(num_rows,)`, integers from 0 to `num_clusters - 1`.
            names (`Sequence[str]`, *optional*, defaults to `"cluster 0"`, `"cluster 1"`, ...): One for each cluster.

        Raises:
            TypeError: If the ids are not integers.
            ValueError: If a cluster has no row, an id is negative or has no name, or there are no rows.
        """
        ids = as_numpy(ids)
        if names is None:
            countable = ids.ndim == 1 and ids.size and np.issubdtype(ids.dtype, np.integer)
            count = min(int(ids.max()) + 1, len(ids)) if countable else 0
            names = [f"cluster {k}" for k in range(count)]
        return cls(ids, tuple(names))

    @classmethod
    def from_rows(cls, num_rows: int) -> ClusterMap:
        """
        Every row is a cluster of its own, named `"row 0"`, `"row 1"`, ...

        Raises:
            ValueError: If `num_rows` is smaller than 1.
        """
        if num_rows < 1:
            raise ValueError(f"`num_rows` must be at least 1, got {num_rows}. Pass the length of the training set.")
        return cls(np.arange(num_rows, dtype=np.int64), tuple(f"row {row}" for row in range(num_rows)))

    @classmethod
    def from_embeddings(
        cls,
        embeddings: Any,
        *,
        labels: Any = None,
        num_clusters: int | None = None,
        num_clusters_per_class: int | None = None,
        label_names: Sequence[str] | None = None,
        seed: int = 0,
    ) -> ClusterMap:
        """
        Clusters of nearby rows by k-means, within each class if `labels` are given.

        Args:
            embeddings (`np.ndarray` or `torch.Tensor`): Model features or raw inputs, `(num_rows, ...)`, flattened.
            labels (`Sequence`, *optional*): The class of each row, `(num_rows,)`. No cluster mixes classes.
            num_clusters (`int`, *optional*): Number of clusters, required without `labels`.
            num_clusters_per_class (`int`, *optional*, defaults to `5`): Number of clusters of each class, with
                `labels`.
            label_names (`Sequence[str]`, *optional*): Name of class 0, 1, ..., such as
                `dataset.features["label"].names`. Without it clusters are named `"label 3 / cell 2"`.
            seed (`int`, *optional*, defaults to `0`): Seed of k-means.

        Raises:
            ValueError: If embeddings are NaN or infinite, lengths differ, there are fewer (distinct) rows than
                clusters, or the wrong one of the two numbers of clusters is given.
        """
        points = as_points(embeddings)
        if labels is None:
            if num_clusters is None or num_clusters_per_class is not None:
                raise ValueError("Without `labels`, pass `num_clusters` and no `num_clusters_per_class`.")
            ids = k_means_cells(points, num_clusters, seed=seed, what="the dataset")
            return cls(ids, tuple(f"cell {k}" for k in range(num_clusters)))
        if num_clusters is not None:
            raise ValueError("With `labels`, pass `num_clusters_per_class` in place of `num_clusters`.")
        count = 5 if num_clusters_per_class is None else num_clusters_per_class
        ids, names = group_by_embeddings(points, as_numpy(labels), count, label_names, seed)
        return cls(ids, tuple(names))

    def refine(
        self,
        cluster: str | int,
        embeddings: Any = None,
        *,
        num_clusters: int | None = None,
        ids: Any = None,
        names: Sequence[str] | None = None,
        seed: int = 0,
    ) -> ClusterMap:
        """
        Splits one cluster and leaves the others; [`ClusterMap.coarsen`] undoes it.

        Args:
            cluster (`str` or `int`): The cluster to split.
            embeddings (`np.ndarray` or `torch.Tensor`, *optional*): `(num_rows, ...)` for all rows, or `(size, ...)`
                for the cluster's in the order of `rows(cluster)`. Split by k-means into `num_clusters`.
            num_clusters (`int`, *optional*): Number of parts, with `embeddings`.
            ids (`Sequence[int]`, *optional*): In place of `embeddings`, the part of each row, integers from 0,
                `(num_rows,)` or `(size,)`.
            names (`Sequence[str]`, *optional*, defaults to `"<cluster> / cell 0"`, ...): One for each part.
            seed (`int`, *optional*, defaults to `0`): Seed of k-means.

        Returns:
            `ClusterMap`: the parts take the cluster's place; `parents` says where each came from.

        Raises:
            KeyError: If there is no such cluster.
            ValueError: If neither or both ways to split are given, or a part would be empty.
        """
        k = self.index(cluster)
        rows = self.rows(k)
        if (embeddings is None) == (ids is None) or (embeddings is None) != (num_clusters is None):
            raise ValueError("Pass `embeddings` with `num_clusters`, or `ids`.")
        values = as_points(embeddings) if ids is None else as_numpy(ids)
        if len(values) not in (len(rows), self.num_rows):
            raise ValueError(
                f"Got values for {len(values)} rows to split cluster '{self.names[k]}'. Pass them for its {len(rows)} "
                f"rows or for all {self.num_rows}."
            )
        values = values if len(values) == len(rows) else values[rows]
        if num_clusters is not None:
            values = k_means_cells(values, num_clusters, seed=seed, what=f"cluster '{self.names[k]}'")
        parts = ClusterMap.from_ids(values, names)
        if names is None:
            names = [f"{self.names[k]} / cell {cell}" for cell in range(parts.num_clusters)]
        extra = parts.num_clusters - 1
        new_ids = np.where(self.cluster_ids > k, self.cluster_ids + extra, self.cluster_ids)
        new_ids[rows] = k + parts.cluster_ids
        return ClusterMap(
            new_ids,
            (*self.names[:k], *names, *self.names[k + 1 :]),
            parents=np.insert(np.arange(self.num_clusters), k, [k] * extra),
            parent_names=self.names,
        )

    def coarsen(self) -> ClusterMap:
        """The map that [`ClusterMap.refine`] split; raises a `ValueError` if this map was made otherwise."""
        if self.parents is None or self.parent_names is None:
            raise ValueError("This map refines no other. Make the coarser map with `from_ids` or `from_column`.")
        return ClusterMap(self.parents[self.cluster_ids], self.parent_names)

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return len(self.cluster_ids)

    @property
    def num_clusters(self) -> int:
        """Number of clusters."""
        return len(self.names)

    @cached_property
    def sizes(self) -> np.ndarray:
        """Number of rows of each cluster, `(num_clusters,)`, int64."""
        return np.bincount(self.cluster_ids, minlength=self.num_clusters)

    @cached_property
    def _rows(self) -> list[np.ndarray]:
        return np.split(np.argsort(self.cluster_ids, kind="stable"), np.cumsum(self.sizes)[:-1])

    @cached_property
    def _index(self) -> dict[str, int]:
        return {name: k for k, name in enumerate(self.names)}

    def rows(self, cluster: str | int) -> np.ndarray:
        """Rows of a cluster in ascending order, `(size,)`, int64."""
        return self._rows[self.index(cluster)]

    def index(self, cluster: str | int) -> int:
        """Position of a cluster given by name or position; raises a `KeyError` or `IndexError` if there is none."""
        if isinstance(cluster, str):
            cluster = printable(cluster)
            if cluster not in self._index:
                holding = [name for name in self.names if cluster.lower() in name.lower()]
                alike = holding or difflib.get_close_matches(cluster, self.names, n=5, cutoff=0.5) or self.names
                listed = ", ".join(f"'{name}'" for name in alike[:5]) + (", ..." if len(alike) > 5 else "")
                raise KeyError(f"No cluster is named '{cluster}'. Names like it: {listed}.")
            return self._index[cluster]
        position = operator.index(cluster)
        if not 0 <= position < self.num_clusters:
            raise IndexError(f"Cluster {position} is out of range: there are {self.num_clusters}, counted from 0.")
        return position

    def check_num_rows(self, num_rows: int, what: str = "the dataset") -> None:
        """Raises a `ValueError` unless the map covers this number of rows."""
        if num_rows != self.num_rows:
            raise ValueError(
                f"The clusters cover {self.num_rows} rows, but {what} has {num_rows}. Make the `ClusterMap` from the "
                "very dataset the model was trained on."
            )

    def save(self, folder: str | Path) -> None:
        """Writes the map to a folder (replaces a map there): JSON, safetensors and a parquet table for viewers."""
        with staged_folder(folder, CONFIG_FILE) as staging:
            write_clusters(self, staging)

    @classmethod
    def load(cls, folder: str | Path | ArtefactFolder) -> ClusterMap:
        """
        Reads a map that [`ClusterMap.save`] wrote.

        Raises:
            FileNotFoundError: If a file is missing.
            MemoryError: If it is larger than the free memory.
            ValueError: If a file is damaged or has another format version.
        """
        folder = folder if isinstance(folder, ArtefactFolder) else ArtefactFolder(folder)
        arguments = read_clusters(folder)
        try:
            clusters = cls(**arguments)
        except (OverflowError, TypeError, ValueError) as error:
            raise ValueError(f"The cluster map in {folder} is damaged ({error}). Copy or make it again.") from error
        warn_of_names(clusters.names, folder)
        return clusters

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ClusterMap):
            return NotImplemented
        return (
            self.names == other.names
            and self.parent_names == other.parent_names
            and np.array_equal(self.cluster_ids, other.cluster_ids)
            and (self.parents is None or other.parents is None or np.array_equal(self.parents, other.parents))
        )

    def __repr__(self) -> str:
        shown = self.names if self.num_clusters <= 8 else (*self.names[:7], "...")
        return f"ClusterMap(num_rows={self.num_rows}, num_clusters={self.num_clusters}, names={shown})"
