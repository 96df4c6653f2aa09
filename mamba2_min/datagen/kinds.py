"""What is asked for: a kind of document, and the prompt of attempt `i`, which depends on (seed, i) and nothing else.

Every list is dealt like a pack of cards: shuffled, dealt out to the last card, shuffled again. So all of a list is used
evenly, nothing comes back before everything has had its turn, and the cards of attempt 4,000 can be told without
dealing the 3,999 before it: neither the number of workers nor the order in which answers arrive changes a prompt.

A kind is its prompts, with `{fields}`, and its lists; a user's own is the same thing in a TOML or JSON file
(docs/data_generator.md describes the format).
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import string
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from mamba2_min.datagen import lists
from mamba2_min.errors import UserError

_ONLY_TEXT = "Write only the text itself: no title, no heading, no preface and no comment."

# Fields of these names may be used in a user's own template without a list of their own.
SHARED_LISTS: Mapping[str, tuple[str, ...]] = {
    "word": lists.WORDS,
    "name": lists.NAMES,
    "theme": lists.THEMES,
    "character": lists.CHARACTERS,
    "place": lists.PLACES,
    "style": lists.STYLES,
    "opening": lists.OPENINGS,
    "ending": lists.ENDINGS,
    "view": lists.VIEWS,
    "length": lists.LENGTHS,
    "subject": lists.SUBJECTS,
    "audience": lists.AUDIENCES,
    "tone": lists.TONES,
}


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

        A kind whose prompts do not speak of a `{subject}` gets a sentence that does.
        """
        prompts = self.prompts
        if not any("{subject}" in prompt for prompt in prompts):
            prompts = tuple(f"{prompt}\n\nIt has to be about this: {{subject}}" for prompt in prompts)
        return replace(self, prompts=prompts, lists={**self.lists, "subject": tuple(topics)})

    def in_language(self, language: str) -> Kind:
        """The same kind, with each prompt asking for a text in `language` (its English name)."""
        asked = f"\n\nWrite it in {language}."
        answer = self.answer and self.answer + asked
        return replace(self, prompts=tuple(prompt + asked for prompt in self.prompts), answer=answer)


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
    (wording,) = _hand(f"{deck}/prompt", kind.prompts, 1, index)
    used = _fields(wording) + _fields(kind.answer or "")
    draw: dict[str, str] = {}
    for name, fields in _by_list(used).items():
        cards = _hand(f"{deck}/{name}", kind.lists[name], len(fields), index)
        draw.update(zip(fields, cards, strict=True))
    answer = kind.answer and kind.answer.format(**draw, request="{request}")
    return Prompt(kind.name, index, wording.format(**draw), draw, answer)


def compose_request(kind: Kind, seed: int, index: int, text: str) -> str:
    """What the model is asked with --with-prompts: the request that `text`, of attempt `index`, answers."""
    (manner,) = _hand(f"{seed}/{kind.name}/request", _REQUEST_MANNERS, 1, index)
    return (
        f"Below, between the lines, stands a text. Write the request that somebody might have sent to get it. {manner} "
        "Say what is wanted and what it is about, without telling how it ends and without quoting it. Write only the "
        f"request, without quotation marks.\n\n----------\n{text}\n----------"
    )


def _hand(deck: str, cards: tuple[str, ...], size: int, index: int) -> tuple[str, ...]:
    """`size` different cards for attempt `index`; a few of a pack may stay undealt, other ones after each shuffle."""
    hands = len(cards) // size
    pack = _shuffled(f"{deck}/{index // hands}", cards)
    start = index % hands * size
    return pack[start : start + size]


@lru_cache(maxsize=64)
def _shuffled(key: str, cards: tuple[str, ...]) -> tuple[str, ...]:
    """The cards in the order of their hashes: the same in every version of Python, which `random.shuffle` is not."""
    return tuple(sorted(cards, key=lambda card: hashlib.blake2b(f"{key}/{card}".encode(), digest_size=8).digest()))


