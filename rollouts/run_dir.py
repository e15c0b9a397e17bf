"""The run directory: every file name and format that the two sides share, and atomic writes. Standard library only.

On the host it is `<home>/runs/<run_id>/`; what the control side pulls is a mirror of the same layout at
`<save_dir>/<experiment_name>/<run_id>/`. docs/run-directory.md describes the formats for people.

```
config.json  plan.json  code/{tree/,manifest.json,commit.txt,dirty.diff,…}   what ran
status.json  events.jsonl  supervisor.lock                                   where it is
metrics.jsonl  rollouts.jsonl  eval.jsonl  eval_samples.jsonl                what it learned
logs/<window>.log  exit/<stage>-<window>.json  processes/<name>.json         what the processes said, how they ended
checkpoints/{sft,rl}/step_000100/  latest                                    models
```

Who writes what: the launcher config.json, plan.json and code/; the supervisor status.json; supervisor and trainer
append to events.jsonl (one write per line); the trainer writes metrics, rollouts, eval and checkpoints; each window's
wrapper its log and its exit file; every process that leads a process group its own record in processes/.
"""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import IO, Any, Literal, Union, get_args, get_origin, get_type_hints

from base_config import EXPERIMENT_NAME_PATTERN
from rollouts.plain_files import NotPlainFileError, appending, open_plain, read_plain, reading

State = Literal["starting", "running", "done", "failed", "stopped", "died"]
FINAL_STATES: tuple[State, ...] = ("done", "failed", "stopped", "died")  # died: seen by readers, never written
StageName = Literal["bootstrap", "sft", "rl"]
RUN_ID_PATTERN = rf"{EXPERIMENT_NAME_PATTERN}"  # a tmux session name too
# In the environment of every process of a run: how a run knows its own, also beside one of the same id in another home
RUN_ID_VARIABLE = "ROLLOUTS_RUN_ID"
RUN_PATH_VARIABLE = "ROLLOUTS_RUN_PATH"
GPUS_VARIABLE = "ROLLOUTS_GPUS"  # a process's cards by nvidia-smi's index, however CUDA_VISIBLE_DEVICES names them
HOME_VARIABLE = "ROLLOUTS_HOME"  # where a host (or this machine) keeps its rollouts files; ~/.rollouts without it

STREAMED_FILES = (
    "events.jsonl",
    "metrics.jsonl",
    "eval.jsonl",
    "eval_samples.jsonl",
    "rollouts.jsonl",
)  # they only grow
ENVIRONMENT_GLOB = "code/environment-*.txt"
SNAPSHOT_GLOBS = ("status.json", "exit/*.json", ENVIRONMENT_GLOB)  # small, replaced as a whole
LOG_GLOB = "logs/*.log"
SNAPSHOT_BYTES_MAX = 1 << 20


