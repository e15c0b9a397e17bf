r"""The text of a mathematical answer, made plain before it is parsed. Pure; standard library only.

`final_answer` finds the answer in a longer text, `in_latex` writes it as the parser reads it, `words_of` and `time_of`
recognise answers that are not mathematics. Unknown notation stays as it is: the parser refuses it.
"""

import re

from rollouts.training.rewards.math_units import without_unit

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_ENVIRONMENTS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))
_FORMULA = re.compile(
    r"\$\$(.+?)\$\$|(?<!\\)\$(.+?)(?<!\\)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL
)
_ANSWER_IS = re.compile(r"(?:answer|result|solution)\s*(?:is|are|:|=)+\s*:?\s*", re.IGNORECASE)
_TEXT = re.compile(
    r"\\(?:text|mathrm|textbf|mathbf|textit|textrm|textnormal|mbox|operatorname)\s*\{([^{}]*)\}"
)
_SIGNS = str.maketrans(
    {
        "−": "-",
        "–": "-",
        "×": r"\times ",
        "·": r"\cdot ",
        "÷": r"\div ",
        "π": r"\pi ",
        "∞": r"\infty ",
        "°": r"^\circ ",
        "≤": r"\le ",
        "≥": r"\ge ",
        "≠": r"\ne ",
        "±": r"\pm ",
        "∪": r"\cup ",
        "∩": r"\cap ",
        "∈": r"\in ",
        "∅": r"\emptyset ",
        "½": r"\frac{1}{2}",
        "⅓": r"\frac{1}{3}",
        "⅔": r"\frac{2}{3}",
        "¼": r"\frac{1}{4}",
        "¾": r"\frac{3}{4}",
        "²": "^2",
        "³": "^3",
        "\u00a0": " ",
        "\u2009": " ",
    }
)
_NUMBER = r"\d+(?:\.\d+)?"
_SPACE = r"(?:\\[,;:! ]|\\thinspace\s?|~|\s)"  # between groups of three digits
_REWRITES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"√\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"√\s*(\d+|[A-Za-z])", r"\\sqrt{\1}"),
        (r"\\(?:displaystyle|textstyle|limits)\b", ""),
        (r"^(-?)\s*(?:\\(?:\$|pounds|euro)|[$€£¥₹])\s*", r"\1"),
        (r"(?:\\\$|[$€£¥₹])$", ""),
        (r"(\d)\s*\*\*\s*", r"\1^"),
        (r"([A-Za-z)])\*\*\{?(-?\d+)\}?", r"\1^{\2}"),
        (r"(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi "),
        (r"(?<![A-Za-z\\])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (
            r"(?<![A-Za-z\\])(arcsin|arccos|arctan|sin|cos|tan|cot|sec|csc|log|ln|sqrt)(?![A-Za-z])",
            r"\\\1 ",
        ),
        (rf"(?<![\w.])({_NUMBER})[eE]([+-]?\d+)(?!\w)", r"\1 \\times 10^{\2}"),
        # 2 1/3, a mixed number
        (r"(?<![\d/}])(-?)(\d+)\s+(\d+)\s*/\s*(\d+)(?![\d/])", r"\1\2\\frac{\3}{\4}"),
        (r"(?<![\d}])-(\d+)\s*\\[dt]?frac\s*\{(\d+)\}\s*\{(\d+)\}", r"-(\1+\\frac{\2}{\3})"),
        (
            rf"({_NUMBER})\s*\^\s*\{{?\\circ\}}?\s*({_NUMBER})\s*(?:'|\^\{{?\\prime\}}?)$",
            r"(\1+\\frac{\2}{60})",
        ),
        (
            rf"^(-?{_NUMBER})\s*(?:\\[,; ])*(?:\\text\s*\{{)?\s*[A-Za-z]+\s*(?:/|\bper\b)\s*[A-Za-z]+\d?\}}?$",
            r"\1",
        ),  # 5 km/h
        (r"^m?\s*\\angle\s*[A-Z]{1,3}\s*=", ""),
        (r"^\\approx\s*|(?<=\.\d)(\d*)\s*(?:\.\.\.|\\l?dots)$", r"\1"),
        # 7^{th}
        (r"(?<=\d)\s*\^?\s*\{?\s*(?:\\(?:text|mathrm)\s*)?\{?(?:st|nd|rd|th)\}?\s*\}?$", ""),
        (  # the set of x that fulfil a relation
            r"^\\\{\s*([A-Za-z])\s*(?:\\in\s*\\mathbb\s*\{?R\}?\s*)?(?:\\mid|:|\|)\s*(.*\1.*)\\\}$",
            r"\2",
        ),
        (  # "for n in the whole numbers" may be written or understood
            r"(?<=\S)(?:\\[,;: ]|\\q?quad|[\s,(])+(?:\\text\s*\{\s*)?(?:for|where|with|any)?[\s}]*[a-z]\s*\\in\s*"
            r"(?:\\mathbb\s*\{?[ZN]\}?|\\Z)\)?$",
            "",
        ),
        (r"(?<![A-Za-z\\])([A-Za-z])''(?!\w)", r"\1_{dd}"),
        # the parser would pass over it
        (r"(?<![A-Za-z\\])([A-Za-z])(?:'|\^\{?\\prime\}?)(?!\w)", r"\1_{d}"),
        (
            rf"\\(sin|cos|tan|cot|sec|csc)\s*[({{]?({_NUMBER})\s*\^\s*\{{?\\circ\}}?\s*[)}}]?",
            r"\\\1(\\frac{\2\\pi}{180})",
        ),
        (
            rf"^\\(?:text|mbox)\s*\{{\s*(-?{_NUMBER} [A-Za-z ]+)\}}$",
            r"\1",
        ),  # 2 hours, all of it as text
        (r"\\langle\b", "("),
        (r"\\rangle\b", ")"),
    )
)
_SEPARATED_THOUSANDS = re.compile(rf"(?<![\d.])\d{{1,3}}(?:{_SPACE}\d{{3}})+(?!\d)")
_REPEATING = re.compile(r"(\d*)\.(\d*)\\(?:overline|bar|dot)\s*\{?(\d+)\}?")
_PERCENT = re.compile(r"\s*(?:\\?%|\\text\s*\{\s*percent\s*\}|\bpercent\b)\s*$", re.IGNORECASE)
_NUMBER_AND_WORDS = re.compile(
    rf"(-?{_NUMBER}(?:/\d+)?|-?\d{{1,3}}(?:,\d{{3}})+(?:\.\d+)?)\s+(?:[A-Za-z]{{3,}}|in)(?: [A-Za-z]+)*"
)
_HOUR = re.compile(r"(\d{1,2})\s*([ap])\.?\s*m\.?", re.IGNORECASE)
_TIME = re.compile(r"(\d{1,2}):(\d\d)\s*([ap])?\.?\s*(?:m\.?)?", re.IGNORECASE)
# not the "it" of "e^{it}"
_SHORT_WORD = re.compile(r"(?:^|\s)(?:it|it's|is|so|we|he|of)(?=\s)", re.IGNORECASE)
_FORMULA_MARKS = re.compile(r"\\(?:text|mathrm|ce|mbox|rm)\b|\\[,;:! ]|[\s{}_$^]")
_CHEMICAL = re.compile(r"(?:[A-Z][a-z]?\d*|\((?:[A-Z][a-z]?\d*)+\)\d*){2,}(?:\d*[+-])?")
_BASED = re.compile(r"([0-9A-Za-z]+)_\{?(\d{1,2})\}?")
_PREFIXED = re.compile(r"0(?:x(?P<b16>[0-9A-Fa-f]+)|b(?P<b2>[01]+)|o(?P<b8>[0-7]+))")
_CONGRUENT = re.compile(
    r"(?:[A-Za-z]\w*(?:\\equiv|≡|=))?(-?\d+(?:(?:,|or|and)-?\d+)*)(?:\\?[pb]?mod(\d+))?"
)
_NAMES = re.compile(r"[A-Z]{3,}|[IVX]{2,}|[A-Z][a-z]{2,}")


