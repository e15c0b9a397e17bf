"""Take models from the first host of a job for the engines of this one. Any Python >= 3.10; standard library only.

    python3 -m rollouts.engines.receive_model --host ADDRESS --port PORT --start DIR --versions DIR

It listens at that address alone, and everything but /ready takes the run's admin key. What it is asked:
`send_model`. A directory has its name once it is whole.
"""

import argparse
import contextlib
import hashlib
import http.server
import json
import os
import re
import shutil
import signal
import socket
import socketserver
import sys
from pathlib import Path
from typing import Any

from rollouts.engines.keys import is_allowed, read_keys
from rollouts.engines.send_model import FILE_PATTERN, PIECE_BYTES, START_NAME, VERSION_PATTERN

BODY_BYTES_MAX = 2**20
QUIET_S = 120.0  # a sender that says nothing for so long is gone


class Refused(Exception):
    """A request that is not done: (status, why)."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


class Store:
    """The directories that were sent, and those under way. One sender at a time has a name."""

    def __init__(self, start: Path, versions: Path) -> None:
        self._start, self._versions = start, versions
        self._expected: dict[str, dict[str, dict[str, Any]]] = {}  # by name: what was announced
        self._known: dict[str, Path] = {}  # by digest: whole files that were compared

    def begin(self, name: str, files: Any) -> list[str]:
        """Make room for a directory; return the files that are to be sent."""
        listed = _checked(files)
        part = self._part(name)
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(mode=0o700, parents=True)
        self._expected[name] = listed
        return [file for file, known in listed.items() if not self._linked(part / file, known)]

    def file(self, name: str, file: str) -> tuple[Path, int]:
        """Return where a file of an announced directory goes, and its size."""
        expected = self._expected.get(name, {})
        if file not in expected:
            raise Refused(409, f"{name}/{file} was not announced")
        return self._part(name) / file, expected[file]["bytes"]

    def end(self, name: str) -> Path:
        """Give a whole directory its name."""
        expected, part, place = self._expected.get(name), self._part(name), self._place(name)
        if expected is None:
            raise Refused(409, f"{name} was not announced")
        for file, known in expected.items():
            if not (part / file).is_file() or (part / file).stat().st_size != known["bytes"]:
                raise Refused(409, f"{name}/{file} has not come whole")
        shutil.rmtree(place, ignore_errors=True)
        os.replace(part, place)
        del self._expected[name]
        self._known |= {known["sha256"]: place / file for file, known in expected.items()}
        return place

    def keep(self, name: str) -> None:
        """Remove all other versions."""
        self._place(name)
        for other in self._versions.glob("version_*"):
            if other.name != name:
                shutil.rmtree(other, ignore_errors=True)

    def _linked(self, path: Path, known: dict[str, Any]) -> bool:
        """Take a file that is here already, by its digest."""
        there = self._known.get(known["sha256"]) if known["sha256"] else None
        if there is None:
            return False
        try:
            os.link(there, path)
        except OSError:  # removed since, or on another disk
            return False
        return True

    def _place(self, name: str) -> Path:
        if name == START_NAME:
            return self._start
        if not re.fullmatch(VERSION_PATTERN, name):
            raise Refused(400, f"{name!r} does not name a model")
        return self._versions / name

    def _part(self, name: str) -> Path:
        place = self._place(name)
        return place.with_name(f".{place.name}.part")


def _checked(files: Any) -> dict[str, dict[str, Any]]:
    if not isinstance(files, dict):
        raise Refused(400, "files: needs an object")
    for name, known in files.items():
        sizes = isinstance(known, dict) and isinstance(known.get("bytes"), int)
        if not re.fullmatch(FILE_PATTERN, name) or not sizes or known["bytes"] < 0:
            raise Refused(400, f"{name!r} does not name a file of a model, with its bytes")
        if not isinstance(known.get("sha256"), str):
            raise Refused(400, f"{name}: needs a digest, or an empty text")
    return files


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection of a sender."""

    protocol_version = "HTTP/1.1"
    timeout = QUIET_S
    store: Store
    keys: tuple[str | None, str | None]

    def do_GET(self) -> None:
        self._reply(lambda: {} if self.path == "/ready" else _nothing(self.path))

    def do_POST(self) -> None:
        self._reply(self._post)

    def do_PUT(self) -> None:
        self._reply(self._put)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing of each request."""

    def _reply(self, act: Any) -> None:
        status, said = 200, ""
        try:
            if not is_allowed(self.path, self.headers.get("Authorization", ""), *self.keys):
                raise Refused(401, "needs the run's key")
            said = json.dumps(act())
        except Refused as error:
            status, said = error.status, str(error)
        except OSError as error:
            status, said = 507, f"{os.uname().nodename}: {error.filename or ''}: {error.strerror}"
        if status != 200:
            self.close_connection = True  # of its body something may not have been read
            print(f"{self.command} {self.path}: {status}: {said}", flush=True)
        body = said.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _post(self) -> dict[str, Any]:
        size = self._length()
        if size > BODY_BYTES_MAX:
            raise Refused(413, f"{size} bytes are too many")
        try:
            body = json.loads(self.rfile.read(size) or b"{}")
        except ValueError:
            raise Refused(400, "needs JSON") from None
        _, verb, name, *more = (*self.path.split("/"), "")
        if more != [""] or not isinstance(body, dict):
            _nothing(self.path)
        if verb == "begin":
            return {"wanted": self.store.begin(name, body.get("files"))}
        if verb == "end":
            return {"path": str(self.store.end(name))}
        if verb != "keep":
            _nothing(self.path)
        self.store.keep(name)
        return {}

    def _put(self) -> dict[str, Any]:
        _, verb, name, file, *more = (*self.path.split("/"), "", "")
        if verb != "files" or more != ["", ""]:
            _nothing(self.path)
        path, size = self.store.file(name, file)
        if size != self._length():
            raise Refused(400, f"{file}: {size} bytes were announced")
        digest, left = hashlib.sha256(), size
        with path.open("wb") as stream:
            while left:
                piece = self.rfile.read(min(PIECE_BYTES, left))
                if not piece:
                    raise Refused(400, f"{file} was cut off")
                left -= len(piece)
                digest.update(piece)
                stream.write(piece)
        return {"sha256": digest.hexdigest()}

    def _length(self) -> int:
        text = self.headers.get("Content-Length", "0")
        if not text.isdigit():
            raise Refused(411, "needs a Content-Length")
        return int(text)


def _nothing(path: str) -> dict[str, Any]:
    raise Refused(404, f"{path}: no such thing here")


class Server(http.server.ThreadingHTTPServer):
    """It serves on one address of IPv4 or IPv6."""

    daemon_threads = True

    def server_bind(self) -> None:
        """Bind, and ask no name server who we are."""
        socketserver.TCPServer.server_bind(self)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Let a connection that broke end; the sender tries again."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Take models for the engines of this host.")
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", required=True, type=int)
    parser.add_argument("--start", required=True, type=Path, help="of the model they start with")
    parser.add_argument("--versions", required=True, type=Path, help="of each update, below it")
    arguments = parser.parse_args()
    Handler.store, Handler.keys = Store(arguments.start, arguments.versions), read_keys()
    if Handler.keys[1] is None:
        sys.exit("error: needs the run's key in its environment")
    if ":" in arguments.host:
        Server.address_family = socket.AF_INET6
    try:
        server = Server((arguments.host, arguments.port), Handler)
    except OSError as error:
        sys.exit(f"error: cannot listen on {arguments.host}:{arguments.port}: {error.strerror}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    print(f"takes models at {arguments.host}:{arguments.port}", flush=True)
    with server, contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()


if __name__ == "__main__":
    main()
