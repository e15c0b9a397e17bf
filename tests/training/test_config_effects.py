"""Every field of the config's model and optimizers changes what the trainer makes of it."""

import dataclasses
import json
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch

from base_config import Config, LoraConfig, MuonConfig
from rollouts.training.checkpoint import Retention
from rollouts.training.loops.train_step import train_step
from rollouts.training.lora import is_lora, merged_state_dict
from rollouts.training.metrics import WandbLogger
from rollouts.training.model_loading import ModelError, load_model
from rollouts.training.rewards.scoring import scoring
from rollouts.training.rollout_gen.concurrency import gather_in_order
from rollouts.training.types import Sample
from rollouts.worker.builders.backend import build_backend
from rollouts.worker.builders.loss import rl_training_config
from rollouts.worker.builders.model import base_model, reference_name
from rollouts.worker.builders.rollout_source import build_generate_fn
from rollouts.worker.stages.log import logged_steps
from tests import example_config as example
from tests.example_config import example_config, importance, kl, replace_at
from tests.training.backends.test_pytorch import rl_batch, sft_batch
from tests.training.tiny_task import TINY_MODEL, InProcessEngine, tiny_tokenizer

STEPS = 4
MUON = MuonConfig(
    momentum=0.9,
    nesterov=True,
    ns_steps=5,
    adjust_lr="original",
    vector_lr=1e-3,
    width_reference=-1,
)
LORA = LoraConfig(rank=2, alpha=4.0, dropout=0.0, target_modules="all-linear", init_seed=0)


def changed(changes: dict[str, Any], config: Config | None = None) -> Config:
    config = config or replace_at(example_config(), "sft.optimizer.warmup_frac", 0.5)
    for path, value in changes.items():
        config = replace_at(config, path, value)
    return config


def with_muon() -> Config:
    config = changed({})
    assert config.sft is not None
    return changed({"sft.optimizer": dataclasses.replace(config.sft.optimizer, muon=MUON)})


BASES = {"adamw": changed({}), "muon": with_muon(), "lora": changed({"model.lora": LORA})}


def backend_of(
    config: Config,
    directory: Path,
    stage: str = "sft",
    model_path: str | None = None,
    reference: str | None = None,
) -> Any:
    torch.manual_seed(0)  # as the trainer does
    return build_backend(
        config,
        stage,
        checkpoint_dir=directory / stage,
        model_path=model_path or config.model.name,
        tokenizer=tiny_tokenizer(),
        device=torch.device("cpu"),
        num_steps=STEPS,
        reference=reference,
        retention=Retention(),
    )


def train(backend: Any, steps: int = STEPS) -> list[dict[str, float]]:
    async def main() -> list[dict[str, float]]:
        return [await train_step(backend, sft_batch(seed=seed), 4) for seed in range(steps)]

    return anyio.run(main)


