"""Hosts that paramiko cannot log in to, over the ssh command: second factors, an open connection of the user's.

The second factor is sshd's own: PAM asks for a code, by a service file that only that sshd sees (a mount namespace).
"""

import os
import pty
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from rollouts.remote.errors import TransportError
from rollouts.remote.host.facts import gather_facts
from rollouts.remote.host.open import open_transport
from rollouts.remote.host.openssh import can_ask
from rollouts.remote.host.ssh_auth import LoginFailed
from rollouts.remote.host.ssh_choice import choose_client
from rollouts.remote.host.ssh_config import Hop, read_hops
from rollouts.remote.host.ssh_shared import is_open, socket_directory
from rollouts.remote.host.transport import Target
from tests.remote.hosts import WAIT_S, Host, Laptop, wait_for, write_config

MakeHost = Callable[..., Host]
CODE = "123456"
PAM = """auth required pam_exec.so expose_authtok quiet @CHECK@
auth required pam_permit.so
account required pam_permit.so
password required pam_deny.so
session required pam_permit.so
"""
CHECK = f"""#!/bin/sh
echo asked >> @ASKED@
[ "$(tr -d '\\000')" = {CODE} ]
"""
SETTINGS = (
    "UsePAM yes",
    "KbdInteractiveAuthentication yes",
    "AuthenticationMethods publickey,keyboard-interactive",
)


def may_mount() -> bool:
    done = (
        subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False)
        if shutil.which("unshare")
        else None
    )
    return (
        done is not None
        and done.returncode == 0
        and bool(list(Path("/lib").glob("*/security/pam_exec.so")))
    )


needs_pam = pytest.mark.skipif(
    not may_mount(), reason="no root here, or no pam_exec: sshd cannot ask for a code"
)


@dataclass
class Guarded:
    """A host that asks for a code beside the key."""

    host: Host
    asked: Path

    def times(self) -> int:
        return len(self.asked.read_text().splitlines()) if self.asked.exists() else 0


@pytest.fixture
def guarded(make_host: MakeHost, tmp_path: Path) -> Guarded:
    service, asked, check = tmp_path / "pam.d", tmp_path / "asked", tmp_path / "check"
    service.mkdir()
    (service / "sshd").write_text(PAM.replace("@CHECK@", str(check)))
    check.write_text(CHECK.replace("@ASKED@", str(asked)))
    check.chmod(0o755)
    shell = f'mount --bind {service} /etc/pam.d && exec "$@"'
    return Guarded(
        make_host(settings=SETTINGS, wrapper=("unshare", "-m", "sh", "-c", shell, "sh")), asked
    )


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """Variables of a laptop whose shared connections end with the test."""
    directory = tempfile.mkdtemp(prefix="rx", dir="/tmp")
    monkeypatch.setenv("XDG_RUNTIME_DIR", directory)
    yield {"XDG_RUNTIME_DIR": directory}
    for socket in Path(directory).glob("*/*"):
        subprocess.run(
            ["ssh", "-o", f"ControlPath={socket}", "-O", "exit", "x"],
            capture_output=True,
            check=False,
        )
        wait_for(lambda socket=socket: not is_open(str(socket)), "the end of a connection")
    shutil.rmtree(directory)


def connections_ended() -> None:
    """Wait until each ssh that shares a connection has noticed that its host went away."""
    sockets = Path(os.environ["XDG_RUNTIME_DIR"])
    wait_for(lambda: not any(is_open(str(s)) for s in sockets.glob("*/*")), "their end")


def answering(tmp_path: Path) -> dict[str, str]:
    """Variables of a program that answers ssh's questions."""
    program = tmp_path / "answer"
    program.write_text(f"#!/bin/sh\necho {CODE}\n")
    program.chmod(0o755)
    return {"SSH_ASKPASS": str(program), "SSH_ASKPASS_REQUIRE": "force"}


