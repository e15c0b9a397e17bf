"""Send a model's directory to another host of the job, where engines read it: over HTTP, with the run's key.

    POST /begin/NAME        {"files": {name: {"bytes", "sha256"}}} -> {"wanted": [name, …]}
    PUT  /files/NAME/FILE   the bytes                              -> {"sha256"}
    POST /end/NAME                                                 -> {"path": where it lies there}
    POST /keep/NAME         removes the other versions             -> {}

NAME is START_NAME or a version's. What takes it is `receive_model`. A model's files lie side by side: what is below
them in a checkpoint (an optimizer's state), or is `*.pt`, no engine reads. Small files that the other side has, by
their digest, are not sent again. Standard library only.
"""

import contextlib
import hashlib
import http.client
import json
import time
import urllib.parse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

START_NAME = "start"  # of the model that engines start with
VERSION_PATTERN = r"version_[0-9]{6,12}"
FILE_PATTERN = r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,200}"
PIECE_BYTES = 2**20
# configs and tokenizers, which stay the same; weights change with each update
COMPARED_BYTES_MAX = 32 * 2**20
ANSWER_S = 60.0  # for each answer, and each piece on its way
AGAIN_S = 60.0  # a receiver that was killed is started again meanwhile
POLL_S = 0.5


class SendError(Exception):
    """A directory that did not arrive. The message names the other side, and what it said."""


def send_directory(url: str, directory: Path, name: str, *, key: str | None) -> str:
    """Send the model's files of `directory` to the receiver at `url`, as `name`. Return the path there.

    Raises SendError, or OSError for files here that cannot be read.
    """
    deadline = time.monotonic() + AGAIN_S
    while True:
        try:
            with contextlib.closing(_Line(url, key)) as line:
                return _send(line, directory, name)
        except (ConnectionError, http.client.HTTPException, TimeoutError) as error:
            if time.monotonic() > deadline:
                message = f"{url} could not be sent {directory}: {error or type(error).__name__}"
                raise SendError(message) from error
            time.sleep(POLL_S)


def keep_only(url: str, name: str, *, key: str | None) -> None:
    """Have the receiver remove all versions but `name`. Raises SendError."""
    try:
        with contextlib.closing(_Line(url, key)) as line:
            line.ask("POST", f"/keep/{name}")
    except (OSError, http.client.HTTPException) as error:
        raise SendError(f"{url}: {error or type(error).__name__}") from error


def model_files(directory: Path) -> dict[str, Path]:
    """Return the files of a model's directory that an engine may read, by name."""
    found = {path.name: path for path in sorted(directory.iterdir()) if path.is_file()}
    return {name: path for name, path in found.items() if path.suffix != ".pt" and name[0] != "."}


def _send(line: "_Line", directory: Path, name: str) -> str:
    files = model_files(directory.resolve())
    listed = {file: _described(path) for file, path in files.items()}
    wanted = line.ask("POST", f"/begin/{name}", {"files": listed})["wanted"]
    for file in wanted:
        digest = hashlib.sha256()
        with files[file].open("rb") as stream:
            pieces = _pieces(stream, listed[file]["bytes"], digest)
            answer = line.put(f"/files/{name}/{file}", pieces, listed[file]["bytes"])
        if answer["sha256"] != digest.hexdigest():
            raise SendError(f"{line.url}: {file} of {directory} came damaged there")
    return str(line.ask("POST", f"/end/{name}")["path"])


def _described(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    compared = size <= COMPARED_BYTES_MAX
    return {
        "bytes": size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest() if compared else "",
    }


def _pieces(stream: IO[bytes], size: int, digest: Any) -> Iterator[bytes]:
    left = size
    while left:
        piece = stream.read(min(PIECE_BYTES, left))
        if not piece:
            raise OSError(f"{stream.name} became shorter while it was sent")
        left -= len(piece)
        digest.update(piece)
        yield piece


class _Line:
    """One connection to a receiver."""

    def __init__(self, url: str, key: str | None) -> None:
        self.url = url
        parts = urllib.parse.urlsplit(url)
        assert parts.hostname is not None, f"{url}: needs a host"
        self._connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=ANSWER_S)
        self._headers = {} if key is None else {"Authorization": f"Bearer {key}"}

    def ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        text = json.dumps(body or {}).encode()
        self._connection.request(method, path, text, self._headers)
        return self._answer()

    def put(self, path: str, pieces: Iterator[bytes], size: int) -> dict[str, Any]:
        headers = {**self._headers, "Content-Length": str(size)}
        with contextlib.suppress(BrokenPipeError):  # it refused, and says why
            self._connection.request("PUT", path, pieces, headers)
        return self._answer()

    def close(self) -> None:
        self._connection.close()

    def _answer(self) -> dict[str, Any]:
        response = self._connection.getresponse()
        text = response.read().decode(errors="replace")
        if response.status != 200:
            raise SendError(f"{self.url}: {text.strip()[:500] or response.status}")
        answer: dict[str, Any] = json.loads(text)
        return answer
