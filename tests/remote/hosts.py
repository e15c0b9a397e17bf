"""Real hosts and laptops for tests: sshd on a loopback port, a home of its own, a git repository to run.

A `Host` is an sshd with its own keys and environment. A `Laptop` is a HOME with ~/.ssh and a registry, from where the
real `deploy` is run as a process. `make_project` writes a repository that holds the real worker code with a stand-in
for torch, so that a whole run takes seconds and needs nothing installed.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from base_config import Config
from tests.example_config import example_config, replace_at
from tests.ports import free_port

ROOT = Path(__file__).resolve().parent.parent.parent
STAND_INS = Path(__file__).parent / "stand_ins"
WAIT_S = 200.0


def wait_for(condition: Callable[[], Any], what: str, *, timeout_s: float = WAIT_S) -> Any:
    """Poll until `condition()` is true and return it; AssertionError names `what` after the time."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s} s"
        time.sleep(0.02)
    return value


def keygen(path: Path, kind: str = "ed25519") -> Path:
    subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", "", "-f", str(path)], check=True)
    return path


def public(key: Path) -> str:
    """The type and the key of a public key file, without its comment."""
    return " ".join(Path(f"{key}.pub").read_text().split()[:2])


def tool_directory(path: Path, *, without: tuple[str, ...] = (), python: bool = True) -> Path:
    """A PATH of one directory: every tool of this machine but those named, and this test's Python as python3."""
    path.mkdir(parents=True)
    for directory in ("/bin", "/usr/bin", "/usr/local/bin"):
        for tool in os.scandir(directory):
            if not tool.name.startswith("python") and tool.name not in without:
                with contextlib.suppress(FileExistsError):
                    (path / tool.name).symlink_to(tool.path)
    if python:
        (path / "python3").symlink_to(os.path.realpath(sys.executable))
    return path


@dataclass
class Host:
    """One sshd. `home` is its ROLLOUTS_HOME."""

    directory: Path
    home: Path
    port: int
    tmux_dir: Path
    environment: dict[str, str]
    settings: tuple[str, ...] = ()
    host_keys: tuple[Path, ...] = ()  # beside, or in place of, the first
    wrapper: tuple[str, ...] = ()  # a command that execs sshd
    address: str = "127.0.0.1"
    process: subprocess.Popen[bytes] | None = None

    @property
    def target(self) -> str:
        return f"{self.address}:{self.port}"

    @property
    def host_key(self) -> Path:
        return self.directory / "host_key"

    def start(self) -> None:
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)  # where a root sshd separates its privileges
        variables = " ".join(f'"{name}={value}"' for name, value in self.environment.items())
        lines = [
            f"Port {self.port}",
            f"ListenAddress {self.address}",
            *(f"HostKey {key}" for key in self.host_keys or (self.host_key,)),
            f"AuthorizedKeysFile {self.directory}/authorized_keys {self.directory}/.ssh/authorized_keys",
            f"PidFile {self.directory}/sshd.pid",
            f"SetEnv {variables}",
            *self.settings,  # the first of two settings counts
            "UsePAM no",
            "StrictModes no",
            "PermitRootLogin yes",
            "PasswordAuthentication no",
            "KbdInteractiveAuthentication no",
            "MaxStartups 100",
        ]
        config = self.directory / "sshd_config"
        config.write_text("\n".join(lines) + "\n")
        log = (self.directory / "sshd.log").open("ab")
        self.process = subprocess.Popen(
            [
                *self.wrapper,
                shutil.which("sshd", path="/usr/sbin:/usr/bin") or "sshd",
                "-D",
                "-e",
                "-f",
                str(config),
            ],
            stderr=log,
        )
        wait_for(self._answers, "sshd")

    def _answers(self) -> bool:
        assert self.process is not None and self.process.poll() is None, (
            self.directory / "sshd.log"
        ).read_text()
        with socket.socket() as probe:
            return probe.connect_ex((self.address, self.port)) == 0

    def stop(self) -> None:
        """End the listener and every session it serves, as a host does that loses its network."""
        # a test's thread may stop it while the fixture does
        process, self.process = self.process, None
        if process is None:
            return
        process.send_signal(signal.SIGSTOP)
        held: set[int] = set()
        # held first: one that is killed may have started another meanwhile
        while more := {pid for pid in descendants(process.pid) if _is_sshd(pid)} - held:
            for pid in more:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGSTOP)
            held |= more
        for pid in held:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        process.kill()
        process.wait()

    def run_path(self, run_id: str) -> Path:
        return self.home / "runs" / run_id


