"""docs/reference/config.md out of the schema and the checks. Called by make_reference.py."""

import dataclasses
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import base_config as c
from rollouts.config.explain import field_comments, type_text
from rollouts.config.json_form import field_types

ROOT = Path(__file__).resolve().parent.parent
MADE = "<!-- made by scripts/make_reference.py -->"
WIDTH = 108
MUON = c.MuonConfig(
    momentum=0.95,
    nesterov=True,
    ns_steps=5,
    adjust_lr="match_rms_adamw",
    vector_lr=1e-3,
    width_reference=-1,
)
IMPORTANCE = c.ImportanceConfig(kind="token_truncate", cap=2.0)
POLICY: dict[str, Any] = {
    "advantage_norm": "group_std",
    "aggregation": "token_mean",
    "entropy_coef": 0.0,
}
CLIP: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.2, "updates_per_batch": 1}
ENGINE: dict[str, Any] = {
    "gpu_ranks": [0],
    "sglang_port": 30180,
    "replicas": 1,
    "mem_fraction": 0.5,
    "context_length": 2048,
    "max_running_requests": 256,
    "restarts_max": 3,
}


@dataclass(frozen=True)
class Block:
    """One class on the page: its variable, its place in a config, and a value if the demo has none."""

    name: str
    path: str
    heading: str
    value: Any = None


BLOCKS = (
    Block("target", "target", "target: which devices train"),
    Block("host", "host", "host: how the host is made ready"),
    Block(
        "lora",
        "model.lora",
        "model.lora: adapters",
        c.LoraConfig(rank=16, alpha=32.0, dropout=0.0, target_modules="all-linear", init_seed=0),
    ),
    Block("model", "model", "model"),
    Block("dataset", "data.sft_mixture.0", "data: one data set of a mixture"),
    Block("data", "data", "data: the mixtures"),
    Block("evaluation", "eval", "eval: how held-out rows are answered"),
    Block("muon", "sft.optimizer.muon", "optimizer.muon", MUON),
    Block("optimizer", "sft.optimizer", "optimizer: of sft and of rl"),
    Block("sft", "sft", "sft: supervised fine-tuning"),
    Block("grpo", "rl.loss", "rl.loss: GRPO"),
    Block("importance", "rl.loss.importance", "rl.loss.importance", IMPORTANCE),
    Block("ppo", "rl.loss", "rl.loss: PPO", c.PPO(**POLICY, **CLIP, dual_clip=None)),
    Block("gspo", "rl.loss", "rl.loss: GSPO", c.GSPO(**POLICY, **CLIP, dual_clip=None)),
    Block("cispo", "rl.loss", "rl.loss: CISPO", c.CISPO(**POLICY, **CLIP)),
    Block(
        "value_model",
        "rl.baseline",
        "rl.baseline: a value model",
        c.ValueModel(gamma=1.0, gae_lambda=0.95, coef=0.5, clip=0.2, lr=1e-4),
    ),
    Block("kl", "rl.kl", "rl.kl: a penalty", c.KLConfig(coef=0.04, kind="k3", reference=None)),
    Block("reward", "rl.reward", "rl.reward"),
    Block(
        "agent",
        "rl.agent",
        "rl.agent",
        c.AgentConfig(
            environment="rollouts.agents.environment.AskAgain",
            tool_format="hermes",
            turns_max=2,
            tokens_max=64,
            timeout_s=60.0,
        ),
    ),
    Block("sampling", "rl.sampling", "rl.sampling"),
    Block(
        "ahead",
        "rl.ahead",
        "rl.ahead",
        c.AheadConfig(policy_lag_steps_max=1, in_flight_updates=False),
    ),
    Block("rl", "rl", "rl: reinforcement learning"),
    Block("disk", "engine.weight_sync", "engine.weight_sync: DiskSync"),
    Block(
        "tensor",
        "engine.weight_sync",
        "engine.weight_sync: TensorSync",
        c.TensorSync(bucket_mib=256),
    ),
    Block(
        "broadcast",
        "engine.weight_sync",
        "engine.weight_sync: BroadcastSync",
        c.BroadcastSync(bucket_mib=256),
    ),
    Block(
        "adapter", "engine.weight_sync", "engine.weight_sync: LoraSync", c.LoraSync(on_tmpfs=True)
    ),
    Block("embedded", "engine", "engine: Embedded"),
    Block(
        "sglang",
        "engine",
        "engine: SGLang",
        c.SGLang(
            hosts=None,
            **ENGINE,
            requirements_file="requirements/sglang-cpu.txt",
            tensor_parallel_size=1,
            router_port=None,
            max_total_tokens=65_536,
            sleep_while_training=False,
            weight_sync=c.DiskSync(on_tmpfs=False),
        ),
    ),
    Block(
        "vllm",
        "engine",
        "engine: VLLM",
        c.VLLM(
            hosts=None,
            **ENGINE,
            requirements_file="requirements/vllm-cuda.txt",
            tensor_parallel_size=1,
            weight_sync=c.DiskSync(on_tmpfs=False),
        ),
    ),
    Block("limits", "limits", "limits: how long things may take"),
    Block(
        "wandb",
        "output.trackers.0",
        "output.trackers: Wandb",
        c.Wandb(project="letters", offline=False),
    ),
    Block(
        "trackio",
        "output.trackers.0",
        "output.trackers: Trackio",
        c.Trackio(project="letters", directory=None),
    ),
    Block(
        "mlflow",
        "output.trackers.0",
        "output.trackers: Mlflow",
        c.Mlflow(project="letters", tracking_uri=None),
    ),
    Block(
        "tensorboard",
        "output.trackers.0",
        "output.trackers: TensorBoard",
        c.TensorBoard(project="letters", directory=None),
    ),
    Block("output", "output", "output: stages, names, checkpoints"),
    Block(
        "machine",
        "provision",
        "provision: a machine to rent",
        c.ProvisionConfig(
            providers=["vast", "runpod"],
            gpu_types=["H100"],
            gpu_memory_gb_min=80.0,
            gpus=1,
            regions=[],
            spot=False,
            disk_gib=100,
            image=None,
            price_per_hour_max=3.0,
            hours_max=6.0,
            spend_max=15.0,
            idle_minutes_max=30.0,
            allow_unguarded=False,
            guard_host=None,
            ready_timeout_s=1500.0,
            retries_max=2,
            resumes_max=3,
            when_done="end",
        ),
    ),
)


