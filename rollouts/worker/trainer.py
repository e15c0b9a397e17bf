"""torchrun's entry: config.json → wiring → loops. The only place that sees both the whole config and the library.

    torchrun -m rollouts.worker.trainer --run-dir RUN_DIRECTORY --stage sft|rl [--engine-url URL ...]

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
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from base_config import Config, ModelConfig, RLConfig, SFTConfig
from rollouts.run_dir import RunDir, append_event, append_jsonl, record_process

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from rollouts.training.backends.pytorch import PyTorchTrainingBackend
    from rollouts.training.datasets.sft import SFTReport
    from rollouts.training.evaluation import Evaluation
    from rollouts.training.metrics import MetricsLogger
    from rollouts.training.reference import Reference
    from rollouts.training.types import Prompt, RLTrainingConfig, Sample
    from rollouts.training.weight_sync import SGLangEngine

logger = logging.getLogger("rollouts.trainer")


def main() -> int:
    parser = argparse.ArgumentParser(description="The trainer of one stage; torchrun starts it on every rank.")
    parser.add_argument("--run-dir", required=True, type=Path, help="the run directory")
    parser.add_argument("--stage", required=True, choices=("sft", "rl"))
    parser.add_argument("--engine-url", action="append", default=[], help="an inference server; rl needs at least one")
    arguments = parser.parse_args()
    run = RunDir(arguments.run_dir)
    record_process(run, f"{arguments.stage}-trainer-rank{_rank()}")
    config = Config.load(run.config)
    logging.basicConfig(level=config.output.log_level, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it has a line per request, at INFO
    import anyio

    with _mistakes_in_one_line(run):
        anyio.run(_train, config, run, arguments.stage, arguments.engine_url)
    return 0


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


@contextlib.contextmanager
def _mistakes_in_one_line(run: RunDir) -> Iterator[None]:
    """What a user can mend becomes an `error:` line and an event; anything else is ours, and keeps its traceback."""
    from rollouts.training.checkpoint import CheckpointError
    from rollouts.training.datasets.rows import DataError
    from rollouts.training.model_loading import ModelError
    from rollouts.training.rewards import RewardError
    from rollouts.training.rollout_gen.async_rollout_manager import RolloutError
    from rollouts.training.weight_sync import EngineError

    mistakes = (DataError, RewardError, RolloutError, CheckpointError, EngineError, ModelError, FloatingPointError)
    try:
        yield
    except mistakes as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        if _rank() == 0:
            append_event(run, "error", message=str(error), window="trainer", log_tail=[])
        sys.exit(1)


@dataclass(frozen=True)
class Job:
    """What both stages work with."""

    config: Config
    run: RunDir
    stage: str
    tokenizer: Any
    backend: "PyTorchTrainingBackend"
    num_steps: int
    resume: Mapping[str, Any] | None  # what load_checkpoint returned, when this stage goes on from its own checkpoint
    pad_token_id: int

    def log_eval(self, stage: str, step: int, metric: str, value: float) -> None:
        splits = dict.fromkeys(spec.split for spec in self.config.data.eval_mixture)
        row = {"stage": stage, "step": step, "split": "+".join(splits), "metric": metric, "value": value}
        append_jsonl(self.run.eval, row)
        logger.info("eval %s", " ".join(f"{key}={value}" for key, value in row.items()))

    def on_checkpoint(self, path: Path, step: int) -> None:
        append_event(self.run, "checkpoint", stage=self.stage, step=step, path=str(path.relative_to(self.run.path)))

    @property
    def first_step(self) -> int:
        return self.resume["step"] if self.resume else 0


async def _train(config: Config, run: RunDir, stage: str, engine_urls: Sequence[str]) -> None:
    import torch

    from rollouts.training import distributed
    from rollouts.training.model_loading import load_tokenizer

    device = distributed.initialize(config.target.device_type, timeout_s=config.limits.stage_timeout_s)
    torch.manual_seed(
        (config.rl.seed if stage == "rl" and config.rl else config.data.shuffle_seed) + _rank()
    )  # dropout
    try:
        model_path, resumes = _start(config, run, stage)
        tokenizer = load_tokenizer(model_path, trust_remote_code=config.model.trust_remote_code)
        data = load_data(config, tokenizer, stage)
        steps = sft_steps(config, data) if stage == "sft" else rl_steps(config, data)
        backend = build_backend(
            config,
            stage,
            checkpoint_dir=run.checkpoints / stage,
            model_path=base_model(config, model_path, resumes=resumes),
            tokenizer=tokenizer,
            device=device,
            num_steps=steps,
            reference=reference_name(config, stage, model_path, resumes=resumes),
        )
        resume = await backend.load_checkpoint(model_path) if resumes else None
        pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        job = Job(config, run, stage, tokenizer, backend, steps, resume, pad_token_id)
        if _rank() == 0:
            if stage == "sft":
                append_event(run, "note", message=f"sft_mixture: {data.sft_report}")
            append_event(run, "training_started", stage=stage, step=job.first_step, steps_total=steps)
        await (train_sft(job, data) if stage == "sft" else train_rl(job, data, engine_urls))
    finally:
        distributed.shutdown()


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


# --- data -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """All that the run's stages from this one on will read: a broken row stops the run before anything trains."""

    sft: Sequence["Sample"]
    sft_report: "SFTReport | None"  # None without an sft stage ahead
    prompts: Sequence["Prompt"]
    eval_samples: Sequence["Sample"]
    eval_rows: Sequence["Prompt"]


