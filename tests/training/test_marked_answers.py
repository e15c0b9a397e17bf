"""What a response marks as its program or its answer: fences, tags. Programs are judged as usual harnesses would."""

import pytest

from rollouts.training import rewards
from rollouts.training.rewards.code_rewards import program_of
from rollouts.training.types import Sample

F, PROGRAM = "```", "print(1)\n"


@pytest.mark.parametrize(
    "response",
    [
        f"Run:\n{F}bash\npip install x\n{F}\nThen the program:\n{F}python\nprint(1)\n{F}",
        f'{F}json\n{{"a": 1}}\n{F}\ntext between\n{F}python3\nprint(1)\n{F}\n',
        f"{F}text\nplan\n{F}\n{F}\nprint(1)\n{F}",
        f"{F}python\nprint(1)\n{F}\nIt prints:\n{F}\n1\n{F}",
        f"{F}python\nprint(1)\n{F}\n{F}output\n1\n{F}\n{F}sh\npython a.py\n{F}",
        f"{F}python\nprint(0)\n{F}\nBetter:\n{F}Python title='a.py'\nprint(1)\n{F}",
        "~~~py\nprint(1)\n~~~",
        "````python\nprint(1)\n````",
        f"1. first\n\n   {F}python\n   print(1)\n   {F}\n",
        f"{F}{{.python}}\nprint(1)\n{F}",
        f"{F}\nprint(1)\n{F}",
        f"Here it is: {F}python\nprint(1)\n{F}",
        f"{F}python\r\nprint(1)\r\n{F}\r\n",
        f"{F}python\nprint(1)\n",  # cut off, or never closed
        "print(1)\n",
        f"Use `{F}`.\n{F}python\nprint(1)\n{F}",
        f"<think>Say {F}python\nprint(0)\n{F}</think>\n{F}python\nprint(1)\n{F}",
        f"- so:\n  {F}py3\n  print(1)\n  {F}\n",
        f"{F}inline{F} is a span\n{F}python\nprint(1)\n{F}",
    ],
)
def test_the_program_is_the_last_python_block(response: str) -> None:
    """Goal: the block that a reader would run. Red with a pattern that knew some fences as openers, all as closers:
    prose between two blocks was run. Red for the closing tag behind a fence, and py3, without their rules."""
    assert program_of(response) == PROGRAM


def test_a_fence_within_a_program_does_not_end_it() -> None:
    """Goal: a shorter fence, another sign, or one far to the right is the program's own text. Red with any fence."""
    doc = f'def f():\n    """\n    {F}\n    """\n'
    assert program_of(f"{F}python\n{doc}{F}\nbye") == doc
    assert program_of(f"````python\nx = '''\n{F}\n'''\n````") == f"x = '''\n{F}\n'''\n"
    assert program_of(f"~~~python\nx = '''\n{F}\n'''\n~~~") == f"x = '''\n{F}\n'''\n"


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("I put it into <answer> tags: <answer>42</answer>", 1.0),
        ("<answer>41</answer> or <answer> rather <answer>42</answer>", 1.0),
        ("<answer>42</answer> <answer>", 1.0),
        ("<answer>42", 0.0),
        ("<answer>4 <b>2</b></answer>", 0.0),
    ],
)
def test_an_opening_tag_that_is_spoken_of_is_passed_over(response: str, expected: float) -> None:
    """Goal: the last opener before the closer counts. Red with the first: its text is "tags: <answer>42"."""
    reward = rewards.regex_answer(r"<answer>(.*?)</answer>")
    assert reward(Sample(prompt={"answer": "42"}, response=response)) == expected


def test_a_pattern_without_tags_finds_whole_matches() -> None:
    """Goal: the repair for tags leaves other patterns alone. Red with matches searched for at every place: 2 of 142."""
    number = rewards.regex_answer(r"(\d+)")
    assert number(Sample(prompt={"answer": "142"}, response="so 142")) == 1.0
    after = rewards.regex_answer(r"= *(\S+)")
    assert after(Sample(prompt={"answer": "a==b"}, response="it is = a==b")) == 1.0


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("It is 70+2. #### 72", 1.0),
        ("#### 72.", 1.0),
        ("####72", 1.0),
        ("#### $72", 1.0),
        ("#### 72.00", 0.0),
        ("#### 1,072", 0.0),
        ("#### -72", 0.0),
        ("#### **72**", 1.0),
        ("####  72 dollars", 1.0),
        ("72", 0.0),
        ("##### 72", 1.0),
    ],
)
def test_gsm8k_numbers_as_the_harness_reads_them(response: str, expected: float) -> None:
    """Goal: a full stop, a dollar, a missing space are no other number. Red with nanochat's pattern, to the letter."""
    assert (
        rewards.gsm8k_answer(
            Sample(prompt={"answer": "70+2=<<70+2=72>>72\n#### 72"}, response=response)
        )
        == expected
    )
