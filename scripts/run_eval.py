#!/usr/bin/env python3
"""Greedy accuracy and pass@k of any checkpoint directory or hub model on held-out rows.

    scripts/run_eval.py runs/cpu_sft_rl/RUN/checkpoints/rl/latest \\
        --data configs/data/letters/test.jsonl --format question_answer --num-samples 8 --k 1,4 --out eval.json

Prints a table, a line a task, and writes the same as JSON. What the config's evaluations count, this counts too.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if TYPE_CHECKING:
    from rollouts.training.evaluation import Evaluation, Sampling


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model", help="a checkpoint directory or hub id; with --engine-url, its tokenizer alone"
    )
    parser.add_argument(
        "--data", action="append", required=True, metavar="NAME", help=".jsonl, directory or hub id"
    )
    parser.add_argument(
        "--format",
        help="how a row reads (docs/reference/data-formats.md); without it: what its columns show",
    )
    parser.add_argument(
        "--split", default="test", help="of a directory or hub data set (default: test)"
    )
    parser.add_argument("--subset", help="the hub's configuration name")
    parser.add_argument(
        "--max-samples", type=int, default=-1, help="the first N rows of each; -1: all (default)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument(
        "--num-samples", type=int, default=0, help="sampled answers a row, for pass@k (default: 0)"
    )
    parser.add_argument(
        "--k", type=_numbers, default=[], metavar="1,4", help="the k of each pass@k"
    )
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="of the sampled answers (default: 1)"
    )
    parser.add_argument(
        "--top-k",
        type=int,
        default=-1,
        help="sample among the k likeliest tokens; -1: all (default)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of sampling")
    parser.add_argument(
        "--engine-url", action="append", default=[], help="a running engine; without it: in process"
    )
    parser.add_argument(
        "--device", default="cpu", choices=("cpu", "cuda", "mps"), help="in process (default: cpu)"
    )
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16"), help="in process"
    )
    parser.add_argument(
        "--batch-size", type=int, default=256, help="in process: sequences at once (default: 256)"
    )
    parser.add_argument(
        "--batch-tokens",
        type=int,
        default=2**17,
        help="in process: tokens of those, with padding and answers (131072)",
    )
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument(
        "--out", type=Path, help="write the numbers and every greedy answer here, as JSON"
    )
    arguments = parser.parse_args(argv)
    for option in ("--max-new-tokens", "--batch-size", "--batch-tokens"):
        value = getattr(arguments, option.removeprefix("--").replace("-", "_"))
        if value < 1:
            parser.error(f"{option} {value}: needs >= 1")
    if arguments.num_samples < 0 or arguments.temperature <= 0:
        parser.error(
            "--num-samples needs >= 0, --temperature > 0: the greedy answer is always given"
        )
    if bool(arguments.k) != bool(arguments.num_samples):
        parser.error(
            "--k and --num-samples belong together: pass@k is estimated from the sampled answers"
        )
    if not all(1 <= k <= arguments.num_samples for k in arguments.k):
        parser.error(
            f"--k {','.join(map(str, arguments.k))}: needs each within 1 and --num-samples {arguments.num_samples}"
        )
    return arguments


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def check_paths(arguments: argparse.Namespace) -> None:
    """Say at once, before anything slow is imported, that a path is wrong. Raises ModelError or ValueError."""
    from rollouts.training.model_loading import require_model, require_weights

    require_model(arguments.model)
    if not arguments.engine_url:
        require_weights(arguments.model)
    for name in arguments.data:
        if (
            name.endswith(".jsonl") or Path(name).is_absolute() or name.startswith((".", "~"))
        ) and not Path(name).expanduser().exists():
            raise ValueError(f"--data {name}: no such file or directory (looked in {Path.cwd()})")


def load_rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Load the rows of all --data, each with its task: the data set's name if the row names none.

    What a row would lose to the model's chat template is found here, before the model is loaded.
    """
    from rollouts.training.datasets.dataset_loaders import DatasetEntry, load_fitting_prompts
    from rollouts.training.evaluation import mix_tasks
    from rollouts.training.model_loading import load_tokenizer

    tokenizer = load_tokenizer(arguments.model, trust_remote_code=arguments.trust_remote_code)
    loaded = []
    for name in arguments.data:
        entry = DatasetEntry(
            name,
            arguments.format,
            arguments.split,
            arguments.subset,
            max_samples=arguments.max_samples,
        )
        rows, report = load_fitting_prompts([entry], seed=arguments.seed, tokenizer=tokenizer)
        loaded.append((name, rows))
        if report.noteworthy:
            print(f"{name}: {report}", file=sys.stderr)
    return mix_tasks(loaded, seed=arguments.seed)


