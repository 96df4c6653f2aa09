"""What reaches a screen: ordinary writing of every script as it is, and nothing that would change the screen unseen."""

from __future__ import annotations

import random
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mamba2_min.errors import shortened
from mamba2_min.inference.terminal import WrappedText
from mamba2_min.printable import MOST_MARKS, Printer, folded, one_line, printable, visible, without_invisible

ORDINARY = [
    "Plain English, “quotes” — dashes… 1 < 2 & 3 £5 ½ × ≤ \u00a0 \u3000 §",
    "Tiếng Việt: Những ngôn ngữ phức tạp",
    "Ἀρχὴ ἥμισυ παντός ᾧ",
    "Дождь кончился, и й ё",
    "בְּרֵאשִׁ֖ית בָּרָ֣א אֱלֹהִ֑ים",
    "عندما توقّفَ المطرُ ؀١٢ ۝ لا",
    "می\u200cخواهم خانه\u200cها",
    "क्\u200dष र्\u200dय हिन्दी में",
    "র\u200d্য বাংলা",
    "ന്\u200d മലയാളം അവര്\u200d ",
    "ශ්\u200dරී ලංකා",
    "เมื่อฝน\u200bหยุด ชายชรา",
    "ខ្ញុំ\u200bស្រឡាញ់",
    "ကြွေးလျှော့်",
    "བསྒྲུབས རྣྨཾ",
    "ᠮᠣᠩᠭᠣᠯ ᠪᠠᠶᠢᠭ\u180eᠠ ᠭ\u180bᠠ",
    "비가 그치자 노인은",
    "雨がやむと、葛\U000e0100城市 辻\U000e0101さん",
    "雨停了，老人 \U00020bb7",
    "👩\u200d👩\u200d👧 👩🏽\u200d🦰 ❤\ufe0f\u200d🔥 🏳\ufe0f\u200d🌈 1\ufe0f\u20e3 #\ufe0f\u20e3 ☎\ufe0e 🇩🇪 \U0001fae8",
    "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f ‼\ufe0f ↔\ufe0f ©\ufe0f",
    "∩\ufe00 ≨\ufe00",
]


@pytest.mark.parametrize("text", ORDINARY)
@pytest.mark.parametrize("form", ["as it is", "NFC", "NFD"])
def test_ordinary_writing_stays(text, form):
    text = text if form == "as it is" else unicodedata.normalize(form, text)
    assert printable(text) == visible(text) == text


CHANGING = {
    "C0": "\x00\x07\x08\x0b\x0c\x0d\x1b\x7f",
    "C1": "\x85\x90\x9b\x9d",
    "bidi": "\u061c\u200e\u200f\u202a\u202e\u2066\u2069",
    "lines": "\u2028\u2029",
    "zero width": "\u200b\u200c\u200d\u2060\ufeff",
    "invisible operators": "\u2061\u2062\u2063\u2064",
    "deprecated format": "\u206a\u206f\u2065",
    "annotation": "\ufff9\ufffa\ufffb\ufff0",
    "soft hyphen and joiner": "\u00ad\u034f",
    "Hangul blanks": "\u115f\u1160\u3164\uffa0",
    "Khmer": "\u17b4\u17b5",
    "variation selectors": "\ufe00\ufe0f\U000e0100\U000e01ef\u180b",
    "tags": "".join(map(chr, range(0xE0000, 0xE0080))),
    "music and shorthand": "\U0001d173\U0001d17a\U0001bca0",
    "noncharacters": "\ufdd0\ufdef\ufffe\uffff\U0001fffe\U0010ffff\U0002ffff",
    "private use": "\ue000\uf8ff\U000f0000\U00100000",
    "surrogates": "\ud800\udcff\udfff",
    "unassigned": "\u0378\U0001fbff\U000e0fff\U00040000",
}


@pytest.mark.parametrize("name", CHANGING)
def test_what_would_change_a_screen_is_an_escape(name):
    for c in CHANGING[name]:
        for text in (c, f"a{c}b", f"a{c}", f"é{c}{c}{c}é", f"1{c}"):
            shown = printable(text)
            assert c not in shown and c.encode("unicode_escape").decode() in shown, ascii(text)
            assert visible(text, keep="") == text.replace(c, ""), ascii(text)
            shown.encode("utf-8")


