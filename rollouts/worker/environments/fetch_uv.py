"""Fetch uv from the host's package index, without pip: a bare Python 3.10 of a distribution has none.

    python3 -I .../rollouts/worker/environments/fetch_uv.py <file to write>

Asks the index that the host's variables or pip's configuration files name, else the public one, and puts the program
of the newest wheel that fits this machine at the path given, whole or not at all. A program of its own, which imports
nothing of ours: the bootstrap runs it as it runs an installer. Standard library only.
"""

import base64
import configparser
import hashlib
import html
import io
import os
import platform
import re
import ssl
import sys
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

PUBLIC_INDEX = "https://pypi.org/simple"
INDEX_VARIABLES = (
    "UV_DEFAULT_INDEX",
    "UV_INDEX_URL",
    "PIP_INDEX_URL",
    "UV_EXTRA_INDEX_URL",
    "PIP_EXTRA_INDEX_URL",
)
# last one wins
PIP_FILES = "/etc/xdg/pip/pip.conf", "/etc/pip.conf", "~/.pip/pip.conf", "~/.config/pip/pip.conf"
TIMEOUT_S = 60.0
LINK = re.compile(r"<a\s[^>]*?href=[\"']([^\"']+)[\"'][^>]*>", re.IGNORECASE)
WHEEL = re.compile(r"uv-(?P<version>\d+(?:\.\d+)*)-py3-none-(?P<tags>[\w.]+)\.whl")
PROGRAM = re.compile(r"uv-[^/]+\.data/scripts/uv")


class FetchError(Exception):
    """uv could not be had. The message names the fix."""


@dataclass(frozen=True)
class Wheel:
    url: str
    name: str
    version: tuple[int, ...]
    sha256: str  # "" where the index gives none


def pip_options() -> dict[str, str]:
    """Return the [global] options of pip's configuration files."""
    files = [
        os.path.expanduser(file) for file in (*PIP_FILES, os.environ.get("PIP_CONFIG_FILE", ""))
    ]
    parser = configparser.RawConfigParser(strict=False)
    try:
        parser.read([file for file in files if file and file != os.devnull], encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError):
        return {}
    return dict(parser["global"]) if parser.has_section("global") else {}


def indexes(environment: dict[str, str], options: dict[str, str]) -> list[str]:
    """List the indexes to ask, the host's own first; the public one where the host names none in its place."""
    named = [url for name in INDEX_VARIABLES[:3] for url in environment.get(name, "").split()]
    main = named[:1] or options.get("index-url", "").split()[:1] or [PUBLIC_INDEX]
    extra = [url for name in INDEX_VARIABLES[3:] for url in environment.get(name, "").split()]
    more = [*main, *extra, *options.get("extra-index-url", "").split()]
    return [url.rstrip("/") for url in dict.fromkeys(more)]


def wheels(page: str, url: str) -> Iterator[Wheel]:
    """Read the wheels that an index's page about uv offers, without those that were withdrawn."""
    for link in LINK.finditer(page):
        if "data-yanked" in link[0]:
            continue
        target, _, fragment = urllib.parse.urljoin(url, html.unescape(link[1])).partition("#")
        name = urllib.parse.unquote(target.rpartition("/")[2])
        found = WHEEL.fullmatch(name)
        if found:
            digest = fragment.removeprefix("sha256=") if fragment.startswith("sha256=") else ""
            yield Wheel(target, name, tuple(map(int, found["version"].split("."))), digest)


def fits(name: str, machine: str, libc: tuple[str, str]) -> bool:
    """Return whether a wheel runs on this machine; `libc` as platform.libc_ver gives it."""
    found = WHEEL.fullmatch(name)
    if libc[0] != "glibc":
        return (
            found is not None
            and re.search(rf"musllinux_\d+_\d+_{machine}", found["tags"]) is not None
        )
    ours = tuple(int(part) for part in re.findall(r"\d+", libc[1])[:2])
    needs = re.findall(rf"manylinux_(\d+)_(\d+)_{machine}", found["tags"]) if found else []
    return any((int(major), int(minor)) <= ours for major, minor in needs)


def open_url(url: str, options: dict[str, str], *, timeout_s: float) -> IO[bytes]:
    """Open an http(s) or file URL, with the credentials that it names. Raises OSError or ValueError."""
    parts = urllib.parse.urlsplit(url)
    plain = urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    request = urllib.request.Request(plain, headers={"Accept": "text/html, */*"})
    if parts.username:
        pair = (
            f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
        )
        request.add_header("Authorization", f"Basic {base64.b64encode(pair.encode()).decode()}")
    certificates = os.environ.get("PIP_CERT") or options.get("cert") or None
    context = ssl.create_default_context(cafile=certificates) if parts.scheme == "https" else None
    opened: IO[bytes] = urllib.request.urlopen(request, timeout=timeout_s, context=context)
    return opened


def download(url: str, options: dict[str, str]) -> bytes:
    """Return what an http(s) or file URL holds, with the credentials that it names."""
    with open_url(url, options, timeout_s=TIMEOUT_S) as answer:
        return answer.read()


def newest(urls: list[str], options: dict[str, str]) -> Wheel:
    """Find the newest wheel that fits, on the first index that has one. Raises FetchError."""
    said = []
    for url in urls:
        page = f"{url}/uv/"
        shown = re.sub(r"//[^/@]*@", "//", page)
        try:
            found = list(wheels(download(page, options).decode(errors="replace"), page))
        except (OSError, ValueError) as error:  # URLError is an OSError
            said.append(f"{shown}: {error}")
            continue
        fitting = [
            wheel for wheel in found if fits(wheel.name, platform.machine(), platform.libc_ver())
        ]
        if fitting:
            return max(fitting, key=lambda wheel: wheel.version)
        said.append(
            f"{shown}: {len(found)} wheels of uv, none for {platform.machine()}, {platform.libc_ver()}"
        )
    raise FetchError(
        f"no uv on the package index: {'; '.join(said)}. Install uv on the host, or set PIP_INDEX_URL in host.env to an"
        " index that it reaches."
    )


def fetch(target: Path) -> None:
    """Put uv at `target`. Raises FetchError."""
    options = pip_options()
    wheel = newest(indexes(dict(os.environ), options), options)
    try:
        body = download(wheel.url, options)
    except (OSError, ValueError) as error:
        raise FetchError(f"cannot download {wheel.name}: {error}") from None
    print(f"Downloading {wheel.name} ({len(body) / 1e6:.1f} MB)", flush=True)
    if wheel.sha256 and hashlib.sha256(body).hexdigest() != wheel.sha256:
        raise FetchError(f"{wheel.name} is damaged: its sha256 is not what the index says")
    try:
        archive = zipfile.ZipFile(io.BytesIO(body))
        program = archive.read(next(name for name in archive.namelist() if PROGRAM.fullmatch(name)))
    except (zipfile.BadZipFile, StopIteration):
        raise FetchError(f"{wheel.name} holds no uv") from None
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.write_bytes(program)
    temporary.chmod(0o755)
    temporary.replace(target)


if __name__ == "__main__":
    try:
        fetch(Path(sys.argv[1]))
    except FetchError as error:
        sys.exit(f"error: {error}")
