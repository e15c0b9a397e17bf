"""Rewards with parameters, the library math-verify, and a real, tiny reward model behind HTTP."""

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForSequenceClassification

from rollouts.training import rewards
from rollouts.training.rewards.reward_model import RewardModel
from rollouts.training.rollout_gen.concurrency import gather_in_order
from rollouts.training.types import Sample
from tests.training.tiny_task import tiny_tokenizer


def sample(response: str, answer: str = "42") -> Sample:
    return Sample(
        prompt={"messages": [{"role": "user", "content": "6*7?"}], "answer": answer},
        response=response,
    )


def test_regex_rewards() -> None:
    """Goal: the last match counts, and its group alone; a format is of the whole response. Red with the first match."""
    tagged = rewards.regex_answer(r"<answer>(.*?)</answer>")
    assert [
        tagged(sample(text))
        for text in ("<answer> 42\n</answer>", "<answer>1</answer><answer>42</answer>")
    ] == [
        1,
        1,
    ]
    assert [
        tagged(sample(text)) for text in ("42", "<answer>42</answer><answer>1</answer>", "")
    ] == [0, 0, 0]
    thought = rewards.regex_format(r"<think>.*</think>\s*\S.*")
    assert [
        thought(sample(text)) for text in ("<think>a\nb</think>\n42\n", "42", "x <think></think> 1")
    ] == [1, 0, 0]
    with pytest.raises(ValueError, match="needs a group"):
        rewards.regex_answer("42")


@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [
        (r"So it is $\boxed{\frac{1}{2}}$.", "0.5", 1.0),
        (r"The answer is $x = 2\sqrt{3}$", r"\sqrt{12}", 1.0),
        (r"\boxed{\{1,2\}}", r"\{2,1\}", 1.0),
        ("I get 41.", "42", 0.0),
        ("no idea", "42", 0.0),
    ],
)
def test_math_verify(response: str, answer: str, expected: float) -> None:
    """Goal: what means the same counts, however written. Red with exact_match, and without the $ around bare LaTeX."""
    pytest.importorskip("math_verify")
    assert rewards.math_verify(sample(response, answer)) == expected


def test_math_verify_works_off_the_main_thread() -> None:
    """Goal: no signal, so that it runs wherever rewards do. Red with the library's own time limits on."""
    pytest.importorskip("math_verify")
    found: list[float] = []
    thread = threading.Thread(target=lambda: found.append(rewards.math_verify(sample("$42$"))))
    thread.start()
    thread.join()
    assert found == [1.0]


class Classify(http.server.BaseHTTPRequestHandler):
    """SGLang's `/classify` over a transformers model, which the server holds."""

    def do_POST(self) -> None:
        ids = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["input_ids"]
        server: Any = self.server
        if len(ids) > server.longest:
            self._answer(400, {"error": {"message": "too long"}})
        elif server.as_generator:
            self._answer(200, {"text": "hello", "output_ids": [1]})
        else:
            with torch.no_grad():
                score = float(server.model(input_ids=torch.tensor([ids])).logits[0, 0])
            self._answer(200, {"embedding": [score], "meta_info": {"prompt_tokens": len(ids)}})

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *arguments: Any) -> None:
        """Quiet."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    tokenizer = tiny_tokenizer()
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    torch.manual_seed(0)
    served: Any = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Classify)
    served.model = Qwen2ForSequenceClassification(
        Qwen2Config(
            vocab_size=len(tokenizer),
            num_key_value_heads=2,
            num_labels=1,
            pad_token_id=tokenizer.pad_token_id,
            **sizes,
        )
    ).eval()
    served.longest, served.as_generator = 200, False
    served.tokenizer_directory = tmp_path_factory.mktemp("reward") / "tokenizer"
    tokenizer.save_pretrained(served.tokenizer_directory)
    served.url = f"http://127.0.0.1:{served.server_address[1]}"
    thread = threading.Thread(target=served.serve_forever)
    thread.start()
    yield served
    served.shutdown()
    thread.join()
    served.server_close()


@pytest.mark.anyio
async def test_a_reward_model_scores_the_conversation(server: Any) -> None:
    """Goal: the score of the model's own forward over its own template's ids; of an agent's whole conversation.

    Red with the response left out of what is rendered.
    """
    reward = RewardModel(server.url, tokenizer=str(server.tokenizer_directory))
    talk = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    agents = Sample(
        prompt="a",
        response="x",
        metadata={"messages": [*talk, {"role": "assistant", "content": "d"}]},
    )
    texts = [
        "<|user|>6*7?<|end|><|assistant|>42<|end|>",
        "<|user|>6*7?<|end|><|assistant|>no<|end|>",
    ]
    texts += ["<|user|>a<|end|><|assistant|>b<|end|><|user|>c<|end|><|assistant|>d<|end|>"]
    samples = [sample("42"), sample("no"), agents]

    def call(one: Sample) -> Any:
        return lambda: reward(one)

    with anyio.fail_after(200):
        scores = await gather_in_order([call(one) for one in samples])
    tokenizer = tiny_tokenizer()
    with torch.no_grad():
        ids = [torch.tensor([tokenizer(text)["input_ids"]]) for text in texts]
        expected = [float(server.model(input_ids=one).logits[0, 0]) for one in ids]
    assert scores == pytest.approx(expected, abs=1e-6) and len(set(scores)) == 3


@pytest.mark.anyio
async def test_a_reward_models_refusal_is_told(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: URL and what was answered. Red with the status not looked at."""
    reward = RewardModel(server.url, tokenizer=str(server.tokenizer_directory))
    with pytest.raises(rewards.RewardError, match=r"/classify: answered 400: .*too long"):
        await reward(sample("x" * 300))
    monkeypatch.setattr(server, "as_generator", True)
    with pytest.raises(
        rewards.RewardError, match="is this a reward model, started with --is-embedding"
    ):
        await reward(sample("x"))
    nobody = RewardModel("http://127.0.0.1:9", tokenizer=str(server.tokenizer_directory))
    with pytest.raises(rewards.RewardError, match=r"127.0.0.1:9/classify: ConnectError"):
        await nobody(sample("x"))


@pytest.mark.anyio
@pytest.mark.parametrize("row", [{"question": "6*7?", "answer": "42"}, {}])
async def test_a_row_without_a_conversation_is_told(row: dict[str, Any]) -> None:
    """Goal: what the row has, what a reward model needs, and the fix, before any server is asked. Red: KeyError."""
    reward = RewardModel("http://127.0.0.1:9", tokenizer=str(Path("/no/such")))
    with pytest.raises(
        rewards.RewardError, match=r"no 'messages'.*docs/reference/data-formats.md"
    ) as caught:
        await reward(Sample(prompt=row, response="42"))
    assert all(repr(name) in str(caught.value) for name in row)


def test_a_tokenizer_is_loaded_when_it_is_needed() -> None:
    """Goal: a config that names one loads on a machine without it. Red with the tokenizer loaded at once."""
    assert (
        RewardModel("http://127.0.0.1:9", tokenizer=str(Path("/no/such"))).base_url
        == "http://127.0.0.1:9"
    )
