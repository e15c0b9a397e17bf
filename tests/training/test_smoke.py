"""The smoke test's checks on a CPU."""

import json
import sys
from pathlib import Path

import pytest
import torch

from rollouts.training import compilers, device_checks, packed_attention, smoke

CPU = torch.device("cpu")


def test_a_sound_machine(tmp_path: Path) -> None:
    """Goal: all parts pass on a CPU, each with its seconds in the report, and nothing is under way at the end.

    Red with check_product's own product doubled, and with `_write` left out.
    """
    report = tmp_path / "report"
    assert (
        smoke.main(["trainer", "--device", "cpu", "--module", "json", "--report", str(report)]) == 0
    )
    found = json.loads(report.read_text())
    assert [*found["parts"]] == [
        "torch",
        "bf16 product",
        "attention",
        "all-reduce over 1 ranks",
        "engine package",
    ]
    assert found["doing"] == ""
    for window in (None, 7):
        device_checks.check_attention(CPU, 64, packed=True, window=window)


def test_attention_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Goal: attention that looks past a document's start is found, and so is a wrong gradient alone.

    Red with a comparison of shapes alone; the gradient's with the loop over q, k, v left out.
    """
    right = packed_attention.Documents.of
    with monkeypatch.context() as patch:
        patch.setattr(
            packed_attention.Documents, "of", lambda lengths, device: right([sum(lengths)], device)
        )
        with pytest.raises(
            device_checks.WrongResultError,
            match=r"attention, head_dim 64 is wrong by .*needs at most",
        ):
            device_checks.check_attention(CPU, 64, packed=True)
    plain = device_checks._by_torch
    monkeypatch.setattr(
        device_checks,
        "_by_torch",
        lambda query, key, value: plain(query, key.detach() + 0 * key, value),
    )
    with pytest.raises(
        device_checks.WrongResultError, match="gradient of k, head_dim 128 is wrong"
    ):
        device_checks.check_attention(CPU, 128, packed=False)


def test_a_part_that_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: one error line with part, device, build and driver; the report says what was under way. Red with the
    error passed on as it is raised."""

    def fault(device: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access\nwas encountered")

    monkeypatch.setattr(device_checks, "check_product", fault)
    assert smoke.main(["trainer", "--device", "cpu"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "error: smoke test: bf16 product: CUDA error: an illegal memory access was encountered, on"
    )
    for words in (f"device cpu with torch {torch.__version__}", "driver", "Try another host"):
        assert words in line


def test_a_device_that_is_not_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: exit 1 and one error line, of a rank and of an engine that lacks its second card. Red with a traceback,
    and with only the first card looked for."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert smoke.main(["trainer", "--device", "cuda"]) == 1
    assert (
        "error: smoke test: torch: torch sees no CUDA device 0 here: it sees 0"
        in capsys.readouterr().err
    )
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert smoke.main(["engine", "--device", "cuda", "--cards", "2"]) == 1
    assert "torch sees no CUDA device 1 here: it sees 1" in capsys.readouterr().err


def test_an_engine_that_does_not_import(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Goal: the module and the reason are named. Red with find_spec in place of an import."""
    (tmp_path / "half_built_engine.py").write_text("import no_such_library_of_its\n")
    sys.path.insert(0, str(tmp_path))
    try:
        assert smoke.main(["engine", "--device", "cpu", "--module", "half_built_engine"]) == 1
    finally:
        sys.path.remove(str(tmp_path))
    said = capsys.readouterr().err
    assert (
        "half_built_engine cannot be imported: ModuleNotFoundError: No module named 'no_such_library_of_its'"
        in said
    )
    assert "check engine.requirements_file" in said


def tool(directory: Path, name: str, text: str) -> Path:
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("name", "broken", "said"),
    [
        ("ninja", None, "no ninja (PATH="),
        ("ninja", "exit 127", "--version` failed with exit code 127"),
        ("nvcc", None, "no nvcc (CUDA_HOME="),
        ("c++", None, "apt-get install g++"),
        (
            "c++",
            'case $1 in --version) ;; *) echo "cannot find -lcudart" >&2; exit 1 ;; esac',
            "cannot find -lcudart",
        ),
        ("Python.h", None, "Python.h is missing; on the host: apt-get install python3."),
    ],
)
def test_a_compiler_that_is_missing_or_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, broken: str | None, said: str
) -> None:
    """Goal: each is looked for where engines look, run, and named with a fix. Red with shutil.which alone: the broken
    ones pass."""
    home, programs, include = tmp_path / "cuda", tmp_path / "bin", tmp_path / "include"
    for directory in (home / "bin", programs, include):
        directory.mkdir(parents=True)
    whole = {"ninja": programs / "ninja", "nvcc": home / "bin" / "nvcc", "c++": programs / "c++"}
    monkeypatch.setenv("PATH", f"{programs}:/nowhere")
    monkeypatch.setenv("CUDA_HOME", str(home))
    monkeypatch.setattr(compilers.sysconfig, "get_paths", lambda: {"include": str(include)})
    for known, path in whole.items():
        tool(path.parent, path.name, "exit 0")
        assert known in compilers.NAMES
    (include / "Python.h").touch()
    for known in compilers.NAMES:
        compilers.require(known)
    place = whole.get(name, include / "Python.h")
    place.unlink()
    if broken:
        tool(place.parent, place.name, broken)
    with pytest.raises(compilers.CompilerError) as raised:
        compilers.require(name)
    assert said in str(raised.value)
