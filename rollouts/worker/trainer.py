"""torchrun's entry: config.json → `trainer_data`, `trainer_wiring`, `trainer_job`, `trainer_answers` → loops.

These five alone see both the whole config and the library.

    torchrun -m rollouts.worker.trainer --run-dir RUN_DIRECTORY --stage sft|rl [--engine-url URL ...] [--router-url URL]

Every rank runs this. Rank 0 writes metrics, evaluations, samples and events into the run directory, and talks to the
engines. A mistake of the user's ends it with one `error:` line and exit code 1; ours with a traceback.
"""

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rollouts.config import CISPO, PPO, Config, EngineConfig, RLConfig, SFTConfig
from rollouts.engines.keys import read_keys
from rollouts.run_dir import FULL_DISK, RunDir, append_event, record_process
from rollouts.worker.trainer_answers import answers, rl_evaluation, rows_in_process
from rollouts.worker.trainer_data import (
    Data,
    load_data,
    report_of,
    require_fitting_model,
    rl_steps,
    sft_seed,
    sft_steps,
)
from rollouts.worker.trainer_job import Job, alarms_of, logged_steps, metrics_of
from rollouts.worker.trainer_wiring import (
    base_model,
    build_backend,
    generate_fn,
    reference_name,
    retention,
    rl_training_config,
    weight_sync,
)

if TYPE_CHECKING:
    from rollouts.training.backends.pytorch import PyTorchTrainingBackend
    from rollouts.training.metrics import MetricsLogger
    from rollouts.training.weight_sync import SGLangEngine

logger = logging.getLogger("rollouts.trainer")


