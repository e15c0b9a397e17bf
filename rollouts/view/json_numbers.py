"""Which values of a JSON row are numbers to compute with. Standard library only."""

import math


def is_number(value: object) -> bool:
    """Return whether a JSON value is a finite number that a float holds."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False
