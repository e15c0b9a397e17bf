"""`deploy data CONFIG`: the first rows of each mixture as the model will see them, made by a process of the library.

With --remote it runs on the host, in the environment of this config's trainer: from a copy of the code that goes again.
"""

import contextlib
import importlib.util
import json
import os
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rollouts.config import Config
from rollouts.remote.commands import look_at_host
from rollouts.remote.errors import DeployError
from rollouts.remote.host.facts import HostFacts
from rollouts.remote.host.open import open_transport
from rollouts.remote.host.transport import Transport
from rollouts.remote.local_faults import as_deploy_errors
from rollouts.remote.plan.environment_specs import trainer_environment
from rollouts.remote.plan.problems import input_problems
from rollouts.remote.read_config import read_config
from rollouts.remote.repository import Code, find_repository, read_code
from rollouts.remote.run.execute import PACKAGE_LINK
from rollouts.remote.run.sync_code import CodePlace, sync_code
from rollouts.view.answer import Answer
from rollouts.view.samples import mixtures_text
from rollouts.view.screen import Screen, takes_colour

NEEDED = ("transformers", "datasets")  # packages; torch is not among them
MODULE = "rollouts.worker.data_preview"
IDLE_MIN = 60
TIMEOUT_S = 1800.0  # on a host; data of a hub may have to be downloaded
# $1 the rollouts home, $2 this preview: others in which nothing changed for $3 minutes go too, their deploy was killed
_REMOVE = """
rm -rf "$2"
for other in "$1"/previews/*; do
    [ -L "$other" ] || [ -n "$(find "$other" -cmin "-$3" 2>/dev/null | head -n 1)" ] || rm -rf "$other"
done
rmdir "$1/previews" 2>/dev/null
:
"""
# $0 this preview, then variables and the command. It goes with the command, also where nobody listens any more.
_RENDER = """
umask 077; trap 'cd /; rm -rf "$0"' EXIT
cat > "$0/config.json" && env "$@" "$0/config.json"
"""


def show_data(
    config_path: str, screen: Screen, *, rows: int, remote: str | None, accept_new_host_key: bool
) -> Answer:
    """Read and render all rows of a config, on this machine or on `remote`. Raises DeployError."""
    with as_deploy_errors():
        config = read_config(config_path)
        root = find_repository(Path.cwd())  # data and models are named from there
        if remote is None:
            printed = _rendered_here(config, root, rows)
        else:
            with contextlib.closing(
                open_transport(remote, accept_new_host_key=accept_new_host_key)
            ) as transport:
                printed = _rendered_there(config, root, rows, transport, screen)
    mixtures: list[dict[str, Any]] = json.loads(printed)
    text = mixtures_text(mixtures, colour=takes_colour())
    return Answer(mixtures, text, is_escaped=True)


def _rendered_here(config: Config, root: Path, rows: int) -> str:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise DeployError(
            f"rows are read and rendered by {' and '.join(NEEDED)}; missing here: {', '.join(missing)}.",
            fix="pip install 'rollouts[data]' (no torch); or --remote HOST, where the trainer's environment has them",
        )
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "config.json"
        config.save(path)
        done = subprocess.run(
            # -P: its modules hide none of ours
            [sys.executable, "-P", "-m", MODULE, str(path), "--rows", str(rows)],
            cwd=root,
            env={**os.environ, **config.host.env},
            capture_output=True,
            text=True,
            check=False,
        )
    return _output(done.returncode, done.stdout, done.stderr)


def _rendered_there(
    config: Config, root: Path, rows: int, transport: Transport, screen: Screen
) -> str:
    facts, code = look_at_host(transport, [config], run_id=None), read_code(root, config)
    # which rows do not need
    wanted = input_problems(config, facts, code, transport.target, config.host.secrets)
    if problems := [*facts.way_problems, *code.inputs.problems, *wanted]:
        raise DeployError.of(problems)
    environment = trainer_environment(config, facts, code)
    if os.path.basename(environment.path) not in facts.environments:
        raise DeployError(
            f"{transport.target} lacks the environment of this config's trainer, in which the rows are read.",
            needed=environment.path,
            fix="deploy this config there once, which builds it; or leave out --remote",
        )
    preview = f"{facts.home}/previews/{secrets.token_hex(4)}"
    try:
        program_path = _send(code, transport, facts, preview, screen)
        variables = [f"{name}={value}" for name, value in config.host.env.items()]
        command = [f"{environment.path}/bin/python", "-P", "-m", MODULE, "--rows", str(rows)]
        done = transport.run(
            ["sh", "-c", _RENDER, preview, *variables, f"PYTHONPATH={program_path}", *command],
            stdin=json.dumps(config.to_json()).encode(),
            cwd=f"{preview}/code/tree",
            timeout_s=TIMEOUT_S,
        )
    finally:
        arguments = (facts.home, preview, str(IDLE_MIN))
        transport.run(["sh", "-c", _REMOVE, "sh", *arguments], timeout_s=TIMEOUT_S)
    return _output(done.returncode, done.out, done.err)


def _send(code: Code, transport: Transport, facts: HostFacts, preview: str, screen: Screen) -> str:
    """Bring the repository, and rollouts where it is no part of it; return where rollouts lies there."""
    assert facts.python is not None, "an environment was made by one"
    place = CodePlace(home=facts.home, run_path=preview, project=code.project, stays=False)
    sync_code(
        transport, place, root=code.root, files=code.files, python=facts.python, say=screen.say
    )
    if code.package is None:
        return place.whole
    place = CodePlace(
        home=facts.home, run_path=preview, project=PACKAGE_LINK, name="package", stays=False
    )
    package = code.package
    sync_code(
        transport,
        place,
        root=package.root,
        files=package.files,
        python=facts.python,
        say=screen.say,
    )
    return place.whole


def _output(returncode: int, out: str, err: str) -> str:
    if returncode:
        said = [
            line.removeprefix("error: ") for line in err.splitlines() if line.startswith("error: ")
        ]
        raise DeployError(said[-1] if said else f"{MODULE} failed: {err[-2000:]}")
    return out