def main() -> int:
    parser = argparse.ArgumentParser(description="The trainer of one stage; torchrun starts it on every rank.")
    parser.add_argument("--run-dir", required=True, type=Path, help="the run directory")
    parser.add_argument("--stage", required=True, choices=("sft", "rl"))
    parser.add_argument("--engine-url", action="append", default=[], help="an inference server; rl needs at least one")
    parser.add_argument("--router-url", help="SGLang's router in front of them, through which they get their requests")
    arguments = parser.parse_args()
    run = RunDir(arguments.run_dir)
    record_process(run, f"{arguments.stage}-trainer-rank{_rank()}")
    config = Config.load(run.config)
    logging.basicConfig(level=config.output.log_level, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it has a line per request, at INFO
    import anyio

    from rollouts.training import open_files

    open_files.allow_all()  # a connection for each request under way
    with _mistakes_in_one_line(run):
        urls = Urls(arguments.engine_url, arguments.router_url)
        anyio.run(_train, config, run, arguments.stage, urls)
    return 0


@dataclass(frozen=True)
class Urls:
    """Where inference servers answer."""

    engines: Sequence[str]  # the replicas
    router: str | None  # in front of them


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


@contextlib.contextmanager
def _mistakes_in_one_line(run: RunDir) -> Iterator[None]:
    """What a user can mend becomes an `error:` line and an event; anything else is ours, and keeps its traceback."""
    from rollouts.agents.episode import AgentError
    from rollouts.training.checkpoint import CheckpointError
    from rollouts.training.datasets.rows import DataError
    from rollouts.training.devices import DeviceError
    from rollouts.training.loops.common import StepsError
    from rollouts.training.model_loading import ModelError
    from rollouts.training.rewards import RewardError
    from rollouts.training.rollout_gen.async_rollout_manager import RolloutError
    from rollouts.training.weight_sync import EngineError

    from_user = (StepsError, DataError, RewardError, AgentError, RolloutError)
    mistakes = (*from_user, CheckpointError, DeviceError, EngineError, ModelError, FloatingPointError)
    try:
        yield
    except mistakes as error:
        _tell(run, str(error))
        sys.exit(1)
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        _tell(run, f"no space left on device: {error.filename or run.path}")
        sys.exit(1)


def _tell(run: RunDir, message: str) -> None:
    """Say it in the log, and as the event that the supervisor takes the run's message from."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    if _rank() == 0:
        with contextlib.suppress(OSError):  # a full disk: the supervisor reads the log
            append_event(run, "error", message=message, window="trainer", log_tail=[])


async def _train(config: Config, run: RunDir, stage: str, urls: Urls) -> None:
    import torch

    from rollouts.training import distributed
    from rollouts.training.model_loading import load_tokenizer, tensors_left_out

    limit_s = config.limits.stage_timeout_s
    device = distributed.initialize(config.target.device_type, timeout_s=limit_s, store_file=run.ranks(stage))
    torch.manual_seed(
        (config.rl.sampling.seed if stage == "rl" and config.rl else config.data.shuffle_seed) + _rank()
    )  # dropout
    with contextlib.ExitStack() as ends:
        ends.callback(distributed.shutdown)
        model_path, resumes = _start(config, run, stage)
        tokenizer = load_tokenizer(model_path, trust_remote_code=config.model.trust_remote_code)
        data = load_data(config, tokenizer, stage)
        steps = sft_steps(config, data) if stage == "sft" else rl_steps(config, data)
        if resumes:
            _check_left(stage, Path(model_path), steps)
        backend, resume = None, None
        if stage == "sft" or (config.rl and config.rl.sampling.source != "engine_only"):
            backend = build_backend(
                config,
                stage,
                checkpoint_dir=run.checkpoints / stage,
                model_path=base_model(config, model_path, resumes=resumes),
                tokenizer=tokenizer,
                device=device,
                num_steps=steps * (config.rl.loss.updates_per_batch if stage == "rl" and config.rl else 1),
                reference=reference_name(config, stage, model_path, resumes=resumes),
                retention=retention(config, run, stage),
            )
            ends.callback(backend.close)
            require_fitting_model(backend.model, data)
            resume = await backend.load_checkpoint(model_path) if resumes else None
        pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        alarms = alarms_of(run, logged_steps(config, stage, steps))
        job = Job(config, run, stage, tokenizer, backend, steps, resume, pad_token_id, alarms)
        if _rank() == 0:
            notes = [report_of(data), "" if backend is None else tensors_left_out(backend.model)]
            for note in filter(None, notes):
                append_event(run, "note", message=note)
            append_event(run, "training_started", stage=stage, step=job.first_step, steps_total=steps)
        await (train_sft(job, data) if stage == "sft" else train_rl(job, data, urls))


def _start(config: Config, run: RunDir, stage: str) -> tuple[str, bool]:
    """Where this stage's model comes from, and whether that is a checkpoint of this very stage, to be resumed."""
    if stage != config.stages[0]:
        return str(run.latest_checkpoint(config.stages[0]).resolve()), False
    source = config.output.source_checkpoint
    if source is None:
        return config.model.name, False
    metadata = Path(source) / "metadata.json"
    resumes = metadata.is_file() and json.loads(metadata.read_text()).get("stage") == stage
    return source, resumes


def _check_left(stage: str, source: Path, steps: int) -> None:
    """Raise StepsError where the checkpoint that the stage goes on from is of its last step, or beyond."""
    from rollouts.training.loops.common import StepsError

    done = json.loads((source / "metadata.json").read_text())["step"]
    if done >= steps:
        lengths = "sft.num_iterations or sft.num_epochs" if stage == "sft" else "rl.num_epochs"
        raise StepsError(
            f"{source}: is of {stage} step {done}, and this config's {stage} stage has {steps} steps: no step is left. "
            f"Fix: raise {lengths} to train on, or set output.source_checkpoint=None and model.name={str(source)!r} to "
            "start anew from its weights."
        )


# --- stages ---------------------------------------------------------------------------------------------------------


async def train_sft(job: Job, data: Data) -> None:
    from rollouts.training import distributed
    from rollouts.training.evaluation import ALL_TASKS
    from rollouts.training.loops import run_sft_training, validation_losses
    from rollouts.training.types import SFTTrainingConfig

    sft = cast(SFTConfig, job.config.sft)
    backend = cast("PyTorchTrainingBackend", job.backend)
    rows = rows_in_process(job, data.eval_rows)

    async def evaluate(step: int, stage: str = "sft") -> dict[str, float]:
        """Validation loss, before the first step and after the last over all held-out rows."""
        whole = step in (0, job.num_steps)
        batches_max = -1 if whole else sft.eval_steps
        losses = await validation_losses(
            backend,
            data.eval_samples,
            batch_size=sft.batch_size,
            batches_max=batches_max,
            pad_token_id=job.pad_token_id,
        )
        if _rank() == 0:
            job.log_eval(stage, step, {task: {"validation_loss": found["loss"]} for task, found in losses.items()})
        distributed.barrier()
        return {"validation_loss": losses[ALL_TASKS]["loss"]}

    async def answer(step: int, stage: str = "sft") -> None:
        """Answers to held-out rows, before the first step, and after the last once its checkpoint is written."""
        if data.eval_samples and rows and (_rank() == 0 or backend.collective):  # sharded: all ranks or none
            found = await answers(job, rows, None)
            if _rank() == 0:
                job.log_answers(stage, step, rows, found)
                job.log_eval(stage, step, found.metrics(job.config.eval.pass_at))
        distributed.barrier()

    if data.eval_samples and not job.resume:
        await evaluate(0, stage="base")
        await answer(0, stage="base")
    config = SFTTrainingConfig(
        num_steps=job.num_steps,
        batch_size=sft.target_examples_per_step,
        log_every=sft.log_every,
        checkpoint_every=sft.checkpoint_every,
        micro_batch_size=sft.batch_size,
        micro_batch_tokens=None if sft.micro_batch_tokens == -1 else sft.micro_batch_tokens,
    )
    with metrics_of(job) as metrics_logger:
        await run_sft_training(
            backend,
            data.sft,
            config,
            metrics_logger,
            seed=sft_seed(job.config),
            pad_token_id=job.pad_token_id,
            resume=job.resume,
            eval_fn=evaluate if data.eval_samples else None,
            eval_every=sft.eval_every,
            on_checkpoint=job.on_checkpoint,
        )
        await answer(job.num_steps)


async def train_rl(job: Job, data: Data, urls: Urls) -> None:
    from rollouts.training.datasets.data_buffer import DataBuffer
    from rollouts.training.loops import run_rl_training
    from rollouts.training.metrics import JSONLLogger

    rl = cast(RLConfig, job.config.rl)
    loss = rl.loss
    buffer = DataBuffer(data.prompts, seed=rl.sampling.seed) if data.saved is None else None
    rollouts_logger = JSONLLogger(job.run.rollouts) if _rank() == 0 and data.saved is None else None
    async with _engines(job, urls) as engines, _reward(job) as reward_fn:
        manager: Any = data.saved or _rollout_manager(job, buffer, engines, reward_fn) if _rank() == 0 else None
        evaluate = rl_evaluation(job, data, engines, reward_fn)
        with metrics_of(job) as metrics_logger:
            if job.backend is None:
                if rollouts_logger is not None:
                    await _collect(job, manager, rollouts_logger, metrics_logger, evaluate)
                return
            async with weight_sync(job.config, job.run, job.backend, engines) as sync:
                await run_rl_training(
                    job.backend,
                    buffer,
                    manager,
                    engines,
                    rl_training_config(rl, job.num_steps),
                    metrics_logger=metrics_logger,
                    weight_sync=sync,
                    rollouts_logger=rollouts_logger,
                    temperature=rl.temperature,
                    clip_range=(loss.clip_low, loss.clip_high) if isinstance(loss, PPO | CISPO) else None,
                    pad_token_id=job.pad_token_id,
                    resume=job.resume,
                    eval_fn=evaluate,
                    eval_every=rl.eval_every,
                    on_checkpoint=job.on_checkpoint,
                )


async def _collect(job: Job, manager: Any, rollouts: "MetricsLogger", metrics: "MetricsLogger", evaluate: Any) -> None:
    """Rollouts of the model as it is, scored and written; on rank 0."""
    from rollouts.training.loops import collect_rollouts

    rl = cast(RLConfig, job.config.rl)
    await collect_rollouts(
        manager, job.num_steps, rollouts, temperature=rl.temperature, metrics_logger=metrics, eval_fn=evaluate
    )


@contextlib.asynccontextmanager
async def _engines(job: Job, urls: Urls) -> AsyncIterator[list["SGLangEngine"]]:
    """Clients of the engines, on rank 0 alone; they outlive an engine that the supervisor starts again."""
    from rollouts.training.inference.connect import engine_client
    from rollouts.training.inference.router import Router
    from rollouts.training.inference.sglang import SGLangEngine

    async with contextlib.AsyncExitStack() as stack:
        api_key, admin_key = read_keys()
        kind = job.config.engine.kind if job.config.engine else "sglang"
        options: dict[str, Any] = {"timeout_s": job.config.limits.sample_timeout_s}
        options |= {"api_key": api_key, "admin_key": admin_key}
        clients = [engine_client(kind, url, **options) for url in (urls.engines if _rank() == 0 else ())]
        for client in clients:
            await stack.enter_async_context(client)
            await _greet(job, client)
        router = None
        if urls.router is not None and clients:
            requests_max = len(clients) * cast(EngineConfig, job.config.engine).max_running_requests
            router = Router(urls.router, cast(SGLangEngine, clients[0]), requests_max=requests_max, **options)
            await stack.enter_async_context(router)
        yield _resilient(job, clients, router)


async def _greet(job: Job, client: Any) -> None:
    """Ask a server what it is, before anything is sampled. Raises EngineError for a version that nobody tested, and for
    another kind than the config's."""
    from rollouts.training.inference.http import require

    server = await client.server()
    expected = job.config.engine.kind if job.config.engine else server.kind
    need = f"{expected}, as the config's engine: change that, or end what listens and choose another engine.sglang_port"
    require(server.kind == expected, f"{client.base_url}: is {server.kind} {server.version}, needs {need}")
    message = f"engine {client.base_url}: {server.kind} {server.version}"
    if not server.seeds:
        message += ", which does not heed seeds: the same run samples other tokens each time"
    append_event(job.run, "note", message=message)


def _resilient(job: Job, clients: Sequence[Any], router: Any = None) -> list[Any]:
    """The clients, able to wait for as many restarts as the supervisor may make, each noticed and carried out."""
    from rollouts.training.inference.resilient import Recovered, resilient

    limits, restarts_max = job.config.limits, job.config.engine.restarts_max if job.config.engine else 0

    def on_recovered(recovered: Recovered) -> None:
        append_event(job.run, "engine_recovered", **dataclasses.asdict(recovered))

    one_restart_s = limits.engine_hang_timeout_s + limits.engine_ready_timeout_s
    timeout_s = one_restart_s * max(1, restarts_max)
    options: dict[str, Any] = {"recover_timeout_s": timeout_s, "on_recovered": on_recovered}
    return resilient(clients, reruns_max=restarts_max, router=router, **options)


@contextlib.asynccontextmanager
async def _reward(job: Job) -> AsyncIterator[Any]:
    """The job's reward function with its limit and processes; None where an environment rewards, or nothing samples."""
    from rollouts.training.rewards.scoring import scoring

    config, rl = job.config, cast(RLConfig, job.config.rl)
    if _rank() != 0 or not config.uses_engine or rl.reward is None:
        yield None
        return
    with scoring(rl.reward.fn, workers=rl.reward.workers, timeout_s=config.limits.reward_timeout_s) as reward_fn:
        yield reward_fn


def _rollout_manager(job: Job, buffer: Any, engines: Sequence["SGLangEngine"], reward_fn: Any) -> Any:
    from rollouts.training.rewards import resolve
    from rollouts.training.rollout_gen.async_rollout_manager import AsyncRolloutManager
    from rollouts.training.types import RolloutConfig

    rl = cast(RLConfig, job.config.rl)
    config = RolloutConfig(
        batch_size=rl.examples_per_step,
        n_samples_per_prompt=rl.num_samples,
        over_sampling_factor=rl.sampling.over_sampling_factor,
        generate_fn=generate_fn(rl, job.tokenizer, engines, reward_fn),
        reward_fn=reward_fn,
        filter_fn=resolve(rl.sampling.filter_fn) if rl.sampling.filter_fn else None,
        retries_max=rl.sampling.retries_max,
        seed=rl.sampling.seed,
    )
    return AsyncRolloutManager(buffer, config)


if __name__ == "__main__":
    sys.exit(main())
