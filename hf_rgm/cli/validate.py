"""`hf-rgm validate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hf_rgm.cli import common
from hf_rgm.cli.common import clear_errors, hide_bars
from hf_rgm.cli.loading import Loading, load_object, load_objective

if TYPE_CHECKING:
    from hf_rgm import FidelityReport, Synset


@common.with_options
def validate(
    model: common.Model,
    synset: Annotated[Path, typer.Argument(help="Folder of its synset, which keeps the result.", exists=True)],
    queries: Annotated[str, typer.Argument(help=f"Labelled rows not used to choose settings: {common.ROWS}")],
    dataset: Annotated[str, typer.Argument(help="The training rows, named in the same way.")],
    build_trainer: Annotated[
        str, typer.Option(help="FILE.py:FUNCTION or MODULE:FUNCTION; function(dataset, seed) returns a fresh Trainer.")
    ],
    loading: Loading,
    budget: Annotated[int, typer.Option(help="Models to train at most.")] = 24,
    seeds: Annotated[
        list[int] | None, typer.Option("--retraining-seed", help="Seed of retrainings; may be repeated.")
    ] = None,
    with_rows: Annotated[
        bool, typer.Option("--with-rows", help="Measure scores that use the training rows, not the synset alone.")
    ] = False,
    engine: Annotated[str | None, typer.Option(help="As in `hf-rgm attribute`.")] = None,
    objective: Annotated[str, typer.Option(help="As in `hf-rgm attribute`.")] = "margin",
    split: common.QueriesSplit = None,
    rows_split: common.RowsSplit = None,
    work_dir: Annotated[
        Path | None, typer.Option(help="Keeps finished retrainings.", show_default="SYNSET-retrainings")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the subsets and of the intervals.")] = 0,
    revision: common.ModelRevision = None,
    overwrite: common.Overwrite = False,
    quiet: common.Quiet = False,
    as_json: common.AsJson = False,
) -> None:
    """
    Retrain without parts of the data, and measure how well the synset predicts it. The synset keeps the figures.

    Run the same command again to continue after Ctrl-C. The processes of torchrun share the retrainings.

    Example: hf-rgm validate my-model my-synset test.parquet train.parquet --build-trainer train.py:build_trainer
    """
    from hf_rgm import AttributionPipeline, FidelityReport, Synset
    from hf_rgm.fidelity.launch import Launch

    folder = Path(f"{synset.resolve()}-retrainings") if work_dir is None else work_dir
    go_on = f"Finished retrainings are kept in {folder}; run the same command again to continue."
    disable_tqdm = hide_bars(quiet)
    with clear_errors(go_on):
        measured = Synset.from_pretrained(synset)
        if measured.fidelity is not None and not overwrite:
            raise FileExistsError(
                f"{synset} keeps figures that were measured already (see `hf-rgm info {synset}`). Pass "
                f"`--overwrite` to replace them; retrainings kept in {folder} are not done again."
            )
        asked = loading.queries(queries, split)
        rows = loading.rows(dataset, rows_split)
        trained = loading.model(model, revision)
        pipeline = AttributionPipeline(trained, synset=measured, disable_tqdm=disable_tqdm)
        report = FidelityReport.measure(
            pipeline.attributor,
            asked,
            load_object(build_trainer),
            rows,
            budget=budget,
            seeds=seeds or None,
            engine=engine,
            rows=with_rows,
            objective=load_objective(objective),
            data_collator=loading.collator(asked, model, revision),
            output_dir=folder,
            seed=seed,
            disable_tqdm=disable_tqdm,
        )
        if Launch.from_environment().index > 0:
            return
        on_card = _keep(measured, synset, report)
        where = "and on its card" if on_card else "but not on its card, which was edited and is left as it is"
        typer.echo(
            json.dumps(report.to_dict(), indent=2) if as_json else f"{report}\nKept in {synset}/synset.json, {where}."
        )


def _keep(synset: Synset, folder: Path, report: FidelityReport) -> bool:
    """Writes the figures into the synset's folder; whether also on its card, which is left alone if edited."""
    from huggingface_hub import RepoCard

    from hf_rgm.files.writing import replacing, write_json
    from hf_rgm.hub import CardOptions
    from hf_rgm.hub.repository import CARD
    from hf_rgm.synset.synset_files import CONFIG_FILE, synset_card

    card = folder / CARD
    options = CardOptions(license=RepoCard.load(card).data.get("license")) if card.is_file() else None
    generated = options is not None and card.read_text(encoding="utf-8") == synset_card(synset, options)
    content = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    synset.fidelity = content["fidelity"] = report.to_dict()
    write_json(folder / CONFIG_FILE, content)
    if generated:
        with replacing(card) as temporary:
            temporary.write_text(synset_card(synset, options), encoding="utf-8")
    return generated
