"""Names inside a run directory: the same on the host and in the mirror here."""

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# died: seen by readers, never written; so is silent, a run of another machine of which nothing is heard
State = Literal["starting", "queued", "running", "done", "failed", "stopped", "died", "silent"]
FINAL_STATES: tuple[State, ...] = ("done", "failed", "stopped", "died")
StageName = Literal["bootstrap", "sft", "rl"]
SMOKE_STAGE: StageName = "bootstrap"  # whose windows try the devices
TRACKER_STAGE = "tracker"  # of the windows that feed trackers, all stages long
EXPERIMENT_NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9_-]{0,47}"  # a tmux session name: no dot, no colon
RUN_ID_VARIABLE = "ROLLOUTS_RUN_ID"
RUN_PATH_VARIABLE = "ROLLOUTS_RUN_PATH"
GPUS_VARIABLE = "ROLLOUTS_GPUS"  # a process's cards by nvidia-smi's index, however CUDA_VISIBLE_DEVICES names them
HOME_VARIABLE = "ROLLOUTS_HOME"  # where a host (or this machine) keeps its rollouts files; ~/.rollouts without it
ROW_FILES = ("metrics.jsonl", "eval.jsonl", "eval_samples.jsonl", "rollouts.jsonl")  # of steps
STREAMED_FILES = (
    "events.jsonl",
    *ROW_FILES,
    "gpu.jsonl",
)  # they only grow; rows are cut where a stage restarts
ENVIRONMENT_GLOB = "code/environment-*.txt"
TRACKER_GLOB = "trackers/*.json"
# small, replaced as a whole
SNAPSHOT_GLOBS = ("status.json", "exit/*.json", ENVIRONMENT_GLOB, TRACKER_GLOB)
LOG_GLOB = "logs/*.log"
SNAPSHOT_BYTES_MAX = 1 << 20
NODES_RUNS = "hosts"  # below a run: what other nodes of its Slurm job have of it


