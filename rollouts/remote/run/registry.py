"""What this machine knows of its runs: an entry each, and beside it the record that a launch uses.

`<home>/registry/<run_id>.json` is the entry, `<run_id>.seen` what its host said of it last. `<run_id>.<launch_id>/` is
the record of a run that was started here: its config, its plan, what code that was. It is written before anything is
touched, so that a deploy that was killed can go on, and never from what came from a host: the mirror holds copies for
people. No secrets are in it, but the key by which the supervisors of one run on several hosts know each other.
"""

import contextlib
import dataclasses
import json
import secrets
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rollouts.plain_files import read_plain
from rollouts.remote.errors import DeployError
from rollouts.remote.run.mirror_files import make_mirror, replace, write_new
from rollouts.remote.run.tags import drop_tags
from rollouts.run_dir import (
    LaunchPlan,
    RunDir,
    home_dir,
    iter_jsonl,
    valid_run_id,
    write_json_atomic,
    write_text_atomic,
)

if TYPE_CHECKING:  # slow to import, and `deploy ls` needs neither
    from rollouts.config import Config
    from rollouts.remote.plan import Plan

STOP_GRACE_MAX_S = 3600.0  # of a plan that a host wrote
LAUNCHED, REASON, INTERRUPTED = "launched", "not_launched.txt", "interrupted.txt"
STOP, STOP_EVENT = "stop-asked", "stop_asked"
# of a run on several hosts: mirrors of the others; by what they know each other
HOSTS, GROUP_KEY = "hosts", "group-key"
# of a run that goes on from another's checkpoint: place.py, resumable.py
START, BEGINS = "start.json", "begins"


@dataclass(frozen=True, kw_only=True)
class RunEntry:
    """<home>/registry/<run_id>.json"""

    run_id: str
    experiment_name: str
    target: str  # "local", or what --remote said
    home: str  # the host's rollouts home
    run_path: str  # on the host
    local_dir: str  # the mirror here
    repository: str  # whose code runs
    created_at: float
    adopted: bool = False  # started on another machine: never launched from here
    resumed_from: dict[str, Any] | None = (
        None  # {run_id, stage, step, checkpoint} of the run that it goes on from
    )
    launch_id: str = (
        ""  # tells this deploy's run from another's of the same name; names the record too
    )
    # {target, home, run_path} of more hosts
    others: list[dict[str, str]] = dataclasses.field(default_factory=list)
    rank: int = 0  # of the host that this is about: `on`

    def on(self, rank: int) -> "RunEntry":
        """Return this run as the host `rank` has it, 1 and up, with a mirror of its own below this one's."""
        there, local_dir = self.others[rank - 1], f"{self.local_dir}/{HOSTS}/{rank}"
        own = dataclasses.replace(self, local_dir=local_dir, others=[], rank=rank)
        return dataclasses.replace(
            own, target=there["target"], home=there["home"], run_path=there["run_path"]
        )

    @property
    def mirror(self) -> RunDir:
        return RunDir(Path(self.local_dir))

    @property
    def seen(self) -> Path:
        """Return the file of what its host said of it last, by `last_seen.note_seen`."""
        return home_dir() / "registry" / f"{self.run_id}.seen"

    @property
    def record(self) -> RunDir:
        """Return this machine's own config, plan and code record of the run: all that a launch uses."""
        return RunDir(home_dir() / "registry" / f"{self.run_id}.{self.launch_id or 'none'}")

    @property
    def launch(self) -> LaunchPlan:
        """Return the recorded plan. Raises FileNotFoundError, KeyError or TypeError for none of this version."""
        return LaunchPlan.from_json(json.loads(self.plan_text))

    @property
    def plan_text(self) -> str:
        """Return the recorded plan, this host's of several, as it is sent there."""
        file = self.record.path / f"plan-{self.rank}.json" if self.rank else self.record.plan
        return read_plain(file).decode()

    @property
    def group_key(self) -> str:
        """Return the key by which supervisors of several hosts know each other."""
        return read_plain(self.record.path / GROUP_KEY).decode()

    @property
    def stop_grace_s(self) -> float | None:
        """Return its plan's grace, whichever version of this program wrote it: a live run may be older."""
        for run in (self.record, self.mirror):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                return min(
                    STOP_GRACE_MAX_S,
                    max(0.0, float(json.loads(read_plain(run.plan))["stop_grace_s"])),
                )
        return None

    @property
    def was_launched(self) -> bool:
        """Return whether a launch from here succeeded once."""
        return (self.record.path / LAUNCHED).exists()

    @property
    def interrupted(self) -> str:
        """Return why its machine is gone for good; "" for a run whose machine is there, as far as is known here."""
        try:
            return read_plain(self.record.path / INTERRUPTED).decode(errors="replace")
        except FileNotFoundError:
            return ""

    @property
    def stop_asked(self) -> bool:
        """Return whether somebody asked for the run's end, here, or on its host as far as its events are here."""
        return (self.record.path / STOP).exists() or any(
            row.get("kind") == STOP_EVENT
            for row in iter_jsonl(self.mirror.events, having=STOP_EVENT.encode())
        )

    @property
    def reason(self) -> str:
        """Return why the launch failed; "" if it did not, or was not tried."""
        try:
            return read_plain(self.record.path / REASON).decode(errors="replace")
        except FileNotFoundError:
            return ""


