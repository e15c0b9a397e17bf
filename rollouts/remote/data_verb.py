"""`deploy data CONFIG`: the first rows of each mixture as the model will see them, made by a process of the library."""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from rollouts.remote.errors import DeployError
from rollouts.remote.read_config import read_config
from rollouts.remote.repository import find_repository
from rollouts.view.answer import Answer
from rollouts.view.samples import mixtures_text

NEEDED = ("transformers", "datasets")  # packages; torch is not among them
MODULE = "rollouts.worker.data_preview"


def show_data(config_path: str, *, rows: int) -> Answer:
    """Read and render all rows of a config on this machine. Raises DeployError."""
    config = read_config(config_path)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise DeployError(
            f"rows are read and rendered by {' and '.join(NEEDED)}; missing here: {', '.join(missing)}.",
            fix="pip install 'rollouts[data]' (no torch)",
        )
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "config.json"
        config.save(path)
        done = subprocess.run(
            [sys.executable, "-P", "-m", MODULE, str(path), "--rows", str(rows)],
            cwd=find_repository(Path.cwd()),  # data and models are named from there; -P: its modules hide none of ours
            env={**os.environ, **config.host.env},
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        said = [line.removeprefix("error: ") for line in done.stderr.splitlines() if line.startswith("error: ")]
        raise DeployError(said[-1] if said else f"{MODULE} failed: {done.stderr[-2000:]}")
    mixtures = json.loads(done.stdout)
    return Answer(mixtures, mixtures_text(mixtures))
