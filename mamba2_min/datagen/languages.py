"""Whether a text is in the language that was asked for: a simple heuristic.

Letters determine the script. Among languages that share a script, the most common words decide (`words/common/`): four
in ten words of English text are among its forty most common. The check notices a model that switched to another
language. It does not judge style, cannot tell Norwegian from Danish (neither is offered), and can be wrong about texts
of fewer than about twenty words.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from mamba2_min.datagen.lists import read_list

_LATIN = "A-Za-zªºÀ-ÖØ-öø-ɏḀ-ỿ"
_CYRILLIC = "\u0400-\u052f"
_KANA = "\u3040-\u30ff"
_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"

LETTERS_IN_SCRIPT = 0.8  # of all letters; the rest are names and quotations
KANA_OF_JAPANESE = 0.1  # Japanese without kana is Chinese, and Chinese with kana is Japanese
COMMON_WORDS = 0.1  # of all words; a text with fewer is in no language that has these words


@dataclass(frozen=True)
class Language:
    """Its `name` in English, the character ranges of its `script`, and its commonest words where others share it."""

    name: str
    script: str
    common: frozenset[str] = frozenset()


_LANGUAGES = {
    "en": ("English", _LATIN),
    "de": ("German", _LATIN),
    "fr": ("French", _LATIN),
    "es": ("Spanish", _LATIN),
    "it": ("Italian", _LATIN),
    "pt": ("Portuguese", _LATIN),
    "nl": ("Dutch", _LATIN),
    "sv": ("Swedish", _LATIN),
    "pl": ("Polish", _LATIN),
    "cs": ("Czech", _LATIN),
    "tr": ("Turkish", _LATIN),
    "ru": ("Russian", _CYRILLIC),
    "uk": ("Ukrainian", _CYRILLIC),
    "el": ("Greek", "\u0370-\u03ff\u1f00-\u1fff"),
    "he": ("Hebrew", "\u0590-\u05ff"),
    "ar": ("Arabic", "\u0600-\u06ff\u0750-\u077f\ufb50-\ufdff\ufe70-\ufeff"),
    "hi": ("Hindi", "\u0900-\u097f"),
    "th": ("Thai", "\u0e00-\u0e7f"),
    "ko": ("Korean", "\u1100-\u11ff\u3130-\u318f\uac00-\ud7af"),
    "ja": ("Japanese", _KANA + _HAN + "ー"),
    "zh": ("Chinese", _HAN),
}
_SHARED = (_LATIN, _CYRILLIC)  # scripts of more than one language here

LANGUAGES: Mapping[str, Language] = {
    code: Language(name, script, frozenset(read_list(f"common/{code}") if script in _SHARED else ()))
    for code, (name, script) in _LANGUAGES.items()
}


def is_written_in(text: str, code: str) -> bool:
    """True where `text` looks like the language of `code`, a key of `LANGUAGES`."""
    language = LANGUAGES[code]
    if _share(text, language.script) < LETTERS_IN_SCRIPT:
        return False
    if code == "ja":
        return _share(text, _KANA) >= KANA_OF_JAPANESE
    if not language.common:
        return True
    found = Counter(re.findall(r"[^\W\d_]+", text.casefold()))
    rivals = [rival.common for rival in LANGUAGES.values() if rival.script == language.script]
    own = _common(found, language.common)
    return own >= COMMON_WORDS and own >= max(_common(found, words) for words in rivals)


def _share(text: str, script: str) -> float:
    """Which part of the letters of `text` lie in `script`."""
    letters = "".join(re.findall(r"[^\W\d_]+", text))
    return sum(map(len, re.findall(f"[{script}]+", letters))) / max(len(letters), 1)


def _common(found: Counter[str], common: frozenset[str]) -> float:
    return sum(found[word] for word in common) / max(found.total(), 1)