def registry_dir() -> Path:
    """Return this machine's registry, for its user alone."""
    path = home_dir() / "registry"
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        path.chmod(0o700)
    return path


def register(
    plan: "Plan",
    config: "Config",
    repository: Path,
    record: dict[str, str],
    *,
    now: float,
    resumed_from: dict[str, Any] | None = None,
    others: "Sequence[Plan]" = (),
) -> RunEntry:
    """Write the record, then the entry, then the mirror's copies. Raises DeployError for a run id that is taken.

    `others`: the plans of the hosts beside the first.
    """
    assert plan.launch is not None and not plan.problems
    entry = RunEntry(
        run_id=plan.run_id,
        experiment_name=config.output.experiment_name,
        target=plan.target,
        home=plan.launch.home,
        run_path=plan.launch.run_path,
        local_dir=plan.local_dir,
        repository=str(repository),
        created_at=now,
        launch_id=secrets.token_hex(8),
        resumed_from=resumed_from,
        others=[
            {"target": other.target, "home": other.launch.home, "run_path": other.launch.run_path}
            for other in others
            if other.launch is not None
        ],
    )
    registry_dir()
    entry.record.path.mkdir(mode=0o700)
    write_json_atomic(entry.record.config, config.to_json())
    write_json_atomic(entry.record.plan, plan.launch.to_json())
    for rank, other in enumerate(others, 1):
        write_json_atomic(
            entry.record.path / f"plan-{rank}.json",
            other.launch.to_json() if other.launch else None,
        )
    if others:
        write_text_atomic(entry.record.path / GROUP_KEY, secrets.token_urlsafe(32), mode=0o600)
    write_code_record(entry.record, record)
    _claim(entry)
    try:
        fill_mirror(entry)
    except BaseException:
        forget(entry)
        raise
    return entry


def write_code_record(run: RunDir, record: dict[str, str]) -> None:
    for name, text in record.items():
        write_text_atomic(run.path / name, text)


def fill_mirror(entry: RunEntry) -> None:
    """Copy the record, for people, to where the results will be."""
    make_mirror(entry.mirror.path)
    for file in sorted(entry.record.path.rglob("*")):
        name = file.relative_to(entry.record.path).as_posix()
        if file.is_file() and name.split("/")[0] not in (
            LAUNCHED,
            REASON,
            INTERRUPTED,
            STOP,
            START,
            BEGINS,
            GROUP_KEY,
        ):
            replace(entry.mirror.path, name, read_plain(file))


def _claim(entry: RunEntry) -> None:
    """Give the entry its name, unless another deploy was faster."""
    text = json.dumps(dataclasses.asdict(entry), indent=1) + "\n"
    try:
        write_new(_file(entry.run_id), text)
    except FileExistsError:
        forget_record(entry)
        raise DeployError(
            f"the run id {entry.run_id!r} is in use here: another deploy has just taken it.",
            fix="choose another --run-id, or leave it out",
        ) from None


def save(entry: RunEntry) -> None:
    registry_dir()
    write_json_atomic(_file(entry.run_id), entry, mode=0o600)


def forget(entry: RunEntry) -> None:
    """Drop what this machine knows of a run: entry and record. The host, and the results here, stay as they are."""
    _file(entry.run_id).unlink(missing_ok=True)
    entry.seen.unlink(missing_ok=True)
    forget_record(entry)
    drop_tags(entry.run_id)


