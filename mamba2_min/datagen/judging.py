"""Whether a cleaned text is kept, and if not, why: each reason is counted under the words that are used here."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mamba2_min.datagen.cleaning import MARKER
from mamba2_min.datagen.languages import is_written_in
from mamba2_min.datagen.thoughts import THOUGHT_MARK

# Kana, Han, Thai, Lao, Khmer and Burmese are written without spaces: a character there counts as a word.
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+(?:['’\u0300-\u036f\u0900-\u0dff][^\W_{_UNSPACED}]*)*")

# A refusal is searched at the start only, and with its object: "I'm sorry, but I can't go with you" and "I can't
# help smiling" are lines that a story may begin with.
_REFUSAL = re.compile(
    r"""\W* (?:(?:i(?:['’]m|[ ]am)[ ](?:very[ ]|so[ ])?sorry|sorry|i[ ]apologi[sz]e|unfortunately)\b[^.!?\n]{0,40}?)?
    \b i[ ] (?:can(?:['’]t|not|[ ]not) | won['’]t | am[ ](?:not[ ]able|unable)[ ]to | must[ ]decline[ ]to
             | do[ ]not[ ]feel[ ]comfortable | don['’]t[ ]feel[ ]comfortable) [ ]
    (?: (?:assist|fulfil|fulfill|comply|generate|create|provide|produce|engage|writing|creating|generating|providing)\b
      | help(?:[ ]you)?[ ]with[ ](?:that|this|your)\b
      | (?:help|write|continue|discuss|answer)\b[^.!?\n]{0,60}
        \b(?:request|content|topic|stor(?:y|ies)|prompt|material)\b
    )""",
    re.IGNORECASE | re.VERBOSE,
)
_AS_AN_AI = re.compile(
    r"\b(?:as|i(?:['’]m| am)(?: just| only)?) (?:an?|your) (?:AI\b|artificial intelligence\b"
    r"|(?:large |big )?language model\b|virtual assistant\b)"
    r"|\bals (?:ein )?(?:KI-|Sprachmodell)|\ben tant qu['’](?:IA\b|intelligence artificielle)"
    r"|\bcomo (?:una? )?(?:IA\b|modelo de lengua)",
    re.IGNORECASE,
)

LOOP_WORDS, LOOP_SHARE = 50, 0.2


@dataclass(frozen=True)
class Rules:
    """Bounds of a text in words, and the language that it has to be in (a code of `languages.LANGUAGES`, or None)."""

    min_words: int = 20
    max_words: int = 2000
    language: str | None = None


def words(text: str) -> list[str]:
    """The words of `text` in small letters, without punctuation."""
    return _WORD.findall(text.casefold())


def judge(text: str, rules: Rules) -> str | None:
    """None if the cleaned `text` may be kept, otherwise the reason why not."""
    if not text:
        return "empty"
    if _REFUSAL.match(text) or _AS_AN_AI.search(text):
        return "refusal"
    if MARKER.search(text) or THOUGHT_MARK.search(text):
        return "markers in the text"
    if "\ufffd" in text:
        return "broken characters"
    found = words(text)
    if len(found) < rules.min_words:
        return "too short"
    if len(found) > rules.max_words:
        return "too long"
    if _loops(found):
        return "goes round in circles"
    if rules.language and not is_written_in(text, rules.language):
        return "wrong language"
    return None


def _loops(found: list[str]) -> bool:
    """True if the same runs of four words are repeated: each five times on average."""
    runs = list(zip(found, found[1:], found[2:], found[3:], strict=False))
    return len(found) >= LOOP_WORDS and len(set(runs)) < LOOP_SHARE * len(runs)
