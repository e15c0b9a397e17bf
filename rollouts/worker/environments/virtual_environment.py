"""Virtual environments on the host: made once, reused by key, rebuilt when half-built. Standard library only.

An environment lies at <home>/envs/<key> and is complete when its marker is there, which is written last, once its own
interpreter has named every requirement at the version that was asked for. Two runs that want the same one take turns by
a lock file beside it: one builds, the other waits and reuses. What it holds is recorded in the run directory. The
caller's `tick` is called in every wait; what it raises (a stop) ends the build, and what was built so far never counts.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rollouts import run_dir
from rollouts.plain_files import open_plain
from rollouts.run_dir import EnvironmentSpec, RunDir
from rollouts.worker.environments import isolation, requirement
from rollouts.worker.environments.base_python import base_python, find_uv
from rollouts.worker.environments.installer import (
    BootstrapDeadline,
    BootstrapError,
    Progress,
    inputs_of,
    run_installer,
)
from rollouts.worker.environments.torch_index import TorchSource, build_problem, torch_source
from rollouts.worker.supervise.console import say

MARKER_FILE = ".complete"
QUERY_TIMEOUT_S = 120.0  # a cold network file system
SHOWN_PROBLEMS = 10
# Run by an environment's own interpreter, with -I. The first of two of one name is the one that is imported.
QUERY = """
import importlib.metadata, json, os, platform, sys
found = [(d.metadata["Name"], d.version) for d in importlib.metadata.distributions()]
version = sys.implementation.version
full = "%d.%d.%d" % version[:3] + ("" if version[3] == "final" else version[3][0] + str(version[4]))
print(json.dumps({"distributions": [pair for pair in found if all(pair)], "markers": {
    "os_name": os.name, "sys_platform": sys.platform, "platform_machine": platform.machine(),
    "platform_python_implementation": platform.python_implementation(), "platform_release": platform.release(),
    "platform_system": platform.system(), "platform_version": platform.version(),
    "python_version": ".".join(platform.python_version_tuple()[:2]), "python_full_version": platform.python_version(),
    "implementation_name": sys.implementation.name, "implementation_version": full}}))
"""


@dataclass(frozen=True)
class Content:
    """What an environment's own interpreter says of it."""

    distributions: tuple[tuple[str, str], ...]  # (name, version), by name
    markers: dict[str, str]

    @property
    def versions(self) -> dict[str, str]:
        return {requirement.canonical(name): version for name, version in self.distributions}


@dataclass(frozen=True)
class Built:
    """How an environment was made, for its record."""

    torch: TorchSource
    pip_settings_left_out: list[str]  # of pip's configuration

    @property
    def record(self) -> dict[str, object]:
        said: dict[str, object] = {"torch_build": self.torch.build}
        if self.torch.note:
            said["torch_note"] = self.torch.note
        if self.pip_settings_left_out:
            said["pip_settings_left_out"] = self.pip_settings_left_out
        return said


def ensure_environment(spec: EnvironmentSpec, run: RunDir, deadline: BootstrapDeadline) -> None:
    """Have `spec` complete at its path on return, and recorded in `run`.

    Raises BootstrapError for a failing or missing installer, for an environment that lacks what was required, or when
    deadline runs out; and whatever its `tick` raises.
    """
    started = time.monotonic()

    def announce(action: str, **fields: object) -> None:
        seconds = round(time.monotonic() - started, 3)
        run_dir.append_event(
            run, "environment", name=spec.name, action=action, seconds=seconds, **fields
        )
        say(f"environment {spec.name}: {action} after {seconds:.2f} s ({spec.path})")

    path = Path(spec.path)
    path.parent.mkdir(parents=True, exist_ok=True)
    progress = Progress(run, spec)
    with _locked(path.with_name(f".{path.name}.lock"), spec, deadline, progress) as lock:
        if is_complete(path):
            content = content_of(spec)
            _check(
                spec,
                content,
                f"It was complete once; remove {path} while no run uses it, and run again.",
            )
            _record(run, spec, content)
            os.utime(path / MARKER_FILE)  # when it was used last
            announce("reused", **_built_before(path))
            return
        announce("building")
        if path.exists():
            say(f"environment {spec.name}: {path} was left half-built; starting over")
            shutil.rmtree(path)
        built = _build(spec, deadline, progress, lock)
        content = content_of(spec)
        built = _checked_torch(spec, built, content)
        _check(
            spec,
            content,
            f"Its installer said that it had succeeded, so a setting of this host sent the packages elsewhere: see"
            f" `pip config list` or uv.toml there; or check {inputs_of(spec)}.",
        )
        _record(run, spec, content)
        marker = {**dataclasses.asdict(spec), "built": built.record, "completed_at": time.time()}
        run_dir.write_json_atomic(path / MARKER_FILE, marker)
        announce("ready", **built.record)


def _built_before(path: Path) -> dict[str, object]:
    """Return how a complete environment was made; {} for one that an older version made."""
    try:
        marker = json.loads((path / MARKER_FILE).read_text())
        return {
            name: marker["built"][name]
            for name in ("torch_build", "torch_note")
            if name in marker["built"]
        }
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def is_complete(path: Path) -> bool:
    """Whole, and its base interpreter still there (bin/python is a link to it)."""
    return (path / MARKER_FILE).is_file() and (path / "bin" / "python").exists()


