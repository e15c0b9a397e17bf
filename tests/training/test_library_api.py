"""The documented surface of `rollouts.training`, snippet by snippet as users write it, run for real on the CPU.

Lines below a "snippet" comment stand as documented, but for "cpu" where they say "cuda" and the engine's own port.
"""

import inspect
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

import rollouts.training
from rollouts.training import (
    AsyncRolloutManager,
    DataBuffer,
    PyTorchTrainingBackend,
    RLTrainingConfig,
    RolloutBatch,
    RolloutConfig,
    Sample,
    SFTTrainingConfig,
    generate_rollout_batches,
    load_sft_dataset,
    run_rl_training,
    run_sft_training,
)
from rollouts.training.agent_integration import make_agent_generate_fn
from rollouts.training.backends.protocol import TrainFuture, TrainingBackend
from rollouts.training.backends.pytorch_factory import create_pytorch_backend
from rollouts.training.datasets.dataset_loaders import load_prompts_from_jsonl
from rollouts.training.filters import (
    check_any_success,
    check_min_reward,
    check_quality_and_diversity,
    check_response_diversity,
    check_reward_nonzero_std,
)
from rollouts.training.loops.rl_loop import compute_advantages, prepare_grpo_batch
from rollouts.training.metrics import CompositeLogger, JSONLLogger, MetricsLogger, WandbLogger
from rollouts.training.rl_losses import grpo_loss, ppo_loss
from rollouts.training.rollout_gen.engine_generate import make_generate_fn
from rollouts.training.weight_sync import SGLangEngine, VLLMEngine, sync_weights_to_engines
from tests.engines.serving import serving
from tests.training.tiny_task import tiny_model, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
SAMPLES_PER_PROMPT = 4


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory as one has it on disk: weights, config and tokenizer with its chat template."""
    path = tmp_path_factory.mktemp("model")
    tiny_model(seed=0).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def engine_url(model_path: Path) -> Iterator[str]:
    with serving(model_path) as url:
        yield url


@pytest.fixture
def samples() -> list[Sample]:
    """Eight conversations to train on."""
    tokens = [[5 + i, 6, 7, 1] for i in range(8)]
    return [
        Sample(prompt="p", response="r", tokens=t, loss_mask=[0.0, 1.0, 1.0, 1.0]) for t in tokens
    ]


def my_reward_fn(sample: Sample) -> float:
    return float(len(set(sample.tokens[-sample.response_length :])))


def rollout_config(engine_url: str, **others: Any) -> RolloutConfig:
    generate_fn = make_generate_fn(
        [SGLangEngine(engine_url)], tiny_tokenizer(), max_new_tokens=6, temperature=1.0
    )
    return RolloutConfig(
        batch_size=2,
        n_samples_per_prompt=SAMPLES_PER_PROMPT,
        generate_fn=generate_fn,
        reward_fn=my_reward_fn,
        **others,
    )


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "names"),
    [
        (Sample, "prompt response tokens loss_mask reward rollout_log_probs metadata"),
        (RolloutBatch, "tokens loss_masks rewards response_lengths metadata"),
        (SFTTrainingConfig, "num_steps batch_size log_every checkpoint_every"),
        (RLTrainingConfig, "num_steps sync_every baseline log_every checkpoint_every"),
        (
            RolloutConfig,
            "batch_size n_samples_per_prompt over_sampling_factor generate_fn reward_fn filter_fn",
        ),
    ],
)
def test_records_begin_with_the_documented_fields(record: type, names: str) -> None:
    """Goal: records can be made by keyword and in the documented order. Red with two fields of one exchanged."""
    assert [field.name for field in fields(record)][: len(names.split())] == names.split()


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (run_sft_training, "backend samples config metrics_logger"),
        (run_rl_training, "backend buffer rollout_manager engines config"),
        (grpo_loss, "logits labels loss_mask advantages"),
        (ppo_loss, "logits labels loss_mask advantages old_log_probs clip_range"),
        (PyTorchTrainingBackend, "model optimizer loss_fn checkpoint_dir device"),
        (create_pytorch_backend, "model_name checkpoint_dir device_type learning_rate"),
        (compute_advantages, "rewards baseline"),
        (prepare_grpo_batch, "batch rewards config"),
        (sync_weights_to_engines, "engines checkpoint_path"),
        (load_prompts_from_jsonl, "path"),
    ],
)
def test_functions_begin_with_the_documented_parameters(
    function: Callable[..., Any], names: str
) -> None:
    """Goal: calls by position and by keyword work as shown. Red with two parameters of one exchanged."""
    assert list(inspect.signature(function).parameters)[: len(names.split())] == names.split()


def test_defaults_are_the_documented_ones() -> None:
    """Goal: what a snippet leaves out is what the page says. Red with clip_range=0.1."""
    assert inspect.signature(ppo_loss).parameters["clip_range"].default == 0.2
    defaults = inspect.signature(create_pytorch_backend).parameters
    assert (defaults["device_type"].default, defaults["learning_rate"].default) == ("cuda", 1e-4)


# --- loops, backends --------------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_sft_from_a_model_name(
    model_path: Path, samples: list[Sample], tmp_path: Path
) -> None:
    """Goal: factory, SFT loop, logger and checkpoint directory as documented; an engine can load what was written.

    Red with the tokenizer left out of the checkpoint.
    """
    config = SFTTrainingConfig(num_steps=3, batch_size=4, log_every=1, checkpoint_every=2)
    metrics_logger = JSONLLogger(tmp_path / "logs")
    # snippet: backends, loops
    backend = create_pytorch_backend(
        model_name=model_path,
        checkpoint_dir=tmp_path / "checkpoints" / "sft",
        device_type="cpu",
        learning_rate=1e-4,
    )
    # list[dict], one per logged step
    metrics = await run_sft_training(backend, samples, config, metrics_logger)
    metrics_logger.finish()
    assert len(metrics) == 3 and all("loss" in step and "grad_norm" in step for step in metrics)
    written = sorted(path.name for path in (tmp_path / "checkpoints" / "sft").iterdir())
    assert {"step_000002", "step_000003", "latest"} <= set(written)
    names = {path.name for path in (tmp_path / "checkpoints" / "sft" / "step_000003").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "metadata.json"} <= names
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoints" / "sft" / "step_000003")
    for ours, theirs in zip(backend.model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "checkpoints" / "sft" / "step_000003")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=True)


@pytest.mark.anyio
async def test_a_backend_is_driven_by_futures(tmp_path: Path, samples: list[Sample]) -> None:
    """Goal: the protocol's calls in the documented order, several in flight. Red with "lr" left out of the metrics."""
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    # snippet: backends
    backend: TrainingBackend = PyTorchTrainingBackend(
        model=model, optimizer=optimizer, loss_fn=grpo_loss, checkpoint_dir=tmp_path, device="cpu"
    )
    labels = torch.tensor([sample.tokens for sample in samples])
    batch = {
        "input_ids": labels,
        "labels": labels,
        "loss_mask": torch.tensor([sample.loss_mask for sample in samples]),
        "advantages": torch.linspace(-1, 1, len(samples)),
    }
    # snippet: backends
    # submitted, in order
    fwd_future: TrainFuture[dict[str, float]] = backend.forward_backward(batch)
    second = backend.forward_backward(batch)
    opt_future = backend.optim_step()
    fwd_metrics = await fwd_future.result()  # applied; an error surfaces here
    opt_metrics = await opt_future.result()
    assert {"loss", "grad_norm"} <= set(fwd_metrics) and {"lr", "step"} <= set(opt_metrics)
    assert (await second.result())["loss"] == fwd_metrics["loss"]
    # snippet: checkpoints
    path = await backend.save_checkpoint(1, {"loss": fwd_metrics["loss"]})
    assert path == tmp_path / "step_000001"
    assert (await backend.load_checkpoint(path))["step"] == 1