def test_every_character_by_its_category():
    """Of planes 0, 1 and 14, each between two letters."""
    hidden, shown = [], []
    for c in map(chr, (*range(0x20000), *range(0xE0000, 0xF0000))):
        category = unicodedata.category(c)
        if category in ("Cc", "Cs", "Co", "Zl", "Zp") or not without_invisible(c):
            hidden.append(c)
        elif category[0] in "LNPSZM":
            shown.append(c)
    text = "x".join(["", *shown, ""])
    assert printable(text) == visible(text) == text
    assert visible("x".join(["", *hidden, ""]), keep="") == "x" * (len(hidden) + 1)
    assert len(hidden) > 75_000 and len(shown) > 60_000


@pytest.mark.parametrize("mark", ["\u0301", "\u0e49", "\u20dd", "\u0300\u0323", "\u11a8", "\u0f71", "\u093e"])
def test_heaps_of_marks_are_cut(mark):
    shown = printable("a" + mark * 400 + "b")
    assert len(shown) == MOST_MARKS + 2 and shown[-1] == "b"
    assert len(printable(mark * 400)) == MOST_MARKS
    printer = Printer()
    assert len("".join(printer.feed(c) for c in "a" + mark * 400)) == MOST_MARKS + 1


def test_what_a_model_writes_piece_by_piece_is_printed_as_a_whole(capsys):
    text = WrappedText()
    for piece in ["a", *["\u0301"] * 400, " 👩", "\u200d", "👩", " ", "b", "\u200d", "b"]:
        text.write(piece)
    text.finish()
    assert capsys.readouterr().out == "a" + "\u0301" * MOST_MARKS + " 👩\u200d👩 b\\u200db"


def test_a_selector_or_joiner_counts_once():
    assert printable("🙂\ufe0f\ufe0f") == "🙂\ufe0f\\ufe0f"
    assert printable("م\u200c\u200cن") == "م\u200c\\u200cن"
    assert printable("\U0001f3f4\U000e0041") == "\U0001f3f4\\U000e0041"


def test_what_is_kept_stays():
    assert printable("a\n\tb\r", keep="\n\t") == "a\n\tb\\r"
    assert printable("\x1b[31m") == "\\x1b[31m"


anything = st.text(st.characters(codec=None), max_size=60) | st.text(
    "a🙂م\u200c\u200d\ufe0f\u0301\u0e33क्\U000e0067\n", max_size=60
)


@given(anything)
def test_again_changes_nothing(text):
    assert printable(printable(text, "\n"), "\n") == printable(text, "\n")
    left = visible(text)
    assert visible(left) == left and printable(left, keep="\n\t") == left


@given(anything, st.randoms())
def test_pieces_are_printed_as_the_whole_is(text, chance: random.Random):
    text = text.replace("\u20e3", "").replace("\U0001f3f4", "")  # keycaps and flags have to arrive in one piece
    printer, pieces, at = Printer("\n"), [], 0
    while at < len(text):
        size = chance.randint(1, 5)
        pieces.append(printer.feed(text[at : at + size]))
        at += size
    assert "".join(pieces) == printable(text, "\n")


def test_common_characters_are_the_same_one_by_one():
    """The short cut for common texts lets nothing through that the rules would not."""
    common = [c for c in map(chr, range(0x20000)) if Printer()._common.fullmatch(c)]
    assert len(common) > 30_000
    for c in common:
        assert unicodedata.category(c)[0] in "LNPSZ" and without_invisible(c) == c, hex(ord(c))


def test_what_a_file_holds():
    assert folded("a\x0cb\x1b[31mc\x9b1md\r\ne\rf\u2028g\x00\ud800\th\x1b]0;title\x07i") == "a\nbcd\ne\nf\ng\ufffd\thi"
    for text in ORDINARY:
        assert folded(text) == text


def test_messages_are_short_and_of_one_line():
    assert one_line("a\n\n b\x1b\u202e\tc") == "a b c"
    assert len(one_line("x" * 10_000_000)) == 200
    assert shortened("short") == "short"
    long = shortened("a" * 5_000_000 + "; name another --out")
    assert len(long) < 2010 and long.endswith("; name another --out")
