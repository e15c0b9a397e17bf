"""The SSH transport against real servers: every way a host can be bad, and the traps of reading its output."""

import re
import shlex
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rollouts.remote.errors import DeployError, TransportError
from rollouts.remote.host.rsync import run_rsync
from rollouts.remote.host.ssh import SSHTransport
from rollouts.remote.host.ssh_shared import is_open
from rollouts.remote.host.transport import Target, parse_target
from tests.ports import free_port
from tests.remote.hosts import (
    WAIT_S,
    Host,
    Laptop,
    keygen,
    tool_directory,
    wait_for,
    write_config,
)

MakeHost = Callable[..., Host]


@contextmanager
def transport_to(
    host: Host, laptop: Laptop, monkeypatch: pytest.MonkeyPatch
) -> Iterator[SSHTransport]:
    monkeypatch.setenv("HOME", str(laptop.home))
    made = SSHTransport(host.target, parse_target(host.target), accept_new_host_key=False)
    try:
        yield made
    finally:
        made.close()


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("gpu-7", Target("gpu-7", None, None)),
        ("ubuntu@203.0.113.7:2222", Target("203.0.113.7", "ubuntu", 2222)),
        ("me@[2001:db8::1]:22", Target("2001:db8::1", "me", 22)),
        ("[::1]", Target("::1", None, None)),
    ],
)
def test_targets(text: str, target: Target) -> None:
    """Goal: every form of --remote is taken apart. Red with the brackets kept in the host."""
    assert parse_target(text) == target


@pytest.mark.parametrize(
    "text",
    ["", "a b", "host:port", "host:0", "host:70000", "-oProxyCommand=x", "a@b@c", "x/y", "::1"],
)
def test_no_targets(text: str) -> None:
    """Goal: an invalid host is refused before ssh sees it. Red with a leading dash let through."""
    with pytest.raises(DeployError, match="--remote"):
        parse_target(text)


def refused(laptop: Laptop, make_host: MakeHost) -> str:
    return f"127.0.0.1:{free_port()}"


def does_not_resolve(laptop: Laptop, make_host: MakeHost) -> str:
    return "no-such-host.invalid"


def unknown_key(laptop: Laptop, make_host: MakeHost) -> str:
    return make_host(known=False).target


def changed_key(laptop: Laptop, make_host: MakeHost) -> str:
    host = make_host()
    other = keygen(host.directory / "other_key")
    laptop.known_hosts.write_text(
        f"[127.0.0.1]:{host.port} {other.with_suffix('.pub').read_text()}"
    )
    return host.target


def wrong_key(laptop: Laptop, make_host: MakeHost) -> str:
    host = make_host()
    laptop.key.unlink()
    keygen(laptop.key)
    return host.target


def no_key(laptop: Laptop, make_host: MakeHost) -> str:
    host = make_host()
    laptop.key.unlink()
    return host.target