def _fields(wording: str) -> list[str]:
    return [name for _, name, _, _ in string.Formatter().parse(wording) if name is not None]


def _by_list(fields: Sequence[str]) -> dict[str, list[str]]:
    """The fields in the order of their first appearance, grouped by the list that they are dealt from."""
    groups: dict[str, list[str]] = {}
    for name in dict.fromkeys(fields):
        if name != "request":
            groups.setdefault(_list_of(name), []).append(name)
    return groups


def _list_of(name: str) -> str:
    return re.sub(r"_\d+$", "", name)


# --- the built-in kinds ---

STORIES = Kind(
    "stories",
    (
        "Write a short story of about {length} words in which these three words occur: {word}, {word_2}, {word_3}. "
        "The main character is {character}, called {name}. It takes place {place}. At its heart: {theme}. "
        "The manner of telling: {style}. {view} {opening} {ending} " + _ONLY_TEXT,
        "A story, please: {character}, by the name of {name}, {place}. What it is really about is {theme}, though it "
        "must not say so. Use the words {word}, {word_2} and {word_3}. Tell it in about {length} words, {style}. "
        "{opening} {ending} " + _ONLY_TEXT,
        "{opening} That is how your story is to start. It happens {place}; {name} is in it, {character}, and so is "
        "another person, called {name_2}. Between them stands this: {theme}. Somewhere the words {word}, {word_2} and "
        "{word_3} are needed. {view} Keep to about {length} words, {style}. " + _ONLY_TEXT,
    ),
    {
        name: SHARED_LISTS[name]
        for name in ("word", "name", "theme", "character", "place", "style", "opening", "ending", "view", "length")
    },
)

EXPLANATIONS = Kind(
    "explanations",
    (
        "Explain {subject}. The reader is {audience}. Explain it {angle}, in about {length} words of plain prose, "
        "correct in every detail. {opening} Do not announce what you are going to do; do it. " + _ONLY_TEXT,
        "In about {length} words, and {angle}, make this clear to {audience}: {subject}. {opening} No lists, no "
        "headings, no summary at the end; say nothing that is not true. " + _ONLY_TEXT,
    ),
    {
        "subject": lists.SUBJECTS,
        "audience": lists.AUDIENCES,
        "angle": lists.ANGLES,
        "opening": lists.EXPLANATION_OPENINGS,
        "length": lists.LENGTHS,
    },
)

DIALOGUES = Kind(
    "dialogues",
    (
        "Write a conversation between {speakers}, {moment}. Their names are {name} and {name_2}. They talk about "
        "{matter}. {turn} {opening} Use the word {word} in passing. Put each speech on a line of its own, as the "
        "name, a colon and what is said, without stage directions; about {length} words in all. " + _ONLY_TEXT,
        "{name} and {name_2} are {speakers}. They talk, {moment}, and it comes to be about {matter}. Write down what "
        "they say and nothing else, in about {length} words. {opening} {turn} Each speech has a line of its own: the "
        "name, a colon, the words. One of them says the word {word}. " + _ONLY_TEXT,
    ),
    {
        "speakers": lists.SPEAKERS,
        "matter": lists.MATTERS,
        "turn": lists.TURNS,
        "opening": lists.DIALOGUE_OPENINGS,
        "moment": lists.MOMENTS,
        "name": lists.NAMES,
        "word": lists.WORDS,
        "length": lists.LENGTHS,
    },
)

