"""Every reason why a run cannot start on its host. Pure: config + facts + code → problems."""

import dataclasses
import difflib
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path

from rollouts.config import Config
from rollouts.config.checks.needs import PACKAGE_PREFIX
from rollouts.remote.errors import Problem
from rollouts.remote.host.facts import PYTHON_MIN, HostFacts
from rollouts.remote.inputs import naming_fields
from rollouts.remote.plan.environment_specs import read_lock
from rollouts.remote.repository import Code, named_paths
from rollouts.run_dir import run_path, valid_run_id

GIB = 2**30
LOCKS = "the locks that come with rollouts are 'rollouts:requirements/…'"
INSTALL_HINTS = {
    "tmux": "on the host: apt-get install tmux",
    "rsync": "on the host: apt-get install rsync",
}


def required_ports(config: Config) -> list[int]:
    """Return ports that must be free on the host."""
    engine = config.engine
    if engine is None or not config.uses_engine:
        return []
    router = [] if engine.router_port is None else [engine.router_port]
    replicas = (
        range(engine.sglang_port, engine.sglang_port + engine.replicas)
        if engine.sglang_port
        else ()
    )
    return [*replicas, *router]


def required_paths(config: Config) -> list[str]:
    """Return absolute paths that must exist on the host."""
    names = [*named_paths(config), config.output.source_checkpoint or ""]
    return [name for name in dict.fromkeys(names) if os.path.isabs(name)]


def host_problems(config: Config, facts: HostFacts, target: str, run_id: str) -> Iterator[Problem]:
    """Return what the host lacks, or is busy with."""
    yield from facts.way_problems
    yield from _run_problems(config, facts, target, run_id)
    yield from tool_problems(facts, target)
    yield from _room_problems(config, facts, target)


def input_problems(
    config: Config, facts: HostFacts, code: Code, target: str, secrets_set: Collection[str]
) -> Iterator[Problem]:
    """Name what the config names and is not where it has to be."""
    yield from _path_problems(config, facts, code, target)
    yield from _lock_problems(config, code)
    yield from _pin_problems(config, code)
    yield from _secret_problems(config, secrets_set)


def _run_problems(config: Config, facts: HostFacts, target: str, run_id: str) -> Iterator[Problem]:
    if not valid_run_id(run_id):
        yield Problem(
            f"--run-id {run_id!r} cannot name a run.",
            needed="1 to 80 letters, digits, '-' or '_', no '-' or '_' first",
        )
    if facts.run_exists:
        found = facts.run(run_id)
        yield Problem(
            f"the run id {run_id!r} is in use on {target}.",
            found=f"{run_path(facts.home, run_id)}" + (f", {found['state']}" if found else ""),
            fix=f"choose another --run-id, or leave it out; `deploy attach {run_id}` goes on with that run",
        )


def tool_problems(facts: HostFacts, target: str) -> Iterator[Problem]:
    """Name the programs that every run needs and the host lacks."""
    for tool in ("tmux", "rsync"):
        if tool not in facts.tools:
            why = {
                "tmux": "every process of a run gets a window of one tmux session",
                "rsync": "the code goes there and the results come back with it",
            }[tool]
            yield Problem(
                f"{target} has no {tool}.",
                found=f"PATH={facts.path}",
                needed=why,
                fix=INSTALL_HINTS[tool],
            )
    least = ".".join(map(str, PYTHON_MIN))
    if facts.python is None:
        yield Problem(
            f"{target} has no Python {least} or newer.",
            found=", ".join(facts.pythons_seen) or f"no python3 in PATH={facts.path}",
            needed=f"python3 >= {least}, for the supervisor",
            fix="on the host: apt-get install python3.11 python3.11-venv where its distribution has it, or"
            " `uv python install 3.11` and link it into PATH",
        )


