"""The job's schema: frozen dataclasses with no defaults, `problems()`, and a JSON round trip. Standard library only.

A config file is Python that builds one module-level `config = Config(...)`. No field here has a default, so the
file shows exactly what ran. `Config.problems()` lists every reason it cannot run, each naming the field's path, the
value and what is allowed. Where a number may be switched off, -1 says so, and the field's comment says what that means.
"""

import ast
import contextlib
import dataclasses
import difflib
import io
import json
import math
import os
import re
import runpy
import sys
import traceback
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

EXPERIMENT_NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9_-]{0,47}"  # also a tmux session name: no dot, no colon
DOTTED_NAME_PATTERN = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+"
BEST_PATTERN = r"(min|max) \S+"
ENGINE_SOURCES = ("engine", "engine_only")  # rl.source where rollouts come from an engine, not from a file
WEIGHT_SYNCS = {"embedded": ("disk", "tensor"), "sglang": ("disk", "tensor", "broadcast", "lora"), "vllm": ("disk",)}
ALLOCATOR_SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")  # torch's older and newer name
SGLANG_LORA_TARGETS = (  # linear layers that SGLang has adapters for
    *("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "gate_proj", "up_proj", "down_proj", "gate_up_proj"),
    *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"),
)
ENV_NAME_PATTERN = r"[A-Za-z_][A-Za-z0-9_]*"


class ConfigError(Exception):
    """A config that cannot be read. The message names the file, the line or key, and the fix."""


@dataclass(frozen=True, kw_only=True)
class TargetConfig:
    """Which devices train, and how the model is spread over them."""

    gpu_ranks: list[int]  # device indices; their number is the trainer's world size. On cpu: one process per entry
    device_type: Literal["cuda", "cpu", "mps"]
    sharding: Literal[
        "none", "full_shard", "shard_grad_op", "hybrid_shard"
    ]  # docs/sharding.md; none: a whole copy each
    shard_group_size: int  # hybrid_shard: ranks that share one copy, usually those of a node; -1: unused
    cpu_offload: bool  # parameters, gradients and optimizer state wait in host memory; needs sharding


@dataclass(frozen=True, kw_only=True)
class HostConfig:
    """How the host is made ready."""

    installer: Literal["uv", "pip"]  # what fills the virtual environments
    constraints_file: str | None  # path in this repository of a pip constraints file; None installs unconstrained
    torch_build: Literal["auto", "cpu", "cu126", "cu128", "cu130", "index"]  # auto: by device and driver; index: pip's
    env: dict[str, str]  # set for every process of the run; shown in plans and saved: no secrets here
    secrets: list[str]  # names of variables read here and handed to the run over stdin; never stored here
    disk_free_gib_min: float  # refuse to start with less room than this on the host
    threads_per_process: int  # OMP_NUM_THREADS of each trainer rank and of the engine


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters on frozen weights (peft); matrix_lr is their learning rate. docs/optimization.md."""

    rank: int
    alpha: float  # the adapter's output is multiplied by alpha / rank
    dropout: float  # on the adapter's input; 0: none
    target_modules: list[str] | Literal["all-linear"]  # linear layers by name, e.g. ["q_proj"]; all: but for the head
    init_seed: int


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    name: str  # hub id, or a directory: absolute on the host, or relative to the repository's root
    init: Literal["pretrained", "random"]  # random: architecture and tokenizer of `name`, weights drawn from init_seed
    init_seed: int
    dtype: Literal["float32", "bfloat16"]
    compile: bool
    activation_checkpointing: bool  # recompute each layer in the backward pass: less memory, about 1.3 x the time
    lora: LoraConfig | None  # None: all weights are trained
    trust_remote_code: bool


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """One data set of a mixture: rows shuffled by shuffle_seed, of those [start:stop:step], the first max_samples."""

    name: str  # hub id, a directory laid out as on the hub, or a .jsonl file (relative to the repository's root)
    format: Literal[  # how a row becomes a conversation: docs/data.md
        "messages",
        "question_answer",
        "gsm8k",
        "gsm8k_calculator",
        "multiple_choice",
        "smoltalk",
        "custom_json",
        "spelling_bee",  # made here, without end; `name` is a label
        "simple_spelling",  # likewise
        "text",  # no conversation: for sft_mixture and eval_mixture's validation loss
    ]
    split: str
    subset: str | None  # the hub's configuration name
    shuffle_seed: int | None  # as datasets' shuffle; None: rows as they stand. Streamed: in windows of 10,000 rows
    start: int
    stop: int  # -1: to the end
    step: int
    max_samples: int  # -1: all
    streaming: bool  # fetch rows one by one and only those needed; for sets too large to download
    repeat: int  # how often the rows stand in the mixture


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    sft_mixture: list[DatasetSpec]
    sft_order: Literal["shuffled", "sequence"]  # sequence: the mixture as listed, every epoch; a curriculum
    rl_mixture: list[DatasetSpec]
    eval_mixture: list[DatasetSpec]  # held out: validation loss and exact match; [] turns evaluation off
    max_length: int  # tokens; a longer conversation is left out and counted, a longer text split into pieces
    shuffle_seed: int


@dataclass(frozen=True, kw_only=True)
class MuonConfig:
    momentum: float
    nesterov: bool
    ns_steps: int  # Newton-Schulz iterations
    adjust_lr: Literal[
        "original", "match_rms_adamw"
    ]  # matrix_lr's factor by shape: nanochat's, or to use AdamW's rates
    vector_lr: float  # of norms and biases, by AdamW
    width_reference: int  # AdamW groups' rates x (hidden_size / this) ** -0.5, in nanochat 768; -1: as they stand


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    kind: Literal["adamw", "muon"]  # muon: Muon for matrices, AdamW for embeddings, head, norms and biases
    muon: MuonConfig | None  # None only with kind="adamw"
    beta1: float  # this and the next two are AdamW's
    beta2: float
    eps: float
    max_grad_norm: float  # global L2 norm at which gradients are clipped
    warmup_frac: float  # share of the stage's steps over which the rate rises linearly from 0
    schedule: Literal["constant", "linear", "cosine"]  # after warm-up; linear and cosine end at 0


@dataclass(frozen=True, kw_only=True)
class SFTConfig:
    num_epochs: int
    num_iterations: int  # optimizer steps; -1: num_epochs decides
    batch_size: int  # examples per rank and forward pass, where micro_batch_tokens is -1
    micro_batch_tokens: int  # tokens per rank and forward pass, filled best-fit with whole examples; -1: batch_size
    target_examples_per_step: int  # examples per optimizer step, over all ranks: accumulated
    unembedding_lr: float
    embedding_lr: float
    matrix_lr: float
    weight_decay: float
    init_lr_frac: float  # factor on all learning rates, as in nanochat
    eval_every: int  # steps between validation losses; -1: only after the last step
    eval_steps: int  # batches per validation loss; -1: all of eval_mixture
    checkpoint_every: int  # steps; -1: only after the last step
    log_every: int
    optimizer: OptimizerConfig


@dataclass(frozen=True, kw_only=True)
class AgentConfig:
    """Rollouts of several turns in an environment with tools. docs/agents.md."""

    environment: str  # dotted path of a class, or of a function without arguments that makes one
    tool_format: Literal["hermes", "json"]  # how the model writes its calls: <tool_call>, or all of a turn one object
    turns_max: int  # of the policy
    tokens_max: int  # of a whole episode, prompt included
    timeout_s: float  # of a whole episode


@dataclass(frozen=True, kw_only=True)
class RLConfig:
    num_epochs: int  # steps = prompts * num_epochs // examples_per_step; of saved rollouts, their steps * num_epochs
    source: str  # "engine": sample and train; "engine_only": sample and score alone; or a rollouts.jsonl to train on
    examples_per_step: int  # prompts per optimizer step
    num_samples: int  # per prompt; one sample has no baseline
    batch_size: int  # sequences per rank and forward pass, where micro_batch_tokens is -1
    micro_batch_tokens: int  # tokens per rank and forward pass, filled best-fit with whole sequences; -1: batch_size
    max_new_tokens: int
    temperature: float
    top_k: int  # sample among the k likeliest tokens; -1: all
    unembedding_lr: float
    embedding_lr: float
    matrix_lr: float
    weight_decay: float
    init_lr_frac: float
    eval_every: int  # steps between exact-match evaluations; -1: only before and after the stage
    eval_examples: int  # rows of eval_mixture in those; -1: all. The ones before and after always take all
    save_every: int  # steps; -1: only after the last step
    log_every: int
    baseline: (
        float | Literal["group_mean", "leave_one_out", "value"]
    )  # subtracted from each reward; groups are a prompt's samples. value: a value head's estimates, per token by GAE
    gamma: float  # baseline value: the discount of what comes a token later
    gae_lambda: float  # baseline value: 1: what was rewarded less the value, 0: the surprise of one token alone
    value_coef: float  # baseline value: of the value head's squared error in the loss
    value_clip: float  # baseline value: how far a value may move from before the batch; -1: anywhere
    value_lr: float  # baseline value: the head's own learning rate
    updates_per_batch: int  # optimizer steps on each batch of rollouts
    advantage_norm: Literal["none", "group_std", "batch"]  # then divided by; batch standardises over the whole step
    loss: Literal["grpo", "ppo", "gspo", "cispo"]  # docs/losses.md: all of these methods, and how to set them
    clip_low: float  # ppo, gspo, cispo: the ratio to the sampler is held above 1 - clip_low; 1: no bound
    clip_high: float  # and below 1 + clip_high
    dual_clip: float  # ppo, gspo: where the advantage is negative the ratio counts at most this much; -1: no bound
    importance: Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]  # grpo: TIS, MIS
    importance_cap: float  # the ratio to the sampler at which those truncate or mask
    aggregation: Literal["token_mean", "sequence_mean_token_sum", "sequence_mean_token_mean", "constant_length"]
    kl_coef: float  # of the penalty for leaving a frozen reference model; 0: none is loaded
    kl_kind: Literal["k1", "k2", "k3"]  # which estimate of that divergence is the loss's term
    kl_reference: str | None  # hub id or directory on the host; None: the model that the run's rl stage started from
    entropy_coef: float  # of a bonus for the policy's entropy; 0: none
    agent: AgentConfig | None  # None: one answer a prompt
    reward_fn: str | None  # dotted path: Sample -> float, or None for not scorable. None: the environment's own
    reward_workers: int  # processes that a plain reward function runs in; 0: the trainer's, where none is cut off
    filter_fn: str | None  # dotted path of a function: list[Sample] of one group -> keep it?
    over_sampling_factor: float  # groups started per group needed
    retries_max: int  # more rounds of generation when the filter left too few groups
    sync_every: int  # optimizer steps between weight updates of the engine
    policy_lag_steps_max: int  # how many optimizer steps generation may run ahead of training; 0: in turn
    in_flight_updates: bool  # weights change under running requests, which go on; False: they are waited for
    seed: int  # of prompt order and sampling
    optimizer: OptimizerConfig


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """How both stages answer held-out rows. Each row is always answered greedily; these are the answers beside that."""

    num_samples: int  # sampled answers per row, for pass@k; 0: none
    pass_at: list[int]  # the k of each pass@k, at most num_samples; [] without samples
    temperature: float  # of the sampled answers
    top_k: int  # sample those among the k likeliest tokens; -1: all
    seed: int  # of their sampling


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The inference server of the RL stage."""

    kind: Literal["embedded", "sglang", "vllm"]
    requirements_file: str | None  # lock of the engine's own environment; None: it runs in the trainer's (embedded)
    gpu_ranks: list[int]  # may equal target.gpu_ranks: colocated
    sglang_port: int  # of the first replica; the others follow it
    replicas: int  # copies that share the requests, each on tensor_parallel_size devices
    router_port: int | None  # of SGLang's router, through which they get them; None: the trainer deals them out in turn
    tensor_parallel_size: int
    mem_fraction: float  # of what is free on each device at the engine's start (vLLM: of the whole device)
    context_length: int  # tokens, prompt and answer together
    max_total_tokens: (
        int  # of the key-value cache; -1: what mem_fraction leaves, less for a colocated engine started again
    )
    max_running_requests: int  # sequences decoded at once; more wait in line
    weight_sync: Literal["disk", "tensor", "broadcast", "lora"]  # how new weights get there: docs/engines.md
    weight_sync_bucket_mib: int  # tensor, broadcast: weights are sent in pieces of about this size
    weights_on_tmpfs: bool  # disk, lora: in memory (/dev/shm), where trainer and engine share a host
    sleep_while_training: bool  # colocated on a GPU: the engine gives its memory back while the trainer steps
    restarts_max: int  # how often in a run an engine that died or hangs is started again; 0: never


@dataclass(frozen=True, kw_only=True)
class LimitsConfig:
    """How long things may take, in seconds, before the run fails with a message."""

    bootstrap_timeout_s: float
    engine_ready_timeout_s: float
    stage_timeout_s: float  # one stage, sft or rl, as a whole
    engine_hang_timeout_s: float  # an engine that lives and does not answer for so long is hung
    sample_timeout_s: float  # one generation request
    reward_timeout_s: float  # one sample's reward; a group with one that took longer is left out and counted
    stop_grace_s: float  # between asking a process to end and killing it


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    save_dir: str  # where results land on this machine: <save_dir>/<experiment_name>/<run_id>/
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"]
    experiment_name: str
    use_wandb: bool
    wandb_project: str
    mode: Literal["sft", "rl", "sft+rl"]
    source_checkpoint: str | None  # a checkpoint directory on the host: the first stage starts from it, or resumes it
    checkpoints_keep: int  # of each stage on the host, the last ones; -1: all. What a run resumed from stays too
    checkpoint_best: dict[str, str]  # stage -> "min <metric>" or "max <metric>": kept too; {}: by age alone


@dataclass(frozen=True, kw_only=True)
class Config:
    target: TargetConfig
    host: HostConfig
    model: ModelConfig
    data: DataConfig
    sft: SFTConfig | None  # None only where output.mode has no sft stage
    rl: RLConfig | None  # None only where output.mode has no rl stage
    eval: EvalConfig
    engine: EngineConfig | None  # None only where nothing samples
    limits: LimitsConfig
    output: OutputConfig

    def problems(self) -> tuple[str, ...]:
        """Every reason this config cannot run; empty when it can."""
        bad_paths: set[str] = set()
        messages = []
        for path, message in _type_problems(self, Config, ""):
            bad_paths.add(path.split(".")[0].split("[")[0])
            messages.append(message)
        for group, checks in _GROUP_CHECKS.items():
            value = getattr(self, group)
            if group not in bad_paths and value is not None:
                messages += [message for ok, message in checks(value) if not ok]
        if not bad_paths:
            messages += [message for ok, message in _cross_checks(self) if not ok]
        return tuple(messages)

    @property
    def stages(self) -> tuple[Literal["sft", "rl"], ...]:
        """The stages that `output.mode` selects, in order."""
        return tuple(stage for stage in ("sft", "rl") if stage in self.output.mode.split("+"))

    @property
    def uses_engine(self) -> bool:
        """Whether the run samples from an inference engine."""
        return "rl" in self.stages and self.rl is not None and self.rl.source in ENGINE_SOURCES

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> "Config":
        """The inverse of `to_json`. Raises ConfigError naming every missing and unknown key."""
        errors: list[tuple[str, str]] = []
        config = _from_json(cls, data, "config", errors)
        if errors:
            raise ConfigError("\n".join(f"{path}: {message}" for path, message in errors))
        return typing.cast(Config, config)

    def save(self, path: str | os.PathLike[str]) -> None:
        text = json.dumps(self.to_json(), indent=2) + "\n"
        temporary = Path(f"{os.fspath(path)}.tmp")
        temporary.write_text(text)
        temporary.replace(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Config":
        try:
            text = Path(path).read_text()
            data = json.loads(text)
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such file") from None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: cannot be read: {error}") from None
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
        except (ValueError, RecursionError) as error:  # a number of too many digits; brackets too deep
            raise ConfigError(f"{path}: cannot be read as a config: {error}") from None
        errors: list[tuple[str, str]] = []
        config = _from_json(cls, data, "config", errors)
        lines, twice = _json_lines(text)
        errors += [(key, "given twice") for key in twice]
        if errors:
            shown = [(_line_of(key, lines), f"{key}: {message}") for key, message in errors]
            raise ConfigError("\n".join(f"{path}:{line}: {message}" for line, message in sorted(shown)))
        return typing.cast(Config, config)


def load_config(path: str | os.PathLike[str]) -> Config:
    """Execute a config file once (or read a run's config.json) and return its `config`.

    Raises ConfigError for a missing file, a syntax error (with its line), an exception in the file (with its line),
    unknown and missing fields (all at once, each with its line and the nearest name), a file without `config`, or one
    whose `config` is no Config. It does not check `problems()`.
    """
    file = Path(path)
    if file.suffix == ".json":
        return Config.load(file)
    if not file.is_file():
        raise ConfigError(f"{file}: no such file. Shipped configs are in configs/.")
    try:
        names = runpy.run_path(str(file))
    except SyntaxError as error:
        line = (error.text or "").rstrip()
        raise ConfigError(f"{error.filename}:{error.lineno}: {error.msg}\n    {line.strip()}") from None
    except (Exception, SystemExit) as error:  # whatever a user's file raises is shown with its line, not our traceback
        mistakes = _field_mistakes(file) if isinstance(error, TypeError) and "__init__() " in str(error) else []
        raise ConfigError("\n".join(mistakes) or _describe_exception(file, error)) from None
    if "config" not in names:
        raise ConfigError(f"{file}: defines no `config`. A config file ends with `config = Config(...)`.")
    config = names["config"]
    if not isinstance(config, Config):
        raise ConfigError(f"{file}: `config` is {type(config).__name__}, needs to be base_config.Config.")
    return config


def _describe_exception(file: Path, error: BaseException) -> str:
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == file]
    text = f"{type(error).__name__}: {error}"
    wanted = re.match(r"cannot import name '(\w+)' from 'base_config'|name '(\w+)' is not defined", str(error))
    if wanted:
        text += _nearest(
            wanted[1] or wanted[2], [name for name, value in globals().items() if dataclasses.is_dataclass(value)]
        )
    return f"{file}:{own[-1].lineno}: {text}" if own else f"{file}: {text}"