def final_answer(text: str) -> str | None:
    r"""Return the answer that `text` marks as such: the last `\boxed{}`, the text after the last `####`, or all of
    it where it is one formula. Return None for prose, in which an answer must still be found.

    Boxes that follow each other closely ("\boxed{2} and \boxed{3}") are one answer.
    """
    boxes = boxed(text)
    if boxes:
        return boxes
    _, marked, after = text.rpartition("####")
    inner = (after if marked else text).strip()
    for opening, closing in _ENVIRONMENTS:
        body = inner[len(opening) : -len(closing)]
        if inner.startswith(opening) and inner.endswith(closing) and body and not _has_dollar(body):
            return body.strip()
    return None if _has_dollar(inner) or r"\(" in inner or r"\[" in inner else inner


def boxed(text: str) -> str | None:
    """Return the last box's content, with the boxes right before it joined by commas; None without a box."""
    found: list[tuple[int, int, str]] = []  # start, end, content
    for match in _BOX.finditer(text):
        end = _closing_brace(text, match.end())
        if end is not None and not (found and match.start() < found[-1][1]):
            found.append((match.start(), end + 1, text[match.end() : end].strip()))
    if not found:
        return None
    last = [found.pop()]
    while found and re.fullmatch(
        r"[\s$,;.]*(?:\\text\{\s*)?(?:and|or)?[\s},$]*", text[found[-1][1] : last[0][0]]
    ):
        last.insert(0, found.pop())
    return ",".join(dict.fromkeys(content for _, _, content in last))