def config_page() -> str:
    """The page on every field of a config, as Python that builds one."""
    demo = c.load_config(ROOT / "configs" / "00_cpu_sft_rl.py")
    shown: dict[type, str] = {}
    parts = [
        "# The config\n\n" + MADE + "\n",
        "Each block is a class with every field: above a field its meaning, behind it its type and what is allowed.\n"
        "The values are the CPU demo's where it has one. No field has a default. `deploy CONFIG --show`\n"
        "prints yours.\n",
        _fence("from base_config import (\n" + "".join(f"    {name},\n" for name in _used()) + ")"),
    ]
    for block in BLOCKS:
        config = demo if block.value is None else _with(demo, block)
        value = _at(demo, block.path) if block.value is None else block.value
        parts.append(f"## {block.heading}\n")
        parts += [f"{text}\n" for text in [_docstring(type(value))] if text]
        parts.append(_fence("\n".join(_class_lines(block, value, config, shown))))
        shown.setdefault(type(value), block.name)
    fields = [field.name for field in dataclasses.fields(c.Config)]
    names = {"eval": "evaluation", "engine": "embedded", "provision": "None"}
    body = "\n".join(f"    {name}={names.get(name, name)}," for name in fields)
    parts.append("## Together\n")
    may_be_none = (
        "`sft` or `rl` may be None where `output.mode` has no such stage; `engine` where nothing samples.\n",
        "`provision` is None on a machine of one's own.\n",
    )
    parts.append("".join(may_be_none))
    parts.append(
        _fence(f"config = Config(\n{body}\n)\nprint(config.problems())") + "\n```output\n()\n```\n"
    )
    return "\n".join(parts)


def _with(demo: c.Config, block: Block) -> c.Config:
    """Return the demo with a block's value, which may be the one item of a list."""
    of_list, _, item = block.path.rpartition(".")
    return c.changed(demo, {of_list: [block.value]} if item == "0" else {block.path: block.value})


def _used() -> list[str]:
    """The names that the blocks use, in the order of isort."""
    classes = [name for name in c.__all__ if isinstance(getattr(c, name), type)]
    shown = [name for name in classes if dataclasses.is_dataclass(getattr(c, name))]
    return sorted(shown, key=lambda name: (not name.isupper(), name))


def _fence(code: str) -> str:
    return f"```python\n{code}\n```\n"


def _docstring(cls: type) -> str:
    own = cls.__doc__ if cls.__doc__ and not cls.__doc__.startswith(f"{cls.__name__}(") else ""
    return re.sub(r"docs/reference/([\w-]+)\.md", r"[\1](\1.md)", " ".join(own.split()))


def _at(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = config[int(name)] if name.isdigit() else getattr(config, name)
    return config


def _class_lines(block: Block, value: Any, config: Any, shown: dict[type, str]) -> Iterator[str]:
    comments, types = field_comments(type(value)), field_types(type(value))
    yield f"{block.name} = {type(value).__name__}("
    for field in dataclasses.fields(value):
        meaning = textwrap.wrap(comments[field.name], WIDTH - 6)
        yield from (f"    # {part}" for part in meaning)
        about = type_text(types[field.name]) + _allowed(
            config, f"{block.path}.{field.name}", getattr(value, field.name)
        )
        line = f"    {field.name}={_source(getattr(value, field.name), shown)},"
        if len(line) + len(about) > WIDTH:
            yield from (f"    # {part}" for part in textwrap.wrap(about, WIDTH - 6))
            yield line
        else:
            yield f"{line}  # {about}"
    yield ")"


def _source(value: Any, shown: dict[type, str]) -> str:
    if dataclasses.is_dataclass(value):
        return shown[type(value)]
    if isinstance(value, list):
        return "[" + ", ".join(_source(item, shown) for item in value) + "]"
    if isinstance(value, dict):
        return (
            "{" + ", ".join(f'"{key}": {_source(item, shown)}' for key, item in value.items()) + "}"
        )
    return f'"{value}"' if isinstance(value, str) else repr(value)


def _allowed(config: Any, path: str, value: Any) -> str:
    """What the checks say of values that are not allowed; "" where they allow what was tried."""
    if isinstance(value, bool) or value is None:
        return ""
    tries: tuple[Any, ...] = {int: (-7, 0), float: (-7.0, 0.0, 1e9), str: ("",), list: ([],)}.get(
        type(value), ()
    )
    place = re.sub(r"\.(\d+)", r"[\1]", path)
    for tried in tries:
        problems = c.changed(config, {path: tried}).problems()
        for problem in problems:
            said = re.fullmatch(re.escape(place) + r"=.*?: needs (.*)", problem)
            if said and not re.search(r"=\d|\d x \d|^one of |only sharding", said[1]):
                return f"; {said[1]}"
    return ""
