"""Text to token ids and back: whole words where they are known, bytes where they are not.

A model with a small vocabulary learns faster and writes whole words, but a word-level vocabulary has to say what it
does with a word that it never saw. Here such a word becomes its UTF-8 bytes, and 256 of the ids are reserved for them:
nothing is ever unknown, and `decode(encode(text)) == text` holds for every string.

    id 0            the end of a document; text never becomes it, only `corpus.py` puts it between documents
    ids 1 ... 256   the bytes 0x00 ... 0xff
    next            the special words, literal strings such as `<start>`, used only where the caller allows them
    the rest        the words, most frequent first, most of them with the space that precedes them: " cat"

The second pattern, "whitespace", is the convention of the WikiText benchmark and exists to be compared with published
figures: words are what white space separates, a line end is `<eos>` (id 0), any other word is `<unk>` (id 1).
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from operator import index
from pathlib import Path

from mamba2_min.errors import UserError

PATTERNS = ("words", "whitespace")
FORMAT, VERSION = "mamba2_min.tokenizer", 1  # what old files say, wherever this module now lies
MAX_WORD_LENGTH = 100  # characters: what is longer (base64, a line of dashes) is no word, and stays bytes
MAX_WORDS = 5_000_000
MAX_FILE_BYTES = 512 * 2**20

_EOS, _UNK = "<eos>", "<unk>"

# Where accents and vowel signs are characters of their own, which `re` does not count as letters: blocks of them, or of
# letters with them. They go on with a word.
_MARK = "\u0300-\u036f\u0483-\u0487\u0591-\u05c7\u0610-\u061a\u064b-\u065f"  # Latin to Arabic
_MARK += "\u0900-\u0963\u0971-\u0dff\u0e31-\u0e4e\u200c\u200d"  # South Asia, Thai, the joiners
# Kana and Han stand without spaces: one character is one piece, or each clause would be a word of its own.
_IDEOGRAPH = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_LETTER = rf"[^\W\d_{_IDEOGRAPH}]"

# One expression that covers every character: whatever it is given, the pieces put together are the text again.
# An alternative never has to give back more than one character, so the time is linear in the length of the text.
_PIECE = re.compile(
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


class WordTokenizer:
    """A vocabulary of words with bytes to fall back on. Make one with `train` or `load`.

    Attributes: `pattern`; `words` and `special_words`, tuples of str in the order of their ids; `eos_id`, always 0;
    `unk_id`, 1 in the pattern "whitespace" and None in "words", where nothing is unknown.
    """

    eos_id = 0

    def __init__(self, words: Sequence[str], special_words: Sequence[str] = (), pattern: str = "words"):
        """`words` and `special_words` in the order of their ids. Raises ValueError where they make no vocabulary."""
        self.pattern, self.words, self.special_words = pattern, tuple(words), tuple(special_words)
        self._check()
        if pattern == "words":
            self.unk_id = None
            self._bytes = [b"", *(bytes([value]) for value in range(256))]
        else:
            self.unk_id = 1
            self._bytes = [b" \n", b" " + _UNK.encode()]  # a line is " w w w \n", as in the files of WikiText
        first_special = len(self._bytes)
        first_word = first_special + len(self.special_words)
        self._special_ids = {word: first_special + i for i, word in enumerate(self.special_words)}
        self._word_ids = {word: first_word + i for i, word in enumerate(self.words)}
        before = b"" if pattern == "words" else b" "
        self._bytes += [before + word.encode() for word in (*self.special_words, *self.words)]
        self._special_split = _splitter(self.special_words)

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int | None = None,
        min_count: int = 1,
        pattern: str = "words",
        special_words: Sequence[str] = (),
    ) -> WordTokenizer:
        """The vocabulary of `texts`: words seen at least `min_count` times, most frequent first, ties alphabetically.

        `vocab_size` bounds `len()` of the result, everything counted; it is smaller where the texts have fewer words.
        `special_words` are literal strings (pattern "words" only). Raises UserError where `vocab_size` cannot hold what
        every vocabulary has, ValueError for other bad arguments and for a text with a lone surrogate.
        """
        if isinstance(texts, str):
            raise ValueError("texts is a collection of strings, one a document, not one string")
        if isinstance(min_count, bool) or not isinstance(min_count, int) or min_count < 1:
            raise ValueError(f"min_count must be a whole number of at least 1, not {min_count!r}")
        base = cls((), special_words, pattern)  # what every vocabulary has; checks the pattern and the special words
        room = MAX_WORDS
        if vocab_size is not None:
            if isinstance(vocab_size, bool) or not isinstance(vocab_size, int):
                raise ValueError(f"vocab_size must be a whole number or None, not {vocab_size!r}")
            if vocab_size < len(base):
                raise UserError(f"a vocabulary of {vocab_size} is too small: {base._arithmetic()} are always in it")
            room = min(room, vocab_size - len(base))

        counts = Counter()
        for text in texts:
            _check_unicode(text)
            if pattern == "whitespace":
                counts.update(text.split())
            else:
                for part in base._special_split(text):
                    counts.update(_PIECE.findall(part))
        # What has an id already needs no second one: a piece of one byte, a special word, <eos> and <unk>.
        known = {*base.special_words, *(map(chr, range(128)) if pattern == "words" else (_EOS, _UNK))}
        words = [
            word
            for word, count in counts.items()
            if count >= min_count and len(word) <= MAX_WORD_LENGTH and word not in known
        ]
        words.sort(key=lambda word: (-counts[word], word))
        return cls(words[:room], special_words, pattern)

    def __len__(self) -> int:
        return len(self._bytes)

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """The ids of `text`. With `allow_special`, a special word in it becomes its one token; without, it is text.

        In the pattern "words" the result never holds `eos_id`, whatever the text says. In "whitespace" each "\\n" is
        `eos_id` and a literal `<eos>` is `<unk>`. Raises ValueError at a lone surrogate, which UTF-8 cannot express.
        """
        _check_unicode(text)
        ids = []
        if self.pattern == "whitespace":
            known = self._word_ids.get
            for line in text.split("\n"):
                ids.extend([known(word, self.unk_id) for word in line.split()])
                ids.append(self.eos_id)
            ids.pop()  # between n + 1 lines there are n line ends
        elif allow_special and self.special_words:
            for part in self._special_split(text):
                special = self._special_ids.get(part)
                if special is None:
                    self._encode_words(part, ids)
                else:
                    ids.append(special)
        else:
            self._encode_words(text, ids)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; `decode(encode(text)) == text` for every text in the pattern "words".

        The end-of-document token is no text (""), a special word is its literal string, and bytes that are not UTF-8,
        which a model may well produce, become U+FFFD. Raises ValueError for an id outside the vocabulary.

        The pattern "whitespace" writes each word as " word" and `<eos>` as " \\n". So a text of lines that look like
        " word word \\n", as the files of WikiText do, comes back exactly, save that words outside the vocabulary are
        now `<unk>`; of any other text the words and the line ends come back, but not the white space between them.
        """
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """What `decode` decodes: the bytes of `ids` put together."""
        return b"".join([self.token_bytes(i) for i in ids])

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for. Raises ValueError for an id outside the vocabulary."""
        token_id = index(token_id)
        if not 0 <= token_id < len(self._bytes):
            raise ValueError(f"token id {token_id} is outside the vocabulary: 0 to {len(self._bytes) - 1}")
        return self._bytes[token_id]

    def word(self, token_id: int) -> str:
        """A token's name for people: `<eos>`, `<unk>`, `<0x0A>` for a byte that is no visible sign, or the word."""
        spelling = self.token_bytes(token_id)
        if token_id == self.eos_id:
            return _EOS
        if self.pattern == "whitespace":
            return spelling[1:].decode()
        if token_id <= 256 and not 0x20 < spelling[0] < 0x7F:
            return f"<0x{spelling[0]:02X}>"
        return spelling.decode()

    def digest(self) -> str:
        """The sha256, in hexadecimal, of all that decides which id means what: equal for equal vocabularies only."""
        content = json.dumps([self.pattern, self.special_words, self.words], separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()

    def save(self, path: str | os.PathLike) -> None:
        """Writes JSON, whole or not at all. Raises UserError where the file cannot be written."""
        path = Path(path)
        content = {
            "format": FORMAT,
            "version": VERSION,
            "pattern": self.pattern,
            "special_words": self.special_words,
            "words": self.words,
            "sha256": self.digest(),
        }
        partial = path.with_name(path.name + ".partial")
        try:
            partial.write_text(json.dumps(content, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
            os.replace(partial, path)
        except OSError as error:
            with suppress(OSError):
                partial.unlink()
            raise UserError(f"cannot write the tokenizer {path}: {error.strerror or error}") from None

    @classmethod
    def load(cls, path: str | os.PathLike) -> WordTokenizer:
        """Reads what `save` wrote. Raises UserError, one line, for whatever is not exactly that."""
        path = Path(path)
        try:
            if path.stat().st_size > MAX_FILE_BYTES:
                raise UserError(f"{path} is no tokenizer: larger than {MAX_FILE_BYTES >> 20} MiB")
            content = json.loads(path.read_bytes().decode("utf-8"))
        except OSError as error:
            raise UserError(f"cannot read the tokenizer {path}: {error.strerror or error}") from None
        except (ValueError, RecursionError):
            raise UserError(f"{path} is no tokenizer: not JSON in UTF-8, or not all of it") from None
        try:
            return cls._from_json(content)
        except ValueError as error:
            raise UserError(f"{path} is no tokenizer of this program: {error}") from None

    @classmethod
    def _from_json(cls, content: object) -> WordTokenizer:
        fields = {"format": str, "version": int, "pattern": str, "special_words": list, "words": list, "sha256": str}
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f'its "format" is not "{FORMAT}"')
        if content.get("version") != VERSION:
            raise ValueError(f"its version is {str(content.get('version'))[:20]!r}, this program reads {VERSION}")
        if content.keys() != fields.keys():
            odd = sorted(content.keys() ^ fields.keys())[0]
            raise ValueError(f"field {odd[:40]!r} is {'missing' if odd in fields else 'unknown'}")
        for name, kind in fields.items():
            if type(content[name]) is not kind:
                raise ValueError(f'field "{name}" is not a {kind.__name__}')
        tokenizer = cls(content["words"], content["special_words"], content["pattern"])
        if tokenizer.digest() != content["sha256"]:  # one word added or taken away would shift the ids after it
            raise ValueError("its words were changed since it was saved")
        return tokenizer

    def _encode_words(self, text: str, ids: list[int]) -> None:
        """Appends the ids of `text`, which holds no special word that is meant, to `ids`."""
        known = self._word_ids.get
        for piece in _PIECE.findall(text):
            word_id = known(piece)
            if word_id is None:
                ids.extend([byte + 1 for byte in piece.encode()])
            else:
                ids.append(word_id)

    def _arithmetic(self) -> str:
        if self.pattern == "whitespace":
            return f"{_EOS} and {_UNK} = 2"
        specials = len(self.special_words)
        return f"1 end of document + 256 bytes + {specials} special word{'s' * (specials != 1)} = {257 + specials}"

    def _check(self) -> None:
        if self.pattern not in PATTERNS:
            raise ValueError(f"pattern must be one of {', '.join(PATTERNS)}, not {str(self.pattern)[:40]!r}")
        if self.special_words and self.pattern == "whitespace":
            raise ValueError('special words belong to the pattern "words": in "whitespace" each is a word as any other')
        entries = (*self.special_words, *self.words)
        if len(entries) > MAX_WORDS:
            raise ValueError(f"{len(entries)} words, more than {MAX_WORDS}")
        for word in entries:
            if not isinstance(word, str):
                raise ValueError(f"a word is not a string but {str(word)[:40]!r}")
            if not 0 < len(word) <= MAX_WORD_LENGTH:
                raise ValueError(f"a word has {len(word)} characters; 1 to {MAX_WORD_LENGTH} are possible")
            _check_unicode(word)
            if self.pattern == "whitespace" and (word in (_EOS, _UNK) or word.split() != [word]):
                raise ValueError(f"{word!r} cannot be a word in the pattern whitespace")
        if len(set(entries)) < len(entries):
            twice = next(word for word, count in Counter(entries).items() if count > 1)
            raise ValueError(f"the word {twice!r} is there twice")


class StreamDecoder:
    """Decodes tokens as they come: a character is given out when its last byte is there, and not before.

    All that `feed` and at last `flush` return, put together, is `tokenizer.decode` of all the ids.
    """

    def __init__(self, tokenizer: WordTokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, ids: int | Iterable[int]) -> str:
        """The text that `ids`, one id or several, complete; often "". Raises ValueError as `decode` does."""
        ids = ids if isinstance(ids, Iterable) else [ids]
        return self._decoder.decode(self._tokenizer.decode_bytes(ids))

    def flush(self) -> str:
        """The end of the text: "", or U+FFFD where a character was left without its last bytes."""
        return self._decoder.decode(b"", final=True)


def _splitter(special_words: Sequence[str]):
    """A function that cuts a text at the special words, which stay as parts of their own; the longest match wins."""
    if not special_words:
        return lambda text: [text]
    return re.compile("(" + "|".join(map(re.escape, sorted(special_words, key=len, reverse=True))) + ")").split


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"character {error.start} is the lone surrogate U+{ord(text[error.start]):04X}, which is no text: "
            'UTF-8 cannot express it; text.encode("utf-8", "replace").decode() puts "?" in its place'
        ) from None
