"""A kind of documents, and the prompt of attempt `i`, which depends only on (seed, i).

Every list is dealt like a pack of cards: shuffled, dealt to the last card, shuffled again. So each list is used evenly,
nothing repeats before everything was used, and the cards of attempt 4,000 are known without dealing the 3,999 before
it: neither the number of workers nor the order of the answers changes a prompt.

A kind consists of prompts with `{fields}`, and of lists. builtin.py has the built-in kinds; templates.py reads those of
a user.
"""

from __future__ import annotations

import hashlib
import re
import string
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

from mamba2_min.errors import UserError


@dataclass(frozen=True)
class Kind:
    """A kind of document.

    prompts     one or more wordings with `{field}`s; `{word_2}` is one more card from the list `word`
    lists       the cards of each field
    answer      None, or for request-and-answer pairs what the model is sent once it has written the request that
                `prompts` asks for; `{request}` stands for that request
    min_words, max_words    bounds of this kind, or None for the general ones
    """

    name: str
    prompts: tuple[str, ...]
    lists: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    answer: str | None = None
    min_words: int | None = None
    max_words: int | None = None

    def with_topics(self, topics: Sequence[str]) -> Kind:
        """The same kind with every document about one of `topics`: they become the list `subject`.

        Prompts without a `{subject}` get a sentence with one. Raises UserError if a prompt needs more topics at once
        than there are.
        """
        prompts = self.prompts
        if not any("{subject}" in prompt for prompt in prompts):
            prompts = tuple(f"{prompt}\n\nIt has to be about this: {{subject}}" for prompt in prompts)
        kind = replace(self, prompts=prompts, lists={**self.lists, "subject": tuple(topics)})
        kind.check_lists("--topics")
        return kind

    def in_language(self, language: str) -> Kind:
        """The same kind, with each prompt asking for a text in `language` (its English name)."""
        asked = f"\n\nWrite it in {language}."
        answer = self.answer and self.answer + asked
        return replace(self, prompts=tuple(prompt + asked for prompt in self.prompts), answer=answer)

    def check_lists(self, where: str) -> None:
        """Raises UserError, which begins with `where`, if a list has fewer items than a prompt uses at once."""
        for wording in self.prompts:
            for name, fields in fields_by_list(fields_of(wording) + fields_of(self.answer or "")).items():
                there = len(self.lists[name])
                if there < len(fields):
                    raise UserError(f"{where}: list {name} has {there} items, but a prompt uses {len(fields)} at once")


@dataclass(frozen=True)
class Prompt:
    """What attempt `index` sends: `text`, the `draw` that it was made of, and for pairs the wording of the `answer`."""

    kind: str
    index: int
    text: str
    draw: Mapping[str, str]
    answer: str | None


def compose(kind: Kind, seed: int, index: int) -> Prompt:
    """The prompt of attempt `index` >= 0 under `seed`: a function of its arguments, on any machine."""
    deck = f"{seed}/{kind.name}"
    (wording,) = _dealt(f"{deck}/prompt", kind.prompts, 1, index)
    used = fields_of(wording) + fields_of(kind.answer or "")
    draw: dict[str, str] = {}
    for name, fields in fields_by_list(used).items():
        cards = _dealt(f"{deck}/{name}", kind.lists[name], len(fields), index)
        draw.update(zip(fields, cards, strict=True))
    answer = kind.answer and kind.answer.format(**draw, request="{request}")
    return Prompt(kind.name, index, wording.format(**draw), draw, answer)


def compose_request(kind: Kind, seed: int, index: int, text: str) -> str:
    """What the model is asked with --with-prompts: the request that `text`, of attempt `index`, answers."""
    (wording,) = _dealt(f"{seed}/{kind.name}/request", _REQUEST_WORDINGS, 1, index)
    return (
        "Below, between the lines, stands a text. Write the request that somebody might have sent to get it. "
        f"{wording} "
        "Say what is wanted and what it is about, without telling how it ends and without quoting it. Write only the "
        f"request, without quotation marks.\n\n----------\n{text}\n----------"
    )


def _dealt(deck: str, cards: tuple[str, ...], size: int, index: int) -> tuple[str, ...]:
    """`size` different cards for attempt `index`. A few cards of a pack may not be dealt, after each shuffle others."""
    hands = len(cards) // size
    pack = _shuffled(f"{deck}/{index // hands}", cards)
    start = index % hands * size
    return pack[start : start + size]


@lru_cache(maxsize=64)
def _shuffled(key: str, cards: tuple[str, ...]) -> tuple[str, ...]:
    """The cards in the order of their hashes: the same in every version of Python, which `random.shuffle` is not."""
    return tuple(sorted(cards, key=lambda card: hashlib.blake2b(f"{key}/{card}".encode(), digest_size=8).digest()))


def fields_of(wording: str) -> list[str]:
    """The names in braces, in order. Raises ValueError where braces do not match."""
    return [name for _, name, _, _ in string.Formatter().parse(wording) if name is not None]


def fields_by_list(fields: Sequence[str]) -> dict[str, list[str]]:
    """The fields in the order of their first appearance, grouped by the list that they are dealt from."""
    groups: dict[str, list[str]] = {}
    for name in dict.fromkeys(fields):
        if name != "request":
            groups.setdefault(list_of(name), []).append(name)
    return groups


def list_of(field_name: str) -> str:
    """The list that a field is dealt from: `word` for `word`, `word_2`, `word_3`."""
    return re.sub(r"_\d+$", "", field_name)


_REQUEST_WORDINGS = (
    "Make it one plain sentence that begins with a verb.",
    "Make it a question.",
    "Make it two sentences, the second of which says in what manner it should be written.",
    "Make it short, ten words at the most.",
    "Make it one sentence that names the people or things in it.",
    "Make it two or three sentences that describe what should happen or be explained.",
    "Make it one sentence that starts with the subject and not with a verb.",
    "Make it a polite wish in one sentence.",
)


def slug(text: str, most: int = 40) -> str:
    """`text` as a piece of a file name: small ASCII letters, digits and single hyphens; "" where nothing is left."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain)[:most].strip("-")
