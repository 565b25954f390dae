"""Repositories on the Hub: artefacts are pushed in one commit and pulled file by file, all of one commit."""

from __future__ import annotations

import contextlib
import fnmatch
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    hf_hub_download,
    metadata_update,
)
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id

from hf_rgm.files.reading import ArtefactFolder, check_name, leads_out
from hf_rgm.files.writing import finish_replacement

ATTEMPTS = 5
CARD = "README.md"
MARKERS = {"synset.json", "attribution.json"}
"""Files that say which kind of artefact a dataset repository holds."""

MAIN = "main"
_CONFLICTS = (409, 412)
_REFUSALS = (401, 403, 404)

logger = logging.getLogger(__name__)


def is_repo_id(name: str) -> bool:
    """Whether a name can be that of a repository on the Hub."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


@contextlib.contextmanager
def folder_or_repository(name: str | Path) -> Iterator[None]:
    """
    Says of a model or tokenizer that does not load that no such folder exists: `transformers` tells of repositories.

    Raises:
        OSError: If there is no such folder, and no repository that loads.
    """
    if not Path(name).is_dir() and not is_repo_id(str(name)):
        raise FileNotFoundError(
            f"There is no folder {name} here. Check the path; a repository on the Hub is named `namespace/name`."
        )
    try:
        yield
    except OSError as error:
        if Path(name).is_dir():
            raise
        raise OSError(
            f"There is no folder {name} here, and no repository of this name on the Hub loads: "
            f"{str(error).splitlines()[0]}"
        ) from error


def model_address(repo_id: str) -> str:
    """Where a browser finds a model repository."""
    return f"{constants.ENDPOINT}/{repo_id}"


def dataset_address(repo_id: str) -> str:
    """Where a browser finds a dataset repository."""
    return f"{constants.ENDPOINT}/datasets/{repo_id}"


def link_model(
    model_id: str,
    links: Mapping[str, str],
    *,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> bool:
    """
    Names what belongs to a model in the header of its card, where the token may write to it.

    Args:
        model_id (`str`): The model's repository.
        links (`Mapping[str, str]`): What to name.
        token (`str` or `bool`, *optional*): As in `huggingface_hub`.
        revision (`str`, *optional*): Branch to commit to.
        create_pr (`bool`, *optional*, defaults to `False`): Open a pull request.

    Returns:
        `bool`: whether it was done. If not, a warning says how to.
    """
    try:
        metadata_update(
            model_id,
            dict(links),
            overwrite=True,
            token=token,  # type: ignore[arg-type]
            revision=revision,
            create_pr=create_pr,
        )
    except HfHubHTTPError as error:
        if error.response.status_code not in _REFUSALS:
            raise
        logger.warning(
            "The card of %s is not linked, because the Hub refuses (%s). Ask its owner to run "
            "`huggingface_hub.metadata_update(%r, %r)`.",
            model_id,
            error.response.status_code,
            model_id,
            dict(links),
        )
        return False
    return True


class HubFolder(ArtefactFolder):
    """
    An artefact on the Hub. Files come to the local cache when they are asked for, all from the same commit.

    Args:
        repo_id (`str`): The dataset repository.
        commit (`str`): The commit.
        root (`Path`): Where its files are in the cache.
        boundary (`Path`): The repository's part of the cache.
        prefix (`str`, *optional*, defaults to `""`): The folder in the repository, with a slash at its end.
        token (`str` or `bool`, *optional*): As in `huggingface_hub`.
        cache_dir (`str` or `Path`, *optional*): As in `huggingface_hub`.
        local_files_only (`bool`, *optional*, defaults to `False`): Only what is in the cache.
    """

    def __init__(
        self,
        repo_id: str,
        commit: str,
        root: Path,
        *,
        boundary: Path,
        prefix: str = "",
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> None:
        super().__init__(root, boundary=boundary)
        self.repo_id = repo_id
        self.commit = commit
        self._prefix = prefix
        self._token = token
        self._cache_dir = cache_dir
        self._local_files_only = local_files_only

    def __str__(self) -> str:
        return f"{self.repo_id}@{self.commit[:8]}/{self._prefix}".rstrip("/")

    @property
    def is_remote(self) -> bool:
        """Whether files are fetched when they are asked for."""
        return True

    def subfolder(self, name: str) -> HubFolder:
        """A folder in this one."""
        return HubFolder(
            self.repo_id,
            self.commit,
            self.root / name,
            boundary=self.boundary,
            prefix=f"{self._prefix}{name}/",
            token=self._token,
            cache_dir=self._cache_dir,
            local_files_only=self._local_files_only,
        )

    def file(self, name: str) -> Path:
        """The path of a file in the cache, downloaded if need be; see [`ArtefactFolder.file`]."""
        check_name(name)
        if not self.at_hand(name):
            download(
                self.repo_id,
                f"{self._prefix}{name}",
                revision=self.commit,
                token=self._token,
                cache_dir=self._cache_dir,
                local_files_only=self._local_files_only,
            )
        return super().file(name)

    def copy_to(self, target: Path, files: Sequence[str]) -> None:
        """
        Downloads the files of an artefact, all of this folder's commit, and copies them out of the cache.

        What is interrupted goes on where it was, since what has come stays in the cache.

        Args:
            target (`Path`): An empty folder.
            files (`Sequence[str]`): Patterns of the artefact's files; others are left. See [`push_folder`].

        Raises:
            HfHubHTTPError: If the Hub refuses.
            ValueError: If the repository names a file outside of itself.
        """
        for name in HfApi(token=self._token).list_repo_files(self.repo_id, revision=self.commit, repo_type="dataset"):
            if _matches(name, files):
                source = self.file(name)
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target / name)


def download(
    repo_id: str,
    name: str,
    *,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | Path | None,
    local_files_only: bool,
) -> Path:
    """
    Downloads a file of a dataset repository, unless it is in the cache.

    Raises:
        FileNotFoundError: If the repository has no such file, or it is not in the cache and cannot be fetched.
        RepositoryNotFoundError, RevisionNotFoundError: If there is none of this name, or it is private and the token
            does not open it.
    """
    try:
        path = hf_hub_download(
            repo_id,
            name,
            repo_type="dataset",
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"There is no folder {repo_id} here. {name} of the dataset repository {repo_id} is not in the local "
            f"cache, and the Hub is not reached ({str(error).splitlines()[0]}). Load it once with a connection (and "
            "without HF_HUB_OFFLINE or `local_files_only`), or pass a local folder."
        ) from error
    except EntryNotFoundError as error:
        raise FileNotFoundError(
            f"There is no folder {repo_id} here, and the dataset repository {repo_id} has no {name} at revision "
            f"{revision or MAIN}: it holds no such artefact, or not a whole one."
        ) from error
    return Path(path)


def open_artefact(
    name_or_path: str | Path | ArtefactFolder,
    marker: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> ArtefactFolder:
    """
    A local folder, or else a dataset repository on the Hub at one commit.

    Args:
        name_or_path (`str` or `Path`): A folder, or the id of a repository. What exists as a folder is one.
        marker (`str`): The file that every artefact of this kind has.
        revision (`str`, *optional*): Branch, tag or commit of the repository. Defaults to the main branch.
        token (`str` or `bool`, *optional*): As in `huggingface_hub`: defaults to that of `hf auth login`.
        cache_dir (`str` or `Path`, *optional*): As in `huggingface_hub`.
        local_files_only (`bool`, *optional*, defaults to `False`): Only what is in the cache.

    Raises:
        FileNotFoundError: If there is neither such a folder nor such a repository, or it lacks the marker.
    """
    if isinstance(name_or_path, ArtefactFolder):
        return name_or_path
    finish_replacement(Path(name_or_path))
    if Path(name_or_path).is_dir():
        return ArtefactFolder(name_or_path)
    if isinstance(name_or_path, Path):
        raise FileNotFoundError(f"There is no folder {name_or_path}. Pass a string to mean a repository on the Hub.")
    if "/" not in name_or_path or not is_repo_id(name_or_path):
        raise FileNotFoundError(
            f"{name_or_path!r} is no folder that exists, and is not the id of a repository either (`namespace/name`)."
        )
    path = download(
        name_or_path,
        marker,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    root = path.parents[len(Path(marker).parts) - 1]
    return HubFolder(
        name_or_path,
        root.name,
        root,
        boundary=root.parents[1],
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )


def _stale_files(present: set[str], added: set[str], marker: str, files: Sequence[str], repo_id: str) -> list[str]:
    """What an earlier artefact of the same kind left; a repository with something else is refused."""
    others = sorted((MARKERS - {marker}) & present)
    mine = sorted(name for name in present - added if _matches(name, files) and not leads_out(name))
    foreign = others or ([] if marker in present or marker not in MARKERS else [n for n in mine if n != CARD])
    if foreign:
        raise ValueError(
            f"The repository {repo_id} holds something else: {', '.join(foreign[:3])}. It is left alone; push to "
            "another one."
        )
    return mine if marker in present else []


def _matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a path has as many parts as one of the patterns, and each part matches."""
    parts = name.split("/")
    split = (pattern.split("/") for pattern in patterns)
    return any(len(parts) == len(own) and all(map(fnmatch.fnmatchcase, parts, own)) for own in split)


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    marker: str,
    files: Sequence[str],
    commit_message: str,
    repo_type: str = "dataset",
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """
    Uploads a folder in one commit, which is created on the repository as it is at that moment or not at all.

    Args:
        folder (`Path`): What to upload.
        repo_id (`str`): The repository, created if there is none.
        marker (`str`): The file that says of what kind the folder is.
        files (`Sequence[str]`): Patterns of the files of the kind. Where the repository has the marker, those that the
            folder lacks are deleted in the same commit. An asterisk stands for a name or a part of one.
        commit_message (`str`): Its title.
        repo_type (`str`, *optional*, defaults to `"dataset"`): Or `"model"`.
        private (`bool`, *optional*): Whether a repository that is created is private. Defaults to the namespace's.
        token (`str` or `bool`, *optional*): As in `huggingface_hub`.
        revision (`str`, *optional*): Branch to commit to, created if there is none. Defaults to the main branch.
        create_pr (`bool`, *optional*, defaults to `False`): Open a pull request with the commit.

    Returns:
        `CommitInfo`: with `commit_url`, `oid`, `pr_url` and `repo_url`.

    Raises:
        HfHubHTTPError: If the Hub refuses, for example because the token may not write.
        RuntimeError: If a file does not get there; nothing has changed on the Hub then. Push again.
        ValueError: If the repository holds another kind of artefact, or files that would be taken for this one's.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True).repo_id
    if revision not in (None, MAIN) and not create_pr:
        api.create_branch(repo_id, branch=str(revision), repo_type=repo_type, exist_ok=True)
    additions = [
        CommitOperationAdd(path.relative_to(folder).as_posix(), path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    for attempt in range(ATTEMPTS):
        parent = api.repo_info(repo_id, repo_type=repo_type, revision=revision).sha
        present = set(api.list_repo_files(repo_id, repo_type=repo_type, revision=parent))
        stale = _stale_files(present, {addition.path_in_repo for addition in additions}, marker, files, repo_id)
        try:
            # One call is one commit, whatever the number of files; `upload_folder` may split large folders.
            return api.create_commit(
                repo_id,
                [*additions, *(CommitOperationDelete(name) for name in stale)],
                commit_message=commit_message,
                repo_type=repo_type,
                revision=revision,
                create_pr=create_pr,
                parent_commit=parent,
            )
        except HfHubHTTPError as error:
            # Another commit came in between: what must be deleted is to be looked up again.
            if error.response.status_code not in _CONFLICTS or attempt == ATTEMPTS - 1:
                raise
    raise AssertionError("unreachable: every attempt returns or raises")
