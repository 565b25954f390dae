"""Results as folders: tables, matrices and the card that are written, and what is checked when it is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save_file

from hf_rgm.agreement.fidelity_figures import check_kept_report, describe_sizes
from hf_rgm.files.names import checked_names
from hf_rgm.files.reading import WAY_OUT, ArtefactFolder, parsed
from hf_rgm.files.writing import write_json
from hf_rgm.hub.artefact import LOCAL, CardOptions
from hf_rgm.hub.cards import TAGS, escaped, fidelity_section, model_name, recorded_model, render, table
from hf_rgm.trajectory.description import FROM_CHECKPOINTS

if TYPE_CHECKING:
    from hf_rgm.results.result import AttributionResult

FORMAT_VERSION = 2
CONFIG_FILE = "attribution.json"
TENSORS_FILE = "attribution.safetensors"
TABLES = ("top", "scores", "clusters", "queries")
# Patterns of all files of a result.
FILES = ("README.md", CONFIG_FILE, TENSORS_FILE, *(f"{name}/*" for name in TABLES))
TOP_CLUSTERS = 10
EXAMPLE_ROWS = 3
NUM_EXTREMES = 5
USAGE = """\
from datasets import load_dataset
from hf_rgm import AttributionResult

result = AttributionResult.from_pretrained("{repo_id}")  # exact
top = load_dataset("{repo_id}", split="train")  # a table"""


@dataclass
class ResultDescription:
    """Content of `attribution.json`; see [`AttributionResult`]."""

    cluster_names: list[str]
    query_ids: list[str | int]
    objective: str
    engine: str
    num_rows: int | None  # where rows are scored
    has_cluster_ids: bool
    metadata: dict[str, Any]


