"""What can be known of rows before training: length, losses of the template, columns, answers, weights, files."""

import json
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest

from rollouts.data_formats import parse_row
from rollouts.data_formats.row import DataError, Row
from rollouts.training.datasets import load_sft_dataset, prompts
from rollouts.training.datasets.chat import render_conversation, render_prompt, render_prompts
from rollouts.training.datasets.dataset_loaders import (
    DatasetEntry,
    load_fitting_prompts,
    load_prompt_mixture,
    load_prompts_from_jsonl,
    load_sft_mixture,
)
from rollouts.training.datasets.prompts import fitting_prompts
from rollouts.training.datasets.rows import read_rows
from rollouts.training.rewards import (
    exact_match,
    gsm8k_answer,
    is_correct,
    per_letter,
    regex_answer,
)
from rollouts.training.types import Sample
from tests.training.datasets.families import FAMILIES
from tests.training.tiny_task import tiny_tokenizer

USER = {"role": "user", "content": "hi"}
SAID = {"role": "assistant", "content": "yo"}
SYSTEM = {"role": "system", "content": "be brief"}
WITHOUT_SYSTEM = (
    "{% for m in messages %}{% if m.role != 'system' %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
LAST_ALONE = (
    "{{ '<|' + messages[-1].role + '|>' + messages[-1].content + '<|end|>' }}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "search", "description": "find", "parameters": {}}}


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def row(**values: Any) -> Row:
    return Row("f.jsonl:7", values)


# --- length ---------------------------------------------------------------------------------------------------------


def test_prompts_that_no_answer_fits_behind_are_left_out_and_counted(tmp_path: Path) -> None:
    """Goal: found before anything trains, counted with rows, as SFT does. Red: the engine refused one at some step."""
    names = [
        write(tmp_path / f"{n}.jsonl", [{"question": "a" * n, "answer": "x"} for n in range(1, n)])
        for n in (6, 9)
    ]
    specs = [DatasetEntry(names[0], None, repeat=2), DatasetEntry(names[1], None)]
    rows, report = load_fitting_prompts(specs, seed=0, tokenizer=tiny_tokenizer(), tokens_max=8)
    assert report.left_out == {"prompt longer than 8 tokens": 3} and report.kept == len(rows) == 15
    assert report.longest == 8 and "8.jsonl" not in str(report) and "9.jsonl:6" in str(report)
    assert rows == [
        one for one in load_prompt_mixture(specs, seed=0) if len(one["messages"][0]["content"]) < 6
    ]
    with pytest.raises(
        DataError,
        match=r"no prompt is left .*longer than 3 tokens \(.*jsonl:\d.*the longest has 11",
    ):
        load_fitting_prompts(specs, seed=0, tokenizer=tiny_tokenizer(), tokens_max=3)


def test_what_an_environment_offers_counts() -> None:
    """Goal: an episode's first prompt has its tools. Red with the row's own length."""
    tokenizer = FAMILIES["qwen2_5"].tokenizer()
    example = parse_row(row(question="hi", answer="x"))
    bare, offered = (
        fitting_prompts([example], tokenizer, **options)[1] for options in ({}, {"tools": [TOOL]})
    )
    assert offered.longest > bare.longest + 50
    _, report = fitting_prompts([example], tiny_tokenizer(WITHOUT_SYSTEM), tools=[TOOL])
    assert (
        report.kept == 1
        and "f.jsonl:7: the chat template leaves out the tool 'search'" in report.tools_lost
    )


@pytest.mark.parametrize("max_length", [1, 0, -5])
def test_a_length_that_leaves_nothing_to_predict_is_refused(
    tmp_path: Path, max_length: int
) -> None:
    """Goal: a message with the need. Red: range() arg 3 must not be zero, or every text in pieces of nothing."""
    path = write(tmp_path / "t.jsonl", [{"text": "abc"}])
    with pytest.raises(DataError, match=f"max_length={max_length}: needs >= 2"):
        load_sft_dataset(path, tokenizer=tiny_tokenizer(), format="text", max_length=max_length)


# --- what the template drops ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "messages", "tools"),
    [
        (WITHOUT_SYSTEM, [SYSTEM, USER], None),
        (WITHOUT_SYSTEM, [{**SYSTEM, "content": "hi"}, USER], None),  # the user says it, too
        # and so does the template
        (WITHOUT_SYSTEM, [{**SYSTEM, "content": "assistant"}, USER], None),
        (WITHOUT_SYSTEM, [{**SYSTEM, "content": "h"}, USER], None),
        (LAST_ALONE, [USER, SAID, {**USER, "content": "hi there"}], None),
        (WITHOUT_SYSTEM, [USER], [TOOL]),
        (WITHOUT_SYSTEM, [{**USER, "content": "search!"}], [TOOL]),
        (WITHOUT_SYSTEM, [{**USER, "content": "search!"}], json.dumps([TOOL])),
    ],
)
def test_what_the_template_drops_is_an_error_for_prompts_too(
    template: str, messages: Any, tools: Any
) -> None:
    """Goal: RL and evaluation refuse what SFT refuses, also where the same text stands elsewhere. Red: no word."""
    tokenizer = tiny_tokenizer(template)
    prompt = {"messages": messages} if tools is None else {"messages": messages, "tools": tools}
    match = "the chat template leaves out " + ("the tool 'search'" if tools else "content of the")
    with pytest.raises(DataError, match="prompt: .*" + match):
        render_prompt(tokenizer, prompt)
    with pytest.raises(DataError, match="f.jsonl:7: .*" + match):
        fitting_prompts([parse_row(row(**prompt), "messages")], tokenizer)
    with pytest.raises(DataError, match="f:1: .*" + match):
        render_conversation(tokenizer, [*messages, SAID], "f:1", tools=tools)


@pytest.mark.parametrize(
    "family", [one for one in FAMILIES.values() if one.system], ids=lambda family: family.name
)
def test_what_real_templates_keep_is_kept(family: Any) -> None:
    """Goal: no false alarm, whoever says the same words: systems, users, tools and results. Red with a mark where the
    template reads the content (it strips thinking, parses results)."""
    tokenizer = family.tokenizer()
    same = [
        {**SYSTEM, "content": "user"},
        {**USER, "content": "user"},
        SAID,
        {**USER, "content": "user"},
    ]
    assert render_prompt(tokenizer, {"messages": same})
    assert render_conversation(tokenizer, [*same, SAID], "f:1")
    if family.tools:
        function = {"name": "search", "arguments": {"search": "find"}}
        call = {"id": "call00000", "type": "function", "function": function}
        result = {
            "role": "tool",
            "name": "search",
            "tool_call_id": "call00000",
            "content": '"search"',
        }
        spoken = [
            {**USER, "content": "search"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            result,
        ]
        assert render_prompt(tokenizer, {"messages": spoken, "tools": [TOOL]})
        assert render_conversation(tokenizer, [*spoken, SAID], "f:1", tools=[TOOL])


@pytest.mark.parametrize(
    "row", [{"question": "x"}, {"messages": "hi"}, {"messages": ["hi"]}, {"messages": None}]
)
def test_a_prompt_without_messages_is_named(row: Any) -> None:
    """Goal: a script's row says what it lacks. Red: KeyError, AttributeError."""
    with pytest.raises(DataError, match=r"prompt: messages=.*needs a list of objects"):
        render_prompt(tiny_tokenizer(), row)


@pytest.mark.parametrize(
    "text", ['{"a": 1, "a": 2}', '{"a": Infinity}', '{"a": ' + "9" * 5000 + "}", "[1]", "{"]
)
def test_arguments_as_text_are_read_as_strictly_as_lines(text: str) -> None:
    """Goal: nothing of a call is guessed or lost; the message stays short. Red: the last of two values was trained."""
    call = {"function": {"name": "search", "arguments": text}}
    messages = [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]
    with pytest.raises(
        DataError, match=r"f:1: messages\[1\]\.tool_calls: arguments=.*needs an object"
    ) as caught:
        render_conversation(FAMILIES["qwen2_5"].tokenizer(), messages, "f:1")
    assert len(str(caught.value)) < 300


def test_a_template_that_ends_turns_with_text_is_noted() -> None:
    """Goal: RL over such a template says where answers end, since nothing taught the model to. Red: no word."""
    lines = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    example = parse_row(row(question="hi", answer="x"))
    _, report = fitting_prompts([example], tiny_tokenizer(lines))
    assert "the chat template writes no token after an answer, which ends at <|end|>" in str(report)
    assert report.noteworthy and not fitting_prompts([example], tiny_tokenizer())[1].noteworthy


# --- columns and answers --------------------------------------------------------------------------------------------


ARC = {"question": "q", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "A"}


@pytest.mark.parametrize(
    ("format", "values", "clashing"),
    [
        (
            "gsm8k",
            {"question": "q", "answer": "work #### 72"},
            {"format": "markdown", "messages": "none"},
        ),
        (
            "gsm8k_calculator",
            {"question": "q", "answer": "<<70+2=72>> #### 72"},
            {"format": "x", "tools": []},
        ),
        (
            "question_answer",
            {"question": "q", "answer": "72"},
            {"format": "multiple_choice", "messages": []},
        ),
        ("messages", {"messages": [USER, SAID]}, {"format": "gsm8k"}),
        ("custom_json", {"messages": [USER, SAID]}, {"format": "gsm8k"}),
        (
            "multiple_choice",
            ARC,
            {"format": "gsm8k", "letters": 3, "answer": "the first", "messages": 1},
        ),
        ("text", {"text": "abc"}, {"format": "pdf"}),
    ],
)
def test_a_rows_column_never_stands_for_a_key_of_ours(
    format: Any, values: Any, clashing: Any
) -> None:
    """Goal: columns named format, messages, answer or letters change no reward, and are named. Red: format did."""
    plain, clash = (
        parse_row(row(**values), format),
        parse_row(row(**values, **clashing, level=3), format),
    )
    assert clash.prompt == {**plain.prompt, "level": 3} and clash.messages == plain.messages
    assert set(clash.replaced) == set(clashing) and plain.replaced == ()


def test_columns_that_clash_are_counted_and_rewards_stay(tmp_path: Path) -> None:
    """Goal: "It is 70+2. #### 72" is right whatever the columns are called. Red: 0.0, judged as exact match."""
    rows = [{"question": "q", "answer": "work #### 72", "format": "markdown"}] * 2
    found, report = load_fitting_prompts(
        [DatasetEntry(write(tmp_path / "a.jsonl", rows), "gsm8k")],
        seed=0,
        tokenizer=tiny_tokenizer(),
    )
    assert is_correct(Sample(prompt=found[0], response="It is 70+2. #### 72")) == 1.0
    assert report.replaced == {"format": 2} and "column 'format' of 2 rows is not used" in str(
        report
    )
    plain = load_prompts_from_jsonl(
        write(tmp_path / "p.jsonl", [{"prompt": "q", "answer": "B", "format": "multiple_choice"}])
    )
    assert "format" not in plain[0] and is_correct(Sample(prompt=plain[0], response="(B)")) == 0.0


@pytest.mark.parametrize(
    ("answer", "right", "wrong"),
    [
        (72.0, ["72", " 72\n"], ["72.0"]),
        (72, ["72"], ["7"]),
        (0.5, ["0.5"], ["0", ".5"]),
        (["72"], ["72"], ["['72']", "7"]),
        (["seventy-two", 72.0], ["72", "seventy-two"], ["seventy"]),
        ("72", ["72"], ["72.0"]),
    ],
)
def test_an_answer_is_compared_as_a_response_would_have_it(
    answer: Any, right: list[str], wrong: list[str]
) -> None:
    """Goal: a pandas column of integers with a gap, and lists of accepted answers. Red: always 0 for "72"."""
    prompt = parse_row(row(messages=[USER], answer=answer), "messages").prompt
    tagged = regex_answer("<a>(.*?)</a>")
    for response in right:
        assert exact_match(Sample(prompt=prompt, response=response)) == 1.0
        assert per_letter(Sample(prompt=prompt, response=response)) == 1.0
        assert tagged(Sample(prompt=prompt, response=f"so <a>{response}</a>")) == 1.0
    for response in wrong:
        assert exact_match(Sample(prompt=prompt, response=response)) == 0.0
    assert gsm8k_answer(Sample(prompt={"answer": [1.0, 2.0]}, response="#### 2")) == 1.0


@pytest.mark.parametrize(
    "answer", [True, False, {"value": 72}, [], [True], [["72"]], ["72", ""], [{"a": 1}]]
)
@pytest.mark.parametrize("format", ["messages", "smoltalk", "custom_json", None])
def test_an_answer_that_nothing_could_equal_is_named(
    tmp_path: Path, answer: Any, format: Any
) -> None:
    """Goal: as question_answer: row, value, need. Red: a reward of 0 for every response."""
    with pytest.raises(DataError, match=r"f.jsonl:7: answer=.*needs a string, a number, or a list"):
        parse_row(row(messages=[USER, SAID], answer=answer), format)
    path = write(tmp_path / "p.jsonl", [{"prompt": "q", "answer": answer}])
    with pytest.raises(DataError, match=r"p.jsonl:1: answer="):
        load_prompts_from_jsonl(path)


# --- weights and empty turns ----------------------------------------------------------------------------------------


def conversation(**keys: Any) -> list[dict[str, Any]]:
    return [
        USER,
        {"role": "assistant", "content": "BAD", **keys},
        USER,
        {"role": "assistant", "content": "good"},
    ]


@pytest.mark.parametrize(
    "keys",
    [
        {"weight": 0},
        {"weight": 0.0},
        {"train": False},
        {"trainable": 0},
        {"loss": False},
        {"do_train": False},
        {"Weight": 0},
        {"content": ""},
        {"content": " \n"},
    ],
)
@pytest.mark.parametrize("template", [None, "<|{role}|>"])
def test_turns_that_are_not_to_be_trained_are_read_alone(
    tmp_path: Path, keys: Any, template: str | None
) -> None:
    """Goal: OpenAI's, Mistral's and axolotl's switches; an empty turn, whose end alone would be trained. Counted.

    Red: 'BAD<|end|>good<|end|>' was trained."""
    text = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    tokenizer = tiny_tokenizer(None if template is None else text)
    entry = DatasetEntry(
        write(tmp_path / "a.jsonl", [{"messages": conversation(**keys)}]), "messages"
    )
    (sample,), report = load_sft_mixture([entry], tokenizer=tokenizer, max_length=64, seed=None)
    trained = [token for token, value in zip(sample.tokens, sample.loss_mask, strict=True) if value]
    assert tokenizer.decode(trained) == "good<|end|>"
    bare = [{key: one[key] for key in ("role", "content")} for one in conversation(**keys)]
    assert sample.tokens == tokenizer.apply_chat_template(bare, return_dict=False)
    reason = "empty" if "content" in keys else "marked as not to be trained"
    assert report.untrained == {reason: 1} and f"1 assistant turns not trained: {reason}" in str(
        report
    )


@pytest.mark.parametrize("weight", [0, 1, 1.0])
@pytest.mark.parametrize("role", ["user", "system"])
def test_a_weight_of_another_role_has_no_effect(tmp_path: Path, role: str, weight: Any) -> None:
    """Goal: as OpenAI's format means it, of the assistant's messages alone. Red: weight 1 of a user was refused."""
    turns = [{"role": role, "content": "hi", "weight": weight}, USER, {**SAID, "weight": 1}]
    both = [
        {"messages": turns},
        {"messages": [{k: v for k, v in one.items() if k != "weight"} for one in turns]},
    ]
    entry = DatasetEntry(write(tmp_path / "a.jsonl", both), "messages")
    samples, report = load_sft_mixture(
        [entry], tokenizer=tiny_tokenizer(), max_length=64, seed=None
    )
    weighted, bare = samples
    assert (
        weighted.tokens == bare.tokens
        and weighted.loss_mask == bare.loss_mask
        and not report.untrained
    )


def test_a_conversation_with_nothing_to_train_is_left_out_by_reason(tmp_path: Path) -> None:
    """Goal: counted apart from rows without an assistant. Red: its end tokens were trained."""
    rows = [[USER, {**SAID, "weight": 0}], [USER, {**SAID, "content": ""}], [USER], [USER, SAID]]
    entry = DatasetEntry(
        write(tmp_path / "a.jsonl", [{"messages": one} for one in rows]), "messages"
    )
    samples, report = load_sft_mixture(
        [entry], tokenizer=tiny_tokenizer(), max_length=64, seed=None
    )
    assert len(samples) == 1 and report.left_out == {
        "no trained token (every assistant turn is empty or marked as not to be trained)": 2,
        "no trained token (no assistant turn)": 1,
    }
    # nothing that an answer could equal
    assert "answer" not in parse_row(row(messages=rows[1])).prompt


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"weight": 0.5}, "weight=0.5; needs 0 or 1"),
        ({"weight": "0"}, "weight='0'; needs 0 or 1"),
        ({"train": [1]}, r"train=\[1\]; needs 0 or 1"),
        ({"weight": 1, "train": False}, "contradict each other"),
        ({"train_detail": []}, r"train_detail=\[\] would change the loss"),
        ({"loss_mask": 1}, "loss_mask=1 would change the loss"),
        ({"ignore": True}, "ignore=True would change the loss"),
        ({"Masked": True}, "masked=True would change the loss"),
    ],
)
def test_a_weight_that_is_not_understood_is_named(keys: dict[str, Any], message: str) -> None:
    """Goal: nothing that would change the loss is passed over, however it is spelt. Red: all of these were trained."""
    with pytest.raises(DataError, match=r"f.jsonl:7: messages\[1\].*" + message):
        parse_row(row(messages=conversation(**keys)), "messages")
    with pytest.raises(DataError, match=r"f:1: messages\[1\].*" + message):
        render_conversation(tiny_tokenizer(), conversation(**keys), "f:1")
    with pytest.raises(
        DataError, match=r"messages\[0\] has .*'user'; only the assistant's turns are trained"
    ):
        parse_row(row(messages=[{**USER, "train": True}, SAID]), "messages")


