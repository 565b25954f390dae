"""What artefacts that live in repositories on the Hub have in common."""

from __future__ import annotations

import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub import CommitInfo, RepoCard
from typing_extensions import Self

from hf_rgm.files.reading import ArtefactFolder
from hf_rgm.hub.repository import CARD, open_artefact, push_folder

LOCAL = "path/to/this/folder"
"""Stands on cards for a repository that is not known yet."""


@dataclass(frozen=True)
class CardOptions:
    """
    What a card says besides what the artefact knows.

    Args:
        repo_id (`str`, *optional*): Repository the artefact is in.
        license (`str`, *optional*): Licence, as the Hub calls it, such as `"mit"`. None is named without.
        model_id, synset_id, attribution_id (`str`, *optional*): Repositories of the model and of what belongs to it.
        template (`str` or `Path`, *optional*): A Jinja template in place of that in `model_card_templates`.
    """

    repo_id: str | None = field(default=None, metadata={"help": "Repository the artefact is in."})
    license: str | None = field(default=None, metadata={"help": "Licence, as the Hub calls it, such as 'mit'."})
    model_id: str | None = field(default=None, metadata={"help": "Repository of the model."})
    synset_id: str | None = field(default=None, metadata={"help": "Repository of the synset."})
    attribution_id: str | None = field(default=None, metadata={"help": "Repository of the attributions."})
    template: str | Path | None = field(default=None, metadata={"help": "A template in place of the default."})


class HubArtefact(ABC):
    """
    An artefact that is a folder, and a repository on the Hub.

    Subclasses say what their files are, and how to write a folder.
    """

    marker: ClassVar[str]
    """The file that every such folder has."""

    files: ClassVar[Sequence[str]]
    """Patterns of all files of such a folder."""

    kind: ClassVar[str]
    """What it is called in commit messages."""

    repo_type: ClassVar[str] = "dataset"
    """The type of its repository: `"dataset"` or `"model"`."""

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
            repo_id (`str`): `"namespace/name"`; created if there is none. What was there of the kind is replaced.
            private (`bool`, *optional*): Whether a repository that is created is private.
            token (`str` or `bool`, *optional*): Defaults to that of `hf auth login`.
            revision (`str`, *optional*): Branch to commit to, created if there is none. Defaults to the main branch.
            create_pr (`bool`, *optional*, defaults to `False`): Open a pull request with the commit.
            commit_message (`str`, *optional*): Its title.
            card (`CardOptions`, *optional*): What the card says besides: licence, links, another template.
            options: Those of `save_pretrained`.

        Returns:
            `CommitInfo`: with `commit_url`, `oid`, `pr_url` and `repo_url`.

        Raises:
            HfHubHTTPError: If the Hub refuses, for example because the token may not write.
            RuntimeError: If a file does not get there; nothing has changed on the Hub then. Push again.
            ValueError: If the repository holds another kind of artefact, or files that would be taken for this one's.
        """
        card = replace(card or CardOptions(), repo_id=repo_id)
        with tempfile.TemporaryDirectory() as parent:
            return push_folder(
                self.save_pretrained(Path(parent) / "artefact", card=card, **options),
                repo_id,
                marker=self.marker,
                files=self.files,
                commit_message=commit_message or f"Upload {self.kind}",
                repo_type=self.repo_type,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
            )

    @classmethod
    def push_saved(cls, folder: str | Path, repo_id: str, *, license: str | None = None, **options: Any) -> CommitInfo:
        """
        Uploads a folder that was saved, its own card included.

        Args:
            folder (`str` or `Path`): The folder. Hidden files stay behind.
            repo_id (`str`): `"namespace/name"`; created if there is none.
            license (`str`, *optional*): Put into the header of the card.
            options: `private`, `token`, `revision`, `create_pr` and `commit_message` of
                [`HubArtefact.push_to_hub`].

        Returns:
            `CommitInfo`: see [`HubArtefact.push_to_hub`].
        """
        with tempfile.TemporaryDirectory() as parent:
            copy = Path(shutil.copytree(folder, Path(parent) / "artefact", ignore=shutil.ignore_patterns(".*")))
            card = RepoCard.load(copy / CARD)
            card.text = card.text.replace(LOCAL, repo_id)
            if license is not None:
                card.data["license"] = license
            card.save(copy / CARD)
            commit_message = options.pop("commit_message", None) or f"Upload {cls.kind}"
            return push_folder(
                copy,
                repo_id,
                marker=cls.marker,
                files=cls.files,
                repo_type=cls.repo_type,
                commit_message=commit_message,
                **options,
            )


class DatasetArtefact(HubArtefact):
    """An artefact whose repository is that of a dataset, and that is read again from there."""

    @classmethod
    @abstractmethod
    def _from_folder(cls, folder: ArtefactFolder) -> Self:
        """Reads the artefact from a folder."""

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
        Reads what `save_pretrained` wrote or `push_to_hub` pushed.

        Args:
            name_or_path (`str`, `Path` or `ArtefactFolder`): A folder, or the id of a dataset repository on the Hub.
            revision (`str`, *optional*): Branch, tag or commit. Defaults to the main branch.
            token (`str` or `bool`, *optional*): Defaults to that of `hf auth login`.
            cache_dir (`str` or `Path`, *optional*): Where downloads are kept. Defaults to the cache of the Hub.
            local_files_only (`bool`, *optional*, defaults to `False`): Only what is in the cache.

        Raises:
            FileNotFoundError: If there is no such folder or repository, or a file is missing.
            MemoryError: If it is larger than the memory that is free.
            RepositoryNotFoundError, RevisionNotFoundError: If the Hub knows no such repository or revision, or it is
                private and the token does not open it.
            ValueError: If a file is damaged or of another format version.
        """
        folder = open_artefact(
            name_or_path,
            cls.marker,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        return cls._from_folder(folder)
