"""The word lists for prompts: text files in `words/`, one item per line, which may be edited.

A model that is asked a hundred times for "a story" writes nearly the same one a hundred times. These lists make a data
set varied: concrete words that must be used, people with a problem of their own, places with weather, and above all
openings, because a model's habits show there first. Equal seeds give equal prompts only as long as the lists stay the
same.
"""

from __future__ import annotations

from functools import cache
from importlib import resources


@cache
def read_list(name: str) -> tuple[str, ...]:
    """The lines of `words/NAME.txt`, such as read_list("openings")."""
    file = resources.files("mamba2_min.datagen").joinpath(f"words/{name}.txt")
    return tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
