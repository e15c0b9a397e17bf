"""Checks of data sets, mixtures and evaluation."""

from rollouts.config.checks.needs import Checks, at_least_one, must, one_or_off, seed_check
from rollouts.config.schema import DataConfig, DatasetSpec, EvalConfig
from rollouts.data_formats import format_named


def data_checks(data: DataConfig) -> Checks:
    yield must(
        data.max_length >= 2,
        "data.max_length",
        data.max_length,
        ">= 2 tokens: one to read, one to predict",
    )
    yield seed_check(data.shuffle_seed, "data.shuffle_seed")
    for mixture in ("sft_mixture", "rl_mixture", "eval_mixture"):
        for index, spec in enumerate(getattr(data, mixture)):
            yield from _dataset_checks(spec, f"data.{mixture}[{index}]")
    for index, spec in enumerate(data.rl_mixture):
        need = "a format with prompts: plain text asks nothing"
        yield must(
            format_named(spec.format).has_prompts,
            f"data.rl_mixture[{index}].format",
            spec.format,
            need,
        )


def _dataset_checks(spec: DatasetSpec, path: str) -> Checks:
    yield must(
        bool(spec.name.strip()), f"{path}.name", spec.name, "a hub id, a directory or a .jsonl file"
    )
    yield must(
        bool(spec.split.strip()),
        f"{path}.split",
        spec.split,
        "the name of a split, such as 'train'",
    )
    if spec.shuffle_seed is not None:
        yield seed_check(spec.shuffle_seed, f"{path}.shuffle_seed")
    yield must(spec.start >= 0, f"{path}.start", spec.start, ">= 0")
    stop_ok = spec.stop == -1 or spec.stop > spec.start
    yield must(stop_ok, f"{path}.stop", spec.stop, f"> start={spec.start}, or -1 for the end")
    yield from at_least_one(spec, path, "step")
    yield from one_or_off(spec, path, max_samples="all rows")
    yield must(
        spec.repeat >= 1, f"{path}.repeat", spec.repeat, ">= 1; leave the data set out to skip it"
    )
    ends = spec.max_samples != -1 or spec.stop != -1
    if spec.streaming:
        need = "a number, or stop: streaming=True, and what is trained on is held in memory"
        yield must(ends, f"{path}.max_samples", spec.max_samples, need)
    if format_named(spec.format).made_here:
        made = f"format={spec.format!r} makes its rows"
        yield must(
            ends, f"{path}.max_samples", spec.max_samples, f"a number, or stop: {made} without end"
        )
        yield must(
            spec.split in ("train", "test"),
            f"{path}.split",
            spec.split,
            f"'train' or 'test': {made}",
        )
        for name, off in (("subset", None), ("shuffle_seed", None), ("streaming", False)):
            yield must(
                getattr(spec, name) is off, f"{path}.{name}", getattr(spec, name), f"{off}: {made}"
            )


def eval_checks(evaluation: EvalConfig) -> Checks:
    samples, ks = evaluation.num_samples, evaluation.pass_at
    yield must(samples >= 0, "eval.num_samples", samples, ">= 0; 0 samples nothing")
    need = (
        f"each k within 1 and num_samples={samples}"
        if samples
        else "[], since num_samples=0 samples nothing"
    )
    yield must(all(1 <= k <= samples for k in ks), "eval.pass_at", ks, need)
    yield must(
        bool(ks) or samples <= 0,
        "eval.pass_at",
        ks,
        f"at least one k, or num_samples={samples} has no effect",
    )
    yield must(
        evaluation.temperature > 0,
        "eval.temperature",
        evaluation.temperature,
        "> 0: the greedy answer is extra",
    )
    yield from one_or_off(evaluation, "eval", top_k="all tokens")
    yield seed_check(evaluation.seed, "eval.seed")
    rows = evaluation.in_process_rows
    yield must(
        rows >= -1, "eval.in_process_rows", rows, ">= 1, 0 for none, or -1 for all of eval_mixture"
    )
    yield from at_least_one(evaluation, "eval", "in_process_new_tokens", "in_process_batch_tokens")
