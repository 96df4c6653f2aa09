"""One check for each kind of plain value, with one form of message: `name must be …, not value`."""

from __future__ import annotations

import math
import sys
from collections.abc import Collection
from typing import Any


def integer(name: str, value: Any, low: int, high: int) -> int:
    """`value`, if it is an integer from `low` to `high`. Raises ValueError for anything else, True and 1.0 too."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name} must be an integer from {_bound(low)} to {_bound(high)}, not {_shown(value)}")
    return value


def number(name: str, value: Any, low: float, high: float) -> float:
    """`value`, if it is a finite int or float from `low` to `high`; either bound may be infinite. Raises ValueError."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (good and abs(value) <= sys.float_info.max and low <= value <= high):
        raise ValueError(f"{name} must be a {_range(low, high)}, not {_shown(value)}")
    return value


def boolean(name: str, value: Any) -> bool:
    """`value`, if it is True or False. Raises ValueError for anything else, 0 and 1 too."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, not {_shown(value)}")
    return value


def one_of(name: str, value: Any, choices: Collection[str]) -> str:
    """`value`, if it is one of the strings in `choices`. Raises ValueError that lists them."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {_shown(value)}")
    return value


def _range(low: float, high: float) -> str:
    if math.isinf(low):
        return "finite number" if math.isinf(high) else f"number of at most {high:g}"
    return f"number of at least {low:g}" if math.isinf(high) else f"number from {low:g} to {high:g}"


def _bound(value: int) -> str:
    """A bound for people: 2^31 - 1 instead of 2147483647."""
    for power, rest in ((value, ""), (value + 1, " - 1")):
        if power > 1 << 20 and not power & (power - 1):
            return f"2^{power.bit_length() - 1}{rest}"
    return str(value)


def _shown(value: Any) -> str:
    """A value's repr on one short line, whatever it is."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        return "one of that size"
    return text if len(text) <= 40 else text[:37] + "..."
