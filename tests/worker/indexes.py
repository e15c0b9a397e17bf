"""Package indexes over HTTP, for installers that ask them: pages of links over wheels that are made here."""

import hashlib
import http.server
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_torch(directory: Path, version: str) -> None:
    """Write a wheel of a package `torch` that holds nothing, on a page of its own."""
    page = directory / "torch"
    page.mkdir(parents=True, exist_ok=True)
    info = f"torch-{version}.dist-info"
    with zipfile.ZipFile(page / f"torch-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr("torch.py", "")
        wheel.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


def write_page(page: Path, *, attributes: str = "") -> None:
    """Write the page of links that an index has for one project: every file beside it, with its digest."""
    links = []
    for file in sorted(page.iterdir()):
        if file.name != "index.html":
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            name = file.name.replace("+", "%2B")
            links.append(f'<a href="{name}#sha256={digest}"{attributes}>{file.name}</a>')
    (page / "index.html").write_text(
        f"<!DOCTYPE html><html><body>{'<br>'.join(links)}</body></html>"
    )


@contextmanager
def served(directory: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve a directory on loopback. Gives its address, and the paths that were asked, as they come."""
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments, directory=str(directory))  # type: ignore[arg-type]

        def log_message(self, *_: object) -> None:
            asked.append(self.path)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join()