def _nearest(name: str, known: Iterable[str]) -> str:
    """ "; did you mean 'x'?", or "" where nothing is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


class _Unset:
    """Stands in a field that a config file left out, so that its other mistakes are found too."""


def _field_mistakes(file: Path) -> list[str]:
    """Execute a config file that failed once more, and list every unknown and missing field: "file:line: message".

    Meanwhile the schema's classes take what they are given and note what is wrong.
    """
    found: list[tuple[str, int, str]] = []
    schema = [item for item in globals().values() if isinstance(item, type) and dataclasses.is_dataclass(item)]
    originals = {item: item.__dict__["__init__"] for item in schema}
    try:
        for item in originals:
            setattr(item, "__init__", _noting_init(found))  # noqa: B010  (a type checker refuses the assignment)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Exception):
            runpy.run_path(str(file))
    finally:
        for item, init in originals.items():
            setattr(item, "__init__", init)  # noqa: B010
    return [f"{name}:{line}: {message}" for name, line, message in sorted(set(found))]


def _noting_init(found: list[tuple[str, int, str]]) -> typing.Callable[..., None]:
    def note(self: Any, *args: Any, **given: Any) -> None:
        name, known = type(self).__name__, [field.name for field in dataclasses.fields(self)]
        file, line, lines = _calling_line(name)
        if args:
            found.append((file, line, f"{name} takes its fields by name: {len(args)} came without one"))
        for key in given.keys() - set(known):
            message = f"{name} has no field {key!r}{_nearest(key, [k for k in known if k not in given] or known)}"
            found.append((file, lines.get(key, line), message))
        missing = [key for key in known if key not in given]
        if missing and not args:
            found.append((file, line, f"{name} needs {', '.join(map(repr, missing))}: no field has a default"))
        for key in known:
            object.__setattr__(self, key, given.get(key, _Unset()))

    return note


def _calling_line(class_name: str) -> tuple[str, int, dict[str, int]]:
    """(file, line) of the call that makes an object of the schema, and the line of each field in it."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename in (__file__, dataclasses.__file__):
        frame = frame.f_back
    file, line = frame.f_code.co_filename, frame.f_lineno
    try:
        calls = [node for node in ast.walk(ast.parse(Path(file).read_text())) if isinstance(node, ast.Call)]
    except (OSError, ValueError, SyntaxError):
        return file, line, {}
    here = [call for call in calls if call.lineno <= line <= (call.end_lineno or call.lineno)]
    own = [call for call in here if ast.unparse(call.func).rpartition(".")[2] in (class_name, "replace")]
    keywords = [word for call in own if call.lineno == line for word in call.keywords if word.arg]
    return file, line, {str(word.arg): word.lineno for word in keywords}


