"""How both stages answer held-out rows."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """How both stages answer held-out rows. Each row is always answered greedily; these are the answers beside that."""

    num_samples: int  # sampled answers per row, for pass@k; 0: none
    pass_at: list[int]  # the k of each pass@k, at most num_samples; [] without samples
    temperature: float  # of the sampled answers
    top_k: int  # sample those among the k likeliest tokens; -1: all
    seed: int  # of their sampling
    in_process_rows: int  # rows, the first ones, that the trainer answers where no engine does (sft); 0: none, -1: all
    # of each of its answers at most; rl.max_new_tokens where that is less
    in_process_new_tokens: int
    # that it holds keys and values of at once: prompts, padding and answers
    in_process_batch_tokens: int