@dataclass(frozen=True)
class RunDir:
    """The names inside one run directory; the same on the host and in the mirror here."""

    path: Path

    @property
    def run_id(self) -> str:
        return self.path.name

    @property
    def real_path(self) -> str:
        """Absolute, without links on the way: one spelling of the run's directory, also once it is removed."""
        return os.path.realpath(self.path)

    @property
    def memory_name(self) -> str:
        """What the run's files in /dev/shm go by, which all homes of a machine share."""
        return f"{self.run_id}-{hashlib.sha256(os.fsencode(self.real_path)).hexdigest()[:12]}"

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def code(self) -> Path:
        return self.path / "code"

    @property
    def code_tree(self) -> Path:
        return self.code / "tree"

    def environment(self, name: str) -> Path:
        """What was installed in the environment of this name ("trainer", "engine"): `name==version` lines."""
        return self.code / f"environment-{name}.txt"

    @property
    def code_manifest(self) -> Path:
        """{"digest", "files": {name: {"mode", "size", "sha256"}}}: what code/tree has to be before a launch."""
        return self.code / "manifest.json"

    @property
    def secrets(self) -> Path:
        """{"inherited": the launcher's environment, "secrets", "engine_keys": {NAME: value}}; 0600, gone at the end.

        Where the machine has a tmpfs it is a link to `secrets_in_memory`, which no reboot outlives.
        """
        return self.path / "secrets.json"

    @property
    def secrets_in_memory(self) -> Path:
        name = hashlib.sha256(os.fsencode(self.path)).hexdigest()[:16]  # known when the directory is gone, too
        return Path("/dev/shm") / f"rollouts-secrets-{os.getuid()}-{name}" / "secrets.json"

    @property
    def reserve(self) -> Path:
        """Room on the disk, given up when it is full, so that the run's end can still be written."""
        return self.path / ".reserve.tmp"

    @property
    def launch(self) -> Path:
        """{"launch_id", "host"}: which `deploy` started the run, and on which machine (`host_identity`)."""
        return self.path / "launch.json"

    @property
    def status(self) -> Path:
        return self.path / "status.json"

    @property
    def lock(self) -> Path:
        return self.path / "supervisor.lock"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def rollouts(self) -> Path:
        return self.path / "rollouts.jsonl"

    @property
    def eval(self) -> Path:
        return self.path / "eval.jsonl"

    @property
    def eval_samples(self) -> Path:
        """The answers to held-out rows, one a line."""
        return self.path / "eval_samples.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def weights(self) -> Path:
        """Weights on their way to the engines; rewritten at every sync, never pulled."""
        return self.path / "weights"

    @property
    def weights_in_memory(self) -> Path:
        """The same on tmpfs (engine.weights_on_tmpfs). Removed by the trainer, else by `remove_transient`."""
        return Path("/dev/shm") / f"rollouts-{self.memory_name}-weights"

    def buckets_in_memory(self) -> list[Path]:
        """Files that the trainer's weights are in on their way to the engines (engine.weight_sync="tensor")."""
        return list(Path("/dev/shm").glob(f"rollouts-bucket-{self.memory_name}-{'[0-9a-f]' * 32}"))

    def log(self, window: str) -> Path:
        return self.path / "logs" / f"{window}.log"

    def exit(self, stage: str, window: str) -> Path:
        return self.path / "exit" / f"{stage}-{window}.json"

    def rendezvous(self, stage: str) -> Path:
        """Where torchrun's agent keeps its state. Hidden, like `ranks`: neither is a result, so neither is pulled."""
        return self.path / f".rendezvous-{stage}.tmp"

    def ranks(self, stage: str) -> Path:
        """Where the trainer's ranks find each other."""
        return self.path / f".ranks-{stage}.tmp"

    def process(self, name: str) -> Path:
        return self.path / "processes" / f"{name}.json"

    def latest_checkpoint(self, stage: str) -> Path:
        """A relative symlink to the newest completed checkpoint of the stage."""
        return self.checkpoints / stage / "latest"


def home_dir() -> Path:
    """This machine's rollouts home."""
    return Path(os.environ.get(HOME_VARIABLE) or "~/.rollouts").expanduser()


def run_path(home: str | os.PathLike[str], run_id: str) -> Path:
    return Path(home) / "runs" / run_id


def life_name(window: str, life: int) -> str:
    """What the exit record of an engine's earlier life goes by: "engine-0.life-1"."""
    return f"{window}.life-{life}"


def valid_run_id(run_id: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,79}", run_id) is not None


# --- formats --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Status:
    """status.json: where the run is. By the supervisor; before it by `launch`, after it by `stop`."""

    run_id: str
    experiment_name: str
    state: State
    stage: StageName | None
    message: str  # one line for people: what is happening, or why it ended
    started_at: float  # seconds since the epoch, as all times here
    updated_at: float  # also the heartbeat: rewritten at least every HEARTBEAT_S while the run lives
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
    message: str = ""  # why it failed, as far as its last lines tell; of the supervisor: how the run ended

    @property
    def code(self) -> int:
        """The exit code as a shell would give it."""
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
class StageSpec:
    name: Literal["sft", "rl"]
    engines: list[ProcessSpec]  # started first, all ready before the trainer starts
    trainer: ProcessSpec  # its end is the stage's end
    timeout_s: float
    needs_checkpoint: str | None  # a checkpoint directory whose manifest must hold before the stage starts


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
    models: list[HubModel] = dataclasses.field(
        default_factory=list
    )  # downloaded once the trainer's environment is made

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "LaunchPlan":
        environments = [EnvironmentSpec(**item) for item in data["environments"]]
        stages = [
            StageSpec(
                **{
                    **item,
                    "engines": [ProcessSpec(**engine) for engine in item["engines"]],
                    "trainer": ProcessSpec(**item["trainer"]),
                }
            )
            for item in data["stages"]
        ]
        models = [HubModel(**item) for item in data.get("models", [])]
        return cls(**{**data, "environments": environments, "stages": stages, "models": models})


