"""A small Hugging Face hub on loopback, for the tests: it answers what downloads ask for."""

import contextlib
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path

TOKEN = "hf_of_the_tests"  # opens gated repositories


class Hub:
    """Repositories by name: each has folders by revision; `log` has every request."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, Path]] = {}
        self.gated: set[str] = set()
        self.cut: dict[str, int] = {}
        """File name -> the number of bytes after which the connection breaks, once."""
        self.log: list[tuple[str, str]] = []
        self.url = ""

    def take_log(self) -> list[tuple[str, str]]:
        """The requests since the last call: method and path."""
        log, self.log = self.log, []
        return log


def commit(folder: Path) -> str:
    """The commit of a revision: 40 hexadecimal digits."""
    return hashlib.sha1(str(folder).encode()).hexdigest()


def files(folder: Path) -> dict[str, Path]:
    return {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}


class Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = self.path.partition("?")[0]
        self.hub.log.append((self.command, path))
        api = re.fullmatch(
            r"/api/models/([^/]+/[^/]+)(/revision/([^/]+)|/tree/([^/]+))?", path
        ) or re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if api is None or api[1] not in self.hub.repositories:
            return self.error(404, "RepoNotFound")
        revisions = self.hub.repositories[api[1]]
        if path.startswith("/api/"):
            folder = self.revision(revisions, api[3] or api[4] or "main")
            if folder is None:
                return self.error(404, "RevisionNotFound")
            return self.describe(api[1], folder, tree=api[4] is not None)
        folder = self.revision(revisions, api[2])
        if folder is None:
            return self.error(404, "RevisionNotFound")
        if api[1] in self.hub.gated and self.headers.get("authorization") != f"Bearer {TOKEN}":
            return self.error(403, "GatedRepo")
        return self.file(folder, api[3])

    def revision(self, revisions: dict[str, Path], name: str) -> Path | None:
        by_commit = {commit(folder): folder for folder in revisions.values()}
        return (revisions | by_commit).get(name)

    def describe(self, repository: str, folder: Path, *, tree: bool) -> None:
        if tree:
            content = [
                {"type": "file", "path": name, "size": p.stat().st_size, "oid": self.etag(p)}
                for name, p in files(folder).items()
            ]
        else:
            content = {
                "id": repository,
                "sha": commit(folder),
                "siblings": [{"rfilename": name} for name in files(folder)],
            }
        body = json.dumps(content).encode()
        self.send(200, body, {"content-type": "application/json"})

    def file(self, folder: Path, name: str) -> None:
        path = files(folder).get(name)
        if path is None:
            return self.error(404, "EntryNotFound")
        body, status = path.read_bytes(), 200
        headers = {"etag": f'"{self.etag(path)}"', "x-repo-commit": commit(folder)}
        if begin := re.fullmatch(r"bytes=(\d+)-", self.headers.get("range", "")):
            headers["content-range"] = f"bytes {begin[1]}-{len(body) - 1}/{len(body)}"
            body, status = body[int(begin[1]) :], 206
        self.send(status, body, headers, cut=self.hub.cut.pop(name, None) if self.is_get else None)

    @property
    def is_get(self) -> bool:
        return self.command == "GET"

    def error(self, status: int, code: str) -> None:
        self.send(status, b"{}", {"x-error-code": code, "x-error-message": code})

    def send(
        self, status: int, body: bytes, headers: dict[str, str], cut: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        if self.is_get:
            self.wfile.write(body if cut is None else body[:cut])
        if cut is not None:
            self.close_connection = True

    def etag(self, path: Path) -> str:
        return hashlib.sha1(path.read_bytes()).hexdigest()


@contextlib.contextmanager
def serve() -> Iterator[Hub]:
    """A hub without repositories, until the block ends."""
    hub = Hub()
    handler = type("HubHandler", (Handler,), {"hub": hub})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
