"""What the commands share: options, progress bars, how errors are told and what Ctrl-C does."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

REVISION = Annotated[str | None, typer.Option(help="Branch, tag or commit of the repository.")]
AS_JSON = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
QUIET = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]
OVERWRITE = Annotated[bool, typer.Option("--overwrite", help="Replace what is finished there.")]

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it: 128 and the number of the signal."""


def hide_bars(quiet: bool = False) -> bool:
    """
    Whether there are to be no progress bars: if so asked, in CI, and where standard error is not a terminal.

    Those of the libraries are then switched off.
    """
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
    """What is wrong is one line and status 1, not a traceback; with HF_RGM_DEBUG=1 in the environment it is one."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except (
        HfHubHTTPError,
        ImportError,
        LookupError,
        MemoryError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        if os.environ.get("HF_RGM_DEBUG"):
            raise
        # The text of a KeyError is its argument in quotes.
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        text = " ".join(str(message).split()) or type(error).__name__
        if isinstance(error, HfHubHTTPError) and error.response.status_code == 401:
            text += " Log in with `hf auth login`, or set HF_TOKEN, and check the name."
        typer.echo(f"Error: {text}", err=True)
        raise typer.Exit(1) from error


def check_output_folder(folder: Path, marker: str, *, overwrite: bool) -> None:
    """
    Checks, before the work, that a folder may be written: nothing finished is replaced unless that is asked for.

    Args:
        folder (`Path`): The folder to write.
        marker (`str`): Name of the file that a finished one has.
        overwrite (`bool`): Whether it may be replaced.

    Raises:
        FileExistsError: If it holds something finished that is not to be replaced, or something else.
        OSError: If it is a mount point.
    """
    from hf_rgm.files.writing import check_replaceable, finish_replacement

    target = folder.resolve()
    finish_replacement(target)
    check_replaceable(target, marker)
    if not overwrite and (target / marker).is_file():
        raise FileExistsError(
            f"{folder} holds finished work already ({marker}). Choose another folder, or replace it by `--overwrite`."
        )


def check_output_file(path: Path | None, *, overwrite: bool) -> None:
    """
    The same of a file, if one is to be written.

    Raises:
        FileExistsError: If there is one that is not to be replaced.
    """
    if path is not None and path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists already. Choose another file, or replace it by `--overwrite`.")


@contextlib.contextmanager
def interruptible(how_to_go_on: str) -> Iterator[None]:
    """After Ctrl-C: one line that says what is kept, and status 130."""
    try:
        yield
    except KeyboardInterrupt as error:
        typer.echo(f"\nInterrupted. {how_to_go_on}", err=True)
        raise typer.Exit(INTERRUPTED) from error
