"""Pictures and sounds in datasets, whose bytes are looked at, and whose paths are not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import datasets.config
import pyarrow as pa
from huggingface_hub import constants

LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)


def without_paths(rows: Any, source: object) -> Any:
    """Refuses rows whose pictures are paths that lead out of the caches of the Hub: reading them would open these."""
    caches = [Path(cache).resolve() for cache in (constants.HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE)]
    for part in rows.values() if isinstance(rows, datasets.DatasetDict) else [rows]:
        for column in part.data.itercolumns():
            for path in (path for chunk in column.chunks for path in _paths(chunk)):
                if "://" in path or not any(Path(path).resolve().is_relative_to(cache) for cache in caches):
                    raise ValueError(
                        f"{source} names the file {path[:200]!r} in place of a picture, which is not opened. Load the "
                        "files where they are, and pass what `dataset.save_to_disk(folder)` writes: it embeds them."
                    )
    return rows


def _paths(values: pa.Array) -> Iterator[str]:
    """Paths without bytes in a column, however nested."""
    if pa.types.is_struct(values.type):
        members = dict(zip((item.name for item in values.type), values.flatten(), strict=True))
        if set(members) == {"bytes", "path"}:
            yield from members["path"].filter(members["bytes"].is_null()).drop_null().to_pylist()
        else:
            for member in members.values():
                yield from _paths(member)
    elif any(is_list(values.type) for is_list in LISTS):
        yield from _paths(values.flatten())