def _room_problems(config: Config, facts: HostFacts, target: str) -> Iterator[Problem]:
    free_gib = facts.disk_free_bytes / GIB
    if facts.python and free_gib < config.host.disk_free_gib_min:
        yield Problem(
            f"{target} has {free_gib:.1f} GiB of disk left.",
            found=f"{free_gib:.1f} GiB free at {facts.home}",
            needed=f"host.disk_free_gib_min={config.host.disk_free_gib_min}",
            fix="free some space there, set ROLLOUTS_HOME on the host to a larger disk, or lower the minimum",
        )
    for port in facts.ports_in_use:
        routes = config.engine is not None and port == config.engine.router_port
        field = "router_port" if routes else "sglang_port"
        or_free = "" if routes else " (0: a free one)"
        holders = [
            row["run_id"] for row in facts.runs if row["live"] and port in (row.get("ports") or [])
        ]
        yield Problem(
            f"{target}: port {port} is in use.",
            found=f"the live run {holders[0]} has it"
            if holders
            else f"something listens on {port} there",
            needed=f"engine.router_port={port}, for the router"
            if routes
            else _ports_wanted(config),
            fix=f"set another engine.{field}{or_free}, or end what listens there",
        )


def _ports_wanted(config: Config) -> str:
    assert config.engine is not None, "no engine, no port"
    port, replicas = config.engine.sglang_port, config.engine.replicas
    which = f", the first of engine.replicas={replicas}" if replicas > 1 else ""
    return f"engine.sglang_port={port}{which}, for the inference server"


def _path_problems(config: Config, facts: HostFacts, code: Code, target: str) -> Iterator[Problem]:
    if code.constraints is None:
        yield Problem(
            f"host.constraints_file={config.host.constraints_file!r} is not in "
            f"{_place(config.host.constraints_file, code)}.",
            fix=_nearest_file(config.host.constraints_file, code)
            + ", or set None to install unconstrained",
        )
    for name, state in code.named.items():
        fields = naming_fields(config, name)
        if name in code.inputs.paths:
            problem = code.inputs.paths[name]
            yield dataclasses.replace(
                problem, found="\n".join(filter(None, (fields, problem.found)))
            )
        elif state == "not sent":
            yield Problem(
                f"{name!r} is here, but git ignores it, so it would not reach the host.",
                found=fields,
                needed="a path that git lists, an absolute path on the host, or a hub id",
                fix=f"remove it from .gitignore, or copy it to the host and name it there: /…/{Path(name).name}",
            )
        elif state == "missing" and _looks_like_path(name):
            yield Problem(
                f"{name!r} does not exist in {code.root}.",
                found=fields,
                needed="a path relative to the repository, an absolute path on the host, or a hub id",
                fix=_nearest_sent(name, code) or "check the spelling",
            )
        elif state == "missing" and "/" not in name and (near := _nearest_sent(name, code)):
            yield Problem(
                f"{name!r} is not in {code.root}, and the hub has no such id without an owner.",
                found=fields,
                needed="a path relative to the repository, an absolute path on the host, or a hub id, owner/name",
                fix=near,
            )
    for path in required_paths(config) if facts.python else ():
        if path not in facts.paths:
            is_start = path == config.output.source_checkpoint
            field = "output.source_checkpoint" if is_start else naming_fields(config, path)
            yield Problem(
                f"{path!r} does not exist on {target} ({field}).",
                fix="check the spelling; checkpoints of earlier runs there are "
                f"{facts.home}/runs/<run>/checkpoints/<stage>/latest",
            )
    source = config.output.source_checkpoint
    if source is not None and not os.path.isabs(source):
        yield Problem(
            f"output.source_checkpoint={source!r} is not absolute.",
            needed="a directory on the host",
            fix=f"for example {facts.home}/runs/<run>/checkpoints/sft/latest",
        )