def test_weight_1_and_null_say_nothing_new() -> None:
    """Goal: rows that name the rule. Red when any of the keys was refused."""
    plain = render_conversation(tiny_tokenizer(), conversation(), "f:1")
    for keys in ({"weight": 1}, {"weight": None}, {"train": True, "weight": 1.0}):
        assert render_conversation(tiny_tokenizer(), conversation(**keys), "f:1") == plain
    asked = [{**USER, "weight": 0}, SAID]
    assert render_conversation(tiny_tokenizer(), asked, "f:1") == render_conversation(
        tiny_tokenizer(), [USER, SAID], "f:1"
    )


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.json", "x.jsonl.gz", "x.parquet", "x.csv", "x"])
def test_a_file_of_another_kind_says_what_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Goal: a file is called a file, by any path to it. Red: "no such directory", or a look-up on the hub."""
    (tmp_path / name).write_text("{}")
    monkeypatch.chdir(tmp_path)
    for path in (str(tmp_path / name), name, f"./{name}"):
        with pytest.raises(
            DataError,
            match=r"is a file of a kind that is not read directly.*a \.jsonl file, a direct",
        ):
            read_rows(path)
    if "." in name:
        with pytest.raises(DataError, match=r"no such file \(looked in"):
            read_rows(f"no_{name}")


def test_jsonl_in_capitals_and_directories_of_that_name(tmp_path: Path) -> None:
    """Goal: X.JSONL is lines, and a directory is one whatever its name ends in. Red: no such directory."""
    write(tmp_path / "X.JSONL", [{"q": 1}])
    assert read_rows(str(tmp_path / "X.JSONL"))[0].values == {"q": 1}
    (tmp_path / "set.jsonl").mkdir()
    write(tmp_path / "set.jsonl" / "train.jsonl", [{"q": 2}])
    assert read_rows(str(tmp_path / "set.jsonl"))[0].values == {"q": 2}


def test_a_hub_name_is_called_one_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Goal: whoever wrote "gsm8k" reads of the hub, not of a directory. Red: "there is no such directory" was first."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError) as caught:
        read_rows("gsm8k", subset="main")
    text = str(caught.value)
    assert text.startswith("gsm8k: cannot read split 'train', subset 'main' of this hub data set: ")
    assert "directory" not in text[: text.index("Fix: ")]


def test_repeated_rows_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Goal: a mixture that repeats costs no more. Red with an entry per repetition rendered."""
    rendered: list[Any] = []

    def counting(tokenizer: Any, rows: Any) -> Any:
        rendered.extend(rows)
        return render_prompts(tokenizer, rows)

    monkeypatch.setattr(prompts, "render_prompts", counting)
    path = write(tmp_path / "a.jsonl", [{"question": text, "answer": "x"} for text in ("abc", "d")])
    rows, report = load_fitting_prompts(
        [DatasetEntry(path, None, repeat=500)], seed=0, tokenizer=tiny_tokenizer()
    )
    assert len(rows) == report.kept == 1000 and report.longest == 6 and len(rendered) == 2
