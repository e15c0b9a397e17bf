"""Rewards for mathematics by the library math-verify (extra `math`): answers that mean the same, however written."""

import importlib.util
import re
from typing import Any

from rollouts.training.rewards import math_text
from rollouts.training.rewards.common import RewardError, answer_of, answers_of, any_answer, set_row_check
from rollouts.training.types import Prompt, Sample

_PLAIN_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


@any_answer
def math_verify(sample: Sample) -> float:
    r"""1.0 when the response's final answer means the row's, else 0.0: LaTeX, bare or in `\boxed{}` or `$...$`, numbers
    or words.

    The row's answer is read to its end or not at all, and so is what the response boxes: no part of either counts for
    the whole. A few words that are no mathematics are compared as text. Comparing can take long (sympy): run it in
    `rl.reward.workers`, where `limits.reward_timeout_s` cuts it off; the library's own alarm is off, for it works in a
    main thread alone. Raises RewardError for an answer that cannot be read to its end, and where the library is not
    installed.
    """
    try:
        import math_verify as library
    except ModuleNotFoundError as error:
        raise RewardError(f"math_verify: needs the package math-verify (no module {error.name!r})") from None
    answer = answer_of(sample)
    gold = _row_answer(answer)
    said = _said(sample.response)
    exact = _same_by_text(gold, said)
    if exact is not None:
        return float(exact)
    expected = _read(gold)
    if expected is None:
        if math_text.words_of(gold) is not None:
            return 0.0
        formula = math_text.chemical_formula(gold)
        if formula is not None:
            return float(formula == math_text.chemical_formula(said or sample.response))
        raise RewardError(
            f"answer={answer[:80]!r}: cannot be read to its end as mathematics. Fix: write the final answer alone, "
            r"as LaTeX, a number or words, or put it into \boxed{}"
        )
    found = _read(said) if said is not None else None
    if found is None and math_text.boxed(sample.response) is None:
        found = _in_prose(library, sample.response)
    if found is None:
        return 0.0
    meant = [expected]
    if _is_percent(gold) and not _is_percent(said or ""):
        meant.append(_read(math_text.without_percent(gold)[0]))  # 17.5 for 17.5%: the sign is a unit
    return float(library.verify(meant, [found], allow_set_relation_comp=True, timeout_seconds=None))


def unreadable_answer(prompt: Prompt) -> str | None:
    """Return why `math_verify` cannot compare with a row's answer, whatever the response; None where it can."""
    if not isinstance(prompt, dict) or prompt.get("answer") is None:
        return "no answer"
    for answer in answers_of(Sample(prompt=prompt)):
        if _PLAIN_NUMBER.fullmatch(answer.strip()):
            continue  # most answers are: reading one takes the parser some milliseconds
        try:
            math_verify(Sample(prompt={**prompt, "answer": answer}, response=""))
        except RewardError as error:
            if error.__cause__ is None and importlib.util.find_spec("math_verify") is None:
                raise
            return "answer cannot be read to its end as mathematics"
    return None


set_row_check(math_verify, unreadable_answer)


def _row_answer(text: str) -> str:
    """The row's answer by itself; of prose what it states, else its last formula."""
    inner = math_text.final_answer(text)
    if inner is not None and not math_text.is_prose(math_text.in_latex(inner)):
        return inner
    stated = math_text.stated(text)
    if stated:
        return math_text.final_answer(stated) or math_text.last_formula(stated) or stated
    return math_text.last_formula(text) or text


def _said(response: str) -> str | None:
    """The response's final answer, where it marks or states one, or is one."""
    stated = None if math_text.boxed(response) else math_text.stated(response)
    inner = math_text.final_answer(response if stated is None else stated)
    if inner is None or stated is not None or math_text.boxed(response) or math_text.words_of(inner):
        return inner
    return None if math_text.is_prose(math_text.in_latex(inner)) else inner


def _same_by_text(gold: str, said: str | None) -> bool | None:
    """Compare what is no mathematics: times, numbers with a base, words. None where mathematics must decide."""
    time, based = math_text.time_of(gold), math_text.based_number(gold)
    words = math_text.words_of(gold)
    if time is not None and (time[1] or time[0].endswith(":00")):
        other = math_text.time_of(said or "")
        return other is not None and other[0] == time[0] and (other[1] == time[1] or not other[1] or not time[1])
    if based is not None:
        other = math_text.based_number(said or "")
        plain = (said or "").strip().upper().lstrip("0")
        return other == based if other is not None else plain == based[0]  # the base left out is not another one
    if words is not None:
        same = words == math_text.words_of(said or "")
        return same if same or math_text.is_only_words(gold) else None
    return None


def _is_percent(text: str) -> bool:
    return math_text.without_percent(text)[1]


def _read(text: str) -> Any:
    """What `text` means, read to its end; None for what the parser cannot read so."""
    from latex2sympy2_extended import latex2sympy
    from latex2sympy2_extended.latex2sympy2 import convert_to_pct
    from math_verify.grader import should_treat_as_complex
    from math_verify.parser import LatexExtractionConfig

    latex, percent = math_text.without_percent(math_text.in_latex(text))
    if not latex or math_text.is_prose(latex):
        return None
    settings = LatexExtractionConfig().normalization_config
    try:
        value = latex2sympy(
            latex, is_real=not should_treat_as_complex(latex), convert_degrees=False, normalization_config=settings
        )
        return convert_to_pct(value) if percent else value
    except Exception:  # its parser raises plain Exception, sympy whatever it comes to
        return None


def _in_prose(library: Any, response: str) -> Any:
    """The answer that math-verify finds in a response that marks none. A number that goes on as LaTeX is no answer."""
    latex = library.parse(
        response, [library.LatexExtractionConfig()], parsing_timeout=None, fallback_mode="no_fallback"
    )
    if latex:
        return latex[0]
    if "\\" in response:
        return None
    plain = library.parse(response, parsing_timeout=None, fallback_mode="no_fallback")
    return plain[0] if plain else None
