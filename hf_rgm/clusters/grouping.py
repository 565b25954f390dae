"""Grouping dataset rows: by columns, and by k-means on embeddings."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from sklearn.cluster import KMeans


def group_by_columns(dataset: Any, columns: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Group of each row `(num_rows,)` int64, and the groups' names: combinations of column values, in sorted order."""
    if not hasattr(dataset, "__len__"):
        raise TypeError(
            f"`dataset` must have a length, got {type(dataset).__name__}. Materialise streaming data first, for "
            "example with `datasets.Dataset.from_list(list(stream))`."
        )
    if not columns or len(dataset) == 0:
        raise ValueError(
            f"Cannot group {len(dataset)} rows by {len(columns)} columns. Pass a dataset with rows, and a column."
        )
    if isinstance(dataset, datasets.Dataset):
        values = [_hub_column(dataset, column) for column in columns]
    else:
        values = _item_columns(dataset, columns)
    for column, column_values in zip(columns, values, strict=True):
        _check_values(column, column_values)
    cells = list(zip(*values, strict=True))
    found = sorted(set(cells), key=lambda cell: tuple((isinstance(value, str), value) for value in cell))
    position = {cell: k for k, cell in enumerate(found)}
    ids = np.array([position[cell] for cell in cells], dtype=np.int64)
    if len(columns) == 1:
        return ids, [value if isinstance(value, str) else f"{columns[0]}={value}" for (value,) in found]
    return ids, [", ".join(f"{c}={value}" for c, value in zip(columns, cell, strict=True)) for cell in found]


def group_by_embeddings(
    points: np.ndarray, labels: np.ndarray, cells_per_class: int, label_names: Sequence[str] | None, seed: int
) -> tuple[np.ndarray, list[str]]:
    """Cell of each row `(num_rows,)` int64, and the cells' names: k-means within each class."""
    if labels.shape != (len(points),):
        raise ValueError(f"`labels` have shape {labels.shape} for {len(points)} embeddings. Pass one label a row.")
    ids = np.empty(len(points), dtype=np.int64)
    names: list[str] = []
    for label in np.unique(labels).tolist():
        name = label if isinstance(label, str) else f"label {label}"
        if label_names is not None:
            if not isinstance(label, int) or not 0 <= label < len(label_names):
                raise IndexError(f"Label {label!r} has none of the {len(label_names)} `label_names`. Pass them all.")
            name = label_names[label]
        members = np.flatnonzero(labels == label)
        ids[members] = len(names) + k_means_cells(points[members], cells_per_class, seed=seed, what=f"'{name}'")
        names.extend(f"{name} / cell {cell}" for cell in range(cells_per_class))
    return ids, names


def k_means_cells(points: np.ndarray, num_cells: int, *, seed: int, what: str) -> np.ndarray:
    """Cells `(num_points,)` int64 of points `(num_points, dim)` by k-means, the largest first."""
    if num_cells < 1:
        raise ValueError(f"The number of clusters must be at least 1, got {num_cells}.")
    distinct = len(np.unique(points, axis=0))
    if distinct < num_cells:
        raise ValueError(
            f"Cannot divide {what} into {num_cells} clusters: it has {len(points)} rows, {distinct} of them distinct. "
            "Ask for fewer clusters."
        )
    restarts: Any = 4  # scikit-learn's default "auto" makes type checkers expect text
    cells = KMeans(num_cells, n_init=restarts, random_state=seed).fit_predict(points)
    by_size = np.argsort(-np.bincount(cells, minlength=num_cells), kind="stable")
    return np.argsort(by_size)[cells].astype(np.int64)


def as_points(embeddings: Any) -> np.ndarray:
    """Embeddings as one finite vector per row, `(num_rows, dim)`, float64."""
    points = as_numpy(embeddings).astype(np.float64)
    if points.ndim < 2 or points.size == 0:
        raise ValueError(f"`embeddings` must have shape (num_rows, dim), got {points.shape}. Pass one vector a row.")
    points = points.reshape(len(points), -1)
    bad = np.flatnonzero(~np.isfinite(points).all(axis=1))
    if len(bad):
        raise ValueError(
            f"`embeddings` are NaN or infinite in {len(bad)} rows ({bad[:5].tolist()}). Clean them first."
        )
    return points


