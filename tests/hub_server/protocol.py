"""Requests, answers and routes of the local Hub, and who may do what."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote

if TYPE_CHECKING:
    from .server import LocalHub
    from .store import Repository

REPO_TYPES = {"models": "model", "datasets": "dataset", "spaces": "space"}
API = r"/api/(?P<types>models|datasets|spaces)/(?P<repo_id>[^/]+/[^/]+)"


class HubError(Exception):
    """An answer other than success: HTTP status, message, the Hub's `X-Error-Code` and further JSON fields."""

    def __init__(self, status: int, message: str, code: str | None = None, **fields: Any) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.fields = status, message, code, fields
        self.headers: dict[str, str] = {}


@dataclass(frozen=True)
class Account:
    """Who a token belongs to and what it may do: `"read"` or `"write"`."""

    user: str
    role: str


@dataclass
class Reply:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def json(cls, content: Any, status: int = 200) -> Reply:
        # YAML in a card may hold dates, which JSON does not know.
        return cls(status, json.dumps(content, default=str).encode(), {"Content-Type": "application/json"})

    @classmethod
    def error(cls, error: HubError) -> Reply:
        reply = cls.json({"error": error.message, **error.fields}, error.status)
        reply.headers["X-Error-Message"] = " ".join(error.message.encode("ascii", "replace").decode().split())
        if error.code:
            reply.headers["X-Error-Code"] = error.code
        reply.headers.update(error.headers)
        return reply


@dataclass
class Call:
    """One request, with the groups of its route's pattern as `parts` (percent-decoded)."""

    hub: LocalHub
    method: str
    path: str
    query: dict[str, list[str]]
    headers: Any
    body: bytes
    parts: dict[str, str] = field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        return json.loads(self.body)

    def account(self) -> Account | None:
        """The caller; `None` without a token. A token nobody has is refused, even for public repositories."""
        authorization = self.headers.get("Authorization")
        if authorization is None:
            return None
        account = self.hub.accounts.get(authorization.removeprefix("Bearer "))
        if account is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return account

    def writer(self, namespace: str | None = None) -> Account:
        """The caller, who must hold a write token, for `namespace` if one is given."""
        account = self.account()
        if account is None:
            raise HubError(401, "Invalid username or password.")
        if account.role != "write":
            raise HubError(403, "Forbidden: you must use a write token to upload to a repository.")
        if namespace not in (None, account.user):
            raise HubError(403, f'You don\'t have the rights to create a repository under the namespace "{namespace}"')
        return account

    def repository(
        self, *, write: bool = False, repo_type: str | None = None, repo_id: str | None = None
    ) -> Repository:
        """
        The repository the path names, if the caller may see (or with `write`, change) it. A private one that is not
        the caller's looks like a missing one: 401 without a token and 404 with one, as on the Hub.
        """
        repo_type = repo_type or REPO_TYPES[self.parts.get("types") or "models"]
        account = self.account()
        repository = self.hub.store.find(repo_type, repo_id or self.parts["repo_id"])
        if repository is None or (repository.private and (account is None or account.user != repository.owner)):
            if account is None:
                raise HubError(401, "Invalid username or password.", "RepoNotFound")
            raise HubError(404, "Repository not found", "RepoNotFound")
        if write:
            if self.writer().user != repository.owner:
                raise HubError(403, "Forbidden: you don't have write access to this repository.")
        return repository


Handler = Callable[[Call], Reply]


class Routes:
    """Patterns of method and path with the functions that answer them; the first match wins."""

    def __init__(self) -> None:
        self._routes: list[tuple[str, re.Pattern[str], Handler]] = []

    def add(self, method: str, pattern: str) -> Callable[[Handler], Handler]:
        def register(handler: Handler) -> Handler:
            self._routes.append((method, re.compile(pattern), handler))
            return handler

        return register

    def answer(self, call: Call) -> Reply:
        """Runs the route that fits; `HEAD` is answered like `GET` (the server leaves out the body)."""
        method = "GET" if call.method == "HEAD" else call.method
        try:
            for wanted, pattern, handler in self._routes:
                match = pattern.fullmatch(call.path) if method == wanted else None
                if match:
                    call.parts = {name: unquote(part) for name, part in match.groupdict().items() if part is not None}
                    return handler(call)
            raise HubError(404, f"Not found: {call.method} {call.path}")
        except HubError as error:
            return Reply.error(error)


def parse_query(query: str) -> dict[str, list[str]]:
    return parse_qs(query, keep_blank_values=True)