LETTERS = Kind(
    "letters",
    (
        "Write a letter of about {length} words. It is written by {writer}, who signs as {name}, to {recipient}; it "
        "is written {occasion}. The tone: {tone}. These two things come up in it: {detail}, and the word {word}. "
        "{opening} No placeholders in brackets: invent names, dates and places. " + _ONLY_TEXT,
        "{name}, {writer}, writes to {recipient}, {occasion}. Write that letter, {length} words or so, in a tone that "
        "is {tone}. {opening} Work in {detail} and the word {word}. Invent whatever has to be known; leave no gaps "
        "and no brackets to be filled in. " + _ONLY_TEXT,
        "{name}, {writer}, has to write to {office}, {business}. Write the letter that is sent, of about {length} "
        "words, courteous, {tone}, and exact: with names, dates, places and sums that you invent, and no brackets to "
        "be filled in. Somewhere in it: {detail}, and the word {word}. " + _ONLY_TEXT,
    ),
    {
        "writer": lists.WRITERS,
        "recipient": lists.RECIPIENTS,
        "occasion": lists.OCCASIONS,
        "office": lists.OFFICES,
        "business": lists.BUSINESS,
        "tone": lists.TONES,
        "detail": lists.DETAILS,
        "opening": lists.LETTER_OPENINGS,
        "name": lists.NAMES,
        "word": lists.WORDS,
        "length": lists.LENGTHS,
    },
)

INSTRUCTIONS = Kind(
    "instructions",
    (
        "Write one request that {asker} might send to a helpful expert. The subject is {subject}; what is wanted is "
        "{task}. {manner} The request has to be complete in itself: whatever it refers to is in it. Write only the "
        "request, without quotation marks and without an answer.",
        "Somebody ({asker}) wants {task}; it has to do with {subject}. Put that into words as they would write it to "
        "an expert. {manner} Nothing may be missing that is needed to answer. Write the request alone, without "
        "quotation marks, and do not answer it.",
    ),
    {
        "subject": lists.INSTRUCTION_SUBJECTS,
        "task": lists.TASKS,
        "asker": lists.ASKERS,
        "manner": lists.MANNERS,
        "length": lists.LENGTHS,
    },
    answer="{request}\n\n(Answer at once, without a preface and without repeating the question, in at most {length} "
    "words.)",
    min_words=3,  # "What is seven times eight?" has a good answer of one line
)

KINDS: Mapping[str, Kind] = {kind.name: kind for kind in (STORIES, EXPLANATIONS, DIALOGUES, LETTERS, INSTRUCTIONS)}


_REQUEST_MANNERS = (
    "Make it one plain sentence that begins with a verb.",
    "Make it a question.",
    "Make it two sentences, the second of which says in what manner it should be written.",
    "Make it short, ten words at the most.",
    "Make it one sentence that names the people or things in it.",
    "Make it two or three sentences that describe what should happen or be explained.",
    "Make it one sentence that starts with the subject and not with a verb.",
    "Make it a polite wish in one sentence.",
)


# --- the user's own ---


def find_kind(name_or_file: str) -> Kind:
    """The built-in kind of that name, or the one that a .toml or .json file describes. Raises UserError."""
    if name_or_file in KINDS:
        return KINDS[name_or_file]
    path = Path(name_or_file)
    if path.suffix.lower() in (".toml", ".json"):
        return load_template(path)
    raise UserError(
        f"--kind {name_or_file}: neither a kind ({', '.join(KINDS)}) nor a .toml or .json file"
        + _nearest(name_or_file, KINDS)
    )


def load_topics(path: Path) -> tuple[str, ...]:
    """The subjects in a text file, one a line; empty lines and lines that start with `#` do not count."""
    topics = _lines_of(path, "--topics")
    if not topics:
        raise UserError(f"--topics {path}: the file names no subject (one a line is wanted)")
    return topics


def load_template(path: Path) -> Kind:
    """The kind that the file at `path` describes. Raises UserError, in one line, for whatever is wrong with it."""
    table = _parse(path)
    known = {"prompt", "lists", "answer", "min_words", "max_words"}
    for key in table:
        if key not in known:
            hint = _nearest(key, known) or f" (known are {', '.join(sorted(known))})"
            raise UserError(f"{path}: unknown entry {key!r}{hint}")
    prompts = _strings(path, "prompt", table.get("prompt"))
    answer = table.get("answer")
    if answer is not None and (not isinstance(answer, str) or "{request}" not in answer):
        raise UserError(f"{path}: answer has to be a text in which {{request}} occurs")
    own = table.get("lists", {})
    if not isinstance(own, dict):
        raise UserError(f"{path}: lists has to be a table of lists")
    cards = {**SHARED_LISTS, **{name: _cards(path, name, value) for name, value in own.items()}}
    for wording in (*prompts, *filter(None, [answer])):
        _check_fields(path, wording, cards, answer)
    kind = Kind(
        slug(path.stem) or "documents",
        prompts,
        cards,
        answer,
        _bound(path, table, "min_words"),
        _bound(path, table, "max_words"),
    )
    _check_hands(path, kind)
    return kind


