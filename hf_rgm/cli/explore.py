"""`hf-rgm explore`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hf_rgm.cli import common
from hf_rgm.cli.common import check_output_folder, clear_errors, hide_bars
from hf_rgm.cli.loading import Loading, find_tokenizer


@common.with_options
def explore(
    attributions: Annotated[
        str, typer.Argument(help="Attributions: a folder (such as the demo's), or a dataset repository on the Hub.")
    ],
    loading: Loading,
    synset: Annotated[str | None, typer.Option(help="Their synset: shows synthetic samples.")] = None,
    model: Annotated[
        str | None, typer.Option(help="The trained model: with synset and queries, predicts without clusters.")
    ] = None,
    queries: Annotated[str | None, typer.Option(help=f"What was attributed: {common.ROWS}")] = None,
    split: common.QueriesSplit = None,
    num_queries: common.NumQueries = None,
    rows: Annotated[str | None, typer.Option(help="The training rows, named as queries are.")] = None,
    rows_split: common.RowsSplit = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or repository; reads tokens.", show_default="the model's")
    ] = None,
    revision: common.Revision = None,
    title: Annotated[str, typer.Option(help="Title of the page.")] = "Training-data attribution",
    port: Annotated[
        int | None, typer.Option(help="Port to serve at.", show_default="the first free from 7860")
    ] = None,
    space: Annotated[
        Path | None, typer.Option(help="Write a folder to push as a Space instead of serving the page.")
    ] = None,
    overwrite: common.Overwrite = False,
    quiet: common.Quiet = False,
) -> None:
    """
    Look at attributions in the browser: queries, clusters, rows, and predictions without some clusters.

    Needs the extra: pip install "hf-rgm\\[explorer]". Everybody who can see a Space can see the rows written into it.

    Example: hf-rgm explore hf-rgm-demo
    """
    hide_bars(quiet)
    with clear_errors():
        asked = loading.queries(queries, split, num_queries)
        training = loading.rows(rows, rows_split)
        given: dict[str, Any] = {"synset": synset, "rows": training, "queries": asked, "title": title}
        if space is not None:
            from hf_rgm.explorer.space import MARKER, write_space

            check_output_folder(space, MARKER, overwrite=overwrite)
            written = write_space(space, attributions, model=model, tokenizer=tokenizer, **given)
            typer.echo(f"Written to {written}. Look at it: python {written}/app.py")
            typer.echo(f"Share it: hf upload NAMESPACE/NAME {written} --repo-type space")
            return
        from hf_rgm.explorer.app import explore as build
        from hf_rgm.explorer.app import launch_settings

        loaded = None if model is None else loading.model(model)
        app = build(
            attributions,
            model=loaded,
            tokenizer=tokenizer or (model and find_tokenizer(loaded, model)),
            data_collator=None if model is None else loading.collator(asked, model),
            revision=revision,
            launch=False,
            **given,
        )
        _, address, _ = app.launch(**launch_settings(), server_port=port, prevent_thread_lock=True, quiet=True)
    typer.echo(f"Serving {address}, until Ctrl-C.")
    app.block_thread()
