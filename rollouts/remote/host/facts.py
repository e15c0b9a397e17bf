"""What a host is and has, learned in one round trip.

A POSIX shell script over stdin prints `key=value` lines, so a host without Python still says what it lacks. Where it
finds a Python that will do, the script runs host_probe.py there, whose source travels along.
"""

import json
import shlex
import sys
from dataclasses import dataclass, field, replace
from typing import Any

from rollouts.machine.nvidia_smi import Gpu, GpuProcess, read_driver, read_gpus, read_processes
from rollouts.remote.errors import DeployError, Problem, TransportError
from rollouts.remote.host import gpus
from rollouts.remote.host.gpus import CudaHost
from rollouts.remote.host.read_answer import checked, malformed
from rollouts.remote.host.sending import modules_program
from rollouts.remote.host.transport import LOCAL_TARGET, Transport
from rollouts.remote.host.way_check import shown, way_problems

PYTHON_MIN = (3, 10)  # of the supervisor; environments have a newer one if they need it
FACTS_TIMEOUT_S = 180  # a loaded host answers late
# Where installers put uv; a login shell would have it on its PATH, the command of an SSH session does not.
EXTRA_PATH = "$HOME/.local/bin:$HOME/.cargo/bin"
_PROBE = "rollouts.remote.host.host_probe"

# What host_probe answers, and its rows of runs: both are checked, so that their readers need not
_PROBE_FIELDS = {
    "python": str,
    "python_version": str,
    "platform": str,
    "has_venv": bool,
    "disk_free_bytes": int,
    "ports_in_use": list[int],
    "paths": dict[str, bool],
    "environments": list[str],
    "run_exists": bool,
    "runs": list[dict[str, Any]],
    "pythons": list[list[str]],
    "free_port": int | None,
}
_ROW_FIELDS = {
    "run_id": str,
    "experiment_name": str,
    "state": str,
    "stage": str | None,
    "step": int | None,
    "started_at": float,
    "updated_at": float,
    "exit_code": int | None,
    "message": str,
    "live": bool,
    "launched": bool,
    "launch_id": str | None,
    "ports": list[int],
    "host": str | None,
}

# Its version and its own path; the exit code says whether it is new enough
_SEEN = (
    'import sys; print("%d.%d.%d" % sys.version_info[:3], sys.executable);'
    f" sys.exit(sys.version_info < {PYTHON_MIN!r})"
)
_SCRIPT = """
home=${ROLLOUTS_HOME:-$HOME/.rollouts}
case $home in /*) ;; *) home=$PWD/$home ;; esac
PATH="$PATH:@EXTRA_PATH@"; export PATH
printf '%s\\n' "home=$home" "path=$PATH" "user=$(id -un)" "host=$(uname -n)" "system=$(uname -sr)"
ram=$(sed -n 's/^MemTotal: *\\([0-9]*\\) kB$/\\1/p' /proc/meminfo 2>/dev/null); [ -n "$ram" ] && echo "ram_kib=$ram"
for tool in tmux rsync uv git; do
  where=$(command -v "$tool") && echo "tool=$tool $where"
done
command -v tmux >/dev/null && echo "version=tmux $(tmux -V 2>/dev/null)"
command -v uv >/dev/null && echo "version=uv $(uv --version 2>/dev/null)"
command -v rsync >/dev/null && echo "version=rsync $(rsync --version 2>/dev/null | sed 1q)"
@GPUS@
python=
for candidate in python3 python3.14 python3.13 python3.12 python3.11 python3.10 @OWN_PYTHON@; do
  command -v "$candidate" >/dev/null || continue
  seen=$("$candidate" -ISc '@SEEN@' 2>/dev/null)
  rc=$?
  version=${seen%% *}; [ -n "$version" ] || continue
  echo "python_seen=$candidate $version"
  # its own path: `python3` may be a script that looks for one each time
  [ "$rc" = 0 ] && { python=${seen#* }; [ -x "$python" ] || python=$candidate; break; }
done
[ -n "$python" ] || exit 0
rollouts_home=$home "$python" -IS - <<'ROLLOUTS_PROBE'
@PROBE@
ROLLOUTS_PROBE
"""


