"""`hf-rgm distill`."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from hf_rgm.cli import common
from hf_rgm.cli.common import check_output_folder, clear_errors, hide_bars
from hf_rgm.cli.loading import ClusterOptions, Loading, find_tokenizer
from hf_rgm.distillation.config import PRESETS, DistillationConfig

PANEL = "Settings of the distiller"


def _option(field: dataclasses.Field) -> Any:
    about = typer.Option(help=field.metadata["help"], rich_help_panel=PANEL, show_default=str(field.default))
    return Annotated[get_type_hints(DistillationConfig)[field.name] | None, about]


Settings: Any = dataclasses.make_dataclass(
    "Settings", [(field.name, _option(field), None) for field in dataclasses.fields(DistillationConfig)]
)


@common.with_options
def distill(
    trajectory: Annotated[
        Path, typer.Argument(help="Folder that TrajectoryCallback recorded, or of checkpoints.", exists=True)
    ],
    model: common.Model,
    dataset: Annotated[str, typer.Argument(help=f"The training rows: {common.ROWS}")],
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Folder of the synset.")],
    clusters: ClusterOptions,
    loading: Loading,
    settings: Settings,  # type: ignore[valid-type]
    split: Annotated[str | None, typer.Option(help="Split of the dataset.", show_default="train")] = None,
    other_run: Annotated[
        list[Path] | None,
        typer.Option(help="Folder of another recorded run that differs in its seed; may be repeated."),
    ] = None,
    work_dir: Annotated[
        Path | None,
        typer.Option(
            help="Keeps finished blocks of clusters.", show_default="OUTPUT_DIR-unfinished, removed at the end"
        ),
    ] = None,
    revision: common.ModelRevision = None,
    overwrite: common.Overwrite = False,
    estimate: Annotated[bool, typer.Option("--estimate", help="Only estimate memory, disk and time.")] = False,
    preset: Annotated[
        str, typer.Option(help=f"One of {', '.join(PRESETS)}; other settings come on top.", rich_help_panel=PANEL)
    ] = "accurate",
    quiet: common.Quiet = False,
    as_json: common.AsJson = False,
) -> None:
    """
    Distil a recorded training run into a synset. After Ctrl-C the same command goes on.

    Example: hf-rgm distill trajectory my-model train.parquet -o my-synset --cluster-column source --preset quick
    """
    from hf_rgm import ReverseGradientMatchingDistiller
    from hf_rgm.cli.artefact_info import describe
    from hf_rgm.model.processes import Processes
    from hf_rgm.synset.synset_files import CONFIG_FILE

    disable_tqdm = hide_bars(quiet)
    blocks = work_dir or output_dir.with_name(f"{output_dir.name}-unfinished")
    go_on = f"Finished blocks of clusters are kept in {blocks}; the same command goes on from there."
    with clear_errors(go_on):
        chosen = {name: value for name, value in vars(settings).items() if value is not None}
        config = DistillationConfig.from_preset(preset, **chosen)
        check_output_folder(output_dir, CONFIG_FILE, overwrite=overwrite or estimate)
        rows = loading.rows(dataset, split)
        trained = loading.model(model, revision)
        distiller = ReverseGradientMatchingDistiller(
            trained,
            [trajectory, *(other_run or [])],
            rows,
            clusters.clusters(rows, seed=config.seed),
            config=config,
            data_collator=loading.collator(rows, model, revision),
            output_dir=None if estimate else blocks,
            disable_tqdm=disable_tqdm,
        )
        if estimate:
            cost = distiller.estimate()
            typer.echo(json.dumps(dataclasses.asdict(cost), indent=2) if as_json else str(cost))
            return
        synset = distiller.distill()
        if not Processes().is_main:
            return
        of_texts = synset.metadata.get("tokens") is not None
        synset.save_pretrained(output_dir, tokenizer=find_tokenizer(trained, model, revision) if of_texts else None)
        if work_dir is None:
            shutil.rmtree(blocks)
        description = describe(output_dir)
        typer.echo(json.dumps(description.to_dict(), indent=2) if as_json else str(description))