def _parse(path: Path) -> dict:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--kind {path}: cannot be read ({_reason(error)})") from error
    try:
        table = json.loads(text) if path.suffix.lower() == ".json" else _parse_toml(path, text)
    except (ValueError, RecursionError) as error:  # both parsers' errors are ValueErrors
        raise UserError(f"{path}: {_reason(error)}") from error
    if not isinstance(table, dict):
        raise UserError(f"{path}: a table with `prompt` and `lists` is wanted")
    return table


def _parse_toml(path: Path, text: str) -> dict:
    try:
        import tomllib
    except ImportError:
        raise UserError(f"{path}: TOML needs Python 3.11; write the same template as a .json file") from None
    return tomllib.loads(text)


def _strings(path: Path, name: str, value: object) -> tuple[str, ...]:
    """`value`, a text or a list of texts, as a tuple without repeats."""
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not values or not all(isinstance(v, str) and v.strip() for v in values):
        raise UserError(f"{path}: {name} has to be a text, or a list of texts, none of them empty")
    return tuple(dict.fromkeys(v.strip() for v in values))


def _cards(path: Path, name: str, value: object) -> tuple[str, ...]:
    """A list of the template: written out, or the name of a file beside the template with one item a line."""
    if name == "request" or not re.fullmatch(r"[a-z](?:[a-z_]*[a-z])?", name):
        raise UserError(f"{path}: a list cannot be called {name!r} (small letters and _, not `request`)")
    if isinstance(value, str):
        cards = _lines_of(path.parent / value, f"{path}: list {name}")
        if not cards:
            raise UserError(f"{path}: list {name}: {value} is empty")
        return cards
    return _strings(path, f"list {name}", value)


def _lines_of(path: Path, where: str) -> tuple[str, ...]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where} {path}: cannot be read ({_reason(error)})") from error
    stripped = (line.strip() for line in lines)
    return tuple(dict.fromkeys(line for line in stripped if line and not line.startswith("#")))


def _check_fields(path: Path, wording: str, cards: Mapping[str, tuple[str, ...]], answer: str | None) -> None:
    try:
        parts = list(string.Formatter().parse(wording))
    except ValueError as error:
        raise UserError(f"{path}: {error} in {wording[:60]!r} (a brace itself is written {{{{ or }}}})") from error
    for _, name, spec, conversion in parts:
        if name is None or (name == "request" and wording is answer):
            continue
        if spec or conversion or _list_of(name) not in cards:
            raise UserError(f"{path}: unknown field {{{name}}}: no list of that name{_nearest(name, cards)}")


def _check_hands(path: Path, kind: Kind) -> None:
    for wording in kind.prompts:
        for name, fields in _by_list(_fields(wording) + _fields(kind.answer or "")).items():
            if len(kind.lists[name]) < len(fields):
                raise UserError(
                    f"{path}: list {name} has {len(kind.lists[name])} items, but a prompt uses {len(fields)} at once"
                )


def _bound(path: Path, table: Mapping, name: str) -> int | None:
    value = table.get(name)
    if value is not None and (type(value) is not int or value < 1):
        raise UserError(f"{path}: {name} has to be a whole number from 1 up")
    return value


def _nearest(name: str, known) -> str:
    close = difflib.get_close_matches(name, list(known), 1, 0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error) or type(error).__name__


def slug(text: str, most: int = 40) -> str:
    """`text` as a piece of a file name: small ASCII letters, digits and single hyphens; "" where nothing is left."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain)[:most].strip("-")