# --- types ----------------------------------------------------------------------------------------------------------


def _type_problems(value: Any, expected: Any, path: str) -> Iterator[tuple[str, str]]:
    """(path, message) for each place under `value` whose type is not what the schema says."""
    origin = typing.get_origin(expected)
    if dataclasses.is_dataclass(expected):
        if not isinstance(value, typing.cast(type, expected)):
            yield path, f"{path}={value!r}: needs a {typing.cast(type, expected).__name__}"
            return
        hints = typing.get_type_hints(expected)
        for field in dataclasses.fields(typing.cast(Any, value)):
            yield from _type_problems(getattr(value, field.name), hints[field.name], f"{path}.{field.name}".lstrip("."))
    elif origin in (typing.Union, types.UnionType):
        yield from _union_problems(value, typing.get_args(expected), path)
    elif origin is list:
        if not isinstance(value, list):
            yield path, f"{path}={value!r}: needs a list"
            return
        for index, item in enumerate(value):
            yield from _type_problems(item, typing.get_args(expected)[0], f"{path}[{index}]")
    elif origin is dict:
        if not isinstance(value, dict) or not all(isinstance(text, str) for pair in value.items() for text in pair):
            yield path, f"{path}={value!r}: needs a dict of str to str"
    elif origin is Literal:
        choices = typing.get_args(expected)
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            yield path, f"{path}={value!r}: needs one of {', '.join(map(repr, choices))}"
    else:
        yield from _scalar_problems(value, expected, path)


