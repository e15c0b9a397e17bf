"""What this machine knows of the runs it started: one small file each, written before anything is touched.

With the mirror's config.json and plan.json, written at the same time, it is enough to go on after a kill at any
moment. No secrets are in it.
"""

import json
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from base_config import Config
from rollouts.remote.plan import Plan
from rollouts.run_dir import LaunchPlan, RunDir, home_dir, read_plan, write_json_atomic, write_text_atomic


@dataclass(frozen=True, kw_only=True)
class Entry:
    """<home>/registry/<run_id>.json"""

    run_id: str
    experiment_name: str
    target: str  # "local", or what --remote said
    home: str  # the host's rollouts home
    run_path: str  # on the host
    local_dir: str  # the mirror here
    repository: str  # whose code runs
    created_at: float
    launch_id: str = ""  # goes along with the launch: tells this deploy's run from another's of the same name

    @property
    def mirror(self) -> RunDir:
        return RunDir(Path(self.local_dir))

    @property
    def launch(self) -> LaunchPlan | None:
        return read_plan(self.mirror)

    @property
    def stop_grace_s(self) -> float | None:
        """Of its plan, whichever version of this program wrote that: a live run may be older than we are."""
        try:
            return float(json.loads(self.mirror.plan.read_text())["stop_grace_s"])
        except FileNotFoundError:
            return None


def register(plan: Plan, config: Config, repository: Path, record: dict[str, str], *, now: float) -> Entry:
    """Write the mirror's config, plan and code record, then the entry."""
    assert plan.launch is not None and not plan.problems
    mirror = RunDir(Path(plan.local_dir))
    # Ignored by git wherever it lies: results are no code, and would go along with the next run
    write_text_atomic(mirror.path / ".gitignore", "*\n")
    write_json_atomic(mirror.config, config.to_json())
    write_json_atomic(mirror.plan, plan.launch)
    for name, text in record.items():
        write_text_atomic(mirror.path / name, text)
    entry = Entry(
        run_id=plan.run_id,
        experiment_name=config.output.experiment_name,
        target=plan.target,
        home=plan.launch.home,
        run_path=plan.launch.run_path,
        local_dir=plan.local_dir,
        repository=str(repository),
        created_at=now,
        launch_id=secrets.token_hex(8),
    )
    save(entry)
    return entry


def save(entry: Entry) -> None:
    write_json_atomic(_file(entry.run_id), entry)


def find(run_id: str) -> Entry | None:
    try:
        return Entry(**json.loads(_file(run_id).read_text()))
    except FileNotFoundError:
        return None


def entries() -> Iterator[Entry]:
    """Every run started here, oldest first."""
    files = sorted((home_dir() / "registry").glob("*.json"), key=lambda file: file.stat().st_mtime)
    for file in files:
        yield Entry(**json.loads(file.read_text()))


def _file(run_id: str) -> Path:
    return home_dir() / "registry" / f"{run_id}.json"
