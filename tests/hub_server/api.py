"""The Hub's JSON API: accounts, README checks, repositories and their references."""

from __future__ import annotations

import re
from typing import Any

from .protocol import API, REPO_TYPES, Call, HubError, Reply, Routes
from .readme import card_data, check_readme
from .store import Commit, Repository

ROUTES = Routes()


@ROUTES.add("GET", "/api/whoami-v2")
def whoami(call: Call) -> Reply:
    account = call.account()
    if account is None:
        raise HubError(401, "Invalid username or password.")
    access = {"accessToken": {"displayName": "tests", "role": account.role}}
    return Reply.json(
        {
            "type": "user",
            "id": account.user,
            "name": account.user,
            "fullname": account.user,
            "orgs": [],
            "auth": access,
        }
    )


@ROUTES.add("POST", "/api/validate-yaml")
def validate_yaml(call: Call) -> Reply:
    request = call.json()
    errors, warnings = check_readme(request["content"], request["repoType"])
    messages = {"errors": [{"message": text} for text in errors], "warnings": [{"message": text} for text in warnings]}
    return Reply.json(messages, 400 if errors else 200)


@ROUTES.add("POST", "/api/repos/create")
def create(call: Call) -> Reply:
    request = call.json()
    account = call.writer(request.get("organization"))
    repo_type, repo_id = request.get("type") or "model", f"{account.user}/{request['name']}"
    if not re.fullmatch(r"[\w.-]{1,96}", request["name"]):
        raise HubError(400, f"Invalid repository name: {request['name']}")
    url = call.hub.url(repo_type, repo_id)
    with call.hub.store.lock:
        if call.hub.store.find(repo_type, repo_id):
            raise HubError(409, f"You already created this {repo_type} repo", url=url)
        call.hub.store.create(repo_type, repo_id, private=request.get("visibility") == "private")
    return Reply.json({"url": url, "name": repo_id, "id": repo_id})


@ROUTES.add("DELETE", "/api/repos/delete")
def delete(call: Call) -> Reply:
    request = call.json()
    repo_id = f"{request.get('organization') or call.writer().user}/{request['name']}"
    repository = call.repository(write=True, repo_type=request.get("type") or "model", repo_id=repo_id)
    call.hub.store.delete(repository)
    return Reply()


@ROUTES.add("PUT", f"{API}/settings")
def settings(call: Call) -> Reply:
    repository = call.repository(write=True)
    request = call.json()
    if "visibility" in request:
        repository.private = request["visibility"] == "private"
    return Reply.json({"private": repository.private})


@ROUTES.add("GET", f"{API}/auth-check")
def auth_check(call: Call) -> Reply:
    call.repository()
    return Reply.json({})


@ROUTES.add("GET", r"/api/(?P<types>models|datasets|spaces)")
def list_repositories(call: Call) -> Reply:
    """Repositories the caller may see, filtered by `author`, `search` and tags (`filter`)."""
    account = call.account()
    wanted = {name: call.query.get(name, []) for name in ("author", "search", "filter")}
    found = []
    for repository in list(call.hub.store.repositories.values()):
        if repository.repo_type != REPO_TYPES[call.parts["types"]]:
            continue
        if repository.private and (account is None or account.user != repository.owner):
            continue
        summary = _information(repository, repository.branches["main"], blobs=False)
        if wanted["author"] and repository.owner not in wanted["author"]:
            continue
        if not all(text.lower() in repository.repo_id.lower() for text in wanted["search"]):
            continue
        if set(wanted["filter"]) <= set(summary["tags"]):
            found.append(summary)
    return Reply.json(found[: int(call.query.get("limit", [len(found)])[0])])


@ROUTES.add("GET", rf"{API}(/revision/(?P<revision>[^/]+))?")
def information(call: Call) -> Reply:
    repository = call.repository()
    commit = repository.resolve(call.parts.get("revision", "main"))
    return Reply.json(_information(repository, commit, blobs="blobs" in call.query))


@ROUTES.add("GET", f"{API}/refs")
def references(call: Call) -> Reply:
    repository = call.repository()

    def listed(names: dict[str, Commit], prefix: str) -> list[dict[str, str]]:
        return [{"name": name, "ref": f"{prefix}{name}", "targetCommit": target.oid} for name, target in names.items()]

    answer: dict[str, Any] = {
        "branches": listed(repository.branches, "refs/heads/"),
        "tags": listed(repository.tags, "refs/tags/"),
        "converts": [],
    }
    if "include_prs" in call.query:
        numbered = {str(number): target for number, target in enumerate(repository.pull_requests, 1)}
        answer["pullRequests"] = listed(numbered, "refs/pr/")
    return Reply.json(answer)


@ROUTES.add("POST", rf"{API}/branch/(?P<name>[^/]+)")
def create_branch(call: Call) -> Reply:
    repository = call.repository(write=True)
    if call.parts["name"] in repository.branches:
        raise HubError(409, f"Reference already exists: refs/heads/{call.parts['name']}")
    repository.branches[call.parts["name"]] = repository.resolve(call.json().get("startingPoint", "main"))
    return Reply()


@ROUTES.add("DELETE", rf"{API}/branch/(?P<name>[^/]+)")
def delete_branch(call: Call) -> Reply:
    repository = call.repository(write=True)
    if call.parts["name"] == "main":
        raise HubError(403, "Cannot delete refs/heads/main")
    if repository.branches.pop(call.parts["name"], None) is None:
        raise HubError(404, f"Invalid rev id: {call.parts['name']}", "RevisionNotFound")
    return Reply()


@ROUTES.add("POST", rf"{API}/tag/(?P<name>[^/]+)")
def create_tag(call: Call) -> Reply:
    repository, tag = call.repository(write=True), call.json()["tag"]
    if tag in repository.tags:
        raise HubError(409, f"Tag reference exists already: refs/tags/{tag}")
    repository.tags[tag] = repository.resolve(call.parts["name"])
    return Reply()


@ROUTES.add("DELETE", rf"{API}/tag/(?P<name>[^/]+)")
def delete_tag(call: Call) -> Reply:
    if call.repository(write=True).tags.pop(call.parts["name"], None) is None:
        raise HubError(404, f"Invalid rev id: {call.parts['name']}", "RevisionNotFound")
    return Reply()


def _information(repository: Repository, commit: Commit, *, blobs: bool) -> dict[str, Any]:
    readme = commit.files.get("README.md")
    card = card_data(readme.content.decode(errors="replace")) if readme else {}
    tags = _listed(card.get("tags"))
    for key in ("license", "base_model", "datasets", "language"):
        tags += [f"{key.removesuffix('s')}:{value}" for value in _listed(card.get(key))]
    siblings: list[dict[str, Any]] = [{"rfilename": path} for path in sorted(commit.files)]
    for sibling in siblings if blobs else []:
        file = commit.files[sibling["rfilename"]]
        sibling |= {"size": file.size, "blobId": file.oid}
        if file.lfs:
            sibling["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": len(file.pointer)}
    return {
        "id": repository.repo_id,
        "author": repository.owner,
        "sha": commit.oid,
        "createdAt": repository.created,
        "lastModified": commit.date,
        "private": repository.private,
        "gated": False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": tags,
        "library_name": card.get("library_name"),
        "pipeline_tag": card.get("pipeline_tag"),
        "cardData": card,
        "siblings": siblings,
    }


def _listed(value: Any) -> list[str]:
    return [] if value is None else [str(item) for item in (value if isinstance(value, list) else [value])]
