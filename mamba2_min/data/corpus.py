"""From a folder of documents to batches: read, split by document, make the vocabulary, turn into one tensor of ids.

    read_documents ──► split_documents ──► WordTokenizer.train ──► Corpus ──► Windows, validation_windows
     .md, .txt files    by a stable hash    on the training part    two tensors    what the trainer iterates over

The split comes before all else, so that nothing of the validation part, not even its words, is seen in training.
"""

from __future__ import annotations

import hashlib
import os
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch

from mamba2_min.data.tokenizer import WordTokenizer
from mamba2_min.errors import UserError

SUFFIXES = (".md", ".txt")
NOT_DOCUMENTS = ("readme.md", "readme.txt", "license.md", "license.txt")  # at the top of the folder, in any case
IGNORE = -100  # the target of a position that is only padding; the loss leaves it out

_END_OF_DOCUMENT = re.compile(r"<end>|<\|endoftext\|>")
_BOUNDARIES = (
    re.compile(r"(\n[^\S\n]*\n\s*)"),  # between paragraphs
    re.compile(r"(?<=[.!?…])[\"'”’)]*(\s+)"),  # between sentences
    re.compile(r"(\s+)"),  # between words
)


@dataclass(frozen=True)
class Document:
    """One document: its `text`, and its `source`, "path/of/file.md#k", the k-th of that file, counted from 1."""

    text: str
    source: str

    @cached_property
    def key(self) -> str:
        """sha256 of the text, in hexadecimal: the same wherever the document lies and whatever its file is called."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def read_documents(path: str | os.PathLike, strip: bool = True, notes: list[str] | None = None) -> list[Document]:
    """Every document in the .md and .txt files below the folder `path`, or in the one file `path` of any name.

    Files come in the order of their relative paths. Left out are hidden files and folders, symbolic links (so nothing
    outside of the folder is read), and at the top of the folder README.md, LICENSE.md and their .txt forms. A file
    is UTF-8, with or without a byte order mark; its CRLF line ends become "\\n". It holds one document, or several with
    `<end>` or `<|endoftext|>` between them or after each. White space at both ends of a document is dropped, unless
    `strip` is False; where nothing else is in it there is no document.

    What was skipped is said in lines appended to `notes`. Raises UserError where there is no such path, nothing to
    read, a file that cannot be read or is not UTF-8.
    """
    path, notes = Path(path), [] if notes is None else notes
    files = document_files(path, notes)
    documents, empty = [], 0
    for file in files:
        name = file.relative_to(path).as_posix() if file != path else path.name
        texts = [text.strip() if strip else text for text in _END_OF_DOCUMENT.split(_read_text(file))]
        texts = [text for text in texts if text and not text.isspace()]
        documents += [Document(text, f"{name}#{k}") for k, text in enumerate(texts, start=1)]
        empty += not texts
    if empty:
        notes.append(f"{_count(empty, 'file')} without text skipped")
    if not documents:
        raise UserError(
            f"no documents in {path}: looked for {' and '.join(SUFFIXES)} files with text in them, in all folders below"
            " (hidden files, symbolic links, and README and LICENSE at the top do not count)"
            if path.is_dir()
            else f"no documents in {path}: the file has no text"
        )
    return documents


class Split(NamedTuple):
    """Documents to train on, documents to validate with, and lines that say what was done to get there."""

    train: list[Document]
    validation: list[Document]
    notes: list[str]


def split_documents(documents: Sequence[Document], val_fraction: float = 0.1) -> Split:
    """Splits by a hash of each document's text: about `val_fraction` of the documents go to validation.

    Where a document goes depends on its text alone. Adding, renaming or moving one moves no other, a resumed run sees
    the same split, and documents that are the same are on the same side. Where so few documents leave a side empty,
    the one with the smallest hash, alone, is the validation part; where there is but one text, it is cut in two.
    Raises UserError for a fraction that is not between 0 and 1, and for a text too short to be cut.
    """
    if not 0 < val_fraction < 1:
        raise UserError(f"the validation part must be a fraction between 0 and 1, not {val_fraction}")
    if not documents:
        raise UserError("no documents to split")
    notes = []
    if len({document.key for document in documents}) == 1:
        head, tail = _cut(documents[0], val_fraction)
        notes.append(
            f"only one document: its last {len(tail.text):,} of {len(documents[0].text):,} characters are the"
            " validation part"
        )
        return Split([head], [tail], notes)
    # The first 60 bits of the hash, as a fraction of 1: uniform, and the same on every machine.
    chosen = {d.key for d in documents if int(d.key[:15], 16) / 16**15 < val_fraction}
    if not chosen or all(d.key in chosen for d in documents):
        chosen = {min(d.key for d in documents)}
        notes.append(f"with {_count(len(documents), 'document')} the validation part is one document")
    train = [d for d in documents if d.key not in chosen]
    return Split(train, [d for d in documents if d.key in chosen], notes)


@dataclass
class Corpus:
    """A vocabulary and two streams of token ids.

    `train`, `validation`: (l,) int32, the documents one after the other, the end-of-document token after each.
    `train_bytes`, `validation_bytes`: the UTF-8 bytes that the streams stand for, to give bits per byte: the bytes of
    the texts, and 1 for each end-of-document token, as if it were the one byte between two documents.
    `train_documents`, `train_words`, ...: how many documents, and how many words as white space separates them.
    `notes`: lines for the user about what was skipped, moved or cut.
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

    @property
    def documents(self) -> int:
        return self.train_documents + self.validation_documents

    @property
    def words(self) -> int:
        return self.train_words + self.validation_words

    @cached_property
    def digest(self) -> str:
        """sha256 of vocabulary, tokens and split, in hexadecimal: a run goes on exactly only where it is the same."""
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
) -> Corpus:
    """The corpus of a folder or a file: `read_documents`, `split_documents`, a vocabulary, tensors.

    The vocabulary is made from the training part alone, with `vocab_size`, `min_count` and `pattern` as in
    `WordTokenizer.train`, and with those of `special_words` that the training part holds. By default a word that is
    there only once stays bytes: nothing can be learnt about it, while a model that never meets bytes in training could
    not read a new word. A `tokenizer` that is given (to resume, to fine-tune) is used as it is, instead of the four.

    `val_path` names the validation part, a file or a folder, instead of a split; documents that are in both are left
    out of training. In the pattern "whitespace" texts keep the white space at their ends, and one that ends in a line
    end needs no other end-of-document token, so that the counts of the WikiText files are the published ones.
    Raises UserError where there is nothing to read or to learn, and what `WordTokenizer.train` raises.
    """
    pattern = tokenizer.pattern if tokenizer else pattern
    notes: list[str] = []
    strip = pattern != "whitespace"
    documents = read_documents(path, strip, notes)
    if val_path is None:
        train, validation, more = split_documents(documents, val_fraction)
        notes += more
    else:
        validation = read_documents(val_path, strip, notes)
        held_out = {document.key for document in validation}
        train = [document for document in documents if document.key not in held_out]
        if not train:
            raise UserError(f"nothing to train on: all documents of {path} are in the validation part {val_path}")
        if len(train) < len(documents):
            both = _count(len(documents) - len(train), "document")
            notes.append(f"{both} left out of training: in the validation part as well")
    if tokenizer is None:
        texts = [document.text for document in train]
        present = [word for word in special_words if any(word in text for text in texts)] if strip else []
        tokenizer = WordTokenizer.train(texts, vocab_size, min_count, pattern, present)
    train_tokens, train_bytes = _encode(train, tokenizer)
    validation_tokens, validation_bytes = _encode(validation, tokenizer)
    return Corpus(
        tokenizer=tokenizer,
        train=train_tokens,
        validation=validation_tokens,
        train_bytes=train_bytes,
        validation_bytes=validation_bytes,
        train_documents=len(train),
        validation_documents=len(validation),
        train_words=_words(train),
        validation_words=_words(validation),
        notes=notes,
    )


