"""Known words only: a small model that spells a rare word out, byte by byte, spells nonsense.

What may be written then are the words of the vocabulary, none glued to the one before it ("st" and "resting"), and the
unknown words of the prompt, each as a whole: Quillo stays Quillo.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mamba2_min.data.tokenizer import WordTokenizer


class Letters:
    """What the tokens of a vocabulary are to its words: (vocab,) bool each, on the CPU.

    spells     parts of words: a letter or a space of ASCII, but for the words "A" and "I"; parts of characters
    begins     tokens whose first character is a letter of ASCII
    ends       tokens whose last one is. Text is cut into whole words: `begins` after `ends` is a word that was spelled
    """

    def __init__(self, tokenizer: WordTokenizer):
        spelled = [tokenizer.token_bytes(i) for i in range(len(tokenizer))]
        letters = {bytes([b]) for b in range(0x80) if chr(b).isalpha() or chr(b) == " "} - {b"A", b"I"}
        parts = [b in letters or b.decode("utf-8", "ignore").encode() != b for b in spelled]
        self.spells = torch.tensor(parts)
        self.begins = torch.tensor([b[:1].isalpha() for b in spelled])
        self.ends = torch.tensor([b[-1:].isalpha() for b in spelled])


class KnownWords:
    """Which tokens may follow, as a text is written: `feed` each token that is."""

    def __init__(self, tokenizer: WordTokenizer, letters: Letters, prompt: Sequence[int] = ()):
        """prompt: the tokens that were read before; their unknown words may be written."""
        self._letters, self._last = letters, prompt[-1] if prompt else tokenizer.eos_id
        self._words: set[tuple[int, ...]] = set()
        self._run: tuple[int, ...] = ()  # what of a word of the prompt is written
        for piece in {*tokenizer.pieces(tokenizer.decode(prompt), allow_special=True)}:
            ids = tuple(tokenizer.piece_ids(piece))
            if len(ids) > 1 and letters.spells[ids[0]]:
                self._words.add(ids)

    def only(self, logits: Tensor) -> Tensor:
        """The logits (vocab,), with -inf for what may not follow. A word that was begun is written to its end."""
        logits = logits.cpu()
        size = len(self._run)
        following = sorted({w[size] for w in self._words if len(w) > size and w[:size] == self._run})
        if self._run and self._run not in self._words:
            hidden = torch.ones_like(self._letters.spells)
        elif self._letters.ends[self._last]:
            hidden = self._letters.spells | self._letters.begins
            following += sorted({word[0] for word in self._words if not self._letters.begins[word[0]]})
        else:
            hidden = self._letters.spells.clone()
            following += sorted({word[0] for word in self._words})
        hidden[following] = False
        return logits.masked_fill(hidden, -torch.inf)

    def feed(self, token: int) -> None:
        """Takes the token that was written."""
        runs = ((*self._run, token), (token,))  # the word goes on, or another begins
        self._run = next((run for run in runs if any(w[: len(run)] == run for w in self._words)), ())
        self._last = token
