"""The shipped tiny model and its tokenizer for tests, and an engine that runs such a model in this process."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rollouts.training.inference.http import Generation
from rollouts.training.model_loading import load_model, load_tokenizer

TINY_MODEL = str(Path(__file__).resolve().parents[2] / "configs" / "models" / "tiny_qwen2")


def tiny_tokenizer(chat_template: str | None = None) -> Any:
    tokenizer = load_tokenizer(TINY_MODEL)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


def tiny_model(seed: int = 0) -> Any:
    return load_model(TINY_MODEL, init="random", init_seed=seed)


@dataclass
class InProcessEngine:
    """Samples from a model, one token at a time without a cache, as `weight_sync.SGLangEngine` would."""

    model: Any
    tokenizer: Any
    requests: list[dict[str, Any]] = field(default_factory=list)

    async def generate_batch(
        self,
        prompts: list[list[int]],
        sampling_params: list[dict[str, Any]],
        *,
        n: int = 1,
        return_logprob: bool = True,
    ) -> list[list[Generation]]:
        self.requests.append({"prompts": prompts, "sampling_params": sampling_params, "n": n})
        groups = []
        for ids, params in zip(prompts, sampling_params, strict=True):
            generator = torch.Generator().manual_seed(params.get("sampling_seed", 0))
            groups.append(
                [self._one(list(ids), params, generator, return_logprob) for _ in range(n)]
            )
        return groups

    @torch.no_grad()
    def _one(
        self, ids: list[int], params: dict[str, Any], generator: Any, return_logprob: bool
    ) -> Generation:
        output: list[int] = []
        logprobs: list[float] = []
        temperature = params["temperature"]
        while len(output) < params["max_new_tokens"] and not (
            output and output[-1] in params["stop_token_ids"]
        ):
            logits_V = self.model(input_ids=torch.tensor([ids + output])).logits[0, -1].float()
            logprobs_V = torch.log_softmax(logits_V / (temperature or 1.0), dim=-1)
            greedy = temperature == 0
            token = int(
                logprobs_V.argmax()
                if greedy
                else torch.multinomial(logprobs_V.exp(), 1, generator=generator)
            )
            output.append(token)
            logprobs.append(float(logprobs_V[token]))
        reason = "stop" if output[-1] in params["stop_token_ids"] else "length"
        text = self.tokenizer.decode(output, skip_special_tokens=True)
        return Generation(
            output_ids=output,
            logprobs=logprobs if return_logprob else None,
            finish_reason=reason,
            finish_detail={"type": reason},
            weight_version="3",
            weight_versions=[],
            text=text,
            prompt_tokens=len(ids),
            cached_tokens=0,
        )
