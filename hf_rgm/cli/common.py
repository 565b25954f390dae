"""Options that commands share, progress bars, how errors are shown, and what Ctrl-C does."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

ROWS = "a parquet, JSON or CSV file, a saved folder, or REPOSITORY[:CONFIG]."
"""How datasets are named: the end of a help text."""

Model = Annotated[str, typer.Argument(help="The trained model: a folder, or a repository on the Hub.")]
ModelRevision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the model.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the repository.")]

QueriesSplit = Annotated[str | None, typer.Option(help="Split of the queries.", show_default="test")]
NumQueries = Annotated[int | None, typer.Option(min=1, help="Only the first N queries.")]
RowsSplit = Annotated[str | None, typer.Option(help="Split of the training rows.", show_default="train")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace finished work there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Command whose parameters of a dataclass type are an option for each of their fields, `None` if not given."""
    own = inspect.signature(command, eval_str=True)
    groups: dict[str, Any] = {n: p.annotation for n, p in own.parameters.items() if is_dataclass(p.annotation)}
    parameters = []
    for name, item in own.parameters.items():
        types = get_type_hints(groups[name], include_extras=True) if name in groups else {}
        of_group = [item.replace(name=field, annotation=types[field], default=None) for field in types]
        parameters += of_group or [item]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        made = {
            n: group(**{field.name: given.pop(field.name) for field in fields(group)}) for n, group in groups.items()
        }
        command(**given, **made)

    run.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    return run


def hide_bars(quiet: bool = False) -> bool:
    """Whether progress bars are off (`--quiet`, CI, no terminal); if so, those of the libraries are too."""
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
def clear_errors(after_interrupt: str | None = None) -> Iterator[None]:
    """Shows an error as one line and exits with 1; after Ctrl-C prints what is kept and exits with 130."""
    from huggingface_hub.errors import HfHubHTTPError

    from hf_rgm.files.reading import printable

    # The base of this error is the `HTTPError` of whichever client `huggingface_hub` uses.
    broken_connection: type[Exception] = HfHubHTTPError.__mro__[1]
    expected = (ImportError, LookupError, MemoryError, OSError, RuntimeError, TypeError, ValueError, broken_connection)
    try:
        yield
    except KeyboardInterrupt as error:
        if after_interrupt is None:
            raise
        typer.echo(f"\nInterrupted. {after_interrupt}", err=True)
        raise typer.Exit(130) from error
    except expected as error:
        if os.environ.get("HF_RGM_DEBUG"):
            raise
        # The text of a KeyError is its argument in quotes.
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        text = printable(" ".join(str(message).split())) or type(error).__name__
        if isinstance(error, HfHubHTTPError) and error.response.status_code == 401:
            text += " Log in with `hf auth login`, or set HF_TOKEN, and check the name."
        typer.echo(f"Error: {text}", err=True)
        raise typer.Exit(1) from error


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