def stated(text: str) -> str | None:
    """Return the text after the last "answer is" of a prose answer, to the end of its line; None without one."""
    places = list(_ANSWER_IS.finditer(text))
    if not places:
        return None
    line = text[places[-1].end() :].strip().splitlines()[:1]
    return line[0].strip().strip("*").rstrip(".").strip() if line else None


def last_formula(text: str) -> str | None:
    r"""Return the content of the last `$...$`, `\(...\)` or `\[...\]` of `text`; None without one."""
    found = list(_FORMULA.finditer(text))
    return next((group for group in found[-1].groups() if group), None) if found else None


def in_latex(text: str) -> str:
    """Return `text` in the LaTeX that the parser knows: signs, separators, mixed and repeating numbers, currency."""
    text = text.strip().rstrip(".").strip() if not text.strip().endswith("..") else text.strip()
    text = text.translate(_SIGNS).replace("{,}", ",").replace("{:}", ":")
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text.strip())
    text = without_unit(text) if without_percent(text) == (text, False) else text
    text = _SEPARATED_THOUSANDS.sub(lambda match: re.sub(_SPACE, "", match[0]), text)
    text = _REPEATING.sub(_as_fraction, text)
    number = _NUMBER_AND_WORDS.fullmatch(text)
    return number[1] if number and not re.search(r"\d", text[number.end(1) :]) else text


def without_percent(text: str) -> tuple[str, bool]:
    """Return `text` without a percent sign at its end, and whether there was one."""
    shorter = _PERCENT.sub("", text)
    return shorter, shorter != text


def with_sign(latex: str, sign: str) -> str:
    r"""Return `latex` with `sign` for each \pm, and the other one for each \mp."""
    other = {"+": "-", "-": "+"}[sign]
    return re.sub(r"\\mp(?![A-Za-z])", other, re.sub(r"\\pm(?![A-Za-z])", sign, latex))


def words_of(text: str) -> str | None:
    r"""Return an answer of words ("\text{Evelyn}", "(B)", "2 hours and 30 minutes") as it is compared, else None."""
    marked = _TEXT.sub(lambda match: f" {match[1]} ", text)
    words = " ".join(re.sub(r"\\[,;:! ]|[~{}()\[\].,\"'*]", " ", marked).casefold().split())
    only = re.fullmatch(r"[^\W\d_]+(?:[ -][^\W\d_]+)*", words)
    mixed = re.fullmatch(r"\w+(?:[ -]\w+){1,7}", words) and re.search(r"[^\W\d_]{3,}", words)
    return words if only or mixed else None


def is_only_words(text: str) -> bool:
    r"""Return whether an answer of words cannot be mathematics: all of it is marked as text, or it is a phrase."""
    marked = _TEXT.fullmatch(text)
    return bool(
        (marked and not _NUMBER_AND_WORDS.fullmatch(marked[1].strip()))
        or _NAMES.fullmatch(text.strip())
    ) or (
        not re.search(r"\d", text)
        and bool(_TEXT.search(text) or re.search(r"[A-Za-z]{2,}[ -][A-Za-z]{2,}", text))
    )


