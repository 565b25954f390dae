"""Downloads, and the storage of large files: another origin with signed addresses, as the Hub's buckets are."""

from __future__ import annotations

import hashlib
import re
from typing import Any
from urllib.parse import quote, urlencode

from .contents import ROUTES
from .protocol import Call, HubError, Reply, Routes

STORAGE_ROUTES = Routes()
_REPO = r"/(?:(?P<types>datasets|spaces)/)?(?P<repo_id>[^/]+/[^/]+?)"
_LFS_JSON = "application/vnd.git-lfs+json"


@ROUTES.add("GET", rf"{_REPO}/(?:resolve|raw)/(?P<revision>[^/]+)/(?P<path>.+)")
def resolve(call: Call) -> Reply:
    """A file of a revision: its bytes, or for a large one a redirect to the storage."""
    commit = call.repository().resolve(call.parts["revision"])
    file = commit.files.get(call.parts["path"])
    if file is None:
        error = HubError(404, "Entry not found", "EntryNotFound")
        error.headers["X-Repo-Commit"] = commit.oid
        raise error
    headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{file.oid}"'}
    if not file.lfs:
        return _ranged(call, file.content, headers)
    name = quote(call.parts["path"].rsplit("/", 1)[-1])
    headers |= {
        "Location": _signed(call, file.sha256, name=name),
        "X-Linked-ETag": f'"{file.sha256}"',
        "X-Linked-Size": str(file.size),
    }
    return Reply(302, b"Found", headers)


@ROUTES.add("POST", rf"{_REPO}\.git/info/lfs/objects/batch")
def lfs_batch(call: Call) -> Reply:
    """Where to put the objects the repository does not hold yet."""
    repository = call.repository(write=True)
    page = call.hub.url(repository.repo_type, repository.repo_id)
    objects = []
    for item in call.json()["objects"]:
        answer: dict[str, Any] = {"oid": item["oid"], "size": item["size"]}
        if item["oid"] not in repository.objects:
            upload = _signed(call, item["oid"], repo=f"{repository.repo_type}:{repository.repo_id}")
            verify = f"{page}.git/info/lfs/objects/verify"
            answer["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
        objects.append(answer)
    reply = Reply.json({"transfer": "basic", "objects": objects})
    reply.headers["Content-Type"] = _LFS_JSON
    return reply


@ROUTES.add("POST", rf"{_REPO}\.git/info/lfs/objects/verify")
def lfs_verify(call: Call) -> Reply:
    repository, request = call.repository(write=True), call.json()
    content = repository.objects.get(request["oid"])
    if content is None or len(content) != request["size"]:
        raise HubError(404, f"LFS object {request['oid']} is missing or has another size")
    return Reply.json({})


@STORAGE_ROUTES.add("PUT", "/objects/(?P<oid>[0-9a-f]{64})")
def put_object(call: Call) -> Reply:
    _check_signature(call)
    if hashlib.sha256(call.body).hexdigest() != call.parts["oid"]:
        raise HubError(400, "XAmzContentSHA256Mismatch")
    repo_type, repo_id = call.query["repo"][0].split(":")
    repository = call.hub.store.find(repo_type, repo_id)
    if repository is None:
        raise HubError(404, "NoSuchBucket")
    repository.objects[call.parts["oid"]] = call.body
    return Reply(headers={"ETag": f'"{call.parts["oid"]}"'})


@STORAGE_ROUTES.add("GET", "/objects/(?P<oid>[0-9a-f]{64})")
def get_object(call: Call) -> Reply:
    _check_signature(call)
    for repository in list(call.hub.store.repositories.values()):
        content = repository.objects.get(call.parts["oid"])
        if content is not None:
            name = call.query["name"][0]
            headers = {"ETag": f'"{call.parts["oid"]}"', "Content-Disposition": f'inline; filename="{name}";'}
            return _ranged(call, content, headers)
    raise HubError(404, "NoSuchKey")


def _signed(call: Call, oid: str, **query: str) -> str:
    return f"{call.hub.storage}/objects/{oid}?{urlencode({**query, 'signature': call.hub.signature})}"


def _check_signature(call: Call) -> None:
    """Refuses what storage services refuse: a wrong signature, and a token of the Hub sent along with it."""
    if "Authorization" in call.headers:
        raise HubError(400, "Only one auth mechanism allowed")
    if call.query.get("signature") != [call.hub.signature]:
        raise HubError(403, "SignatureDoesNotMatch")


def _ranged(call: Call, content: bytes, headers: dict[str, str]) -> Reply:
    """The content, or the one part of it that a `Range` header asks for."""
    headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **headers}
    wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", call.headers.get("Range", ""))
    if wanted is None or wanted[0] == "bytes=-":
        return Reply(200, content, headers)
    if wanted[1]:
        first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
    else:
        first, last = max(len(content) - int(wanted[2]), 0), len(content) - 1
    if first > last:
        error = HubError(416, "InvalidRange")
        error.headers["Content-Range"] = f"bytes */{len(content)}"
        raise error
    headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
    return Reply(206, content[first : last + 1], headers)