def load_data(config: Config, tokenizer: Any, stage: str) -> Data:
    from rollouts.training.datasets.dataset_loaders import load_prompt_mixture, load_sft_mixture
    from rollouts.training.rewards import resolve

    data, left = config.data, config.stages[config.stages.index(stage) :]
    load_samples = partial(
        load_sft_mixture,
        tokenizer=tokenizer,
        max_length=data.max_length,
        seed=data.shuffle_seed,
        num_workers=_spare_cores(),
    )
    if "rl" in left and config.rl is not None:
        resolve(config.rl.reward_fn)
        if config.rl.filter_fn is not None:
            resolve(config.rl.filter_fn)
    sft, report = load_samples(data.sft_mixture, seed=sft_seed(config)) if "sft" in left else ((), None)
    asked = [spec for spec in data.eval_mixture if spec.format != "text"]  # plain text has a loss, but no answer
    return Data(
        sft=sft,
        sft_report=report,
        prompts=load_prompt_mixture(data.rl_mixture, seed=data.shuffle_seed) if "rl" in left else (),
        eval_samples=load_samples(data.eval_mixture)[0] if data.eval_mixture and "sft" in left else (),
        eval_rows=load_prompt_mixture(asked, seed=data.shuffle_seed) if asked else (),
    )


def _spare_cores() -> int:
    """This rank's share of the host's cores; 0 for one core, which has none to spare."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # macOS: no mask
    share = cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(share, 16) if share > 1 else 0


def sft_seed(config: Config) -> int | None:
    """Of the SFT mixture's order and of every epoch's; None for the order of the config file."""
    return None if config.data.sft_order == "sequence" else config.data.shuffle_seed


def sft_steps(config: Config, data: Data) -> int:
    sft = cast(SFTConfig, config.sft)
    if sft.num_iterations != -1:
        return sft.num_iterations
    return max(1, len(data.sft) * sft.num_epochs // sft.target_examples_per_step)


def rl_steps(config: Config, data: Data) -> int:
    rl = cast(RLConfig, config.rl)
    return max(1, len(data.prompts) // rl.examples_per_step * rl.num_epochs)


# --- wiring ---------------------------------------------------------------------------------------------------------


def reference_name(config: Config, stage: str, model_path: str, *, resumes: bool) -> str | None:
    """Where the frozen model of the KL penalty is loaded from; None without one.

    A resumed run keeps the reference it began with, which its checkpoint names: never the checkpoint itself.
    Raises CheckpointError for a checkpoint that was trained without one, where the config names none either.
    """
    from rollouts.training.checkpoint import CheckpointError, read_metadata

    rl = config.rl
    if stage != "rl" or rl is None or rl.kl_coef == 0:
        return None
    if rl.kl_reference is not None:
        return rl.kl_reference
    if not resumes:
        return model_path
    recorded = read_metadata(Path(model_path)).get("reference")
    if recorded is None:
        raise CheckpointError(
            f"{model_path}: was trained without a KL reference, and rl.kl_coef={rl.kl_coef} needs one: set "
            "rl.kl_reference to the model that run started from, or rl.kl_coef=0"
        )
    return recorded["name"]


def base_model(config: Config, model_path: str, *, resumes: bool) -> str:
    """Where this stage's weights come from before its checkpoint is loaded.

    A checkpoint of a LoRA run holds merged weights: it goes on over the frozen ones, which it names.
    """
    from rollouts.training.lora import read_base

    base = read_base(Path(model_path)) if resumes and config.model.lora is not None else None
    return model_path if base is None else base["name"]


def rl_training_config(rl: RLConfig, num_steps: int) -> "RLTrainingConfig":
    from rollouts.training.types import RLTrainingConfig

    return RLTrainingConfig(
        num_steps=num_steps,
        sync_every=rl.sync_every,
        baseline=rl.baseline,
        log_every=rl.log_every,
        checkpoint_every=rl.save_every,
        advantage_norm=rl.advantage_norm,
        micro_batch_size=rl.batch_size,
        micro_batch_tokens=None if rl.micro_batch_tokens == -1 else rl.micro_batch_tokens,
    )


def rl_loss(rl: RLConfig) -> Callable[..., Any]:
    """The loss that the config describes: a function of logits and a batch's keys."""
    from rollouts.training.rl_losses import policy_loss

    return partial(
        policy_loss,
        loss=rl.loss,
        clip_range=(rl.clip_low, rl.clip_high),
        dual_clip=None if rl.dual_clip == -1 else rl.dual_clip,
        importance=rl.importance,
        importance_cap=rl.importance_cap,
        aggregation=rl.aggregation,
        length_norm=rl.max_new_tokens,
        kl_coef=rl.kl_coef,
        kl_kind=rl.kl_kind,
        entropy_coef=rl.entropy_coef,
    )


