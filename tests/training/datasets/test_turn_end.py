"""What ends a turn: tokenizer, generation config and chat template disagree in real models, and all of them count."""

import json
import shutil
from pathlib import Path
from typing import Any

import anyio
import pytest
from tokenizers import AddedToken
from transformers import GenerationConfig, PreTrainedTokenizerFast

from rollouts.agents.endpoint import Endpoint
from rollouts.agents.episode import between_turns
from rollouts.data_formats.row import DataError
from rollouts.engines.embedded.served_model import load
from rollouts.training.backends import create_pytorch_backend
from rollouts.training.datasets.chat import render_conversation, render_prompt
from rollouts.training.datasets.turn_end import end_of_turn_ids
from rollouts.training.evaluation import evaluate_with_engine, evaluate_with_model
from rollouts.training.in_process_answers import evaluating
from rollouts.training.model_files import write_model
from rollouts.training.model_loading import load_model, load_tokenizer
from rollouts.training.rollout_gen.engine_generate import make_generate_fn, stop_ids
from tests.training.datasets.families import TEMPLATES, byte_level
from tests.training.tiny_task import TINY_MODEL, InProcessEngine, tiny_model

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
LLAMA31 = (  # a call ends with another token than an answer
    "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}"
    "{% for m in messages %}{{ '<|start|>' + m.role + '\n' }}"
    "{% if m.tool_calls %}{{ m.tool_calls[0].function.name + '<|eom|>' }}"
    "{% else %}{{ m.content + '<|eot|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
TWO_AT_ONCE = (
    "{% for m in messages %}{{ '<|a|>' + m.content + '<|end|><|endoftext|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|a|>' }}{% endif %}"
)
NEEDS_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ raise_exception('no system message') }}{% endif %}"
    + LLAMA31
)
LINES = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
NEXT_ROLE = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}"  # GLM's: nothing at the end


def tokenizer_of(template: str, specials: str, *, eos: str) -> Any:
    """A byte-level tokenizer with these special tokens, whose eos_token need not be what the template ends with."""
    inner = byte_level(trim_offsets=False)
    inner.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in [eos, *specials.split()]]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=eos, chat_template=template)


def tokens(tokenizer: Any, ids: list[int]) -> list[str]:
    return tokenizer.convert_ids_to_tokens(ids)


QWEN_BASE = tokenizer_of(
    (TEMPLATES / "qwen2_5.jinja").read_text(),
    "<|im_start|> <|im_end|> <tool_call> </tool_call>",
    eos="<|endoftext|>",
)
GEMMA = tokenizer_of(
    (TEMPLATES / "gemma3.jinja").read_text(), "<bos> <start_of_turn> <end_of_turn>", eos="<eos>"
)
GEMMA.bos_token = "<bos>"


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [
        (QWEN_BASE, ["<|endoftext|>", "<|im_end|>"]),
        (GEMMA, ["<eos>", "<end_of_turn>"]),
        (
            tokenizer_of(PHI3, "<|user|> <|assistant|> <|end|>", eos="<|endoftext|>"),
            ["<|endoftext|>", "<|end|>"],
        ),
        (
            tokenizer_of(LLAMA31, "<|start|> <|eom|> <|eot|>", eos="<|eos|>"),
            ["<|eos|>", "<|eom|>", "<|eot|>"],
        ),
        (
            tokenizer_of(NEEDS_SYSTEM, "<|start|> <|eom|> <|eot|>", eos="<|eos|>"),
            ["<|eos|>", "<|eom|>", "<|eot|>"],
        ),
        (
            tokenizer_of(TWO_AT_ONCE, "<|a|> <|end|>", eos="<|endoftext|>"),
            ["<|endoftext|>", "<|end|>"],
        ),
        (tokenizer_of(LINES, "<|x|>", eos="<|endoftext|>"), ["<|endoftext|>"]),
        (tokenizer_of(NEXT_ROLE, "<|user|> <|assistant|>", eos="<|endoftext|>"), ["<|endoftext|>"]),
    ],
    ids=[
        "Qwen base",
        "Gemma",
        "Phi-3",
        "Llama 3.1",
        "a system message is needed",
        "two at once",
        "a line break",
        "nothing",
    ],
)
def test_a_template_and_its_tokenizer_both_say_what_ends_a_turn(
    tokenizer: Any, expected: list[str]
) -> None:
    """Goal: engines, agents and evaluation stop where SFT taught the model to. Red with the eos_token alone."""
    assert tokens(tokenizer, stop_ids(tokenizer, None)) == expected
    assert Endpoint(
        engine="http://x", tokenizer=tokenizer, max_new_tokens=1
    ).stops == end_of_turn_ids(tokenizer)
    assert stop_ids(tokenizer, [7]) == [7]


def test_a_tokenizer_without_a_template_has_its_eos_token() -> None:
    """Goal: plain text models go on as they did. Red when a missing template was an error."""
    tokenizer = tokenizer_of(LINES, "<|x|>", eos="<|endoftext|>")
    tokenizer.chat_template = None
    assert tokens(tokenizer, end_of_turn_ids(tokenizer)) == ["<|endoftext|>"]


def test_lists_of_ends_beside_the_tokenizer_count(tmp_path: Path) -> None:
    """Goal: Gemma's 1 and 106, Phi-3's 32007, Llama 3's three, wherever a config names them. Red without the files."""
    QWEN_BASE.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 9]}))
    (tmp_path / "config.json").write_text(
        json.dumps({"text_config": {"eos_token_id": 4}, "eos_token_id": None})
    )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    im_end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert set(stop_ids(tokenizer, None)) == {tokenizer.eos_token_id, im_end, 5, 9, 4}
    (tmp_path / "generation_config.json").write_text("{broken")
    assert set(stop_ids(tokenizer, None)) == {tokenizer.eos_token_id, im_end, 4}


