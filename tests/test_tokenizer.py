"""The tokenizer: nothing is lost or unknown, no text ends a document, and a bad file is refused in one line."""

import json
import random
import re
import time
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba2_min.data.patterns import _NUMERAL, PIECES
from mamba2_min.data.tokenizer import MAX_WORD_LENGTH, StreamDecoder, WordTokenizer, bytes_outside
from mamba2_min.errors import UserError

DATA = Path(__file__).parents[2] / "shared" / "data"
TEXT = """Anna's cat didn't see the cat. "It's 1984," said the old cat…

The cat slept; the old dog didn't. <start>The end of the day."""
TOK = WordTokenizer.train([TEXT], special_words=["<start>"])
LLAMA3 = WordTokenizer.train([TEXT], special_words=["<start>"], pattern="llama3")
BASE = 1 + 256

AWKWARD = [
    "",
    " ",
    "\0",
    "\n",
    "\r\n\r\n",
    "  the  cat  ",
    " \t \n\n\n\tx\v\f\x1c\x85\u2028\u00a0 ",
    "👍🏽👨‍👩‍👧 ❤️",
    "e\u0301\u0302\u0303 \u0301",
    "שָׁלוֹם עולם \u202eabc\u202c مرحبا بالعالم",
    "नमस्ते दुनिया 我爱你 カタカナ 한국어 ไทย",
    "12 345,678.90 ½ ² ٣ Ⅷ",
    "_a__b_ don't 'quoted' O'Brien’s '' 's S's",
    "<eos> <end> <start> <|endoftext|> <unk> <0x0A>",
    "\ufeff\ufffd\uffff\U0010ffff",
    "".join(map(chr, range(0x250))),
]


def pieces(text, pattern="words"):
    """The text of `text` token by token, in a vocabulary of all of its pieces."""
    tok = WordTokenizer.train([text], pattern=pattern)
    return [tok.decode([i]) for i in tok.encode(text)]


class TestVocabulary:
    def test_layout_eos_bytes_special_words_words_by_frequency_then_alphabet(self):
        tok = WordTokenizer.train(["b b a a c c c d"], special_words=["<start>"])
        assert tok.eos_id == 0
        assert [tok.token_bytes(i) for i in range(1, 257)] == [bytes([i]) for i in range(256)]
        assert tok.special_words == ("<start>",)
        # The first "b" stands without a space, and is a byte already.
        assert tok.words == (" c", " a", " b", " d")
        assert [tok.word(i) for i in range(BASE, len(tok))] == ["<start>", " c", " a", " b", " d"]
        assert tok.encode(" c a") == [BASE + 1, BASE + 2]

    def test_does_not_depend_on_the_order_of_the_texts(self):
        texts = ["one two three", "two three four", "five six"]
        assert WordTokenizer.train(texts).digest() == WordTokenizer.train(reversed(texts)).digest()

    def test_vocab_size_bounds_the_whole(self):
        for size in (BASE, BASE + 1, BASE + 4):
            assert len(WordTokenizer.train([TEXT], vocab_size=size)) == size
        assert len(WordTokenizer.train([TEXT], vocab_size=10**6)) == len(WordTokenizer.train([TEXT]))
        assert WordTokenizer.train([TEXT], vocab_size=BASE + 1).words == (" cat",)

    def test_vocab_size_too_small_says_the_arithmetic(self):
        with pytest.raises(UserError, match=r"of 257 is too small: .* \+ 256 bytes \+ 1 special word = 258"):
            WordTokenizer.train([TEXT], vocab_size=257, special_words=["<start>"])
        with pytest.raises(UserError, match="2"):
            WordTokenizer.train([TEXT], vocab_size=1, pattern="whitespace")

    def test_min_count(self):
        assert WordTokenizer.train([" a a a b b c"], min_count=2).words == (" a", " b")

    @pytest.mark.parametrize(
        "arguments",
        [
            {"pattern": "letters"},
            {"min_count": 0},
            {"min_count": 1.5},
            {"vocab_size": "300"},
            {"vocab_size": True},
            {"special_words": [""]},
            {"special_words": ["<a>", "<a>"]},
            {"special_words": ["\ud800"]},
            {"special_words": [1]},
            {"special_words": ["<a>"], "pattern": "whitespace"},
            {"texts": "one string"},
            {"texts": ["fine", "bad \udfff"]},
        ],
    )
    def test_bad_arguments(self, arguments):
        with pytest.raises(ValueError):
            WordTokenizer.train(**{"texts": ["a b"], **arguments})

    def test_no_texts_and_empty_texts(self):
        assert len(WordTokenizer.train([])) == len(WordTokenizer.train([""])) == BASE
        assert WordTokenizer.train([]).decode(WordTokenizer.train([]).encode("héllo")) == "héllo"

    def test_an_endless_word_is_no_word(self):
        long = "x" * (MAX_WORD_LENGTH + 1)
        for pattern in ("words", "whitespace"):
            assert long not in WordTokenizer.train([long, " fine fine"], pattern=pattern).words

    def test_word_is_a_name_to_show(self):
        assert [TOK.word(i) for i in (0, 1 + 0x0A, 1 + 0x20, 1 + ord("x"), 1 + 0xFF, BASE)] == [
            "<eos>",
            "<0x0A>",
            "<0x20>",
            "x",
            "<0xFF>",
            "<start>",
        ]

    def test_digest_tells_vocabularies_apart(self):
        digests = {
            WordTokenizer.train([" a b"]).digest(),
            WordTokenizer.train([" a c"]).digest(),
            WordTokenizer.train([" a b"], special_words=["<s>"]).digest(),
            WordTokenizer.train([" a b"], pattern="whitespace").digest(),
            WordTokenizer([" b", " a"]).digest(),
        }
        assert len(digests) == 5
        assert WordTokenizer.train([" a b"]).digest() == WordTokenizer([" a", " b"]).digest()


