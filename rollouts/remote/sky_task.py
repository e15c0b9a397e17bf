"""`deploy CONFIG --sky FILE`: the run as a task of SkyPilot, which `sky launch FILE` starts on a cloud or Kubernetes.

The task starts the same run on its machine, as `deploy CONFIG` does there; from here it is followed as any run of a
host. SkyPilot is not needed to write it.
"""

import json
import os
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from rollouts.config import Config
from rollouts.remote.commands import new_run_id
from rollouts.remote.errors import DeployError, Problem
from rollouts.remote.git import list_files
from rollouts.remote.local_faults import as_deploy_errors
from rollouts.remote.package import installed, is_clone
from rollouts.remote.plan.slurm_options import gpus_needed
from rollouts.remote.read_config import read_variants
from rollouts.remote.repository import find_repository, refuse_stray_config
from rollouts.view.answer import Answer

VENV = "~/.rollouts-deploy"
_TOOLS = (
    "command -v tmux >/dev/null && command -v rsync >/dev/null ||"
    " { sudo apt-get update -q && sudo apt-get install -qy tmux rsync; }"
)
# SkyPilot may send the files without their repository, and what runs is what git lists
_GIT = (
    "git rev-parse HEAD >/dev/null 2>&1 || { git init -q && git add -A &&"
    " git -c user.name=sky -c user.email=sky@localhost commit -qm 'as SkyPilot sent it'; }"
)


def write_task(
    config_path: str, file: Path, settings: Sequence[str], run_id: str | None, *, alone: bool
) -> Answer:
    """Write the task of a run; return how it is started. `alone`: no option says where or how else it would run.

    Raises DeployError.
    """
    with as_deploy_errors():
        found = read_variants(config_path, settings)
        root = find_repository(Path.cwd())
        refuse_stray_config(root, Path(config_path))
        config, files = found[0].config, list_files(root)
        inside = os.path.relpath(Path(config_path).resolve(), root)
        problems = tuple(task_problems(config, runs=len(found), alone=alone))
        if inside not in files:
            fix = "put it where git lists it (`git ls-files --others --exclude-standard` too)"
            sent = Problem(f"{config_path}: SkyPilot does not send what git ignores.", fix=fix)
            problems = (*problems, sent)
        if problems:
            raise DeployError.of(problems)
        name = run_id or new_run_id(config)
        version = "" if is_clone(files) else installed().version
        file.write_text(task_text(config, name, inside, settings, root=root, version=version))
    secrets = "".join(f" --secret {secret}" for secret in config.host.secrets)
    cluster, place = shlex.quote(name), shlex.quote(str(file))
    text = (
        f"{file}: a task for SkyPilot\n"
        f"  start    sky launch -c {cluster}{secrets} {place}\n"
        f"  follow   deploy attach {name} --remote {name}\n"
        f"  end      sky down {cluster}, once the results are here"
    )
    return Answer({"run_id": name, "file": str(file), "secrets": config.host.secrets}, text)


def task_problems(config: Config, *, runs: int, alone: bool) -> Iterator[Problem]:
    """List what keeps a run from being a task."""
    if not alone:
        yield Problem(
            "--sky writes a task, which SkyPilot starts.",
            fix="leave out --remote, --hosts, --slurm, --wait, --queue, --busy-ok, --plan and --detach",
        )
    if runs > 1:
        yield Problem(
            f"--sky writes one run, and --set asks for {runs}.", fix="name one value a field"
        )
    if config.job_hosts > 1:
        yield Problem(
            f"the config asks for {config.job_hosts} hosts, and a task is one machine's.",
            fix="have SkyPilot make the machines (`sky launch --num-nodes`), and name them:"
            " deploy CONFIG --remote CLUSTER --remote CLUSTER-worker1",
        )
    if gpus_needed(config) and not (config.provision and config.provision.gpu_types):
        yield Problem(
            "the config does not say which GPUs SkyPilot is to ask for.",
            found=f"target.device_type={config.target.device_type!r}, and no provision.gpu_types",
            needed='provision=ProvisionConfig(gpu_types=["H100"], …), in SkyPilot\'s names',
        )


def task_text(
    config: Config,
    run_id: str,
    config_path: str,
    settings: Sequence[str],
    *,
    root: Path,
    version: str,
) -> str:
    """Return the task's YAML. `version`: of rollouts, which the machine installs; "" for a clone of it."""
    words = [config_path, "--run-id", run_id]
    words += [word for setting in (*settings, "provision=None") for word in ("--set", setting)]
    package = f"'rollouts=={version}'" if version else "."
    lines = [
        f"name: {json.dumps(run_id)}",
        "resources:",
        *_resources(config),
        "num_nodes: 1",
        f"workdir: {json.dumps(str(root))}",
    ]
    if config.host.secrets:  # `sky launch --secret NAME` gives their values
        lines += ["secrets:", *(f"  {name}: null" for name in config.host.secrets)]
    return "\n".join(
        [
            *lines,
            "setup: |",
            f"  {_TOOLS}",
            f"  python3 -m venv {VENV} && {VENV}/bin/pip install -q {package}",
            "run: |",
            f"  {_GIT}",
            f"  {VENV}/bin/deploy {shlex.join(words)}",
            "",
        ]
    )


def _resources(config: Config) -> list[str]:
    wanted = config.provision
    if count := gpus_needed(config):
        assert wanted is not None, "task_problems"
        kinds = json.dumps([f"{kind}:{max(count, wanted.gpus)}" for kind in wanted.gpu_types])
        lines = [f"  accelerators: {kinds}"]
    else:
        lines = ["  cpus: 4+"]
    if wanted is not None:
        lines += [f"  disk_size: {wanted.disk_gib}", f"  use_spot: {json.dumps(wanted.spot)}"]
    return lines
