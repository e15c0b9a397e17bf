"""SSH configurations as people's tools write them: what `ssh` takes, commands and rsync take too, the same way."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rollouts.remote.errors import TransportError
from rollouts.remote.host.rsync import run_rsync
from rollouts.remote.host.ssh import SSHTransport
from rollouts.remote.host.ssh_config import NOT_FOLLOWED, read_hops
from rollouts.remote.host.transport import parse_target
from tests.ports import free_port
from tests.remote.hosts import ROOT, WAIT_S, Host, Laptop, keygen, public, wait_for

MakeHost = Callable[..., Host]


@pytest.fixture
def here(laptop: Laptop, monkeypatch: pytest.MonkeyPatch) -> Laptop:
    """This process is on the laptop."""
    monkeypatch.setenv("HOME", str(laptop.home))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    return laptop


@contextlib.contextmanager
def transport_to(name: str, *, accept_new: bool = False) -> Iterator[SSHTransport]:
    with contextlib.closing(
        SSHTransport(name, parse_target(name), accept_new_host_key=accept_new)
    ) as made:
        yield made


def reach(name: str, tmp_path: Path, *, accept_new: bool = False) -> str:
    """Run a command, and send a file by rsync; what the command said."""
    with transport_to(name, accept_new=accept_new) as transport:
        said = transport.run(["sh", "-c", "echo $SSH_CONNECTION"], timeout_s=WAIT_S).out
        sent = tmp_path / "sent"
        done = run_rsync(
            transport, [str(Path(__file__)), transport.rsync_path(str(sent))], timeout_s=WAIT_S
        )
        assert done.returncode == 0, done.err
        assert sent.read_bytes() == Path(__file__).read_bytes()
    return said


@contextlib.contextmanager
def agent(socket: Path, *keys: Path) -> Iterator[None]:
    """An ssh-agent at `socket` that holds `keys`."""
    socket.parent.mkdir(parents=True, exist_ok=True)
    with subprocess.Popen(
        ["ssh-agent", "-D", "-a", str(socket)], stdout=subprocess.DEVNULL
    ) as process:
        try:
            environment = {**os.environ, "SSH_AUTH_SOCK": str(socket)}

            def answers() -> bool:
                assert process.poll() is None
                asked = ["ssh-add", "-l"]  # 2: there is no agent; 1: it has no key
                done = subprocess.run(asked, env=environment, capture_output=True, check=False)
                return done.returncode != 2

            wait_for(answers, "the agent")
            for key in keys:
                subprocess.run(
                    ["ssh-add", "-q", str(key)], env=environment, check=True, capture_output=True
                )
            yield
        finally:
            process.kill()


def gcloud(laptop: Laptop, host: Host) -> str:
    known = laptop.home / ".ssh/google_compute_known_hosts"
    laptop.known_hosts.rename(known)
    known.write_text(f"compute.1234567 {public(host.host_key)}\n")
    return f"""
Host gpu-7
    HostName 127.0.0.1
    Port {host.port}
    IdentityFile {laptop.key}
    UserKnownHostsFile=~/.ssh/google_compute_known_hosts
    HostKeyAlias=compute.1234567
    IdentitiesOnly=yes
    CheckHostIP=no
"""


def includes(laptop: Laptop, host: Host) -> str:
    for name, text in {
        "conf.d/10-cloud": "Include more/*",
        "more/gpu": f"Host gpu-7\n  Port {host.port}\n",
    }.items():
        file = laptop.home / ".ssh" / name
        file.parent.mkdir()
        file.write_text(text)
    return "Include conf.d/*\nHost gpu-*\n  HostName 127.0.0.1\n"


def no_jump(laptop: Laptop, host: Host) -> str:
    own = f"Host gpu-7\n  HostName 127.0.0.1\n  Port {host.port}\n  ProxyJump none\n"
    return f"{own}Host *\n  ProxyJump bastion.invalid\n"


def matches(laptop: Laptop, host: Host) -> str:
    return f"""
Match exec "test %n = gpu-7"
    HostName 127.0.0.1
Match host 127.0.0.1
    Port {host.port}
Match originalhost gpu-7 user nobody-here
    Port 1
"""


def proxy_command(laptop: Laptop, host: Host) -> str:
    relay = laptop.home / "relay.py"
    relay.write_text(
        "import os, socket, sys, threading\n"
        "s = socket.create_connection((sys.argv[1], int(sys.argv[2])))\n"
        "def out():\n"
        "    while data := s.recv(65536): os.write(1, data)\n"
        "    os._exit(0)\n"
        "threading.Thread(target=out).start()\n"
        "while data := os.read(0, 65536): s.sendall(data)\n"
        "os._exit(0)\n"
    )
    # a shell's words: a variable, quotes, a redirection, and more on stderr than a pipe holds
    script = f'head -c 300000 /dev/zero >&2; exec {sys.executable} "$RELAY" "$1" "$2"'
    command = f"env RELAY={relay} sh -c '{script}' sh %h %p"
    return f"Host gpu-7\n  HostName 127.0.0.1\n  Port {host.port}\n  ProxyCommand {command}\n"


def interactive(laptop: Laptop, host: Host) -> str:
    held = free_port()
    return f"""
