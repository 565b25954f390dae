"""The `hf-rgm` command."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from hf_rgm.hub.artefact import DatasetArtefact

app = typer.Typer(help="Training-data attribution for Hugging Face models.", no_args_is_help=True)


@app.callback()
def main() -> None:
    """Training-data attribution for Hugging Face models."""


@app.command()
def demo(
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Folder to write to.")] = Path("hf-rgm-demo"),
    seed: Annotated[int, typer.Option(help="Seed of data split, training and distilling.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")] = False,
) -> None:
    """
    Train, record, distil, attribute and check on real handwritten digits; needs no network.

    Example: hf-rgm demo -o my-demo
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # The environment must be set before these are imported.
    import transformers

    from hf_rgm.demo import DemoSettings, run_demo

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        run_demo(output_dir, settings=DemoSettings(seed=seed), disable_tqdm=quiet, say=typer.echo)
    except FileExistsError as error:
        raise typer.BadParameter(str(error), param_hint="--output-dir") from error


TARGET = Annotated[str, typer.Argument(help="A folder, or the id of a dataset repository on the Hub.")]
REVISION = Annotated[str | None, typer.Option(help="Branch, tag or commit of the repository.")]
AS_JSON = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


@app.command()
def info(target: TARGET, revision: REVISION = None, as_json: AS_JSON = False) -> None:
    """
    What a trajectory, a synset or attributions are, whether they are whole, and what can be done with them.

    Ends with 1 if they are not whole.

    Example: hf-rgm info hf-rgm-demo/synset
    """
    from hf_rgm.hub.description import describe

    with _clear_errors():
        description = describe(target, revision=revision)
    typer.echo(json.dumps(description.to_dict(), indent=2) if as_json else str(description))
    if description.problem is not None:
        raise typer.Exit(1)


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="Folder of a synset or of attributions.", exists=True)],
    repo_id: Annotated[str, typer.Argument(help="NAMESPACE/NAME of the dataset repository.")],
    private: Annotated[bool | None, typer.Option(help="For a repository that is created.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to, created if there is none.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
    license: Annotated[str | None, typer.Option(help="Licence for the card, such as mit.")] = None,
    as_json: AS_JSON = False,
) -> None:
    """
    Upload a synset or attributions in one commit. The token is that of `hf auth login`, or HF_TOKEN.

    Example: hf-rgm push hf-rgm-demo/synset me/my-synset --private
    """
    with _clear_errors():
        commit = type(_artefact(str(folder))).push_saved(
            folder, repo_id, license=license, private=private, revision=revision, create_pr=create_pr
        )
    address = commit.pr_url or commit.commit_url
    typer.echo(json.dumps({"commit": commit.oid, "url": address}) if as_json else f"Pushed: {address}")


@app.command()
def pull(
    repo_id: Annotated[str, typer.Argument(help="NAMESPACE/NAME of the dataset repository.")],
    output_dir: Annotated[Path, typer.Argument(help="Folder to write to.")],
    revision: REVISION = None,
) -> None:
    """
    Download all of a synset or of attributions to a folder, card included, and check them.

    Example: hf-rgm pull me/my-synset my-synset
    """
    from huggingface_hub import snapshot_download

    from hf_rgm.hub.description import describe

    with _clear_errors():
        files = type(_artefact(repo_id, revision)).files
        snapshot_download(
            repo_id, repo_type="dataset", revision=revision, allow_patterns=list(files), local_dir=output_dir
        )
        description = describe(output_dir)
    typer.echo(str(description))
    if description.problem is not None:
        raise typer.Exit(1)


def _artefact(target: str, revision: str | None = None) -> DatasetArtefact:
    from hf_rgm import AttributionResult, Synset
    from hf_rgm.hub.description import describe

    classes = {"synset": Synset, "attributions": AttributionResult}
    kind = describe(target, revision=revision).kind
    if kind not in classes:
        raise ValueError(
            f"{target} is a {kind}, which is not shared: it tells which row was in which step. Distil it."
        )
    return classes[kind].from_pretrained(target, revision=revision)


@contextlib.contextmanager
def _clear_errors() -> Iterator[None]:
    """What is wrong with what was asked for is one line and status 1, not a traceback."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except (HfHubHTTPError, MemoryError, OSError, RuntimeError, ValueError) as error:
        typer.echo(f"Error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(1) from error