class TestPieces:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("The old cat", ["The", " old", " cat"]),
            ("I don't. I don’t.", ["I", " don't", ".", " I", " don’t", "."]),
            ("Anna's cat, THE DOG'S", ["Anna", "'s", " cat", ",", " THE", " DOG", "'S"]),
            ("O'Brien rock'n'roll", ["O'Brien", " rock'n'roll"]),
            ("in 1984, 10,500", ["in", " 19", "84", ",", " 10", ",", "50", "0"]),
            ('said. "Oh?" "…"', ["said", ".", ' "', "Oh", '?"', ' "…"']),
            ("a\n\nb\n", ["a", "\n\n", "b", "\n"]),
            ("a   b\t\tc", ["a", "  ", " b", "\t", "\t", "c"]),
            ("été e\u0301te\u0301", ["été", " e\u0301te\u0301"]),
            ("नमस्ते दुनिया", ["नमस्ते", " दुनिया"]),
            ("我爱 hello", ["我", "爱", " hello"]),
            ("ok 😀😀", ["ok", " 😀", "😀"]),
            ("snake_case", ["snake", "_", "case"]),
        ],
    )
    def test_where_the_text_is_cut(self, text, expected):
        assert pieces(text) == expected

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("The old cat", ["The", " old", " cat"]),
            ("I don't. I'LL; I'VE 'so", ["I", " don", "'t", ".", " I", "'LL", ";", " I", "'VE", " '", "so"]),
            ("I don’t Kſ 'ſ", ["I", " don", "’t", " Kſ", " '", "ſ"]),  # only ASCII letters make a contraction
            ("in 1984, 10,500Ⅷ½", ["in", " ", "198", "4", ",", " ", "10", ",", "500", "Ⅷ½"]),
            ('said. "Oh?"\n\n\tWhy', ["said", ".", ' "', "Oh", '?"\n\n', "\tWhy"]),
            ("a \n \r\n  b   c", ["a", " \n \r\n", " ", " b", "  ", " c"]),
            ("e\u0301te\u0301", ["e", "\u0301te", "\u0301"]),
            ("_a_ b\u200c", ["_a", "_", " b", "\u200c"]),
            ("我爱你。你好 hello", ["我爱你", "。你好", " hello"]),
            ("\x1c\x1d a\x1fb", ["\x1c\x1d", " a", "\x1fb"]),  # what Python alone takes for white space
            ("ok 😀😀 ", ["ok", " 😀😀", " "]),
        ],
    )
    def test_where_llama_3_cuts(self, text, expected):
        assert pieces(text, "llama3") == expected

    def test_numerals_that_are_no_digits_are_those_of_unicode(self):
        numerals = {chr(c) for c in range(0x110000) if unicodedata.category(chr(c)) in ("Nl", "No")}
        known = {*re.findall(f"[{_NUMERAL}]", "".join(map(chr, range(0x110000))))}
        assert numerals <= known and {unicodedata.category(c) for c in known - numerals} <= {"Cn"}

    def test_llama_3_cuts_by_the_categories_of_unicode(self):
        """A reference of its own: the rules read from left to right over the categories of each character."""
        draw = random.Random(0)
        assigned = [chr(c) for c in range(0x110000) if unicodedata.category(chr(c)) not in ("Cn", "Cs")]
        for _ in range(3000):
            few = draw.sample(assigned, 8)
            text = "".join(draw.choices([*few, *" \n\r\t'.aSt1_"], k=30))
            assert PIECES["llama3"](text) == llama3_by_hand(text)

    def test_an_unknown_piece_becomes_its_bytes(self):
        assert TOK.encode(" zoé") == [byte + 1 for byte in " zoé".encode()]
        assert TOK.encode(" cat zoo cat")[0] == TOK.encode(" cat zoo cat")[-1] == TOK.encode(" cat")[0]


