"""Many small requests at once, beside one batch of them; and an agent's RL step, beside the single-turn demo's.

    python -m benchmarks.agents [--requests 128] [--rounds 9] [--steps 20] [--repeats 2]

First part: a real engine process over the demo's model, one client. N prompts are sent as one batch request, then as
N single requests at the same moment; all answers must be equal, log-probs to the bit. The two take turns.
Second part: the RL stage of `configs/00_cpu_sft_rl_agent.py`, and the demo's own with as many samples a step, both from
one SFT checkpoint, each by the real trainer and the real engine: one thread each, pinned to a core each.

Every number is a median; a ratio is the median of the ratios of neighbours, so that a busy machine slows both.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import anyio

from base_config import Config, load_config
from benchmarks.async_rl import cpu_s, engine, train
from rollouts.run_dir import RunDir, iter_jsonl
from rollouts.training.inference.http import Generation
from rollouts.training.inference.sglang_client import SGLangEngine
from rollouts.training.rollout_gen.concurrency import gather_in_order

ROOT = Path(__file__).resolve().parent.parent
WARM_UP = 3  # steps of a stage that are not counted
PARTS = ("generate_s", "train_s", "sync_s", "step_s")


# --- requests ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timed:
    """How long the answers took, and the CPU time of it on both sides, in seconds."""

    wall: float
    client_cpu: float
    engine_cpu: float


async def compare_requests(
    model: str, core: int, prompts: Sequence[list[int]], end: int, rounds: int
) -> None:
    """Print one batch of the prompts beside as many single requests."""
    params = [
        {"temperature": 1.0, "max_new_tokens": 8, "stop_token_ids": [end], "sampling_seed": seed}
        for seed in range(len(prompts))
    ]
    with engine(model, 512, core) as (url, pid):
        async with SGLangEngine(url) as client:

            async def batch() -> list[Generation]:
                return [group[0] for group in await client.generate_batch(prompts, params)]

            async def singles() -> list[Generation]:
                calls = [
                    partial(client.generate, *request)
                    for request in zip(prompts, params, strict=True)
                ]
                return [group[0] for group in await gather_in_order(calls)]

            expected = answers(await batch())
            assert answers(await singles()) == expected, (
                "single requests were answered otherwise than a batch"
            )
            pairs = []
            for _ in range(rounds):
                pairs.append([await timed(ask, expected, pid) for ask in (batch, singles)])
    for name, times in zip(("one batch", "single requests"), zip(*pairs, strict=True), strict=True):
        wall, client_cpu, engine_cpu = (
            1000 * statistics.median(getattr(one, part) for one in times)
            for part in ("wall", "client_cpu", "engine_cpu")
        )
        print(
            f"{len(prompts)} prompts, {name:15} {wall:7.0f} ms; CPU: client {client_cpu:.0f}, engine {engine_cpu:.0f}"
        )
    ratios = sorted(single.wall / together.wall for together, single in pairs)
    print(
        f"singles / batch {statistics.median(ratios):.2f} (rounds: {ratios[0]:.2f} to {ratios[-1]:.2f})",
        flush=True,
    )


async def timed(
    ask: Callable[[], Awaitable[list[Generation]]], expected: list[Any], pid: int
) -> Timed:
    before = time.perf_counter(), time.process_time(), cpu_s(pid)
    found = await ask()
    after = time.perf_counter(), time.process_time(), cpu_s(pid)
    assert answers(found) == expected
    return Timed(*(end - start for start, end in zip(before, after, strict=True)))


def answers(generations: Sequence[Generation]) -> list[Any]:
    return [(one.output_ids, one.logprobs, one.finish_reason) for one in generations]


# --- steps ------------------------------------------------------------------------------------------------------------


def job(name: str, steps: int, source: str) -> Config:
    """The RL stage alone of a config, from a checkpoint, with the agent config's number of samples a step."""
    config, agents = (
        load_config(ROOT / "configs" / file) for file in (name, "00_cpu_sft_rl_agent.py")
    )
    assert config.rl is not None and agents.rl is not None
    prompts = agents.rl.examples_per_step
    rl = replace(
        config.rl,
        examples_per_step=prompts,
        num_samples=agents.rl.num_samples,
        num_epochs=1,
        eval_every=-1,
    )
    mixture = [replace(spec, max_samples=prompts * steps) for spec in config.data.rl_mixture]
    evaluation = [replace(spec, max_samples=prompts) for spec in config.data.eval_mixture]
    output = replace(config.output, mode="rl", source_checkpoint=source)
    data = replace(config.data, rl_mixture=mixture, eval_mixture=evaluation)
    config = replace(config, rl=rl, data=data, output=output)
    assert not config.problems(), config.problems()
    return config