FSDP_SNIPPET = """
import sys
import anyio
import torch
from rollouts.training.backends.fsdp import FSDPConfig, FSDPTrainingBackend
from rollouts.training.rl_losses import sft_loss
from rollouts.training.loops.batching import collate
from tests.training.tiny import sft_samples, tiny_model

samples = sft_samples(4)
batch = collate([s.tokens for s in samples], [s.loss_mask for s in samples], pad_token_id=0)
model, checkpoint_dir = tiny_model(), sys.argv[1]
# snippet
backend = FSDPTrainingBackend(
    model=model,
    optimizer_fn=lambda m: torch.optim.AdamW(m.parameters()),
    loss_fn=sft_loss,
    checkpoint_dir=checkpoint_dir,
    config=FSDPConfig(sharding_strategy="FULL_SHARD", mixed_precision=True, gradient_checkpointing=False),
)

async def main():
    fwd_metrics = await backend.forward_backward(batch).result()
    opt_metrics = await backend.optim_step().result()
    assert fwd_metrics["loss"] > 0 and opt_metrics["step"] == 1
    print(await backend.save_checkpoint(1, opt_metrics))

anyio.run(main)
"""


def test_the_sharded_backend_is_made_as_documented(tmp_path: Path) -> None:
    """Goal: the constructor's names, and a step and a checkpoint by it, in a process of its own (it joins a group).

    Red with `optimizer_fn` called `optimizer`.
    """
    command = [sys.executable, "-c", FSDP_SNIPPET, str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.strip() == str(tmp_path / "step_000001") and (tmp_path / "latest").is_symlink()
    )