@dataclass(frozen=True, kw_only=True)
class HostFacts:
    """One host at one moment. What only Python can tell is empty where `python` is None."""

    home: str  # absolute: where the host keeps its rollouts files
    user: str
    host: str
    system: str
    path: str  # PATH of the commands we run there
    tools: dict[str, str]  # of tmux, rsync, uv and git those found, with where
    versions: dict[str, str]
    driver: str | None
    gpus: tuple[Gpu, ...]
    gpu_problem: str  # what nvidia-smi said instead of listing devices
    gpu_processes: tuple[GpuProcess, ...]
    pythons_seen: tuple[str, ...]  # "python3 3.9.2"
    python: str | None  # the interpreter to use, >= PYTHON_MIN, absolute
    python_version: str = ""
    platform: str = ""
    has_venv: bool = False
    # (path, version) of all that can make environments by themselves
    pythons: tuple[tuple[str, str], ...] = ()
    python_headers: tuple[str, ...] | None = (
        None  # of `python` and `pythons` those that have Python.h; None: not asked
    )
    cuda: CudaHost = field(default_factory=CudaHost)
    ram_mib: int | None = None  # the host's memory; None: not told
    disk_free_bytes: int = 0
    ports_in_use: tuple[int, ...] = ()
    free_port: int | None = None  # the first of as many free ones in a row as were asked for
    # of the paths asked about those that exist: is it a directory?
    paths: dict[str, bool] = field(default_factory=dict)
    environments: tuple[str, ...] = ()  # keys of the complete ones
    run_exists: bool = False  # the run id asked about is taken
    runs: tuple[dict[str, Any], ...] = ()  # host_probe.run_row
    way_problems: tuple[Problem, ...] = ()  # why files would not get through, where that was asked
    way_notes: tuple[str, ...] = ()  # settings for the way there that are not followed

    def run(self, run_id: str) -> dict[str, Any] | None:
        return next((row for row in self.runs if row["run_id"] == run_id), None)


def gather_facts(
    transport: Transport,
    *,
    ports: list[int] | None = None,
    paths: list[str] | None = None,
    run_id: str | None = None,
    free_ports: int = 0,
    check_way: bool = False,
) -> HostFacts:
    """Ask the host everything at once; with `check_way`, also whether files get through to it.

    Raises TransportError, or DeployError when it has no POSIX shell.
    """
    question = {"ports": ports or [], "paths": paths or [], "run_id": run_id}
    question |= {"free_ports_wanted": free_ports} if free_ports else {}
    script = (
        _SCRIPT.replace("@GPUS@", gpus.SCRIPT)
        .replace("@EXTRA_PATH@", EXTRA_PATH)
        .replace("@SEEN@", _SEEN)
        .replace(
            "@OWN_PYTHON@", shlex.quote(sys.executable) if transport.target == LOCAL_TARGET else ""
        )
        .replace("@PROBE@", _probe_source(question))
    )
    try:
        done = transport.run(["sh", "-s"], stdin=script.encode(), timeout_s=FACTS_TIMEOUT_S)
    except TransportError as error:
        raise late(error, transport.target) from None
    lines = [line.partition("=")[::2] for line in done.out.splitlines()]
    if not any(key == "home" for key, _ in lines):
        raise DeployError(
            f"{transport.target}: the host runs no POSIX shell commands.",
            found=(done.err or shown(done.noise + done.stdout))[-500:]
            or f"exit code {done.returncode}, no output",
            needed="`sh -s` over SSH",
            fix="allow commands for this user: its shell, or ForceCommand in the host's sshd_config",
        )
    try:
        facts = parse_facts(lines)
    except (ValueError, RecursionError) as error:
        raise malformed(transport.target, "what it is and has", str(error), done.out) from None
    facts = replace(facts, way_notes=transport.notes())
    if check_way and "rsync" in facts.tools:
        facts = replace(facts, way_problems=way_problems(transport, done.noise))
    if facts.python is None and facts.pythons_seen and done.returncode != 0:
        raise DeployError(f"{transport.target}: the host's Python fails.", found=done.err[-1000:])
    return facts


