"""Options that commands share, progress bars, how errors are shown and what Ctrl-C does."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

ROWS = "a parquet, JSON or CSV file, a saved folder, or REPOSITORY[:CONFIG]."
"""How datasets are named: the end of a help text."""

Model = Annotated[str, typer.Argument(help="The trained model: a folder, or a repository on the Hub.")]
ModelClass = Annotated[
    str | None,
    typer.Option(help="MODULE:CLASS of a model that transformers does not have. Defaults to what its config names."),
]
ModelRevision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the model.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the repository.")]

QueriesSplit = Annotated[str | None, typer.Option(help="Split of the queries.", show_default="test")]
NumQueries = Annotated[int | None, typer.Option(min=1, help="Only the first so many queries.")]
RowsSplit = Annotated[str | None, typer.Option(help="Split of the training rows.", show_default="train")]
Prepare = Annotated[
    str | None,
    typer.Option(
        help="MODULE:FUNCTION or FILE.py:FUNCTION that takes a loaded dataset and returns it as the Trainer gets it, "
        "for example tokenised."
    ),
]
DataCollator = Annotated[
    str | None,
    typer.Option(
        help="MODULE:OBJECT, the Trainer's collator. Defaults to padding by the model's tokenizer where rows have "
        "input_ids, else to transformers' default."
    ),
]

CLUSTERS = "Which row belongs to which cluster (one of them)"
ClusterColumn = Annotated[
    list[str] | None, typer.Option(help="Column that names the cluster; may be repeated.", rich_help_panel=CLUSTERS)
]
ClusterIds = Annotated[
    str | None,
    typer.Option(help="File with an integer a row (.npy or text), or a saved ClusterMap.", rich_help_panel=CLUSTERS),
]
ClusterEmbeddings = Annotated[
    str | None, typer.Option(help="Column or .npy file of vectors, divided by k-means.", rich_help_panel=CLUSTERS)
]
NumClusters = Annotated[int | None, typer.Option(help="With embeddings: how many clusters.", rich_help_panel=CLUSTERS)]
NumClustersPerClass = Annotated[
    int | None, typer.Option(help="With embeddings and labels: how many of each class.", rich_help_panel=CLUSTERS)
]
LabelColumn = Annotated[
    str | None, typer.Option(help="With embeddings: no cluster mixes its values.", rich_help_panel=CLUSTERS)
]

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is finished there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


def hide_bars(quiet: bool = False) -> bool:
    """Whether progress bars are off (`--quiet`, CI, no terminal); switches off those of the libraries then."""
    hidden = quiet or os.environ.get("CI", "").lower() in ("1", "true", "yes") or not sys.stderr.isatty()
    if hidden:
        import datasets
        import huggingface_hub
        import transformers

        datasets.disable_progress_bars()
        huggingface_hub.utils.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
    return hidden


@contextlib.contextmanager
def clear_errors() -> Iterator[None]:
    """Shows errors as one line and exits with 1; HF_RGM_DEBUG=1 in the environment shows the traceback."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except (ImportError, LookupError, MemoryError, OSError, RuntimeError, TypeError, ValueError) as error:
        if os.environ.get("HF_RGM_DEBUG"):
            raise
        # The text of a KeyError is its argument in quotes.
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        text = " ".join(str(message).split()) or type(error).__name__
        if isinstance(error, HfHubHTTPError) and error.response.status_code == 401:
            text += " Log in with `hf auth login`, or set HF_TOKEN, and check the name."
        typer.echo(f"Error: {text}", err=True)
        raise typer.Exit(1) from error


@contextlib.contextmanager
def interruptible(how_to_go_on: str) -> Iterator[None]:
    """After Ctrl-C: one line that says what is kept, and exit status 130 (128 and the number of the signal)."""
    try:
        yield
    except KeyboardInterrupt as error:
        typer.echo(f"\nInterrupted. {how_to_go_on}", err=True)
        raise typer.Exit(130) from error


def check_output_folder(folder: Path, marker: str, *, overwrite: bool) -> None:
    """Checks before the work that a folder can be written; one with the file `marker` only if `overwrite`."""
    from hf_rgm.files.writing import check_replaceable, finish_replacement

    target = folder.resolve()
    finish_replacement(target)
    check_replaceable(target, marker)
    if not overwrite and (target / marker).is_file():
        raise FileExistsError(
            f"{folder} holds finished work already ({marker}). Choose another folder, or replace it by `--overwrite`."
        )


def check_output_file(path: Path | None, *, overwrite: bool) -> None:
    """Checks before the work that a file is not replaced unless `overwrite`."""
    if path is not None and path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists already. Choose another file, or replace it by `--overwrite`.")
