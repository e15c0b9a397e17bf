"""A model comes into the host's cache before any engine starts: the real client, against a hub on loopback."""

import hashlib
import http.server
import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from rollouts.run_dir import EnvironmentSpec, HubModel, RunDir
from rollouts.worker.environments.hub_model import fetch_model
from rollouts.worker.environments.installer import BootstrapError
from rollouts.worker.trainer_hub import is_whole, wanted
from tests.worker.environments import deadline
from tests.worker.stands import events

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b"{}",
    "tokenizer.json": b"{ }",
    "model.safetensors": b"s" * 2000,
    "pytorch_model.bin": b"b" * 3000,
    "onnx/model.onnx": b"o" * 4000,
    "README.md": b"# readme",
}


class Hub(http.server.BaseHTTPRequestHandler):
    """What the client asks of a hub: a model's commit, its files, and each of them. `gated` ones want a token."""

    downloaded: list[str]
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        api = path.startswith("/api/models/")
        parts = path.removeprefix("/api/models/").strip("/").split("/")
        owner, name, rest = parts[0], parts[1], "/".join(parts[2:])
        if owner == "gated" and not api and "Authorization" not in self.headers:
            return self._send(
                403, b"restricted", {"X-Error-Code": "GatedRepo", "X-Error-Message": "restricted"}
            )
        if name != "tiny":
            return self._send(
                404, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "not found"}
            )
        if api:
            siblings = [
                {"rfilename": file, "size": len(body), "blobId": digest(body)}
                for file, body in FILES.items()
            ]
            return self._send(
                200,
                json.dumps({"id": f"{owner}/tiny", "sha": COMMIT, "siblings": siblings}).encode(),
            )
        file = rest.removeprefix(f"resolve/{COMMIT}/").removeprefix("resolve/main/")
        if with_body:
            self.downloaded.append(file)
        headers = {"ETag": f'"{digest(FILES[file])}"', "X-Repo-Commit": COMMIT}
        return self._send(200, FILES[file], headers, with_body=with_body)

    def _send(
        self,
        code: int,
        body: bytes,
        headers: dict[str, str] | None = None,
        *,
        with_body: bool = True,
    ) -> None:
        self.send_response(code)
        for key, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def digest(body: bytes) -> str:
    return hashlib.sha1(body).hexdigest()


@contextmanager
def hub() -> Iterator[tuple[str, list[str]]]:
    """A hub on loopback: its address, and the files that were downloaded."""
    handler = type("OneHub", (Hub,), {"downloaded": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", handler.downloaded
        server.shutdown()


@pytest.fixture
def trainer(
    spec: EnvironmentSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> EnvironmentSpec:
    """An environment that has the client, on a host whose cache is empty."""
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    return replace(spec, path=sys.prefix)


def cached(tmp_path: Path, owner: str = "some") -> list[str]:
    snapshots = tmp_path / "hf" / "hub" / f"models--{owner}--tiny" / "snapshots" / COMMIT
    return sorted(os.listdir(snapshots)) if snapshots.is_dir() else []


def test_downloaded_once(
    trainer: EnvironmentSpec,
    run: RunDir,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Goal: the files that are read, one format of weights, with each file's size in the log; a second run downloads
    nothing, and one without a network takes the cache. Red with the whole repository taken."""
    model = HubModel(name="some/tiny", weights=True)
    with hub() as (url, downloaded):
        monkeypatch.setenv("HF_ENDPOINT", url)
        fetch_model(HubModel(name="some/tiny", weights=False), trainer, run, deadline())
        assert cached(tmp_path) == ["config.json", "tokenizer.json"]
        fetch_model(model, trainer, run, deadline())
        fetch_model(model, trainer, run, deadline())
    assert (
        sorted(downloaded)
        == cached(tmp_path)
        == ["config.json", "model.safetensors", "tokenizer.json"]
    )
    said = capfd.readouterr().out
    assert (
        "some/tiny: 3 files, 1 to download" in said
        and "Downloading model.safetensors (0.0 MB)" in said
    )
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fetch_model(model, trainer, run, deadline())
    assert "taken from this host's cache (HF_HUB_OFFLINE is set)" in capfd.readouterr().out
    assert [row["name"] for row in events(run, "model")] == ["some/tiny"] * 4


@pytest.mark.parametrize(
    ("name", "endpoint", "expected"),
    [
        ("some/nothing", "", "the hub lacks a model some/nothing"),
        ("gated/tiny", "", "is gated.*HF_TOKEN.*host\\.secrets"),
        (
            "some/tiny",
            "http://127.0.0.1:9",
            "not in this host's cache, and the hub does not answer.*HF_ENDPOINT",
        ),
        ("a/b/c", "", "is not a valid hub id"),
    ],
)
def test_what_the_hub_does_not_give(  # noqa: PLR0917
    trainer: EnvironmentSpec,
    run: RunDir,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    endpoint: str,
    expected: str,
) -> None:
    """Goal: one sentence with the fix, minutes before an engine would have failed. Red with the client's own pages."""
    with hub() as (url, _):
        monkeypatch.setenv("HF_ENDPOINT", endpoint or url)
        with pytest.raises(BootstrapError, match=expected):
            fetch_model(HubModel(name=name, weights=True), trainer, run, deadline())


@pytest.mark.parametrize(
    ("files", "weights", "chosen"),
    [
        (
            ["config.json", "pytorch_model.bin", "training_args.bin"],
            True,
            ["config.json", "pytorch_model.bin"],
        ),
        (
            ["config.json", "model-00001-of-2.safetensors", "model.safetensors.index.json"],
            True,
            None,
        ),
        (["config.json", "model.safetensors"], False, ["config.json"]),
        (
            ["config.json", "modeling_x.py", "original/params.json", "tf_model.h5"],
            True,
            ["config.json", "modeling_x.py"],
        ),
    ],
)
def test_which_files_are_wanted(files: list[str], weights: bool, chosen: list[str] | None) -> None:
    """Goal: what loads a model, and not its other formats. Red with every file at the root taken."""
    assert sorted(wanted(files, weights=weights)) == sorted(files if chosen is None else chosen)


@pytest.mark.parametrize(
    ("files", "weights", "whole"),
    [
        (["config.json", "model.safetensors"], True, True),
        (["config.json"], True, False),
        (["config.json"], False, True),
        (["model.safetensors"], True, False),
        (
            ["config.json", "model.safetensors.index.json", "a.safetensors", "b.safetensors"],
            True,
            True,
        ),
        (["config.json", "model.safetensors.index.json", "a.safetensors"], True, False),
        (["config.json", "training_args.bin"], True, False),
    ],
)
def test_a_cache_that_was_cut_is_not_whole(
    tmp_path: Path, files: list[str], weights: bool, whole: bool
) -> None:
    """Goal: without a network only a whole model is taken: a download that was cut is none. Red with config.json alone
    looked at."""
    for name in files:
        (tmp_path / name).write_text(
            json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}})
        )
    assert is_whole(tmp_path, weights=weights) is whole