def weights(model: Any) -> torch.Tensor:
    state = merged_state_dict(model) if is_lora(model) else model.state_dict()
    return torch.cat([tensor.detach().flatten().float() for _, tensor in sorted(state.items())])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights after STEPS of each base config."""
    directory = tmp_path_factory.mktemp("bases")
    found = {}
    for name, base in BASES.items():
        backend = backend_of(base, directory)
        train(backend)
        found[name] = weights(backend.model)
    return found


EFFECTS: list[tuple[str, str, Any]] = [
    ("adamw", "model.init_seed", 1),
    ("adamw", "model.dtype", "bfloat16"),
    ("adamw", "model.lora", LORA),
    ("adamw", "sft.matrix_lr", 2e-3),
    ("adamw", "sft.embedding_lr", 2e-3),
    ("adamw", "sft.unembedding_lr", 2e-3),
    ("adamw", "sft.weight_decay", 0.1),
    ("adamw", "sft.init_lr_frac", 0.5),
    ("adamw", "sft.optimizer.beta1", 0.5),
    ("adamw", "sft.optimizer.beta2", 0.5),
    ("adamw", "sft.optimizer.eps", 1e-2),
    ("adamw", "sft.optimizer.max_grad_norm", 1e-3),
    ("adamw", "sft.optimizer.warmup_frac", 0.0),
    ("adamw", "sft.optimizer.schedule", "linear"),
    ("adamw", "sft.optimizer.schedule", "cosine"),
    ("adamw", "sft.optimizer", with_muon().sft.optimizer),
    ("muon", "sft.optimizer.muon.momentum", 0.5),
    ("muon", "sft.optimizer.muon.nesterov", False),
    ("muon", "sft.optimizer.muon.ns_steps", 3),
    ("muon", "sft.optimizer.muon.adjust_lr", "match_rms_adamw"),
    ("muon", "sft.optimizer.muon.vector_lr", 2e-3),
    ("muon", "sft.optimizer.muon.width_reference", 768),
    ("muon", "sft.optimizer.beta1", 0.5),
    ("muon", "sft.init_lr_frac", 0.5),
    ("lora", "model.lora.rank", 4),
    ("lora", "model.lora.alpha", 8.0),
    ("lora", "model.lora.dropout", 0.5),
    ("lora", "model.lora.target_modules", ["q_proj"]),
    ("lora", "model.lora.init_seed", 1),
]


@pytest.mark.parametrize(("base", "field", "value"), EFFECTS, ids=lambda item: str(item)[:40])
def test_every_field_changes_the_weights(
    tmp_path: Path, trained: dict[str, torch.Tensor], base: str, field: str, value: Any
) -> None:
    """Goal: each field reaches the model or the optimizer. Red with any one left out of `build_model`,
    `stage_optimizer` or `build_backend`."""
    backend = backend_of(changed({field: value}, BASES[base]), tmp_path)
    train(backend)
    assert (weights(backend.model) - trained[base]).abs().max().item() > 1e-6


def test_the_same_config_gives_the_same_weights(
    tmp_path: Path, trained: dict[str, torch.Tensor]
) -> None:
    """Goal: the differences above come from the fields. Red with the base's seed not set."""
    for name, base in BASES.items():
        backend = backend_of(base, tmp_path)
        train(backend)
        assert torch.equal(weights(backend.model), trained[name]), name


def test_each_stage_has_its_own_optimizer(tmp_path: Path) -> None:
    """Goal: rl's rates and constants are rl's. Red with config.sft in place of the stage's settings."""
    config = changed({"rl.matrix_lr": 7e-4, "rl.optimizer.beta1": 0.3})
    group = backend_of(config, tmp_path, "rl").optimizer.param_groups[0]
    assert (group["lr"], group["betas"][0]) == (7e-4, 0.3)


def test_a_lora_run_resumes_over_its_own_base(tmp_path: Path) -> None:
    """Goal: 2 + resume + 2 steps of RL with a KL penalty equal 4, over the frozen weights that the checkpoint names,
    which are the reference, too. Red with the checkpoint's merged weights as the base: refused."""
    load_model(TINY_MODEL, init="random").save_pretrained(tmp_path / "start")
    start = {"model.name": str(tmp_path / "start"), "model.init": "pretrained", "rl.kl": kl()}
    config = changed(start, BASES["lora"])

    def make(path: str, *, resumes: bool) -> Any:
        base = base_model(config, path, resumes=resumes)
        reference = reference_name(config, "rl", path, resumes=resumes)
        backend = backend_of(config, tmp_path, "rl", base, reference)
        assert backend._trained.reference.model is backend.model
        return backend

    def steps(backend: Any, seeds: range) -> list[dict[str, float]]:
        async def main() -> list[dict[str, float]]:
            return [await train_step(backend, rl_batch(seed), None) for seed in seeds]

        return anyio.run(main)

    first = make(config.model.name, resumes=False)
    steps(first, range(2))
    path = anyio.run(first.save_checkpoint, 2, {})
    expected = steps(first, range(2, 4))
    second = make(str(path), resumes=True)
    anyio.run(second.load_checkpoint, path)
    assert steps(second, range(2, 4)) == expected
    assert expected[-1]["kl_reference"] > 0