def on_a_terminal(laptop: Laptop, arguments: list[str], env: Mapping[str, str]) -> tuple[int, str]:
    """Run deploy with a terminal of its own, and type the code where it is asked for."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(laptop.project)
        os.execvpe(laptop.command[0], [*laptop.command, *arguments], laptop._environment(env))
    said, deadline = b"", time.monotonic() + WAIT_S
    typed = 0
    while time.monotonic() < deadline:
        if select.select([terminal], [], [], 1)[0]:
            try:
                data = os.read(terminal, 4096)
            except OSError:  # its end
                break
            said += data
        if said.count(b"Password:") > typed:
            typed += 1
            os.write(terminal, f"{CODE}\n".encode())
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said.decode()


@needs_pam
def test_a_second_factor_is_asked_for_once(
    guarded: Guarded, laptop: Laptop, runtime: dict[str, str]
) -> None:
    """Goal: deploy says what the host wants, ssh asks on the terminal, and commands, rsync and the next verb go over
    that connection."""
    code, said = on_a_terminal(laptop, ["--remote", guarded.host.target], runtime)
    assert code == 0 and "ready   yes" in said, said
    assert "wants keyboard-interactive beside the key" in said and guarded.times() == 1
    again = laptop.deploy("ls", "--remote", guarded.host.target, env=runtime)
    assert again.returncode == 0 and guarded.times() == 1, again.stdout + again.stderr


@needs_pam
def test_a_run_over_one_login(
    guarded: Guarded, laptop: Laptop, project: Path, runtime: dict[str, str], tmp_path: Path
) -> None:
    """Goal: a whole run, its code sent, followed and pulled: one question."""
    arguments = (str(write_config(project)), "--remote", guarded.host.target)
    done = laptop.deploy(*arguments, env=runtime | answering(tmp_path), timeout_s=WAIT_S)
    assert done.returncode == 0 and guarded.times() == 1, done.stdout + done.stderr
    (mirror,) = (project / "runs").glob("*/*/metrics.jsonl")
    assert mirror.read_text().strip()


@needs_pam
def test_a_jump_host_with_a_second_factor(
    guarded: Guarded, make_host: MakeHost, laptop: Laptop, runtime: dict[str, str], tmp_path: Path
) -> None:
    """Goal: a jump host asks, the host behind it does not, and doctor says who wanted what."""
    inner = make_host()
    laptop.ssh_config(
        f"Host far\n  HostName 127.0.0.1\n  Port {inner.port}\n  ProxyJump 127.0.0.1:{guarded.host.port}\n"
    )
    done = laptop.deploy("doctor", "--remote", "far", "--json", env=runtime | answering(tmp_path))
    assert (
        "the ssh command logs in, since" in done.stdout and "keyboard-interactive" in done.stdout
    ), done.stderr
    assert guarded.times() == 1


@needs_pam
def test_without_a_terminal(guarded: Guarded, laptop: Laptop, runtime: dict[str, str]) -> None:
    """Goal: where nobody can be asked, the error says so, and how to get in."""
    done = laptop.deploy("--remote", guarded.host.target, env=runtime)
    assert done.returncode == 2 and "there is no terminal to ask on" in done.stderr
    assert "SSH_ASKPASS" in done.stderr and guarded.times() == 0


@needs_pam
def test_a_connection_that_ended_is_made_again(
    guarded: Guarded,
    laptop: Laptop,
    runtime: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Goal: a command that was cut off is a lost connection, and the next one logs in anew; the exit code and both
    outputs are the command's own."""
    monkeypatch.setenv("HOME", str(laptop.home))
    for name, value in answering(tmp_path).items():
        monkeypatch.setenv(name, value)
    transport = open_transport(guarded.host.target)
    done = transport.run(
        ["sh", "-c", "cat; echo err >&2; exit 7"], stdin=b"in" * 100_000, timeout_s=WAIT_S
    )
    assert (done.returncode, done.stdout, done.err) == (7, b"in" * 100_000, "err")
    stream = transport.stream(["sh", "-c", "echo begun; exec cat"], first_line=b"")
    lines = stream.lines(idle_timeout_s=WAIT_S)
    assert next(lines) == b"begun\n"
    guarded.host.stop()
    with pytest.raises(TransportError) as caught:
        assert [*lines] == []
        stream.end()
    assert caught.value.lost
    stream.close()
    connections_ended()
    guarded.host.start()
    assert (
        transport.run(["echo", "again"], timeout_s=WAIT_S).out == "again\n" and guarded.times() == 2
    )
    transport.close()


