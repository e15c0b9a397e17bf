"""Rewards for programs: the response's program is run on the row's "tests", in `sandbox`. Blocking: use workers.

A test is `{"stdin": text, "stdout": text}`, where the program prints the expected text, up to white space at
lines' ends; or `{"code": text}`, statements that run after the program in the same process and must not raise.
"""

import json
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rollouts.training.rewards.reward_fn import RewardError
from rollouts.training.rewards.row_answer import column_of
from rollouts.training.rewards.sandbox import SandboxLimits, run_python
from rollouts.training.types import Sample

_OPENS = re.compile(r"(?P<indent>[ \t]*)(?P<fence>`{3,}|~{3,})[ \t]*(?P<info>.*)")
# "Here it is: ```python"
_OPENS_LATE = re.compile(r"[^`~]*(?P<fence>`{3,}|~{3,})(?P<info>python3?|py)", re.IGNORECASE)
_PYTHON = ("python", "py", "python3", "py3")


def code_reward(
    *, limits: SandboxLimits | None = None, every: bool = False
) -> Callable[[Sample], float]:
    """Return a reward: the share of the row's tests that pass; with `every` 1.0 if all of them pass, else 0.0.

    `limits` are of one test. With `every` the first failure is the last test. Raises RewardError for a row without
    tests or with one that is not valid, SandboxError where programs cannot be confined.
    """

    def reward(sample: Sample) -> float:
        program, tests, passed = program_of(sample.response), tests_of(sample), 0
        for test in tests:
            if _passes(program, test, limits):
                passed += 1
            elif every:
                return 0.0
        return passed / len(tests)

    return reward


code_tests = code_reward()
code_tests_all = code_reward(every=True)


def program_of(response: str) -> str:
    """Return the last fenced block marked as Python (python, py, python3, py3); else the last unmarked one; else all.

    Fences are found line by line, as in CommonMark: three or more backticks or tildes begin a block. The next fence of
    the kind, at least as long and alone on its line, ends it, or else the end of the text.
    """
    blocks = list(_blocks(response))
    for marks in (_PYTHON, ("",)):
        chosen = [text for mark, text in blocks if mark in marks]
        if chosen:
            return chosen[-1]
    return response


def _blocks(text: str) -> Iterator[tuple[str, str]]:
    """Yield each fenced block: the first word after its fence in lower case, and the text between its fences."""
    fence, indent, mark, held = "", "", "", list[str]()
    for line in re.findall(r".*\n|.+", text.replace("\r\n", "\n")):
        bare = line.rstrip()
        if not fence:
            opens = _OPENS.fullmatch(bare) or _OPENS_LATE.fullmatch(bare)
            if opens is not None and not (opens["fence"][0] == "`" and "`" in opens["info"]):
                fence, indent, held = opens["fence"], opens.groupdict().get("indent") or "", []
                word = re.match(r"\{?[ .]*([\w+#-]*)", opens["info"])
                mark = word[1].lower() if word else ""
        elif _closes(bare, fence, indent):
            yield mark, "".join(held)
            fence = ""
        else:
            held.append(line.removeprefix(indent))
    if fence:
        yield mark, "".join(held).removesuffix(f"{fence}\n").removesuffix(fence)


def _closes(line: str, fence: str, indent: str) -> bool:
    """Return whether `line` is a fence that ends a block: its sign, as long, at most three columns further in."""
    sign = re.sub(r"</\w+>$", "", line.strip())  # "</think>" may follow
    return (
        len(sign) >= len(fence)
        and set(sign) == {fence[0]}
        and len(line) - len(line.lstrip()) <= len(indent) + 3
    )


def tests_of(sample: Sample) -> list[Mapping[str, str]]:
    """Return the row's "tests", a list or its JSON text."""
    value = column_of(sample, "tests")
    try:
        tests = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise RewardError(f"tests={str(value)[:80]!r}: is text but not JSON: {error}") from None
    if not isinstance(tests, list) or not tests or not all(map(_is_test, tests)):
        raise RewardError(
            f"tests={str(tests)[:120]!r}: needs a list of {{'stdin': text, 'stdout': text}} or {{'code': text}}"
        )
    return tests


def _is_test(test: Any) -> bool:
    return isinstance(test, Mapping) and any(
        all(isinstance(test.get(key), str) for key in keys)
        for keys in (("stdin", "stdout"), ("code",))
    )


def _passes(program: str, test: Mapping[str, str], limits: SandboxLimits | None) -> bool:
    if isinstance(test.get("code"), str):
        proof = secrets.token_hex(16)  # printed last: a program that exits early has not passed
        run = run_python(
            f"{program}\n\n{test['code']}\n\nprint()\nprint({proof!r})\n", limits=limits
        )
        return run.exit_code == 0 and run.stdout.rstrip().endswith(proof)
    run = run_python(program, stdin=test["stdin"], limits=limits)
    return run.exit_code == 0 and _lines(run.stdout) == _lines(test["stdout"])


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]