def _is_sshd(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"sshd")
    return False


def descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found, todo = [], [pid]
    while todo:
        todo += (more := children.get(todo.pop(), []))
        found += more
    return found


@contextlib.contextmanager
def host(
    directory: Path,
    key: Path,
    *,
    path: Path,
    home: Path | None = None,
    environment: Mapping[str, str] | None = None,
    settings: tuple[str, ...] = (),
    start_up: Mapping[str, str] | None = None,
    login_shell: str | None = None,
    host_key_kinds: tuple[str, ...] = (),
    wrapper: tuple[str, ...] = (),
    address: str = "127.0.0.1",
    port: int | None = None,
) -> Iterator[Host]:
    """A running sshd that lets `key` in; its tmux server and sessions are ended afterwards.

    `start_up` are files of its HOME (.bashrc, .cshrc, .config/fish/config.fish), which its shell runs before every
    command. `login_shell` runs the commands, as for an account that has it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    keygen(directory / "host_key")
    shutil.copy(f"{key}.pub", directory / "authorized_keys")
    home = home or directory / "home"
    tmux_dir = Path(tempfile.mkdtemp(prefix="rt", dir="/tmp"))  # a socket's path has to be short
    for name, text in (start_up or {}).items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)
    if login_shell is not None:
        settings = (
            f'ForceCommand exec {shutil.which(login_shell)} -c "$SSH_ORIGINAL_COMMAND"',
            *settings,
        )
    # HOME: none of this account's own start-up files, so that tests find the same host everywhere
    variables = {
        "HOME": str(directory),
        "ROLLOUTS_HOME": str(home),
        "TMUX_TMPDIR": str(tmux_dir),
        "PATH": str(path),
        **(environment or {}),
    }
    keys = tuple(keygen(directory / f"host_{kind}", kind) for kind in host_key_kinds)
    made = Host(
        directory, home, port or free_port(), tmux_dir, variables, settings, keys, wrapper, address
    )
    made.start()
    try:
        yield made
    finally:
        made.stop()
        kill_tmux(tmux_dir)


def kill_tmux(tmux_dir: Path) -> None:
    environment = {**os.environ, "TMUX_TMPDIR": str(tmux_dir)}
    environment.pop("TMUX", None)
    subprocess.run(["tmux", "kill-server"], env=environment, capture_output=True, check=False)
    shutil.rmtree(tmux_dir, ignore_errors=True)


def _heed_ctrl_c() -> None:
    """As in a terminal: tests that run in the background of a script inherit a SIGINT that is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@dataclass
class Laptop:
    """A HOME from which `deploy` is run, in `project`."""

    home: Path
    project: Path
    tmux_dir: Path
    environment: dict[str, str] = field(default_factory=dict)
    command: tuple[str, ...] = (sys.executable, str(ROOT / "deploy.py"))

    @property
    def key(self) -> Path:
        return self.home / ".ssh" / "id_ed25519"

    @property
    def known_hosts(self) -> Path:
        return self.home / ".ssh" / "known_hosts"

    @property
    def rollouts_home(self) -> Path:
        return self.home / ".rollouts"

    def know(self, *hosts: Host) -> None:
        """Trust these hosts' keys."""
        lines = [
            f"[{h.address}]:{h.port} {(h.directory / 'host_key.pub').read_text().strip()}\n"
            for h in hosts
        ]
        self.known_hosts.write_text("".join(lines))

    def know_by(self, host: Host, port: int) -> str:
        """Trust this host's key at another port too, that of a link to it; return the target."""
        with self.known_hosts.open("a") as stream:
            stream.write(
                f"[127.0.0.1]:{port} {(host.directory / 'host_key.pub').read_text().strip()}\n"
            )
        return f"127.0.0.1:{port}"

    def ssh_config(self, text: str) -> None:
        (self.home / ".ssh" / "config").write_text(text)

    def _environment(self, more: Mapping[str, str]) -> dict[str, str]:
        kept = {
            n: v
            for n, v in os.environ.items()
            if not n.startswith(("ROLLOUTS", "SSH_", "TMUX", "GIT_"))
        }
        own = {"HOME": str(self.home), "TMUX_TMPDIR": str(self.tmux_dir), "COLUMNS": "120"}
        return {**kept, **own, **self.environment, **more}

    def start(
        self, *arguments: str, env: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[str]:
        """`deploy ARGUMENTS` as a process; stdout and stderr are pipes."""
        command = [*self.command, *arguments]
        settings: dict[str, Any] = {
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "cwd": self.project,
            "preexec_fn": _heed_ctrl_c,
            "start_new_session": True,  # no terminal: nobody answers what ssh would ask there
            **options,
        }
        return subprocess.Popen(command, env=self._environment(env or {}), text=True, **settings)

    def deploy(
        self,
        *arguments: str,
        env: Mapping[str, str] | None = None,
        timeout_s: float = 250,
        **options: Any,
    ) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments, env=env, **options)
        try:
            out, err = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            raise AssertionError(f"deploy {arguments} did not end:\n{out}\n{err}") from None
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def json(self, *arguments: str, **options: Any) -> Any:
        done = self.deploy(*arguments, "--json", **options)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)


