"""A hub on this machine: serves directories as data set repositories, in the part of the hub's HTTP interface that
`datasets` uses. Real client, real files, real HTTP; only the far end is ours."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serve_hub(root: Path) -> Iterator[tuple[str, list[str]]]:
    """The address, and the paths that were asked for. `root/owner/name/` is the data set owner/name."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            asked.append(f"{self.command} {self.path}")
            self._answer(unquote(urlsplit(self.path).path).strip("/").split("/"), {})

        do_HEAD = do_GET

        def do_POST(self) -> None:
            asked.append(f"{self.command} {self.path}")
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self._answer(unquote(urlsplit(self.path).path).strip("/").split("/"), json.loads(body))

        def _answer(self, parts: list[str], body: dict[str, Any]) -> None:
            match parts:
                case ["api", "datasets", owner, name, *rest] if (root / owner / name).is_dir():
                    self._api(root / owner / name, f"{owner}/{name}", rest, body)
                case ["datasets", owner, name, "resolve", _, *path] if root.joinpath(
                    owner, name, *path
                ).is_file():
                    self._send(
                        root.joinpath(owner, name, *path).read_bytes(), "application/octet-stream"
                    )
                case ["datasets", owner, name, *_] if (root / owner / name).is_dir():
                    self._send(b"", "text/plain", 404, "EntryNotFound")
                case _:
                    self._send(b"", "text/plain", 404, "RepoNotFound")

        def _api(self, repository: Path, name: str, rest: list[str], body: dict[str, Any]) -> None:
            entries = [_entry(path, repository) for path in sorted(repository.rglob("*"))]
            found: Any
            match rest:
                case [] | ["revision", _]:
                    siblings = [
                        {"rfilename": entry["path"]} for entry in entries if entry["type"] == "file"
                    ]
                    found = {
                        "id": name,
                        "sha": COMMIT,
                        "private": False,
                        "tags": [],
                        "siblings": siblings,
                    }
                case ["tree", _, *path]:
                    found = [
                        entry for entry in entries if Path(entry["path"]).parent == Path(*path)
                    ]
                case ["paths-info", _]:
                    found = [entry for entry in entries if entry["path"] in body["paths"]]
                case _:
                    return self._send(b"", "text/plain", 404, "EntryNotFound")
            self._send(json.dumps(found).encode(), "application/json")

        def _send(
            self, content: bytes, kind: str, status: int = 200, error: str | None = None
        ) -> None:
            self.send_response(status)
            if error is not None:
                self.send_header("X-Error-Code", error)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, *arguments: Any) -> None:
            """Tests look at `asked`."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _entry(path: Path, repository: Path) -> dict[str, Any]:
    content = path.read_bytes() if path.is_file() else b""
    oid = hashlib.sha1(str(path).encode() + content).hexdigest()
    kind = "file" if path.is_file() else "directory"
    return {
        "type": kind,
        "path": str(path.relative_to(repository)),
        "size": len(content),
        "oid": oid,
    }
