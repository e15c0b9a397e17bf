"""Login shells of every kind, and what their start-up files print: commands go on, rsync's trouble is said."""

import json
from collections.abc import Callable

import pytest

from rollouts.remote.errors import DeployError
from rollouts.remote.host.facts import gather_facts
from rollouts.remote.host.rsync import run_rsync
from tests.remote.hosts import WAIT_S, Host, Laptop, write_config
from tests.remote.test_ssh_config import here, transport_to

__all__ = ["here"]
MakeHost = Callable[..., Host]

SPEAKING = {
    "bash": {".bashrc": 'echo "Welcome to gpu-7"\n'},
    "title": {".bashrc": "printf '\\033]0;gpu-7\\007'\n"},
    "tcsh": {".cshrc": 'echo "Welcome to gpu-7"\n'},
    "fish": {".config/fish/config.fish": 'echo "Welcome to gpu-7"\n'},
    "binary": {
        ".bashrc": "head -c 70000 /dev/urandom | tr -d '\\n'; printf 'home=/elsewhere\\n{\"ended\": true}\\n'\n"
    },
}


@pytest.mark.parametrize("kind", SPEAKING)
def test_a_shell_that_speaks(kind: str, here: Laptop, make_host: MakeHost) -> None:
    """Goal: commands work, and the check says how much is printed, what, and where to put it.

    Red with the output read from its first byte (facts glued to noise, or noise taken for facts), and with a check
    that tries no rsync (ready: yes).
    """
    shell = kind if kind in ("tcsh", "fish") else None
    host = make_host(start_up=SPEAKING[kind], login_shell=shell)
    with transport_to(host.target) as transport:
        facts = gather_facts(transport, check_way=True)
        with pytest.raises(DeployError, match="its shell prints something before every command"):
            run_rsync(
                transport, ["--dry-run", __file__, transport.rsync_path("./")], timeout_s=WAIT_S
            )
    assert facts.home == str(host.home) and facts.python
    (problem,) = facts.way_problems
    size = {"title": "10 bytes", "binary": "65536 bytes or more"}.get(kind, "17 bytes")
    assert f"its shell prints {size} before every command" in problem.message
    assert problem.found.startswith(
        {"title": r"\x1b]0;gpu-7\x07", "binary": ""}.get(kind, "Welcome to gpu-7")
    )
    assert problem.found.isprintable() and "[[ $- == *i* ]]" in problem.fix


@pytest.mark.parametrize(
    "text",
    [
        "echo to stderr >&2\n",
        "trap 'echo good bye' EXIT\n",
        "export LC_ALL=xx_YY.UTF-8 LANG=xx LANGUAGE=xx\n",
        "export CDPATH=/usr:/ PYTHONPATH=/nonexistent PYTHONHOME=/nonexistent PYTHONSTARTUP=/x ENV=/x BASH_ENV=/x\n",
        "set -o noclobber; set -u; alias cd=false printf=false; umask 077\n",
    ],
)
def test_start_up_files_that_do_no_harm(text: str, here: Laptop, make_host: MakeHost) -> None:
    """Goal: output that rsync can take is not a problem, and changes no answer. Red without python -I."""
    host = make_host(start_up={".bashrc": text, "json.py": "raise SystemExit('shadowed')\n"})
    with transport_to(host.target) as transport:
        facts = gather_facts(transport, check_way=True)
        done = transport.run(["ls", "/no such"], cwd="/", timeout_s=WAIT_S)
    assert facts.way_problems == () and facts.home == str(host.home) and facts.python
    assert (
        done.err.startswith("ls: cannot access")
        and "No such file" in done.err
        and done.returncode == 2
    )


def test_what_a_start_up_file_leaves_running(here: Laptop, make_host: MakeHost) -> None:
    """Goal: a process that holds the outputs open holds no command up. Red with the output's end awaited in place of
    the mark."""
    host = make_host(start_up={".bashrc": "(sleep 240; echo late) &\n"})
    with transport_to(host.target) as transport:
        assert transport.run(["echo", "done"], timeout_s=WAIT_S).out == "done\n"


def test_a_shell_that_runs_nothing(here: Laptop, make_host: MakeHost) -> None:
    """Goal: an account without a shell says so in its own words. Red with its words parsed as facts."""
    host = make_host(settings=('ForceCommand echo "home=/x This account is not available."',))
    expected = pytest.raises(DeployError, match="runs no POSIX shell commands")
    with transport_to(host.target) as transport, expected as caught:
        gather_facts(transport)
    assert "This account is not available." in caught.value.text()


def test_a_run_on_an_account_with_csh(laptop: Laptop, make_host: MakeHost) -> None:
    """Goal: a whole run works under csh; when its shell begins to speak later, looking at the run still works, and
    bringing files says what is in the way.

    Red with scripts of several lines quoted for the login shell, and with every line of `tail` taken for JSON.
    """
    host = make_host(login_shell="tcsh")
    config = str(write_config(laptop.project, output__mode="sft"))
    done = laptop.deploy(config, "--remote", host.target, "--run-id", "a")
    assert done.returncode == 0, done.stdout + done.stderr
    (host.directory / ".cshrc").write_text('echo "Welcome to gpu-7"\nprintf "no line end"\n')
    assert json.loads(laptop.deploy("status", "a", "--json").stdout)["state"] == "done"
    logs = laptop.deploy("logs", "a")
    assert logs.returncode == 0 and logs.stdout, logs.stderr
    pull = laptop.deploy("pull", "a")
    assert (
        pull.returncode != 0
        and "its shell prints" in pull.stderr
        and "Traceback" not in pull.stderr
    )
    plan = laptop.deploy(config, "--remote", host.target, "--plan")
    assert (
        plan.returncode == 2 and "its shell prints 28 bytes before every command" in plan.stderr
    ), plan.stderr
