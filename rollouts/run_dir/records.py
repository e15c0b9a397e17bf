"""What the files of a run hold, as dataclasses, and reading them."""

import dataclasses
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from rollouts.plain_files import read_plain
from rollouts.run_dir.files import append_jsonl, write_json_atomic
from rollouts.run_dir.group import HostGroup
from rollouts.run_dir.layout import SMOKE_STAGE, TRACKER_STAGE, RunDir, StageName, State
from rollouts.run_dir.slurm_job import SlurmSpec


@dataclass(frozen=True, kw_only=True)
class Status:
    """status.json: where the run is. By the supervisor; before it by `launch`, after it by `stop`."""

    run_id: str
    experiment_name: str
    state: State
    stage: StageName | None
    message: str  # one line for people: what is happening, or why it ended
    started_at: float  # seconds since the epoch, as all times here
    updated_at: (
        float  # also the heartbeat: rewritten at least every HEARTBEAT_S while the run lives
    )
    exit_code: int | None  # None until the run ended


HEARTBEAT_S = 5.0


@dataclass(frozen=True, kw_only=True)
class ExitRecord:
    """exit/<stage>-<window>.json: how a window's process ended. No file means unknown, never success."""

    window: str
    exit_code: int | None  # None when a signal ended it
    signal: int | None
    started_at: float
    ended_at: float
    message: str = (
        ""  # why it failed, as far as its last lines tell; of the supervisor: how the run ended
    )

    @property
    def code(self) -> int:
        """Return the exit code as a shell would give it."""
        return self.exit_code if self.exit_code is not None else 128 + (self.signal or 0)


@dataclass(frozen=True, kw_only=True)
class ProcessRecord:
    """processes/<name>.json: the leader of a process group that the run may signal."""

    name: str
    pid: int
    pgid: int
    started_at: float


@dataclass(frozen=True, kw_only=True)
class EnvironmentSpec:
    """A virtual environment on the host, named by what it holds: equal key, equal content."""

    name: str  # "trainer", "engine"
    path: str  # <home>/envs/<key>
    installer: Literal["uv", "pip"]
    base_python: str  # the host's interpreter that makes it; "": python_version is installed for it
    requirements: list[str]
    requirements_no_deps: list[str]  # installed after those, without what they require in turn
    constraints: str  # the text of the constraints file; "" for none
    torch_build: str = "index"  # "cpu", "cu126", …: from PyTorch's own index; "index": as the installer is configured
    torch_fallback: bool = False  # take the configured index where PyTorch's cannot be reached
    python_version: str = ""  # of base_python, or of the one to be installed ("3.11")


@dataclass(frozen=True, kw_only=True)
class HubModel:
    """A model of the hub that the host downloads before the first stage."""

    name: str
    weights: bool  # False: configuration and tokenizer alone


@dataclass(frozen=True, kw_only=True)
class ProcessSpec:
    """One tmux window's process."""

    window: str  # "trainer", "engine-0", "router"
    argv: list[str]
    env: dict[str, str]
    ready_url: str | None  # answers 200 once the process serves; None: nothing waits for it
    ready_timeout_s: float
    tools_of: str = ""  # the environment whose programs and CUDA libraries the process finds; "": the host's alone


@dataclass(frozen=True, kw_only=True)
class ModelToSend:
    """A model that lies on the first host of several, and that engines of others start with."""

    directory: str
    receivers: list[str]  # URLs, one a host


@dataclass(frozen=True, kw_only=True)
class StageSpec:
    name: Literal["sft", "rl"]
    engines: list[ProcessSpec]  # started first, all ready before the trainer starts
    trainer: ProcessSpec | None  # its end is the stage's end; None: on other hosts of the job alone
    timeout_s: float
    # a checkpoint directory whose manifest must hold before the stage starts
    needs_checkpoint: str | None
    # on a host beside the first that has engines: takes the weights for them; ready before anything is sent to it
    receiver: ProcessSpec | None = None
    send: ModelToSend | None = None  # before engines start; all hosts know, the first sends
    # of engines on other hosts, which the trainer of this one has to reach
    far_ready_urls: list[str] = dataclasses.field(default_factory=list)

    def processes(self) -> list[ProcessSpec]:
        """List what has a window, in the order of their starts."""
        own = (self.receiver, *self.engines, self.trainer)
        return [spec for spec in own if spec is not None]

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "StageSpec":
        parts: dict[str, Any] = {"engines": [ProcessSpec(**item) for item in data["engines"]]}
        for name, kind in (
            ("trainer", ProcessSpec),
            ("receiver", ProcessSpec),
            ("send", ModelToSend),
        ):
            parts[name] = kind(**data[name]) if data.get(name) is not None else None
        return cls(**{**data, **parts})


