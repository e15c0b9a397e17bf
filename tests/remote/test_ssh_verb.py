"""`deploy ssh`: a shell or a command in the run's directory, by the way and with the settings of the other verbs."""

import dataclasses
import os
import pty
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rollouts.cloud.machine_types import Address
from rollouts.cloud.reaching import write_ssh_config
from rollouts.remote.run import registry
from rollouts.run_dir import GroupHost, HostGroup, RunDir, write_json_atomic
from tests.ports import free_port
from tests.remote.hosts import WAIT_S, Host, Laptop, descendants, wait_for
from tests.remote.test_gone_runs import launch_plan
from tests.remote.test_remove import fill

MakeHost = Callable[..., Host]
ODD = """a  b"'$HOME!\\`x`;#é"""


def run_on(host: Host, run_id: str = "there") -> RunDir:
    return fill(RunDir(host.run_path(run_id)))


@pytest.fixture
def known(laptop: Laptop, monkeypatch: pytest.MonkeyPatch) -> Callable[..., registry.RunEntry]:
    """Register a run of the laptop's, on a host or on this machine."""
    monkeypatch.setenv("ROLLOUTS_HOME", str(laptop.rollouts_home))

    def make(run_id: str, target: str, path: Path) -> registry.RunEntry:
        entry = registry.RunEntry(
            run_id=run_id, experiment_name="example", target=target, home=str(path.parent.parent),
            run_path=str(path), local_dir=str(laptop.project / "runs/example" / run_id), repository=str(laptop.project),
            created_at=1.0, launch_id="",
        )  # fmt: skip
        registry.save(entry)
        return entry

    return make


@pytest.mark.parametrize("login_shell", [None, "fish", "tcsh"])
def test_a_command(login_shell: str | None, laptop: Laptop, make_host: MakeHost) -> None:
    """Goal: its words arrive as they are, whatever shell the account has; one word is a line with pipes; input, output,
    errors and exit code are the command's. Red with the words joined by spaces, and with the line given to the login
    shell as it is."""
    if login_shell and not shutil.which(login_shell):
        pytest.skip(f"no {login_shell} here")
    host = make_host(login_shell=login_shell)
    run = run_on(host)
    (run.path / ODD).write_text("odd\n")
    there = ("there", "--remote", host.target)
    done = laptop.deploy("ssh", *there, "--", "cat", ODD, "-")
    assert (done.returncode, done.stdout, done.stderr) == (0, "odd\n", "")
    done = laptop.deploy("ssh", *there, "--", "pwd; ls *.jsonl | wc -l; echo no >&2; exit 7")
    assert (done.returncode, done.stdout.split()) == (7, [str(run.path), "1"])
    assert done.stderr == "no\n"
    assert laptop.deploy("ssh", *there, "sh", "-c", 'kill -TERM "$$"').returncode == 128 + 15


