"""Where a text is cut into pieces: one regular expression per pattern, with Python's `re` alone.

    words    chosen for documents in English: don't and O'Brien are one piece, digits go by twos, Han by character
    llama3   the pre-tokenizer of Llama 3, which llama.cpp and Ollama know by name: what it cuts can be exported exactly

Each expression covers every character: the pieces of any text, joined, are the text again. Backtracking is bounded, so
the time is linear in the length of the text.
"""

from __future__ import annotations

import re

# Where accents and vowel signs are characters of their own, which `re` does not count as letters: blocks of them, or of
# letters with them. They belong to the word that they follow.
_MARK = "\u0300-\u036f\u0483-\u0487\u0591-\u05c7\u0610-\u061a\u064b-\u065f"  # Latin to Arabic
_MARK += "\u0900-\u0963\u0971-\u0dff\u0e31-\u0e4e\u200c\u200d"  # South Asia, Thai, the joiners
# Kana and Han stand without spaces: one character is one piece, or each clause would be a word of its own.
_IDEOGRAPH = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_LETTER = rf"[^\W\d_{_IDEOGRAPH}]"

_WORDS = re.compile(
    rf"""
      [ ]?{_LETTER}+(?:['’](?![sS]\b){_LETTER}+|[{_MARK}]+{_LETTER}*)*   # a word; don't and O'Brien are one piece
    | ['’][sS]\b                       # Anna's is " Anna" and "'s", or each name would need a second entry
    | [ ]?\d{{1,2}}                    # digits by twos: 110 pairs and tens spell any number; 1984 is " 19", "84"
    | [ ]?[{_IDEOGRAPH}]
    | [ ]?[!-/:-@\[-`{{-~‘-‟«»–—…]+    # punctuation in runs: ." and ?" are as frequent as words
    | [ ]?\S                           # any other sign alone, such as an emoji
    | \n+                              # a line end, or the empty line between paragraphs
    | [^\S\n]+(?!\S)                   # white space, short of the last space, which belongs to the word after it
    | [^\S\n]+
    """,
    re.VERBOSE,
)

# Unicode's numerals that are no decimal digits (categories Nl and No), which `\d` lacks and `\w` has.
_NUMERALS = """
b2-b3 b9 bc-be 9f4-9f9 b72-b77 bf0-bf2 c78-c7e d58-d5e d70-d78 f2a-f33 1369-137c 16ee-16f0 17f0-17f9 19da 2070 2074-2079
2080-2089 2150-2182 2185-2189 2460-249b 24ea-24ff 2776-2793 2cfd 3007 3021-3029 3038-303a 3192-3195 3220-3229 3248-324f
3251-325f 3280-3289 32b1-32bf a6e6-a6ef a830-a835 10107-10133 10140-10178 1018a-1018b 102e1-102fb 10320-10323 10341
1034a 103d1-103d5 10858-1085f 10879-1087f 108a7-108af 108fb-108ff 10916-1091b 109bc-109bd 109c0-109cf 109d2-109ff
10a40-10a48 10a7d-10a7e 10a9d-10a9f 10aeb-10aef 10b58-10b5f 10b78-10b7f 10ba9-10baf 10cfa-10cff 10e60-10e7e 10f1d-10f26
10f51-10f54 10fc5-10fcb 11052-11065 111e1-111f4 1173a-1173b 118ea-118f2 11c5a-11c6c 11fc0-11fd4 12400-1246e 16b5b-16b61
16e80-16e96 1d2c0-1d2d3 1d2e0-1d2f3 1d360-1d378 1e8c7-1e8cf 1ec71-1ecab 1ecad-1ecaf 1ecb1-1ecb4 1ed01-1ed2d 1ed2f-1ed3d
1f100-1f10c
"""
_NUMERAL = "".join("-".join(chr(int(end, 16)) for end in span.split("-")) for span in _NUMERALS.split())
_ANY_LETTER = rf"[^\W\d_{_NUMERAL}]"  # \p{L}
_SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # Python's \s also has \x1c to \x1f

_LLAMA3 = re.compile(
    rf"""
      '(?:[sStTmMdD]|[rRvV][eE]|[lL][lL])            # don't is "don" and "'t"
    | (?:[ ]|[^\w\r\n]|_)?                           # one sign, mostly the space, and the letters that follow it:
      (?:[A-Za-z]+(?!\w)|{_ANY_LETTER}+)             #   the first form is the fast one, the second has all alphabets
    | [\d{_NUMERAL}]{{1,3}}                          # 1984 is "198", "4"; the space before it stands alone
    | [ ]?(?:[^\w{_SPACE}]|_)+[\r\n]*                # punctuation in runs, with the line ends that follow
    | [{_SPACE}]*[\r\n]+
    | [{_SPACE}]+(?![^{_SPACE}])                     # white space, short of the last, which belongs to what follows
    | [{_SPACE}]+
    """,
    re.VERBOSE,
)

PIECES = {"words": _WORDS.findall, "llama3": _LLAMA3.findall}  # a function from a text to its pieces, per pattern