@dataclass(frozen=True, kw_only=True)
class SmokeCheck:
    """What is tried on the host in one environment, before the first stage."""

    process: ProcessSpec  # ends with 0, else with an `error:` line
    timeout_s: float
    marker: str  # how the file begins that says that it passed: <environment>/.smoke-<of what>; "": tried each time
    subject: str  # for people: devices, driver and build

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "SmokeCheck":
        return cls(**{**data, "process": ProcessSpec(**data["process"])})


@dataclass(frozen=True, kw_only=True)
class TrackerSpec:
    """A tracker that a process beside the run feeds, in an environment of its own."""

    kind: str  # "wandb"; its window is tracker-<kind>
    project: str
    environment: EnvironmentSpec
    process: ProcessSpec

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "TrackerSpec":
        environment, process = (
            EnvironmentSpec(**data["environment"]),
            ProcessSpec(**data["process"]),
        )
        return cls(**{**data, "environment": environment, "process": process})


@dataclass(frozen=True, kw_only=True)
class NamedGpu:
    """A GPU by which a run may be placed."""

    index: int  # nvidia-smi's
    uuid: str


@dataclass(frozen=True, kw_only=True)
class QueueSpec:
    """How a run waits for its turn on its host. plan.json has it until the turn has come."""

    # as many of them as the plan has GPUs are taken; [] for a run without GPUs
    cards: list[NamedGpu]
    at_once: int  # a run without GPUs starts where fewer than so many such runs are under way
    # in a row, chosen by the host (engine.sglang_port=0): others will do where they are taken
    ports: list[int]


@dataclass(frozen=True, kw_only=True)
class LaunchPlan:
    """plan.json: all that the supervisor does, decided beforehand. Paths are the host's, absolute."""

    run_id: str
    experiment_name: str
    home: str
    run_path: str
    base_python: str  # runs the supervisor: the host's own, >= 3.10, standard library only
    environments: list[EnvironmentSpec]
    stages: list[StageSpec]
    bootstrap_timeout_s: float
    stop_grace_s: float
    engine_restarts_max: int  # in the whole run
    engine_hang_timeout_s: float
    # downloaded once the trainer's environment is made
    models: list[HubModel] = dataclasses.field(default_factory=list)
    # side by side, once all of that is there
    smoke: list[SmokeCheck] = dataclasses.field(default_factory=list)
    package_path: str = (
        ""  # where rollouts lies, beside the user's repository; "": in code/tree, a clone
    )
    queue: QueueSpec | None = (
        None  # it waits for its turn; None: it starts at once, or its turn has come
    )
    group: HostGroup | None = None  # the hosts of a job of several; None: this one alone
    restarts_max: int = 0  # of stages whose trainer was killed or crashed, in the whole run
    network: SmokeCheck | None = (
        None  # tries the way between them, on all of them at once, before the first stage
    )
    trackers: list[TrackerSpec] = dataclasses.field(default_factory=list)
    slurm: SlurmSpec | None = None  # Slurm starts it, in a job; None: it starts on this host

    @property
    def program_path(self) -> str:
        """Where the run's own programs are imported from: `python -m rollouts.worker...` runs in this directory."""
        return self.package_path or str(RunDir(Path(self.run_path)).code_tree)

    def processes(self) -> Iterator[tuple[str, ProcessSpec]]:
        """List what has a window, with its stage."""
        for tracker in self.trackers:
            yield TRACKER_STAGE, tracker.process
        for check in (*self.smoke, *([self.network] if self.network else [])):
            yield SMOKE_STAGE, check.process
        for stage in self.stages:
            for spec in stage.processes():
                yield stage.name, spec

    def to_json(self) -> dict[str, Any]:
        """Return the plan's JSON. What came later and is not used is left out: earlier versions read it then."""
        values = dataclasses.asdict(self)
        for stage in values["stages"]:
            for name in ("receiver", "send", "far_ready_urls"):
                if not stage[name]:
                    del stage[name]
        if values["group"] and not values["group"]["fewer"]:
            del values["group"]["fewer"]
        for host in values["group"]["hosts"] if values["group"] else ():
            for name, default in (("trains", True), ("engine_port", None), ("receiver_port", None)):
                if host[name] is default:
                    del host[name]
        unused = {name for name in ("queue", "trackers", "slurm") if not values[name]}
        return {name: value for name, value in values.items() if name not in unused}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "LaunchPlan":
        environments = [EnvironmentSpec(**item) for item in data["environments"]]
        stages = [StageSpec.from_json(item) for item in data["stages"]]
        models = [HubModel(**item) for item in data.get("models", [])]
        smoke = [SmokeCheck.from_json(item) for item in data.get("smoke", [])]
        trackers = [TrackerSpec.from_json(item) for item in data.get("trackers", [])]
        queue, group, network = (data.get(name) for name in ("queue", "group", "network"))
        if queue is not None:
            queue = QueueSpec(**{**queue, "cards": [NamedGpu(**card) for card in queue["cards"]]})
        parts = {
            "environments": environments,
            "stages": stages,
            "models": models,
            "smoke": smoke,
            "trackers": trackers,
            "queue": queue,
        }
        parts["group"] = HostGroup.from_json(group) if group is not None else None
        parts["network"] = SmokeCheck.from_json(network) if network is not None else None
        slurm = data.get("slurm")
        parts["slurm"] = SlurmSpec.from_json(slurm) if slurm is not None else None
        return cls(**{**data, **parts})


