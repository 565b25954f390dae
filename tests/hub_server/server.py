"""The local Hub itself: two servers on free ports of 127.0.0.1, and what a test may look at and break."""

from __future__ import annotations

import re
import secrets
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import unquote

from .faults import Fault, Faults
from .files import ROUTES, STORAGE_ROUTES
from .protocol import Account, Call, HubError, Reply, Routes, parse_query
from .store import Commit, Operation, Repository, Store, StoredFile


class Request(NamedTuple):
    """A request that was answered; `line` is `"METHOD /path"`, percent-decoded and without the query."""

    line: str
    status: int


class LocalHub:
    """
    A Hub for tests, to be used as a context manager. Everything is in memory and gone afterwards.

    Attributes:
        endpoint (`str`): what `HF_ENDPOINT` must be.
        storage (`str`): the origin that large files are sent to and redirected to.
        user (`str`), token (`str`): an account and its write token.
        read_token (`str`): a token of the same account that may not write.
        other_user (`str`), other_token (`str`): another account and its write token.
        requests (`list[Request]`): what was answered so far, on both origins.
        errors (`list[str]`): tracebacks of the server's own failures; empty unless it has a bug.
    """

    user, token, read_token = "me", "hf_write", "hf_read"
    other_user, other_token = "stranger", "hf_stranger"

    def __init__(self) -> None:
        self.store = Store()
        self.accounts = {
            self.token: Account(self.user, "write"),
            self.read_token: Account(self.user, "read"),
            self.other_token: Account(self.other_user, "write"),
        }
        self.faults = Faults()
        self.requests: list[Request] = []
        self.errors: list[str] = []
        self.signature = secrets.token_hex(8)
        self._ports = (0, 0)
        self._origins: list[_Origin] = []

    def __enter__(self) -> LocalHub:
        self._start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._ports[0]}"

    @property
    def storage(self) -> str:
        return f"http://127.0.0.1:{self._ports[1]}"

    def url(self, repo_type: str, repo_id: str) -> str:
        return f"{self.endpoint}/{repo_id}" if repo_type == "model" else f"{self.endpoint}/{repo_type}s/{repo_id}"

    def repository(self, repo_id: str, repo_type: str = "model") -> Repository:
        found = self.store.find(repo_type, repo_id)
        if found is None:
            raise KeyError(f"there is no {repo_type} {repo_id}")
        return found

    def commits(self, repo_id: str, repo_type: str = "model", revision: str = "main") -> list[Commit]:
        """Newest first; the last one is the "initial commit" of every repository."""
        return self.repository(repo_id, repo_type).resolve(revision).history()

    def files(self, repo_id: str, repo_type: str = "model", revision: str = "main") -> dict[str, bytes]:
        """Contents by path, without `.gitattributes`."""
        files = self.repository(repo_id, repo_type).resolve(revision).files
        return {path: file.content for path, file in files.items() if path != ".gitattributes"}

    def commit(
        self,
        repo_id: str,
        files: Mapping[str, bytes | str],
        repo_type: str = "model",
        *,
        delete: Sequence[str] = (),
        revision: str = "main",
        private: bool = False,
    ) -> str:
        """
        Commits as somebody else, past every check: what a hostile or careless owner can put into a repository. Makes
        the repository if there is none.

        Returns:
            `str`: the commit's id.
        """
        with self.store.lock:
            repository = self.store.find(repo_type, repo_id) or self.store.create(repo_type, repo_id, private=private)
            operations = [Operation(path, "delete") for path in delete]
            for path, content in files.items():
                content = content.encode() if isinstance(content, str) else content
                lfs = repository.uses_lfs(path, len(content), content[:512], revision)
                operations.append(Operation(path, "put", StoredFile(content, lfs)))
            return repository.commit(operations, author=self.other_user, revision=revision, title="Change").oid

    def count(self, pattern: str, *, failed: bool = False) -> int:
        """How many requests whose `"METHOD /path"` matches were answered with success (or else, if `failed`)."""
        return sum(bool(re.search(pattern, line)) and (status >= 400) is failed for line, status in self.requests)

    def fail(self, pattern: str, status: int = 500, *, times: int | None = 1, skip: int = 0, **headers: str) -> None:
        """Answers matching requests with `status`. See `Fault` for `pattern`, `times` and `skip`."""
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        self.faults.add(Fault(pattern, "fail", times, skip, status, names))

    def drop(self, pattern: str, *, times: int | None = 1, skip: int = 0) -> None:
        """Closes the connection half-way through an upload or a download."""
        self.faults.add(Fault(pattern, "drop", times, skip))

    def lose(self, pattern: str, *, times: int | None = 1, skip: int = 0) -> None:
        """Does what is asked but closes the connection without an answer."""
        self.faults.add(Fault(pattern, "lose", times, skip))

    def before(self, pattern: str, action: Callable[[], object], *, times: int | None = 1, skip: int = 0) -> None:
        """Calls `action` when a matching request comes in, before it is looked at: a change under way."""
        self.faults.add(Fault(pattern, "before", times, skip, action=action))

    @contextmanager
    def unreachable(self) -> Iterator[None]:
        """Refuses all connections meanwhile, and breaks the open ones."""
        self._stop()
        try:
            yield
        finally:
            self._start()

    def _start(self) -> None:
        self._origins = [
            _Origin(self, port, routes) for port, routes in zip(self._ports, (ROUTES, STORAGE_ROUTES), strict=True)
        ]
        self._ports = (self._origins[0].server_port, self._origins[1].server_port)
        for origin in self._origins:
            threading.Thread(target=origin.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def _stop(self) -> None:
        for origin in self._origins:
            origin.shutdown()
            origin.server_close()
            origin.break_connections()
        self._origins = []


class _Origin(ThreadingHTTPServer):
    """One origin: its routes, and its open connections, so that they can be broken."""

    daemon_threads = True

    def __init__(self, hub: LocalHub, port: int, routes: Routes) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.hub, self.routes = hub, routes
        self._connections: set[socket.socket] = set()

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self._connections.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def break_connections(self) -> None:
        for connection in list(self._connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                # The client closed it first.
                continue

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            self.hub.errors.append(traceback.format_exc())


class _Handler(BaseHTTPRequestHandler):
    server: _Origin
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def serve(self) -> None:
        hub = self.server.hub
        path, _, query = self.path.partition("?")
        line = f"{self.command} {unquote(path)}"
        fault = hub.faults.take(line)
        kind = fault.kind if fault else None
        length = int(self.headers.get("Content-Length", 0))
        if kind == "drop" and length:
            self.rfile.read(length // 2)
            self.close_connection = True
            return
        body = self.rfile.read(length)
        if len(body) < length:
            # The client died while it sent the body: nothing has happened.
            self.close_connection = True
            return
        if fault and fault.action:
            fault.action()
        if fault and kind == "fail":
            error = HubError(fault.status, "Fault injected by the test")
            error.headers = fault.headers
            reply = Reply.error(error)
        elif self.headers.get("Transfer-Encoding"):
            self.close_connection = True
            reply = Reply.error(HubError(411, "MissingContentLength"))
        else:
            reply = self.server.routes.answer(Call(hub, self.command, path, parse_query(query), self.headers, body))
        hub.requests.append(Request(line, reply.status))
        if kind == "lose":
            self.close_connection = True
            return
        self._send(reply, half=kind == "drop")

    def _send(self, reply: Reply, *, half: bool) -> None:
        self.send_response(reply.status)
        for name, value in {**reply.headers, "Content-Length": str(len(reply.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body[: len(reply.body) // 2] if half else reply.body)
        if half:
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: `LocalHub.requests` has it all."""