def test_an_open_connection_of_the_users(
    make_host: MakeHost, laptop: Laptop, runtime: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: a ControlMaster that the user opened is used, for rsync as well, and is left open."""
    host = make_host()
    socket = Path(runtime["XDG_RUNTIME_DIR"]) / "own" / "mine-%p"
    socket.parent.mkdir()
    laptop.ssh_config(
        f"Host mine\n  HostName 127.0.0.1\n  Port {host.port}\n  ControlPath {socket}\n"
    )
    files = [
        "-F",
        str(laptop.home / ".ssh/config"),
        "-i",
        str(laptop.key),
        "-o",
        f"UserKnownHostsFile={laptop.known_hosts}",
    ]
    subprocess.run(
        ["ssh", *files, "-M", "-N", "-f", "-o", "ControlPersist=yes", "mine"],
        check=True,
        timeout=WAIT_S,
    )
    (host.directory / "authorized_keys").write_text("")
    monkeypatch.setenv("HOME", str(laptop.home))
    transport = open_transport("mine")
    assert gather_facts(transport, check_way=True).way_problems == ()
    assert (
        "your connection to it is open" in transport.described()
        and "the user's own" in transport.described()
    )
    transport.close()
    assert is_open(str(socket).replace("%p", str(host.port)))


@pytest.fixture
def hop(laptop: Laptop, monkeypatch: pytest.MonkeyPatch) -> Hop:
    monkeypatch.setenv("HOME", str(laptop.home))
    return read_hops(Target("127.0.0.1", "u", 22))[-1]


KEYS = ["publickey"]
CHOICES = [
    ({}, LoginFailed(allowed=KEYS, tried=["k"]), True, None),
    (
        {},
        LoginFailed(second_factor=["keyboard-interactive"]),
        True,
        "wants keyboard-interactive beside the key",
    ),
    ({}, LoginFailed(second_factor=["keyboard-interactive"]), False, None),
    (
        {"gssapiauthentication": "yes"},
        LoginFailed(allowed=["gssapi-with-mic"]),
        False,
        "takes a Kerberos ticket",
    ),
    ({"gssapiauthentication": "yes"}, LoginFailed(allowed=KEYS), True, None),
    (
        {"hostbasedauthentication": "yes"},
        LoginFailed(allowed=["hostbased"]),
        False,
        "trusts this machine",
    ),
    ({"pkcs11provider": "/p.so"}, LoginFailed(allowed=KEYS), False, "on a smart card"),
    (
        {},
        LoginFailed(allowed=KEYS, skipped=["/k was passed over: a security key works through"]),
        False,
        "security key",
    ),
    (
        {},
        LoginFailed(allowed=KEYS, skipped=["/k-cert.pub was passed over: unknown kind"]),
        False,
        "a certificate",
    ),
    ({}, LoginFailed(allowed=KEYS, locked=True), True, "with a passphrase"),
    ({}, LoginFailed(allowed=KEYS, locked=True), False, None),
    ({}, LoginFailed(allowed=["keyboard-interactive"]), True, "asks questions in place of a key"),
    ({}, LoginFailed(allowed=["password"]), True, None),
]


@pytest.mark.parametrize(("values", "failure", "can", "why"), CHOICES)
def test_the_choice(
    hop: Hop, values: dict[str, str], failure: LoginFailed, can: bool, why: str | None
) -> None:
    """Goal: the ssh command is taken for what it alone can do, and never for a key that the host refuses. Red with
    no rule: None for every login."""
    found = choose_client(replace(hop, values={**hop.values, **values}), failure, can_ask=can)
    assert (found is None) == (why is None)
    assert found is None or (why or "") in found.why


def test_sockets_lie_in_a_directory_of_this_users_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Goal: a directory that others may enter is passed over, and the name stays short. Red without the look at its
    mode."""
    short = Path(tempfile.mkdtemp(prefix="rx", dir="/tmp"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short))
    own = socket_directory()
    assert own.parent == short and own.stat().st_mode & 0o777 == 0o700
    own.chmod(0o755)
    assert socket_directory().parent == Path("/tmp")
    shutil.rmtree(short)


def test_who_can_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Goal: a program counts where ssh would use it. Red with SSH_ASKPASS alone: ssh wants a display."""
    assert can_ask({"SSH_ASKPASS": "/x", "SSH_ASKPASS_REQUIRE": "force"}.get)
    assert can_ask({"SSH_ASKPASS": "/x", "DISPLAY": ":0"}.get)
    real_open = os.open

    def no_terminal(path: str, flags: int) -> int:
        if path == "/dev/tty":
            raise OSError
        return real_open(path, flags)

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", no_terminal)
        alone = can_ask({"SSH_ASKPASS": "/x"}.get)
    assert not alone