def as_numpy(values: Any) -> np.ndarray:
    """Array of `values`, which may be a tensor of any dtype and device."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = (values.float() if values.is_floating_point() else values).numpy()
    return np.asarray(values)


def check_distinct(values: Sequence[object], what: str) -> None:
    """Refuses values that repeat."""
    repeated = [str(value) for value, count in Counter(values).items() if count > 1]
    if repeated:
        raise ValueError(f"The {what} must differ, but these repeat: {', '.join(repeated[:5])}. Rename them.")


def checked_partition(ids: Any, names: Sequence[str], what: str) -> np.ndarray:
    """Read-only ids `(num_rows,)` int64 after a check that every name occurs; `what` names a group in errors."""
    ids = as_numpy(ids)
    if ids.ndim != 1 or len(ids) == 0:
        raise ValueError(f"There must be one {what} id for each of at least one row, got shape {ids.shape}.")
    if not np.issubdtype(ids.dtype, np.integer):
        raise TypeError(
            f"The {what} ids must be integers, got {ids.dtype}. For other values use `ClusterMap.from_column`."
        )
    if len(names) > len(ids):
        raise ValueError(f"There are {len(names)} {what}s for {len(ids)} rows. Make at most one for each row.")
    check_distinct(names, f"{what} names")
    if ids.min() < 0 or ids.max() >= len(names):
        row = int(np.flatnonzero((ids < 0) | (ids >= len(names)))[0])
        raise ValueError(
            f"Row {row} has {what} id {ids[row]}, which must be from 0 to {len(names) - 1}. Number them without gaps, "
            "for example with `np.unique(ids, return_inverse=True)`."
        )
    empty = np.flatnonzero(np.bincount(ids, minlength=len(names)) == 0)
    if len(empty):
        shown = ", ".join(f"'{names[k]}'" for k in empty[:5])
        raise ValueError(f"{len(empty)} of {len(names)} {what}s have no rows: {shown}. Leave them out and renumber.")
    result = ids.astype(np.int64)
    result.setflags(write=False)
    return result


def _hub_column(dataset: datasets.Dataset, column: str) -> list[Any]:
    if column not in dataset.column_names:
        raise KeyError(_no_column(column, dataset.column_names))
    values = list(dataset.with_format(None)[column])
    feature = dataset.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return [None if value is None or value < 0 else feature.int2str(value) for value in values]
    return values


def _item_columns(dataset: Any, columns: Sequence[str]) -> list[list[Any]]:
    values: list[list[Any]] = [[] for _ in columns]
    for row in range(len(dataset)):
        item = dataset[row]
        if not isinstance(item, Mapping):
            raise TypeError(
                f"Item {row} of the dataset is a {type(item).__name__}, not a dictionary with columns. Use "
                "`ClusterMap.from_ids` with the ids of your own."
            )
        for column, column_values in zip(columns, values, strict=True):
            if column not in item:
                raise KeyError(_no_column(column, list(item)))
            value = item[column]
            column_values.append(value.item() if isinstance(value, (torch.Tensor, np.ndarray, np.generic)) else value)
    return values


def _no_column(column: str, columns: Sequence[str]) -> str:
    return f"The dataset has no column '{column}'. It has: {', '.join(columns)}."


def _check_values(column: str, values: list[Any]) -> None:
    missing = [row for row, v in enumerate(values) if v is None or (isinstance(v, float) and math.isnan(v))]
    if missing:
        raise ValueError(
            f"Column '{column}' has no value in {len(missing)} rows ({missing[:5]}). Fill them, for example with "
            "'unknown', or take the rows out before training."
        )
    for value in values:
        if not isinstance(value, (str, int, float)):
            raise TypeError(
                f"Column '{column}' holds {type(value).__name__} values. Clusters come from text or numbers; for "
                "anything else use `ClusterMap.from_ids` or `ClusterMap.from_embeddings`."
            )