def _union_problems(value: Any, choices: tuple[Any, ...], path: str) -> Iterator[tuple[str, str]]:
    if value is None and type(None) in choices:
        return
    others = [choice for choice in choices if choice is not type(None)]
    if len(others) == 1:
        yield from _type_problems(value, others[0], path)
        return
    if all(any(True for _ in _type_problems(value, choice, path)) for choice in others):
        names = [repr(a) for c in others if typing.get_origin(c) is Literal for a in typing.get_args(c)]
        names += [c.__name__ for c in others if isinstance(c, type)]
        names += [str(c) for c in others if typing.get_origin(c) is list]
        yield path, f"{path}={value!r}: needs one of {', '.join(names)}"


def _scalar_problems(value: Any, expected: type, path: str) -> Iterator[tuple[str, str]]:
    accepted = (int, float) if expected is float else (expected,)
    if not isinstance(value, accepted) or (isinstance(value, bool) and expected is not bool):
        yield path, f"{path}={value!r}: needs {expected.__name__}, found {type(value).__name__}"
    elif isinstance(value, float) and not math.isfinite(value):
        yield path, f"{path}={value!r}: needs a finite number"


def _from_json(expected: Any, data: Any, path: str, errors: list[tuple[str, str]]) -> Any:
    """Build `expected` out of JSON. Missing and unknown keys go to `errors`; leaf types are left to `problems()`."""
    if typing.get_origin(expected) in (typing.Union, types.UnionType):
        nested = [choice for choice in typing.get_args(expected) if dataclasses.is_dataclass(choice)]
        return data if data is None or not nested else _from_json(nested[0], data, path, errors)
    if typing.get_origin(expected) is list and isinstance(data, list):
        item = typing.get_args(expected)[0]
        return [_from_json(item, value, f"{path}[{index}]", errors) for index, value in enumerate(data)]
    if not dataclasses.is_dataclass(expected):
        return data
    name = typing.cast(type, expected).__name__
    if not isinstance(data, dict):
        errors.append((path, f"needs an object with the fields of {name}, found {type(data).__name__}"))
        return None
    hints = typing.get_type_hints(expected)
    missing = [key for key in hints if key not in data]
    unknown = [key for key in data if key not in hints]
    errors += [(f"{path}.{key}", f"missing; {name} has no defaults") for key in missing]
    errors += [
        (f"{path}.{key}", f"unknown; {name} has {', '.join(hints)}{_nearest(key, missing or hints)}") for key in unknown
    ]
    values = {key: _from_json(hint, data[key], f"{path}.{key}", errors) for key, hint in hints.items() if key in data}
    return None if missing or unknown else typing.cast(Any, expected)(**values)


def _json_lines(text: str) -> tuple[dict[str, int], list[str]]:
    """The line of each key of a JSON text that parses, by path ("config.rl.seed"), and the keys that stand twice."""
    lines: dict[str, int] = {"config": 1}
    twice: list[str] = []
    levels: list[dict[str, Any]] = []  # {"path", "key" (None: one comes next), "index" (None: an object)}
    for token in re.finditer(r'"(?:[^"\\]|\\.)*"|[{}\[\],]', text):
        top = levels[-1] if levels else None
        if token[0] in "{[":
            path = "config"
            if top is not None:
                path = f"{top['path']}[{top['index']}]" if top["key"] is None else f"{top['path']}.{top['key']}"
            levels.append({"path": path, "key": None, "index": 0 if token[0] == "[" else None})
        elif token[0] in "}]":
            levels.pop()
        elif top is not None and token[0] == ",":
            top["key"] = None
            top["index"] = None if top["index"] is None else top["index"] + 1
        elif top is not None and top["index"] is None and top["key"] is None:
            top["key"] = json.loads(token[0])
            path = f"{top['path']}.{top['key']}"
            twice += [path] if path in lines else []
            lines[path] = text.count("\n", 0, token.start()) + 1
    return lines, twice


def _line_of(path: str, lines: Mapping[str, int]) -> int:
    """Of a key, or of what it is missing in."""
    while path not in lines:
        path = path[: max(path.rfind("."), path.rfind("["))]
    return lines[path]


# --- meaning --------------------------------------------------------------------------------------------------------

Check = tuple[bool, str]
Checks = Iterable[Check]


def _need(ok: bool, path: str, value: Any, need: str) -> Check:
    return ok, f"{path}={value!r}: needs {need}"


def _at_least_one(group: Any, path: str, *names: str) -> Checks:
    for name in names:
        yield _need(getattr(group, name) >= 1, f"{path}.{name}", getattr(group, name), ">= 1")


def _one_or_off(group: Any, path: str, **off_means: str) -> Checks:
    for name, meaning in off_means.items():
        value = getattr(group, name)
        yield _need(value >= 1 or value == -1, f"{path}.{name}", value, f">= 1, or -1 for {meaning}")


def _seed(value: int, path: str) -> Check:
    return _need(0 <= value < 2**32, path, value, "0 to 2**32 - 1")


def _rank_checks(ranks: list[int], path: str) -> Checks:
    yield _need(len(ranks) >= 1, path, ranks, "at least one device")
    yield _need(len(set(ranks)) == len(ranks), path, ranks, "each device once")
    yield _need(all(rank >= 0 for rank in ranks), path, ranks, "device indices, which start at 0")


def _target_checks(target: TargetConfig) -> Checks:
    yield from _rank_checks(target.gpu_ranks, "target.gpu_ranks")
    sharded, ranks = target.sharding != "none", len(target.gpu_ranks)
    yield _need(
        target.device_type != "mps" or not sharded, "target.sharding", target.sharding, "'none': mps has one device"
    )
    yield _need(
        sharded or not target.cpu_offload, "target.cpu_offload", target.cpu_offload, "False where sharding='none'"
    )
    size, hybrid = target.shard_group_size, target.sharding == "hybrid_shard"
    size_ok = (size >= 1 and ranks % size == 0) if hybrid else size == -1
    need = f"a divisor of the {ranks} ranks" if hybrid else "-1: only sharding='hybrid_shard' has groups"
    yield _need(size_ok, "target.shard_group_size", size, need)
    one_mps = target.device_type != "mps" or len(target.gpu_ranks) == 1
    yield _need(one_mps, "target.gpu_ranks", target.gpu_ranks, "one entry: device_type='mps' has one device")


def _is_inside(file: str | None) -> bool:
    """None, or a relative path that stays in the repository."""
    return file is None or (bool(file.strip()) and not file.startswith("/") and ".." not in Path(file).parts)