def llama3_by_hand(text):
    """Where Llama 3's rules cut a text, by Unicode's categories instead of a regular expression."""

    def kind(i):
        if i >= len(text):
            return None
        c, category = text[i], unicodedata.category(text[i])
        if category[0] in "LN":
            return category[0]
        return "S" if c.isspace() and c not in "\x1c\x1d\x1e\x1f" else "P"

    def run(i, wanted):
        while i < len(text) and wanted(i):
            i += 1
        return i

    found, i = [], 0
    while i < len(text):
        if text[i] == "'" and text[i + 1 : i + 2].lower() in ("s", "t", "m", "d") and text[i + 1].isascii():
            end = i + 2
        elif text[i] == "'" and text[i + 1 : i + 3].lower() in ("re", "ve", "ll"):
            end = i + 3
        elif kind(i) == "L" or (kind(i + 1) == "L" and kind(i) != "N" and text[i] not in "\r\n"):
            end = run(i + 1, lambda k: kind(k) == "L")
        elif kind(i) == "N":
            end = min(run(i, lambda k: kind(k) == "N"), i + 3)
        elif kind(i) == "P" or (text[i] == " " and kind(i + 1) == "P"):
            end = run(run(i + 1, lambda k: kind(k) == "P"), lambda k: text[k] in "\r\n")
        else:
            end = run(i, lambda k: kind(k) == "S")
            line_ends = [k for k in range(i, end) if text[k] in "\r\n"]
            if line_ends:
                end = line_ends[-1] + 1
            elif end < len(text) and end > i + 1:
                end -= 1
        found.append(text[i:end])
        i = end
    return found


