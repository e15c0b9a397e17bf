"""Errors that name the machine which failed, and give advice for the cause that was seen alone."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rollouts.remote.errors import TransportError
from rollouts.remote.host.ssh_config import read_hops
from rollouts.remote.host.ssh_errors import explain
from rollouts.remote.host.ssh_words import explain_words
from rollouts.remote.host.transport import Target, parse_target
from tests.remote.hosts import WAIT_S, Host, Laptop, keygen, public
from tests.remote.test_ssh_config import here, transport_to

__all__ = ["here"]
MakeHost = Callable[..., Host]


def error_of(name: str) -> TransportError:
    with pytest.raises(TransportError) as caught, transport_to(name) as transport:
        transport.run(["true"], timeout_s=WAIT_S)
    return caught.value


@contextmanager
def server(answer: bytes) -> Iterator[int]:
    """A server that says `answer` to everyone, and hangs up; its port."""

    def serve() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            with connection:
                connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=serve, daemon=True).start()
        yield listening.getsockname()[1]
        listening.shutdown(socket.SHUT_RDWR)


def jump_is_down(jump: Host, here: Laptop) -> None:
    jump.stop()


def jump_has_changed(jump: Host, here: Laptop) -> None:
    text = here.known_hosts.read_text()
    here.known_hosts.write_text(
        text.replace(public(jump.host_key), public(keygen(here.home / "other")))
    )


def jump_refuses(jump: Host, here: Laptop) -> None:
    (jump.directory / "authorized_keys").write_text("")


def jump_forbids_forwarding(jump: Host, here: Laptop) -> None:
    jump.stop()
    jump.settings = ("AllowTcpForwarding no",)
    jump.start()


@pytest.mark.parametrize(
    ("break_it", "message", "fix"),
    [
        (
            jump_is_down,
            "jump host jumper: 127.0.0.1:{jump} refused the connection",
            "check the port",
        ),
        (
            jump_has_changed,
            "jump host jumper: THE HOST'S KEY HAS CHANGED",
            "ssh-keygen -R '[127.0.0.1]:{jump}'",
        ),
        (
            jump_refuses,
            "jump host jumper: the host accepts none of the keys",
            "ssh-copy-id -p {jump}",
        ),
        (
            jump_forbids_forwarding,
            "the jump host before it cannot reach 127.0.0.1:{host}",
            "AllowTcpForwarding",
        ),
    ],
)
def test_a_jump_host_that_fails(
    break_it: Callable[[Host, Laptop], None],
    message: str,
    fix: str,
    here: Laptop,
    make_host: MakeHost,
) -> None:
    """Goal: the hop that failed is named, and the advice is for it. Red with the target explained in its place."""
    jump, host = make_host(), make_host()
    here.ssh_config(
        f"Host inner\n HostName 127.0.0.1\n Port {host.port}\n ProxyJump jumper\n"
        f"Host jumper\n HostName 127.0.0.1\n Port {jump.port}\n"
    )
    break_it(jump, here)
    text = error_of("inner").text()
    ports = {"jump": jump.port, "host": host.port}
    assert message.format(**ports) in text and fix.format(**ports) in text, text
    assert "within" not in text


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"", "closed the connection before the login"),
        (b"Exceeded MaxStartups\r\n", "closed the connection before the login"),
        (b"Not allowed at this time\r\n", "closed the connection before the login"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "closed the connection before the login"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n" + b"x\r\n" * 200, "answers, but not as an SSH server"),
    ],
)
def test_servers_that_hang_up(answer: bytes, message: str, here: Laptop) -> None:
    """Goal: a server that hung up at once is not called silent. Red with every "banner" error called a time-out."""
    with server(answer) as port:
        text = error_of(f"127.0.0.1:{port}").text()
    assert message in text and "within" not in text, text


def test_a_second_factor(here: Laptop, make_host: MakeHost) -> None:
    """Goal: a key that was accepted is said to be, with what the host still wants. Red with "wants a password"."""
    settings = ("AuthenticationMethods publickey,password", "PasswordAuthentication yes")
    text = error_of(make_host(settings=settings).target).text()
    assert "wants a second factor" in text and "the host still wants password" in text, text


def test_two_keys_that_are_both_wanted(here: Laptop, make_host: MakeHost, tmp_path: Path) -> None:
    """Goal: where the second factor is another key, it is given. Red with a partial success taken for the end."""
    host = make_host(settings=("AuthenticationMethods publickey,publickey",))
    second = keygen(here.home / ".ssh/id_ecdsa", "ecdsa")
    with (host.directory / "authorized_keys").open("a") as keys:
        keys.write(public(second) + "\n")
    with transport_to(host.target) as transport:
        assert transport.run(["echo", "in"], timeout_s=WAIT_S).out == "in\n"


def test_a_key_that_others_can_read(here: Laptop, make_host: MakeHost) -> None:
    """Goal: a key that ssh refuses is refused for commands too, with its reason. Red with paramiko's own reading."""
    host = make_host()
    here.key.chmod(0o644)
    text = error_of(host.target).text()
    assert "others may read it (chmod 600" in text and "accepts none of the keys" in text, text