def _host_checks(host: HostConfig) -> Checks:
    file = host.constraints_file
    yield _need(_is_inside(file), "host.constraints_file", file, "a path inside the repository, or None")
    for name in host.env:
        yield _matches(ENV_NAME_PATTERN, name), f"host.env[{name!r}]: not the name of an environment variable"
    for name in host.secrets:
        ok = _matches(ENV_NAME_PATTERN, name)
        yield _need(ok, "host.secrets", host.secrets, f"names of environment variables; {name!r} is none")
        ok = name not in host.env
        yield _need(
            ok, "host.secrets", host.secrets, f"{name!r} here or in host.env, which is shown and saved, not both"
        )
    yield _need(host.disk_free_gib_min >= 0, "host.disk_free_gib_min", host.disk_free_gib_min, ">= 0")
    yield from _at_least_one(host, "host", "threads_per_process")


def _model_checks(model: ModelConfig) -> Checks:
    yield _need(bool(model.name.strip()), "model.name", model.name, "a hub id or a directory")
    yield _seed(model.init_seed, "model.init_seed")
    lora = model.lora
    if lora is not None:
        yield from _at_least_one(lora, "model.lora", "rank")
        yield _need(lora.alpha > 0, "model.lora.alpha", lora.alpha, "> 0; twice the rank is common")
        yield _need(0 <= lora.dropout < 1, "model.lora.dropout", lora.dropout, "0 <= dropout < 1")
        names = lora.target_modules
        names_ok = names == "all-linear" or (len(names) > 0 and all(_matches(r"[\w.]+", name) for name in names))
        yield _need(names_ok, "model.lora.target_modules", names, "names of linear layers, or 'all-linear'")
        yield _seed(lora.init_seed, "model.lora.init_seed")


def _data_checks(data: DataConfig) -> Checks:
    yield _need(data.max_length >= 2, "data.max_length", data.max_length, ">= 2 tokens: one to read, one to predict")
    yield _seed(data.shuffle_seed, "data.shuffle_seed")
    for mixture in ("sft_mixture", "rl_mixture", "eval_mixture"):
        for index, spec in enumerate(getattr(data, mixture)):
            yield from _dataset_checks(spec, f"data.{mixture}[{index}]")
    for index, spec in enumerate(data.rl_mixture):
        need = "a format with prompts: plain text asks nothing"
        yield _need(spec.format != "text", f"data.rl_mixture[{index}].format", spec.format, need)


def _dataset_checks(spec: DatasetSpec, path: str) -> Checks:
    yield _need(bool(spec.name.strip()), f"{path}.name", spec.name, "a hub id, a directory or a .jsonl file")
    yield _need(bool(spec.split.strip()), f"{path}.split", spec.split, "the name of a split, such as 'train'")
    if spec.shuffle_seed is not None:
        yield _seed(spec.shuffle_seed, f"{path}.shuffle_seed")
    yield _need(spec.start >= 0, f"{path}.start", spec.start, ">= 0")
    stop_ok = spec.stop == -1 or spec.stop > spec.start
    yield _need(stop_ok, f"{path}.stop", spec.stop, f"> start={spec.start}, or -1 for the end")
    yield from _at_least_one(spec, path, "step")
    yield from _one_or_off(spec, path, max_samples="all rows")
    yield _need(spec.repeat >= 1, f"{path}.repeat", spec.repeat, ">= 1; leave the data set out to skip it")
    ends = spec.max_samples != -1 or spec.stop != -1
    if spec.streaming:
        need = "a number, or stop: streaming=True, and what is trained on is held in memory"
        yield _need(ends, f"{path}.max_samples", spec.max_samples, need)
    if spec.format in ("spelling_bee", "simple_spelling"):
        made = f"format={spec.format!r} makes its rows"
        yield _need(ends, f"{path}.max_samples", spec.max_samples, f"a number, or stop: {made} without end")
        yield _need(spec.split in ("train", "test"), f"{path}.split", spec.split, f"'train' or 'test': {made}")
        for name, off in (("subset", None), ("shuffle_seed", None), ("streaming", False)):
            yield _need(getattr(spec, name) is off, f"{path}.{name}", getattr(spec, name), f"{off}: {made}")


def _stage_checks(stage: SFTConfig | RLConfig, path: str) -> Checks:
    """What both stages have: learning rates and the optimizer."""
    rates = {name: getattr(stage, name) for name in ("unembedding_lr", "embedding_lr", "matrix_lr")}
    for name, rate in (*rates.items(), ("weight_decay", stage.weight_decay)):
        yield _need(rate >= 0, f"{path}.{name}", rate, ">= 0")
    yield any(rate > 0 for rate in rates.values()), f"{path}.{{{','.join(rates)}}}=0: nothing would be trained"
    yield _need(0 < stage.init_lr_frac <= 1, f"{path}.init_lr_frac", stage.init_lr_frac, "0 < init_lr_frac <= 1")
    optimizer, path = stage.optimizer, f"{path}.optimizer"
    yield _need(0 <= optimizer.beta1 < 1, f"{path}.beta1", optimizer.beta1, "0 <= beta1 < 1")
    yield _need(0 <= optimizer.beta2 < 1, f"{path}.beta2", optimizer.beta2, "0 <= beta2 < 1")
    yield _need(optimizer.eps > 0, f"{path}.eps", optimizer.eps, "> 0")
    yield _need(optimizer.max_grad_norm > 0, f"{path}.max_grad_norm", optimizer.max_grad_norm, "> 0; 1e9 never clips")
    yield _need(0 <= optimizer.warmup_frac < 1, f"{path}.warmup_frac", optimizer.warmup_frac, "0 <= warmup_frac < 1")
    muon, need = optimizer.muon, "a MuonConfig with kind='muon', None with 'adamw'"
    yield _need((muon is not None) == (optimizer.kind == "muon"), f"{path}.muon", muon, need)
    if muon is not None:
        yield _need(0 <= muon.momentum < 1, f"{path}.muon.momentum", muon.momentum, "0 <= momentum < 1")
        yield _need(1 <= muon.ns_steps < 100, f"{path}.muon.ns_steps", muon.ns_steps, "1 to 99; 5 is usual")
        yield _need(muon.vector_lr >= 0, f"{path}.muon.vector_lr", muon.vector_lr, ">= 0")
        yield from _one_or_off(muon, f"{path}.muon", width_reference="rates as they stand")


def _sft_checks(sft: SFTConfig) -> Checks:
    yield from _at_least_one(sft, "sft", "num_epochs", "batch_size", "target_examples_per_step", "log_every")
    yield from _one_or_off(
        sft,
        "sft",
        num_iterations="as many as num_epochs make",
        eval_every="only at the end",
        eval_steps="all of eval_mixture",
        micro_batch_tokens="batch_size examples",
        checkpoint_every="only at the end",
    )
    yield from _stage_checks(sft, "sft")


