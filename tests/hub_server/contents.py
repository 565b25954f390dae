"""The Hub's JSON API for what is in a repository: listings, history, and commits."""

from __future__ import annotations

import base64
import json
from typing import Any
from urllib.parse import parse_qs

from .api import ROUTES
from .protocol import API, Call, HubError, Reply
from .readme import check_readme
from .store import Commit, Operation, Repository, StoredFile


@ROUTES.add("GET", rf"{API}/tree/(?P<revision>[^/]+)(/(?P<path>.*))?")
def tree(call: Call) -> Reply:
    commit = call.repository().resolve(call.parts["revision"])
    folder = call.parts.get("path", "").strip("/")
    entries = _entries(commit, expand=call.query.get("expand") == ["true"])
    below = {path: entry for path, entry in entries.items() if not folder or path.startswith(folder + "/")}
    if folder and not below:
        raise HubError(404, f"{folder} does not exist on {call.parts['revision']}", "EntryNotFound")
    if call.query.get("recursive") != ["true"]:
        depth = folder.count("/") + 1 if folder else 0
        below = {path: entry for path, entry in below.items() if path.count("/") == depth}
    return Reply.json(list(below.values()))


@ROUTES.add("POST", rf"{API}/paths-info/(?P<revision>[^/]+)")
def paths_info(call: Call) -> Reply:
    commit = call.repository().resolve(call.parts["revision"])
    form = parse_qs(call.body.decode())
    entries = _entries(commit, expand=[value.lower() for value in form.get("expand", [])] == ["true"])
    return Reply.json([entries[path] for path in form.get("paths", []) if path in entries])


@ROUTES.add("GET", rf"{API}/commits/(?P<revision>[^/]+)")
def commits(call: Call) -> Reply:
    history = call.repository().resolve(call.parts["revision"]).history()
    return Reply.json(
        [
            {
                "id": commit.oid,
                "title": commit.title,
                "message": commit.message,
                "authors": [{"user": commit.author}],
                "date": commit.date,
            }
            for commit in history
        ]
    )


@ROUTES.add("POST", rf"{API}/preupload/(?P<revision>[^/]+)")
def preupload(call: Call) -> Reply:
    """How each file must be sent, and what lies at its path already."""
    repository = call.repository(write=True)
    commit = repository.resolve(call.parts["revision"])
    files = []
    for item in call.json()["files"]:
        _check_path(item["path"])
        sample = base64.b64decode(item["sample"])
        lfs = repository.uses_lfs(item["path"], item["size"], sample, call.parts["revision"])
        answer = {"path": item["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
        present = commit.files.get(item["path"])
        if present is not None:
            answer["oid"] = present.sha256 if present.lfs else present.oid
        files.append(answer)
    return Reply.json({"files": files})


@ROUTES.add("POST", rf"{API}/commit/(?P<revision>[^/]+)")
def commit(call: Call) -> Reply:
    """One commit from lines of JSON: a header, then files, pointers to uploaded LFS objects, and deletions."""
    header: dict[str, Any] = {}
    operations: list[Operation] = []
    create_pr = call.query.get("create_pr") == ["1"]
    with call.hub.store.lock:
        account = call.writer()
        # Whoever may read a repository may open a pull request.
        repository = call.repository(write=not create_pr)
        for line in call.body.splitlines():
            item = json.loads(line)
            if item["key"] == "header":
                header = item["value"]
            else:
                operations.append(_operation(repository, item["key"], item["value"]))
        made = repository.commit(
            operations,
            author=account.user,
            revision=call.parts["revision"],
            title=header["summary"],
            message=header.get("description", ""),
            parent=header.get("parentCommit"),
            create_pr=create_pr,
        )
        number = len(repository.pull_requests)
    page = call.hub.url(repository.repo_type, repository.repo_id)
    answer = {"success": True, "commitOid": made.oid, "commitUrl": f"{page}/commit/{made.oid}"}
    if create_pr:
        answer["pullRequestUrl"] = f"{page}/discussions/{number}"
    return Reply.json(answer)


def _check_path(path: str) -> None:
    if path.startswith("/") or {"", ".", "..", ".git"} & set(path.split("/")):
        raise HubError(400, f"Invalid file path: {path}")


def _operation(repository: Repository, key: str, value: dict[str, Any]) -> Operation:
    if key == "deletedFile":
        return Operation(value["path"], "delete")
    if key == "deletedFolder":
        return Operation(value["path"], "delete_folder")
    _check_path(value["path"])
    if key == "lfsFile":
        if value["oid"] not in repository.objects:
            raise HubError(
                400,
                "Your push was rejected because an LFS pointer pointed to a file that does not exist. "
                f"Offending file: {value['path']}",
            )
        return Operation(value["path"], "put", StoredFile(repository.objects[value["oid"]], lfs=True))
    if key != "file":
        raise HubError(400, f"Unknown operation: {key}")
    content = base64.b64decode(value["content"])
    if value["path"] == "README.md":
        errors, _ = check_readme(content.decode(errors="replace"), repository.repo_type)
        if errors:
            raise HubError(400, "Invalid metadata in README.md: " + "; ".join(errors))
    return Operation(value["path"], "put", StoredFile(content))


def _entries(commit: Commit, *, expand: bool) -> dict[str, dict[str, Any]]:
    """Files and folders of a commit by path, in the order of their paths."""
    entries: dict[str, dict[str, Any]] = {}
    for path, file in commit.files.items():
        parents = path.split("/")[:-1]
        for depth in range(1, len(parents) + 1):
            folder = "/".join(parents[:depth])
            entries[folder] = {"type": "directory", "oid": commit.oid, "size": 0, "path": folder}
        entries[path] = {"type": "file", "oid": file.oid, "size": file.size, "path": path}
        if file.lfs:
            entries[path]["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": len(file.pointer)}
    if expand:
        for path, entry in entries.items():
            last = _last_change(commit, path)
            entry["lastCommit"] = {"id": last.oid, "title": last.title, "date": last.date}
    return dict(sorted(entries.items()))


def _last_change(commit: Commit, path: str) -> Commit:
    """The newest commit that touched a file, or anything within a folder."""

    def content(of: Commit | None) -> dict[str, str]:
        files = of.files if of else {}
        return {name: file.oid for name, file in files.items() if name == path or name.startswith(path + "/")}

    return next(candidate for candidate in commit.history() if content(candidate) != content(candidate.parent))