Host gpu-7
    HostName 127.0.0.1
    Port {host.port}
    RemoteCommand tmux new -A -s main
    RequestTTY force
    PermitLocalCommand yes
    LocalCommand echo local
    StdinNull yes
    SessionType none
    ForkAfterAuthentication yes
    LocalForward {host.port} localhost:{held}
    RemoteForward {host.port} localhost:{held}
    DynamicForward {host.port}
    ExitOnForwardFailure yes
    ControlMaster auto
    ControlPath {laptop.home}/control
    ControlPersist yes
    Tunnel yes
    LogLevel QUIET
    SendEnv *
    SetEnv HOME=/nonexistent
    EscapeChar none
    ForwardX11 yes
    VisualHostKey yes
    BatchMode no
    AddKeysToAgent yes
    UpdateHostKeys yes
"""


SHAPES = (gcloud, includes, no_jump, matches, proxy_command, interactive)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__)
def test_shapes_of_configurations(
    shape: Callable[[Laptop, Host], str], here: Laptop, make_host: MakeHost, tmp_path: Path
) -> None:
    """Goal: commands and rsync get in wherever ssh does, with every keyword that tools write.

    Red with paramiko.SSHConfig as the reader (all but the last), and with the user's own configuration given to
    rsync's ssh (the last).
    """
    here.ssh_config(shape(here, make_host()))
    assert "127.0.0.1" in reach("gpu-7", tmp_path)


def test_a_new_key_is_kept_where_both_clients_look(
    here: Laptop, make_host: MakeHost, tmp_path: Path
) -> None:
    """Goal: --accept-new-host-key writes the name and the file that the configuration gives, so that rsync passes too.

    Red with the key written to ~/.ssh/known_hosts under the address.
    """
    host = make_host(known=False)
    here.known_hosts.write_text("")
    here.ssh_config(gcloud(here, host))
    known = here.home / ".ssh/google_compute_known_hosts"
    known.unlink()
    reach("gpu-7", tmp_path, accept_new=True)
    assert known.read_text() == f"compute.1234567 {public(host.host_key)}\n"
    reach("gpu-7", tmp_path)


def test_known_hosts_that_keep_nothing(here: Laptop, make_host: MakeHost, tmp_path: Path) -> None:
    """Goal: tools that switch the check off (UserKnownHostsFile /dev/null) do not switch ours off: the key is refused,
    once accepted it is kept in a file of our own, and the setting is named. Red with the key written to /dev/null."""
    host = make_host(known=False)
    here.ssh_config(
        f"Host gpu-7\n HostName 127.0.0.1\n Port {host.port}\n"
        " StrictHostKeyChecking no\n UserKnownHostsFile /dev/null\n GlobalKnownHostsFile /dev/null\n"
    )
    with pytest.raises(TransportError, match="not known here"):
        reach("gpu-7", tmp_path)
    reach("gpu-7", tmp_path, accept_new=True)
    reach("gpu-7", tmp_path)
    assert public(host.host_key) in (here.home / ".rollouts/known_hosts").read_text()
    with transport_to("gpu-7") as transport:
        assert any("stricthostkeychecking" in note for note in transport.notes())


def test_an_agent_at_another_socket(here: Laptop, make_host: MakeHost, tmp_path: Path) -> None:
    """Goal: IdentityAgent, as 1Password writes it, is where the keys are. Red with $SSH_AUTH_SOCK alone asked."""
    host = make_host()
    socket = tmp_path / "Group Containers/a.sock"
    with agent(socket, here.key):
        here.key.unlink()
        here.ssh_config(
            f'Host gpu-7\n HostName 127.0.0.1\n Port {host.port}\nHost *\n IdentityAgent "{socket}"\n'
        )
        reach("gpu-7", tmp_path)


def test_one_of_many_keys_in_the_agent(
    here: Laptop, make_host: MakeHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: with seven keys in the agent and a public key as IdentityFile, IdentitiesOnly tries that one; without it
    the server hangs up, and the error says so with the number of keys.

    Red with every key of the agent tried whatever the configuration says, and with the hang-up called a time-out.
    """
    host = make_host()
    chosen = here.home / ".ssh/chosen.pub"
    chosen.write_bytes(Path(f"{here.key}.pub").read_bytes())
    others = [keygen(tmp_path / f"other{n}") for n in range(6)]
    with agent(tmp_path / "a.sock", *others, here.key):
        monkeypatch.setenv("SSH_AUTH_SOCK", str(tmp_path / "a.sock"))
        here.key.unlink()
        Path(f"{here.key}.pub").unlink()
        own = f"Host gpu-7\n HostName 127.0.0.1\n Port {host.port}\n"
        here.ssh_config(f"{own} IdentityFile {chosen}\n IdentitiesOnly yes\n")
        reach("gpu-7", tmp_path)
        here.ssh_config(f"{own} IdentityFile {others[0]}\n IdentitiesOnly yes\n")
        with pytest.raises(TransportError, match="accepts none of the keys") as caught:
            reach("gpu-7", tmp_path)
        assert f"tried: {others[0]} (agent)\n" in caught.value.text()
        here.ssh_config(own)
        with pytest.raises(
            TransportError, match="closed the connection while logging in"
        ) as caught:
            reach("gpu-7", tmp_path)
    assert (
        "the agent holds 7 keys" in caught.value.text()
        and "IdentitiesOnly yes" in caught.value.text()
    )


