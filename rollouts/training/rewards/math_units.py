r"""Units behind a mathematical answer: "10^{-3} mol/L", "\pi/4 rad", "5\text{ cm}^2". Pure; standard library only.

An answer without its unit is the same answer, so `without_unit` drops units before the parser would multiply their
letters. Answers with two known units that differ are different: `units_differ`.
"""

import re

_MARKED = r"\\(?:text|mathrm|mbox|textrm|rm|operatorname)\s*\{\s*(?:per\s+)?[^{}\d]*\}"
_PREFIXED = r"(?:[kcmdnMGh]|\\mu\s*|µ)?(?:m|g|s|L|l|J|N|W|V|Hz|Pa|mol|cal|eV|Wh|bar|rad)"
_SHORT = rf"(?:{_PREFIXED}|sq|cu|in|ft|yd|mi|mph|lbs?|oz|gal|hrs?|h|min|sec|\\Omega|\\?%)"
_NO_UNITS = (
    "and|or|mod|pmod|sin|cos|tan|cot|sec|csc|log|exp|max|min|gcd|lcm|sqrt|arcsin|arccos|arctan|det|infinity|deg|inf|pi|"
    "percent|if|for|where|with|not|to|is|over|times|choose|divided|plus|minus"
)
_WORD = rf"(?!(?:{_NO_UNITS})(?![A-Za-z]))(?:{_SHORT}(?![A-Za-z])|[A-Za-z]{{3,}})"
_POWER = r"(?:\s*\^\s*\{?\s*-?\d\s*\}?)?"
_GAP = r"(?:\\[,;:! ]|\\thinspace\s?|~|\s)"
_BETWEEN = rf"(?:{_GAP}|\\cdot(?![A-Za-z])|\\times(?![A-Za-z])|/|\*|\.)*"
_ONE = rf"(?:(?:\\mu\s*)?{_MARKED}|{_WORD}){_POWER}"
_BEHIND = r"(?:(?<=[\d})!])|(?<=\\pi)|(?<=\\pi ))"  # a value
_TOGETHER = r"(?:[ckm]m|[km]g|m[lL]|ft|lbs?|oz|min|hrs?|mph|rad|Hz|k[JNW]|mol)(?![A-Za-z])"  # 5km; 3m is a product
_AT_END = re.compile(
    rf"{_BEHIND}(?:{_GAP}+(?=[A-Za-z\\])|(?=\\)|(?={_TOGETHER}))(?:/\s*)?{_ONE}(?:{_BETWEEN}{_ONE})*$"
)
_DEGREES = re.compile(
    r"(?:\^\s*\{?\s*\\circ\s*\}?|°)\s*(?:\\(?:text|mathrm)\s*\{\s*)?(?P<scale>[CF])?\s*\}?$"
)
_SYMBOLS = {
    "meter": "m",
    "metre": "m",
    "centimeter": "cm",
    "centimetre": "cm",
    "millimeter": "mm",
    "millimetre": "mm",
    "kilometer": "km",
    "kilometre": "km",
    "inch": "in",
    "inche": "in",
    "foot": "ft",
    "feet": "ft",
    "yard": "yd",
    "mile": "mi",
    "gram": "g",
    "kilogram": "kg",
    "milligram": "mg",
    "pound": "lb",
    "lb": "lb",
    "ounce": "oz",
    "second": "s",
    "sec": "s",
    "minute": "min",
    "hour": "h",
    "hr": "h",
    "liter": "L",
    "litre": "L",
    "l": "L",
    "milliliter": "mL",
    "ml": "mL",
    "gallon": "gal",
    "joule": "J",
    "newton": "N",
    "watt": "W",
    "volt": "V",
    "radian": "rad",
    "degree": "deg",
    "day": "day",
    "week": "week",
    "month": "month",
    "year": "year",
    "cent": "cent",
    "dollar": "dollar",
}


def without_unit(text: str) -> str:
    """Return `text` without the unit, or the counted things ("apples"), after its value."""
    match = _DEGREES.search(text)
    if match is not None and match["scale"]:
        return text[: match.start()].rstrip() + r"^\circ"
    behind = _AT_END.search(text)
    if behind is None:
        return text
    value = text[: behind.start()]
    variables = re.search(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", value))
    return text if variables and not behind[0].lstrip().startswith("\\") else value


def units_differ(one: str, other: str) -> bool:
    """Return whether two answers have known units that differ: 5 km and 5 cm."""
    units = _known_unit(one), _known_unit(other)
    return None not in units and units[0] != units[1]


def _known_unit(text: str) -> str | None:
    """Return the one unit after a value, as its symbol; None for none, several, and an unknown one."""
    text = text.strip().rstrip(".")
    degrees = _DEGREES.search(text)
    if degrees is not None:
        return f"deg{degrees['scale'] or ''}"
    behind = _AT_END.search(text)
    found = (
        re.findall(
            r"\\mu|\\Omega|[A-Za-zµ]+",
            re.sub(r"\\(?:text|mathrm|mbox|textrm|operatorname)\b", "", behind[0]),
        )
        if behind
        else []
    )
    words = [word for word in found if word not in ("square", "cubic", "sq", "cu", "rm", "per")]
    if len(words) != 1:  # none, or one made of several
        return None
    word = words[0]
    named = _SYMBOLS.get(word.lower().removesuffix("s")) if len(word) > 2 else None
    if named is not None:
        return named
    return _SYMBOLS.get(word, word) if re.fullmatch(_SHORT, word) and word != "mph" else None