# --- reading and writing --------------------------------------------------------------------------------------------


def write_text_atomic(path: Path, text: str, *, mode: int = 0o644) -> None:
    """Readers see the old file or the new one, whole; after a crash too. An error leaves nothing behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        descriptor = open_plain(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with os.fdopen(descriptor, "w") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_json_atomic(path: Path, value: Any, *, mode: int = 0o644) -> None:
    data = dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
    write_text_atomic(path, json.dumps(data, indent=1) + "\n", mode=mode)


def append_jsonl(path: Path, *rows: dict[str, Any]) -> None:
    """Append whole lines, one writer at a time. Raises OSError; nothing of a line that did not fit stays then.

    What another writer tore, killed in the middle of a line, stays a line of its own, which readers leave out.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(_line(row) for row in rows)
    descriptor = open_plain(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        begin = os.fstat(descriptor).st_size
        torn = begin > 0 and os.pread(descriptor, 1, begin - 1) != b"\n"
        _write_lines(descriptor, begin, (b"\n" if torn else b"") + text.encode())
    finally:
        os.close(descriptor)


def _line(row: dict[str, Any]) -> str:
    try:
        return json.dumps(row, separators=(",", ":"), allow_nan=False) + "\n"
    except ValueError:  # NaN or an infinity, for which JSON has no word: null
        return json.dumps(_without_nan(row), separators=(",", ":")) + "\n"


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write_lines(descriptor: int, begin: int, data: bytes) -> None:
    written = 0
    try:
        while written < len(data):  # a regular file takes it in one call unless the disk is full
            written += os.write(descriptor, data[written:])
    except OSError:
        with contextlib.suppress(OSError):  # no regular file: the first error is the one to tell
            os.ftruncate(descriptor, begin + data.rfind(b"\n", 0, written) + 1)
        raise


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; [] where it is missing. `read_rows` also tells how many lines are none."""
    return list(iter_jsonl(path))


def read_rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """(rows, complete lines that are none: torn by a full disk or a crash, or written by something else)."""
    lines = list(_complete_lines(path))
    rows = [row for row in map(parse_row, lines) if row is not None]
    return rows, len(lines) - len(rows)


def iter_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    for line in _complete_lines(path):
        if (row := parse_row(line)) is not None:
            yield row


def parse_row(line: bytes) -> dict[str, Any] | None:
    """A line's JSON object; None for a line that is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _complete_lines(path: Path) -> Iterator[bytes]:
    """A torn last line (a crash, a pull under way) is left out."""
    try:
        stream = reading(path)
    except FileNotFoundError:
        return
    with stream:
        for line in stream:
            if line.endswith(b"\n"):
                yield line


def last_jsonl_row(path: Path) -> dict[str, Any] | None:
    """The last row, found from the file's end; None for an empty or missing file."""
    try:
        with reading(path) as stream:
            size = stream.seek(0, os.SEEK_END)
            block = min(size, 1 << 16)
            stream.seek(size - block)
            lines = stream.read(block).split(b"\n")[:-1]
    except FileNotFoundError:
        return None
    whole = lines if block == size else lines[1:]  # the first began before the block
    rows = (row for row in map(parse_row, reversed(whole)) if row is not None)
    found = next(rows, None)
    return found if found is not None or block == size else next(reversed(read_jsonl(path)), None)


# --- a full disk ----------------------------------------------------------------------------------------------------

RESERVE_BYTES = 1 << 17
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


def make_reserve(run: RunDir) -> None:
    with run.reserve.open("wb") as stream:
        stream.write(os.urandom(RESERVE_BYTES))  # file systems that compress keep all of it
        os.fsync(stream.fileno())


def write_on_full_disk(run: RunDir, write: Callable[[], None]) -> None:
    """Do `write`; where the disk is full give up the run's reserve and do it again. Raises OSError."""
    try:
        write()
    except OSError as error:
        if error.errno not in FULL_DISK or not run.reserve.exists():
            raise
        run.reserve.unlink(missing_ok=True)
        write()


# --- what does not outlive a run ------------------------------------------------------------------------------------


def write_secrets(run: RunDir, value: dict[str, Any]) -> None:
    """Write the run's secrets, 0600: on a tmpfs where this machine has one, else into the run directory."""
    memory = run.secrets_in_memory
    try:
        memory.parent.mkdir(mode=0o700, exist_ok=True)
        found = memory.parent.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise PermissionError(errno.EPERM, "made by somebody else", str(memory.parent))
        write_json_atomic(memory, value, mode=0o600)
        run.secrets.unlink(missing_ok=True)
        run.secrets.symlink_to(memory)
    except OSError:  # no tmpfs there, a full one, or a file of another user's in its place
        run.secrets.unlink(missing_ok=True)
        write_json_atomic(run.secrets, value, mode=0o600)


def remove_transient(run: RunDir) -> None:
    """Remove what must not outlive a run's processes: its secrets, weights that a killed trainer left in memory, and
    files by which its processes found each other."""
    places = {run.secrets_in_memory}
    if run.secrets.is_symlink():  # the directory may go by another name now
        places.add(Path(os.readlink(run.secrets)))
    run.secrets.unlink(missing_ok=True)
    for place in places:
        if place.match("/dev/shm/rollouts-secrets-*/secrets.json"):
            with contextlib.suppress(OSError):  # gone, or another user's of that name
                shutil.rmtree(place.parent)
    temporary = (run.reserve, *_left_secrets(run), *map(run.rendezvous, ("sft", "rl")), *map(run.ranks, ("sft", "rl")))
    for file in temporary:
        file.unlink(missing_ok=True)
    shutil.rmtree(run.weights_in_memory, ignore_errors=True)
    for file in run.buckets_in_memory():
        file.unlink(missing_ok=True)


def _left_secrets(run: RunDir) -> list[Path]:
    """What a writer that was killed left of the secrets."""
    directories = (run.path, run.secrets_in_memory.parent)
    return [file for directory in directories for file in directory.glob(".secrets.json.*.tmp")]


def clean_up(home: Path) -> None:
    """Remove what runs under `home` left that died without their own end: a reboot, or SIGKILL of everything."""
    for path in home.glob("runs/*"):
        with contextlib.suppress(OSError):  # another user's, or removed meanwhile: it stands in nobody's way
            _clean_up_run(RunDir(path))


def _clean_up_run(run: RunDir) -> None:
    if run.secrets.is_symlink() or run.secrets.exists() or _left_secrets(run):
        with launching(run, wait=False) as alone:
            if alone and other_host(run) is None and not observe(run).live:
                remove_transient(run)


@contextlib.contextmanager
def launching(run: RunDir, *, wait: bool = True) -> Iterator[bool]:
    """Hold a run's directory while it is launched, or looked at by somebody who must not do so meanwhile.

    False without `wait` where another has it. The kernel frees it with its holder.
    """
    descriptor = os.open(run.path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(descriptor)


def read_status(run: RunDir) -> Status | None:
    return _read_record(run.status, Status)


def read_exit(run: RunDir, stage: str, window: str) -> ExitRecord | None:
    return _read_record(run.exit(stage, window), ExitRecord)


def read_launch_id(run: RunDir) -> str | None:
    """Which `deploy` started the run; None where an older version of this program did, or nobody yet."""
    found = _launch_record(run).get("launch_id")
    return None if found is None else str(found)


def read_launch_host(run: RunDir) -> dict[str, str] | None:
    """Which machine runs it, as `host_identity`; None where an older version of this program started it, or nobody."""
    found = _launch_record(run).get("host")
    if not isinstance(found, dict) or not all(isinstance(found.get(key), str) for key in ("name", "boot")):
        return None
    return {key: found[key] for key in ("name", "boot")}


def is_elsewhere(run: RunDir) -> bool:
    """Was the run started on another machine that has the same files? What it uses is none of this machine's."""
    return read_launch_host(run) not in (None, host_identity())


def other_host(run: RunDir) -> str | None:
    """The name of the machine that the run was started on, if this one has another; it may have booted since."""
    host = read_launch_host(run)
    return host["name"] if host is not None and host["name"] != host_identity()["name"] else None


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


def _read_record(path: Path, record: type[Any]) -> Any:
    """Fields of later versions are passed over. Raises ValueError or TypeError for a damaged file."""
    try:
        values = json.loads(read_plain(path))
    except FileNotFoundError:
        return None
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply") from None
    if not isinstance(values, dict):
        raise TypeError(f"{path}: not an object")
    kinds = get_type_hints(record)
    for name in kinds.keys() & values.keys():
        if not _fits(values[name], kinds[name]):
            raise TypeError(f"{path}: {name} is {values[name]!r:.100}, not {kinds[name]}")
    return record(**{name: value for name, value in values.items() if name in kinds})


def _fits(value: Any, kind: Any) -> bool:
    """Is a JSON value of the type that a record's field has: a simple one, a union of them, one of some words?"""
    if get_origin(kind) is Literal:
        return value in get_args(kind) and isinstance(value, str)
    if get_origin(kind) in (Union, UnionType):
        return any(_fits(value, part) for part in get_args(kind))
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def append_event(run: RunDir, kind: str, **fields: Any) -> None:
    """One line of events.jsonl: {"time", "kind", ...}. The kinds and their fields: docs/run-directory.md."""
    append_jsonl(run.events, {"time": time.time(), "kind": kind, **fields})


def tail_lines(path: Path, count: int, *, start: int = 0) -> list[str]:
    """The last `count` lines of a log from byte `start` on, without their ends; [] for a missing file, or none."""
    try:
        with reading(path) as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(start, size - (count * 400 + 4096)))
            return stream.read().decode(errors="replace").splitlines()[-count:]
    except (FileNotFoundError, NotPlainFileError):
        return []


def record_process(run: RunDir, name: str) -> None:
    """Called by a process that leads its own group, before anything slow: what `stop` may signal."""
    record = ProcessRecord(name=name, pid=os.getpid(), pgid=os.getpgid(0), started_at=time.time())
    write_json_atomic(run.process(name), record)


# --- liveness -------------------------------------------------------------------------------------------------------


def hold_lock(run: RunDir) -> IO[bytes] | None:
    """Take the supervisor's lock for as long as the returned file stays open; None when another process holds it.

    The kernel releases it when the holder dies, however it dies: it is the truth about whether a run is live.
    """
    run.path.mkdir(parents=True, exist_ok=True)
    stream = appending(run.lock)
    for _ in range(20):  # a reader in is_live() holds it for an instant
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return stream
        except BlockingIOError:
            time.sleep(0.05)
    stream.close()
    return None


def is_live(run: RunDir) -> bool:
    """Is the supervisor of this run alive on this machine?"""
    try:
        stream = reading(run.lock)
    except (FileNotFoundError, NotPlainFileError):  # a pipe in its place: nobody holds that
        return False
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def wait_until_dead(run: RunDir) -> None:
    """Block until no supervisor holds the lock. Without polling: for a thread of its own."""
    with reading(run.lock) as stream:
        fcntl.flock(stream, fcntl.LOCK_SH)


START_WAIT_S = 30.0  # between the launcher's first status and the supervisor's lock


@dataclass(frozen=True)
class Observed:
    """What a run looks like from outside, on its own machine, now."""

    state: State  # "died" when it never reached a final state and nobody supervises it
    exit_code: int | None
    live: bool  # a supervisor holds the lock, or is about to
    status: Status | None  # None for a file that is missing or damaged


def observe(run: RunDir) -> Observed:
    """The lock is read before the status: a supervisor writes its final status before it lets go."""
    live = is_live(run)
    try:
        status = read_status(run)
    except (ValueError, TypeError):  # damaged by something else than us: writes are atomic
        status = None
    if status is None:
        return Observed("starting" if live else "died", None, live, None)
    if status.state in FINAL_STATES:
        return Observed(status.state, status.exit_code, live, status)
    waiting = not run.lock.exists() and time.time() - status.updated_at < START_WAIT_S
    if live or waiting:
        return Observed(status.state, None, True, status)
    return Observed("died", None, False, status)