class Windows:
    """An endless iterator of training batches: (input_ids, targets), each (b, l) int64, targets one token ahead.

    In each epoch every target `tokens[1:]` occurs exactly once. The stream is cut into windows of `context` tokens,
    at a new random phase each epoch, so that no token is always the first of a window, and the windows come in a new
    random order. The two windows at the ends of the stream are shorter; they are filled up on the right with id 0 and
    target -100. Batches all have the same shape: what an epoch leaves over starts the batch with which the next begins.

    Where the stream is shorter than `context`, `self.context` is what there is, and `self.note` says so (else None).
    The order depends on `seed`, the epoch and the number of tokens only: `state_dict()` is three numbers and what they
    belong to, and `load_state_dict` goes on with the very next batch.
    """

    def __init__(self, tokens: torch.Tensor, context: int, batch_size: int, seed: int = 0):
        """`tokens` (l,), on the CPU. Raises UserError for fewer than two tokens, ValueError for sizes below 1."""
        if context < 1 or batch_size < 1:
            raise ValueError(f"context and batch_size must be at least 1, not {context} and {batch_size}")
        self.targets_per_epoch = len(tokens) - 1
        if self.targets_per_epoch < 1:
            raise UserError(f"nothing to learn from: the training part has {_count(len(tokens), 'token')}, not two")
        self.tokens, self.batch_size, self.seed = tokens, batch_size, seed
        self.context = min(context, self.targets_per_epoch)
        self.note = None
        if self.context < context:
            self.note = f"context {context} shortened to {self.context}: the training part has {len(tokens)} tokens"
        self._begin(epoch=0)

    def __iter__(self) -> Windows:
        return self

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = []
        missing = self.batch_size
        while missing:
            if self.position == len(self._starts):
                self._begin(self.epoch + 1)
            chosen.append(self._starts[self.position : self.position + missing])
            self.position += len(chosen[-1])
            missing -= len(chosen[-1])
        starts = torch.cat(chosen)[:, None]  # (b, 1)
        ends = (starts + self.context).clamp(max=self.targets_per_epoch)
        at = starts.clamp(min=0) + torch.arange(self.context)  # (b, l)
        inside = at < ends
        at = at * inside  # any index will do where nothing is read from it
        input_ids = self.tokens[at].long() * inside
        targets = self.tokens[at + 1].long().masked_fill(~inside, IGNORE)
        return input_ids, targets

    @property
    def epochs(self) -> float:
        """How often the stream has been gone through so far, such as 2.25."""
        return self.epoch + self.position / len(self._starts)

    def state_dict(self) -> dict[str, int]:
        """The place in the data, as plain integers. It is that after the last batch that was taken."""
        return {
            "seed": self.seed,
            "epoch": self.epoch,
            "position": self.position,
            "context": self.context,
            "tokens": len(self.tokens),
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes to the place that `state_dict` gave. The batch size may be another; else raises UserError."""
        damaged = UserError("cannot go on: the saved place in the data is damaged")
        if state.keys() != self.state_dict().keys() or any(type(value) is not int for value in state.values()):
            raise damaged
        for name, here in (("tokens", len(self.tokens)), ("context", self.context)):
            if state[name] != here:
                raise UserError(f"cannot go on at the saved place in the data: {name} were {state[name]}, now {here}")
        self.seed = state["seed"]
        self._begin(state["epoch"])
        if not 0 <= state["position"] <= len(self._starts):
            raise damaged
        self.position = state["position"]

    def _begin(self, epoch: int) -> None:
        """Draws the phase and the order of `epoch`; `_starts` (w,) holds the index of each window's first input."""
        self.epoch, self.position = epoch, 0
        seed = hashlib.sha256(f"{self.seed} {epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(seed[:7], "little"))
        phase = int(torch.randint(self.context, (), generator=generator))
        # A window that starts before the stream keeps what lies inside of it: targets 0 to phase - 1.
        first = phase - self.context if phase else 0
        starts = torch.arange(first, self.targets_per_epoch, self.context)
        self._starts = starts[torch.randperm(len(starts), generator=generator)]


def validation_windows(
    tokens: torch.Tensor, context: int, start_id: int | None = None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The stream in order, for evaluation with the state carried on: (input_ids, targets), each (1, l) int64.

    `l` is `context`, in the last window what is left. Each token but the first is the target once. With `start_id`
    the stream is read as if that token stood before it, and the first token is a target as well: with the
    end-of-document token there, the targets are exactly what `Corpus.validation_bytes` counts.
    Raises ValueError for a context below 1, UserError for a stream without a target.
    """
    if context < 1:
        raise ValueError(f"context must be at least 1, not {context}")
    if start_id is not None:
        tokens = torch.cat([tokens.new_tensor([start_id]), tokens])
    if len(tokens) < 2:
        raise UserError("nothing to validate with: the validation part has no token to predict")
    return _in_order(tokens, context)


def _in_order(tokens: torch.Tensor, context: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for start in range(0, len(tokens) - 1, context):
        piece = tokens[start : start + context + 1].long()[None]  # (1, l + 1)
        yield piece[:, :-1], piece[:, 1:]


def document_files(path: Path, notes: list[str]) -> list[Path]:
    """The files to read, in order. Raises UserError where `path` or a folder below it cannot be read."""
    if os.path.isfile(path):
        return [path]
    if not os.path.isdir(path):
        raise UserError(f"no such file or folder: {path}")

    def fail(error: OSError):
        raise UserError(f"cannot read the folder {error.filename}: {error.strerror}")

    files, links = [], 0
    for folder, subfolders, names in os.walk(path, onerror=fail):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        links += sum(os.path.islink(os.path.join(folder, name)) for name in subfolders)  # which os.walk does not enter
        for name in names:
            file = Path(folder, name)
            if name.startswith(".") or file.suffix.lower() not in SUFFIXES:
                continue
            if Path(folder) == path and name.lower() in NOT_DOCUMENTS:
                continue
            if file.is_symlink():
                links += 1
            elif file.is_file():
                files.append(file)
    if links:
        notes.append(f"{_count(links, 'symbolic link')} not followed")
    return sorted(files, key=lambda file: file.relative_to(path).as_posix())


def _read_text(file: Path) -> str:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from None
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file} is not UTF-8: byte 0x{content[error.start]:02X} at offset {error.start:,};"
            " save it as UTF-8 or take it out of the folder"
        ) from None
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def _cut(document: Document, fraction: float) -> tuple[Document, Document]:
    """Cuts off about the last `fraction` of a document, at a paragraph if one ends near there, a sentence, a word."""
    text = document.text
    wanted = round(len(text) * (1 - fraction))
    near = max(round(len(text) * min(fraction, 1 - fraction) / 2), 40)
    first, last = len(text) - len(text.lstrip()), len(text.rstrip())  # both parts need some text
    start = end = min(max(wanted, first + 1), last - 1)
    for boundary in _BOUNDARIES:
        spans = [match.span(1) for match in boundary.finditer(text, max(wanted - near, 0), wanted + near)]
        spans = [span for span in spans if first < span[0] and span[1] < last]
        if spans:  # the white space at the cut belongs to neither part
            start, end = min(spans, key=lambda span: abs(span[0] - wanted))
            break
    head, tail = text[:start], text[end:]
    if not head.strip() or not tail.strip():
        raise UserError(f"{document.source} is the only document, and too short to be cut in two, for validation")
    return Document(head, document.source), Document(tail, document.source)


def _encode(documents: Iterable[Document], tokenizer: WordTokenizer) -> tuple[torch.Tensor, int]:
    """The stream of the documents, (l,) int32, and how many bytes it stands for."""
    ids, size = array("i"), 0
    for document in documents:
        ids.extend(tokenizer.encode(document.text, allow_special=True))
        size += len(document.text.encode())
        if ids[-1] != tokenizer.eos_id:
            ids.append(tokenizer.eos_id)
            size += 1
    return torch.tensor(ids, dtype=torch.int32), size


def _words(documents: Iterable[Document]) -> int:
    return sum(len(document.text.split()) for document in documents)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"
