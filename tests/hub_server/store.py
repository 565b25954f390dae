"""What the local Hub keeps: repositories with commits, branches, tags and pull requests, all in memory."""

from __future__ import annotations

import hashlib
import itertools
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from fnmatch import fnmatch
from functools import cached_property
from typing import Literal

from .protocol import HubError

LFS_PATTERNS = ("*.arrow", "*.bin", "*.gz", "*.npz", "*.parquet", "*.pkl", "*.pt", "*.pth", "*.safetensors", "*.zip")
GIT_ATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS).encode()
REGULAR_LIMIT = 5_000_000

_numbers = itertools.count()


@dataclass(frozen=True)
class StoredFile:
    """One version of a file; `lfs` says whether git holds the content or a pointer to it."""

    content: bytes
    lfs: bool = False

    @property
    def size(self) -> int:
        return len(self.content)

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()

    @cached_property
    def oid(self) -> str:
        """Git's name for the blob: of the pointer where the file is in LFS."""
        blob = self.pointer if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()


@dataclass(frozen=True)
class Operation:
    """One change of a commit: a file put at a path, a file deleted, or a folder deleted."""

    path: str
    kind: Literal["put", "delete", "delete_folder"]
    file: StoredFile | None = None


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: Commit | None
    title: str
    message: str
    author: str
    date: str
    files: dict[str, StoredFile]

    def history(self) -> list[Commit]:
        """This commit and its ancestors, newest first."""
        commits: list[Commit] = []
        commit: Commit | None = self
        while commit is not None:
            commits.append(commit)
            commit = commit.parent
        return commits


@dataclass
class Repository:
    """A model, dataset or space repository. A new one holds one commit with `.gitattributes`, as on the Hub."""

    repo_type: str
    repo_id: str
    private: bool = False
    branches: dict[str, Commit] = field(default_factory=dict)
    tags: dict[str, Commit] = field(default_factory=dict)
    pull_requests: list[Commit] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        first = Operation(".gitattributes", "put", StoredFile(GIT_ATTRIBUTES))
        self.branches["main"] = self._new_commit(None, [first], "initial commit", "", self.owner)
        self.created = self.branches["main"].date

    @property
    def owner(self) -> str:
        return self.repo_id.split("/")[0]

    def resolve(self, revision: str) -> Commit:
        """The commit a branch, tag, pull request or (abbreviated) commit id stands for."""
        name = revision.removeprefix("refs/heads/")
        if name in self.branches:
            return self.branches[name]
        if name in self.tags:
            return self.tags[name]
        heads = [*self.branches.values(), *self.tags.values(), *self.pull_requests]
        if name.startswith("refs/pr/") and name[8:].isdigit() and 0 < int(name[8:]) <= len(self.pull_requests):
            return self.pull_requests[int(name[8:]) - 1]
        if len(name) >= 7:
            for commit in itertools.chain.from_iterable(head.history() for head in heads):
                if commit.oid.startswith(name):
                    return commit
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def commit(
        self,
        operations: Sequence[Operation],
        *,
        author: str,
        revision: str = "main",
        title: str = "",
        message: str = "",
        parent: str | None = None,
        create_pr: bool = False,
    ) -> Commit:
        """
        Adds one commit to a branch or a pull request, or opens a pull request with it.

        Raises:
            `HubError`: 404 if `revision` or a deleted file does not exist, 412 if `parent` is not the head, 400 if
                `revision` is neither a branch nor a pull request.
        """
        head = self.resolve(revision)
        if create_pr:
            commit = self._new_commit(self.resolve(parent or revision), operations, title, message, author)
            self.pull_requests.append(commit)
            return commit
        if parent is not None and (len(parent) < 7 or not head.oid.startswith(parent)):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        commit = self._new_commit(head, operations, title, message, author)
        branch = revision.removeprefix("refs/heads/")
        if branch in self.branches:
            self.branches[branch] = commit
        elif revision.startswith("refs/pr/"):
            self.pull_requests[int(revision[8:]) - 1] = commit
        else:
            raise HubError(400, f"Cannot commit to {revision}: it is neither a branch nor a pull request.")
        return commit

    def uses_lfs(self, path: str, size: int, sample: bytes, revision: str) -> bool:
        """Whether an upload of `path` must go through LFS: by `.gitattributes`, by size or because it is binary."""
        attributes = self.resolve(revision).files.get(".gitattributes")
        lines = attributes.content.decode().splitlines() if attributes else []
        patterns = [line.split()[0] for line in lines if "filter=lfs" in line]
        if size > REGULAR_LIMIT or any(fnmatch(path.rsplit("/", 1)[-1], pattern) for pattern in patterns):
            return True
        # The sample is cut at 512 bytes, perhaps within a character: only NUL bytes tell binary from text safely.
        return b"\0" in sample

    def _new_commit(
        self, parent: Commit | None, operations: Sequence[Operation], title: str, message: str, author: str
    ) -> Commit:
        files = dict(parent.files) if parent else {}
        for operation in operations:
            if operation.kind == "put":
                assert operation.file is not None
                files[operation.path] = operation.file
                if operation.file.lfs:
                    self.objects[operation.file.sha256] = operation.file.content
                continue
            folder = operation.path.rstrip("/") + "/"
            gone = [path for path in files if path == operation.path or path.startswith(folder)]
            if operation.kind == "delete":
                gone = [path for path in gone if path == operation.path]
            if not gone:
                raise HubError(404, f"A file with this name doesn't exist: {operation.path}", "EntryNotFound")
            for path in gone:
                del files[path]
        # The Hub's dates have whole milliseconds and end in Z.
        date = datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        tree = [(path, file.oid) for path, file in sorted(files.items())]
        identity = json.dumps([parent.oid if parent else None, title, message, author, date, tree, next(_numbers)])
        return Commit(hashlib.sha1(identity.encode()).hexdigest(), parent, title, message, author, date, files)


class Store:
    """All repositories of one Hub; `lock` is held by whoever changes them."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.repositories: dict[tuple[str, str], Repository] = {}

    def find(self, repo_type: str, repo_id: str) -> Repository | None:
        return self.repositories.get((repo_type, repo_id))

    def create(self, repo_type: str, repo_id: str, *, private: bool = False) -> Repository:
        repository = Repository(repo_type, repo_id, private)
        self.repositories[repo_type, repo_id] = repository
        return repository

    def delete(self, repository: Repository) -> None:
        del self.repositories[repository.repo_type, repository.repo_id]
