"""Rewards for mathematics by the library math-verify (extra `math`): answers that mean the same, however written."""

import functools
import re
from dataclasses import replace
from typing import Any

from rollouts.training.rewards import math_text, math_units
from rollouts.training.rewards.reward_fn import RewardError, set_row_check
from rollouts.training.rewards.row_answer import answers_of
from rollouts.training.types import Prompt, Sample

_SURELY_READ = re.compile(  # most answers match: reading one takes the parser some milliseconds
    r"-?(?:\d{1,12}(?:\.\d{1,12})?(?:\\?%|\^\\circ)?|\d{1,3}(?:,\d{3})+|\\[dt]?frac\{[1-9]\d{0,8}\}\{[1-9]\d{0,8}\}"
    r"|[1-9]\d{0,8}/[1-9]\d{0,8}|(?:[1-9]\d{0,8})?(?:\\pi|\\sqrt\{[1-9]\d{0,8}\}))"
)


def math_verify(sample: Sample) -> float:
    r"""Return 1.0 when the response's final answer means the row's, else 0.0.

    Answers are LaTeX, bare or in `\boxed{}` or `$...$`, numbers or words. The row's answer is read to its end or not at
    all, and so is the response's box: no part of either counts for the whole. Short phrases are compared as text.
    Comparing can take long (sympy): run it in `rl.reward.workers`, where `limits.reward_timeout_s` cuts it off. The
    library's alarm is off, since it works in a main thread alone. Raises RewardError for an answer that cannot be read
    to its end, and where the library is not installed.
    """
    golds = answers_of(sample)
    found = [_score(sample, gold) for gold in golds]
    unreadable = [gold for gold, score in zip(golds, found, strict=True) if score is None]
    if len(unreadable) == len(golds):
        raise RewardError(
            f"answer={unreadable[0][:80]!r}: cannot be read to its end as mathematics. Fix: write the final answer "
            r"alone, as LaTeX, a number or words, or put it into \boxed{}"
        )
    scores = zip(golds, found, strict=True)
    return max(
        _same_text(sample.response, gold) if score is None else score for gold, score in scores
    )


def unreadable_answer(prompt: Prompt) -> str | None:
    """Return why `math_verify` cannot compare with a row's answer, whatever the response; None where it can.

    Of several accepted answers one that it can compare with is enough.
    """
    if not isinstance(prompt, dict) or prompt.get("answer") is None:
        return "no answer"
    if any(_can_read(answer) for answer in answers_of(Sample(prompt=prompt))):
        return None
    return "answer cannot be read to its end as mathematics"


def _can_read(answer: str) -> bool:
    if _SURELY_READ.fullmatch(answer.strip()):
        return True
    _library()
    gold = _row_answer(answer)
    return (
        _same_by_text(gold, None) is not None
        or _as_text(gold, "") is not None
        or _read(gold) is not None
    )


def _library() -> Any:
    try:
        import math_verify as library
    except ModuleNotFoundError as error:
        raise RewardError(
            f"math_verify: needs the package math-verify (no module {error.name!r})"
        ) from None
    return library


def _score(sample: Sample, answer: str) -> float | None:
    """Return 1.0 where the response means `answer`, else 0.0; None where `answer` cannot be read to its end."""
    library = _library()
    gold = _row_answer(answer)
    said = _said(sample.response)
    exact = _same_by_text(gold, said)
    if exact is not None:
        return float(exact)
    expected = _read(gold)
    if expected is None:
        same = _as_text(gold, said or sample.response)
        return None if same is None else float(same)
    if math_units.units_differ(gold, said or ""):
        return 0.0
    found = _read(said) if said is not None else None
    if found is None and math_text.boxed(sample.response) is None:
        found = _in_prose(library, sample.response)
    if found is None:
        return 0.0
    meant = [expected]
    if _is_percent(gold) and not _is_percent(said or ""):
        # 17.5 for 17.5%: the sign is a unit
        meant.append(_read(math_text.without_percent(gold)[0]))
    return float(library.verify(meant, [found], allow_set_relation_comp=True, timeout_seconds=None))


def _as_text(gold: str, said: str) -> bool | None:
    """Compare texts that the parser does not read: words among symbols, chemical formulas. None for anything else."""
    if math_text.words_of(gold) is not None:
        return False
    formula = math_text.chemical_formula(gold)
    return None if formula is None else formula == math_text.chemical_formula(said)


