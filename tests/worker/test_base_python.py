"""What a host lacks is put beside its environments: uv from an index, a Python from a mirror; the real uv does it."""

import hashlib
import importlib.util
import json
import os
import platform
import shutil
import sys
import sysconfig
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from rollouts.run_dir import EnvironmentSpec, RunDir
from rollouts.worker.environments import fetch_uv
from rollouts.worker.environments.installer import BootstrapError
from rollouts.worker.environments.virtual_environment import ensure_environment
from tests.worker.environments import deadline, version_in
from tests.worker.indexes import served, write_page

UV = Path(sys.executable).with_name("uv")
TAG = f"manylinux_2_17_{platform.machine()}.manylinux2014_{platform.machine()}"
RELEASES = "https://github.com/astral-sh/python-build-standalone/releases/download"


def write_uv(page: Path, version: str, tag: str = TAG, *, program: bytes = b"") -> Path:
    """Write a wheel of uv whose program is this machine's."""
    page.mkdir(parents=True, exist_ok=True)
    wheel = page / f"uv-{version}-py3-none-{tag}.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"uv-{version}.data/scripts/uv", program or UV.read_bytes())
        archive.writestr(f"uv-{version}.data/scripts/uvx", b"another")
    return wheel


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host without uv, whose account knows nothing of any index; its tools' directory."""
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return tmp_path / "tools"


def test_uv_comes_from_the_index(
    spec: EnvironmentSpec, run: RunDir, bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: on a host without uv or pip, the newest uv of its index that fits makes the environment, without root; a
    second one uses it again. Red with uv's absence an error, and with a withdrawn or foreign wheel taken."""
    page = tmp_path / "index" / "uv"
    write_uv(page, "0.9.9", program=b"#!/bin/sh\nexit 3\n")
    write_uv(page, "0.10.0")
    write_uv(page, "0.11.0", "win_amd64", program=b"not ours")
    write_page(page)
    with served(tmp_path / "index") as (url, asked):
        monkeypatch.setenv("PIP_INDEX_URL", url)
        wanted = replace(spec, installer="uv", base_python=sys.executable)
        ensure_environment(wanted, run, deadline())
        again = replace(wanted, path=f"{wanted.path}-2")
        ensure_environment(again, run, deadline())
    assert version_in(spec) == version_in(again) == "1.0"
    assert (bare / "uv").stat().st_mode & 0o111 and sorted(os.listdir(bare)) == ["uv"]
    assert len([path for path in asked if path.endswith(".whl")]) == 1


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        ("withdrawn", "no uv on the package index"),
        ("changed", "sha256"),
        ("gone", "no uv on the package index"),
    ],
)
def test_uv_that_cannot_be_had(  # noqa: PLR0917
    spec: EnvironmentSpec,
    run: RunDir,
    bare: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: str,
    expected: str,
) -> None:
    """Goal: each way says why, and leaves nothing behind. Red with the digest not compared, and with a withdrawn one
    taken."""
    page = tmp_path / "index" / "uv"
    wheel = write_uv(page, "0.10.0", program=b"#!/bin/sh\n")
    write_page(page, attributes=' data-yanked="broken"' if damage == "withdrawn" else "")
    if damage == "changed":
        wheel.write_bytes(wheel.read_bytes() + b" ")
    with served(tmp_path / "index") as (url, _):
        monkeypatch.setenv("PIP_INDEX_URL", url if damage != "gone" else f"{url}/nowhere")
        with pytest.raises(BootstrapError) as refused:
            ensure_environment(
                replace(spec, installer="uv", base_python=sys.executable), run, deadline()
            )
    assert expected in "\n".join(refused.value.log_tail)
    assert not bare.exists() or os.listdir(bare) == []


@pytest.mark.parametrize(
    ("name", "libc", "fits"),
    [
        (
            "uv-0.9.0-py3-none-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
            ("glibc", "2.35"),
            True,
        ),
        ("uv-0.9.0-py3-none-manylinux_2_28_aarch64.whl", ("glibc", "2.35"), False),
        ("uv-0.9.0-py3-none-manylinux_2_28_x86_64.whl", ("glibc", "2.17"), False),
        ("uv-0.9.0-py3-none-musllinux_1_1_x86_64.whl", ("", ""), True),
        ("uv-0.9.0-py3-none-manylinux_2_17_x86_64.whl", ("", ""), False),
        ("uv-0.9.0rc1-py3-none-manylinux_2_17_x86_64.whl", ("glibc", "2.35"), False),
    ],
)
def test_which_wheel_fits(name: str, libc: tuple[str, str], fits: bool) -> None:
    """Goal: by machine and libc. Red with the tags not looked at."""
    assert fetch_uv.fits(name, "x86_64", libc) is fits