def test_losses_shift_by_themselves() -> None:
    """Goal: labels are the tokens themselves, and ppo_loss takes clip_range. Red without the shift in the loss."""
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 5, 7), torch.randint(7, (2, 5))  # [B, T, V], [B, T]
    loss_mask = torch.tensor([[0.0, 1, 1, 1, 1], [0.0, 0, 1, 1, 0]])
    advantages = torch.tensor([1.0, -0.5])
    log_probs = logits[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:, None]).squeeze(-1)
    expected = -(advantages[:, None] * log_probs * loss_mask[:, 1:]).sum() / loss_mask.sum()
    # snippet: losses
    torch.testing.assert_close(grpo_loss(logits, labels, loss_mask, advantages), expected)
    old_log_probs = torch.nn.functional.pad(log_probs, (1, 0))  # aligned to tokens, as labels are
    loss = ppo_loss(logits, labels, loss_mask, advantages, old_log_probs, clip_range=0.2)
    torch.testing.assert_close(
        loss, -(advantages[:, None] * loss_mask[:, 1:]).sum() / loss_mask.sum()
    )


@pytest.mark.anyio
async def test_rl_through_a_real_engine(model_path: Path, engine_url: str, tmp_path: Path) -> None:
    """Goal: buffer, manager, engines and backend make RL steps as documented, with an engine of one's own beside.

    Red with the engine's update left out: the version it serves stays.
    """
    updated = []

    # snippet: weight sync
    class MyEngine:  # duck-typed, no inheritance
        async def update_weights_from_checkpoint(self, checkpoint_path: str) -> dict:
            updated.append(checkpoint_path)
            return {"success": True}

    backend = create_pytorch_backend(model_path, tmp_path, "cpu", loss_fn=grpo_loss)
    buffer = DataBuffer(prompts=["ab", "cd", "ef"], seed=42)
    rollout_manager = AsyncRolloutManager(buffer, rollout_config(engine_url))
    engines = [SGLangEngine(engine_url), MyEngine()]
    config = RLTrainingConfig(
        num_steps=2, sync_every=1, baseline=2.0, log_every=1, checkpoint_every=-1
    )
    # snippet: loops
    metrics = await run_rl_training(backend, buffer, rollout_manager, engines, config)
    assert [step["step"] for step in metrics] == [1, 2]
    assert all("reward_mean" in step and "loss" in step for step in metrics)
    assert len(updated) == 3  # before the first step, and after each
    info = await engines[0].model_info()  # type: ignore[union-attr]
    assert str(info["weight_version"]).startswith("2")
    assert (tmp_path / "step_000002" / "model.safetensors").exists()


