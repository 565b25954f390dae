"""Cluster maps as folders: files and their checks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from safetensors.numpy import save_file

from hf_rgm.files.reading import ArtefactFolder, parsed
from hf_rgm.files.writing import write_json

if TYPE_CHECKING:
    from hf_rgm.clusters.cluster_map import ClusterMap

FORMAT_VERSION = 2
CONFIG_FILE = "clusters.json"
TENSORS_FILE = "clusters.safetensors"
TABLE_FILE = "rows.parquet"  # for the Hub's viewer, never read


@dataclass
class ClustersHeader:
    """Content of `clusters.json`; see [`ClusterMap`]."""

    num_rows: int
    names: list[str]
    parents: list[int] | None
    parent_names: list[str] | None


def write_clusters(clusters: ClusterMap, folder: Path) -> None:
    """Writes a map's files to an empty folder."""
    save_file({"cluster_ids": np.ascontiguousarray(clusters.cluster_ids)}, folder / TENSORS_FILE)
    pd.DataFrame(
        {
            "row": np.arange(clusters.num_rows, dtype=np.int64),
            "cluster_id": clusters.cluster_ids,
            "cluster": np.array(clusters.names, dtype=object)[clusters.cluster_ids],
        }
    ).to_parquet(folder / TABLE_FILE, index=False)
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
    """The arguments of [`ClusterMap`] from a folder that `write_clusters` wrote."""
    content = folder.read_json(CONFIG_FILE, format_version=FORMAT_VERSION, again="make and save the map again")
    header = parsed(ClustersHeader, content, f"{folder}/{CONFIG_FILE}")
    with folder.open_tensors(TENSORS_FILE, num_bytes=8 * header.num_rows) as file:
        file.check_no_others(("cluster_ids",))
        cluster_ids = file.read("cluster_ids", shape=(header.num_rows,), dtypes=("I64",))
    parents = {"parents": header.parents, "parent_names": header.parent_names}
    return {"cluster_ids": cluster_ids.numpy(), "names": header.names, **parents}
