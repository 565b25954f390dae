"""What the commands share: options, and how errors are told."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated

import typer

REVISION = Annotated[str | None, typer.Option(help="Branch, tag or commit of the repository.")]
AS_JSON = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


@contextlib.contextmanager
def clear_errors() -> Iterator[None]:
    """What is wrong with what was asked for is one line and status 1, not a traceback."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except (HfHubHTTPError, MemoryError, OSError, RuntimeError, ValueError) as error:
        typer.echo(f"Error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(1) from error