def test_advantages_are_reward_minus_baseline() -> None:
    """Goal: reward − baseline. Red with the sign turned."""
    rewards = [1.0, 0.0, 0.25]
    # snippet: loops
    advantages = compute_advantages(rewards, baseline=0.5)  # reward − baseline
    assert list(advantages) == [0.5, -0.5, -0.25]


# --- rollouts ---------------------------------------------------------------------------------------------------------


def test_the_buffer_wraps_and_continues() -> None:
    """Goal: an epoch holds each prompt once, and a restored buffer goes on exactly. Red with the epoch not restored."""
    # snippet: rollouts
    buffer = DataBuffer(prompts=["What is 2+2?", *(f"What is {n}+1?" for n in range(9))], seed=42)
    # wraps at the epoch's end, reshuffled from (seed + epoch), deterministic
    batch = buffer.get_prompts(32)
    assert len(batch) == 32 and sorted(batch[:10]) == sorted(batch[10:20]) != batch[:10]
    # snippet: rollouts
    state = buffer.save_state()
    expected = buffer.get_prompts(15)
    other = DataBuffer(prompts=buffer.prompts, seed=42)
    # continues with exactly the prompts that would have come
    other.load_state(json.loads(json.dumps(state)))
    assert other.get_prompts(15) == expected


@pytest.mark.anyio
async def test_the_manager_makes_batches_from_an_engine(engine_url: str) -> None:
    """Goal: exactly batch_size groups with tokens, masks and rewards from a real engine. Red with one group too few."""
    buffer = DataBuffer(prompts=["What is 2+2?", "ab", "cd"], seed=42)
    config = rollout_config(
        engine_url, over_sampling_factor=1.5, filter_fn=check_response_diversity
    )
    # snippet: rollouts
    async with AsyncRolloutManager(buffer, config) as manager:
        batch = await manager.generate_batch(reward_fn=my_reward_fn)
    assert len(batch.tokens) == len(batch.rewards) == 2 * SAMPLES_PER_PROMPT
    for tokens, mask, length in zip(
        batch.tokens, batch.loss_masks, batch.response_lengths, strict=True
    ):
        assert len(mask) == len(tokens) and sum(mask) == length > 0


def test_batches_without_async(engine_url: str) -> None:
    """Goal: plain iteration in a script. Red with a coroutine handed out instead of a batch."""
    buffer, config = DataBuffer(prompts=["ab", "cd"], seed=42), rollout_config(engine_url)
    batches = []
    # snippet: rollouts
    for batch in generate_rollout_batches(buffer, config):
        batches.append(batch)
        if len(batches) == 2:
            break
    assert all(len(batch.rewards) == 2 * SAMPLES_PER_PROMPT for batch in batches)


@pytest.mark.anyio
async def test_an_agent_is_a_generate_fn(engine_url: str) -> None:
    """Goal: `rollouts` hands on Endpoint and an environment with a tool, and their trajectories become Samples.

    Red with the environment's words trained on.
    """
    # snippet: the package
    from rollouts import CalculatorEnvironment, Endpoint

    endpoint = Endpoint(engine=engine_url, tokenizer=tiny_tokenizer(), max_new_tokens=5)
    generate_fn = make_agent_generate_fn(endpoint, CalculatorEnvironment)
    config = RolloutConfig(
        batch_size=1, n_samples_per_prompt=2, generate_fn=generate_fn, reward_fn=my_reward_fn
    )
    async with AsyncRolloutManager(DataBuffer(prompts=["ab"], seed=42), config) as manager:
        batch = await manager.generate_batch()
    for sample in batch.samples:
        assert (
            sum(sample.loss_mask) == sample.response_length == len(sample.rollout_log_probs or ())
        )
        assert sample.metadata["turns"] == 1


def test_filters_take_a_group() -> None:
    """Goal: list[Sample] → bool for each documented filter. Red with one that looks at the first sample alone."""
    group = [
        Sample(prompt="p", response=text, reward=reward)
        for text, reward in (("a", 0.0), ("b", 1.0))
    ]
    same = [Sample(prompt="p", response="a", reward=0.0)] * 3
    every = [
        check_reward_nonzero_std,
        check_min_reward,
        check_response_diversity,
        check_quality_and_diversity,
        check_any_success,
    ]
    assert [check(group) for check in every] == [True] * 5
    assert [check(same) for check in every] == [False] * 5