def content_of(spec: EnvironmentSpec) -> Content:
    """Ask the environment's interpreter what it holds; nothing of this process's environment acts on its answer."""
    answer = json.loads(_answer(spec, f"{spec.path}/bin/python", "-I", "-c", QUERY))
    first: dict[str, tuple[str, str]] = {}
    for name, version in answer["distributions"]:
        first.setdefault(requirement.canonical(name), (name, version))
    return Content(tuple(first[name] for name in sorted(first)), answer["markers"])


def _answer(spec: EnvironmentSpec, *argv: str) -> str:
    """Return what one short command prints. Raises BootstrapError with what it said, when it fails."""
    try:
        done = subprocess.run(
            argv, capture_output=True, text=True, timeout=QUERY_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BootstrapError(f"environment {spec.name!r}: cannot ask its Python: {error}") from None
    if done.returncode != 0:
        asked = shlex.join([part.strip().partition("\n")[0] for part in argv])
        message = f"environment {spec.name!r}: `{asked}` failed with exit code {done.returncode}"
        raise BootstrapError(message, done.stderr.splitlines())
    return done.stdout


def _check(spec: EnvironmentSpec, content: Content, advice: str) -> None:
    found = requirement.problems(
        [*spec.requirements, *spec.requirements_no_deps],
        spec.constraints.splitlines(),
        content.versions,
        content.markers,
    )
    if found:
        more = f"; and {len(found) - SHOWN_PROBLEMS} more" if len(found) > SHOWN_PROBLEMS else ""
        raise BootstrapError(
            f"environment {spec.name!r}: {'; '.join(found[:SHOWN_PROBLEMS])}{more} (in {spec.path}). {advice}",
            found,
        )


def _checked_torch(spec: EnvironmentSpec, built: Built, content: Content) -> Built:
    """Return how it was made. Raises BootstrapError for another build of torch than a plan without a fallback names."""
    wrong = build_problem(built.torch, spec.requirements, content.versions)
    if not wrong:
        return built
    if not spec.torch_fallback:
        raise BootstrapError(f"environment {spec.name!r}: {wrong}", [wrong])
    say(f"environment {spec.name}: {wrong}")
    return dataclasses.replace(built, torch=TorchSource("index", (), wrong))


def _record(run: RunDir, spec: EnvironmentSpec, content: Content) -> None:
    lines = [f"{name}=={version}\n" for name, version in content.distributions]
    run_dir.write_text_atomic(run.environment(spec.name), "".join(lines))


def _build(
    spec: EnvironmentSpec, deadline: BootstrapDeadline, progress: Progress, lock: int
) -> Built:
    """Create the environment and install into it; its input files lie in it afterwards."""

    def run(argv: Sequence[str], environment: Mapping[str, str]) -> None:
        run_installer(argv, spec, deadline, progress, environment=environment, lock=lock)

    path = Path(spec.path)
    python = str(path / "bin" / "python")
    progress.doing = "looking for a Python"
    base = base_python(spec, run)
    if spec.installer == "uv":
        uv = find_uv(spec, run)
        create = [uv, "venv", "--python", base, str(path)]
        install = [uv, "pip", "install", "--python", python]
    else:
        create = [base, "-m", "venv", str(path)]
        install = [
            python,
            "-m",
            "pip",
            "install",
            "--disable-pip-version-check",
            "--no-input",
            "--progress-bar",
            "off",
        ]
    progress.doing = "making the virtual environment"
    run(create, os.environ)
    environment, left_out = (
        (dict(os.environ), []) if spec.installer == "uv" else _pip_environment(spec, python)
    )
    torch = torch_source(spec, environment)
    if torch.note:
        say(f"environment {spec.name}: {torch.note}")
    constraints = path / "constraints.txt"
    constraints.write_text(spec.constraints)
    passes = (
        ("requirements.txt", spec.requirements, ()),
        ("requirements-no-deps.txt", spec.requirements_no_deps, ("--no-deps",)),
    )
    for name, lines, options in passes:
        file = path / name
        file.write_text("".join(f"{line}\n" for line in lines))
        if lines:
            run(
                [*install, *torch.options, *options, "-c", str(constraints), "-r", str(file)],
                environment,
            )
    return Built(torch, left_out)


def _pip_environment(spec: EnvironmentSpec, python: str) -> tuple[dict[str, str], list[str]]:
    """Return the variables that pip gets: what may pass of its configuration files is among them, and it reads
    no file."""
    settings, left_out = isolation.pip_settings(
        _answer(spec, python, "-m", "pip", "config", "list")
    )
    if left_out:
        say(f"environment {spec.name}: left out of pip's configuration here: {', '.join(left_out)}")
    return {**settings, **os.environ, "PIP_CONFIG_FILE": os.devnull}, left_out


@contextlib.contextmanager
def _locked(
    path: Path, spec: EnvironmentSpec, deadline: BootstrapDeadline, progress: Progress
) -> Iterator[int]:
    """Hold the lock file; gives its descriptor, with which a child holds it too."""
    descriptor = open_plain(path, os.O_RDWR | os.O_CREAT)
    try:
        waiting = False
        while not _try_lock(descriptor):
            if not waiting:
                say(f"environment {spec.name}: another run is building it; waiting")
                waiting = True
            progress.doing = "waiting for another run, which is building it"
            progress.tell()
            deadline.wait(spec, "another run was still building it")
        yield descriptor
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