def locked_key(laptop: Laptop, make_host: MakeHost) -> str:
    host = make_host()
    command = ["ssh-keygen", "-q", "-p", "-P", "", "-N", "passphrase", "-f", str(laptop.key)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return host.target


def password_only(laptop: Laptop, make_host: MakeHost) -> str:
    return make_host(settings=("PubkeyAuthentication no", "PasswordAuthentication yes")).target


def no_shell(laptop: Laptop, make_host: MakeHost) -> str:
    return make_host(
        settings=('ForceCommand echo "This service allows sftp connections only."',)
    ).target


BAD_HOSTS = [
    (does_not_resolve, "the name 'no-such-host.invalid' does not resolve", "check the spelling"),
    (refused, "refused the connection", "check the port"),
    (unknown_key, "the host's key is not known here", "--accept-new-host-key"),
    (changed_key, "THE HOST'S KEY HAS CHANGED", "ssh-keygen -R"),
    (wrong_key, "accepts none of the keys tried for", "ssh-copy-id"),
    (no_key, "accepts none of the keys tried for", "ssh-copy-id"),
    (locked_key, "has a passphrase, and no agent holds it", "ssh-add"),
    (password_only, "the host wants a password", "ssh-copy-id"),
    (no_shell, "runs no POSIX shell commands", "ForceCommand"),
]


@pytest.mark.parametrize(
    ("arrange", "message", "fix"), BAD_HOSTS, ids=lambda value: getattr(value, "__name__", "")
)
def test_bad_hosts(
    arrange: Callable[[Laptop, MakeHost], str],
    message: str,
    fix: str,
    laptop: Laptop,
    make_host: MakeHost,
) -> None:
    """Goal: each bad host has its own message with its fix, exit code 2, nothing written.

    Red, each in turn, with its branch of SSHTransport._explain_* taken out.
    """
    target = arrange(laptop, make_host)
    done = laptop.deploy(
        str(write_config(laptop.project)), "--remote", target, env={"SSH_AUTH_SOCK": ""}
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr and fix in done.stderr and target in done.stderr
    assert done.stderr.endswith("Nothing was started.\n") and "Traceback" not in done.stderr
    assert not (laptop.rollouts_home / "registry").exists()


def test_a_port_that_hangs(laptop: Laptop) -> None:
    """Goal: a server that never speaks is given up after ConnectTimeout. Red without banner_timeout (15 s, no fix)."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        laptop.ssh_config("Host *\n  ConnectTimeout 1\n")
        done = laptop.deploy("--remote", f"127.0.0.1:{silent.getsockname()[1]}")
    assert done.returncode == 2 and "did not answer as an SSH server within 1 s" in done.stderr


def test_a_new_key_is_accepted_once_and_strict_from_then_on(
    laptop: Laptop, make_host: MakeHost
) -> None:
    """Goal: --accept-new-host-key adds the key for both clients; a later change is refused even with the option.

    Red with fabric's own policy, which accepts whatever comes.
    """
    host = make_host(known=False)
    laptop.known_hosts.write_text("other.example ssh-ed25519 AAAA")  # without its line's end
    assert laptop.deploy("--remote", host.target, "--accept-new-host-key").returncode == 0
    assert laptop.known_hosts.stat().st_mode & 0o777 in (0o600, 0o644)
    config = str(write_config(laptop.project, output__mode="sft"))
    assert laptop.deploy(config, "--remote", host.target).returncode == 0, (
        "rsync's client knows the key too"
    )
    host.stop()
    host.host_key.unlink()
    keygen(host.host_key)
    host.start()
    done = laptop.deploy("--remote", host.target, "--accept-new-host-key")
    assert done.returncode == 2 and "KEY HAS CHANGED" in done.stderr


def test_an_alias_of_ssh_config(laptop: Laptop, make_host: MakeHost) -> None:
    """Goal: HostName, Port and IdentityFile of ~/.ssh/config count for both clients. Red without -F for rsync."""
    host = make_host()
    other = laptop.home / "elsewhere"
    laptop.key.rename(other)
    laptop.ssh_config(
        f"Host gpu-7\n  HostName 127.0.0.1\n  Port {host.port}\n  IdentityFile {other}\n"
    )
    done = laptop.deploy(
        str(write_config(laptop.project, output__mode="sft")), "--remote", "gpu-7", "--run-id", "a"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert host.run_path("a").exists()


def test_a_jump_host(laptop: Laptop, make_host: MakeHost) -> None:
    """Goal: ProxyJump leads to the host, and the jump host's key is checked too. Red with fabric's policy for it."""
    jump, host = make_host(), make_host()
    # localhost: fabric takes a jump host of the same name as the host for no jump at all
    laptop.ssh_config(
        f"Host inner\n  HostName 127.0.0.1\n  Port {host.port}\n  ProxyJump localhost:{jump.port}\n"
    )
    laptop.know(host)
    stranger = laptop.deploy("--remote", "inner")
    assert (
        stranger.returncode == 2 and f"[localhost]:{jump.port} shows ssh-ed25519" in stranger.stderr
    )
    with laptop.known_hosts.open("a") as known:
        known.write(f"[localhost]:{jump.port} {jump.host_key.with_suffix('.pub').read_text()}")
    assert f"home    {host.home}" in laptop.deploy("--remote", "inner").stdout
    jump.stop()
    assert laptop.deploy("--remote", "inner").returncode == 2, "the way leads over the jump host"


@pytest.mark.parametrize("lacking", ["tmux", "rsync", "python"])
def test_a_host_that_lacks_a_tool(
    lacking: str, laptop: Laptop, make_host: MakeHost, tmp_path: Path
) -> None:
    """Goal: the missing tool is named with how to get it, before anything is sent. Red with the check left out."""
    path = tool_directory(tmp_path / "tools", without=(lacking,), python=lacking != "python")
    host = make_host(path=path)
    done = laptop.deploy(str(write_config(laptop.project)), "--remote", host.target)
    name = {"python": "Python 3.10 or newer"}.get(lacking, lacking)
    assert done.returncode == 2 and f"{host.target} has no {name}." in done.stderr
    assert "fix     on the host: apt-get install" in done.stderr
    check = laptop.deploy("--remote", host.target)
    assert check.returncode == 2 and re.search(r"ready +no: ", check.stdout)


def test_an_old_python_is_named(laptop: Laptop, make_host: MakeHost, tmp_path: Path) -> None:
    """Goal: what was found is said. Red with `python_seen` not printed."""
    path = tool_directory(tmp_path / "tools", python=False)
    old = path / "python3"
    old.write_text('#!/bin/sh\necho "3.9.2 $0"; exit 1\n')
    old.chmod(0o755)
    done = laptop.deploy(str(write_config(laptop.project)), "--remote", make_host(path=path).target)
    assert done.returncode == 2 and "found   python3 3.9.2" in done.stderr


def test_much_on_both_outputs_and_stdin(
    laptop: Laptop, make_host: MakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: megabytes on stdout, stderr and stdin at once do not deadlock (paramiko#1778).

    Red with stderr read after stdout's end.
    """
    with transport_to(make_host(), laptop, monkeypatch) as transport:
        size = 8_000_000
        script = f"cat; head -c {size} /dev/zero >&2; head -c {size} /dev/zero; exit 3"
        done = transport.run(["sh", "-c", script], stdin=b"x" * size, timeout_s=WAIT_S)
    assert done.returncode == 3 and len(done.stdout) == 2 * size and len(done.stderr) == 65536


def test_words_arrive_as_they_are(
    laptop: Laptop, make_host: MakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: no shell on the way changes a word. Red with " ".join in place of shlex.join."""
    words = ["a b", "$HOME", "'", '"', "*", "\\", "a\nb", "ü", "", "-x", "!", "`id`"]
    with transport_to(make_host(), laptop, monkeypatch) as transport:
        for cwd in (None, "/"):
            done = transport.run(["printf", "%s\\0", *words], cwd=cwd, timeout_s=WAIT_S)
            assert done.out.split("\0")[:-1] == words


def test_a_command_that_does_not_end(
    laptop: Laptop, make_host: MakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: the time limit holds, and the error names the command. Red without the deadline."""
    expected = pytest.raises(TransportError, match="sleep 100: no end after 1 s")
    with transport_to(make_host(), laptop, monkeypatch) as transport, expected:
        transport.run(["sleep", "100"], timeout_s=1)


def test_one_connection_for_all_commands(
    laptop: Laptop, make_host: MakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: commands share a connection; one that died while idle is made anew. Red with a connection a command."""
    host = make_host()
    with transport_to(host, laptop, monkeypatch) as transport:
        first = transport.run(["sh", "-c", "echo $SSH_CONNECTION"], timeout_s=WAIT_S).out
        assert transport.run(["sh", "-c", "echo $SSH_CONNECTION"], timeout_s=WAIT_S).out == first
        host.stop()
        host.start()
        assert transport.run(["echo", "again"], timeout_s=WAIT_S).out == "again\n"


def test_a_stream_whose_connection_dies(
    laptop: Laptop, make_host: MakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: a followed command that loses its connection never looks ended. Red with exit status -1 passed on."""
    host = make_host()
    with transport_to(host, laptop, monkeypatch) as transport:
        stream = transport.stream(
            ["sh", "-c", "read line; echo got $line; sleep 100"], first_line=b"one\n"
        )
        lines = stream.lines(idle_timeout_s=WAIT_S)
        assert next(lines) == b"got one\n"
        threading.Thread(target=host.stop).start()
        with pytest.raises(TransportError) as caught:
            list(lines)
            stream.end()
        assert caught.value.lost


def test_a_silent_stream(
    laptop: Laptop, make_host: MakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: silence beyond the limit is a lost connection (a laptop that slept). Red with no idle limit."""
    with transport_to(make_host(), laptop, monkeypatch) as transport:
        stream = transport.stream(["sh", "-c", "echo one; exec sleep 600"], first_line=b"")
        assert next(stream.lines(idle_timeout_s=WAIT_S)) == b"one\n"
        with pytest.raises(TransportError, match="no sign of life"):
            next(stream.lines(idle_timeout_s=0.5))
        stream.close()


def test_rsync_uses_the_same_files(
    laptop: Laptop, make_host: MakeHost, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Goal: a path with spaces and quotes survives rsync's remote shell; an unknown key stops rsync too.

    Red without -s, and with StrictHostKeyChecking=no.
    """
    source = tmp_path / "it's a file"
    source.write_text("x")
    host = make_host()
    with transport_to(host, laptop, monkeypatch) as transport:
        there = str(tmp_path / "a 'b' \"c\" $d")
        assert (
            run_rsync(
                transport, [str(source), transport.rsync_path(there)], timeout_s=30
            ).returncode
            == 0
        )
        assert Path(there).read_text() == "x"
        laptop.known_hosts.write_text("")
        transport.close()
        with pytest.raises(TransportError, match="cut off"):
            run_rsync(transport, [str(source), transport.rsync_path(there)], timeout_s=WAIT_S)
    assert shlex.split(transport.rsync_options()[1])[0] == "ssh"


def test_rsyncs_share_one_login(
    laptop: Laptop, make_host: MakeHost, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Goal: the second rsync needs no login of its own; a connection that has ended is made again; none is left open.

    Red with an ssh an rsync: a login each. Red without leave_connection: it is open for a minute more.
    """
    host, source = make_host(), tmp_path / "file"
    source.write_text("x")

    def logins() -> int:
        return (host.directory / "sshd.log").read_text().count("Accepted publickey")

    with transport_to(host, laptop, monkeypatch) as transport:

        def send() -> int:
            arguments = [str(source), transport.rsync_path(str(tmp_path / "there"))]
            return run_rsync(transport, arguments, timeout_s=WAIT_S).returncode

        def socket_there() -> str:
            words = shlex.split(transport.rsync_options()[1])
            (path,) = (word for word in words if word.startswith("ControlPath="))
            return path.removeprefix("ControlPath=")

        assert (send(), send(), logins()) == (0, 0, 1)
        host.stop()
        wait_for(lambda: not is_open(socket_there()), "the end of the shared connection")
        host.start()
        assert (send(), logins()) == (0, 2)
        transport.close()
        assert (send(), logins()) == (0, 3)
        last = socket_there()
    assert not is_open(last)