def test_which_indexes_are_asked() -> None:
    """Goal: the host's own index in place of the public one, further ones after it. Red with the public one always
    first: a host behind a mirror waits for it."""
    assert fetch_uv.indexes({}, {}) == [fetch_uv.PUBLIC_INDEX]
    assert fetch_uv.indexes(
        {}, {"index-url": "http://a/s/", "extra-index-url": "\nhttp://b\nhttp://c"}
    ) == [
        "http://a/s",
        "http://b",
        "http://c",
    ]
    told = {
        "PIP_INDEX_URL": "http://p",
        "UV_DEFAULT_INDEX": "http://u",
        "PIP_EXTRA_INDEX_URL": "http://x http://p",
    }
    assert fetch_uv.indexes(told, {"index-url": "http://a"}) == ["http://u", "http://x", "http://p"]


def write_python(mirror: Path, prepared: Path) -> Path:
    """Write an archive of a Python as releases lay it out, and the list that names it with its digest.

    Its interpreter is this one; `-m venv` copies a prepared environment.
    """
    version = platform.python_version()
    script = mirror / "python3"
    text = f'#!/bin/sh\n[ "$1 $2" = "-m venv" ] && exec cp -a {prepared} "$3"\nexec {sys.executable} "$@"\n'
    script.parent.mkdir(parents=True)
    script.write_text(text)
    script.chmod(0o755)
    name = f"cpython-{version}+20260101-{platform.machine()}-unknown-linux-gnu-install_only_stripped.tar.gz"
    archive = mirror / "20260101" / name
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(script, f"python/bin/python{version.rpartition('.')[0]}")
        data = sysconfig._get_sysconfigdata_name()  # type: ignore[attr-defined]  # uv rewrites the paths in it
        source = importlib.util.find_spec(data)
        assert source is not None and source.origin is not None
        tar.add(source.origin, f"python/lib/python{version.rpartition('.')[0]}/{data}.py")
    major, minor, patch = map(int, version.split("."))
    entry = {
        "name": "cpython",
        "arch": {"family": platform.machine(), "variant": None},
        "os": "linux",
        "libc": "gnu",
        "major": major,
        "minor": minor,
        "patch": patch,
        "prerelease": "",
        "url": f"{RELEASES}/20260101/{name.replace('+', '%2B')}",
        "sha256": hashlib.sha256(archive.read_bytes()).hexdigest(),
        "variant": None,
        "build": "20260101",
    }
    file = mirror / "downloads.json"
    file.write_text(json.dumps({f"cpython-{version}-linux-{platform.machine()}-gnu": entry}))
    return file


def test_a_python_from_a_mirror(  # noqa: PLR0917
    spec: EnvironmentSpec,
    run: RunDir,
    bare: Path,
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Goal: a host whose Pythons do not fit gets one from the mirror that its variables name, into the rollouts home,
    and pip's environment is made by it; it is downloaded once. Red with the host's own Python taken all the same."""
    bare.mkdir()
    shutil.copy(UV, bare / "uv")
    listed = write_python(tmp_path / "mirror", prepared)
    minor = ".".join(platform.python_version_tuple()[:2])
    wanted = replace(spec, base_python="", python_version=minor)
    with served(tmp_path / "mirror") as (url, asked):
        monkeypatch.setenv("UV_PYTHON_INSTALL_MIRROR", url)
        monkeypatch.setenv("UV_PYTHON_DOWNLOADS_JSON_URL", str(listed))
        ensure_environment(wanted, run, deadline())
        ensure_environment(replace(wanted, path=f"{wanted.path}-2"), run, deadline())
    assert version_in(wanted) == "1.0"
    assert len([path for path in asked if path.endswith(".tar.gz")]) == 1
    installed = [path for path in (bare / "python").iterdir() if path.name.endswith("-gnu")]
    (made,) = [path.name for path in installed if not path.is_symlink()]
    assert made.startswith(f"cpython-{platform.python_version()}")


def test_no_python_to_be_had(
    spec: EnvironmentSpec, run: RunDir, bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: the error names the version, and both ways out. Red with uv's own words alone."""
    bare.mkdir()
    shutil.copy(UV, bare / "uv")
    monkeypatch.setenv("UV_PYTHON_INSTALL_MIRROR", "http://127.0.0.1:9")
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    expected = (
        r"needs Python 3\.12, which this host lacks.*Install python3\.12.*UV_PYTHON_INSTALL_MIRROR"
    )
    with pytest.raises(BootstrapError, match=expected):
        ensure_environment(replace(spec, base_python="", python_version="3.12"), run, deadline())
