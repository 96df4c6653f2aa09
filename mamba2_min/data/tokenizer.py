"""Text to token ids and back: whole words where they are known, bytes where they are not.

A model with a small vocabulary learns faster and writes whole words, but a word-level vocabulary needs a rule for words
that it does not have. Here such a word becomes its UTF-8 bytes, for which 256 ids are reserved: nothing is ever
unknown, and `decode(encode(text)) == text` holds for every string.

    id 0            the end of a document; text never becomes it, only `stream.py` puts it between documents
    ids 1 ... 256   the bytes 0x00 ... 0xff
    next            the special words, literal strings such as `<start>`, used only where the caller allows them
    the rest        the words, most frequent first, most of them with the space that precedes them: " cat"

`pattern` says where a text is cut into pieces (patterns.py); a piece that is in the vocabulary is one token. The
pattern "llama3" has long pieces in scripts without spaces, so it spells an unknown piece by its characters first: a
character that is a word of the vocabulary is one token, and another becomes its bytes. If its first two or three bytes
are those of a known character, they are one token together; such beginnings have the last ids. This is what byte-pair
encoding does with the rules that an exported file has (checkpoints/llama_cpp.py), so llama.cpp gets the same ids.

The pattern "whitespace" is the convention of the WikiText benchmark and exists to be compared with published figures:
words are what white space separates, a line end is `<eos>` (id 0), any other word is `<unk>` (id 1).
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from operator import index
from pathlib import Path
from typing import Any

from mamba2_min.data.folding import fold, unknown_pieces
from mamba2_min.data.patterns import PIECES
from mamba2_min.errors import UserError
from mamba2_min.files import load_json, write_atomically
from mamba2_min.settings import PATTERNS

FORMAT, VERSION = "mamba2_min.tokenizer", 1  # as in files from before this module moved
MAX_WORD_LENGTH = 100  # characters: what is longer (base64, a line of dashes) is not a word and stays bytes
MAX_WORDS = 5_000_000
MAX_FILE_BYTES = 512 * 2**20
MAX_FILE_VALUES = 2 * MAX_WORDS  # commas and brackets that are words are counted too

_EOS, _UNK = "<eos>", "<unk>"


class WordTokenizer:
    """A vocabulary of words, with bytes for all others. Build one with `train` or `load`.

    Attributes: `pattern`; `words` and `special_words`, tuples of str in the order of their ids; `eos_id`, always 0;
    `unk_id`, 1 in the pattern "whitespace" and None in the others, where nothing is unknown.
    """

    eos_id = 0

    def __init__(self, words: Sequence[str], special_words: Sequence[str] = (), pattern: str = "words"):
        """`words` and `special_words` in the order of their ids. Raises ValueError if they are not a valid
        vocabulary."""
        self.pattern, self.words, self.special_words = pattern, tuple(words), tuple(special_words)
        _check_vocabulary(self.words, self.special_words, pattern)
        if pattern == "whitespace":
            self.unk_id: int | None = 1
            self._bytes = [b" \n", b" " + _UNK.encode()]  # a line is " w w w \n", as in the files of WikiText
        else:
            self.unk_id = None
            self._bytes = [b"", *(bytes([value]) for value in range(256))]
            self._cut = PIECES[pattern]
        first_special = len(self._bytes)
        first_word = first_special + len(self.special_words)
        self._special_ids = {word: first_special + i for i, word in enumerate(self.special_words)}
        self._word_ids = {word: first_word + i for i, word in enumerate(self.words)}
        before = b" " if pattern == "whitespace" else b""
        self._bytes += [before + word.encode() for word in (*self.special_words, *self.words)]
        beginnings = dict.fromkeys(b for word in self.words for b in _beginnings(word)) if pattern == "llama3" else ()
        self._beginning_ids = {beginning: len(self._bytes) + i for i, beginning in enumerate(beginnings)}
        self._bytes += beginnings
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
        `special_words` are literal strings (not in the pattern "whitespace"). Raises UserError where `vocab_size`
        cannot hold what every vocabulary has, ValueError for other bad arguments and for a text with a lone surrogate.
        """
        if isinstance(texts, str):
            raise ValueError("texts is a collection of strings, one a document, not one string")
        base = cls((), special_words, pattern)  # what every vocabulary has; checks the pattern and the special words
        counts: Counter[str] = Counter()
        for text in texts:
            _check_unicode(text)
            counts.update(base.pieces(text, allow_special=True))
        return cls.from_counts(counts, vocab_size, min_count, pattern, special_words)

    @classmethod
    def from_counts(
        cls,
        counts: Mapping[str, int],
        vocab_size: int | None = None,
        min_count: int = 1,
        pattern: str = "words",
        special_words: Sequence[str] = (),
    ) -> WordTokenizer:
        """As `train`, from how often each of the `pieces` occurs."""
        base = cls((), special_words, pattern)
        return cls(_frequent_words(base, counts, min_count, _room(base, vocab_size)), special_words, pattern)

    def __len__(self) -> int:
        return len(self._bytes)

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """The ids of `text`. With `allow_special`, a special word in it becomes its one token; without, it is text.

        The result never holds `eos_id`, whatever the text says; only in the pattern "whitespace" each "\\n" is
        `eos_id`, and a literal `<eos>` is `<unk>`. Raises ValueError at a lone surrogate, which UTF-8 cannot express.
        """
        _check_unicode(text)
        ids: list[int] = []
        known = self._word_ids.get
        special = self._special_ids if allow_special else {}
        for piece in self.pieces(text, allow_special):
            word_id = known(piece)
            if word_id is not None:
                ids.append(word_id)
            elif piece in special:
                ids.append(special[piece])
            else:
                ids.extend(self._spelled(piece))
        return ids

    def pieces(self, text: str, allow_special: bool = False) -> list[str]:
        """What `encode` gives ids to: words, signs and white space, which joined are the text again.

        With `allow_special`, special words are pieces of their own. "whitespace": only words and line ends.
        """
        if self.pattern == "whitespace":
            pieces = [piece for line in text.split("\n") for piece in (*line.split(), "\n")]
            pieces.pop()  # between n + 1 lines there are n line ends
            return pieces
        if not (allow_special and self.special_words):
            return self._cut(text)
        parts = enumerate(self._special_split(text))  # every other one is a special word
        return [piece for k, part in parts for piece in ([part] if k % 2 else self._cut(part))]

    def piece_ids(self, piece: str) -> list[int]:
        """The ids of one of the `pieces`, a special word included."""
        known = self._word_ids.get(piece, self._special_ids.get(piece))
        return self._spelled(piece) if known is None else [known]

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of what a person typed: `encode(text, allow_special=True)`, in the spelling that is known.

        Where the vocabulary does not know the typed quotes, dots, dashes or accents of a word, and knows exactly one
        other spelling of them, that one is taken (folding.py). Raises ValueError at a lone surrogate.
        """
        _check_unicode(text)
        if self.pattern != "whitespace":
            unknown = unknown_pieces(self._cut, self._word_ids)
            parts = enumerate(self._special_split(text))  # every other one is a special word
            text = "".join([part if k % 2 else fold(part, unknown) for k, part in parts])
        return self.encode(text, allow_special=True)

    def recut(self, pattern: str) -> WordTokenizer:
        """The same vocabulary, with the same ids, for text that is split by another pattern."""
        other = copy(self)
        other._cut = PIECES[pattern]
        return other

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; `decode(encode(text)) == text` for every text, except in the pattern "whitespace".

        The end-of-document token is no text (""), a special word is its literal string, and bytes that are not UTF-8,
        which a model may well produce, become U+FFFD. "whitespace" has the form of WikiText's files: " word", " \\n"
        for `<eos>`, " <unk>" for an unknown word. Raises ValueError for an id outside the vocabulary.
        """
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """What `decode` decodes: the bytes of `ids`, joined."""
        return b"".join([self.token_bytes(i) for i in ids])

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for. Raises ValueError for an id outside the vocabulary."""
        token_id = index(token_id)
        if not 0 <= token_id < len(self._bytes):
            raise ValueError(f"token id {token_id} is outside the vocabulary: 0 to {len(self._bytes) - 1}")
        return self._bytes[token_id]

    def word(self, token_id: int) -> str:
        """A token's name for people: `<eos>`, `<unk>`, `<0x0A>` for a byte that is not visible, or the word."""
        spelling = self.token_bytes(token_id)
        if token_id == self.eos_id:
            return _EOS
        if self.pattern == "whitespace":
            return spelling[1:].decode()
        if (token_id <= 256 and not 0x20 < spelling[0] < 0x7F) or spelling in self._beginning_ids:
            return "".join([f"<0x{byte:02X}>" for byte in spelling])
        return spelling.decode()

    def digest(self) -> str:
        """The sha256, in hexadecimal, of everything that gives ids their meaning: equal only for equal vocabularies."""
        content = json.dumps([self.pattern, self.special_words, self.words], separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()

    def save(self, path: str | os.PathLike) -> None:
        """Writes JSON, whole or not at all. Raises UserError where the file cannot be written."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "pattern": self.pattern,
            "special_words": self.special_words,
            "words": self.words,
            "sha256": self.digest(),
        }
        data = (json.dumps(content, ensure_ascii=False, indent=0) + "\n").encode()
        write_atomically(Path(path), lambda file: file.write(data))

    @classmethod
    def load(cls, path: str | os.PathLike) -> WordTokenizer:
        """Reads what `save` wrote. Raises UserError, one line, for whatever is not exactly that."""
        content = load_json(Path(path), MAX_FILE_BYTES, MAX_FILE_VALUES)
        try:
            words, special_words, pattern = _checked_fields(content)
            tokenizer = cls(words, special_words, pattern)
            if tokenizer.digest() != content["sha256"]:  # one word added or removed would shift the ids after it
                raise ValueError("its words were changed since it was saved")
        except ValueError as error:
            raise UserError(f"{path} is no tokenizer of this program: {error}") from None
        return tokenizer

    def _spelled(self, piece: str) -> list[int]:
        """The ids of a piece that is not in the vocabulary."""
        if self.pattern == "whitespace":
            return [self.eos_id if piece == "\n" else 1]
        if self.pattern == "words" or piece.isascii():
            return [byte + 1 for byte in piece.encode()]
        return [i for character in piece for i in _spelled_character(character, self._word_ids, self._beginning_ids)]


def bytes_outside(tokenizer: WordTokenizer, piece: str) -> int:
    """How many bytes of one of its `pieces` are in no word: those of characters that are not tokens themselves."""
    ids = tokenizer.piece_ids(piece)
    if ids == [tokenizer.unk_id]:
        return len(piece.encode())
    if len(ids) == 1:
        return 0
    last_word = 256 + len(tokenizer.special_words) + len(tokenizer.words)
    return sum(len(tokenizer.token_bytes(i)) for i in ids if not 256 < i <= last_word)


class StreamDecoder:
    """Decodes tokens as they come. A character is returned once its last byte is there.

    The texts that `feed` and finally `flush` return, joined, are `tokenizer.decode` of all ids.
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


def _frequent_words(base: WordTokenizer, counts: Mapping[str, int], min_count: int, room: int) -> list[str]:
    """The words among counted pieces that are not in `base` yet, at most `room` with their characters' beginnings."""
    if isinstance(min_count, bool) or not isinstance(min_count, int) or min_count < 1:
        raise ValueError(f"min_count must be an integer of at least 1, not {min_count!r}")
    # What has an id already needs no second one: a piece of one byte, a special word, <eos> and <unk>.
    inside = {*base.special_words, *((_EOS, _UNK, "\n") if base.pattern == "whitespace" else map(chr, range(128)))}
    counts = Counter({piece: count for piece, count in counts.items() if piece not in inside})
    words = _most_frequent(counts, min_count)
    if base.pattern != "llama3":
        return words[:room]
    for piece in counts.keys() - set(words[:room]):  # what is spelled: its characters compete with the words
        if len(piece) > 1 and not piece.isascii():
            counts.update({c: n * counts[piece] for c, n in Counter(piece).items() if c > "\x7f"})
    chosen: list[str] = []
    beginnings: set[bytes] = set()
    for word in _most_frequent(counts, min_count):
        more = [beginning for beginning in _beginnings(word) if beginning not in beginnings]
        if len(chosen) + 1 + len(beginnings) + len(more) <= room:
            chosen.append(word)
            beginnings.update(more)
    return chosen


def _most_frequent(counts: Mapping[str, int], min_count: int) -> list[str]:
    """The words that are frequent and not too long, most frequent first, ties alphabetically."""
    words = [word for word, count in counts.items() if count >= min_count and len(word) <= MAX_WORD_LENGTH]
    return sorted(words, key=lambda word: (-counts[word], word))


def _spelled_character(character: str, words: Mapping[str, int], beginnings: Mapping[bytes, int]) -> list[int]:
    """Its own id, or those of its longest known beginning and of the bytes after it."""
    data = character.encode()
    known, size = words.get(character), len(data)
    while known is None and size > 2:
        size -= 1
        known = beginnings.get(data[:size])
    return [byte + 1 for byte in data] if known is None else [known, *[byte + 1 for byte in data[size:]]]


def _beginnings(word: str) -> list[bytes]:
    """For one character of three or four bytes: its first two, and first three if there is a fourth."""
    data = word.encode() if len(word) == 1 else b""
    return [data[:size] for size in range(2, len(data))]


def _room(base: WordTokenizer, vocab_size: int | None) -> int:
    """How many words a vocabulary of `vocab_size` has room for, beside those of `base`, which are in every one."""
    if vocab_size is None:
        return MAX_WORDS
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int):
        raise ValueError(f"vocab_size must be an integer or None, not {vocab_size!r}")
    if vocab_size < len(base):
        specials = len(base.special_words)
        always = f"1 end of document + 256 bytes + {specials} special word{'s' * (specials != 1)} = {len(base)}"
        if base.pattern == "whitespace":
            always = f"{_EOS} and {_UNK} = 2"
        raise UserError(f"a vocabulary of {vocab_size} is too small: {always} are always in it")
    return min(MAX_WORDS, vocab_size - len(base))