@pytest.mark.parametrize("error", [EOFError(), OSError(), ConnectionResetError(), TimeoutError()])
def test_errors_without_words(error: Exception, here: Laptop) -> None:
    """Goal: an exception without a text still says something. Red with "cannot connect to …: " and nothing behind."""
    (hop,) = read_hops(Target("gpu-7", None, None))
    explained = explain("gpu-7", hop, error, waited_s=0.0)
    assert isinstance(explained, TransportError)
    assert not explained.text().splitlines()[0].rstrip().endswith(":")
    assert type(error).__name__ in explained.text() or "within" in explained.text()


def test_a_proxy_command_that_fails(here: Laptop) -> None:
    """Goal: the command's own words and code are shown. Red with a closed socket called a time-out."""
    here.ssh_config("Host gpu-7\n ProxyCommand sh -c 'echo no tunnel today >&2; exit 7'\n")
    text = error_of("gpu-7").text()
    assert (
        "the ProxyCommand for gpu-7:22 ended" in text and "exit code 7: no tunnel today" in text
    ), text


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("ssh://ubuntu@203.0.113.7:2222", Target("203.0.113.7", "ubuntu", 2222)),
        ("ssh://gpu-7", Target("gpu-7", None, None)),
        ("ssh://gpu-7/", Target("gpu-7", None, None)),
        ("ssh://me@[2001:db8::1]:22/", Target("2001:db8::1", "me", 22)),
    ],
)
def test_a_target_as_an_address(text: str, target: Target) -> None:
    """Goal: ssh://user@host:port is taken. Red with a user called ssh://user."""
    assert parse_target(text) == target


@pytest.mark.parametrize(
    ("words", "lost"),
    [
        ("Host key verification failed.", False),
        ("root@h: Permission denied (publickey).", False),
        ("/etc/ssh/ssh_config: line 3: Bad configuration option: x", False),
        ("Received disconnect from h port 22:2: Too many authentication failures", False),
        ("Cannot execute command-line and remote command.", False),
        (
            "Unable to negotiate with h port 22: no matching host key type found. Their offer: ssh-dss",
            False,
        ),
        (
            "channel 0: open failed: administratively prohibited: open failed\nstdio forwarding failed",
            False,
        ),
        ("ssh: connect to host h port 22: Connection timed out", True),
        ("Connection closed by 127.0.0.1 port 22", True),
        ("client_loop: send disconnect: Broken pipe", True),
        ("", True),
    ],
)
def test_what_ssh_said_before_it_gave_up(words: str, lost: bool) -> None:
    """Goal: 255 is looked at by ssh's own words: what stays wrong is not tried again. Red with all of it "lost"."""
    error = explain_words("gpu-7", f"{words}\nrsync: connection unexpectedly closed")
    assert (
        error.lost is lost and "cut off" in str(error) and words.partition("\n")[0] in error.text()
    )