def evaluate(arguments: argparse.Namespace, rows: Sequence[Any]) -> "Evaluation":
    from rollouts.training.evaluation import Sampling, evaluate_with_model
    from rollouts.training.model_loading import ModelError, load_model, load_tokenizer

    count, temperature = arguments.num_samples, arguments.temperature
    sampling = Sampling(count, temperature, arguments.top_k, arguments.seed) if count else None
    tokenizer = load_tokenizer(arguments.model, trust_remote_code=arguments.trust_remote_code)
    if arguments.engine_url:
        import anyio

        return anyio.run(_by_engine, arguments, tokenizer, rows, sampling)
    import torch

    if not {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }[arguments.device]:
        raise ModelError(
            f"--device {arguments.device}: torch sees none here; use cpu, or an engine's --engine-url"
        )
    model = load_model(
        arguments.model,
        dtype=getattr(torch, arguments.dtype),
        trust_remote_code=arguments.trust_remote_code,
    )
    return evaluate_with_model(
        model.to(arguments.device),
        tokenizer,
        rows,
        max_new_tokens=arguments.max_new_tokens,
        batch_size=arguments.batch_size,
        batch_tokens=arguments.batch_tokens,
        sampling=sampling,
    )


async def _by_engine(
    arguments: argparse.Namespace, tokenizer: Any, rows: Sequence[Any], sampling: "Sampling | None"
) -> "Evaluation":
    from contextlib import AsyncExitStack

    from rollouts.training.evaluation import evaluate_with_engine
    from rollouts.training.weight_sync import SGLangEngine

    async with AsyncExitStack() as stack:
        engines = [
            await stack.enter_async_context(SGLangEngine(url)) for url in arguments.engine_url
        ]
        return await evaluate_with_engine(
            engines, tokenizer, rows, max_new_tokens=arguments.max_new_tokens, sampling=sampling
        )


def table(by_task: Mapping[str, Mapping[str, float]], counts: Mapping[str, int]) -> str:
    """Return a line a task: its rows and its metrics, to four places."""
    width = max(map(len, by_task))
    metrics = list(next(iter(by_task.values())))
    lines = [" ".join([f"{'task':<{width}}", f"{'rows':>6}", *(f"{name:>11}" for name in metrics)])]
    for task, values in by_task.items():
        lines.append(
            " ".join(
                [
                    f"{task:<{width}}",
                    f"{counts[task]:>6}",
                    *(f"{values[name]:>11.4f}" for name in metrics),
                ]
            )
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    try:
        check_paths(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    from rollouts.data_formats.row import DataError
    from rollouts.training.evaluation import by_task
    from rollouts.training.model_loading import ModelError
    from rollouts.training.rewards import RewardError
    from rollouts.training.weight_sync import EngineError

    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)  # before the work, not after it
    try:
        rows = load_rows(arguments)
        found = evaluate(arguments, rows)
    except (DataError, ModelError, EngineError, RewardError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    metrics = found.metrics(arguments.k)
    counts = {task: len(of_task) for task, of_task in by_task(rows, found.tasks).items()}
    print(table(metrics, counts))
    if arguments.out:
        answers = [
            {
                "task": task,
                "prompt": row,
                "response": response,
                "right": right,
                "num_right": num_right,
            }
            for row, task, response, right, num_right in zip(
                rows, found.tasks, found.responses, found.right, found.num_right, strict=True
            )
        ]
        asked = {key: value for key, value in vars(arguments).items() if key != "out"}
        record = {"arguments": asked, "rows": counts, "metrics": metrics, "answers": answers}
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
