"""`hf-rgm attribute`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_rgm.cli import common
from hf_rgm.cli.common import check_output_folder, clear_errors, hide_bars
from hf_rgm.cli.loading import ClusterOptions, Loading, find_tokenizer, load_objective

if TYPE_CHECKING:
    from hf_rgm import AttributionResult

ENGINE_NAMES = ("linearized_replay", "adjoint", "responses", "training_on", "replay", "plain_replay")


@common.with_options
def attribute(
    model: common.Model,
    source: Annotated[
        str,
        typer.Argument(
            help="Its synset, a folder or a dataset repository on the Hub; or the folder that TrajectoryCallback "
            "recorded, or a Trainer's output folder with checkpoints, with --rows and their clusters."
        ),
    ],
    queries: Annotated[str, typer.Argument(help=f"Rows to explain: {common.ROWS}")],
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Folder of the attributions.")],
    clusters: ClusterOptions,
    loading: Loading,
    split: common.QueriesSplit = None,
    num_queries: common.NumQueries = None,
    rows: Annotated[
        str | None,
        typer.Option(help="The training rows, named as queries are: more exact, and every row is scored too."),
    ] = None,
    rows_split: common.RowsSplit = None,
    engine: Annotated[
        str | None,
        typer.Option(help=f"One of {', '.join(ENGINE_NAMES)}; see docs/choosing.md.", show_default="what fits best"),
    ] = None,
    objective: Annotated[
        str,
        typer.Option(
            help="margin, loss, log_probability, mean_loss, accuracy, predicted_value, probability:LABEL, or "
            "MODULE:OBJECT of your own."
        ),
    ] = "margin",
    rewind: Annotated[float | None, typer.Option(help="Fraction of training to rewind to.")] = None,
    per_token: Annotated[
        bool, typer.Option("--per-token", help="Explain each token of the queries by itself.")
    ] = False,
    top: Annotated[int, typer.Option(min=1, help="Clusters to print.")] = 5,
    html: Annotated[Path | None, typer.Option(help="Also write a report, one HTML file.")] = None,
    revision: common.ModelRevision = None,
    synset_revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the synset.")] = None,
    overwrite: common.Overwrite = False,
    quiet: common.Quiet = False,
    as_json: common.AsJson = False,
) -> None:
    """
    Score the clusters of the training data for some queries, and show which help and harm most.

    Examples:

    hf-rgm attribute my-model my-synset test.parquet -o my-attributions --html report.html

    hf-rgm attribute my-model trajectory test.parquet -o my-attributions --rows train.parquet --cluster-column vendor
    """
    from hf_rgm import AttributionPipeline
    from hf_rgm.results.result_files import CONFIG_FILE

    disable_tqdm = hide_bars(quiet)
    with clear_errors("Nothing was written; the same command starts again."):
        check_output_folder(output_dir, CONFIG_FILE, overwrite=overwrite)
        if html is not None and html.exists() and not overwrite:
            raise FileExistsError(f"{html} exists already. Choose another file, or replace it by `--overwrite`.")
        asked = loading.queries(queries, split, num_queries)
        training = loading.rows(rows, rows_split)
        known = _known(source, synset_revision, training, clusters)
        synset = known.get("synset")
        pipeline = AttributionPipeline(
            loading.model(model, revision),
            **known,
            data_collator=loading.collator(asked if training is None else training, model, revision),
            disable_tqdm=disable_tqdm,
        )
        result = pipeline(
            asked,
            rows=training if synset is not None else None,
            engine=engine,
            objective=load_objective(objective),
            rewind=rewind,
            per_token=per_token,
        )
        result.save_pretrained(output_dir)
        if html is not None:
            tokenizer = find_tokenizer(pipeline.model, model, revision)
            result.to_html(
                html, queries=None if per_token else asked, rows=training, synset=synset, tokenizer=tokenizer
            )
        content = _content(result, top, output_dir)
        typer.echo(json.dumps(content, indent=2) if as_json else _text(result, content))


def _known(source: str, revision: str | None, rows: Any, clusters: ClusterOptions) -> dict[str, Any]:
    """Arguments of the pipeline: the synset; or a recorded run, its rows, and their clusters by the given options."""
    from hf_rgm import Synset
    from hf_rgm.trajectory.description import METADATA_FILE, has_checkpoints

    if not (Path(source) / METADATA_FILE).is_file() and not has_checkpoints(source):
        synset = Synset.from_pretrained(source, revision=revision)
        if clusters.given:
            raise ValueError(f"{source} is a synset, which knows its clusters. Leave the options of clusters out.")
        return {"synset": synset}
    if rows is None:
        raise ValueError(
            f"{source} is a recorded run: scores by it need the training rows. Pass them as `--rows`, and their "
            "clusters, for example by `--cluster-column`."
        )
    return {"trajectory": source, "rows": rows, "clusters": clusters.clusters(rows, seed=0)}


def _content(result: AttributionResult, top: int, folder: Path) -> dict[str, Any]:
    return {
        "attributions": str(folder),
        "engine": result.engine,
        "objective": result.objective,
        "sign_convention": result.SIGN_CONVENTION,
        "helped_most": _records(result, top, largest=result.maximize),
        "harmed_most": _records(result, top, largest=not result.maximize),
        "queries": [
            {"query_id": query, "objective": float(value), "clusters": clusters}
            for query, value, clusters in zip(
                result.query_ids, result.objective_values, result.to_list(top), strict=True
            )
        ],
    }


def _records(result: AttributionResult, top: int, *, largest: bool) -> list[dict[Any, Any]]:
    """Clusters with scores of one sign, the strongest first."""
    return result.top(top, largest=largest).query("score > 0" if largest else "score < 0").to_dict("records")


def _text(result: AttributionResult, content: dict[str, Any]) -> str:
    lines = [f"{result.num_queries} queries, {result.num_clusters} clusters. {result.SIGN_CONVENTION}"]
    for title, records in (("Helped most", content["helped_most"]), ("Harmed most", content["harmed_most"])):
        lines.append(f"{title} ({result.objective}, mean over queries):")
        lines += [f"  {r['score']:+.4g}  {r['cluster']} ({r['size']} rows)" for r in records] or ["  none"]
    folder = content["attributions"]
    return "\n".join([*lines, f"Written to {folder}. What it is: hf-rgm info {folder}"])