def late(error: TransportError, target: str) -> TransportError:
    """Return the error of a host that was reached and did not answer in time, with what to do; another as it is."""
    if "no end after" not in str(error):
        return error
    ssh = "" if target == LOCAL_TARGET else f"ssh {target} "
    return TransportError(
        f"{target}: the first look at the host did not end within {FACTS_TIMEOUT_S} s.",
        lost=error.lost,
        found=str(error)[-300:],
        needed="sh, python3 and nvidia-smi there to answer; a loaded one, or one whose file system hangs, is late",
        fix=f"run the same command again; `{ssh}uptime` and `{ssh}df -h` show what it waits for",
    )


def parse_facts(lines: list[tuple[str, str]]) -> HostFacts:
    """Parse the script's output, (key, value) lines, into HostFacts. Raises ValueError for a damaged answer."""
    values = dict(lines)
    several: dict[str, list[str]] = {}
    for key, value in lines:
        several.setdefault(key, []).append(value)
    gpu_lines, gpu_fields = several.get("gpu", []), values.get("gpu_fields", "")
    cards, gpu_problem = read_gpus(gpu_lines, gpu_fields)
    probe = _probe(values["probe"]) if "probe" in values else {}
    return HostFacts(
        home=values["home"],
        user=values.get("user", ""),
        host=values.get("host", ""),
        system=values.get("system", ""),
        path=values.get("path", ""),
        tools=dict(_pairs(several.get("tool", []))),
        versions=dict(_pairs(several.get("version", []))),
        driver=read_driver(gpu_lines, gpu_fields) or values.get("driver"),
        gpus=cards,
        gpu_problem=gpu_problem,
        gpu_processes=read_processes(several.get("gpu_process", []), several.get("gpu_owner", [])),
        cuda=gpus.read_cuda_host(values, several.get("compiler", []), several.get("allocator", [])),
        pythons_seen=tuple(several.get("python_seen", [])),
        ram_mib=int(values["ram_kib"]) // 1024 if values.get("ram_kib", "").isdigit() else None,
        python=probe.pop("python", None),
        **probe,
    )


def _probe(text: str) -> dict[str, Any]:
    """Return host_probe's answer as fields of HostFacts. Raises ValueError or RecursionError for a damaged one."""
    answer = checked(json.loads(text), _PROBE_FIELDS, where="probe")
    for index, row in enumerate(answer["runs"]):
        checked(row, _ROW_FIELDS, where=f"probe.runs[{index}]")
    answer["pythons"] = [(path, version) for path, version in answer["pythons"]]
    found = {
        key: tuple(answer[key]) if isinstance(answer[key], list) else answer[key]
        for key in _PROBE_FIELDS
    }
    if "python_headers" in answer:
        found["python_headers"] = tuple(
            checked(answer, {"python_headers": list[str]})["python_headers"]
        )
    return found


def _pairs(lines: list[str]) -> list[tuple[str, str]]:
    return [(line.split(" ", 1)[0], line.partition(" ")[2]) for line in lines]


def _probe_source(question: dict[str, Any]) -> str:
    """Return a program that holds our modules' source and answers `question` about $rollouts_home."""
    return f"""
{modules_program(_PROBE)}
import os
question = json.loads({json.dumps(question)!r})
sys.modules["{_PROBE}"].main(json.dumps({{"home": os.environ["rollouts_home"], **question}}))
"""