def is_prose(text: str) -> bool:
    """Return whether `text` mixes words with numbers: a parser would multiply their letters."""
    bare = re.sub(r"\\[A-Za-z]+", " ", _TEXT.sub(" ", text))
    names = {
        "and",
        "or",
        "sin",
        "cos",
        "tan",
        "cot",
        "sec",
        "csc",
        "log",
        "exp",
        "max",
        "min",
        "mod",
        "gcd",
        "lcm",
    }
    names |= {
        "sqrt",
        "arcsin",
        "arccos",
        "arctan",
        "det",
        "infinity",
        "deg",
        "pmatrix",
        "bmatrix",
        "vmatrix",
        "matrix",
    }
    names |= {"array", "cases", "percent", "inf"}
    words = [word for word in re.findall(r"[A-Za-z]{3,}", bare) if word.lower() not in names]
    marked = " ".join(match[1] for match in _TEXT.finditer(text))
    words += [word for word in re.findall(r"[A-Za-z]{2,}", marked) if word.lower() not in names]
    return (
        bool(words or _SHORT_WORD.search(bare)) and bool(re.search(r"\d", text))
    ) or _digits_apart(text)


def time_of(text: str) -> tuple[str, str] | None:
    """Return a time of day as (hours and minutes, "a", "p" or ""); None for anything else."""
    plain = " ".join(
        _TEXT.sub(lambda match: match[1], text).replace("{:}", ":").replace("\\", " ").split()
    )
    hour = _HOUR.fullmatch(plain)
    if hour is not None:
        return f"{int(hour[1])}:00", hour[2].lower()
    match = _TIME.fullmatch(plain)
    return (f"{int(match[1])}:{match[2]}", (match[3] or "").lower()) if match else None


def based_number(text: str) -> tuple[str, str] | None:
    """Return a number with its base, "1011_2", as (digits, base); None for anything else."""
    bare = re.sub(r"[\s$]|\\text|\\mathrm", "", text)
    prefixed = _PREFIXED.fullmatch(bare)
    if prefixed is not None:
        return (prefixed[prefixed.lastindex or 1].upper().lstrip("0") or "0"), (
            prefixed.lastgroup or ""
        ).lstrip("b")
    match = _BASED.fullmatch(bare)
    if match is None or not re.search(r"\d", match[1]):
        return None
    return match[1].upper().lstrip("0") or "0", match[2]


def congruence(text: str) -> tuple[frozenset[int], int | None] | None:
    r"""Return residues with their modulus: "3 \pmod{7}", "x \equiv 1, 3 \pmod 8"; of whole numbers alone with None."""
    bare = re.sub(r"\\(?:text|mathrm|operatorname)\b|\\[,;:! ]|\\q?quad|[\s{}()$~]", "", text)
    match = _CONGRUENT.fullmatch(bare)
    if match is None:
        return None
    numbers, modulus = (
        {int(number) for number in re.findall(r"-?\d+", match[1])},
        int(match[2] or 0),
    )
    return frozenset(number % modulus if modulus else number for number in numbers), modulus or None


def chemical_formula(text: str) -> str | None:
    r"""Return a chemical formula ("Fe_2O_3", "\ce{SO_4^{2-}}") as it is compared; None for anything else."""
    bare = _FORMULA_MARKS.sub("", text)
    return bare if _CHEMICAL.fullmatch(bare) and re.search(r"\d", bare) else None


def _digits_apart(text: str) -> bool:
    """Return whether two numbers are side by side, "3 4": a parser would add or multiply them."""
    return "\\" not in text and bool(re.search(r"\d\s+\d", text))


def _as_fraction(match: re.Match[str]) -> str:
    """Return 15/90 for 0.1\\overline{6}: all digits less those that do not repeat, over as many nines and zeros."""
    whole, fixed, repeated = match.groups()
    numerator = int(f"{whole}{fixed}{repeated}") - int(f"{whole}{fixed}" or "0")
    return rf"\frac{{{numerator}}}{{{'9' * len(repeated)}{'0' * len(fixed)}}}"


def _closing_brace(text: str, start: int) -> int | None:
    depth = 1
    for place in range(start, len(text)):
        if text[place] in "{}" and text[place - 1] != "\\":
            depth += 1 if text[place] == "{" else -1
            if depth == 0:
                return place
    return None


def _has_dollar(text: str) -> bool:
    r"""Return whether `text` has a `$` that opens or closes a formula; "$5" is money."""
    return bool(re.search(r"(?<!\\)\$(?!\d[\d,.]*\s*$)", text))
