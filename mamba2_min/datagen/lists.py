"""The word lists that prompts are drawn from: text files in `words/`, one item a line, to be read, changed, added to.

A model that is asked a hundred times for "a story" writes much the same one a hundred times. What makes a set worth
training on is in these lists: concrete words that have to be used, people with a trouble of their own, places with
weather, and above all openings, since those are where a model falls back on its habits first. Equal seeds give equal
prompts only as long as the lists stay the same.
"""

from __future__ import annotations

from functools import cache
from importlib import resources


@cache
def read_list(name: str) -> tuple[str, ...]:
    """The lines of `words/NAME.txt`, such as read_list("openings")."""
    file = resources.files("mamba2_min.datagen").joinpath(f"words/{name}.txt")
    return tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