@pytest.mark.parametrize(
    ("template", "specials"),
    [(PHI3, "<|user|> <|assistant|> <|end|>"), (TWO_AT_ONCE, "<|a|> <|end|>")],
    ids=["Phi-3", "two at once"],
)
def test_only_the_first_of_several_ends_is_trained_and_continued(
    template: str, specials: str
) -> None:
    """Goal: nobody samples what a template writes after the end, so it is not trained; an episode goes on behind the
    end that was sampled. Red: "\\n<|endoftext|>" was trained, and Phi-3's episodes were refused."""
    tokenizer = tokenizer_of(template, specials, eos="<|endoftext|>")
    (rendering,) = render_conversation(tokenizer, CHAT, "f:1")
    trained = [
        token for token, value in zip(rendering.token_ids, rendering.mask, strict=True) if value
    ]
    assert tokenizer.decode(trained) == "yo<|end|>"
    follows = between_turns(tokenizer, CHAT, [{"role": "user", "content": "more"}], None)
    whole = [*CHAT, {"role": "user", "content": "more"}]
    rendered = tokenizer.apply_chat_template(whole, add_generation_prompt=True, return_dict=False)
    upto = len(rendering.token_ids) - rendering.mask[::-1].index(1.0)
    assert [*rendering.token_ids[:upto], *follows] == rendered


def base_model_directory(directory: Path) -> Path:
    """The tiny model as a base model: its eos_token is the padding token, its template ends turns with <|end|>."""
    shutil.copytree(TINY_MODEL, directory)
    for name, key, value in (
        ("config", "eos_token_id", 0),
        ("tokenizer_config", "eos_token", "<|pad|>"),
    ):
        file = directory / f"{name}.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    return directory


def test_a_checkpoint_names_every_end(tmp_path: Path) -> None:
    """Goal: vLLM and SGLang, which read generation_config.json, stop where the template ends a turn. Red: only 0."""
    path = base_model_directory(tmp_path / "base")
    backend = create_pytorch_backend(path, tmp_path / "checkpoints", device_type="cpu", init_seed=0)
    saved = anyio.run(backend.save_checkpoint, 1, {})
    assert json.loads((saved / "generation_config.json").read_text())["eos_token_id"] == [0, 1]
    assert set(stop_ids(load_tokenizer(str(saved)), None)) == {0, 1}
    assert load_model(str(saved)).generation_config.eos_token_id == [0, 1]
    assert load(str(saved), dtype="float32", device="cpu", trust_remote_code=False).eos_ids == {
        0,
        1,
    }


def test_a_checkpoint_written_during_an_evaluation_keeps_the_models_generation_config(
    tmp_path: Path,
) -> None:
    """Goal: a save goes on while the model is evaluated, with its generation config set aside. Red: it was lost."""
    model, tokenizer = tiny_model(), load_tokenizer(TINY_MODEL)
    model.generation_config = GenerationConfig(eos_token_id=[1, 9], pad_token_id=0, max_length=77)
    with evaluating(model):
        write_model(model, tmp_path, model.state_dict(), tokenizer)
    saved = GenerationConfig.from_pretrained(tmp_path)
    assert saved.eos_token_id == [1, 9] and saved.max_length == 77
    assert model.generation_config.max_length == 77 and not hasattr(model, "_own_generation_config")


@pytest.mark.anyio
async def test_in_process_and_by_the_engine_stop_alike(tmp_path: Path) -> None:
    """Goal: the same weights give the same answers either way, where the generation config names more than the
    tokenizer does. Red: in process the answer went on."""
    path = base_model_directory(tmp_path / "model")
    model, tokenizer = load_model(str(path), init="random", init_seed=3), load_tokenizer(str(path))
    rows = [{"messages": [CHAT[0]], "answer": "x"}]
    options: dict[str, Any] = {"max_new_tokens": 6}
    engine = InProcessEngine(model, tokenizer)
    [[free]] = await engine.generate_batch(
        [render_prompt(tokenizer, rows[0])], [{"temperature": 0, "stop_token_ids": [], **options}]
    )
    first, end, *_ = free.output_ids
    assert len({first, end, 0, 1}) == 4
    model.generation_config.eos_token_id = [0, end]
    model.generation_config.save_pretrained(path)
    in_process = evaluate_with_model(model, tokenizer, rows, **options)
    by_engine = await evaluate_with_engine([engine], tokenizer, rows, **options)
    assert set(engine.requests[-1]["sampling_params"][0]["stop_token_ids"]) == {0, 1, end}
    assert in_process.responses == [tokenizer.decode([first])]
    # this engine keeps the end, real ones drop it
    assert by_engine.responses[0].startswith(in_process.responses[0])


@pytest.mark.anyio
async def test_rollouts_ask_for_the_templates_end() -> None:
    """Goal: RL after SFT on a base model stops. Red: requests named the eos_token alone, and every answer was cut."""
    engine = InProcessEngine(tiny_model(), load_tokenizer(TINY_MODEL))
    tokenizer = load_tokenizer(TINY_MODEL)
    tokenizer.eos_token = "<|pad|>"
    await make_generate_fn([engine], tokenizer, max_new_tokens=2, temperature=1.0)(["hi"], seed=0)
    assert engine.requests[0]["sampling_params"][0]["stop_token_ids"] == [0, 1]


def test_a_message_without_a_role_is_named() -> None:
    """Goal: an error about the row, as for messages that are no list. Red: KeyError 'role'."""
    with pytest.raises(DataError, match="needs a list of objects with 'role' and 'content'"):
        render_prompt(GEMMA, {"messages": [{"content": "x"}]})
