"""Near duplicates: which text on disk does a new one resemble, without comparing it with each of them word by word?

A text becomes the set of its runs of three words. How alike two texts are is the Jaccard index of their sets, the
runs they share divided by the runs that either has. MinHash (Broder 1997) estimates it from a fixed few numbers a text:
under a random order of all possible runs, the first run of one set is the first of the other with a probability of
exactly that index. 128 random orders give 128 such trials, and the share of hits has a standard error of at most
sqrt(0.25 / 128) = 0.044, whatever the length of the texts.

    runs     "the fox ran off"  ->  {the fox ran, fox ran off}  ->  64 bits each, by BLAKE2b
    orders   h_k(run) = upper 32 bits of (a_k * run + b_k mod 2^64), a_k odd, k = 0 ... 127
    minima   signature[k] = min over the text's runs of h_k(run)
"""

from __future__ import annotations

import hashlib
import re
import unicodedata

import numpy as np

from mamba2_min.datagen.judging import words
from mamba2_min.printable import without_invisible

# The blocks of combining marks that belong to no script of their own; the vowel signs of Hebrew or Hindi stay.
_ACCENT = re.compile("[\u0300-\u036f\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f]")

RUN_LENGTH = 3
ORDERS = 128


def comparable(text: str) -> str:
    """`text` without invisible differences, so that a disguised repeat is recognised.

    Invisible characters and accents are left out, and compatible characters (ligatures, full-width letters) are
    unified.
    """
    plain = unicodedata.normalize("NFKD", without_invisible(text))
    return unicodedata.normalize("NFC", _ACCENT.sub("", plain))


def runs_of(text: str) -> set[str]:
    """The runs of `RUN_LENGTH` words of `text`; a shorter text is one run."""
    found = words(comparable(text))
    count = max(len(found) - RUN_LENGTH + 1, 1)
    return {" ".join(found[i : i + RUN_LENGTH]) for i in range(count)}


def jaccard(one: str, other: str) -> float:
    """The index itself, for two texts: what `NearDuplicates` estimates."""
    a, b = runs_of(one), runs_of(other)
    return len(a & b) / len(a | b)


def signature(text: str) -> np.ndarray:
    """The (ORDERS,) uint32 minima of `text`. The share of equal entries of two signatures estimates their Jaccard."""
    hashes = b"".join(hashlib.blake2b(run.encode("utf-8", "replace"), digest_size=8).digest() for run in runs_of(text))
    runs = np.frombuffer(hashes, dtype="<u8")
    with np.errstate(over="ignore"):  # the product is meant to wrap at 2^64
        smallest = (runs[:, None] * _FACTORS + _OFFSETS).min(axis=0)
    return (smallest >> np.uint64(32)).astype(np.uint32)  # the upper bits of the least are the least upper bits


def _random_numbers(name: str) -> np.ndarray:
    """ORDERS fixed 64-bit numbers, the same on every machine and in every version of NumPy."""
    digests = (hashlib.blake2b(f"{name}/{k}".encode(), digest_size=8).digest() for k in range(ORDERS))
    return np.frombuffer(b"".join(digests), dtype="<u8")


_FACTORS = _random_numbers("factor") | np.uint64(1)
_OFFSETS = _random_numbers("offset")


class NearDuplicates:
    """The texts seen so far, as rows of one matrix: to compare with all of them is one pass of NumPy over it.

    100,000 texts take 51 MB and about ten milliseconds per question, much less than a model takes to write a line. An
    index by bands of the signature would be faster, and would miss some.
    """

    def __init__(self, threshold: float = 0.5):
        """`threshold`: the Jaccard index from which on two texts count as one, in (0, 1]."""
        self.threshold = threshold
        self._names: list[str] = []
        self._rows = np.empty((64, ORDERS), dtype=np.uint32)

    def __len__(self) -> int:
        return len(self._names)

    def like(self, minima: np.ndarray) -> tuple[str, float] | None:
        """The name of the text most like the one with this signature, and how alike, if that reaches the threshold."""
        if not self._names:
            return None
        alike = np.count_nonzero(self._rows[: len(self)] == minima, axis=1)
        best = int(alike.argmax())
        share = float(alike[best]) / ORDERS
        return (self._names[best], share) if share >= self.threshold else None

    def add(self, name: str, minima: np.ndarray) -> None:
        """Remembers the text called `name` by its signature."""
        if len(self) == len(self._rows):
            self._rows = np.concatenate([self._rows, np.empty_like(self._rows)])
        self._rows[len(self)] = minima
        self._names.append(name)
