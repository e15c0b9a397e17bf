"""GSM8K's way to write an answer: its number stands after `####`. Pure."""

import re

GSM8K_ANSWER = re.compile(r"#### (\-?[0-9\.\,]+)")  # nanochat's, and how data sets write it


def gsm8k_number(text: str) -> str | None:
    """Return the number after the first `#### `, without commas and a full stop at its end; None without one."""
    found = GSM8K_ANSWER.search(text)
    return plain_number(found[1]) if found else None


def plain_number(text: str) -> str:
    """Return a number as text without spaces, commas, a dollar sign and a full stop at its end."""
    return text.strip().replace(",", "").replace("$", "").rstrip(".")