def test_input_goes_there(laptop: Laptop, make_host: MakeHost) -> None:
    """Goal: what is piped in is the command's input, every byte; without a command the shell's. Red with no input."""
    host = make_host()
    run = run_on(host)
    data = os.urandom(300_000)
    process = laptop.start(
        "ssh", "there", "--remote", host.target, "--", "cat > copy", stdin=subprocess.PIPE
    )
    assert process.stdin is not None
    process.stdin.buffer.write(data)
    process.communicate(timeout=WAIT_S)
    assert process.returncode == 0 and (run.path / "copy").read_bytes() == data
    done = subprocess.run(
        [*laptop.command, "ssh", "there", "--remote", host.target],
        input="pwd\nexit 4\n",
        env=laptop._environment({}),
        cwd=laptop.project,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 4 and str(run.path) in done.stdout


def on_a_terminal(
    laptop: Laptop, arguments: list[str], keys: list[tuple[str, bytes]]
) -> tuple[int, str]:
    """Run deploy with a terminal of its own: press keys once a text has been shown. Returns exit code and screen."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(laptop.project)
        os.execvpe(laptop.command[0], [*laptop.command, *arguments], laptop._environment({}))
    said, deadline, left = "", time.monotonic() + WAIT_S, list(keys)
    while time.monotonic() < deadline:
        if left and left[0][0] in said:
            os.write(terminal, left.pop(0)[1])
        if select.select([terminal], [], [], 0.2)[0]:
            try:
                said += os.read(terminal, 4096).decode(errors="replace")
            except OSError:  # its end
                break
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said


@pytest.mark.parametrize("where", ["here", "there"])
def test_a_shell_on_a_terminal(
    where: str, laptop: Laptop, make_host: MakeHost, known: Callable[..., object]
) -> None:
    """Goal: the shell has a terminal and stands in the run's directory; Ctrl-C ends what runs in it, not the shell nor
    deploy; its exit code is deploy's. Red without -t."""
    if where == "there":
        host = make_host()
        run = run_on(host)
        known("there", host.target, run.path)
    else:
        run = fill(RunDir(laptop.rollouts_home / "runs/there"))
        known("there", "local", run.path)
    laptop.environment |= {"SHELL": "/bin/sh", "PS1": "$ "}
    keys = [
        (
            "",
            b"test -t 0 && test -t 1 && echo ter''minal; pwd; sh -c \"echo beg''in; exec sleep 300\"\n",
        ),
        ("begin", b"\x03"),
        ("^C", b"echo aft''er; exit 5\n"),
    ]
    code, said = on_a_terminal(laptop, ["ssh", "there"], keys)
    assert code == 5, said
    assert "terminal" in said and str(run.path) in said and "after" in said


def test_settings_of_the_way(laptop: Laptop, make_host: MakeHost) -> None:
    """Goal: the host's name in ~/.ssh/config with port and jump host; a host whose key is not known is refused, with
    the fix. Red with the user's own ssh called: it does not find the name."""
    jump, host = make_host(), make_host()
    run_on(host)
    laptop.ssh_config(
        f"Host inner\n  HostName 127.0.0.1\n  Port {host.port}\n  ProxyJump 127.0.0.1:{jump.port}\n"
        "  LocalCommand touch must-not-run\n  PermitLocalCommand yes\n"
    )
    done = laptop.deploy("ssh", "there", "--remote", "inner", "--", "printenv", "HOME")
    assert (done.returncode, done.stdout.strip()) == (0, str(host.directory)), done.stderr
    assert not (laptop.project / "must-not-run").exists()
    stranger = make_host(known=False)
    refused = laptop.deploy("ssh", "there", "--remote", stranger.target, "--", "touch", "x")
    assert refused.returncode == 2 and "--accept-new-host-key" in refused.stderr


def test_a_rented_machine(
    laptop: Laptop, make_host: MakeHost, known: Callable[..., object]
) -> None:
    """Goal: its name is enough, by the key and the address that its renting left here. Red with the name looked up."""
    host = make_host()
    run = run_on(host)
    known("there", "rollouts-abc", run.path)
    write_ssh_config(
        "rollouts-abc",
        Address(host="127.0.0.1", port=host.port, user=os.environ.get("USER", "root")),
    )
    cloud = laptop.rollouts_home / "cloud"
    shutil.move(laptop.key, cloud / "id_ed25519")
    key = (host.directory / "host_key.pub").read_text()
    (cloud / "machines/rollouts-abc/known_hosts").write_text(f"rollouts-abc {key}")
    done = laptop.deploy("ssh", "there", "--", "pwd")
    assert (done.returncode, done.stdout) == (0, f"{run.path}\n"), done.stderr
    copied = laptop.deploy("cp", "there:metrics.jsonl", str(laptop.home / "m"))
    assert copied.returncode == 0 and (laptop.home / "m").read_bytes() == run.metrics.read_bytes()


def test_one_of_several_hosts(
    laptop: Laptop, make_host: MakeHost, known: Callable[..., registry.RunEntry]
) -> None:
    """Goal: RUN@HOST and --host name one by name, target or number; another one is refused with the names there are;
    `deploy cp` takes the same. Red with the host left out: always the first."""
    first, second = make_host(), make_host()
    runs = [run_on(host) for host in (first, second)]
    others = [{"target": second.target, "home": str(second.home), "run_path": str(runs[1].path)}]
    entry = dataclasses.replace(known("there", first.target, runs[0].path), others=others)
    registry.save(entry)
    hosts = [
        GroupHost(target=host.target, name=name, address="127.0.0.1", interface="lo")
        for host, name in ((first, "one"), (second, "two"))
    ]
    group = HostGroup(rank=0, hosts=hosts, supervisor_port=1, trainer_port=2)
    python = str(shutil.which("python3", path=second.environment["PATH"]))
    for name in ("plan.json", "plan-1.json"):
        plan = launch_plan(first.home, "there")
        write_json_atomic(
            entry.record.path / name, dataclasses.replace(plan, group=group, base_python=python)
        )
    for word, run in (("there", runs[0]), ("there@two", runs[1]), ("there@1", runs[1])):
        done = laptop.deploy("ssh", word, "--", "pwd")
        assert done.stdout == f"{run.path}\n", done.stderr
    done = laptop.deploy("ssh", "there", "--host", second.target, "--", "pwd")
    assert done.stdout == f"{runs[1].path}\n"
    done = laptop.deploy("ssh", "there@three", "--", "pwd")
    assert done.returncode == 2 and "hosts: one, two" in done.stderr
    assert "names another host" in laptop.deploy("ssh", "there@one", "--host", "two").stderr
    (runs[1].path / "own").write_text("of two")
    assert laptop.deploy("cp", "there@two:own", str(laptop.home)).returncode == 0
    assert (laptop.home / "own").read_text() == "of two"


def test_what_is_refused(laptop: Laptop, known: Callable[..., object]) -> None:
    """Goal: a run that is not known, is gone, or whose host does not answer, and an option that there is none: one
    message each, exit code 2. Red with the shell started in the home directory."""
    known("gone", "local", laptop.rollouts_home / "runs/gone")
    known("far", f"127.0.0.1:{free_port()}", laptop.rollouts_home / "runs/far")
    for words, said in (
        (["none"], "there is no run 'none'"),
        (["gone"], "gone was never launched on local."),
        (["far"], "127.0.0.1"),
        (["gone", "--hots", "x"], "has no option --hots"),
    ):
        done = laptop.deploy("ssh", *words)
        assert done.returncode == 2 and said in done.stderr and done.stdout == "", words


def test_a_signal_ends_both(laptop: Laptop, make_host: MakeHost) -> None:
    """Goal: deploy that is ended leaves no ssh behind. Red with the signal not passed on."""
    host = make_host()
    run = run_on(host)
    process = laptop.start("ssh", "there", "--remote", host.target, "--", "touch begun; sleep 300")
    wait_for((run.path / "begun").exists, "the command")
    children = descendants(process.pid)
    process.send_signal(signal.SIGTERM)
    assert process.wait(WAIT_S) == 255 and children, "as ssh ends then"
    wait_for(lambda: not any(Path(f"/proc/{pid}/fd").exists() for pid in children), "its children")


def test_a_connection_that_is_lost(laptop: Laptop, make_host: MakeHost) -> None:
    """Goal: the end of the connection is told, with ssh's exit code."""
    host = make_host()
    run = run_on(host)
    process = laptop.start("ssh", "there", "--remote", host.target, "--", "touch begun; sleep 300")
    wait_for((run.path / "begun").exists, "the command")
    host.stop()
    _, err = process.communicate(timeout=WAIT_S)
    assert process.returncode == 255 and "closed" in err, err
