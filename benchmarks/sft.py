"""SFT beside TRL's SFTTrainer, padded and packed: one epoch over 600 rows of 20-500 tokens, 6M parameters, fp32, CPU.

`python benchmarks/sft.py` trains the same weights on the same tokens, each way in a process of its own with the same
number of threads, in turns. It prints tokens/s (real tokens, no padding), the ratio to TRL's better one, and the loss
over all rows afterwards, measured the same way for all. Needs the `dev` extra (trl).

The same for all: 40 rows' worth of tokens per optimizer step, AdamW, linear schedule, clipping at 1, fp32. TRL stands
as it comes (8 rows a device, activation checkpointing), and `_tuned`, as fast as its options make it here: without
checkpointing, and packed rows one at a time, which spares it the attention between them. The times are of training
alone: tokenized rows in, weights out; without imports, loading and TRL's preparation of its data set.
"""

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = ("ours", "trl_padded", "trl_packed", "trl_padded_tuned", "trl_packed_tuned")
VOCAB, STEP_ROWS, LR = 8192, 40, 2e-3
DEVICE_ROWS = 8  # TRL's default
PAD, EOS = 0, 1


def make_model(path: Path) -> None:
    """6M parameters, random, and a tokenizer that TRL asks for and that nothing is encoded with."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(path)
    core = Tokenizer(models.WordLevel({"<pad>": PAD, "<eos>": EOS}, unk_token="<eos>"))
    PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>"
    ).save_pretrained(path)


def make_rows(count: int) -> list[dict[str, list[int]]]:
    """Token ids and mask: log-normal lengths, a vocabulary that can be learnt; every other row has an untrained prompt.

    Each token is a function of the one before, or with probability 0.3 a new one.
    """
    rng = random.Random(0)
    successors = [rng.randrange(2, VOCAB) for _ in range(VOCAB)]
    rows = []
    for index in range(count):
        length = min(500, max(20, round(rng.lognormvariate(4.8, 0.7))))
        tokens = [rng.randrange(2, VOCAB)]
        while len(tokens) < length - 1:
            tokens.append(
                successors[tokens[-1]]
                if rng.random() < 0.7
                else 2 + int(rng.paretovariate(1.0)) % (VOCAB - 2)
            )
        prompt = rng.randrange(5, length // 2) if index % 2 else 0
        rows.append(
            {"input_ids": [*tokens, EOS], "completion_mask": [0] * prompt + [1] * (length - prompt)}
        )
    return rows


class Clock:
    """Seconds of wall time and of this process's CPU time that a block takes; the latter counts what others use not."""

    def __enter__(self) -> "Clock":
        self._start = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall_s = time.perf_counter() - self._start[0]
        self.cpu_s = time.process_time() - self._start[1]


def train_ours(
    directory: Path, rows: list[dict[str, list[int]]], options: argparse.Namespace
) -> tuple[Any, Clock, int]:
    """(model, time taken, optimizer steps)."""
    import anyio

    from rollouts.training import (
        PyTorchTrainingBackend,
        Sample,
        SFTTrainingConfig,
        run_sft_training,
    )
    from rollouts.training.model_loading import load_model
    from rollouts.training.optim import build_optimizer, lr_factor
    from rollouts.training.rl_losses import sft_loss

    steps = math.ceil(len(rows) / STEP_ROWS)
    model = load_model(str(directory / "model"))
    backend = PyTorchTrainingBackend(
        model=model,
        optimizer=build_optimizer(
            model,
            matrix_lr=LR,
            embedding_lr=LR,
            unembedding_lr=LR,
            weight_decay=0.0,
            beta1=0.9,
            beta2=0.999,
            eps=1e-8,
        ),
        loss_fn=sft_loss,
        checkpoint_dir=directory / "checkpoints",
        lr_schedule=lambda step: lr_factor(
            step, total_steps=steps, warmup_frac=0.0, schedule="linear"
        ),
    )
    samples = [
        Sample(prompt="", tokens=r["input_ids"], loss_mask=list(map(float, r["completion_mask"])))
        for r in rows
    ]
    config = SFTTrainingConfig(
        num_steps=steps, batch_size=STEP_ROWS, micro_batch_tokens=options.micro_batch_tokens
    )
    with Clock() as clock:
        anyio.run(run_sft_training, backend, samples, config)
    return model, clock, steps


