"""What a word's spelling adds to its embedding: the mean of one vector per part of 3 to 5 letters (fastText,
arXiv:1607.04606).

    transfered   <tr tra ran ... red> <tra tran ... ered> ... <transfered>

A vocabulary of a few thousand words has "transfer" and "transferred" as two ids that know nothing of each other, and
spells "transfered" in bytes. Their parts are mostly the same.
"""

from __future__ import annotations

import zlib
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mamba2_min.data.tokenizer import WordTokenizer

_MOST = 32  # parts of one word; a longer word has those of its beginning
_SIZES = (3, 4, 5)


class Spelling(nn.Module):
    """A vector for each part of a word, found by a hash of it among `buckets` rows; row 0 is for no part at all."""

    table: Tensor  # (vocabulary, _MOST) int64: the rows of each token's parts
    is_spelled: Tensor  # (vocabulary,) bool: a part of a word that is in no vocabulary

    def __init__(self, tokenizer: WordTokenizer, width: int, buckets: int, seed: int = 0):
        super().__init__()
        self.tokenizer, self.buckets = tokenizer, buckets
        self.parts = nn.Embedding(buckets, width, padding_idx=0)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.parts.weight.copy_(torch.empty(buckets, width).normal_(std=0.02, generator=generator))
            self.parts.weight[0] = 0
        rows = [self._rows(tokenizer.token_bytes(i)) for i in range(len(tokenizer))]
        self.register_buffer("table", torch.tensor(rows), persistent=False)
        known = {i for word in (*tokenizer.special_words, *tokenizer.words) for i in tokenizer.piece_ids(word)}
        spelled = torch.tensor([i not in known for i in range(len(tokenizer))])
        spelled[tokenizer.eos_id] = False
        self.register_buffer("is_spelled", spelled & (tokenizer.unk_id is None), persistent=False)

    def _rows(self, word: bytes) -> list[int]:
        found = [1 + zlib.crc32(part.encode()) % (self.buckets - 1) for part in parts_of(word.decode(errors="replace"))]
        return (found + [0] * _MOST)[:_MOST]

    def forward(self, ids: Tensor) -> Tensor:
        """ids (b, l) -> (b, l, width). Each byte of a word outside the vocabulary has what the whole word has."""
        rows = self.table[ids]
        spelled = self.is_spelled[ids]
        for row in (spelled[:, 1:] & spelled[:, :-1]).any(1).nonzero().flatten().tolist():
            self._join(rows[row], ids[row].tolist(), spelled[row].tolist())
        return F.embedding_bag(rows.flatten(0, 1), self.parts.weight, mode="mean", padding_idx=0).unflatten(
            0, ids.shape
        )

    def _join(self, rows: Tensor, ids: list[int], spelled: list[bool]) -> None:
        """Gives the tokens of every word that is spelled the rows of that word, in place; rows (l, _MOST)."""
        bounds = [0, *(k for k in range(1, len(ids)) if spelled[k] != spelled[k - 1]), len(ids)]
        for start, end in pairwise(bounds):
            if not spelled[start] or end - start < 2:
                continue
            words = iter(self.tokenizer.pieces(self.tokenizer.decode(ids[start:end])))
            position = reach = 0  # bytes before a token, and to the end of its word
            word: list[int] = []
            found = []
            for k in range(start, end):
                while position >= reach:
                    piece = next(words).encode()
                    word, reach = self._rows(piece), reach + len(piece)
                found.append(word)
                position += len(self.tokenizer.token_bytes(ids[k]))
            rows[start:end] = torch.tensor(found, device=rows.device)


def parts_of(word: str) -> list[str]:
    """The parts of a word, without its space and in small letters: those of 3 to 5 letters, then the whole word."""
    framed = f"<{word.strip().lower()}>"
    parts = [framed[k : k + size] for size in _SIZES for k in range(len(framed) - size + 1)]
    return list(dict.fromkeys([framed, *parts]))