def step_times(config: Config, directory: Path, cores: Sequence[int]) -> dict[str, float]:
    """Medians of the stage's steps, in seconds, and the mean length of its answers."""
    assert config.engine is not None and config.output.source_checkpoint is not None
    with engine(config.output.source_checkpoint, config.engine.max_running_requests, cores[1]) as (
        url,
        _,
    ):
        run, _ = train(config, directory, cores[0], "rl", "--engine-url", url)
    rows = list(iter_jsonl(run.metrics))[WARM_UP:]
    return {
        name: statistics.median(row[name] for row in rows)
        for name in (*PARTS, "response_length_mean")
    }


def compare_steps(sft: RunDir, work: Path, cores: Sequence[int], steps: int, repeats: int) -> None:
    """Print an agent's step beside the single-turn one."""
    source = str(sft.latest_checkpoint("sft").resolve())
    pairs = []
    for repeat in range(repeats):
        sides = {"single turn": "00_cpu_sft_rl.py", "agent": "00_cpu_sft_rl_agent.py"}
        pair = [
            step_times(job(file, steps, source), work / f"{name.replace(' ', '_')}_{repeat}", cores)
            for name, file in sides.items()
        ]
        pairs.append(pair)
    for name, found in zip(("single turn", "agent"), zip(*pairs, strict=True), strict=True):
        parts = ", ".join(
            f"{part} {1000 * statistics.median(one[part] for one in found):.0f}" for part in PARTS
        )
        length = statistics.median(one["response_length_mean"] for one in found)
        print(f"{name:12} ms: {parts}; {length:.1f} tokens a response")
    for part in ("generate_s", "step_s"):
        ratios = sorted(agent[part] / single[part] for single, agent in pairs)
        print(
            f"agent / single turn, {part}: {statistics.median(ratios):.2f} ({', '.join(f'{r:.2f}' for r in ratios)})"
        )


def train_sft(directory: Path, core: int) -> RunDir:
    shipped = load_config(ROOT / "configs" / "00_cpu_sft_rl_agent.py")
    run, _ = train(
        replace(shipped, output=replace(shipped.output, mode="sft")), directory, core, "sft"
    )
    return run


def read_prompts(model: str, count: int) -> tuple[list[list[int]], int]:
    """The first prompts of the demo's RL data as tokens, and the token that ends an answer."""
    from rollouts.training.datasets.chat import render_prompt
    from rollouts.training.model_loading import load_tokenizer

    tokenizer = load_tokenizer(model)
    rows = [
        row
        for row, _ in zip(
            iter_jsonl(ROOT / "configs/data/letters/train_rl.jsonl"), range(count), strict=False
        )
    ]
    messages = [{"messages": [{"role": "user", "content": row["question"]}]} for row in rows]
    return [render_prompt(tokenizer, row) for row in messages], tokenizer.eos_token_id


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--repeats", type=int, default=2, help="of the stages; 0 leaves the second part out"
    )
    args = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2 or args.steps <= WARM_UP:
        parser.error(
            f"needs two cores, has {len(cores)}; and more than {WARM_UP} steps, got {args.steps}"
        )
    with tempfile.TemporaryDirectory() as work:
        sft = train_sft(Path(work) / "sft", cores[0])
        model = str(sft.latest_checkpoint("sft").resolve())
        prompts, end = read_prompts(model, args.requests)
        os.sched_setaffinity(0, cores[:1])
        anyio.run(compare_requests, model, cores[1], prompts, end, args.rounds)
        if args.repeats:
            compare_steps(sft, Path(work), cores, args.steps, args.repeats)


if __name__ == "__main__":
    main()