def _rl_checks(rl: RLConfig) -> Checks:
    yield from _at_least_one(
        rl,
        "rl",
        "num_epochs",
        "examples_per_step",
        "batch_size",
        "max_new_tokens",
        "log_every",
        "sync_every",
        "updates_per_batch",
    )
    yield from _one_or_off(
        rl,
        "rl",
        top_k="all tokens",
        eval_every="only before and after",
        eval_examples="all of eval_mixture",
        micro_batch_tokens="batch_size sequences",
        save_every="only at the end",
    )
    source_ok = rl.source in ENGINE_SOURCES or (rl.source.endswith(".jsonl") and bool(rl.source.removesuffix(".jsonl")))
    yield _need(source_ok, "rl.source", rl.source, "'engine', 'engine_only' or the path of a run's rollouts.jsonl")
    yield _need(rl.num_samples >= 2, "rl.num_samples", rl.num_samples, ">= 2, else every advantage is 0")
    yield _need(rl.temperature > 0, "rl.temperature", rl.temperature, "> 0: sampling is what RL learns from")
    yield from _loss_checks(rl)
    if rl.reward_fn is None:
        need = "a dotted path, package.module.function: only an agent's environment has rewards of its own"
        yield _need(rl.agent is not None, "rl.reward_fn", None, need)
    else:
        reward_ok = _matches(DOTTED_NAME_PATTERN, rl.reward_fn)
        yield _need(reward_ok, "rl.reward_fn", rl.reward_fn, "a dotted path, package.module.function")
    filter_ok = rl.filter_fn is None or _matches(DOTTED_NAME_PATTERN, rl.filter_fn)
    yield _need(filter_ok, "rl.filter_fn", rl.filter_fn, "a dotted path, package.module.function, or None")
    factor_ok = 1 <= rl.over_sampling_factor <= 16
    yield _need(factor_ok, "rl.over_sampling_factor", rl.over_sampling_factor, "1 to 16")
    yield _need(rl.retries_max >= 0, "rl.retries_max", rl.retries_max, ">= 0")
    yield _need(rl.reward_workers >= 0, "rl.reward_workers", rl.reward_workers, ">= 0")
    yield from _lag_checks(rl)
    if rl.agent is not None:
        yield from _agent_checks(rl.agent)
    yield _seed(rl.seed, "rl.seed")
    yield from _stage_checks(rl, "rl")


def _agent_checks(agent: AgentConfig) -> Checks:
    path_ok = _matches(DOTTED_NAME_PATTERN, agent.environment)
    yield _need(path_ok, "rl.agent.environment", agent.environment, "a dotted path, package.module.Class")
    yield from _at_least_one(agent, "rl.agent", "turns_max", "tokens_max")
    yield _need(agent.timeout_s > 0, "rl.agent.timeout_s", agent.timeout_s, "> 0 seconds")


def _lag_checks(rl: RLConfig) -> Checks:
    """Generation that runs ahead of training."""
    lag, path = rl.policy_lag_steps_max, "rl.policy_lag_steps_max"
    yield _need(lag >= 0, path, lag, ">= 0")
    idle = rl.in_flight_updates and lag == 0
    need = "False: with policy_lag_steps_max=0 nothing runs while weights change"
    yield _need(not idle, "rl.in_flight_updates", rl.in_flight_updates, need)
    if lag > 0:
        yield _need(rl.source == "engine", path, lag, f"0: rl.source={rl.source!r} does not sample what it trains on")
        need = f"0, or >= sync_every={rl.sync_every}: the weights are as old as that in any case"
        yield _need(lag >= rl.sync_every, path, lag, need)
        need = "another than 'none' with policy_lag_steps_max > 0: loss='grpo' takes older samples for its own"
        yield _need(rl.loss != "grpo" or rl.importance != "none", "rl.importance", rl.importance, need)


def _loss_checks(rl: RLConfig) -> Checks:
    yield _need(0 < rl.clip_low <= 1, "rl.clip_low", rl.clip_low, "0 < clip_low <= 1; 1 sets no lower bound")
    yield _need(rl.clip_high > 0, "rl.clip_high", rl.clip_high, "> 0")
    dual_ok = rl.dual_clip == -1 or (rl.dual_clip > 1 + rl.clip_high and rl.loss in ("ppo", "gspo"))
    yield _need(dual_ok, "rl.dual_clip", rl.dual_clip, "> 1 + clip_high with loss 'ppo' or 'gspo', or -1 for no bound")
    importance_ok = rl.importance == "none" or rl.loss == "grpo"
    yield _need(importance_ok, "rl.importance", rl.importance, f"'none': loss={rl.loss!r} has the ratio to the sampler")
    yield _need(rl.importance_cap > 0, "rl.importance_cap", rl.importance_cap, "> 0")
    yield _need(0 < rl.gamma <= 1, "rl.gamma", rl.gamma, "0 < gamma <= 1")
    yield _need(0 <= rl.gae_lambda <= 1, "rl.gae_lambda", rl.gae_lambda, "0 <= gae_lambda <= 1")
    yield _need(rl.value_coef > 0, "rl.value_coef", rl.value_coef, "> 0, else no value is learned")
    yield _need(rl.value_clip > 0 or rl.value_clip == -1, "rl.value_clip", rl.value_clip, "> 0, or -1 for no bound")
    yield _need(rl.value_lr > 0, "rl.value_lr", rl.value_lr, "> 0")
    norm_ok = rl.baseline != "value" or rl.advantage_norm != "group_std"
    need = "'none' or 'batch': baseline='value' has advantages of tokens"
    yield _need(norm_ok, "rl.advantage_norm", rl.advantage_norm, need)
    bounded = rl.loss != "grpo" or rl.updates_per_batch == 1
    need = "1 with loss='grpo', which has no bound on the ratio; or 'ppo', 'gspo', 'cispo'"
    yield _need(bounded, "rl.updates_per_batch", rl.updates_per_batch, need)
    yield _need(rl.kl_coef >= 0, "rl.kl_coef", rl.kl_coef, ">= 0")
    name = rl.kl_reference
    yield _need(name is None or bool(name.strip()), "rl.kl_reference", name, "a hub id, a directory or None")
    yield _need(rl.entropy_coef >= 0, "rl.entropy_coef", rl.entropy_coef, ">= 0")


def _eval_checks(evaluation: EvalConfig) -> Checks:
    samples, ks = evaluation.num_samples, evaluation.pass_at
    yield _need(samples >= 0, "eval.num_samples", samples, ">= 0; 0 samples nothing")
    need = f"each k within 1 and num_samples={samples}" if samples else "[], since num_samples=0 samples nothing"
    yield _need(all(1 <= k <= samples for k in ks), "eval.pass_at", ks, need)
    yield _need(
        bool(ks) or samples <= 0, "eval.pass_at", ks, f"at least one k, or num_samples={samples} is for nothing"
    )
    yield _need(
        evaluation.temperature > 0, "eval.temperature", evaluation.temperature, "> 0: the greedy answer is extra"
    )
    yield from _one_or_off(evaluation, "eval", top_k="all tokens")
    yield _seed(evaluation.seed, "eval.seed")


