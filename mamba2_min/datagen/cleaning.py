"""Cleans a model's answer: removes thoughts, talk about the text, and invisible characters.

A model often says "Sure! Here is a story about a fox:" before the story and "Let me know if you would like another
one!" after it. If half of the documents begin like that, a small model learns to begin like that.
"""

from __future__ import annotations

import re

from mamba2_min.datagen.thoughts import without_thoughts
from mamba2_min.printable import folded, visible

MOST_LAYERS = 20  # a text of nothing but titles is not worth more time

# Delimiters of documents in training, and the turn markers of chat templates that some models let through.
_MARKER = (
    r"<\s{0,3}/?\s{0,3}(?:start|end)\s{0,3}>|<\|[\w ]{1,40}\|?>|<[\w ]{1,40}\|>|</?s>|\[/?INST\]|<</?SYS>>"
    r"|<(?:start|end)_of_turn>|<(?:bos|eos|pad|unk)>|<\|begin▁of▁sentence\|>|<｜[^｜\n]{1,40}｜>"
)
MARKER = re.compile(_MARKER, re.IGNORECASE)
_EDGE = rf"{_MARKER}|</?(?:answer|response|output|final|story)>"
_MARKERS_AT_THE_EDGES = re.compile(rf"\A(?:\s*(?:{_EDGE}))+|(?:(?:{_EDGE})\s*)+\Z", re.IGNORECASE)

_FENCE = re.compile(r"\A```[\w-]*\n(.*)\n```\Z", re.DOTALL)

_OF_THE_TEXT = (
    r"(?:stor(?:y|ies)|tales?|texts?|dialogues?|conversations?|letters?|explanations?|requests?|answers?|versions?"
    r"|poems?|pieces?|responses?|drafts?|examples?|narratives?|attempts?|rewrites?|scenes?|passages?)"
)
_ACKNOWLEDGED = (
    r"(?:sure(?:[ ]thing)?|certainly|absolutely|of[ ]course|gladly|with[ ]pleasure|no[ ]problem|okay|alright|great)"
)
_TALK_BEFORE = re.compile(
    rf"""
      {_ACKNOWLEDGED}[!.,]*[ ]*\n+
    | (?:{_ACKNOWLEDGED}[!.,:—–-]*\s+)?
      (?: (?:here(?:['’]s|[ ]is|[ ]are)|below[ ]is|the[ ]following[ ]is|i(?:['’]ve|[ ]have)[ ]written)
          \b[^\n:]{{0,200}}?\b{_OF_THE_TEXT}\b[^\n:]{{0,200}}(?::\s*|[.!…]*[ ]*\n\s*)
        | (?:here(?:['’]s|[ ]is|[ ]are)|below[ ]is)\b[^\n:]{{0,200}}:[ ]*\n\s*
        | i(?:['’]d|[ ]would)[ ]be[ ](?:happy|glad|delighted)[ ]to\b[^\n]{{0,200}}\n\s*
        | (?:hier[ ]ist|hier[ ]kommt|voici|aquí[ ](?:está|tienes)|ecco|aqui[ ]está)\b[^\n:]{{0,200}}:\s*
      )
    """,
    re.IGNORECASE | re.VERBOSE,
)
_TITLE = re.compile(
    r"""
      \#{1,6}[ ][^\n]{1,150}(?:\n|\Z)
    | (?:\*\*|__)[^*\n]{1,120}(?<!:)(?:\*\*|__)[ ]*(?:\n|\Z)
    | [*_]{0,2}(?:title|titel|titre|título|titolo)[*_]{0,2}[ ]*:[^\n]{1,150}(?:\n|\Z)
    | (?:-{3,}|\*{3,}|_{3,}|={3,})[ ]*(?:\n|\Z)
    """,
    re.IGNORECASE | re.VERBOSE,
)
_TALK_AFTER = re.compile(
    rf"""
    (?:\A|\n)[ ]{{0,8}}(?:
        [*_(\[]{{0,4}}(?:total[ ])?word[ ]count\b[^\n]{{0,60}}
      | [*_(\[]{{0,4}}\d{{2,5}}[ ]words[)\]*_.]{{0,4}}
      | let[ ]me[ ]know[ ]if[ ]you(?:['’]d|[ ]would)?[^\n]{{0,40}}
        \b(?:me[ ]to|{_OF_THE_TEXT}|changes?|adjustments?|else)\b[^\n]*
      | would[ ]you[ ]like[ ]me[ ]to\b[^\n]*
      | i[ ]hope[ ](?:this|you[ ]enjoy(?:ed)?|that)\b[^\n]{{0,60}}
        \b(?:{_OF_THE_TEXT}|helps?|request|needs)\b[^\n]{{0,150}}
      | [*_(\[]{{0,4}}(?:the[ ]end|fin)[.!]?[)\]*_]{{0,4}}
      | -{{3,}} | \*{{3,}} | _{{3,}} | ={{3,}}
    )\Z
    """,
    re.IGNORECASE | re.VERBOSE,
)


def clean(raw: str) -> str:
    """A model's answer without everything that was not asked for; "" if nothing is left."""
    text = visible(folded(without_thoughts(raw))).strip()
    fenced = _FENCE.match(text)
    text = _without_talk(fenced[1] if fenced else text)
    text = "\n".join(map(str.rstrip, text.split("\n")))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def clean_request(raw: str) -> str:
    """The same for a request that a model wrote: a single paragraph, without `Request:` and enclosing quotes."""
    text = re.sub(r"\A[*_]{0,2}(?:request|prompt|instruction)s?[*_]{0,2}\s*:[*_]{0,2}\s*", "", clean(raw), flags=re.I)
    text = " ".join(text.split())
    for left, right in ('""', "“”", "„“", "«»", "''", "``"):
        inner = text[1:-1]
        if len(text) > 2 and text[0] == left and text[-1] == right and left not in inner and right not in inner:
            return inner.strip()
    return text


def _without_talk(text: str) -> str:
    """Talk, titles and markers can come before and after each other: they are removed until none is left."""
    for _ in range(MOST_LAYERS):
        before = text
        text = _MARKERS_AT_THE_EDGES.sub("", text).strip()
        for pattern in (_TALK_BEFORE, _TITLE):
            found = pattern.match(text)
            text = text[found.end() :].lstrip("\n") if found else text
        text = _TALK_AFTER.sub("", text).rstrip()
        if text == before:
            break
    return text