def write_result(result: AttributionResult, folder: Path, card: str) -> None:
    """Writes a result's files to an empty folder."""
    tensors = {
        "scores": result.scores,
        "cluster_sizes": result.cluster_sizes,
        "objective_values": result.objective_values,
        "row_scores": result.row_scores,
        "cluster_ids": result.cluster_ids,
    }
    # PyTorch's writer takes arrays from where they are, so that a mapped one goes from file to file.
    save_file(
        {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in tensors.items() if array is not None},
        folder / TENSORS_FILE,
    )
    tables = {
        "top": result.to_dataset(TOP_CLUSTERS).to_pandas(),
        "scores": pd.DataFrame({"query_id": result.query_ids, "scores": list(result.scores)}),
        "clusters": pd.DataFrame(
            {"cluster": result.cluster_names, "size": result.cluster_sizes, "mean_score": result.scores.mean(axis=0)}
        ),
        "queries": pd.DataFrame({"query_id": result.query_ids, "objective_value": result.objective_values}),
    }
    for name, content in tables.items():
        (folder / name).mkdir()
        content.to_parquet(folder / name / "train.parquet", index=False)
    write_json(
        folder / CONFIG_FILE,
        {
            "format_version": FORMAT_VERSION,
            "objective": result.objective,
            "engine": result.engine,
            "sign_convention": result.SIGN_CONVENTION,
            "num_queries": result.num_queries,
            "num_clusters": result.num_clusters,
            "num_rows": None if result.row_scores is None else result.row_scores.shape[1],
            "has_cluster_ids": result.cluster_ids is not None,
            "cluster_names": list(result.cluster_names),
            "query_ids": list(result.query_ids),
            "metadata": result.metadata,
        },
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def read_result(folder: ArtefactFolder) -> dict[str, Any]:
    """The arguments of [`AttributionResult`] from a folder that `write_result` wrote."""
    source = f"{folder}/{CONFIG_FILE}"
    content = folder.read_json(CONFIG_FILE, format_version=FORMAT_VERSION, again="attribute again")
    description = parsed(ResultDescription, content, source)
    _check_description(description, source)
    num_queries, num_clusters = len(description.query_ids), len(description.cluster_names)
    with folder.open_tensors(TENSORS_FILE) as file:
        file.check_no_others(("scores", "cluster_sizes", "objective_values", "row_scores", "cluster_ids"))
        arguments = {
            "scores": file.read("scores", shape=(num_queries, num_clusters), dtypes=("F32",)),
            "cluster_sizes": file.read("cluster_sizes", shape=(num_clusters,), dtypes=("I64",)),
            "objective_values": file.read("objective_values", shape=(num_queries,), dtypes=("F32",)),
        }
        if description.num_rows is not None:
            shape = (num_queries, description.num_rows)
            arguments["row_scores"] = file.read("row_scores", shape=shape, dtypes=("F32",))
        sizes = arguments["cluster_sizes"].tolist()
        if min(sizes) < 0 or sum(sizes) >= 2**63:
            raise ValueError(
                f"{file.path} has cluster sizes from {min(sizes)} to {max(sizes)}; they must be numbers of rows. "
                f"{WAY_OUT}"
            )
        if description.has_cluster_ids:
            ids = file.read("cluster_ids", shape=(sum(sizes),), dtypes=("I64",))
            if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < num_clusters:
                raise ValueError(
                    f"{file.path} has cluster ids from {int(ids.min())} to {int(ids.max())} for {num_clusters} "
                    f"clusters. {WAY_OUT}"
                )
            arguments["cluster_ids"] = ids
    return {
        **{name: tensor.numpy() for name, tensor in arguments.items()},
        "cluster_names": description.cluster_names,
        "query_ids": description.query_ids,
        "objective": checked_names([description.objective], "an objective")[0],
        "engine": checked_names([description.engine], "an engine")[0],
        "metadata": description.metadata,
    }


def _check_description(description: ResultDescription, source: str) -> None:
    if not description.query_ids or not description.cluster_names:
        raise ValueError(
            f"{source} names {len(description.query_ids)} queries and {len(description.cluster_names)} clusters; "
            f"there must be at least one of each. {WAY_OUT}"
        )
    if any(isinstance(query, int) and query >= 2**63 for query in description.query_ids):
        raise ValueError(f"{source} has query ids that are no 64-bit integers. {WAY_OUT}")
    check_kept_report(description.metadata.get("fidelity"), f"`metadata` of {source}")


def long_form(result: AttributionResult, k: int | None = None) -> pd.DataFrame:
    """One line for each query and cluster, or the `k` highest and `k` lowest of each query, the highest first."""
    scores, sizes = result.scores, result.cluster_sizes
    num_queries, num_clusters = scores.shape
    ranks = np.arange(num_clusters)
    if k is not None and 2 * k < num_clusters:
        ranks = np.concatenate([ranks[:k], ranks[-k:]])
    chosen = np.argsort(-scores, axis=1, kind="stable")[:, ranks]
    frame = pd.DataFrame(
        {
            "query_id": np.repeat(np.array(result.query_ids), len(ranks)),
            "rank": np.tile(ranks + 1, num_queries),
            "cluster": np.array(result.cluster_names, dtype=object)[chosen].ravel(),
            "score": np.take_along_axis(scores, chosen, axis=1).ravel(),
            "size": sizes[chosen].ravel(),
        }
    )
    if result.cluster_ids is not None:
        members = np.split(np.argsort(result.cluster_ids, kind="stable"), np.cumsum(sizes)[:-1])
        frame["example_rows"] = [
            _examples(members[cluster], score, None if result.row_scores is None else result.row_scores[query])
            for query, clusters in enumerate(chosen)
            for cluster, score in zip(clusters, scores[query, clusters], strict=True)
        ]
    return frame


def _examples(rows: np.ndarray, cluster_score: float, row_scores: np.ndarray | None) -> list[int]:
    """Rows that push most in the direction of their cluster; without row scores, its first rows."""
    if row_scores is not None:
        direction = 1.0 if cluster_score >= 0 else -1.0
        rows = rows[np.argsort(-direction * row_scores[rows], kind="stable")]
    return rows[:EXAMPLE_ROWS].tolist()


def attribution_card(result: AttributionResult, options: CardOptions | None = None) -> str:
    """The `README.md` of a result."""
    options = options or CardOptions()
    described = result.metadata.get("model")
    repo_id = options.repo_id or LOCAL
    by_checkpoints = result.metadata.get(FROM_CHECKPOINTS)
    return render(
        "attribution_card.md",
        options,
        base_model=recorded_model(described),
        tags=[*TAGS, "attribution"],
        configs=[
            {"config_name": name, "data_files": f"{name}/*.parquet", **({"default": True} if name == "top" else {})}
            for name in TABLES
        ],
        model=model_name(options, described),
        objective=escaped(result.objective),
        engine=escaped(result.engine) + (" (training known by its checkpoints)" if by_checkpoints else ""),
        num_queries=result.num_queries,
        num_clusters=result.num_clusters,
        num_rows=0 if result.row_scores is None else result.row_scores.shape[1],
        sign_convention=result.SIGN_CONVENTION,
        sizes=describe_sizes(result.factors),
        extremes=_extremes(result),
        usage=USAGE.format(repo_id=repo_id),
        fidelity=fidelity_section(result.metadata.get("fidelity")),
    )


def _extremes(result: AttributionResult) -> str:
    count = min(NUM_EXTREMES, result.num_clusters)
    highest, lowest = (result.top(count, largest=largest) for largest in (True, False))
    rows = [
        [escaped(high["cluster"]), f"{high['score']:+.3g}", escaped(low["cluster"]), f"{low['score']:+.3g}"]
        for (_, high), (_, low) in zip(highest.iterrows(), lowest.iterrows(), strict=True)
    ]
    return table(["highest", "score", "lowest", "score"], rows)