def train_trl(
    directory: Path, rows: list[dict[str, list[int]]], *, packed: bool, tuned: bool
) -> tuple[Any, Clock, int]:
    """(model, time taken, optimizer steps). 8 packed rows hold as many tokens as 40 rows do: as many steps."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    steps = math.ceil(len(rows) / STEP_ROWS)
    tokens = sum(len(row["input_ids"]) for row in rows)
    device_rows = 1 if packed and tuned else DEVICE_ROWS
    config = SFTConfig(
        output_dir=str(directory / "trl"),
        packing=packed,
        max_length=max(500, math.ceil(tokens / steps / DEVICE_ROWS)) if packed else None,
        per_device_train_batch_size=device_rows,
        gradient_accumulation_steps=(DEVICE_ROWS if packed else STEP_ROWS) // device_rows,
        completion_only_loss=True,
        num_train_epochs=1,
        learning_rate=LR,
        weight_decay=0.0,
        lr_scheduler_type="linear",
        activation_checkpointing=not tuned,
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=0,
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(directory / "model", dtype="float32"),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(directory / "model"),
    )
    with Clock() as clock:
        trainer.train()
    return trainer.model, clock, trainer.state.global_step


def loss_over(model: Any, rows: list[dict[str, list[int]]]) -> float:
    """Mean negative log-likelihood of the trained tokens, the plain way: a row at a time."""
    import torch

    total, count = 0.0, 0
    model.eval()
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row["input_ids"]])
            labels = ids.masked_fill(torch.tensor([row["completion_mask"]]) == 0, -100)[0, 1:]
            logits = type(model).forward(model, input_ids=ids, use_cache=False).logits[0, :-1]
            total += torch.nn.functional.cross_entropy(
                logits, labels, ignore_index=-100, reduction="sum"
            ).item()
            count += int((labels != -100).sum())
    return total / count


def run_variant(directory: Path, options: argparse.Namespace) -> None:
    """The child: one training run; prints its result as the last line."""
    import torch

    torch.set_num_threads(options.threads)
    rows = json.loads((directory / "rows.json").read_text())
    if options.variant == "ours":
        model, clock, steps = train_ours(directory, rows, options)
    else:
        model, clock, steps = train_trl(
            directory, rows, packed="packed" in options.variant, tuned="tuned" in options.variant
        )
    tokens = sum(len(row["input_ids"]) for row in rows)
    speed = {"tokens_per_s": tokens / clock.wall_s, "tokens_per_cpu_s": tokens / clock.cpu_s}
    print(
        json.dumps(
            {**speed, "wall_s": clock.wall_s, "steps": steps, "loss": loss_over(model, rows)}
        )
    )


def in_own_process(variant: str, directory: Path, options: argparse.Namespace) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        for name in ("model", "rows.json"):
            (Path(scratch) / name).symlink_to(directory / name)
        command = [sys.executable, __file__, "--variant", variant, "--directory", scratch]
        command += [
            "--threads",
            str(options.threads),
            "--micro-batch-tokens",
            str(options.micro_batch_tokens),
        ]
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": str(options.threads),
        }
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{variant} ended with {done.returncode}:\n{done.stderr}")
        return json.loads(done.stdout.splitlines()[-1])


def report(results: dict[str, list[dict[str, float]]]) -> None:
    """Medians over the rounds. CPU seconds leave out what other programs took of a machine that is not idle."""
    middle = {
        key: {name: statistics.median(run[key] for run in runs) for name, runs in results.items()}
        for key in ("tokens_per_s", "tokens_per_cpu_s", "steps", "loss")
    }
    print(f"\n{'':18}{'tokens/s':>10}{'per CPU s':>11}{'steps':>7}{'loss after':>12}")
    for name in results:
        speed, cpu, steps, loss = (middle[key][name] for key in middle)
        print(f"{name:18}{speed:10.0f}{cpu:11.0f}{steps:7.0f}{loss:12.4f}")
    for kind in ("as it comes", "tuned"):
        peers = [
            name
            for name in results
            if name != "ours" and name.endswith("_tuned") == (kind == "tuned")
        ]
        for key in ("tokens_per_s", "tokens_per_cpu_s") if "ours" in results and peers else ():
            better = max(peers, key=lambda name: middle[key][name])
            print(
                f"ratio to TRL {kind} ({better}) in {key}: {middle[key]['ours'] / middle[key][better]:.2f}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--micro-batch-tokens", type=int, default=1280, help="ours: tokens per forward pass"
    )
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    # this process is a child
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.variant:
        run_variant(options.directory, options)
        return
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        make_model(directory / "model")
        rows = make_rows(options.rows)
        (directory / "rows.json").write_text(json.dumps(rows))
        lengths = [len(row["input_ids"]) for row in rows]
        trained = sum(sum(row["completion_mask"]) for row in rows)
        print(
            f"{len(rows)} rows, {sum(lengths)} tokens ({min(lengths)}-{max(lengths)}), {trained} trained"
        )
        results: dict[str, list[dict[str, float]]] = {variant: [] for variant in options.variants}
        for _ in range(options.rounds):
            for variant in options.variants:
                results[variant].append(in_own_process(variant, directory, options))
                print(variant, json.dumps(results[variant][-1]), flush=True)
    report(results)


if __name__ == "__main__":
    main()