class TestCharacters:
    """The pattern "llama3" spells an unknown piece by its characters."""

    TOK = WordTokenizer(["我", "ไ", "é", "😀", " cat"], pattern="llama3")

    def test_a_character_that_is_a_word_is_one_token(self):
        first = BASE + 0  # no special words
        assert self.TOK.encode("我我") == [first, first]
        assert self.TOK.encode("xé😀 cat") == [1 + ord("x"), first + 2, first + 3, first + 4]

    def test_another_is_the_beginning_that_it_shares_and_its_bytes(self):
        beginnings = {b"\xe6\x88": 0, b"\xe0\xb9": 1, b"\xf0\x9f": 2, b"\xf0\x9f\x98": 3}
        ids = {data: BASE + 5 + i for data, i in beginnings.items()}
        assert len(self.TOK) == BASE + 5 + 4
        assert [self.TOK.token_bytes(i) for i in ids.values()] == list(ids)
        assert self.TOK.encode("戒") == [ids[b"\xe6\x88"], 1 + 0x92]
        assert self.TOK.encode("😁") == [ids[b"\xf0\x9f\x98"], 1 + 0x81]
        assert self.TOK.encode("🙀") == [ids[b"\xf0\x9f"], 1 + 0x99, 1 + 0x80]
        assert self.TOK.encode("è你") == [1 + b for b in "è你".encode()]
        assert self.TOK.word(ids[b"\xe6\x88"]) == "<0xE6><0x88>"

    def test_a_character_that_is_a_token_is_inside_the_vocabulary(self):
        outside = {"我": 0, "我我": 0, " cat": 0, "x": 0, ".": 0, "dog": 3, " dog": 4, "我戒": 3, "è": 2, "xé": 1}
        assert {piece: bytes_outside(self.TOK, piece) for piece in outside} == outside
        special = WordTokenizer([" cat"], ["<start>"], "words")
        assert [bytes_outside(special, piece) for piece in ("<start>", " cat", " cats", "é")] == [0, 0, 5, 2]
        plain = WordTokenizer(["cat"], pattern="whitespace")
        assert [bytes_outside(plain, piece) for piece in ("cat", "dog", "\n")] == [0, 3, 0]

    def test_a_stream_waits_for_the_rest_of_a_beginning(self):
        stream = StreamDecoder(self.TOK)
        assert [stream.feed(i) for i in self.TOK.encode("戒😁")] == ["", "戒", "", "😁"]

    def test_training_keeps_the_characters_of_what_is_rare(self):
        texts = ["我爱你。", "你爱我。", "他不爱我。", "สวัสดีครับ", "ครับผม"]
        tok = WordTokenizer.train(texts, min_count=2, pattern="llama3")
        assert {"我", "爱", "你", "。", "ร"} & {*tok.words} == {"我", "爱", "你", "ร"} | ({"。"} & {*tok.words})
        for text in (*texts, "爱他我们", "กรุงเทพฯ"):
            assert tok.decode(tok.encode(text)) == text
        old = WordTokenizer.train(texts, min_count=2)
        assert len(tok.encode("ครับผม")) < len(old.encode("ครับผม")) / 2

    def test_vocab_size_bounds_the_beginnings_too(self):
        texts = ["我爱你 cat cat dog 我爱他 我们 你们"]
        for size in range(BASE, BASE + 30):
            tok = WordTokenizer.train(texts, vocab_size=size, pattern="llama3")
            assert len(tok) <= size
            assert tok.decode(tok.encode(texts[0])) == texts[0]

    def test_old_vocabularies_keep_their_ids(self):
        tok = WordTokenizer(["我", "é", " cat"], pattern="words")
        assert tok.encode("xé") == [1 + byte for byte in "xé".encode()]
        assert len(tok) == BASE + 3