def _engine_checks(engine: EngineConfig) -> Checks:
    yield from _rank_checks(engine.gpu_ranks, "engine.gpu_ranks")
    needed = engine.replicas * engine.tensor_parallel_size
    need = f"length {needed}: replicas={engine.replicas} x tensor_parallel_size={engine.tensor_parallel_size}"
    counts_ok = needed < 1 or len(engine.gpu_ranks) == needed
    yield _need(counts_ok, "engine.gpu_ranks", engine.gpu_ranks, need)
    yield from _at_least_one(
        engine,
        "engine",
        *("tensor_parallel_size", "replicas", "context_length", "max_running_requests", "weight_sync_bucket_mib"),
    )
    last = 65535 - (engine.replicas - 1)
    need = f"1024 to {last}: each of the {engine.replicas} replicas has a port of its own, from this one on"
    need = need if engine.replicas > 1 else "1024 to 65535"
    yield _need(1024 <= engine.sglang_port <= last, "engine.sglang_port", engine.sglang_port, need)
    yield from _router_checks(engine)
    if engine.kind == "embedded":
        one = "1: the embedded engine runs on one device"
        yield _need(engine.tensor_parallel_size == 1, "engine.tensor_parallel_size", engine.tensor_parallel_size, one)
    else:
        need = f"a lock, such as 'requirements/{engine.kind}-cuda.txt': the trainer's environment has no {engine.kind}"
        yield _need(engine.requirements_file is not None, "engine.requirements_file", None, need)
    file = engine.requirements_file
    yield _need(_is_inside(file), "engine.requirements_file", file, "a path inside the repository, or None")
    yield _need(0 < engine.mem_fraction <= 1, "engine.mem_fraction", engine.mem_fraction, "0 < mem_fraction <= 1")
    yield from _one_or_off(engine, "engine", max_total_tokens="as mem_fraction allows")
    tokens_ok = engine.kind == "sglang" or engine.max_total_tokens == -1
    yield _need(
        tokens_ok, "engine.max_total_tokens", engine.max_total_tokens, f"-1: kind={engine.kind!r} has no such bound"
    )
    most = engine.max_total_tokens
    holds = engine.kind != "sglang" or most < 1 or most >= engine.context_length
    need = f"at least engine.context_length={engine.context_length}, or -1: answers that do not fit are cut short"
    yield _need(holds, "engine.max_total_tokens", most, need)
    yield _need(engine.restarts_max >= 0, "engine.restarts_max", engine.restarts_max, ">= 0")
    kinds = WEIGHT_SYNCS[engine.kind]
    need = f"{' or '.join(map(repr, kinds))} with engine.kind={engine.kind!r}"
    yield _need(engine.weight_sync in kinds, "engine.weight_sync", engine.weight_sync, need)
    on_disk = engine.weight_sync in ("disk", "lora") or not engine.weights_on_tmpfs
    need = f"False: engine.weight_sync={engine.weight_sync!r} writes no weights to disk"
    yield _need(on_disk, "engine.weights_on_tmpfs", engine.weights_on_tmpfs, need)
    sleeps = engine.sleep_while_training
    need = "False: only engine.kind='sglang' gives its memory back"
    yield _need(not sleeps or engine.kind == "sglang", "engine.sleep_while_training", sleeps, need)


def _router_checks(engine: EngineConfig) -> Checks:
    port, path, replicas = engine.router_port, "engine.router_port", engine.replicas
    if port is None:
        return
    yield _need(engine.kind == "sglang", path, port, f"None: engine.kind={engine.kind!r} has no router, 'sglang' has")
    yield _need(replicas > 1, path, port, f"None, or more replicas: with replicas={replicas} there is nothing to route")
    yield _need(1024 <= port <= 65535, path, port, "1024 to 65535, or None for no router")
    first, last = engine.sglang_port, engine.sglang_port + replicas - 1
    yield _need(not first <= port <= last, path, port, f"a port of its own: {first} to {last} are the replicas'")
    need = "None with engine.weight_sync='lora': each replica has a name of its own for the adapter that is asked for"
    yield _need(engine.weight_sync != "lora", path, port, need)


def _engine_fits(config: Config, engine: EngineConfig) -> Checks:
    """What the engine's settings mean on this kind of device, and for what is asked of it."""
    device, kind = config.target.device_type, engine.kind
    if device == "mps":
        yield _need(kind == "embedded", "engine.kind", kind, "'embedded' with target.device_type='mps'")
    if device == "cpu":
        size = engine.tensor_parallel_size
        yield _need(size == 1, "engine.tensor_parallel_size", size, "1 with target.device_type='cpu'")
        bounded = kind != "sglang" or engine.max_total_tokens != -1
        need = "a number with kind='sglang' on a cpu, such as 65536: else the cache takes most of the host's memory"
        yield _need(bounded, "engine.max_total_tokens", -1, need)
    if kind == "vllm" and config.rl is not None:
        need = "-1 with engine.kind='vllm', whose log-probs beside top_k are of the filtered distribution"
        yield _need(config.rl.top_k == -1, "rl.top_k", config.rl.top_k, need)
    need = f"more than rl.max_new_tokens={config.rl.max_new_tokens if config.rl else 0}: the prompt counts too"
    room = config.rl is None or engine.context_length > config.rl.max_new_tokens
    yield _need(room, "engine.context_length", engine.context_length, need)


def _limits_checks(limits: LimitsConfig) -> Checks:
    for field in dataclasses.fields(limits):
        value = getattr(limits, field.name)
        yield _need(value > 0, f"limits.{field.name}", value, "> 0 seconds")


def _output_checks(output: OutputConfig) -> Checks:
    yield _need(bool(output.save_dir.strip()), "output.save_dir", output.save_dir, "a directory")
    name_ok = _matches(EXPERIMENT_NAME_PATTERN, output.experiment_name)
    yield _need(name_ok, "output.experiment_name", output.experiment_name, "1 to 48 letters, digits, '-' or '_'")
    project_ok = bool(output.wandb_project.strip()) or not output.use_wandb
    yield _need(project_ok, "output.wandb_project", output.wandb_project, "a name, since use_wandb=True")
    source = output.source_checkpoint
    source_ok = source is None or bool(source.strip())
    yield _need(source_ok, "output.source_checkpoint", source, "a directory on the host, or None")
    yield from _one_or_off(output, "output", checkpoints_keep="all of them")
    for stage, best in output.checkpoint_best.items():
        yield _need(stage in ("sft", "rl"), "output.checkpoint_best", output.checkpoint_best, "keys 'sft' and 'rl'")
        ok = _matches(BEST_PATTERN, best)
        path = f"output.checkpoint_best[{stage!r}]"
        yield _need(ok, path, best, "'min <metric>' or 'max <metric>', a metric of metrics.jsonl")
        kept = output.checkpoints_keep != -1
        yield _need(kept, path, best, "checkpoints_keep >= 1: with -1 all are kept, the best among them")


_GROUP_CHECKS: Mapping[str, typing.Callable[[Any], Checks]] = {
    "target": _target_checks,
    "host": _host_checks,
    "model": _model_checks,
    "data": _data_checks,
    "sft": _sft_checks,
    "rl": _rl_checks,
    "eval": _eval_checks,
    "engine": _engine_checks,
    "limits": _limits_checks,
    "output": _output_checks,
}


