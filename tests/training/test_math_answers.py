r"""Expected answers in the forms of MATH-like data sets: bare LaTeX, read to its end or refused.

Right values by hand. Each gold is answered in four ways: boxed in `$`, boxed alone, bare, and stated in a sentence.
"""

import pytest

from rollouts.training.rewards import RewardError, math_verify
from rollouts.training.rewards.reward_fn import row_check_of
from rollouts.training.types import Sample

pytest.importorskip("math_verify")


def score(gold: str, response: str) -> float:
    return math_verify(Sample(prompt={"answer": gold}, response=response))


def ways(answer: str) -> list[str]:
    return [
        rf"So it is $\boxed{{{answer}}}$.",
        rf"\boxed{{{answer}}}",
        answer,
        f"The answer is ${answer}$.",
    ]


SAME = [  # the gold, and answers that mean the same
    (r"2\sqrt{3}", [r"2\sqrt{3}", r"\sqrt{12}", r"2\sqrt3"]),
    (r"3\pi", [r"3\pi", "3π"]),
    ("2, 3", ["2, 3", "3,2", r"2 \text{ and } 3", r"\{2, 3\}"]),
    (r"10,\!080", ["10080", "10,080", r"10,\!080", r"10{,}080", r"10\,080", "10 080"]),
    (r"\$5", [r"\$5", "5", "5.00"]),
    (r"\$32,\!348.50", ["32348.5"]),
    (r"\dfrac{3}{4}", [r"\frac34", "0.75", r"\tfrac{3}{4}", "3/4"]),
    (r"-\frac{1}{2}", [r"\frac{-1}{2}", "-0.5", "-1/2", r"-\frac12"]),
    (r"2\frac{1}{3}", [r"\frac{7}{3}", "2 1/3", r"2\frac13"]),
    ("2 1/3", [r"\frac{7}{3}"]),
    (r"-3\frac{1}{2}", ["-3.5", r"-\frac{7}{2}"]),
    (r"0.\overline{3}", [r"\frac13", r"0.\overline{3}"]),
    (r"\frac16", [r"0.1\overline{6}"]),
    ("1.5e3", ["1500", r"1.5 \times 10^3"]),
    ("007", ["7"]),
    (r"[0,1)", [r"\left[0,1\right)"]),
    (r"(-\infty, 2]", [r"(-\infty,2]", r"x \le 2"]),
    (r"(3, \frac{\pi}{2})", [r"\left(3,\frac{\pi}{2}\right)"]),
    (r"\{1,2,3\}", [r"\{3,2,1\}"]),
    (r"\begin{pmatrix} -1 \\ 0 \end{pmatrix}", [r"\begin{bmatrix} -1 \\ 0 \end{bmatrix}"]),
    (r"5\text{ cm}^2", ["5", r"5 \text{ cm}^2", "5 cm"]),
    ("50 km/h", ["50", r"50\text{ km/h}"]),
    ("72 dollars", ["72", r"72\text{ dollars}"]),
    ("12 in", ["12", r"12\text{ in}"]),
    (r"4\pi \text{ cm}", [r"4\pi", r"4\pi\text{ cm}"]),
    (r"18\pi\text{ square inches}", [r"18\pi"]),
    (r"12\%", ["12", r"12\%", "0.12"]),
    (r"33\frac{1}{3}\%", [r"\frac{100}{3}\%"]),
    (r"90^\circ", ["90", "90°", r"90 \text{ degrees}"]),
    (r"30^\circ 15'", [r"30.25^\circ"]),
    (r"1 \pm \sqrt{2}", [r"1+\sqrt{2}, 1-\sqrt{2}"]),
    ("1011_2", ["1011_{2}", "1011"]),
    (r"7:30 \text{ p.m.}", [r"7:30\text{ PM}"]),
    (r"\text{Evelyn}", ["Evelyn", r"\text{Evelyn}"]),
    ("no solution", [r"\text{No solution}"]),
    ("(B)", ["B", r"\text{(B)}"]),
    (r"2\text{ hours and }30\text{ minutes}", ["2 hours and 30 minutes"]),
    ("x=2 or x=3", ["2, 3"]),
    ("Fe_2O_3", ["Fe_2O_3", r"\text{Fe}_2\text{O}_3", r"\mathrm{Fe_{2}O_{3}}", r"\ce{Fe2O3}"]),
    ("Ca(OH)_2", ["Ca(OH)_{2}"]),
]

OTHER = [  # the gold, and what is one part of it, or differs in one
    (r"2\sqrt{3}", ["2", "3", r"3\sqrt{2}"]),
    (r"3\pi", ["3"]),
    ("2, 3", ["3", "2", "2, 4"]),
    (r"10,\!080", ["10", "80", "10,081"]),
    (r"\$32,\!348", ["32", "348"]),
    (r"2\frac{1}{3}", [r"\frac{1}{3}", "2", r"\frac{2}{3}"]),
    ("2 1/3", ["1", "2", "7"]),
    (r"0.\overline{3}", ["0", "0.3"]),
    ("1.5e3", ["1.5", "15"]),
    (r"(-\infty, 2]", ["2", r"(-\infty,2)"]),
    ("(1,2)", ["[1,2]", "(2,1)", "2"]),
    (r"\begin{pmatrix} -1 \\ 0 \end{pmatrix}", ["0", r"\begin{pmatrix} -1 \\ 1 \end{pmatrix}"]),
    (r"1 \pm \sqrt{2}", ["1", r"1+\sqrt{2}"]),
    (r"\pm 3", ["3"]),
    ("1011_2", ["1011_3", "1"]),
    ("2A_{16}", ["2", "A"]),
    (r"7:30 \text{ p.m.}", ["7", r"7:30\text{ a.m.}"]),
    (r"30^\circ 15'", ["45", "30"]),
    (r"2\text{ hours and }30\text{ minutes}", ["2", "30"]),
    (r"1 000 000", ["1", "0"]),
    ("y = 2x+3", ["2", "y = 2x"]),
    ("x=1, y=2", ["x=2, y=1", "1"]),
    (r"\text{June 20}", ["20", r"\text{June 21}"]),
    ("no solution", ["solution"]),
    ("Fe_2O_3", ["FeO", "Fe_3O_2", "2"]),
]


