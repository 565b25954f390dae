"""Fingerprints of datasets, by content."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Mapping
from numbers import Number
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from hf_rgm.model.random_state import random_state_kept
from hf_rgm.model.warn_once import warn_once

logger = logging.getLogger(__name__)

_MAX_ROWS = 64


def dataset_fingerprint(dataset: Any, columns: Collection[str] | None = None) -> str:
    """SHA-256 over a dataset's length and up to 64 evenly spaced rows, of `columns` only if given."""
    # Numbers count by value: a list of Python floats, a float64 array and a float32 tensor agree. Columns that the
    # model does not take are left out, so that a dataset is recognised after the Trainer dropped them.
    if not hasattr(dataset, "__len__"):
        raise TypeError(f"`dataset` must be a map-style dataset with a length, got {type(dataset).__name__}.")
    length = len(dataset)
    digests = sampled_digests(dataset, columns)
    if length and not digests:
        warn_once(
            logger,
            "Rows of the training set differ when they are read again (random augmentation?), so its fingerprint "
            "covers only its length, %d. Attribution will see other augmentations than training did.",
            length,
        )
    return hashlib.sha256(b"".join([str(length).encode(), *digests])).hexdigest()


def sampled_digests(dataset: Any, columns: Collection[str] | None) -> list[bytes]:
    """Digests of up to 64 evenly spaced rows, none if they differ when they are read again."""
    indices = np.unique(np.linspace(0, len(dataset) - 1, min(_MAX_ROWS, len(dataset))).round().astype(int)).tolist()
    with random_state_kept():
        first, second = ([_row_digest(dataset[index], columns) for index in indices] for _ in range(2))
    return first if first == second else []


def _row_digest(row: Any, columns: Collection[str] | None) -> bytes:
    if isinstance(row, Mapping) and columns is not None and any(name in row for name in columns):
        row = {name: row[name] for name in columns if name in row}
    digest = hashlib.sha256()
    feed(digest, row)
    return digest.digest()


def feed(digest: Any, value: Any) -> None:
    if isinstance(value, str):
        value = value.encode()
    if isinstance(value, bytes):
        digest.update(f"bytes{len(value)}".encode() + value)
    elif isinstance(value, Mapping):
        digest.update(f"mapping{len(value)}".encode())
        for key in sorted(value, key=str):
            feed(digest, str(key))
            feed(digest, value[key])
    elif isinstance(value, Tensor):
        tensor = value.detach().cpu()
        _feed_array(digest, tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy())
    elif isinstance(value, Image.Image):
        digest.update(f"image{value.mode}{value.size}".encode() + value.tobytes())
    elif isinstance(value, list | tuple):
        _feed_sequence(digest, value)
    elif isinstance(value, np.ndarray | np.generic | Number):
        _feed_array(digest, np.asarray(value))
    else:
        digest.update(f"{type(value).__module__}.{type(value).__qualname__}".encode())


def _feed_sequence(digest: Any, values: list[Any] | tuple[Any, ...]) -> None:
    try:
        array = np.asarray(values)
    except (ValueError, TypeError, RuntimeError):
        array = np.empty(0, object)
    if array.dtype.kind in "biuf":
        _feed_array(digest, array)
        return
    digest.update(f"sequence{len(values)}".encode())
    for value in values:
        feed(digest, value)


def _feed_array(digest: Any, array: np.ndarray) -> None:
    if array.dtype.kind == "O":
        _feed_sequence(digest, array.ravel().tolist())
        return
    kind = {"f": "<f4", "b": "<i8", "i": "<i8", "u": "<i8"}.get(array.dtype.kind, array.dtype.str)
    digest.update(f"array{array.shape}{kind if array.size else ''}".encode())
    digest.update(np.ascontiguousarray(array.astype(kind)).tobytes())