# --- weights, data, metrics -------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_weights_are_synced_in_parallel(
    engine_url: str, model_path: Path, tmp_path: Path
) -> None:
    """Goal: all engines answer success, and one that fails is named. Red with the failure swallowed."""
    ckpt_path = model_path
    # snippet: weight sync
    engines: list[Any] = [
        SGLangEngine("http://localhost:30000"),
        VLLMEngine("http://localhost:30001"),
    ]
    assert [engine.base_url for engine in engines] == [
        "http://localhost:30000",
        "http://localhost:30001",
    ]
    engines = [SGLangEngine(engine_url)]
    # snippet: weight sync
    # in parallel; any failure raises
    responses = await sync_weights_to_engines(engines, str(ckpt_path))
    assert [response["success"] for response in responses] == [True]
    with pytest.raises(Exception, match=f"{engine_url}: .*{tmp_path / 'nothing'}"):
        await sync_weights_to_engines(engines, str(tmp_path / "nothing"))


def test_sft_data_from_a_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Goal: the documented call, on a directory laid out as on the hub. Red with the mask inverted."""
    directory = tmp_path / "gsm8k" / "main"
    directory.mkdir(parents=True)
    rows = [
        {"question": f"{n} and {n}?", "answer": f"<<{n}+{n}={2 * n}>>{2 * n} #### {2 * n}"}
        for n in range(5)
    ]
    (directory / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    card = "---\nconfigs:\n- config_name: main\n  data_files:\n  - split: train\n    path: main/train.jsonl\n---\n"
    (tmp_path / "gsm8k" / "README.md").write_text(card)
    monkeypatch.chdir(tmp_path)
    tokenizer = tiny_tokenizer()
    # snippet: data
    samples = load_sft_dataset(
        "gsm8k",
        tokenizer=tokenizer,
        split="train",
        subset="main",
        max_samples=1000,
        max_length=2048,
    )
    assert len(samples) == 5
    trained = [
        token
        for token, weight in zip(samples[2].tokens, samples[2].loss_mask, strict=True)
        if weight
    ]
    assert "#### 4" in tokenizer.decode(trained) and "2 and 2?" not in tokenizer.decode(trained)


def test_prompts_from_jsonl(tmp_path: Path) -> None:
    """Goal: one prompt a line, in order. Red with the last line dropped."""
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "What is 2+2?"}\n{"question": "3+3?", "answer": "6"}\n')
    # snippet: data
    prompts = load_prompts_from_jsonl(path)
    assert [prompt["messages"][0]["content"] for prompt in prompts] == ["What is 2+2?", "3+3?"]
    assert DataBuffer(prompts=prompts).get_prompts(1)[0] in prompts


def test_metrics_are_lines_of_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Goal: a directory for a path, one object a step. Red with the step left out of the line."""
    monkeypatch.chdir(tmp_path)
    # snippet: metrics
    logger: MetricsLogger = JSONLLogger(Path("logs/x"))
    logger.log({"loss": 0.5}, step=42)
    logger.finish()
    (line,) = Path("logs/x/metrics.jsonl").read_text().splitlines()
    assert {"step": 42, "loss": 0.5}.items() <= json.loads(line).items()
    both = CompositeLogger([JSONLLogger(Path("a")), JSONLLogger(Path("b"))])
    both.log({"loss": 1.0}, step=1)
    both.finish()
    assert Path("a/metrics.jsonl").exists() and Path("b/metrics.jsonl").exists()
    assert next(iter(inspect.signature(WandbLogger).parameters)) == "project"


def test_the_package_hands_on_the_documented_names() -> None:
    """Goal: every name above that users import from the package is the one its module defines. Red with one aliased."""
    for name in rollouts.training.__all__:
        assert getattr(rollouts.training, name) is globals()[name]