@pytest.mark.parametrize(("gold", "answers"), SAME, ids=[gold for gold, _ in SAME])
def test_what_means_the_same_counts(gold: str, answers: list[str]) -> None:
    """Goal: each is right, however it is presented. Red with the lax reading of a bare gold first: 2 for 2√3."""
    assert {(text, score(gold, text)) for answer in answers for text in ways(answer)} == {
        (text, 1.0) for answer in answers for text in ways(answer)
    }


@pytest.mark.parametrize(("gold", "answers"), OTHER, ids=[gold for gold, _ in OTHER])
def test_a_part_of_the_answer_does_not_count(gold: str, answers: list[str]) -> None:
    """Goal: a number that stands in the gold is not the gold. Red with the lax reading of a bare gold first."""
    assert [
        (text, score(gold, text))
        for answer in answers
        for text in ways(answer)
        if score(gold, text)
    ] == []


@pytest.mark.parametrize("gold", ["3 4", r"12 \\\\%", "<= 5", r"\sqrt{"])
def test_a_gold_that_cannot_be_read_to_its_end_is_refused(gold: str) -> None:
    """Goal: an error that shows the row's answer. Red with 3 4 read as a sum, or as its last number."""
    with pytest.raises(RewardError, match="cannot be read to its end"):
        score(gold, r"$\boxed{4}$")


def test_a_responses_answer_is_read_to_its_end_too() -> None:
    """Goal: what is boxed counts, whole; else what is stated. Red with the first number of 2√3 taken for the answer."""
    assert score("2", r"2\sqrt{3}") == score("2", r"The answer is 2\sqrt{3}") == 0.0
    assert score("2", r"I had 2, and then \boxed{2 \heartsuit}") == 0.0
    assert score(r"2\sqrt{3}", r"The answer is 2\sqrt{3}.") == 1.0
    # nested braces
    assert score(r"\frac{\sqrt{3}}{2}", r"\boxed{\frac{\sqrt{3}}{2}} as \frac{1}{2} is not") == 1.0
    assert score("2,3", r"$\boxed{2}$ and $\boxed{3}$") == 1.0
    assert (
        score("3", r"First $\boxed{2}$. That is even, and we want an odd number: $\boxed{3}$")
        == 1.0
    )
    assert score("Evelyn", "The answer is Evelyn.") == 1.0


def test_a_number_after_a_short_word_is_the_answer() -> None:
    """Goal: English words of two letters are no product of variables. Red with "It is 72" read as I·t·i·s·72."""
    said = ["It is 72", "It's 72.", "So 72", "it is $72$", "There are 72 of them."]
    assert [score("72", text) for text in said] == [1.0] * len(said)
    assert [score("72", text) for text in ("It is 73", "So 7")] == [0.0, 0.0]
    assert score("3/4", "It is 3/4.") == score(r"e^{it}+2", r"\boxed{2+e^{it}}") == 1.0
    with pytest.raises(RewardError, match="cannot be read to its end"):
        score("so 72", r"\boxed{71}")


@pytest.mark.parametrize(
    "gold",
    [
        "The answer is $5$.",
        r"We get $x=5$, so it is $\boxed{5}$.",
        "2+3=<<2+3=5>>5\n#### 5",
        r"\(5\)",
        "$$5$$",
        "$5",
    ],
)
def test_a_gold_within_a_solution(gold: str) -> None:
    """Goal: the answer that a solution marks, or states. Red with the whole solution read as one formula."""
    assert [score(gold, text) for text in ("$5$", "5", "6", r"\boxed{6}", "#### 5")] == [
        1,
        1,
        0,
        0,
        1,
    ]


def test_any_of_several_answers_is_right():
    """Goal: a row's list of accepted answers, as in exact_match. Red: an error for each response."""
    row = {"answer": [r"\frac{1}{2}", "0.25", 3.0]}
    found = [
        math_verify(Sample(prompt=row, response=rf"so $\boxed{{{said}}}$"))
        for said in ("0.5", r"\frac14", "3", "7")
    ]
    assert found == [1.0, 1.0, 1.0, 0.0]


CANNOT_BE_COMPARED = [
    r"\begin{cases} x & x>0 \\ 0 & x \le 0 \end{cases}",
    "3 4",
    "No solutions for n = 3",
    "1, 2, ..., 10",
]


@pytest.mark.parametrize("answer", [*CANNOT_BE_COMPARED, None, [r"\sqrt{", "3 4"]])
def test_a_row_that_no_response_can_answer_is_told_beforehand(answer: object) -> None:
    """Goal: the reward says it of the row alone. Red: it raised at the first response, in the middle of training."""
    check = row_check_of(math_verify)
    assert check is not None and "answer" in (check({"answer": answer}) or "")


def test_rows_that_can_be_answered_are_kept() -> None:
    """Goal: no sound answer is left out, in any form that is scored. Red with words or several answers left out."""
    check = row_check_of(math_verify)
    assert check is not None
    sound = [gold for gold, _ in (*SAME, *OTHER)] + [
        [r"\frac12", "0.5"],
        72.0,
        3,
        "H_2O",
        "Yes",
        r"\{(1,2),(3,4)\}",
    ]
    assert [(gold, check({"answer": gold})) for gold in sound if check({"answer": gold})] == []