def build_model(model: ModelConfig, path: str) -> Any:
    """The model that is trained, on the CPU: the one at `path`, as the config wants it wrapped."""
    from rollouts.training import forward
    from rollouts.training.lora import LoraSettings, apply_lora
    from rollouts.training.model_loading import enable_activation_checkpointing, load_model

    init = model.init if path == model.name else "pretrained"
    built = load_model(path, init=init, init_seed=model.init_seed, trust_remote_code=model.trust_remote_code)
    if model.lora is not None:
        apply_lora(built, LoraSettings(**dataclasses.asdict(model.lora)), base_name=path)
    if model.activation_checkpointing:
        enable_activation_checkpointing(built)
    if model.compile:
        forward.body(built).compile(dynamic=True)
    return built


def stage_optimizer(model: Any, stage: SFTConfig | RLConfig) -> "Optimizer":
    """The optimizer that a stage's config describes, for `model`'s trainable parameters."""
    from rollouts.training.optim import MuonSettings, build_optimizer

    settings, muon = stage.optimizer, None
    if settings.muon is not None:
        width = settings.muon.width_reference
        constants = dataclasses.asdict(settings.muon)
        muon = MuonSettings(**{**constants, "width_reference": None if width == -1 else width})
        muon = dataclasses.replace(muon, vector_lr=muon.vector_lr * stage.init_lr_frac)
    return build_optimizer(
        model,
        kind=settings.kind,
        matrix_lr=stage.matrix_lr * stage.init_lr_frac,
        embedding_lr=stage.embedding_lr * stage.init_lr_frac,
        unembedding_lr=stage.unembedding_lr * stage.init_lr_frac,
        weight_decay=stage.weight_decay,
        beta1=settings.beta1,
        beta2=settings.beta2,
        eps=settings.eps,
        muon=muon,
    )


def stage_reference(config: ModelConfig, model: Any, name: str) -> "Reference":
    """The frozen model of the KL penalty: `model`'s own frozen weights if these are it, with LoRA; else loaded."""
    from rollouts.training.lora import base_as_reference, base_record, is_lora
    from rollouts.training.reference import load_reference

    if is_lora(model) and base_record(model)["name"] == name:
        return base_as_reference(model)
    return load_reference(name, trust_remote_code=config.trust_remote_code)