@dataclass(frozen=True)
class RunDir:
    """The names inside one run directory; the same on the host and in the mirror here."""

    path: Path

    @property
    def run_id(self) -> str:
        return self.path.name

    @property
    def real_path(self) -> str:
        """Return it absolute, without links on the way: one spelling of the run's directory, even once removed."""
        return os.path.realpath(self.path)

    @property
    def memory_name(self) -> str:
        """Return the prefix of the run's files in /dev/shm, which all homes of a machine share."""
        return f"{self.run_id}-{hashlib.sha256(os.fsencode(self.real_path)).hexdigest()[:12]}"

    def on_node(self, rank: int) -> "RunDir":
        """Return what another node of the run's Slurm job has of it, 1 and up: nodes share a disk."""
        return RunDir(self.path / NODES_RUNS / str(rank) / self.run_id)

    @property
    def first(self) -> "RunDir":
        """Return the run on its first host, where this is another node's part of it; else itself."""
        top = self.path.parent.parent
        is_part = top.name == NODES_RUNS and top.parent.name == self.run_id
        return RunDir(top.parent) if is_part else self

    def nodes_runs(self) -> "list[RunDir]":
        """Return the parts that other nodes of the run's Slurm job have of it."""
        return [RunDir(path) for path in sorted(self.path.glob(f"{NODES_RUNS}/*/{self.run_id}"))]

    def node(self, rank: int) -> Path:
        """Name what a node of the job tells the others: {"attempt", "name", "values", "error"}."""
        return self.path / "nodes" / f"{rank}.json"

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def submitted_plan(self) -> Path:
        """Name the plan as Slurm got it: plan.json has what the node put in place of its stand-ins."""
        return self.path / "plan-submitted.json"

    @property
    def code(self) -> Path:
        return self.path / "code"

    @property
    def code_tree(self) -> Path:
        return self.code / "tree"

    def environment(self, name: str) -> Path:
        """Name the list of what was installed in this environment ("trainer", "engine"): `name==version` lines."""
        return self.code / f"environment-{name}.txt"

    @property
    def code_manifest(self) -> Path:
        """Name {"digest", "files": {name: {"mode", "size", "sha256"}}}: what code/tree has to be at a launch."""
        return self.code / "manifest.json"

    @property
    def code_package(self) -> Path:
        """rollouts itself, where the repository in code/tree is not a clone of it."""
        return self.code / "package"

    @property
    def package_manifest(self) -> Path:
        """{"version", "digest", "files"}: what code/package has to be; missing where code/tree is a clone."""
        return self.code / "manifest-package.json"

    @property
    def secrets(self) -> Path:
        """Name {"inherited": the launcher's environment, "secrets", "engine_keys": {NAME: value}}; 0600, transient.

        Where the machine has a tmpfs it is a link to `secrets_in_memory`, which no reboot outlives.
        """
        return self.path / "secrets.json"

    @property
    def secrets_in_memory(self) -> Path:
        # known when the directory is gone, too
        name = hashlib.sha256(os.fsencode(self.path)).hexdigest()[:16]
        return Path("/dev/shm") / f"rollouts-secrets-{os.getuid()}-{name}" / "secrets.json"

    @property
    def reserve(self) -> Path:
        """Name the file whose room is given up when the disk is full, so that the run's end can still be written."""
        return self.path / ".reserve.tmp"

    @property
    def launch(self) -> Path:
        """Name {"launch_id", "host"}: which `deploy` started the run, and on which machine (`host_identity`)."""
        return self.path / "launch.json"

    @property
    def slurm_job(self) -> Path:
        """Name the record of the job in which Slurm runs it (`SlurmJob`); missing for any other run."""
        return self.first.path / "slurm.json"

    @property
    def restarts(self) -> Path:
        """Name [{"stage", "step", "checkpoint", "kept"}, …]: where stages whose trainer died went on (`Restart`)."""
        return self.path / "restarts.json"

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
    def gpu(self) -> Path:
        """Name the file of how busy the run's GPUs and processes were, a sample a line."""
        return self.path / "gpu.jsonl"

    @property
    def eval(self) -> Path:
        return self.path / "eval.jsonl"

    @property
    def eval_samples(self) -> Path:
        """Name the file of answers to held-out rows, one a line."""
        return self.path / "eval_samples.jsonl"

    def tracker(self, kind: str) -> Path:
        """Name {"project", "place", "key", "name", "steps"}: how far a tracker is (`rollouts.view.tracker_cursor`)."""
        return self.path / "trackers" / f"{kind}.json"

    @property
    def trackers_end(self) -> Path:
        """Name the file that asks the run's trackers to end. It holds the state that the run ends in."""
        return self.path / ".trackers-end.tmp"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def start(self) -> Path:
        """Name the directory of what the run starts from, where that was brought there."""
        return self.path / "start"

    @property
    def weights(self) -> Path:
        """Name the directory of weights on their way to the engines; rewritten at every sync, never pulled."""
        return self.path / "weights"

    @property
    def weights_in_memory(self) -> Path:
        """Name the same on tmpfs (engine.weight_sync.on_tmpfs). Removed by the trainer, else by `remove_transient`."""
        return Path("/dev/shm") / f"rollouts-{self.memory_name}-weights"

    def buckets_in_memory(self) -> list[Path]:
        """Name the files that hold weights on their way to the engines (engine.weight_sync=TensorSync)."""
        return list(Path("/dev/shm").glob(f"rollouts-bucket-{self.memory_name}-{'[0-9a-f]' * 32}"))

    def log(self, window: str) -> Path:
        return self.path / "logs" / f"{window}.log"

    def exit(self, stage: str, window: str) -> Path:
        return self.path / "exit" / f"{stage}-{window}.json"

    def rendezvous(self, stage: str) -> Path:
        """Name where torchrun's agent keeps its state. Hidden, like `ranks`: not results, so not pulled."""
        return self.path / f".rendezvous-{stage}.tmp"

    def ranks(self, stage: str) -> Path:
        """Name where the trainer's ranks find each other."""
        return self.path / f".ranks-{stage}.tmp"

    @property
    def heeds_stop(self) -> Path:
        """Name the file that is there while the stage's steps run: asked to stop, they save a checkpoint first."""
        return self.path / ".heeds-stop.tmp"

    @property
    def stop_asked(self) -> Path:
        """Name the file by which `deploy stop` asks for that; before the launch, for no launch at all."""
        return self.path / ".stop-asked.tmp"

    def smoke_report(self, window: str) -> Path:
        """Name a smoke test's progress: {"doing", "parts": {name: seconds}}. Hidden, and gone with the run."""
        return self.path / f".smoke-{window}.tmp"

    def process(self, name: str) -> Path:
        return self.path / "processes" / f"{name}.json"

    def latest_checkpoint(self, stage: str) -> Path:
        """Name the relative symlink to the newest completed checkpoint of the stage."""
        return self.checkpoints / stage / "latest"


def home_dir() -> Path:
    """Return this machine's rollouts home."""
    return Path(os.environ.get(HOME_VARIABLE) or "~/.rollouts").expanduser()


def machine_dir(name: str) -> Path:
    """Return where this machine keeps how to reach a rented one: `ssh_config`, and its pinned key in `known_hosts`."""
    return home_dir() / "cloud" / "machines" / name


def run_path(home: str | os.PathLike[str], run_id: str) -> Path:
    return Path(home) / "runs" / run_id


def life_name(window: str, life: int) -> str:
    """Return the name of the exit record of an engine's earlier life: "engine-0.life-1"."""
    return f"{window}.life-{life}"


def valid_run_id(run_id: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,79}", run_id) is not None
