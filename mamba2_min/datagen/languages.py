"""Whether a text is in the language that was asked for: a small heuristic, honest about what it is.

A script gives itself away by its letters, and among languages of one script the commonest words do: in running English
four words in ten are among the forty below. It sees that a model fell into another language; it is no judge of style,
cannot tell Norwegian from Danish (neither is offered), and can be wrong about texts of fewer than about twenty words.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

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


def _language(name: str, script: str, common: str = "") -> Language:
    return Language(name, script, frozenset(common.split()))


LANGUAGES: Mapping[str, Language] = {
    "en": _language(
        "English",
        _LATIN,
        "the of and to in is was he she it that for on with his her as had at by not but from they you this have be are"
        " or an were which their been what when there said would one all could out into who them",
    ),
    "de": _language(
        "German",
        _LATIN,
        "der die das und in zu den mit von nicht ein eine ist war er sie es ich auf dem sich des im für als auch an aus"
        " wie nach so nur aber bei einen einer einem hatte noch wenn dass wir ihr ihm haben wird sind über",
    ),
    "fr": _language(
        "French",
        _LATIN,
        "le la les de des du et un une à en dans que qui il elle ne pas ce se sur pour au aux par avec est était son sa"
        " ses plus mais comme on nous vous je lui leur cette ces où sans tout être avait",
    ),
    "es": _language(
        "Spanish",
        _LATIN,
        "el la los las de del y que en un una a no se por con su sus para es era lo al le como más pero sin o ya está"
        " había todo esta este cuando muy también me mi él ella porque desde entre ser",
    ),
    "it": _language(
        "Italian",
        _LATIN,
        "il lo la i gli le di del della e che in un una a non si per con è era da come più ma al alla nel nella dei"
        " delle sono suo sua anche questo quando mi ha aveva se ci dal perché lui lei ho",
    ),
    "pt": _language(
        "Portuguese",
        _LATIN,
        "o a os as de do da dos das e que em um uma no na não se por com para é era ao à como mais mas seu sua ele ela"
        " foi já quando muito também eu me os nos pelo pela sem havia isso está são",
    ),
    "nl": _language(
        "Dutch",
        _LATIN,
        "de het een en van in is was dat niet te zijn op met voor hij zij ze er aan ook als maar om bij uit nog dan die"
        " naar had werd door over zo haar hem ik je wat kan worden geen al heeft",
    ),
    "sv": _language(
        "Swedish",
        _LATIN,
        "och att det i en som på är av för med den till var inte han hon ett om de har hade men sig från så jag vi kan"
        " när skulle där ut efter upp vid sin sitt också över man eller än",
    ),
    "pl": _language(
        "Polish",
        _LATIN,
        "i w na z nie się do to że jest a o jak po co za od był była było dla ale tak już tylko przez ze gdy jej jego"
        " czy który która które ja on ona te ten tym jako przed sobie",
    ),
    "cs": _language(
        "Czech",
        _LATIN,
        "a v se na je že s z do to o k i ve jako za by byl byla bylo ale po od jsem pro tak když jeho její který která"
        " které aby nebo už jen si být ze při jak co není pod",
    ),
    "tr": _language(
        "Turkish",
        _LATIN,
        "ve bir bu da de için ile çok o gibi daha ne kadar ama sonra olarak olan değil var her ki mi en bana onu onun"
        " şey ben sen biz diye hiç iki oldu kendi içinde zaman artık bile",
    ),
    "ru": _language(
        "Russian",
        _CYRILLIC,
        "и в не на я что он с как это она к но по из у за от так же было был была все его её о для мы то вы бы только"
        " когда уже ещё если или ему меня чтобы до они где",
    ),
    "uk": _language(
        "Ukrainian",
        _CYRILLIC,
        "і в не на я що він з як це вона до але по із у за від так же було був була все його її о для ми то ви б тільки"
        " коли вже ще якщо або йому мене щоб та й є вони де",
    ),
    "el": _language("Greek", "\u0370-\u03ff\u1f00-\u1fff"),
    "he": _language("Hebrew", "\u0590-\u05ff"),
    "ar": _language("Arabic", "\u0600-\u06ff\u0750-\u077f\ufb50-\ufdff\ufe70-\ufeff"),
    "hi": _language("Hindi", "\u0900-\u097f"),
    "th": _language("Thai", "\u0e00-\u0e7f"),
    "ko": _language("Korean", "\u1100-\u11ff\u3130-\u318f\uac00-\ud7af"),
    "ja": _language("Japanese", _KANA + _HAN + "ー"),
    "zh": _language("Chinese", _HAN),
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