def test_a_certificate_as_the_key(here: Laptop, make_host: MakeHost, tmp_path: Path) -> None:
    """Goal: CertificateFile counts for both clients. Red with certificates left out of the login."""
    authority = keygen(tmp_path / "ca")
    host = make_host(settings=(f"TrustedUserCAKeys {authority}.pub",))
    (host.directory / "authorized_keys").write_text("")
    name = subprocess.run(["id", "-un"], check=True, capture_output=True, text=True).stdout.strip()
    command = [
        "ssh-keygen",
        "-q",
        "-s",
        str(authority),
        "-I",
        "laptop",
        "-n",
        name,
        f"{here.key}.pub",
    ]
    subprocess.run(command, check=True, capture_output=True)
    made = Path(f"{here.key}-cert.pub").rename(tmp_path / "elsewhere-cert.pub")
    here.ssh_config(
        f"Host gpu-7\n HostName 127.0.0.1\n Port {host.port}\n CertificateFile {made}\n"
    )
    reach("gpu-7", tmp_path)


def test_jump_hosts_each_with_its_own_settings(
    here: Laptop, make_host: MakeHost, tmp_path: Path
) -> None:
    """Goal: every hop is asked of the configuration by itself: alias, port, key, the hop's own jump; both clients.

    Red with the jump hosts' settings taken from the host's.
    """
    first, second, host = make_host(), make_host(), make_host()
    here.key.rename(here.home / "a key")
    here.ssh_config(
        f"Host gpu-7\n HostName 127.0.0.1\n Port {host.port}\n ProxyJump second\n"
        f"Host second\n HostName 127.0.0.1\n Port {second.port}\n ProxyJump localhost:{first.port}\n"
        f'Host *\n IdentityFile "{here.home}/a key"\n'
    )
    names = (f"[localhost]:{first.port}", f"[127.0.0.1]:{second.port}", f"[127.0.0.1]:{host.port}")
    lines = [
        f"{name} {public(h.host_key)}\n"
        for name, h in zip(names, (first, second, host), strict=True)
    ]
    here.known_hosts.write_text("".join(lines))
    assert [hop.name for hop in read_hops(parse_target("gpu-7"))] == [
        "localhost",
        "second",
        "gpu-7",
    ]
    reach("gpu-7", tmp_path)


def test_a_configuration_that_ssh_refuses(here: Laptop) -> None:
    """Goal: ssh's own words, with the user's file and line. Red with the copy's name shown in place of the file's."""
    here.ssh_config("Host gpu-7\n  Frobnicate yes\n")
    with pytest.raises(TransportError) as caught, transport_to("gpu-7") as transport:
        transport.run(["true"], timeout_s=WAIT_S)
    assert f"{here.home}/.ssh/config" in caught.value.text() and "line 2" in caught.value.text()


def test_jumps_in_a_circle(here: Laptop) -> None:
    """Goal: a host that is reached by way of itself is an error. Red with hops followed without end."""
    here.ssh_config("Host a\n ProxyJump b\nHost b\n ProxyJump a\n")
    with pytest.raises(TransportError, match="more than 8 jump hosts"):
        read_hops(parse_target("a"))


def test_what_is_not_followed_is_said(here: Laptop, make_host: MakeHost) -> None:
    """Goal: a setting that commands go without is named, in the check and in the plan. Red with it passed over."""
    host = make_host()
    here.ssh_config(
        f"Host gpu-7\n HostName 127.0.0.1\n Port {host.port}\n BindInterface lo\n HostbasedAuthentication yes\n"
        " VerifyHostKeyDNS yes\n NoHostAuthenticationForLocalhost yes\n GSSAPIAuthentication yes\n ControlPath ~/c-%C\n"
    )
    done = here.deploy("--remote", "gpu-7")
    assert done.returncode == 0, done.stderr
    for said in (
        "bindinterface lo",
        "hostbasedauthentication yes",
        "verifyhostkeydns true",
        "nohostauthentication",
    ):
        assert done.stdout.count(said) == 1 and "not followed" in done.stdout, done.stdout
    assert "GSSAPI" not in done.stdout and "ControlPath" not in done.stdout, "the key was enough"
    (host.directory / "authorized_keys").write_text("")
    refused = here.deploy("--remote", "gpu-7")
    assert refused.returncode == 2 and "accepts none of the keys tried" in refused.stderr


def test_the_page_names_what_is_not_followed() -> None:
    """Goal: the list beside "counts" is whole. Red with StrictHostKeyChecking left out of the page."""
    page = (ROOT / "docs" / "reference" / "ssh.md").read_text().lower()
    assert [keyword for keyword, _, _ in NOT_FOLLOWED if keyword not in page] == []
