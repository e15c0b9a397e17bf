"""The first rows of each mixture as the model will see them, and counts of all: `deploy data CONFIG`. No torch.

    python -m rollouts.worker.data_preview CONFIG.json [--rows 3]

Prints one JSON document. Needs transformers and datasets. Exit 1 with one `error:` line for rows that cannot be read.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rollouts.config import Config, DatasetSpec
from rollouts.data_formats import format_named
from rollouts.data_formats.row import DataError
from rollouts.training.datasets.chat import render_prompts
from rollouts.training.datasets.dataset_loaders import load_fitting_prompts, load_sft_mixture
from rollouts.training.datasets.preview import Span, histogram, spans_of
from rollouts.training.datasets.report import MixtureReport
from rollouts.training.model_loading import ModelError, load_tokenizer
from rollouts.training.seams import Tokenizer


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Show the data of a config as the model will see it."
    )
    parser.add_argument("config", type=Path, help="a config as JSON")
    parser.add_argument("--rows", type=int, default=3, help="rows shown of each mixture")
    arguments = parser.parse_args()
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    logging.disable(logging.WARNING)  # the report below has what they say
    config = Config.load(arguments.config)
    try:
        tokenizer = load_tokenizer(
            config.model.name, trust_remote_code=config.model.trust_remote_code
        )
        print(json.dumps(preview(config, tokenizer, rows=arguments.rows)))
    except (DataError, ModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def preview(config: Config, tokenizer: Tokenizer, *, rows: int) -> list[dict[str, Any]]:
    """Return a document for each mixture that the config's stages read. Raises DataError."""
    found = []
    if "sft" in config.stages:
        seed = None if config.data.sft_order == "sequence" else config.data.shuffle_seed
        found.append(
            _conversations(
                "sft_mixture", config.data.sft_mixture, config, tokenizer, seed=seed, rows=rows
            )
        )
    if config.uses_engine:
        found.append(_prompts("rl_mixture", config.data.rl_mixture, config, tokenizer, rows=rows))
    if config.data.eval_mixture:
        asked = [spec for spec in config.data.eval_mixture if format_named(spec.format).has_prompts]
        found.append(
            _conversations(
                "eval_mixture", config.data.eval_mixture, config, tokenizer, seed=None, rows=rows
            )
            if not asked
            else _prompts("eval_mixture", asked, config, tokenizer, rows=rows)
        )
    return found


def _conversations(
    name: str,
    specs: Sequence[DatasetSpec],
    config: Config,
    tokenizer: Tokenizer,
    *,
    seed: int | None,
    rows: int,
) -> dict[str, Any]:
    samples, report = load_sft_mixture(
        specs, tokenizer=tokenizer, max_length=config.data.max_length, seed=seed
    )
    shown = [
        (str(sample.metadata.get("where", "")), spans_of(sample, tokenizer))
        for sample in samples[:rows]
    ]
    return _document(name, report, [len(sample.tokens) for sample in samples], shown)


def _prompts(
    name: str, specs: Sequence[DatasetSpec], config: Config, tokenizer: Tokenizer, *, rows: int
) -> dict[str, Any]:
    room = config.data.max_length - (config.rl.max_new_tokens if config.rl else 0)
    prompts, report = load_fitting_prompts(
        specs, seed=config.data.shuffle_seed, tokenizer=tokenizer, tokens_max=room
    )
    ids = render_prompts(tokenizer, [(prompt, name) for prompt in prompts])
    shown = [
        (f"answer: {prompt.get('answer')}", [Span(tokenizer.decode(own), trained=False)])
        for prompt, own in zip(prompts[:rows], ids, strict=False)
    ]
    return _document(name, report, [len(own) for own in ids], shown)


def _document(
    name: str,
    report: MixtureReport,
    lengths: Sequence[int],
    shown: Sequence[tuple[str, Sequence[Span]]],
) -> dict[str, Any]:
    return {
        "mixture": name,
        "summary": str(report),
        "left_out": report.left_out,
        "lengths": [asdict(part) for part in histogram(lengths)],
        "rows": [
            {"where": where, "spans": [asdict(span) for span in spans]} for where, spans in shown
        ],
    }


if __name__ == "__main__":
    sys.exit(main())
