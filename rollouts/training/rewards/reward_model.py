"""A reward model served over HTTP: SGLang with `--is-embedding`, or a server with the same `POST /classify`."""

import os
from collections.abc import Mapping
from functools import cached_property
from typing import Any, cast

import anyio.lowlevel
import httpx

from rollouts.training.rewards.reward_fn import RewardError
from rollouts.training.seams import Tokenizer
from rollouts.training.types import Sample

REQUEST_TIMEOUT_S = 600.0  # the job's own limit, limits.reward_timeout_s, comes first


class RewardModel:
    """An async reward: the score of the conversation, prompt and response, under a reward model.

    Make one in your own module and name it in `rl.reward.fn`:
    `score = RewardModel("http://127.0.0.1:30500", tokenizer="Skywork/Skywork-Reward-V2-Qwen3-0.6B")`.
    `tokenizer`: hub id or directory of the reward model's, whose chat template renders the conversation.
    `api_key_variable`: the environment variable with the server's key, if it needs one. An agent's whole
    conversation is scored. Raises RewardError for a server that is not reached, refuses, or answers without a number.
    """

    def __init__(
        self, base_url: str, *, tokenizer: str, api_key_variable: str | None = None
    ) -> None:
        self.base_url = base_url.rstrip("/")
        self._tokenizer_name = tokenizer
        self._api_key_variable = api_key_variable
        self._clients: dict[object, httpx.AsyncClient] = {}  # of the event loop that uses it now

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        from transformers import AutoTokenizer

        return cast(
            Tokenizer, AutoTokenizer.from_pretrained(self._tokenizer_name, trust_remote_code=False)
        )

    async def __call__(self, sample: Sample) -> float:
        messages = conversation_of(sample)
        ids = self._tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        try:
            response = await self._client().post("/classify", json={"input_ids": list(ids)})
        except httpx.HTTPError as error:
            raise RewardError(
                f"{self.base_url}/classify: {type(error).__name__}: {error}"
            ) from None
        if response.status_code != 200:
            raise RewardError(
                f"{self.base_url}/classify: answered {response.status_code}: {response.text[:200]}"
            )
        try:
            scores = response.json()["embedding"]
            (score,) = scores if isinstance(scores, list) else [scores]
            return float(score)
        except (ValueError, KeyError, TypeError):
            raise RewardError(
                f"{self.base_url}/classify: answered {response.text[:120]!r}; needs {{'embedding': [one number]}}: is "
                "this a reward model, started with --is-embedding?"
            ) from None

    def _client(self) -> httpx.AsyncClient:
        loop = anyio.lowlevel.current_token()
        if loop not in self._clients:
            key = os.environ.get(self._api_key_variable or "")
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            client = httpx.AsyncClient(
                base_url=self.base_url, timeout=REQUEST_TIMEOUT_S, headers=headers
            )
            self._clients = {loop: client}
        return self._clients[loop]


def conversation_of(sample: Sample) -> list[Mapping[str, Any]]:
    """Return an agent's messages, or else the prompt's and the response. Raises RewardError for a row without any."""
    if "messages" in sample.metadata:
        return list(sample.metadata["messages"])
    prompt = sample.prompt
    if isinstance(prompt, str):
        asked = [{"role": "user", "content": prompt}]
    elif "messages" in prompt:
        asked = list(prompt["messages"])
    else:
        raise RewardError(
            f"a reward model needs a conversation: the prompt row has {', '.join(map(repr, prompt)) or 'nothing'} "
            "and no 'messages'. Use rows as in docs/reference/data-formats.md, or the prompt as text"
        )
    return [*asked, {"role": "assistant", "content": sample.response}]