def _check_vocabulary(words: tuple[str, ...], special_words: tuple[str, ...], pattern: str) -> None:
    if pattern not in PATTERNS:
        raise ValueError(f"pattern must be one of {', '.join(PATTERNS)}, not {str(pattern)[:40]!r}")
    if special_words and pattern == "whitespace":
        raise ValueError('the pattern "whitespace" has no special words: each is a word like any other')
    entries = (*special_words, *words)
    if len(entries) > MAX_WORDS:
        raise ValueError(f"{len(entries)} words, more than {MAX_WORDS}")
    for word in entries:
        if not isinstance(word, str):
            raise ValueError(f"a word is not a string but {str(word)[:40]!r}")
        if not 0 < len(word) <= MAX_WORD_LENGTH:
            raise ValueError(f"a word has {len(word)} characters; 1 to {MAX_WORD_LENGTH} are possible")
        _check_unicode(word)
        if pattern == "whitespace" and (word in (_EOS, _UNK) or word.split() != [word]):
            raise ValueError(f"{word!r} cannot be a word in the pattern whitespace")
    if len(set(entries)) < len(entries):
        twice = next(word for word, count in Counter(entries).items() if count > 1)
        raise ValueError(f"the word {twice!r} is there twice")


def _checked_fields(content: Any) -> tuple[list[str], list[str], str]:
    """The words, special words and pattern of a tokenizer's JSON. Raises ValueError for any other field or type."""
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
    return content["words"], content["special_words"], content["pattern"]


def _splitter(special_words: Sequence[str]) -> Callable[[str], list[str]]:
    """A function that cuts a text at the special words, which are parts of their own; the longest match wins."""
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
