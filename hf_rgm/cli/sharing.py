"""`hf-rgm info`, `push` and `pull`."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hf_rgm.cli import common
from hf_rgm.cli.common import check_output_folder, clear_errors, hide_bars

if TYPE_CHECKING:
    from hf_rgm.hub.artefact import DatasetArtefact

Target = Annotated[str, typer.Argument(help="A folder, or the id of a dataset repository on the Hub.")]


def info(target: Target, revision: common.Revision = None, as_json: common.AsJson = False) -> None:
    """
    Show what a trajectory, a synset or attributions hold, whether they are whole, and what can be done with them.

    The exit status is 1 if they are not whole.

    Example: hf-rgm info hf-rgm-demo/synset
    """
    from hf_rgm.cli.artefact_info import describe

    hide_bars()
    with clear_errors():
        description = describe(target, revision=revision)
    typer.echo(json.dumps(description.to_dict(), indent=2) if as_json else str(description))
    if description.problem is not None:
        raise typer.Exit(1)


def push(
    folder: Annotated[Path, typer.Argument(help="Folder of a synset or of attributions.", exists=True)],
    repo_id: Annotated[str, typer.Argument(help="NAMESPACE/NAME of the dataset repository.")],
    private: Annotated[bool | None, typer.Option(help="For a repository that is created.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to, created if there is none.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
    license: Annotated[str | None, typer.Option(help="Licence for the card, such as mit.")] = None,
    quiet: common.Quiet = False,
    as_json: common.AsJson = False,
) -> None:
    """
    Upload a synset or attributions in one commit, without other files in the folder, and with a card written anew.

    The token is that of `hf auth login`, or HF_TOKEN.

    Example: hf-rgm push hf-rgm-demo/synset me/my-synset --private
    """
    hide_bars(quiet)
    with clear_errors("A push is one commit: all of it is there, or nothing. Push again."):
        options = {"private": private, "revision": revision, "create_pr": create_pr}
        tell = functools.partial(typer.echo, err=True)
        commit = _kind(str(folder)).push_saved(folder, repo_id, license=license, tell=tell, **options)
    address = commit.pr_url or commit.commit_url
    typer.echo(json.dumps({"commit": commit.oid, "url": address}) if as_json else f"Pushed: {address}")


def pull(
    repo_id: Annotated[str, typer.Argument(help="NAMESPACE/NAME of the dataset repository.")],
    output_dir: Annotated[Path, typer.Argument(help="Folder to write to.")],
    revision: common.Revision = None,
    overwrite: common.Overwrite = False,
    quiet: common.Quiet = False,
) -> None:
    """
    Download all of a synset or of attributions to a folder, check them, and write their card anew.

    Example: hf-rgm pull me/my-synset my-synset
    """
    from hf_rgm.cli.artefact_info import describe
    from hf_rgm.hub.repository import HubFolder, open_artefact

    hide_bars(quiet)
    with clear_errors("What was downloaded is in the Hub's cache; run the same command again to continue."):
        kind = _kind(repo_id, revision)
        check_output_folder(output_dir, kind.marker, overwrite=overwrite)
        folder = open_artefact(repo_id, kind.marker, revision=revision)
        if not isinstance(folder, HubFolder):
            raise FileExistsError(f"{repo_id} is a folder here. Run this elsewhere, or copy the folder.")
        kind.write_anew(folder, output_dir, repo_id=repo_id)
        typer.echo(str(describe(output_dir)))


def _kind(target: str, revision: str | None = None) -> type[DatasetArtefact]:
    """Class of the artefact in a folder or repository, after a check that it is whole."""
    from hf_rgm import AttributionResult, Synset
    from hf_rgm.cli.artefact_info import describe

    classes = {"synset": Synset, "attributions": AttributionResult}
    description = describe(target, revision=revision)
    if description.problem is not None:
        raise ValueError(f"{description.where} is not whole: {description.problem}")
    if description.kind not in classes:
        raise ValueError(
            f"{target} is a {description.kind}, which is not shared: it says which row was in which step. Distil it."
        )
    return classes[description.kind]