def test_bfloat16_is_for_computing_alone(tmp_path: Path) -> None:
    """Goal: master weights, optimizer state and what is saved stay float32 (AReaL#1292), hidden states do not.

    Red with the model loaded in the config's dtype.
    """
    backend = backend_of(changed({"model.dtype": "bfloat16"}, with_muon()), tmp_path)
    seen: list[torch.dtype] = []
    backend.model.model.layers[0].mlp.register_forward_hook(
        lambda *hook: seen.append(hook[2].dtype)
    )
    train(backend, 1)
    assert set(seen) == {torch.bfloat16}
    assert {parameter.dtype for parameter in backend.model.parameters()} == {torch.float32}
    states = backend.optimizer.state.values()
    assert {value.dtype for state in states for value in state.values()} == {torch.float32}
    path = anyio.run(backend.save_checkpoint, 1, {})
    assert {p.dtype for p in load_model(str(path), dtype="auto").parameters()} == {torch.float32}  # type: ignore[arg-type]


def test_activation_checkpointing_keeps_less_and_changes_nothing(tmp_path: Path) -> None:
    """Goal: loss and gradients bit for bit, with less than half kept for the backward pass; with LoRA too, whose
    embeddings are frozen. Red with the field not used, and with reentrant checkpointing, which keeps more."""
    for base in ("adamw", "lora"):
        results = []
        for field in (False, True):
            backend = backend_of(
                changed({"model.activation_checkpointing": field}, BASES[base]), tmp_path
            )
            kept: dict[int, int] = {}
            own = {
                parameter.untyped_storage().data_ptr() for parameter in backend.model.parameters()
            }

            def keep(
                tensor: torch.Tensor, kept: dict[int, int] = kept, own: set[int] = own
            ) -> torch.Tensor:
                if tensor.untyped_storage().data_ptr() not in own:
                    kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                metrics = backend._steps.forward_backward(sft_batch())
            gradients = [p.grad for p in backend.model.parameters() if p.requires_grad]
            assert all(gradient is not None for gradient in gradients)
            results.append((metrics, gradients, sum(kept.values())))
        (plain, plain_gradients, plain_bytes), (metrics, gradients, kept_bytes) = results
        assert metrics == plain
        assert all(torch.equal(a, b) for a, b in zip(gradients, plain_gradients, strict=True))
        assert kept_bytes < plain_bytes / 2, (base, kept_bytes, plain_bytes)


def test_an_architecture_without_checkpointing_is_named(tmp_path: Path) -> None:
    """Goal: the field is refused where it would do nothing. Red without the check."""
    model = load_model(TINY_MODEL, init="random")
    model.supports_gradient_checkpointing = False
    from rollouts.training.model_loading import enable_activation_checkpointing

    with pytest.raises(
        ModelError, match="Qwen2ForCausalLM lacks activation checkpointing; set activation_check"
    ):
        enable_activation_checkpointing(model)


