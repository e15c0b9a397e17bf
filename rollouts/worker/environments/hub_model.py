"""Models of the hub, downloaded before any engine's time limit counts them. Standard library only."""

import dataclasses
import os
import time

from rollouts import run_dir
from rollouts.run_dir import EnvironmentSpec, HubModel, RunDir
from rollouts.worker.environments.installer import (
    BootstrapDeadline,
    BootstrapError,
    InstallerFailed,
    Progress,
    run_installer,
)


def fetch_model(
    model: HubModel, trainer: EnvironmentSpec, run: RunDir, deadline: BootstrapDeadline
) -> None:
    """Have a model in this host's cache of the hub, by the trainer's environment.

    Raises BootstrapError where the hub does not give it, or when the deadline passes; and whatever its `tick` raises.
    """
    started = time.monotonic()
    spec = dataclasses.replace(trainer, name=f"model {model.name}")
    options = [] if model.weights else ["--no-weights"]
    argv = [f"{trainer.path}/bin/python", "-m", "rollouts.worker.trainer_hub", model.name, *options]
    progress = Progress(run, spec)
    progress.doing = "asking the hub"
    with open(os.devnull, "rb") as nothing:  # the hub's own locks keep two runs apart
        try:
            run_installer(
                argv, spec, deadline, progress, environment=os.environ, lock=nothing.fileno()
            )
        except InstallerFailed as error:
            said = [
                line.removeprefix("error: ")
                for line in error.log_tail
                if line.startswith("error: ")
            ]
            raise BootstrapError(said[-1] if said else str(error), error.log_tail) from None
    run_dir.append_event(
        run, "model", name=model.name, seconds=round(time.monotonic() - started, 3)
    )
