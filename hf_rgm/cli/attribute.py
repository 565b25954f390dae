"""`hf-rgm attribute`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_rgm.cli.common import (
    AS_JSON,
    OVERWRITE,
    QUIET,
    check_output_file,
    check_output_folder,
    clear_errors,
    hide_bars,
    interruptible,
)
from hf_rgm.cli.loading import (
    CLUSTER_COLUMN,
    CLUSTER_EMBEDDINGS,
    CLUSTER_IDS,
    DATA_COLLATOR,
    LABEL_COLUMN,
    MODEL_CLASS,
    NUM_CLUSTERS,
    NUM_CLUSTERS_PER_CLASS,
    PREPARE,
    find_tokenizer,
    load_clusters,
    load_collator,
    load_model,
    load_rows,
)

if TYPE_CHECKING:
    from hf_rgm import AttributionResult

ENGINE_NAMES = ("linearized_replay", "adjoint", "responses", "training_on", "replay", "plain_replay")


def attribute(
    model: Annotated[str, typer.Argument(help="The trained model: a folder, or a repository on the Hub.")],
    source: Annotated[
        str,
        typer.Argument(
            help="Its synset, a folder or a dataset repository on the Hub; or the folder that TrajectoryCallback "
            "recorded, with --rows and their clusters."
        ),
    ],
    queries: Annotated[
        str,
        typer.Argument(help="Rows to explain: a parquet, JSON or CSV file, a saved folder, or REPOSITORY[:CONFIG]."),
    ],
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Folder of the attributions.")],
    split: Annotated[str | None, typer.Option(help="Split of the queries.", show_default="test")] = None,
    num_queries: Annotated[int | None, typer.Option(min=1, help="Only the first so many queries.")] = None,
    rows: Annotated[
        str | None,
        typer.Option(help="The training rows, named as queries are: more exact, and every row is scored too."),
    ] = None,
    rows_split: Annotated[str | None, typer.Option(help="Split of the training rows.", show_default="train")] = None,
    cluster_column: CLUSTER_COLUMN = None,
    cluster_ids: CLUSTER_IDS = None,
    cluster_embeddings: CLUSTER_EMBEDDINGS = None,
    num_clusters: NUM_CLUSTERS = None,
    num_clusters_per_class: NUM_CLUSTERS_PER_CLASS = None,
    label_column: LABEL_COLUMN = None,
    engine: Annotated[
        str | None,
        typer.Option(help=f"One of {', '.join(ENGINE_NAMES)}; see docs/choosing.md.", show_default="what fits best"),
    ] = None,
    objective: Annotated[
        str, typer.Option(help="margin, loss, log_probability, mean_loss, accuracy, or MODULE:OBJECT of your own.")
    ] = "margin",
    rewind: Annotated[float | None, typer.Option(help="Fraction of training to go back to.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Clusters to print.")] = 5,
    html: Annotated[Path | None, typer.Option(help="Also write a report, one HTML file.")] = None,
    model_class: MODEL_CLASS = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the model.")] = None,
    synset_revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the synset.")] = None,
    prepare: PREPARE = None,
    data_collator: DATA_COLLATOR = None,
    overwrite: OVERWRITE = False,
    quiet: QUIET = False,
    as_json: AS_JSON = False,
) -> None:
    """
    Score the clusters of the training data for some queries, and tell which help and harm most.

    Examples:

    hf-rgm attribute my-model my-synset test.parquet -o my-attributions --html report.html

    hf-rgm attribute my-model trajectory test.parquet -o my-attributions --rows train.parquet --cluster-column vendor
    """
    from hf_rgm import AttributionPipeline
    from hf_rgm.cli.loading import load_object
    from hf_rgm.results.result_files import CONFIG_FILE

    disable_tqdm = hide_bars(quiet)
    with interruptible("Nothing was written; the same command starts again."), clear_errors():
        check_output_folder(output_dir, CONFIG_FILE, overwrite=overwrite)
        check_output_file(html, overwrite=overwrite)
        asked = load_rows(queries, split=split, default_split="test", prepare=prepare)
        if num_queries is not None:
            asked = asked.select(range(min(num_queries, len(asked))))
        training = None if rows is None else load_rows(rows, split=rows_split, default_split="train", prepare=prepare)
        of_clusters = {
            "columns": cluster_column or [],
            "ids": cluster_ids,
            "embeddings": cluster_embeddings,
            "num_clusters": num_clusters,
            "num_clusters_per_class": num_clusters_per_class,
            "label_column": label_column,
        }
        known = _known(source, synset_revision, training, of_clusters)
        synset = known.get("synset")
        pipeline = AttributionPipeline(
            load_model(model, model_class=model_class, revision=revision),
            **known,
            data_collator=load_collator(data_collator, asked if training is None else training, model, revision),
            disable_tqdm=disable_tqdm,
        )
        result = pipeline(
            asked,
            rows=training if synset is not None else None,
            engine=engine,
            objective=load_object(objective) if ":" in objective else objective,
            rewind=rewind,
        )
        result.save_pretrained(output_dir)
        if html is not None:
            tokenizer = find_tokenizer(pipeline.model, model, revision)
            result.to_html(html, queries=asked, rows=training, synset=synset, tokenizer=tokenizer)
        typer.echo(
            json.dumps(_told(result, top, output_dir), indent=2) if as_json else _words(result, top, output_dir)
        )


def _known(source: str, revision: str | None, rows: Any, of_clusters: dict[str, Any]) -> dict[str, Any]:
    """The synset; or recorded run, rows and clusters, where the folder is that of a recorded run."""
    from hf_rgm import Synset
    from hf_rgm.trajectory.trajectory import METADATA_FILE

    if not (Path(source) / METADATA_FILE).is_file():
        synset = Synset.from_pretrained(source, revision=revision)
        if any(of_clusters.values()):
            raise ValueError(f"{source} is a synset, which knows its clusters. Leave the options of clusters out.")
        return {"synset": synset}
    if rows is None:
        raise ValueError(
            f"{source} is a recorded run: scores by it need the training rows. Pass them as `--rows`, and their "
            "clusters, for example by `--cluster-column`."
        )
    return {"trajectory": source, "rows": rows, "clusters": load_clusters(rows, **of_clusters, seed=0)}


def _told(result: AttributionResult, top: int, folder: Path) -> dict[str, Any]:
    return {
        "attributions": str(folder),
        "engine": result.engine,
        "objective": result.objective,
        "sign_convention": result.SIGN_CONVENTION,
        "helped_most": _records(result, top, largest=True),
        "harmed_most": _records(result, top, largest=False),
        "queries": [
            {"query_id": query, "objective": float(value), "clusters": clusters}
            for query, value, clusters in zip(
                result.query_ids, result.objective_values, result.to_list(top), strict=True
            )
        ],
    }


def _records(result: AttributionResult, top: int, *, largest: bool) -> list[dict[str, Any]]:
    """Clusters of one sign, the strongest first."""
    frame = result.top(top, largest=largest)
    frame = frame[frame["score"] > 0] if largest else frame[frame["score"] < 0]
    return [
        {"cluster": str(name), "score": float(score), "size": int(size)}
        for name, score, size in zip(frame["cluster"], frame["score"], frame["size"], strict=True)
    ]


def _words(result: AttributionResult, top: int, folder: Path) -> str:
    lines = [f"{result.num_queries} queries, {result.num_clusters} clusters. {result.SIGN_CONVENTION}"]
    for title, largest in (("Helped most", True), ("Harmed most", False)):
        lines.append(f"{title} ({result.objective}, mean over queries):")
        lines += [
            f"  {entry['score']:+.4g}  {entry['cluster']} ({entry['size']} rows)"
            for entry in _records(result, top, largest=largest)
        ] or ["  none"]
    return "\n".join([*lines, f"Written to {folder}. What it is: hf-rgm info {folder}"])
