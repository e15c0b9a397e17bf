"""The embedded engine's decoding beside transformers' own `generate`: 64 prompts x 64 new tokens, 5M parameters, fp32.

    python -m benchmarks.generate [--threads 1] [--rounds 7]

Same process, same weights, same prompts, same threads; the engine's side is its model thread's work (admission,
prefill, decode, sampling), without HTTP. Both take turns, one round each, and the ratio is the median over rounds of
neighbours, so that a busy machine slows both.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from rollouts.engines.embedded.batch import BatchRow, PromptJob, RunningBatch
from rollouts.engines.embedded.generate_request import PromptRequest, SamplingParams
from rollouts.engines.embedded.sampling import row_keys
from rollouts.engines.embedded.served_model import Served, load


def make_model(path: str) -> None:
    """About 5M parameters, random, in `path`."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=8192,
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    Qwen2ForCausalLM(config).save_pretrained(path)


def ours(served: Served, prompts: list[list[int]], new_tokens: int) -> None:
    params = SamplingParams(temperature=1.0, ignore_eos=True)
    with torch.inference_mode():
        batch = RunningBatch(served, len(prompts))
        batch.join(
            [
                BatchRow(
                    PromptJob(
                        PromptRequest(str(i), tuple(ids), params, new_tokens, True, len(ids)),
                        len,
                        [None],
                    ),
                    0,
                    key,
                )
                for i, (ids, key) in enumerate(zip(prompts, row_keys(0, len(prompts)), strict=True))
            ],
            "benchmark",
        )
        while batch.rows:
            batch.step()


def plain_generate(model: Any, prompts: list[list[int]], new_tokens: int) -> None:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
        )
    assert out.shape[1] == width + new_tokens


def seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as path:
        make_model(path)
        served = load(path, dtype="float32", device="cpu", trust_remote_code=False)
        plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        prompts = [
            rng.integers(1, 8192, size=rng.integers(8, 65)).tolist() for _ in range(args.prompts)
        ]
        sides = (
            lambda: ours(served, prompts, args.new_tokens),
            lambda: plain_generate(plain, prompts, args.new_tokens),
        )
        # the first warms up
        rounds = [[seconds(side) for side in sides] for _ in range(args.rounds + 1)][1:]
    tokens = args.prompts * args.new_tokens
    for name, times in zip(
        ("embedded engine", "transformers generate"), zip(*rounds, strict=True), strict=True
    ):
        print(f"{name:22}{tokens / statistics.median(times):8.0f} tokens/s")
    ratios = sorted(plain_s / ours_s for ours_s, plain_s in rounds)
    print(f"ratio {statistics.median(ratios):.2f} (rounds: {ratios[0]:.2f} to {ratios[-1]:.2f})")


if __name__ == "__main__":
    main()
