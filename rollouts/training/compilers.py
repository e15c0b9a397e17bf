"""Do the programs that kernels are compiled with run here? What engines, Triton and inductor call. Standard library.

The order in which each is looked for is the callers' own: ninja and c++ from PATH, nvcc from CUDA_HOME, else from PATH,
else /usr/local/cuda; c++ links with -L$CUDA_HOME/lib64 -lcudart.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

NAMES = ("ninja", "nvcc", "c++", "Python.h")
TIMEOUT_S = 60.0
_PACKAGE = {
    "ninja": "it comes with the engine's environment; or on the host: apt-get install ninja-build",
    "nvcc": "it comes with the engine's environment; or install NVIDIA's toolkit and name it as CUDA_HOME in host.env",
    "c++": "on the host: apt-get install g++",
    "Python.h": "on the host: apt-get install python{0.major}.{0.minor}-dev",
}


class CompilerError(RuntimeError):
    """A program, or a header, is missing or does not work. The message has the fix."""


def require(name: str) -> None:
    """Return if `name` (of NAMES) works here. Raises CompilerError."""
    if name == "Python.h":
        header = Path(sysconfig.get_paths()["include"]) / name
        if not header.is_file():
            raise CompilerError(f"{header} is missing; {_fix(name)}")
        return
    program = _nvcc() if name == "nvcc" else shutil.which(name)
    if program is None:
        places = f"CUDA_HOME={os.environ.get('CUDA_HOME', 'not set')}, " if name == "nvcc" else ""
        raise CompilerError(f"no {name} ({places}PATH={os.environ.get('PATH', '')}); {_fix(name)}")
    _run(name, [program, "--version"])
    if name == "c++" and (home := os.environ.get("CUDA_HOME")):
        _link(program, home)


def _nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    if home is not None:
        return shutil.which(f"{home}/bin/nvcc")
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def _link(compiler: str, home: str) -> None:
    """Link as an engine's kernels are linked."""
    with tempfile.TemporaryDirectory(prefix="rollouts-link-") as directory:
        source = Path(directory) / "empty.cpp"
        source.write_text("int main() { return 0; }\n")
        _run(
            "c++",
            [compiler, str(source), "-o", f"{directory}/empty", f"-L{home}/lib64", "-lcudart"],
        )


def _run(name: str, argv: list[str]) -> None:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompilerError(f"{name} does not run: {error}; {_fix(name)}") from None
    if done.returncode != 0:
        said = " ".join((done.stderr or done.stdout).split())[-300:]
        raise CompilerError(
            f"`{' '.join(argv)}` failed with exit code {done.returncode}: {said}; {_fix(name)}"
        )


def _fix(name: str) -> str:
    return _PACKAGE[name].format(sys.version_info)
