"""Repositories on the Hub: an artefact is pushed in one commit, and its files are fetched from one commit."""

from __future__ import annotations

import contextlib
import fnmatch
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    hf_hub_download,
    metadata_update,
    try_to_load_from_cache,
)
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id

from hf_rgm.files.reading import ArtefactFolder, check_disk, check_name, check_size, files_in, leads_out
from hf_rgm.files.writing import MAX_JSON_BYTES, finish_replacement

ATTEMPTS = 5  # of a push that other commits overtake
CARD = "README.md"
MARKERS = {"synset.json", "attribution.json"}  # files that say which artefact a dataset repository holds
MAIN = "main"

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
    """Context that adds to errors of loading a model that there is no such folder."""
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


def web_address(repo_id: str, repo_type: str = "dataset") -> str:
    """Web address of a repository."""
    return f"{constants.ENDPOINT}/{constants.REPO_TYPES_URL_PREFIXES.get(repo_type, '')}{repo_id}"


def link_model(model_id: str, links: dict[str, str], **options: Any) -> bool:
    """Writes links to artefacts into the header of a model's card; `False` and a warning if the Hub refuses."""
    try:
        metadata_update(model_id, links, overwrite=True, **options)
    except HfHubHTTPError as error:
        if error.response.status_code not in (401, 403, 404):
            raise
        logger.warning(
            "The card of %s is not linked, because the Hub refuses (%s). Ask its owner to run "
            "`huggingface_hub.metadata_update(%r, %r)`.",
            *(model_id, error.response.status_code, model_id, links),
        )
        return False
    return True


class HubFolder(ArtefactFolder):
    """
    An artefact on the Hub, whose files are downloaded to the cache when they are read, all from one commit.

    `root` is its folder in the cache, `prefix` its folder in the repository with a slash at the end; `access` are
    `token`, `cache_dir` and `local_files_only` of `huggingface_hub`.
    """

    is_remote = True

    def __init__(
        self, repo_id: str, commit: str, root: Path, *, boundary: Path, prefix: str = "", **access: Any
    ) -> None:
        super().__init__(root, boundary=boundary)
        self.repo_id = repo_id
        self.commit = commit
        self._prefix = prefix
        self._access = access

    def __str__(self) -> str:
        return f"{self.repo_id}@{self.commit[:8]}/{self._prefix}".rstrip("/")

    def _folder(self, name: str) -> HubFolder:
        prefix = f"{self._prefix}{name}/"
        return HubFolder(
            self.repo_id, self.commit, self.root / name, boundary=self.boundary, prefix=prefix, **self._access
        )

    def file(self, name: str, *, max_bytes: int | None = None) -> Path:
        check_name(name)
        if not self.at_hand(name):
            path = f"{self._prefix}{name}"
            download(self.repo_id, path, revision=self.commit, max_bytes=max_bytes, **self._access)
        return super().file(name, max_bytes=max_bytes)


def in_cache(repo_id: str | Path, name: str, revision: str | None = None) -> bool:
    """Whether a file of a dataset repository is in the cache."""
    if not isinstance(repo_id, str) or not is_repo_id(repo_id):
        return False
    return isinstance(try_to_load_from_cache(repo_id, name, repo_type="dataset", revision=revision), str)


def download(repo_id: str, name: str, *, revision: str | None, max_bytes: int | None = None, **access: Any) -> Path:
    """Path of a file of a dataset repository in the cache, downloaded if it is not there, and not too large."""
    where = {"repo_id": repo_id, "filename": name, "repo_type": "dataset", "revision": revision}
    cache = access.get("cache_dir")
    try:
        told = hf_hub_download(**where, **access, dry_run=True)
        if told.will_download:
            source = f"{name} of the dataset repository {repo_id}"
            check_size(told.file_size or 0, source, max_bytes)
            check_disk(told.file_size or 0, source, Path(cache or constants.HF_HUB_CACHE))
        elif told.local_path == try_to_load_from_cache(**where, cache_dir=cache):
            return Path(told.local_path)
        return Path(hf_hub_download(**where, **access))
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


def open_artefact(
    name_or_path: str | Path | ArtefactFolder, marker: str, *, revision: str | None = None, **access: Any
) -> ArtefactFolder:
    """Local folder, or else a dataset repository on the Hub at one commit; it must have the file `marker` there."""
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
    path = download(name_or_path, marker, revision=revision, max_bytes=MAX_JSON_BYTES, **access)
    root = path.parents[len(Path(marker).parts) - 1]
    return HubFolder(name_or_path, root.name, root, boundary=root.parents[1], **access)


def _stale_files(present: set[str], added: set[str], marker: str, files: Sequence[str], repo_id: str) -> list[str]:
    """Files of an earlier artefact of the same kind, to delete; a repository with something else is refused."""
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
    Uploads a folder in one commit on top of the latest one.

    In a repository that has the `marker`, the commit deletes files that match `files` and are not in the folder.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True).repo_id
    if revision not in (None, MAIN) and not create_pr:
        api.create_branch(repo_id, branch=str(revision), repo_type=repo_type, exist_ok=True)
    additions = [CommitOperationAdd(name, folder / name) for name in sorted(files_in(folder)[0])]
    for attempt in range(ATTEMPTS):
        parent = api.repo_info(repo_id, repo_type=repo_type, revision=revision).sha
        present = set(api.list_repo_files(repo_id, repo_type=repo_type, revision=parent))
        stale = _stale_files(present, {addition.path_in_repo for addition in additions}, marker, files, repo_id)
        try:
            # `upload_folder` may split large folders into several commits.
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
            # Another commit came in between: look up again what must be deleted.
            if error.response.status_code not in (409, 412) or attempt == ATTEMPTS - 1:
                raise
    raise AssertionError("unreachable: every attempt returns or raises")
