"""SFT beside TRL's SFTTrainer and a plain transformers loop: the same weights, conversations and order, 50 steps."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, get_linear_schedule_with_warmup

from rollouts.training.backends.pytorch import PyTorchTrainingBackend
from rollouts.training.datasets.dataset_loaders import load_sft_dataset
from rollouts.training.loops.batching import step_indices
from rollouts.training.loops.sft_loop import run_sft_training
from rollouts.training.optim import build_optimizer, lr_factor
from rollouts.training.rl_losses import sft_loss
from rollouts.training.types import Sample, SFTTrainingConfig
from tests.training.tiny_task import tiny_model, tiny_tokenizer

STEPS, BATCH, ROWS, SEED = 50, 6, 120, 3  # 2.5 epochs
LR, DECAY, CLIP = 3e-3, 0.1, 1.0  # CLIP binds in about two of three steps
WITHIN = 1e-4  # on the loss of every step; 5e-7 was seen


class Task(NamedTuple):
    """What all of them train on: weights and tokenizer in `model`, `rows` of messages, the order of each step's."""

    model: Path
    rows: list[dict[str, Any]]
    samples: list[Sample]
    steps: list[list[int]]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    directory = tmp_path_factory.mktemp("peer_sft")
    tokenizer = tiny_tokenizer()
    tiny_model(seed=1).save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    rng = random.Random(0)
    rows = [{"messages": conversation(rng)} for _ in range(ROWS)]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples = load_sft_dataset(str(directory / "rows.jsonl"), tokenizer=tokenizer)
    return Task(
        directory / "model",
        rows,
        samples,
        [step_indices(ROWS, BATCH, step, SEED) for step in range(STEPS)],
    )


def conversation(rng: random.Random) -> list[dict[str, str]]:
    """One to three turns of a few words; the answer says the question backwards."""
    messages = [{"role": "system", "content": "backwards"}] if rng.random() < 0.3 else []
    for _ in range(rng.randint(1, 3)):
        words = [rng.choice(["red", "green", "blue", "grey"]) for _ in range(rng.randint(1, 5))]
        messages.append({"role": "user", "content": " ".join(words)})
        messages.append({"role": "assistant", "content": " ".join(reversed(words))})
    return messages


