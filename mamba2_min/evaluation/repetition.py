"""How much a text repeats itself, in words, so that it does not depend on a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence

LONGEST_PERIOD = 50  # words: a loop of longer phrases than this is not looked for


def distinct(words: Sequence[str], n: int) -> float:
    """The share of the n-grams of `words` that are different; 1 where there is none to repeat."""
    grams = list(zip(*(words[k:] for k in range(n)), strict=False))
    return len(set(grams)) / len(grams) if grams else 1.0


def longest_loop(words: Sequence[str]) -> int:
    """The words of the longest stretch in which a phrase follows itself, all its repetitions counted; 0 for none.

    "a b c b c b d": 5, since "b c b c b" has period 2. A stretch counts from its second whole repetition on.
    """
    longest = 0
    for period in range(1, min(LONGEST_PERIOD, len(words) // 2) + 1):
        run = 0
        for k in range(period, len(words)):
            run = run + 1 if words[k] == words[k - period] else 0
            if run >= period:
                longest = max(longest, run + period)
    return longest