class TestPrompt:
    """What a person types is folded to the spelling that the vocabulary knows, if exactly one is."""

    CURLY = "“Don’t,” said Anna’s cat… It’s the café — the best ‘cat’ café."
    STRAIGHT = "\"Don't,\" said Anna's cat... It's the café -- the best 'cat' café."

    @pytest.mark.parametrize("pattern", ["words", "llama3"])
    @pytest.mark.parametrize("decompose", [False, True])
    def test_either_spelling_gives_the_same_ids(self, pattern, decompose):
        form = "NFD" if decompose else "NFC"
        for known, typed in ((self.CURLY, self.STRAIGHT), (self.STRAIGHT, self.CURLY)):
            known = unicodedata.normalize(form, known)
            typed = unicodedata.normalize("NFC" if decompose else "NFD", typed)
            tok = WordTokenizer.train([known], pattern=pattern)
            assert tok.encode_prompt(typed) == tok.encode(known)
            assert tok.encode_prompt(known) == tok.encode(known)
            assert tok.decode(tok.encode(typed)) == typed  # documents are as they are

    @pytest.mark.parametrize("pattern", ["words", "llama3"])
    def test_what_is_known_as_typed_stays(self, pattern):
        tok = WordTokenizer.train([self.CURLY, self.STRAIGHT], pattern=pattern)
        for text in (self.CURLY, self.STRAIGHT):
            assert tok.encode_prompt(text) == tok.encode(text)

    @pytest.mark.parametrize("pattern", ["words", "llama3"])
    def test_nothing_is_folded_where_no_spelling_is_known(self, pattern):
        tok = WordTokenizer.train(["nothing of the kind"], pattern=pattern)
        for text in (self.CURLY, "naïve", "'", '"', "--", "   ", ""):
            assert tok.encode_prompt(text) == tok.encode(text)

    def test_two_known_spellings_are_no_reason_to_choose(self):
        one, other = (unicodedata.normalize(form, " d’été") for form in ("NFC", "NFD"))
        typed = " d'été"
        assert WordTokenizer([one]).encode_prompt(typed) == WordTokenizer([other]).encode_prompt(typed) == [BASE]
        tok = WordTokenizer([one, other])
        assert tok.encode_prompt(typed) == tok.encode(typed)

    def test_an_unknown_word_keeps_its_letters_and_gets_the_known_quote(self):
        tok = WordTokenizer.train(["Anna’s cat, Anna’s dog"], pattern="llama3")
        assert tok.decode(tok.encode_prompt("Zoltan's cat")) == "Zoltan’s cat"

    @pytest.mark.parametrize("quote", "'’‘`´ʼ′")
    def test_what_keyboards_have_for_an_apostrophe(self, quote):
        for known in "'’":
            tok = WordTokenizer.train([f"don{known}t, don{known}t"], pattern="llama3")
            assert tok.decode(tok.encode_prompt(f"don{quote}t")) == f"don{known}t"
        tok = WordTokenizer.train(["“why”, “why”"], pattern="llama3")
        assert tok.decode(tok.encode_prompt("„why“")) == "“why”"

    def test_special_words_are_meant(self):
        tok = WordTokenizer.train(["It’s<start>a"], special_words=["<start>"], pattern="llama3")
        assert tok.encode_prompt("It's<start>a") == tok.encode("It’s<start>a", allow_special=True)
        tok = WordTokenizer.train(["It’s"], special_words=["'s"], pattern="llama3")
        assert tok.decode(tok.encode_prompt("It's")) == "It's"

    def test_whitespace_has_no_spellings(self):
        tok = WordTokenizer.train(["don’t"], pattern="whitespace")
        assert tok.encode_prompt("don't") == tok.encode("don't")

    def test_a_lone_surrogate(self):
        with pytest.raises(ValueError, match="lone surrogate"):
            TOK.encode_prompt("a \ud800")

    @settings(max_examples=150, deadline=None)
    @given(st.text(st.sampled_from("aé\u0301'’‘\"“”.…-— \n"), max_size=20))
    def test_any_text_is_folded_to_one_of_its_spellings(self, text):
        tok = WordTokenizer.train(["a’a “a” a… a—a é"], pattern="llama3")
        folded = tok.decode(tok.encode_prompt(text))
        same = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "…": "...", "—": "--"})
        one, other = (unicodedata.normalize("NFC", spelling.translate(same)) for spelling in (folded, text))
        assert one == other


