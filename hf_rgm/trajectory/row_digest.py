"""Digest of all rows of a dataset, by stored content where that can be read without transforms and decoding."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from torch import Tensor

from hf_rgm.model.random_state import random_state_kept
from hf_rgm.trajectory.fingerprint import feed, sampled_digests

logger = logging.getLogger(__name__)

CHUNK_SIZE = 128
MAX_SECONDS = 60.0
"""Time for rows that must be computed to be read; of more, only some are."""
_TIMED_ROWS = 16


def rows_sha256(dataset: Any, columns: Collection[str], num_rows: int) -> str:
    """SHA-256 over `num_rows` evenly spaced rows, of `columns` only if the dataset has any of them."""
    # As in a fingerprint, numbers count by value. Rows of a `datasets.Dataset` are as stored: its fingerprint covers
    # what a transform makes of some of them.
    with random_state_kept():
        digest = hashlib.sha256()
        indices = np.unique(np.linspace(0, len(dataset) - 1, num_rows).round().astype(int))
        read = _reader(dataset, columns)
        for start in range(0, num_rows, CHUNK_SIZE):
            for name, values in read(indices[start : start + CHUNK_SIZE].tolist()):
                digest.update(name.encode())
                _feed_values(digest, values)
    return digest.hexdigest()


def readable_rows(dataset: Any, columns: Collection[str]) -> int:
    """Number of rows that can be read in the time allowed, 0 if they differ when they are read again."""
    length = len(dataset)
    if isinstance(dataset, datasets.Dataset):
        return length
    if length and not sampled_digests(dataset, columns):
        return 0
    start = time.perf_counter()
    timed = min(_TIMED_ROWS, length)
    with random_state_kept():
        for index in range(timed):
            dataset[index]
    seconds = (time.perf_counter() - start) / max(1, timed)
    found = min(length, int(MAX_SECONDS / seconds)) if seconds else length
    if found < length:
        logger.warning(
            "Reading all %d rows of the training set would take %.0f s, so only %d of them will be compared with the "
            "rows given for attribution. A `datasets.Dataset` is read faster.",
            length,
            seconds * length,
            found,
        )
    return found


def _reader(dataset: Any, columns: Collection[str]) -> Callable[[list[int]], Iterator[tuple[str, Sequence[Any]]]]:
    """A function of row numbers that gives their values by column."""
    if not isinstance(dataset, datasets.Dataset):
        return lambda rows: _by_column([dataset[row] for row in rows], columns)
    stored = [name for name in dataset.column_names if name in columns]
    transformed = dataset.format["type"] == "custom"
    names = sorted(dataset.column_names if transformed or not stored else stored)
    media = [name for name in names if hasattr(dataset.features[name], "decode")]
    plain = dataset.select_columns(names)
    for name in media:
        plain = plain.cast_column(name, type(dataset.features[name])(decode=False))
    numbers = plain.with_format("numpy", columns=[name for name in names if name not in media])
    files = plain.with_format(None, columns=media)

    def read(rows: list[int]) -> Iterator[tuple[str, Sequence[Any]]]:
        part: Any = slice(rows[0], rows[-1] + 1) if rows[-1] - rows[0] == len(rows) - 1 else rows
        found = {**(numbers[part] if numbers.format["columns"] else {}), **(files[part] if media else {})}
        for name in names:
            yield name, [*map(_content, found[name])] if name in media else found[name]

    return read


def _by_column(items: list[Any], columns: Collection[str]) -> Iterator[tuple[str, Sequence[Any]]]:
    if not all(isinstance(item, Mapping) for item in items):
        yield "", items
        return
    found = {name for item in items for name in item}
    for name in sorted({*columns} & found or found):
        yield name, [item.get(name) for item in items]


def _content(stored: Mapping[str, Any] | None) -> bytes | None:
    """Bytes of a picture or sound that is stored beside the dataset, or in it."""
    if stored is None:
        return None
    return Path(stored["path"]).read_bytes() if stored["bytes"] is None else stored["bytes"]


def _feed_values(digest: Any, values: Sequence[Any]) -> None:
    arrays = [_numbers(value) for value in values]
    numeric = [array for array in arrays if array is not None]
    if len(numeric) < len(arrays):
        for value in values:
            feed(digest, value)
        return
    digest.update(np.array([size for array in numeric for size in (array.ndim, *array.shape)], "<i8").tobytes())
    digest.update(
        "".join(("f" if array.dtype.kind == "f" else "i") if array.size else "-" for array in numeric).encode()
    )
    for array in numeric:
        digest.update(np.ascontiguousarray(array, "<f4" if array.dtype.kind == "f" else "<i8").tobytes())


def _numbers(value: Any) -> np.ndarray | None:
    """Numbers as an array, `None` of anything else."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = value.float().numpy() if value.is_floating_point() else value.numpy()
    if isinstance(value, str | bytes | Mapping) or value is None:
        return None
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError):
        return None
    return array if array.dtype.kind in "biuf" else None
