"""Base classes of artefacts that are shared as repositories on the Hub."""

from __future__ import annotations

import re
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub import CommitInfo
from typing_extensions import Self

from hf_rgm.files.reading import ArtefactFolder, files_in, printable
from hf_rgm.hub.repository import CARD, open_artefact, push_folder

LOCAL = "path/to/this/folder"  # stands on cards for a repository that is not known yet
MAX_CARD_BYTES = 5_000_000
TABLE = "data/train.parquet"  # for the Hub's viewer and never read here; may have texts that only a tokenizer makes


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
        (regular, links), (written, _) = files_in(source.root), files_in(target)
        if TABLE in regular & written:
            shutil.copyfile(source.file(TABLE), target / TABLE)
        return sorted((regular | links) - written)

    @classmethod
    def push_saved(
        cls, folder: Path, repo_id: str, *, license: str | None, tell: Callable[[str], object], **options: Any
    ) -> CommitInfo:
        """
        Uploads what a saved folder holds, with a card that is written anew; other files in it stay here.

        `tell` gets the names of the files before they are uploaded, and of those left out; `license` defaults to that
        of the folder's card; `options` are those of [`HubArtefact.push_to_hub`].
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
            OSError: If a file is larger than the free disk.
            ValueError: If a file is damaged, too large for its kind, or has another format version.
        """
        access = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        return cls._from_folder(open_artefact(name_or_path, cls.marker, revision=revision, **access))


def _license(folder: ArtefactFolder) -> str | None:
    """Licence in the header of a folder's card, if it is one by its name."""
    try:
        with open(folder.file(CARD, max_bytes=MAX_CARD_BYTES), encoding="utf-8", errors="replace") as file:
            header = file.read(10_000).split("---\n")[1:2]
    except FileNotFoundError:
        return None
    found = re.search(r"^license: ([\w.+-]{1,100})$", "".join(header), re.MULTILINE)
    return None if found is None else found[1]
