"""Conversations from files: read, checked, split, freed of repeats, and turned into examples.

The split is by a hash of the requests, so that equal requests are on one side; a validation file of one's own takes its
place, and requests that are in both are then left out of training.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mamba2_min.data.documents import PROSE, Reader, read_documents
from mamba2_min.data.records import START, SUFFIXES
from mamba2_min.data.tokenizer import WordTokenizer, bytes_outside
from mamba2_min.errors import UserError
from mamba2_min.files import is_folder
from mamba2_min.finetune.conversations import (
    ROLES,
    TEMPLATES,
    ChatTemplate,
    Conversation,
    Example,
    conversation,
    template_for,
    tokenize,
)
from mamba2_min.finetune.rows import read_rows

_FEW = 50  # conversations, of which a tenth says little


@dataclass
class ChatData:
    """Examples to train on and to validate with, the template's name, and lines about what was left out."""

    train: list[Example]
    validation: list[Example]
    template: str
    train_talks: list[Conversation]
    validation_talks: list[Conversation]
    notes: list[str] = field(default_factory=list)


def read_conversations(path: str | Path, encoding: str | None = None) -> list[Conversation]:
    """Every conversation of a file of records, or of a folder of such files and of `request<start>answer` documents.

    encoding: that of files which are not UTF-8. Raises UserError, naming file and line, for a record that is not a
    conversation, and where there is none.
    """
    talks = list(_read(Path(path), encoding))
    if not talks:
        raise UserError(f"no conversations in {path}: looked for {', '.join(SUFFIXES)} files, and for {START} in texts")
    return talks


def _read(path: Path, encoding: str | None) -> Iterator[Conversation]:
    if not is_folder(path):
        yield from (conversation(row, where) for row, where in read_rows(path, encoding=encoding))
        return
    tables = Reader(path, suffixes=SUFFIXES).files  # no link leads out of the folder, nothing hidden is read
    for file in tables:
        yield from (conversation(row, where) for row, where in read_rows(file.path, encoding=encoding))
    try:
        documents = read_documents(path, suffixes=PROSE, encoding=encoding)
    except UserError:
        if tables:  # a folder of records needs no documents
            return
        raise
    yield from (conversation({"text": d.text}, d.source) for d in documents if START in d.text)


def load_chat(
    data: str | Path,
    tokenizer: WordTokenizer,
    val_data: str | Path | None = None,
    val_fraction: float = 0.1,
    encoding: str | None = None,
) -> ChatData:
    """Reads conversations and makes examples of them with the template that fits the tokenizer. Raises UserError."""
    talks, notes = read_conversations(data, encoding), []
    train, repeats = _without_repeats(talks)
    if repeats:
        notes.append(f"{repeats:,} repeated conversations left out")
    if val_data is None and not val_fraction:
        validation = train
        notes.append("nothing is held out: the loss says how well these conversations are known by heart")
    elif val_data is None:
        train, validation = split(train, val_fraction)
        if len(talks) < _FEW:
            notes.append(
                f"with {len(talks)} conversations, training stops where the {len(validation)} held out are answered "
                "best; --val-fraction 0 holds nothing out, and all are learnt by heart"
            )
    else:
        validation, _ = _without_repeats(read_conversations(val_data, encoding))
        asked = {talk.request_key for talk in validation}
        both = [talk for talk in train if talk.request_key in asked]
        train = [talk for talk in train if talk.request_key not in asked]
        if both:
            notes.append(f"{len(both):,} conversations left out of training: their requests are in {val_data} too")
    for part, name in ((train, "train on"), (validation, "validate with")):
        if not part:
            why = (
                f"; the requests of all are in {val_data} too" if val_data else ": it takes two with different requests"
            )
            raise UserError(f"nothing to {name}: {data} has {len(talks):,} conversations{why}")
    name = template_for(tokenizer)
    made = [[tokenize(talk, TEMPLATES[name], tokenizer) for talk in part] for part in (train, validation)]
    notes += _about_bytes(train, TEMPLATES[name], tokenizer)
    return ChatData(made[0], made[1], name, train, validation, notes)


def split(talks: Sequence[Conversation], fraction: float) -> tuple[list[Conversation], list[Conversation]]:
    """About `fraction` of the conversations for validation, chosen by a hash of their requests; at least one."""
    keys = sorted({talk.request_key for talk in talks})
    chosen = {key for key in keys if int(key[:15], 16) / 16**15 < fraction}
    if len(keys) > 1:
        chosen = chosen or {keys[0]}
        chosen = chosen if len(chosen) < len(keys) else {keys[0]}
    train = [talk for talk in talks if talk.request_key not in chosen]
    return train, [talk for talk in talks if talk.request_key in chosen]


def _without_repeats(talks: Sequence[Conversation]) -> tuple[list[Conversation], int]:
    kept = list({talk.key: talk for talk in reversed(talks)}.values())[::-1]
    return kept, len(talks) - len(kept)


def _about_bytes(talks: Sequence[Conversation], template: ChatTemplate, tokenizer: WordTokenizer) -> list[str]:
    """A line where much of what is said, without the template's markers, is in no word of the model's vocabulary."""
    before = {role: template.written(role, "\0").partition("\0")[0][-1:] for role in ROLES}  # the first word's space
    said = [before[message.role] + message.content for talk in talks for message in talk.messages]
    pieces = Counter(piece for text in said for piece in tokenizer.pieces(text))
    outside = sum(count * bytes_outside(tokenizer, piece) for piece, count in pieces.items())
    share = outside / sum(len(text.encode()) for text in said)
    if share < 0.1:
        return []
    return [
        f"{share:.0%} of the bytes are outside the model's vocabulary; a model trained on texts of this kind, with a "
        "vocabulary of its own, will do better"
    ]