def forget_record(entry: RunEntry) -> None:
    if entry.launch_id and entry.record.path.is_dir():
        for file in sorted(entry.record.path.rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
        entry.record.path.rmdir()


def mark_launched(entry: RunEntry) -> None:
    """Record the launch: from now on a run that is not on its host is gone, not yet to come."""
    if entry.launch_id:
        (entry.record.path / LAUNCHED).touch(mode=0o600)
        (entry.record.path / REASON).unlink(missing_ok=True)


def note_interrupted(entry: RunEntry, why: str) -> None:
    """Record that the run's machine is gone for good: it does not go on there, and nobody can ask it."""
    if entry.launch_id and entry.record.path.is_dir():
        write_text_atomic(entry.record.path / INTERRUPTED, why, mode=0o600)


def note_stop_asked(entry: RunEntry) -> None:
    """Record that the run is to end: it is not to go on on another machine, whatever becomes of the stop itself."""
    if entry.launch_id and entry.record.path.is_dir():
        (entry.record.path / STOP).touch(mode=0o600)


def withdraw_stop(entry: RunEntry) -> None:
    """Let a stop that came before the launch count no more."""
    (entry.record.path / STOP).unlink(missing_ok=True)


def note_reason(entry: RunEntry, text: str) -> None:
    """Record in one line why it was not launched, for `deploy ls`."""
    if entry.launch_id and entry.record.path.is_dir():
        line = "; ".join(part.strip() for part in text.splitlines() if part.strip())
        write_text_atomic(entry.record.path / REASON, line, mode=0o600)


def planned(entry: RunEntry) -> "Config":
    """Return the config recorded here for a launch. Raises DeployError if it may not, or cannot, be launched."""
    if entry.adopted:
        raise DeployError(
            f"{entry.run_id} was started elsewhere, and is launched from there alone.",
            needed="a config, a plan and names of secrets that this machine recorded itself",
            fix="start it there; from here it can be followed, stopped and pulled",
        )
    from rollouts.config import Config, ConfigError

    try:
        config, _ = Config.load(entry.record.config), entry.launch
    except (ConfigError, TypeError, KeyError, ValueError, OSError) as error:
        raise DeployError(
            f"{entry.run_id} was never launched, and another version of this program planned it.",
            found=str(error),
            fix=f"start it anew: deploy CONFIG; `deploy forget {entry.run_id}` drops this one",
        ) from None
    return config


def find(run_id: str) -> RunEntry | None:
    """Return the run of exactly that name. Raises DeployError for an entry that cannot be read."""
    if not valid_run_id(run_id):
        return None
    file = _file(run_id)
    try:
        return _read(file)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, AttributeError) as error:
        raise DeployError(
            f"this machine's record of {run_id} is damaged: {file}",
            found=str(error),
            fix=f"move that file away; `deploy attach {run_id} --remote HOST` finds the run on its host",
        ) from None


def is_known(run_id: str) -> bool:
    """Return whether this machine has an entry of exactly that name."""
    return _file(run_id).exists()


def run_ids() -> list[str]:
    """Return the names of the runs known here, oldest first; no entry is read."""
    return [file.stem for file in _files()]


def entries() -> list[RunEntry]:
    """Return every run known here, oldest first, but for damaged entries: `all_entries` names them too."""
    return all_entries()[0]


def all_entries() -> tuple[list[RunEntry], list[Path]]:
    """Return every run known here, oldest first, and the files of damaged entries."""
    found, damaged = [], []
    for file in _files():
        try:
            found.append(_read(file))
        except FileNotFoundError:
            continue
        except (OSError, ValueError, TypeError, AttributeError):
            damaged.append(file)
    return found, damaged


def _files() -> list[Path]:
    """Return the entries' files by when this machine wrote them: the times inside may be a host's.

    One that is removed meanwhile, or a link that leads nowhere, is left out.
    """
    times: dict[Path, float] = {}
    for file in (home_dir() / "registry").glob("[!.]*.json"):
        with contextlib.suppress(OSError):
            times[file] = file.stat().st_mtime
    return sorted(times, key=lambda file: times[file])


def _read(file: Path) -> RunEntry:
    """Read an entry; fields of a later version are ignored. Raises ValueError or TypeError for a damaged one."""
    data: dict[str, Any] = json.loads(read_plain(file))
    names = {field.name for field in dataclasses.fields(RunEntry)}
    entry = RunEntry(**{name: value for name, value in data.items() if name in names})
    texts = ("run_id", "experiment_name", "target", "home", "run_path", "local_dir")
    if not all(isinstance(getattr(entry, name), str) for name in texts) or not valid_run_id(
        entry.run_id
    ):
        raise ValueError("a field has the wrong type")
    kinds = ("target", "home", "run_path")
    if not all(
        isinstance(other, dict) and all(isinstance(other.get(k), str) for k in kinds)
        for other in entry.others
    ):
        raise ValueError("others: a host has the wrong form")
    if not isinstance(entry.created_at, (int, float)):
        raise ValueError("created_at is not a number")
    return entry


def _file(run_id: str) -> Path:
    return home_dir() / "registry" / f"{run_id}.json"
