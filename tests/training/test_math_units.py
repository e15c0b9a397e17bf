r"""Expected answers with units, congruences, bases, both signs at once: what a person would call right. By hand."""

import pytest

from rollouts.training.rewards import math_answers, math_verify
from rollouts.training.rewards.math_units import units_differ, without_unit
from rollouts.training.rewards.reward_fn import row_check_of
from rollouts.training.types import Sample

pytest.importorskip("math_verify")

SAME = [  # the gold, and answers that mean the same
    ("10^{-3} mol/L", [r"10^{-3}\text{ mol/L}", "0.001", "10^{-3}"]),
    ("π/4 rad", [r"\frac{\pi}{4}"]),
    (r"2\pi radians", [r"2\pi"]),
    (r"6.02\times 10^{23} \text{ mol}^{-1}", [r"6.02\times 10^{23}"]),
    ("3.5 g/cm^3", ["3.5", r"3.5\text{ g/cm}^3"]),
    ("9.8 m/s^2", ["9.8"]),
    ("10 N", ["10"]),
    ("25°C", ["25", r"25^\circ\text{C}"]),
    ("5 km", ["5", "5km", "5 kilometers"]),
    (r"\text{2 hours}", ["2", "2 hours"]),
    ("8\\text{ a.m.}", ["8 am", "8:00 a.m."]),
    (r"x \equiv 3 \pmod{7}", ["3", r"3 \pmod 7", r"10 \bmod 7", r"3\text{ (mod }7)"]),
    (r"x \equiv 1, 3 \pmod 8", [r"3, 1 \pmod{8}"]),
    (
        r"\frac{1\pm\sqrt5}{2}",
        [r"\frac{1+\sqrt{5}}{2}, \frac{1-\sqrt5}{2}", r"\frac{1 \mp \sqrt{5}}{2}"],
    ),
    (r"\pi/2 + 2\pi k, k \in \mathbb{Z}", [r"\frac{\pi}{2}+2k\pi"]),
    (r"\{x \in \mathbb{R} : x > 2\}", ["x>2", r"(2,\infty)"]),
    ("y' = 2y", ["y'=2y"]),
    ("0x1F", ["1F", "1F_{16}"]),
    ("3 sin x", [r"3\sin x"]),
    ("1st", ["1"]),
]
OTHER = [  # the gold, and what differs from it
    ("10^{-3} mol/L", ["10^{-2} mol/L", "10", "-3"]),
    ("5 km", ["5 cm", "5 miles"]),
    ("25°C", ["25°F"]),
    ("90°", ["90 rad"]),
    ("2 hours", ["2 minutes"]),
    ("8 a.m.", ["8 p.m."]),
    ("3ab", ["3"]),
    ("3 sin x", ["3", "x"]),
    (r"3 \pmod{7}", [r"3 \pmod{5}", "4"]),
    (r"x \equiv 1, 3 \pmod 8", [r"1 \pmod{8}"]),
    (r"\frac{1\pm\sqrt5}{2}", [r"\frac{1+\sqrt5}{2}"]),
    ("y' = 2y", ["y=2y"]),
    ("y'' = 2y", ["y'=2y"]),
    ("0x1F", ["0"]),
    ("IV", ["VI"]),
    ("DNE", ["END"]),
]


def score(answer: object, response: str) -> float:
    return math_verify(Sample(prompt={"answer": answer}, response=response))


@pytest.mark.parametrize(("gold", "answers"), SAME, ids=[gold for gold, _ in SAME])
def test_a_unit_left_out_or_a_form_written_otherwise_is_right(
    gold: str, answers: list[str]
) -> None:
    """Goal: the answer with and without its unit, in any usual form. Red with the units of the library's own list: the
    rows were left out as not readable, or the letters of a unit multiplied."""
    assert [(said, score(gold, rf"$\boxed{{{said}}}$")) for said in answers] == [
        (said, 1.0) for said in answers
    ]
    check = row_check_of(math_verify)
    assert check is not None and check({"answer": gold}) is None


@pytest.mark.parametrize(("gold", "answers"), OTHER, ids=[gold for gold, _ in OTHER])
def test_another_unit_or_half_of_the_answer_is_wrong(gold: str, answers: list[str]) -> None:
    """Goal: nothing of the answer is passed over. Red with the library's units ("ab" is one of them), and with
    moduli, primes and known units not compared."""
    assert [(said, score(gold, rf"$\boxed{{{said}}}$")) for said in answers] == [
        (said, 0.0) for said in answers
    ]


def test_what_is_a_unit_and_what_a_variable() -> None:
    """Goal: 3m is a product and 3 m a length. Red with any letter behind a number dropped."""
    kept = ["3m", "5x", "3ab", "2 a b", "4n", "x^2 abc", "3 mod 7", r"3 \sin", "2 or", r"\{1,2\}"]
    assert [text for text in kept if without_unit(text) != text] == []
    dropped = {
        "3 m": "3",
        "5km": "5",
        r"\frac12 \text{ hour}": r"\frac12",
        r"2\pi radians": r"2\pi",
        "5 mol/L": "5",
    }
    assert {text: without_unit(text) for text in dropped} == dropped
    assert units_differ("5 feet", "5 in") and not units_differ("60 mph", "60 miles per hour")
    assert not units_differ("5 cm", r"5\text{ centimeters}") and not units_differ(
        "5 apples", "5 km"
    )


def test_several_answers_of_which_one_cannot_be_read() -> None:
    """Goal: the others are compared, and the odd one as text; none that can be read: left out. Red: the row was."""
    answers = [r"\frac12", "3 4"]
    assert [score(answers, said) for said in ("0.5", "3  4", r"\boxed{3 4}", "7")] == [
        1.0,
        1.0,
        1.0,
        0.0,
    ]
    check = row_check_of(math_verify)
    assert (
        check is not None
        and check({"answer": answers}) is None
        and check({"answer": ["3 4", r"\sqrt{"]})
    )


def test_an_answer_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Goal: a row's answer is parsed once, not for each of its samples, and one of the usual forms not at all before
    training. Red without the cache: 4 times."""
    read: list[str] = []
    parse = math_answers._parse
    monkeypatch.setattr(
        math_answers, "_parse", lambda latex, percent: read.append(latex) or parse(latex, percent)
    )
    gold = r"\frac{17}{x+3}"
    assert math_answers.unreadable_answer({"answer": gold}) is None
    assert [score(gold, "7") for _ in range(3)] == [0.0] * 3
    assert read.count(gold) == 1
    usual = [
        "-12",
        "3.50",
        "1,234,567",
        r"-\frac{3}{41}",
        "3/4",
        r"2\pi",
        r"12\sqrt{31}",
        r"45\%",
        r"30^\circ",
        r"\pi",
    ]
    before = len(read)
    assert [
        gold for gold in usual if math_answers.unreadable_answer({"answer": gold})
    ] == [] and len(read) == before
    assert [gold for gold in usual if score(gold, gold) != 1.0] == []
