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
    "gated": (401, "GatedRepo"),
    "not-granted": (403, "GatedRepo"),
    "missing": (401, "RepoNotFound"),
    "bad-token": (401, ""),
    "broken": (501, ""),
}
"""Name of a repository -> status and error code of every answer about it."""


@dataclass
class Hub:
    """Address of the server, folder that holds a folder per repository, and what it was asked."""

    url: str
    root: Path
    requests: list[str] = field(default_factory=list[str])
    tokens: set[str | None] = field(default_factory=set[str | None])


@contextlib.contextmanager
def serving(root: Path) -> Generator[Hub]:
    """Serve ``root/NAME`` as the repository ``tiny/NAME``; its only revisions are ``main`` and `COMMIT`."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def log_message(self, format: str, *args: object) -> None:
            pass

        def _answer(self, *, body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(path)
            hub.tokens.add(self.headers.get("Authorization"))
            parts = path.strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                self._send(404, {"X-Error-Code": "EntryNotFound"}, b"", body)
            elif parts[2:3] == ["resolve"]:
                self._file(parts[1], parts[3], "/".join(parts[4:]), body)
            else:
                self._send(401, {"X-Error-Code": "RepoNotFound"}, b"", body)

        def _file(self, name: str, revision: str, file: str, body: bool) -> None:
            if self._refused(name, revision, body):
                return
            path = root / name / file
            if not path.is_file():
                self._send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b"", body)
                return
            data = path.read_bytes()
            etag = hashlib.sha256(data).hexdigest()
            self._send(200, {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'}, data, body)

        def _refused(self, name: str, revision: str, body: bool) -> bool:
            status, code = REFUSALS.get(name, (404, "RepoNotFound"))
            if name not in REFUSALS and (root / name).is_dir():
                if revision in ("main", COMMIT):
                    return False
                status, code = 404, "RevisionNotFound"
            message = {"X-Error-Message": "Invalid credentials in Authorization header"} if name == "bad-token" else {}
            self._send(status, {**message, **({"X-Error-Code": code} if code else {})}, b"", body)
            return True

        def _send(self, status: int, headers: dict[str, str], data: bytes, body: bool) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = Hub(f"http://127.0.0.1:{server.server_port}", root)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
