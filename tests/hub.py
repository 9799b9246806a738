"""A small hub on this machine: serves repositories from folders, and answers as the real one does when it refuses."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Generator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REFUSALS = {
    "gated": (401, {"X-Error-Code": "GatedRepo"}),
    "not-granted": (403, {"X-Error-Code": "GatedRepo"}),
    "missing": (401, {"X-Error-Code": "RepoNotFound"}),
    "bad-token": (401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
    "broken": (501, dict[str, str]()),
}
"""Name of a repository -> status and headers of every answer about it."""


@dataclass
class Hub:
    """Address of the server, folder that holds a folder per repository, and what it was asked."""

    url: str
    root: Path
    requests: list[str] = field(default_factory=list[str])
    tokens: set[str | None] = field(default_factory=set[str | None])


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(path)
        self.hub.tokens.add(self.headers.get("Authorization"))
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self._send(404, {"X-Error-Code": "EntryNotFound"}, b"", body)
        elif parts[2:3] == ["resolve"]:
            self._file(parts[1], parts[3], "/".join(parts[4:]), body)
        else:
            self._send(401, {"X-Error-Code": "RepoNotFound"}, b"", body)

    def _file(self, name: str, revision: str, file: str, body: bool) -> None:
        folder = self.hub.root / name
        if name in REFUSALS or not folder.is_dir():
            status, headers = REFUSALS.get(name, REFUSALS["missing"])
            self._send(status, headers, b"", body)
        elif revision not in ("main", COMMIT):
            self._send(404, {"X-Error-Code": "RevisionNotFound"}, b"", body)
        elif not (folder / file).is_file():
            self._send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b"", body)
        else:
            content = (folder / file).read_bytes()
            etag = hashlib.sha256(content).hexdigest()
            self._send(200, {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'}, content, body)

    def _send(self, status: int, headers: dict[str, str], content: bytes, body: bool) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content)


@contextlib.contextmanager
def serving(root: Path) -> Generator[Hub]:
    """Serve ``root/NAME`` as the repository ``tiny/NAME``; its only revisions are ``main`` and `COMMIT`."""
    handler = type("Handler", (_Handler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    handler.hub = hub = Hub(f"http://127.0.0.1:{server.server_port}", root)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