def _lock_problems(config: Config, code: Code) -> Iterator[Problem]:
    """Check the engine's lock: it is there, and installs that engine. Else that shows after gigabytes of packages."""
    engine = config.engine
    if engine is None or not config.uses_engine or engine.requirements_file is None:
        return
    field = f"engine.requirements_file={engine.requirements_file!r}"
    if code.engine_requirements is None:
        place, fix = (
            _place(engine.requirements_file, code),
            _nearest_file(engine.requirements_file, code),
        )
        yield Problem(f"{field} is not in {place}.", fix=f"{fix}; {LOCKS}")
        return
    requirements = [line for lines in read_lock(code.engine_requirements) for line in lines]
    if not requirements:
        yield Problem(
            f"{field} lists no package.",
            needed="a lock of the engine's whole environment",
            fix="name another; with engine=Embedded(...) None runs it in the trainer's environment",
        )
    elif engine.kind != "embedded" and not any(
        engine.kind in line.lower() for line in requirements
    ):
        yield Problem(
            f"{field} does not install {engine.kind}.",
            found=f"{len(requirements)} requirements, none of which names it",
            needed=f"a lock that has {engine.kind}, for engine={type(engine).__name__}",
            fix=f"name a lock of {engine.kind}; {LOCKS}",
        )


def _pin_problems(config: Config, code: Code) -> Iterator[Problem]:
    """Find packages that host.requirements and the constraints pin to two versions: no installer can have both."""
    pins = dict(_pinned(line) for line in (code.constraints or "").splitlines())
    for line in config.host.requirements:
        name, wanted = _pinned(line)
        if wanted and "*" not in wanted and pins.get(name, wanted) not in ("", wanted):
            yield Problem(
                f"host.requirements asks for {line!r}, and the constraints pin {name}=={pins[name]}.",
                found=f"host.constraints_file={config.host.constraints_file!r}",
                needed="one version of a package in an environment",
                fix=f"write {name!r} without a version, or name other constraints",
            )


def _pinned(line: str) -> tuple[str, str]:
    """Return (name, version) of `name==version`, ("", "") of another line."""
    found = re.match(r"\s*([\w.-]+)\s*(?:\[[^]]*\])?\s*==\s*([\w.*+!-]+)", line)
    return (re.sub(r"[-_.]+", "-", found[1]).lower(), found[2]) if found else ("", "")


def _place(file: str | None, code: Code) -> str:
    """Return where a file was looked for, in words."""
    return "the package" if (file or "").startswith(PACKAGE_PREFIX) else str(code.root)


def _nearest_file(file: str | None, code: Code) -> str:
    near = code.near_files.get(file or "", "")
    return (
        f"write {near!r}, which comes with rollouts"
        if near not in ("", file)
        else "correct the path"
    )


def _nearest_sent(name: str, code: Code) -> str:
    """Return "write 'train.jsonl'", of the files and folders that are sent; "" where none is near."""
    if name.startswith("~"):
        return "~ is not followed: write an absolute path on the host"
    bare = name.removeprefix("./").rstrip("/")
    known = [
        *code.files,
        *{str(folder) for file in code.files for folder in Path(file).parents} - {"."},
    ]
    own = [path for path in known if Path(path).name == Path(bare).name or Path(path).stem == bare]
    near = own or difflib.get_close_matches(bare, known, n=1, cutoff=0.75)
    return f"write {min(near, key=len)!r}" if near else ""


def _looks_like_path(name: str) -> bool:
    """Return whether it is a path rather than a hub id, which is `name` or `owner/name`."""
    return name.startswith(".") or name.endswith((".jsonl", "/")) or name.count("/") > 1


def _secret_problems(config: Config, secrets_set: Collection[str]) -> Iterator[Problem]:
    for name in config.host.secrets:
        if name not in secrets_set:
            yield Problem(
                f"the secret {name} is not set here.",
                needed=f"host.secrets={config.host.secrets}: read from this environment at deploy time",
                fix=f"export {name}=…, or take it out of host.secrets",
            )