class TestLossless:
    @pytest.mark.parametrize("text", AWKWARD)
    def test_awkward_texts(self, text):
        specials = {"special_words": ["<start>"]}
        own = [WordTokenizer.train([text], pattern=pattern, **specials) for pattern in ("words", "llama3")]
        for tok in (TOK, LLAMA3, *own, WordTokenizer.train([])):
            for allow_special in (False, True):
                ids = tok.encode(text, allow_special)
                assert tok.decode(ids) == text
                assert tok.decode_bytes(ids) == text.encode()
                assert tok.eos_id not in ids
                assert all(0 < i < len(tok) for i in ids)

    @settings(max_examples=150, deadline=None)
    @given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
    def test_any_text(self, text):
        for tok in (TOK, LLAMA3, TestCharacters.TOK):
            assert tok.decode(tok.encode(text)) == text

    @settings(max_examples=150, deadline=None)
    @given(st.lists(st.sampled_from([*" \n\t'’s.1_éx\u0301😀我ि<", " cat", "<start>"]), max_size=25))
    def test_any_mixture_in_a_vocabulary_of_its_own(self, parts):
        text = "".join(parts)
        for pattern in ("words", "llama3"):
            tok = WordTokenizer.train([text], special_words=["<start>"], pattern=pattern)
            assert tok.decode(tok.encode(text, allow_special=True)) == text
            assert "".join(pieces(text, pattern)) == text

    def test_a_lone_surrogate_is_an_error_that_says_where(self):
        for pattern in ("words", "whitespace"):
            tok = WordTokenizer.train(["a b"], pattern=pattern)
            with pytest.raises(ValueError, match=r"character 3 is the lone surrogate U\+D83D"):
                tok.encode("ab \ud83d c")

    def test_time_is_linear(self):
        n = 300_000
        for text in ("a" * n, "\0" * n, " " * n + "x", "a'" * (n // 2), "a" + "\u0301" * n, "the cat " * (n // 8)):
            for tok in (TOK, LLAMA3):
                start = time.perf_counter()
                ids = tok.encode(text)
                assert time.perf_counter() - start < 10  # about a second on an idle machine; a square would take hours
                assert tok.decode_bytes(ids) == text.encode()


class TestDecode:
    def test_special_words_are_written_and_the_end_is_not(self):
        ids = [TOK.eos_id, *TOK.encode("<start>The", allow_special=True), TOK.eos_id]
        assert ids[1] == BASE
        assert TOK.decode(ids) == "<start>The"

    def test_bytes_that_are_no_utf8_become_replacement_characters(self):
        assert TOK.decode([1 + 0xFF]) == "\ufffd"
        assert TOK.decode([1 + 0xE2, 1 + 0x82]) == "\ufffd"
        assert TOK.decode([1 + 0xE2, *TOK.encode(" cat")]) == "\ufffd cat"

    @pytest.mark.parametrize("bad", [-1, len(TOK), 10**20])
    def test_an_id_outside_the_vocabulary_is_an_error(self, bad):
        for call in (TOK.decode, TOK.decode_bytes, StreamDecoder(TOK).feed):
            with pytest.raises(ValueError, match="outside the vocabulary"):
                call([1, bad])
        with pytest.raises(ValueError):
            TOK.word(bad)

    @settings(max_examples=150, deadline=None)
    @given(st.lists(st.integers(0, len(TOK) - 1) | st.sampled_from([1 + b for b in "é…😀".encode()]), max_size=30))
    def test_a_stream_is_the_whole(self, ids):
        stream = StreamDecoder(TOK)
        assert "".join([stream.feed(i) for i in ids]) + stream.flush() == TOK.decode(ids)

    def test_a_stream_gives_a_character_when_it_is_complete(self):
        stream = StreamDecoder(TOK)
        assert [stream.feed(byte + 1) for byte in "é😀".encode()] == ["", "é", "", "", "", "😀"]
        assert stream.feed([1 + 0xF0, 1 + 0x9F]) == ""
        assert stream.flush() == "\ufffd"
        assert stream.feed(TOK.encode(" cat")) == " cat"  # and can be used on


class TestSpecialWords:
    def test_only_where_the_caller_allows_it(self):
        assert BASE not in TOK.encode("<start>")
        assert TOK.encode("<start>", allow_special=True) == [BASE]
        text = "the cat<start>The cat<start><start>"
        assert TOK.encode(text, allow_special=True).count(BASE) == 3

    @pytest.mark.parametrize("typed", ["<eos>", "<end>", "<|endoftext|>", "<unk>", "<0x00>", "\0", "</s>"])
    def test_nothing_typed_ends_a_document(self, typed):
        tok = WordTokenizer.train([f"a {typed} b {typed}"], special_words=["<end>", "<eos>"])
        for allow_special in (False, True):
            assert tok.eos_id not in tok.encode(f"x {typed} {typed}y", allow_special)

    def test_the_longest_wins_and_letters_that_mean_something_to_re_mean_nothing(self):
        tok = WordTokenizer.train([], special_words=["<a", "<a>", ".*"])
        assert tok.encode("<a><a.*", allow_special=True) == [BASE + 1, BASE, BASE + 2]

    def test_do_not_count_as_words(self):
        tok = WordTokenizer.train(["cat cat cat"], special_words=[" cat"])
        assert tok.words == ("cat",)
        assert tok.decode(tok.encode("cat cats", allow_special=True)) == "cat cats"


class TestFile:
    def test_there_and_back(self, tmp_path):
        for i, text in enumerate(AWKWARD):
            pattern = ("words", "llama3")[i % 2]
            tok = WordTokenizer.train([text, TEXT], special_words=["<start>"], pattern=pattern)
            tok.save(tmp_path / f"{i}.json")
            again = WordTokenizer.load(tmp_path / f"{i}.json")
            assert again.digest() == tok.digest()
            assert (len(again), again.words, again.special_words) == (len(tok), tok.words, tok.special_words)
            assert again.encode(text, allow_special=True) == tok.encode(text, allow_special=True)
        tok = WordTokenizer.train([TEXT], pattern="whitespace")
        tok.save(str(tmp_path / "w.json"))
        assert WordTokenizer.load(str(tmp_path / "w.json")).encode(TEXT) == tok.encode(TEXT)
        assert not list(tmp_path.glob("*.partial"))

    def saved(self, tmp_path, **changes):
        TOK.save(tmp_path / "t.json")
        content = json.loads((tmp_path / "t.json").read_text(encoding="utf-8"))
        content.update(changes)
        return content

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"format": "other"}, "format"),
            ({"version": 2}, "version is '2'"),
            ({"version": True}, "version"),
            ({"version": 1.0}, "version"),
            ({"pattern": "letters"}, "pattern"),
            ({"pattern": ["words"]}, "pattern"),
            ({"pattern": "whitespace"}, "special words|cannot be a word"),
            ({"words": {}}, "words"),
            ({"words": None}, "words"),
            ({"words": [" a", 3]}, "not a string"),
            ({"words": [" a", " b", " a"]}, "' a' is there twice"),
            ({"words": [" a", ""]}, "0 characters"),
            ({"words": ["x" * 10_000]}, "10000 characters"),
            ({"words": ["\ud800"]}, "surrogate"),
            ({"words": list(TOK.words[1:])}, "changed"),
            ({"words": [*TOK.words[1:], TOK.words[0]]}, "changed"),
            ({"special_words": ["<start>", "<start>"]}, "twice"),
            ({"special_words": [" cat"]}, "twice"),
            ({"sha256": "0" * 64}, "changed"),
            ({"more\nthan": 1}, "unknown"),
        ],
    )
    def test_what_is_not_exactly_that_is_refused(self, tmp_path, changes, message):
        (tmp_path / "t.json").write_text(json.dumps(self.saved(tmp_path, **changes)))
        with pytest.raises(UserError, match=message) as caught:
            WordTokenizer.load(tmp_path / "t.json")
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400

    def test_a_missing_field(self, tmp_path):
        for name in self.saved(tmp_path):
            content = self.saved(tmp_path)
            del content[name]
            (tmp_path / "t.json").write_text(json.dumps(content))
            with pytest.raises(UserError, match=name):
                WordTokenizer.load(tmp_path / "t.json")

    @pytest.mark.parametrize(
        "content", [b"", b"{", b"[1, 2]", b"null", b"\xff\xfe", b"[" * 100_000, b"\x80\x04K\x01.", b"1" * 5000]
    )
    def test_no_tokenizer_at_all(self, tmp_path, content):
        (tmp_path / "t.json").write_bytes(content)
        with pytest.raises(UserError, match=r"no tokenizer|not valid JSON"):
            WordTokenizer.load(tmp_path / "t.json")

    def test_half_a_file(self, tmp_path):
        TOK.save(tmp_path / "t.json")
        whole = (tmp_path / "t.json").read_bytes()
        for size in range(0, len(whole) - 2, 97):
            (tmp_path / "t.json").write_bytes(whole[:size])
            with pytest.raises(UserError):
                WordTokenizer.load(tmp_path / "t.json")

    def test_no_file_or_a_folder(self, tmp_path):
        for path in (tmp_path / "absent.json", tmp_path):
            with pytest.raises(UserError, match=r"cannot read|is a folder"):
                WordTokenizer.load(path)

    def test_cannot_write(self, tmp_path):
        (tmp_path / "file").write_text("in the way")
        (tmp_path / "folder").mkdir()
        for path in (tmp_path / "absent" / "t.json", tmp_path / "file" / "t.json", tmp_path / "folder"):
            with pytest.raises(UserError, match="cannot write"):
                TOK.save(path)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


