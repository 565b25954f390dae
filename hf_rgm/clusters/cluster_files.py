"""Cluster maps as folders: what is written, and what is checked when it is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa

from hf_rgm.files.reading import ArtefactFolder, parsed
from hf_rgm.files.writing import write_json

if TYPE_CHECKING:
    from hf_rgm.clusters.cluster_map import ClusterMap

FORMAT_VERSION = 1
CONFIG_FILE = "clusters.json"
ROWS_FILE = "rows.parquet"


@dataclass
class ClustersHeader:
    """
    What `clusters.json` must hold.

    Args:
        num_rows (`int`): Lines of `rows.parquet`.
        names, parents, parent_names (`list`): See [`ClusterMap`].
    """

    num_rows: int
    names: list[str]
    parents: list[int] | None
    parent_names: list[str] | None


def write_clusters(clusters: ClusterMap, folder: Path) -> None:
    """Writes a map's files to an empty folder."""
    pd.DataFrame(
        {
            "row": np.arange(clusters.num_rows, dtype=np.int64),
            "cluster_id": clusters.cluster_ids,
            "cluster": np.array(clusters.names, dtype=object)[clusters.cluster_ids],
        }
    ).to_parquet(folder / ROWS_FILE, index=False)
    write_json(
        folder / CONFIG_FILE,
        {
            "format_version": FORMAT_VERSION,
            "num_rows": clusters.num_rows,
            "names": list(clusters.names),
            "parents": None if clusters.parents is None else clusters.parents.tolist(),
            "parent_names": None if clusters.parent_names is None else list(clusters.parent_names),
        },
    )


def read_clusters(folder: ArtefactFolder) -> dict[str, Any]:
    """
    The arguments of [`ClusterMap`] from a folder that [`write_clusters`] wrote.

    Raises:
        FileNotFoundError: If a file is missing.
        MemoryError: If it is larger than the memory that is free.
        ValueError: If a file is damaged or of another format version.
    """
    content = folder.read_json(CONFIG_FILE, format_version=FORMAT_VERSION)
    header = parsed(ClustersHeader, content, f"{folder}/{CONFIG_FILE}")
    columns = {"row": pa.int64(), "cluster_id": pa.int64()}
    table = folder.read_parquet(ROWS_FILE, columns, num_rows=header.num_rows)
    rows, cluster_ids = (table[name].to_numpy() for name in columns)
    order = np.argsort(rows, kind="stable")
    if not np.array_equal(rows[order], np.arange(header.num_rows)):
        raise ValueError(
            f"The cluster map in {folder} is damaged ({ROWS_FILE} does not have every row once). Copy it again."
        )
    return {
        "cluster_ids": cluster_ids[order],
        "names": header.names,
        "parents": header.parents,
        "parent_names": header.parent_names,
    }