def make_laptop(directory: Path, project: Path, tmux_dir: Path) -> Laptop:
    laptop = Laptop(directory, project, tmux_dir)
    (directory / ".ssh").mkdir(parents=True, mode=0o700)
    keygen(laptop.key)
    return laptop


def git(repository: Path, *arguments: str) -> str:
    settings = (
        "-c",
        "user.name=t",
        "-c",
        "user.email=t@localhost",
        "-c",
        "init.defaultBranch=main",
    )
    done = subprocess.run(
        ["git", *settings, *arguments], cwd=repository, check=True, capture_output=True, text=True
    )
    return done.stdout


def make_project(directory: Path) -> Path:
    """A committed git repository with the real worker code, and stand-ins for torch, the trainer and the engine."""
    directory.mkdir(parents=True)
    shutil.copy(ROOT / "base_config.py", directory)
    ignore = shutil.ignore_patterns("__pycache__", "training", "remote")
    shutil.copytree(ROOT / "rollouts", directory / "rollouts", ignore=ignore)
    shutil.rmtree(directory / "rollouts/engines/embedded", ignore_errors=True)
    shutil.copytree(
        STAND_INS, directory, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__")
    )
    (directory / "pyproject.toml").write_text(
        "[project]\nname = 'stand-in'\n[project.optional-dependencies]\ntrain = []\nwandb = ['wandb']\n"
    )
    (directory / "requirements").mkdir()
    (directory / "requirements/constraints.txt").write_text("torch==2.13\n")
    for name in ("letters/train_sft", "letters/train_rl", "letters/test"):
        file = directory / f"configs/data/{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text('{"question": "q", "answer": "a"}\n')
    (directory / "configs/models/tiny_qwen2").mkdir(parents=True)
    (directory / "configs/models/tiny_qwen2/config.json").write_text("{}\n")
    (directory / ".gitignore").write_text("__pycache__/\n/runs/\n")
    git(directory, "init", "-q")
    git(directory, "add", "-A")
    git(directory, "commit", "-qm", "stand-in project")
    return directory


def config_with(changes: Mapping[str, Any]) -> Config:
    config = replace_at(example_config(), "engine.sglang_port", free_port())
    for path, value in changes.items():
        config = replace_at(config, path, value)
    return config


def write_config(
    project: Path, name: str = "job", *, env: Mapping[str, str] | None = None, **changes: Any
) -> Path:
    """A config file in `project`, outside of git; dots of a field's path are written as two underscores.

    `env` steers the stand-in trainer: see stand_ins/rollouts/worker/trainer.py.
    """
    config = config_with({path.replace("__", "."): value for path, value in changes.items()})
    config = replace_at(config, "host.env", {**config.host.env, **(env or {})})
    config = dataclasses.replace(config)
    file = project / "runs" / f"{name}.json"
    file.parent.mkdir(exist_ok=True)
    config.save(file)
    return file