def _same_text(response: str, gold: str) -> float:
    """Compare with an answer that cannot be read, beside others that can: 1.0 for the same text, up to spaces."""
    said = _said(response) or response
    return float("".join(said.split()) == "".join(_row_answer(gold).split()))


set_row_check(math_verify, unreadable_answer)


def _row_answer(text: str) -> str:
    """Return the row's answer by itself; for prose the answer that it states, else its last formula."""
    inner = math_text.final_answer(text)
    if inner is not None and not math_text.is_prose(math_text.in_latex(inner)):
        return inner
    stated = math_text.stated(text)
    if stated:
        return math_text.final_answer(stated) or math_text.last_formula(stated) or stated
    return math_text.last_formula(text) or text


def _said(response: str) -> str | None:
    """Return the response's final answer, where it marks or states one, or is one."""
    stated = None if math_text.boxed(response) else math_text.stated(response)
    inner = math_text.final_answer(response if stated is None else stated)
    if (
        inner is None
        or stated is not None
        or math_text.boxed(response)
        or math_text.words_of(inner)
    ):
        return inner
    return None if math_text.is_prose(math_text.in_latex(inner)) else inner


def _same_by_text(gold: str, said: str | None) -> bool | None:
    """Compare answers other than mathematics: times, numbers with a base, words. None where mathematics must decide."""
    time, based, congruent = (
        math_text.time_of(gold),
        math_text.based_number(gold),
        math_text.congruence(gold),
    )
    words = math_text.words_of(gold)
    if time is not None and (time[1] or time[0].endswith(":00")):
        other = math_text.time_of(said or "")
        return (
            other is not None
            and other[0] == time[0]
            and (other[1] == time[1] or not other[1] or not time[1])
        )
    if based is not None:
        other = math_text.based_number(said or "")
        plain = (said or "").strip().upper().lstrip("0")
        # a base that is left out may be the same
        return other == based if other is not None else plain == based[0]
    if congruent is not None and congruent[1] is not None:
        return math_text.congruence(said or "") in (congruent, (congruent[0], None))
    if words is not None:
        same = words == math_text.words_of(said or "")
        return same if same or math_text.is_only_words(gold) else None
    return None


def _is_percent(text: str) -> bool:
    return math_text.without_percent(text)[1]


# a row's answer is compared with each of its samples, in every epoch
@functools.lru_cache(maxsize=4096)
def _read(text: str) -> Any:
    """Return the meaning of `text`, read to its end; None where the parser cannot do so."""
    latex, percent = math_text.without_percent(math_text.in_latex(text))
    if not latex or math_text.is_prose(latex):
        return None
    value = _parse(latex, percent)
    if value is None and re.search(r"\\(?:pm|mp)(?![A-Za-z])", latex):  # within a fraction, say
        import sympy

        both = [_parse(math_text.with_sign(latex, sign), percent) for sign in "+-"]
        value = None if None in both else sympy.FiniteSet(*both)
    return value


def _parse(latex: str, percent: bool) -> Any:
    from latex2sympy2_extended import latex2sympy
    from latex2sympy2_extended.latex2sympy2 import convert_to_pct
    from math_verify.grader import should_treat_as_complex
    from math_verify.parser import LatexExtractionConfig

    # its units contain "ab"
    settings = replace(LatexExtractionConfig().normalization_config, units=False)
    try:
        value = latex2sympy(
            latex,
            is_real=not should_treat_as_complex(latex),
            convert_degrees=False,
            normalization_config=settings,
        )
        return convert_to_pct(value) if percent else value
    except Exception:  # its parser raises plain Exception, sympy many kinds
        return None


def _in_prose(library: Any, response: str) -> Any:
    """Return the answer that math-verify finds in an unmarked response. Numbers that go on as LaTeX do not count."""
    latex = library.parse(
        response,
        [library.LatexExtractionConfig()],
        parsing_timeout=None,
        fallback_mode="no_fallback",
    )
    if latex:
        return latex[0]
    if "\\" in response:
        return None
    plain = library.parse(response, parsing_timeout=None, fallback_mode="no_fallback")
    return plain[0] if plain else None
