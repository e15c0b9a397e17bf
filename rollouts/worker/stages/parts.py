"""What both stages begin with: the process group, data, model and backend, and the checkpoint that is resumed."""

import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollouts import run_dir
from rollouts.config import Config, RLConfig
from rollouts.run_dir import RunDir, append_event
from rollouts.training import distributed, host_files
from rollouts.training.backends.pytorch import PyTorchTrainingBackend
from rollouts.training.loops.train_step import StepsError
from rollouts.training.model_loading import load_tokenizer, tensors_left_out
from rollouts.training.random_state import seed_all
from rollouts.training.seams import Tokenizer
from rollouts.worker.builders import StageName
from rollouts.worker.builders.backend import build_backend, build_retention, stage_settings
from rollouts.worker.builders.data import (
    StageData,
    load_data,
    report_of,
    require_fitting_model,
    rl_steps,
    sft_steps,
)
from rollouts.worker.builders.model import base_model, reference_name
from rollouts.worker.stages.log import StageLog, alarms_of, logged_steps


@dataclass(frozen=True)
class StageParts:
    """What both stages work with."""

    config: Config
    run: RunDir
    stage: StageName
    tokenizer: Tokenizer
    backend: PyTorchTrainingBackend | None  # None where nothing is trained
    num_steps: int
    # what load_checkpoint returned, where this stage resumes its own checkpoint
    resume: Mapping[str, Any] | None
    log: StageLog

    @property
    def pad_token_id(self) -> int:
        pad, end = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        assert end is not None, "load_tokenizer refuses one without"
        return end if pad is None else pad

    @property
    def first_step(self) -> int:
        return self.resume["step"] if self.resume else 0


@contextlib.asynccontextmanager
async def open_parts(
    config: Config, run: RunDir, stage: StageName
) -> AsyncIterator[tuple[StageParts, StageData]]:
    """Yield what the stage trains with, and on; afterwards the backend is closed and the process group left."""
    device = distributed.initialize(
        config.target.device_type,
        timeout_s=config.limits.stage_timeout_s,
        store_file=run.ranks(stage)
        if config.target.hosts == 1
        else None,  # between hosts: torchrun's store
    )
    settings = stage_settings(config, stage)
    seed = settings.sampling.seed if isinstance(settings, RLConfig) else config.data.shuffle_seed
    seed_all(seed + distributed.rank())  # dropout, and what a user's reward or filter draws
    with contextlib.ExitStack() as ends:
        ends.callback(distributed.shutdown)
        model_path, resumes = _start_model(config, run, stage)
        tokenizer = load_tokenizer(model_path, trust_remote_code=config.model.trust_remote_code)
        data = load_data(config, tokenizer, stage)
        steps = (
            rl_steps(settings, data)
            if isinstance(settings, RLConfig)
            else sft_steps(settings, data)
        )
        start = _restart(run, stage) or (Path(model_path) if resumes else None)
        if start is not None:
            require_steps_left(stage, start, steps)
        backend, resume = None, None
        if not (isinstance(settings, RLConfig) and settings.sampling.source == "engine_only"):
            backend = build_backend(
                config,
                stage,
                checkpoint_dir=run.checkpoints / stage,
                model_path=base_model(config, model_path, resumes=resumes),
                tokenizer=tokenizer,
                device=device,
                num_steps=steps
                * (settings.loss.updates_per_batch if isinstance(settings, RLConfig) else 1),
                reference=reference_name(config, stage, model_path, resumes=resumes),
                retention=build_retention(config, run, stage),
            )
            ends.callback(backend.close)
            require_fitting_model(backend.model, data)
            resume = await backend.load_checkpoint(start) if start is not None else None
        log = StageLog(config, run, stage, alarms_of(run, logged_steps(config, stage, steps)))
        parts = StageParts(config, run, stage, tokenizer, backend, steps, resume, log)
        if distributed.rank() == 0:
            _note_start(parts, data)
        yield parts, data


def _note_start(parts: StageParts, data: StageData) -> None:
    notes = [
        report_of(data),
        "" if parts.backend is None else tensors_left_out(parts.backend.model),
    ]
    for note in filter(None, notes):
        append_event(parts.run, "note", message=note)
    append_event(
        parts.run,
        "training_started",
        stage=parts.stage,
        step=parts.first_step,
        steps_total=parts.num_steps,
    )


def _start_model(config: Config, run: RunDir, stage: StageName) -> tuple[str, bool]:
    """Return where this stage's model is, and whether that is a checkpoint of this very stage, to be resumed.

    A checkpoint lies on rank 0's host; every rank calls this, so that other hosts get it.
    """
    before = config.stages[0]
    if stage != before:
        path = (
            run.checkpoints
            / before
            / distributed.on_rank_0(lambda: run.latest_checkpoint(before).resolve().name)
        )
        return str(host_files.spread(path, path)), False
    source = config.output.source_checkpoint
    if source is None:
        return config.model.name, False
    place = host_files.spread(Path(source), run.start / "source")
    metadata = place / "metadata.json"
    resumes = metadata.is_file() and json.loads(metadata.read_text()).get("stage") == stage
    return str(place), resumes


def _restart(run: RunDir, stage: StageName) -> Path | None:
    """Return the stage's own checkpoint, on every rank, that this life of it goes on from; None for the first life."""
    found = distributed.on_rank_0(lambda: run_dir.restart_from(run, stage))
    return None if found is None else host_files.spread(run.path / found, run.path / found)


def require_steps_left(stage: StageName, source: Path, steps: int) -> None:
    """Raise StepsError where the checkpoint that the stage resumes is of its last step, or beyond."""
    done = json.loads((source / "metadata.json").read_text())["step"]
    if done >= steps:
        lengths = "sft.num_iterations or sft.num_epochs" if stage == "sft" else "rl.num_epochs"
        raise StepsError(
            f"{source}: is of {stage} step {done}, and this config's {stage} stage has {steps} steps: no step is left. "
            f"Fix: raise {lengths} to train on, or set output.source_checkpoint=None and model.name={str(source)!r} to "
            "start anew from its weights."
        )