def _cross_checks(config: Config) -> Checks:
    """What no group can see alone. Runs only when every type is right."""
    mode, ranks, data = config.output.mode, max(1, len(config.target.gpu_ranks)), config.data
    for name in config.stages:
        yield getattr(config, name) is not None, f"{name}=None: output.mode={mode!r} has this stage, which needs it"
        mixture = f"{name}_mixture"
        if name == "sft" or config.uses_engine:
            yield bool(getattr(data, mixture)), f"data.{mixture}=[]: empty, and output.mode={mode!r} trains on it"
        stage = getattr(config, name)
        if stage is not None and stage.eval_every != -1:
            need = "-1, or rows in data.eval_mixture, which is empty"
            yield _need(bool(data.eval_mixture), f"{name}.eval_every", stage.eval_every, need)
    if config.rl is not None and "rl" in config.stages and config.rl.eval_every != -1 and data.eval_mixture:
        need = "-1, or rows with prompts in data.eval_mixture, which has plain text alone"
        asked = any(spec.format != "text" for spec in data.eval_mixture)
        yield _need(asked, "rl.eval_every", config.rl.eval_every, need)
    if config.uses_engine:
        yield config.engine is not None, f"engine=None: output.mode={mode!r} has an rl stage, which samples from it"
        if config.engine is not None:
            yield from _engine_fits(config, config.engine)
            yield from _weight_sync_checks(config, config.engine)
    if config.sft is not None and config.sft.batch_size >= 1 and config.sft.micro_batch_tokens == -1:
        target, per_pass = config.sft.target_examples_per_step, config.sft.batch_size * ranks
        need = f"a multiple of batch_size x ranks = {config.sft.batch_size} x {ranks}"
        yield _need(target % per_pass == 0, "sft.target_examples_per_step", target, need)
    if config.rl is not None:
        samples = config.rl.examples_per_step * config.rl.num_samples
        need = f"a product with num_samples={config.rl.num_samples} that {ranks} ranks can share evenly"
        yield _need(samples % ranks == 0, "rl.examples_per_step", config.rl.examples_per_step, need)
        if config.rl.agent is not None and config.engine is not None:
            room, need = config.engine.context_length, f"at most engine.context_length={config.engine.context_length}"
            tokens = config.rl.agent.tokens_max
            yield _need(tokens <= room, "rl.agent.tokens_max", tokens, need)
        need = f"less than data.max_length={data.max_length}"
        yield _need(config.rl.max_new_tokens < data.max_length, "rl.max_new_tokens", config.rl.max_new_tokens, need)
    compiled = config.model.compile and config.target.sharding != "none"
    yield _need(not compiled, "model.compile", config.model.compile, "False: a sharded model runs uncompiled")
    if config.rl is not None and "rl" in config.stages and config.target.sharding != "none":
        valued = config.rl.baseline == "value"
        yield _need(
            not valued, "rl.baseline", "value", "another with target.sharding: a sharded model has no value head"
        )
        replayed = not config.uses_engine and bool(data.eval_mixture)
        need = "[] with target.sharding and rl.source a file: without an engine, a sharded model answers no questions"
        yield not replayed, f"data.eval_mixture: needs {need}"
    for name in config.stages:
        if getattr(config, name) is not None:
            yield from _rate_checks(config, name)
    starts_rl = mode == "rl" and config.uses_engine and config.output.source_checkpoint is None
    noise = config.model.init == "random" and starts_rl
    yield not noise, "model.init='random': output.mode='rl' would sample from noise; use 'sft+rl' or source_checkpoint"


def _weight_sync_checks(config: Config, engine: EngineConfig) -> Checks:
    """Whether the engine can be reached in the way that its weights are to come."""
    target, lag = config.target, config.rl.policy_lag_steps_max if config.rl else 0
    if engine.weight_sync == "lora":
        yield from _adapter_checks(config, engine)
    ahead = engine.sleep_while_training and lag > 0
    need = f"False: with rl.policy_lag_steps_max={lag} the engine samples while the trainer steps"
    yield _need(not ahead, "engine.sleep_while_training", engine.sleep_while_training, need)
    if target.device_type != "cuda":
        sleeps = engine.sleep_while_training and engine.kind == "sglang"
        need = "False without target.device_type='cuda': there is no GPU to share"
        yield _need(not sleeps, "engine.sleep_while_training", True, need)
        return
    shared = bool(target.gpu_ranks) and target.gpu_ranks[0] in engine.gpu_ranks
    where = f"target.gpu_ranks[0] {'is' if shared else 'is not'} among engine.gpu_ranks={engine.gpu_ranks}"
    need = f"'broadcast' or 'disk': CUDA memory is shared on one GPU, and {where}"
    yield _need(shared or engine.weight_sync != "tensor", "engine.weight_sync", engine.weight_sync, need)
    single = engine.replicas == 1
    need = f"'broadcast' or 'disk' with engine.replicas={engine.replicas}: CUDA memory is shared on one GPU, and only"
    need = f"{need} one replica has target.gpu_ranks[0]"
    yield _need(single or not shared or engine.weight_sync != "tensor", "engine.weight_sync", "tensor", need)
    grows = [name for name in ALLOCATOR_SETTINGS if _grows_segments(config.host.env.get(name, ""))]
    need = "without expandable_segments:True for engine.weight_sync='tensor': such memory has no handles to share"
    for name in grows:
        yield _need(engine.weight_sync != "tensor", f"host.env[{name!r}]", config.host.env[name], need)
    need = f"'tensor' or 'disk': NCCL wants a GPU of its own for each side, and {where}"
    yield _need(not shared or engine.weight_sync != "broadcast", "engine.weight_sync", engine.weight_sync, need)
    sleeps = engine.sleep_while_training
    need = f"False: there is memory to give back where a GPU is shared, and {where}"
    yield _need(shared or not sleeps, "engine.sleep_while_training", sleeps, need)


def _grows_segments(settings: str) -> bool:
    """Whether these settings of torch's allocator make segments that can grow."""
    pairs = (part.partition(":") for part in settings.replace(" ", "").lower().split(","))
    return any(name == "expandable_segments" and value in ("true", "1") for name, _, value in pairs)


def _adapter_checks(config: Config, engine: EngineConfig) -> Checks:
    """Whether adapters alone can be sent: weight_sync="lora"."""
    lora, rl = config.model.lora, config.rl
    need = "'disk', 'tensor' or 'broadcast' with model.lora=None: there are no adapters to send"
    yield _need(lora is not None, "engine.weight_sync", "lora", need)
    if lora is not None and lora.target_modules != "all-linear":
        others = [name for name in lora.target_modules if name.rpartition(".")[2] not in SGLANG_LORA_TARGETS]
        need = f"names that SGLang has adapters for ({', '.join(SGLANG_LORA_TARGETS)}), or weight_sync='disk'"
        yield _need(not others, "model.lora.target_modules", others, need)
    need = "False with engine.weight_sync='lora': a request keeps the adapter that it started with"
    yield _need(not (rl and rl.in_flight_updates), "rl.in_flight_updates", True, need)
    need = "False with engine.weight_sync='lora': the engine's own weights, which nobody sends again, would be lost"
    yield _need(not engine.sleep_while_training, "engine.sleep_while_training", True, need)


def _rate_checks(config: Config, name: str) -> Checks:
    """Learning rates that cannot be meant, given the model and the optimizer."""
    stage = getattr(config, name)
    lora = config.model.lora is not None
    if lora:
        yield _need(stage.matrix_lr > 0, f"{name}.matrix_lr", stage.matrix_lr, "> 0: it is the rate of model.lora")
    for field in ("matrix_lr", "embedding_lr", "unembedding_lr"):
        rate = getattr(stage, field)
        if lora and field != "matrix_lr":
            yield _need(
                rate == 0, f"{name}.{field}", rate, "0: with model.lora only adapters are trained, at matrix_lr"
            )
        pretrained_adamw = config.model.init == "pretrained" and stage.optimizer.kind == "adamw"
        wild = pretrained_adamw and rate >= 0.01 and rate * stage.init_lr_frac > 1e-4
        need = "about 1e-5 (LoRA: 1e-4) with init_lr_frac=1 for AdamW on a pretrained model; rates such as nanochat's"
        yield _need(not wild, f"{name}.{field}", rate, f"{need} 0.02 and 0.2 are for optimizer.kind='muon'")


def _matches(pattern: str, text: str) -> bool:
    return re.fullmatch(pattern, text) is not None
