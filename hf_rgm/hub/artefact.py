"""Base classes of artefacts that are shared as repositories on the Hub."""

from __future__ import annotations

import logging
import re
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub import CommitInfo, RepoCard
from typing_extensions import Self
from yaml import YAMLError

from hf_rgm.files.reading import ArtefactFolder, files_in, printable
from hf_rgm.hub.repository import CARD, open_artefact, push_folder

logger = logging.getLogger(__name__)

LOCAL = "path/to/this/folder"  # stands on cards for a repository that is not known yet
MAX_CARD_BYTES = 1_000_000


@dataclass(frozen=True)
class CardOptions:
    """
    What a card says that the artefact itself does not know.

    Args:
        repo_id (`str`, *optional*): Repository of the artefact.
        license (`str`, *optional*): Licence by its name on the Hub, such as `"mit"`. Defaults to none.
        model_id, synset_id, attribution_id (`str`, *optional*): Repositories of the model, synset and attributions.
        template (`str` or `Path`, *optional*): A Jinja template that replaces the one in `model_card_templates`.
    """

    repo_id: str | None = None
    license: str | None = None
    model_id: str | None = None
    synset_id: str | None = None
    attribution_id: str | None = None
    template: str | Path | None = None


class HubArtefact(ABC):
    """An artefact that is a folder, and a repository on the Hub."""

    marker: ClassVar[str]  # the file that every such folder has
    files: ClassVar[Sequence[str]]  # patterns of all its files
    kind: ClassVar[str]  # its name in commit messages
    repo_type: ClassVar[str] = "dataset"

    @abstractmethod
    def save_pretrained(self, save_directory: str | Path, *, card: CardOptions | None = None, **options: Any) -> Path:
        """Writes the artefact to a folder and returns it."""

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
        card: CardOptions | None = None,
        **options: Any,
    ) -> CommitInfo:
        """
        Uploads to a repository, in one commit.

        Args:
            repo_id (`str`): `"namespace/name"`, created if missing. An earlier artefact of the same kind is replaced.
            private (`bool`, *optional*): Whether a repository that is created is private.
            token (`str` or `bool`, *optional*): Defaults to the token of `hf auth login`.
            revision (`str`, *optional*): Branch to commit to, created if missing. Defaults to the main branch.
            create_pr (`bool`, *optional*, defaults to `False`): Open a pull request with the commit.
            commit_message (`str`, *optional*): Title of the commit.
            card (`CardOptions`, *optional*): What else the card says: licence, links, another template.
            options: Options of `save_pretrained`.

        Returns:
            `CommitInfo`: with `commit_url`, `oid`, `pr_url` and `repo_url`.

        Raises:
            HfHubHTTPError: If the Hub refuses, for example because the token may not write.
            RuntimeError: If the upload of a file fails. Nothing has changed on the Hub; push again.
            ValueError: If the repository holds another kind of artefact, or files that look like this one's.
        """
        card = replace(card or CardOptions(), repo_id=repo_id)
        with tempfile.TemporaryDirectory() as parent:
            return self._push(
                self.save_pretrained(Path(parent) / "artefact", card=card, **options),
                repo_id,
                commit_message=commit_message,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
            )

    @classmethod
    def _push(cls, folder: Path, repo_id: str, *, commit_message: str | None = None, **options: Any) -> CommitInfo:
        kind = {"marker": cls.marker, "files": cls.files, "repo_type": cls.repo_type}
        return push_folder(folder, repo_id, commit_message=commit_message or f"Upload {cls.kind}", **kind, **options)


class DatasetArtefact(HubArtefact):
    """An artefact that can be read again from a folder or from a dataset repository."""

    tables: ClassVar[Sequence[str]] = ()  # files for viewers that are never read, and may show more than is known here

    @classmethod
    @abstractmethod
    def _from_folder(cls, folder: ArtefactFolder) -> Self: ...

    @classmethod
    def write_anew(
        cls, source: ArtefactFolder, target: Path, *, repo_id: str | None = None, license: str | None = None
    ) -> list[str]:
        """Writes what a folder holds, checked and with a new card, to another; names of files that are left out."""
        card = CardOptions(repo_id=repo_id, license=license or _license(source))
        cls.from_pretrained(source).save_pretrained(target, card=card)
        if source.is_remote:
            return []
        regular, links = files_in(source.root)
        for name in regular & {*cls.tables}:
            shutil.copyfile(source.file(name), target / name)
        return sorted((regular | links) - files_in(target)[0])

    @classmethod
    def push_saved(
        cls,
        folder: str | Path,
        repo_id: str,
        *,
        license: str | None = None,
        tell: Callable[[str], object] = logger.info,
        **options: Any,
    ) -> CommitInfo:
        """
        Uploads what a saved folder holds, with a card that is written anew; other files in it stay here.

        Args:
            folder (`str` or `Path`): The folder.
            repo_id (`str`): `"namespace/name"`, created if missing.
            license (`str`, *optional*): Defaults to that of the folder's card.
            tell (`Callable`, *optional*): Gets the names of the files before they are uploaded, and of those left out.
            options: `private`, `token`, `revision`, `create_pr` and `commit_message` of
                [`HubArtefact.push_to_hub`].

        Returns:
            `CommitInfo`: see [`HubArtefact.push_to_hub`].
        """
        with tempfile.TemporaryDirectory() as parent:
            copy = Path(parent) / "artefact"
            left_out = cls.write_anew(ArtefactFolder(folder), copy, repo_id=repo_id, license=license)
            tell(f"Uploading to {repo_id}: {', '.join(sorted(files_in(copy)[0]))}. The card is written anew.")
            if left_out:
                tell(f"Left out, as no files of {cls.kind}: {', '.join(map(printable, left_out))}.")
            return cls._push(copy, repo_id, **options)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path | ArtefactFolder,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """
        Reads an artefact that `save_pretrained` wrote or `push_to_hub` pushed.

        Args:
            name_or_path (`str`, `Path` or `ArtefactFolder`): A folder, or the id of a dataset repository on the Hub.
            revision (`str`, *optional*): Branch, tag or commit. Defaults to the main branch.
            token (`str` or `bool`, *optional*): Defaults to the token of `hf auth login`.
            cache_dir (`str` or `Path`, *optional*): Folder for downloads. Defaults to the cache of the Hub.
            local_files_only (`bool`, *optional*, defaults to `False`): Only read files that are in the cache.

        Raises:
            FileNotFoundError: If there is no such folder or repository, or a file is missing.
            MemoryError: If it is larger than the free memory.
            RepositoryNotFoundError, RevisionNotFoundError: If the Hub has no such repository or revision, or it is
                private and the token gives no access.
            ValueError: If a file is damaged or has another format version.
        """
        access = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        return cls._from_folder(open_artefact(name_or_path, cls.marker, revision=revision, **access))


def _license(folder: ArtefactFolder) -> str | None:
    """Licence on the card of a folder, if it is one by its name."""
    try:
        path = folder.file(CARD)
    except FileNotFoundError:
        return None
    if path.stat().st_size > MAX_CARD_BYTES:
        return None
    try:
        told = RepoCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.get("license")
    except (ValueError, YAMLError):  # no card
        return None
    return told if isinstance(told, str) and re.fullmatch(r"[\w.+-]{1,100}", told) else None