def build_backend(
    config: Config,
    stage: str,
    *,
    checkpoint_dir: Path,
    model_path: str,
    tokenizer: Any,
    device: Any,
    num_steps: int,
    reference: str | None,
) -> "PyTorchTrainingBackend":
    from rollouts.training.backends.pytorch import PyTorchTrainingBackend
    from rollouts.training.optim import lr_factor
    from rollouts.training.rl_losses import sft_loss

    settings = cast(SFTConfig | RLConfig, getattr(config, stage))
    optimizer = settings.optimizer
    model = build_model(config.model, model_path).to(device)
    factor = partial(lr_factor, total_steps=num_steps, warmup_frac=optimizer.warmup_frac, schedule=optimizer.schedule)
    return PyTorchTrainingBackend(
        model=model,
        optimizer=stage_optimizer(model, settings),
        loss_fn=rl_loss(cast(RLConfig, config.rl)) if stage == "rl" else sft_loss,
        checkpoint_dir=checkpoint_dir,
        device=device,
        tokenizer=tokenizer,
        max_grad_norm=optimizer.max_grad_norm,
        lr_schedule=factor,
        compute_dtype=config.model.dtype,
        reference=stage_reference(config.model, model, reference) if reference else None,
    )


class _ConsoleLogger:
    """One `key=value` line per logged step: what the trainer's window shows."""

    KEYS = (
        "loss",
        "reward_mean",
        "grad_norm",
        "lr",
        "entropy",
        "logp_diff_abs",
        "kl_reference",
        "groups_kept",
        "tokens_per_s",
        "step_s",
    )

    def __init__(self, stage: str, num_steps: int) -> None:
        self._stage, self._num_steps = stage, num_steps

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        shown = " ".join(f"{key}={metrics[key]:.4g}" for key in self.KEYS if key in metrics)
        print(f"stage={self._stage} step={step}/{self._num_steps} {shown}", flush=True)

    def finish(self) -> None:
        """Nothing is pending."""


@contextlib.contextmanager
def _metrics(job: Job) -> Iterator["MetricsLogger"]:
    from rollouts.training.metrics import CompositeLogger, JSONLLogger, WandbLogger

    output = job.config.output
    loggers: list[MetricsLogger] = [
        JSONLLogger(job.run.metrics, stage=job.stage),
        _ConsoleLogger(job.stage, job.num_steps),
    ]
    if output.use_wandb and _rank() == 0:
        name = f"{job.run.run_id}-{job.stage}"
        loggers.append(WandbLogger(project=output.wandb_project, name=name, config=job.config.to_json()))
    composite = CompositeLogger(loggers)
    try:
        yield composite
    finally:
        composite.finish()


# --- stages ---------------------------------------------------------------------------------------------------------