class TestWhitespace:
    def test_the_convention(self):
        tok = WordTokenizer.train([" a b a \n \n"], pattern="whitespace")
        assert [tok.word(i) for i in range(len(tok))] == ["<eos>", "<unk>", "a", "b"]
        assert tok.encode(" a x b \n \n a") == [2, 1, 3, 0, 0, 2]
        assert tok.encode("<eos> <unk>") == [1, 1]
        assert tok.encode("") == []
        assert tok.encode("\n") == [tok.eos_id]

    def test_decode_gives_lines_of_the_wikitext_form(self):
        text = " \n = Title = \n \n One <unk> , two . \n"
        tok = WordTokenizer.train([text], pattern="whitespace")
        assert tok.decode(tok.encode(text)) == text
        assert tok.decode(tok.encode("One,\t two .")) == " <unk> two ."

    @settings(max_examples=100, deadline=None)
    @given(st.text(st.sampled_from("ab \n\t\u2028\x1cé"), max_size=30))
    def test_words_and_line_ends_of_any_text_come_back(self, text):
        tok = WordTokenizer.train([text], pattern="whitespace")
        back = tok.decode(tok.encode(text))
        assert [line.split() for line in back.split("\n")] == [line.split() for line in text.split("\n")]

    def test_wikitext_has_the_published_counts(self):
        folder = DATA / "wikitext-2"
        if not folder.is_dir():
            pytest.skip("needs WikiText-2 in ../shared/data/wikitext-2")
        texts = {name: (folder / f"{name}.txt").read_bytes().decode() for name in ("train", "valid", "test")}
        tok = WordTokenizer.train([texts["train"]], pattern="whitespace")
        assert len(tok) == 33_278
        assert tok.word(tok.eos_id) == "<eos>"
        for name, count in {"train": 2_088_628, "valid": 217_646, "test": 245_569}.items():
            ids = tok.encode(texts[name])
            assert len(ids) == count
            assert tok.decode(ids) == texts[name]


def test_llama_stories_are_encoded_quickly_and_exactly():
    if not (DATA / "llama-stories").is_dir():
        pytest.skip("needs the stories in ../shared/data/llama-stories")
    text = "".join(path.read_bytes().decode() for path in sorted((DATA / "llama-stories").glob("*.md")))
    tok = WordTokenizer.train([text], min_count=2, special_words=["<start>"])
    start = time.perf_counter()
    ids = tok.encode(text, allow_special=True)
    assert time.perf_counter() - start < 10  # 0.6 s on an idle machine
    assert tok.decode(ids) == text
    assert ids.count(BASE) == 1000
    assert tok.eos_id not in ids
    assert len(ids) < 0.25 * len(text)  # more than four characters a token