def read_status(run: RunDir) -> Status | None:
    return _read_record(run.status, Status)


def read_exit(run: RunDir, stage: str, window: str) -> ExitRecord | None:
    return _read_record(run.exit(stage, window), ExitRecord)


def read_launch_id(run: RunDir) -> str | None:
    """Return which `deploy` started the run; None if an older version of this program did, or none has yet."""
    found = _launch_record(run).get("launch_id")
    return None if found is None else str(found)


def read_launch_host(run: RunDir) -> dict[str, str] | None:
    """Return which machine runs it, as `host_identity`; None if an older version started it, or it did not start."""
    found = _launch_record(run).get("host")
    if not isinstance(found, dict) or not all(
        isinstance(found.get(key), str) for key in ("name", "boot")
    ):
        return None
    return {key: found[key] for key in ("name", "boot")}


def is_elsewhere(run: RunDir) -> bool:
    """Return whether the run was started on another machine with the same files: it uses nothing of this machine."""
    return read_launch_host(run) not in (None, host_identity())


def other_host(run: RunDir) -> str | None:
    """Return the name of the machine that the run was started on, if this one has another; it may have booted since."""
    host = read_launch_host(run)
    return host["name"] if host is not None and host["name"] != host_identity()["name"] else None


def out_of_sight(run: RunDir) -> bool:
    """Return whether another kernel runs it: its locks may not be seen from here, nor are its processes."""
    host, here = read_launch_host(run), host_identity()
    return host is not None and host["name"] != here["name"] and host["boot"] != here["boot"]


def _launch_record(run: RunDir) -> dict[str, Any]:
    try:
        found = json.loads(read_plain(run.launch))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def host_identity() -> dict[str, str]:
    """Return what tells this machine from others that share its files, until it boots again: no run outlives that.

    Both parts are needed: containers of one machine share its boot, and images of one template may share a name.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # no Linux: nothing is launched there
        boot = ""
    return {"name": os.uname().nodename, "boot": boot}


def read_plan(run: RunDir) -> LaunchPlan | None:
    try:
        return LaunchPlan.from_json(json.loads(read_plain(run.plan)))
    except FileNotFoundError:
        return None


# the types of a record's fields, which are slow to find
_KINDS: dict[type[Any], dict[str, Any]] = {}


def _read_record(path: Path, record: type[Any]) -> Any:
    """Read a record; fields of later versions are ignored. Raises ValueError or TypeError for a damaged file."""
    try:
        values = json.loads(read_plain(path))
    except FileNotFoundError:
        return None
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply") from None
    if not isinstance(values, dict):
        raise TypeError(f"{path}: not an object")
    kinds = _KINDS.setdefault(record, _KINDS.get(record) or get_type_hints(record))
    for name in kinds.keys() & values.keys():
        if not _fits(values[name], kinds[name]):
            raise TypeError(f"{path}: {name} is {values[name]!r:.100}, not {kinds[name]}")
    return record(**{name: value for name, value in values.items() if name in kinds})


def _fits(value: Any, kind: Any) -> bool:
    """Return whether a JSON value has the type of a record's field: simple, a union, or one of some words."""
    if get_origin(kind) is Literal:
        return value in get_args(kind) and isinstance(value, str)
    if get_origin(kind) in (Union, UnionType):
        return any(_fits(value, part) for part in get_args(kind))
    if kind is float:
        return (
            isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        )
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def append_event(run: RunDir, kind: str, **fields: Any) -> None:
    """Append one line to events.jsonl: {"time", "kind", ...}. Kinds and fields: docs/reference/events.md."""
    append_jsonl(run.events, {"time": time.time(), "kind": kind, **fields})


def record_process(run: RunDir, name: str) -> None:
    """Record a process that leads its own group, for `stop` to signal. It calls this before anything slow."""
    record = ProcessRecord(name=name, pid=os.getpid(), pgid=os.getpgid(0), started_at=time.time())
    write_json_atomic(run.process(name), record)
