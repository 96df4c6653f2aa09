"""From a folder of documents to tensors: read, split by document, make the vocabulary, turn into ids.

    Reader ──► PieceStream ──► choose_sides ──► WordTokenizer ──► Corpus
    documents  their pieces    training and     on the training   two tensors
                               validation       part alone

The split comes before the vocabulary, so that nothing of the validation part, not even its words, is seen in training.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from mamba2_min.data import split
from mamba2_min.data.documents import RULES, Document, Reader, progress_bar
from mamba2_min.data.findings import counted
from mamba2_min.data.repeats import Repeats
from mamba2_min.data.stream import PieceStream, Span
from mamba2_min.data.tokenizer import WordTokenizer
from mamba2_min.errors import UserError
from mamba2_min.settings import DataSettings


@dataclass
class Corpus:
    """A vocabulary and two streams of token ids.

    `train`, `validation`: (l,) int32, the documents one after the other, the end-of-document token after each.
    `train_bytes`, `validation_bytes`: the UTF-8 bytes that the streams stand for, to give bits per byte: the bytes of
    the texts, and 1 for each end-of-document token, as if it were the one byte between two documents.
    `train_documents`, `train_words`, ...: how many documents, and how many words as white space separates them.
    `train_starts`, `validation_starts`: (documents,) int64, where each document begins in its stream.
    `notes`: lines for the user about what was skipped, moved or cut.
    `outside`: the share of all bytes that are in no word of the vocabulary; `worst`: the file with the largest share.
    """

    tokenizer: WordTokenizer
    train: torch.Tensor
    validation: torch.Tensor
    train_bytes: int
    validation_bytes: int
    train_documents: int
    validation_documents: int
    train_words: int
    validation_words: int
    notes: list[str] = field(default_factory=list)
    outside: float = 0.0
    worst: tuple[str, float] | None = None
    train_starts: torch.Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int64))
    validation_starts: torch.Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int64))

    @property
    def documents(self) -> int:
        return self.train_documents + self.validation_documents

    @property
    def words(self) -> int:
        return self.train_words + self.validation_words

    @property
    def coverage(self) -> str:
        """One line on the bytes that are outside of the vocabulary."""
        worst = f", most of all in {self.worst[0]} ({self.worst[1]:.1%})" if self.worst else ""
        return f"{self.outside:.1%} of the bytes are outside the vocabulary{worst}"

    @cached_property
    def digest(self) -> str:
        """sha256 of vocabulary, tokens and split, in hexadecimal: a run resumes exactly only if it is the same."""
        content = hashlib.sha256(self.tokenizer.digest().encode())
        for tokens in (self.train, self.validation):
            content.update(len(tokens).to_bytes(8, "little"))
            content.update(tokens.numpy().astype("<i4").tobytes())
        return content.hexdigest()


def load_corpus(
    path: str | os.PathLike,
    vocab_size: int | None = None,
    min_count: int = 2,
    pattern: str = "words",
    val_fraction: float = 0.1,
    val_path: str | os.PathLike | None = None,
    special_words: Sequence[str] = ("<start>",),
    tokenizer: WordTokenizer | None = None,
    encoding: str | None = None,
    drop_repeats: bool = False,
    max_bytes: int | None = None,
    rules: int = RULES,
) -> Corpus:
    """The corpus of a folder or a file.

    The vocabulary is made from the training part alone, with `vocab_size`, `min_count` and `pattern` as in
    `WordTokenizer.train`, and with those of `special_words` that the training part holds. By default a word that is
    there only once stays bytes: nothing can be learnt about it, and a model that never sees bytes in training could not
    read a new word. A `tokenizer` that is given (to resume, to fine-tune) is used as it is, and the four are ignored.

    `val_fraction` of the text validates (`split_documents`). `val_path` names the validation part, a file or a folder,
    instead of a split; documents that are in both are left out of training. In the pattern "whitespace" texts keep the
    white space at their ends, and one that ends in a line end needs no other end-of-document token, so that the counts
    of the WikiText files are the published ones.

    `encoding` and `max_bytes` are those of `Reader`; `max_bytes` is about `path` alone. `drop_repeats` leaves out the
    paragraphs that several documents have (`Repeats`), which are otherwise only reported. `rules` 1 reads and splits as
    the first version did, for a run that was begun then.
    Raises UserError where there is nothing to read or to learn, and what `WordTokenizer.train` raises.
    """
    asked = dict(locals())
    base = tokenizer or WordTokenizer((), special_words if pattern != "whitespace" else (), pattern)
    texts = _Texts(base, encoding, drop_repeats, rules)
    if drop_repeats:
        texts.count_repeats([(path, max_bytes)] + ([] if val_path is None else [(val_path, None)]))
    if val_path is None:
        train, validation = texts.split(texts.read(path, max_bytes, to_split=True), val_fraction)
    else:
        validation = texts.read(val_path)
        train = texts.read(path, max_bytes, held_out={text.key for text in validation})
        if not train:
            raise UserError(f"nothing to train on: all documents of {path} are in the validation part {val_path}")
    train_spans, validation_spans = _spans(train), _spans(validation)
    if tokenizer is None:
        counts = texts.stream.counts(train_spans)
        present = [word for word in base.special_words if word in counts]
        absent = set(base.special_words) - set(present)
        if absent & texts.stream.counts(validation_spans).keys():
            # A word that is not in the training part is no special word: the documents must be split without it.
            return load_corpus(**{**asked, "special_words": present})
        tokenizer = WordTokenizer.from_counts(counts, vocab_size, min_count, base.pattern, present)
    outside, worst = _outside(texts.stream, [*train, *validation], tokenizer)
    return Corpus(
        tokenizer=tokenizer,
        train=torch.from_numpy(texts.stream.tokens(train_spans, tokenizer)),
        validation=torch.from_numpy(texts.stream.tokens(validation_spans, tokenizer)),
        train_bytes=sum(span.n_bytes for span in train_spans),
        validation_bytes=sum(span.n_bytes for span in validation_spans),
        train_documents=len(train),
        validation_documents=len(validation),
        train_words=sum(span.n_words for span in train_spans),
        validation_words=sum(span.n_words for span in validation_spans),
        notes=texts.notes(),
        outside=outside,
        worst=worst,
        train_starts=_starts(texts.stream.lengths(train_spans, tokenizer)),
        validation_starts=_starts(texts.stream.lengths(validation_spans, tokenizer)),
    )


def corpus_of(data: DataSettings, tokenizer: WordTokenizer | None = None) -> Corpus:
    """`load_corpus` by the settings of a run, with its own `tokenizer` where there is one."""
    return load_corpus(
        data.data,
        data.vocab_size,
        data.min_count,
        data.pattern,
        data.val_fraction,
        data.val_data,
        tokenizer=tokenizer,
        encoding=data.encoding,
        drop_repeats=data.drop_repeats,
        max_bytes=data.max_documents_bytes,
        rules=data.rules,
    )


@dataclass
class _Text:
    """A document: the key and the size in bytes of its text, and its `span` in the stream, or its text until then."""

    key: str
    source: str
    size: int
    span: Span | None = None
    waiting: Document | None = None


class _Texts:
    """Reads documents into one stream, and collects the notes about them."""

    def __init__(self, tokenizer: WordTokenizer, encoding: str | None, drop_repeats: bool, rules: int):
        self.stream = PieceStream(tokenizer)
        self._drop_repeats, self._rules = drop_repeats, rules
        self._strip, self._encoding = tokenizer.pattern != "whitespace", encoding
        self._repeats = Repeats()
        self._notes: list[str] = []
        self._notes_on_split: list[str] = []

    def notes(self) -> list[str]:
        return self._notes + self._repeats.notes(self._drop_repeats) + self._notes_on_split

    def count_repeats(self, paths: Sequence[tuple[str | os.PathLike, int | None]]) -> None:
        """Reads everything once, so that the repeats are known when the documents are read again to be kept."""
        for path, max_bytes in paths:
            for document in self._reader(path, max_bytes):
                self._repeats.add(document.text)

    def read(
        self,
        path: str | os.PathLike,
        max_bytes: int | None = None,
        held_out: Collection[str] = (),
        to_split: bool = False,
    ) -> list[_Text]:
        """The documents at `path`, except those whose key is in `held_out`.

        With `to_split`, texts that may have to be cut are held back, and `split` puts them into the stream.
        """
        reader = self._reader(path, max_bytes)
        texts: list[_Text] = []
        waiting: list[_Text] = []
        left_out = emptied = total = 0
        for document in reader:
            key = document.key  # of the text as it was read: dropping repeats moves no document
            if key in held_out:
                left_out += 1
                continue
            if self._drop_repeats:
                document = Document(self._repeats.without(document.text), document.source)
                if not document.text.strip():
                    emptied += 1
                    continue
            else:
                self._repeats.add(document.text)
            size = len(document.text.encode())
            total += size
            texts.append(_Text(key, document.source, size, waiting=document))
            if to_split and (split.is_large(size, total) or len(texts) == 1):
                waiting.append(texts[-1])
            else:
                self._put(texts[-1])
            if len(waiting) > 2 * split.LARGE_PARTS:  # most are no longer large, now that there is more text
                for text in waiting:
                    if not split.is_large(text.size, total):
                        self._put(text)
                waiting = [text for text in waiting if text.waiting]
        self._notes += reader.notes()
        if left_out and texts:
            both = counted(left_out, "document")
            self._notes.append(f"{both} left out of training: in the validation part as well")
        if emptied:
            self._notes.append(f"{counted(emptied, 'document')} of nothing but repeats left out")
            if not texts:
                raise UserError(f"nothing is left of the documents in {path}: all their paragraphs repeat")
        return texts

    def split(self, texts: list[_Text], val_fraction: float) -> tuple[list[_Text], list[_Text]]:
        """The training and the validation part of what was read, as `split_documents` chooses them."""
        sizes = {text.key: text.size for text in texts}
        sides, notes = split.choose_sides(sizes, Counter(text.key for text in texts), val_fraction, self._rules)
        if len(sizes) == 1:
            texts = texts[:1]
        train: list[_Text] = []
        validation: list[_Text] = []
        cuts = []
        with progress_bar(sum(len(text.waiting.text) for text in texts if text.waiting), "words", unit="") as bar:
            for text in texts:
                if text.key not in sides.cut:
                    (validation if text.key in sides.validation else train).append(text)
                    self._put(text, bar.update)
                    continue
                assert text.waiting is not None
                parts = split.cut(text.waiting, val_fraction)
                cuts.append((text.waiting.file, len(parts[1].text), len(text.waiting.text)))
                text.waiting = None
                for part, side in zip(parts, (train, validation), strict=True):
                    side.append(_Text(text.key, text.source, text.size, waiting=part))
                    self._put(side[-1], bar.update)
        self._notes_on_split = notes + split.cut_note(cuts, len(sizes))
        return train, validation

    def _reader(self, path: str | os.PathLike, max_bytes: int | None) -> Reader:
        return Reader(path, self._strip, self._encoding, max_bytes, self._rules)

    def _put(self, text: _Text, progress: Callable[[int], object] = lambda characters: None) -> None:
        """Puts a text that was held back into the stream, and forgets it."""
        if text.waiting:
            text.span, text.waiting = self.stream.add(text.waiting.text, progress), None


def _spans(texts: list[_Text]) -> list[Span]:
    return [text.span for text in texts if text.span]


def _starts(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)[:-1]


def _outside(
    stream: PieceStream, texts: list[_Text], tokenizer: WordTokenizer
) -> tuple[float, tuple[str, float] | None]:
    """The share of bytes that are outside the vocabulary, and the file where it is largest, with that share."""
    sizes: Counter[str] = Counter()
    missing: Counter[str] = Counter()
    spans = _spans(texts)
    for text, span, outside in zip(texts, spans, stream.outside(spans, tokenizer), strict=True):
        file = text.source.rpartition("#")[0]
        sizes[file] += span.n_bytes
        missing[file] += outside
    # In a file of a few words the share means little, unless there are only such files.
    files = [file for file, size in sizes.items() if size >= 1000] or list(sizes)
    worst = max(files, key=lambda file: missing[file] / sizes[file])
    share = missing[worst] / sizes[worst]
    return missing.total() / sizes.total(), (worst, share) if share else None
