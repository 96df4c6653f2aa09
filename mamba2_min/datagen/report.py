"""A summary of a folder of documents: the table at the end of a run."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from mamba2_min.datagen.judging import words
from mamba2_min.datagen.store import REQUEST_END, Store, text_of

OPENING_WORDS = 4
VOCABULARY = 8192  # as train.py's default


@dataclass
class Summary:
    """Figures of all documents in a folder.

    openings   Counter of the first four words of each text; a set whose texts start alike teaches to start alike
    tokens     what `train.py` will see of these documents, each with its end-of-document token
    """

    documents: int = 0
    words: int = 0
    distinct_words: int = 0
    openings: Counter = field(default_factory=Counter)
    tokens: int = 0

    @property
    def unique_openings(self) -> float:
        """Different openings per document: 1 where no two texts start alike."""
        return len(self.openings) / max(self.documents, 1)


def summarize(store: Store) -> Summary:
    """Reads all documents of `store`."""
    summary, distinct, contents = Summary(), set(), []
    for _, content in store.contents():
        contents.append(content.strip())
        found = words(text_of(content))
        summary.documents += 1
        summary.words += len(found)
        distinct.update(found)
        summary.openings[" ".join(found[:OPENING_WORDS])] += 1
    summary.distinct_words = len(distinct)
    summary.tokens = _tokens(contents)
    return summary


def _tokens(contents: list[str]) -> int:
    """Tokens of the documents as `corpus.load_corpus` reads them, with a vocabulary of their own.

    `train.py` leaves a tenth of the documents out of its vocabulary, to validate with: its figure is a little higher.
    """
    from mamba2_min.data.tokenizer import WordTokenizer

    special = [REQUEST_END] if any(REQUEST_END in content for content in contents) else []
    tokenizer = WordTokenizer.train(contents, VOCABULARY, min_count=2, special_words=special)
    return sum(len(tokenizer.encode(content, allow_special=True)) + 1 for content in contents)