@pytest.fixture(scope="module")
def trl_run(task: Task, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], Any]:
    """TRL's loss of every step, logged by itself, and its trainer. It renders the conversations itself."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    config = SFTConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")),
        assistant_only_loss=True,
        max_length=None,
        per_device_train_batch_size=BATCH,
        max_steps=STEPS,
        train_sampling_strategy="sequential",
        learning_rate=LR,
        weight_decay=DECAY,
        adam_beta2=0.95,
        max_grad_norm=CLIP,
        lr_scheduler_type="linear",
        activation_checkpointing=False,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    with torch.random.fork_rng():
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(task.model, dtype="float32"),
            args=config,
            train_dataset=Dataset.from_list(
                [task.rows[index] for step in task.steps for index in step]
            ),
            processing_class=AutoTokenizer.from_pretrained(task.model),
        )
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trainer


@pytest.fixture(scope="module")
def our_run(task: Task, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], Any]:
    return run_ours(task, tmp_path_factory.mktemp("ours"))


def run_ours(
    task: Task,
    directory: Path,
    *,
    loss_fn: Callable[..., torch.Tensor] = sft_loss,
    **micro_batches: Any,
) -> tuple[list[float], Any]:
    """Our loss of every step, and the model afterwards."""
    model = AutoModelForCausalLM.from_pretrained(task.model, dtype="float32")
    rates = {"matrix_lr": LR, "embedding_lr": LR, "unembedding_lr": LR}
    backend = PyTorchTrainingBackend(
        model=model,
        optimizer=build_optimizer(
            model, **rates, weight_decay=DECAY, beta1=0.9, beta2=0.95, eps=1e-8
        ),
        loss_fn=loss_fn,
        checkpoint_dir=directory,
        max_grad_norm=CLIP,
        lr_schedule=lambda step: lr_factor(
            step, total_steps=STEPS, warmup_frac=0.0, schedule="linear"
        ),
    )
    config = SFTTrainingConfig(num_steps=STEPS, batch_size=BATCH, log_every=1, **micro_batches)
    history = anyio.run(lambda: run_sft_training(backend, task.samples, config, seed=SEED))
    return [metrics["loss"] for metrics in history], model


def run_plain(task: Task) -> tuple[list[float], Any]:
    """The loop that one writes by hand: transformers' own loss over padded batches, torch's AdamW."""
    model = AutoModelForCausalLM.from_pretrained(task.model, dtype="float32").train()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95))
    schedule = get_linear_schedule_with_warmup(optimizer, 0, STEPS)
    losses = []
    for step in task.steps:
        samples = [task.samples[index] for index in step]
        ids = [torch.tensor(sample.tokens) for sample in samples]
        labels = [
            i.masked_fill(torch.tensor(s.loss_mask) == 0, -100)
            for i, s in zip(ids, samples, strict=True)
        ]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence(
            [torch.ones_like(row) for row in ids], batch_first=True
        )
        targets = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
        loss = model(input_ids=padded, attention_mask=mask, labels=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model


def assert_same_run(ours: tuple[list[float], Any], peer: tuple[list[float], Any]) -> None:
    assert len(ours[0]) == len(peer[0]) == STEPS
    worst = max(abs(a - b) for a, b in zip(ours[0], peer[0], strict=True))
    assert worst < WITHIN, f"largest difference of the loss of a step: {worst:.2e}"
    assert ours[0][-1] < 0.5 * ours[0][0], "nothing was learnt, so that agreeing means little"


def test_tokens_and_masks_are_trls(task: Task, trl_run: tuple[list[float], Any]) -> None:
    """Goal: TRL trains on the same tokens: same ids, same ones masked. Red with the end of turn left out of ours."""
    prepared = trl_run[1].train_dataset
    order = [index for step in task.steps for index in step]
    assert len(prepared) == len(order)
    for row, index in zip(prepared, order, strict=True):
        sample = task.samples[index]
        assert row["input_ids"] == sample.tokens
        assert [label != -100 for label in row["labels"]] == [
            bool(weight) for weight in sample.loss_mask
        ]


def test_loss_of_every_step_is_trls(
    our_run: tuple[list[float], Any], trl_run: tuple[list[float], Any]
) -> None:
    """Goal: 50 steps beside SFTTrainer, the loss of each within 1e-4. Red with beta2=0.999 here, or CLIP doubled."""
    assert_same_run(our_run, trl_run)


def test_loss_of_every_step_is_that_of_a_plain_loop(
    task: Task, our_run: tuple[list[float], Any]
) -> None:
    """Goal: the same beside a loop written by hand, and the same weights at its end. Red with DECAY at 0 in it."""
    plain = run_plain(task)
    assert_same_run(our_run, plain)
    for (name, ours), theirs in zip(
        our_run[1].named_parameters(), plain[1].parameters(), strict=True
    ):
        torch.testing.assert_close(
            ours, theirs, atol=2e-3, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize(
    "micro_batches", [{"micro_batch_size": 1}, {"micro_batch_tokens": 120}], ids=str
)
def test_any_cut_into_micro_batches_gives_the_same_run(
    task: Task, trl_run: tuple[list[float], Any], tmp_path: Path, micro_batches: dict[str, int]
) -> None:
    """Goal: accumulation and packing change nothing. Red with `tokens_global` taken from each micro-batch."""
    assert_same_run(run_ours(task, tmp_path, **micro_batches), trl_run)


def test_padded_batches_give_the_same_run(
    task: Task, trl_run: tuple[list[float], Any], tmp_path: Path
) -> None:
    """Goal: the padded way, through the model's own forward and logits [B, T, V], is the same run as the packed one.

    Red with `tokens_global=None` passed on: each micro-batch then divides by its own tokens.
    """

    def of_logits(
        logits: torch.Tensor, labels: torch.Tensor, loss_mask: torch.Tensor, tokens_global: float
    ) -> torch.Tensor:
        assert logits.shape[:2] == labels.shape
        return sft_loss(logits, labels, loss_mask, tokens_global=tokens_global)

    assert_same_run(run_ours(task, tmp_path, loss_fn=of_logits, micro_batch_size=4), trl_run)
