"""The embedded engine's decoding beside transformers' own `generate`: 64 prompts x 64 new tokens, 5M parameters, fp32.

`python benchmarks/generate.py` prints tokens/s of both and their ratio. Same process, same model, same threads; the
engine's side is its model thread's work (admission, prefill, decode, sampling), without HTTP.
"""

import argparse
import tempfile
import time
from collections.abc import Callable

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from rollouts.engines.embedded.batch import Batch, Job, Row
from rollouts.engines.embedded.model import Served, load
from rollouts.engines.embedded.protocol import PromptRequest, SamplingParams
from rollouts.engines.embedded.sampling import row_keys


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
        batch = Batch(served, len(prompts))
        batch.join(
            [
                Row(Job(PromptRequest(str(i), tuple(ids), params, new_tokens, True, len(ids)), len, [None]), 0, key)
                for i, (ids, key) in enumerate(zip(prompts, row_keys(0, len(prompts)), strict=True))
            ],
            "benchmark",
        )
        while batch.rows:
            batch.step()


def plain_generate(served: Served, prompts: list[list[int]], new_tokens: int) -> None:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.inference_mode():
        out = served.model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
        )
    assert out.shape[1] == width + new_tokens


def best_of(rounds: int, run: Callable[[], None]) -> float:
    """Seconds of the fastest round, after one to warm up."""
    seconds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as path:
        make_model(path)
        served = load(path, dtype="float32", device="cpu", trust_remote_code=False)
        prompts = [rng.integers(1, 8192, size=rng.integers(8, 65)).tolist() for _ in range(args.prompts)]
        ours_s = best_of(args.rounds, lambda: ours(served, prompts, args.new_tokens))
        plain_s = best_of(args.rounds, lambda: plain_generate(served, prompts, args.new_tokens))
    tokens = args.prompts * args.new_tokens
    print(f"embedded engine      {tokens / ours_s:8.0f} tokens/s")
    print(f"transformers generate{tokens / plain_s:8.0f} tokens/s")
    print(f"ratio                {plain_s / ours_s:8.2f}")


if __name__ == "__main__":
    main()