def test_compile_runs_compiled_graphs_with_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: training runs the graphs that the compiler captured, and gives eager's losses. Red with the field not used:
    no graph; and with the outer model compiled, which training does not call.

    The captured graphs run as they are: generating C++ for them takes a minute (losses agreed to 1e-5 with it, too).
    """
    runs: list[int] = []

    def as_captured(self: Any, graph: torch.fx.GraphModule, inputs: Any, **options: Any) -> Any:
        def run(*arguments: Any) -> Any:
            runs.append(len(graph.graph.nodes))
            return graph(*arguments)

        return run

    monkeypatch.setattr(torch._TorchCompileInductorWrapper, "__call__", as_captured)
    eager = train(backend_of(BASES["adamw"], tmp_path), 2)
    torch._dynamo.reset()
    try:
        compiled = train(backend_of(changed({"model.compile": True}), tmp_path), 2)
    finally:
        torch._dynamo.reset()
    assert len(runs) >= 2 * 2 and sum(runs) > 100  # two steps of two micro-batches
    assert [m["loss"] for m in compiled] == pytest.approx([m["loss"] for m in eager], rel=1e-5)


REMOTE_CODE = '''"""A model that brings its own code: Qwen2 under another name, with its logits doubled."""
from transformers import Qwen2Config, Qwen2ForCausalLM


class OwnConfig(Qwen2Config):
    model_type = "own_qwen2"


class OwnForCausalLM(Qwen2ForCausalLM):
    config_class = OwnConfig

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 2 * output.logits
        return output
'''


@pytest.fixture
def own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model directory with modeling code of its own."""
    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    directory = tmp_path / "own"
    shutil.copytree(TINY_MODEL, directory)
    (directory / "modeling_own.py").write_text(REMOTE_CODE)
    config = json.loads((directory / "config.json").read_text()) | {
        "model_type": "own_qwen2",
        "auto_map": {
            "AutoConfig": "modeling_own.OwnConfig",
            "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
        },
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_trust_remote_code(tmp_path: Path, own_code: Path) -> None:
    """Goal: a model's own code runs only where it is trusted, trains by its own forward, and its checkpoints load the
    same way. Red with the field fixed to either value."""
    config = changed({"model.name": str(own_code)})
    with pytest.raises(
        ModelError, match="set trust_remote_code=True if you trust this model's own code"
    ):
        backend_of(config, tmp_path)
    trusted = changed({"model.trust_remote_code": True}, config)
    backend = backend_of(trusted, tmp_path)
    assert type(backend.model).__name__ == "OwnForCausalLM"
    plain = backend_of(changed({}), tmp_path)
    assert weights(backend.model).equal(weights(plain.model))
    assert train(backend, 1)[0]["loss"] != train(plain, 1)[0]["loss"]  # its logits are doubled
    path = anyio.run(backend.save_checkpoint, 1, {})
    with pytest.raises(ModelError, match="trust_remote_code"):
        backend_of(config, tmp_path, model_path=str(path))
    again = backend_of(trusted, tmp_path, model_path=str(path))
    assert weights(again.model).equal(weights(backend.model))


WANDB = '''"""A stand-in with wandb's calls, which writes down what it is called with."""
import json, os


def _write(**record):
    with open(os.environ["WANDB_STAND_IN"], "a") as file:
        file.write(json.dumps(record) + "\\n")


class Run:
    def log(self, data, step=None):
        data = {key: value.data if isinstance(value, Table) else value for key, value in data.items()}
        _write(call="log", step=step, data=data)

    def finish(self, exit_code=None):
        _write(call="finish", exit_code=exit_code)


class Table:
    def __init__(self, columns, data):
        for column, values in zip(columns, zip(*data)):
            kinds = {float if type(value) is int else type(value) for value in values if value is not None}
            if len(kinds) > 1:  # as wandb 0.31 does
                raise TypeError(f"Data row contained incompatible types: Key {column!r}: {kinds}")
            assert kinds <= {bool, float, str}, kinds
        self.columns, self.data = columns, data


def init(project=None, name=None, config=None):
    environment = {key: os.environ.get(key) for key in ("WANDB_DIR", "WANDB_RUN_GROUP")}
    _write(call="init", project=project, name=name, config=config, **environment)
    return Run()
'''


@pytest.fixture
def wandb_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "packages" / "wandb").mkdir(parents=True)
    (tmp_path / "packages" / "wandb" / "__init__.py").write_text(WANDB)
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    for name in [name for name in sys.modules if name.partition(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)  # the real one, which another test imported
    monkeypatch.setenv("WANDB_STAND_IN", str(tmp_path / "calls.jsonl"))
    yield tmp_path / "calls.jsonl"
    sys.modules.pop("wandb", None)


MIXED = [
    ([1, "x", None], ["1", "x", None]),
    ([True, 0.5, None], ["true", "0.5", None]),
    ([1, 0.5, None], [1, 0.5, None]),
    ([[1], {"a": 1}, "x"], ["[1]", '{"a": 1}', "x"]),
    ([True, False, None], [True, False, None]),
    ([None, None, None], [None, None, None]),
]


@pytest.mark.parametrize(("values", "shown"), MIXED)
def test_a_table_whose_values_differ_in_type(
    values: list[Any], shown: list[Any], wandb_calls: Path
) -> None:
    """Goal: answers of several types are a table all the same: W&B takes columns of one type alone. Red with the cells
    passed on as they are: a TypeError that ended the training."""
    logger = WandbLogger("letters")
    logger.log_table(
        "samples", [{"row": row, "answer": value} for row, value in enumerate(values)], 3
    )
    logger.finish()
    calls = [json.loads(line) for line in wandb_calls.read_text().splitlines()]
    assert (
        calls[1]["data"] == {"samples": [[row, value] for row, value in enumerate(shown)]}
        and calls[1]["step"] == 3
    )
    assert calls[2] == {"call": "finish", "exit_code": None}


def test_alarms_know_how_many_steps_are_logged() -> None:
    """Goal: a stage that logs fewer than five steps tells what was so in all of them. Red with the steps themselves:
    12 steps, logged at 10 and 12, were never five in a row."""
    config = changed({"rl.log_every": 10, "sft.log_every": 1})
    found = [logged_steps(config, "rl", steps) for steps in (1, 10, 12, 50)]
    assert (found, logged_steps(config, "sft", 12)) == ([1, 1, 2, 5], 12)
    alone = changed({"output.mode": "rl", "rl.log_every": 10, "rl.sampling.source": "engine_only"})
    assert logged_steps(alone, "rl", 12) == 12  # nothing trains: each step is logged


def test_running_ahead_reaches_the_loop() -> None:
    """Goal: policy_lag_steps_max and in_flight_updates are the loop's; what they do there: loops/test_async_rl.py. Red
    with either left out of `rl_training_config`."""
    ahead = {
        "rl.ahead": example.ahead(2, in_flight_updates=True),
        "rl.loss.importance": importance(),
    }
    config = changed(ahead)
    assert config.problems() == () and config.rl is not None
    found = rl_training_config(config.rl, STEPS)
    assert (found.policy_lag_steps_max, found.in_flight_updates) == (2, True)


async def asks_somebody(sample: Sample) -> float:
    """A reward that waits for something else."""
    return 1.0


@pytest.mark.parametrize(
    ("changes", "reward_fn", "requests"),
    [
        ({}, "rollouts.training.rewards.exact_match", 1),
        ({}, f"{__name__}.asks_somebody", 2),
        ({"rl.reward.workers": 1}, "rollouts.training.rewards.exact_match", 2),
        (
            {"rl.ahead": example.ahead(in_flight_updates=True)},
            "rollouts.training.rewards.exact_match",
            2,
        ),
    ],
)
def test_groups_go_apart_where_that_saves_waiting(
    changes: dict[str, Any], reward_fn: str, requests: int
) -> None:
    """Goal: two groups of one moment are one request, but for rewards that wait and for updates in flight. Red with
    each of the three left out, and with an async reward that its time limit made look like a plain one."""
    rl = changed(changes).rl
    assert rl is not None
    engine = InProcessEngine(load_model(TINY_MODEL, init="random"), tiny_tokenizer())
    with scoring(reward_fn, workers=rl.reward.workers, timeout_s=60.0) as reward:
        generate = build_generate_fn(rl, tiny_tokenizer(), [engine], reward)
        anyio.run(gather_in_order, [partial(generate, ["ab"] * 2, seed=seed) for seed in range(2)])
    assert len(engine.requests) == requests