async def train_sft(job: Job, data: Data) -> None:
    from rollouts.training import distributed
    from rollouts.training.evaluation import evaluate_with_model
    from rollouts.training.loops import run_sft_training, validation_loss
    from rollouts.training.types import SFTTrainingConfig

    sft = cast(SFTConfig, job.config.sft)
    max_new_tokens = job.config.rl.max_new_tokens if job.config.rl else job.config.data.max_length

    async def evaluate(step: int, stage: str = "sft") -> dict[str, float]:
        """Validation loss; before the first step and after the last also exact match, both over all held-out rows."""
        whole = step in (0, job.num_steps)
        batches_max = -1 if whole else sft.eval_steps
        result = await validation_loss(
            job.backend,
            data.eval_samples,
            batch_size=sft.batch_size,
            batches_max=batches_max,
            pad_token_id=job.pad_token_id,
        )
        if _rank() == 0:
            job.log_eval(stage, step, "validation_loss", result["loss"])
            if whole and data.eval_rows:
                found = evaluate_with_model(
                    job.backend.model, job.tokenizer, data.eval_rows, max_new_tokens=max_new_tokens
                )
                job.log_eval(stage, step, "exact_match", found.exact_match)
        distributed.barrier()
        return {"validation_loss": result["loss"]}

    if data.eval_samples and not job.resume:
        await evaluate(0, stage="base")
    config = SFTTrainingConfig(
        num_steps=job.num_steps,
        batch_size=sft.target_examples_per_step,
        log_every=sft.log_every,
        checkpoint_every=sft.checkpoint_every,
        micro_batch_size=sft.batch_size,
        micro_batch_tokens=None if sft.micro_batch_tokens == -1 else sft.micro_batch_tokens,
    )
    with _metrics(job) as metrics_logger:
        await run_sft_training(
            job.backend,
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


async def train_rl(job: Job, data: Data, engine_urls: Sequence[str]) -> None:
    from rollouts.training.datasets.data_buffer import DataBuffer
    from rollouts.training.loops import run_rl_training
    from rollouts.training.metrics import JSONLLogger

    rl = cast(RLConfig, job.config.rl)
    config = rl_training_config(rl, job.num_steps)
    buffer = DataBuffer(data.prompts, seed=rl.seed)
    async with _engines(job, engine_urls) as engines:
        with _metrics(job) as metrics_logger:
            await run_rl_training(
                job.backend,
                buffer,
                _rollout_manager(job, buffer, engines) if _rank() == 0 else None,
                engines,
                config,
                metrics_logger=metrics_logger,
                weights_dir=job.run.weights,
                rollouts_logger=JSONLLogger(job.run.rollouts) if _rank() == 0 else None,
                temperature=rl.temperature,
                clip_range=(rl.clip_low, rl.clip_high) if rl.loss in ("ppo", "cispo") else None,
                pad_token_id=job.pad_token_id,
                resume=job.resume,
                eval_fn=_rl_evaluation(job, data, engines) if data.eval_rows else None,
                eval_every=rl.eval_every,
                on_checkpoint=job.on_checkpoint,
            )


@contextlib.asynccontextmanager
async def _engines(job: Job, urls: Sequence[str]) -> AsyncIterator[list["SGLangEngine"]]:
    """Clients of the engines, on rank 0 alone."""
    from rollouts.training.weight_sync import SGLangEngine

    async with contextlib.AsyncExitStack() as stack:
        engines = [SGLangEngine(url, timeout_s=job.config.limits.sample_timeout_s) for url in urls if _rank() == 0]
        for engine in engines:
            await stack.enter_async_context(engine)
        yield engines


def _rollout_manager(job: Job, buffer: Any, engines: Sequence["SGLangEngine"]) -> Any:
    from rollouts.training.rewards import resolve
    from rollouts.training.rollout_gen.async_rollout_manager import AsyncRolloutManager
    from rollouts.training.rollout_gen.engine_generate import make_generate_fn
    from rollouts.training.types import RolloutConfig

    rl = cast(RLConfig, job.config.rl)
    generate_fn = make_generate_fn(
        engines, job.tokenizer, max_new_tokens=rl.max_new_tokens, temperature=rl.temperature, top_k=rl.top_k
    )
    config = RolloutConfig(
        batch_size=rl.examples_per_step,
        n_samples_per_prompt=rl.num_samples,
        over_sampling_factor=rl.over_sampling_factor,
        generate_fn=generate_fn,
        reward_fn=resolve(rl.reward_fn),
        filter_fn=resolve(rl.filter_fn) if rl.filter_fn else None,
        retries_max=rl.retries_max,
        seed=rl.seed,
    )
    return AsyncRolloutManager(buffer, config)


def _rl_evaluation(job: Job, data: Data, engines: Sequence["SGLangEngine"]) -> Any:
    from rollouts.training.evaluation import evaluate_with_engine

    rl = cast(RLConfig, job.config.rl)
    trained_before = len(job.config.stages) > 1 or job.config.output.source_checkpoint is not None

    async def evaluate(step: int) -> dict[str, float]:
        """Greedy exact match: over all rows before the first step and after the last, else over rl.eval_examples."""
        whole = step in (0, job.num_steps) or rl.eval_examples == -1
        rows = data.eval_rows if whole else data.eval_rows[: rl.eval_examples]
        found: Evaluation = await evaluate_with_engine(engines, job.tokenizer, rows, max_new_tokens=rl.max_new_tokens)
        job.log_eval("rl" if step or trained_before else "base", step, "exact_match", found.exact_match)
        return {"exact_match": found.exact_match}

    return evaluate


if __name__ == "__main__":
    sys.exit(main())
