"""A Mamba-2 and its vocabulary under llama.cpp's names, for a GGUF file.

llama.cpp computes this model exactly. Its tokenizer for Llama 3 splits a text as the pattern "llama3" does and reads a
piece of the vocabulary as one token. The merges below make it spell any other piece by characters and bytes, as
`WordTokenizer.encode` does.
"""

from __future__ import annotations

from collections import Counter
from itertools import permutations

import numpy as np
from torch import Tensor

from mamba2_min.checkpoints.gguf import BLOCK, Value, quantize_q8_0
from mamba2_min.config import Mamba2Config
from mamba2_min.data.tokenizer import WordTokenizer
from mamba2_min.errors import UserError

KINDS = {"f32": 0, "f16": 1, "q8_0": 7}  # and what GGUF calls a file whose matrices are mostly of that type
CONTEXT = 2**20  # tokens; the state has one size, so this is no limit of the model
END = "<end of document>"  # how the end-of-document token is listed; text never becomes it

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # llama.cpp's kinds of token


def _byte_alphabet() -> list[str]:
    """A visible character for each byte, as GPT-2 writes its vocabulary: itself if Latin-1 shows it, or from U+0100."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in visible else next(others)) for byte in range(256)]


_ALPHABET = _byte_alphabet()
_TO_ALPHABET, _FROM_ALPHABET = dict(enumerate(_ALPHABET)), {c: byte for byte, c in enumerate(_ALPHABET)}


def metadata(config: Mamba2Config, tokenizer: WordTokenizer, kind: str, chat: str = "") -> dict[str, Value]:
    """All key-value pairs of the file. `chat` is the Jinja template of a chat model.

    Such a template writes END between two turns, so with it END in a text is the token; without it no text ever is.
    Raises UserError where the tokenizer cannot be written down for llama.cpp.
    """
    specials = tokenizer.special_words
    first_word = 1 + 256 + len(specials)
    spellings = [tokenizer.token_bytes(i) for i in range(len(tokenizer))]
    tokens = [END, *_ALPHABET, *specials, *map(_visible, spellings[first_word:])]
    if tokenizer.pattern == "whitespace":
        raise UserError('the pattern "whitespace" has no bytes to spell other words with; train with --pattern llama3')
    if len(set(tokens)) < len(tokens):  # llama.cpp ends the whole program at that
        twice = next(token for token, count in Counter(tokens).items() if count > 1)
        raise UserError(f"two tokens would be listed as {twice!r}: a special word has the spelling of another token")
    types = [
        _CONTROL if chat else _UNUSED,
        *[_NORMAL] * 256,
        *[_USER_DEFINED] * len(specials),
        *[_NORMAL] * len(tokens[first_word:]),
    ]
    values: dict[str, Value] = {
        "general.architecture": "mamba2",
        "general.type": "model",
        "general.name": "mamba2-min",  # a constant: for some names llama.cpp changes how it reads special words
        "general.file_type": KINDS[kind],
        "general.quantization_version": 2,
        "mamba2.context_length": CONTEXT,
        "mamba2.embedding_length": config.d_model,
        "mamba2.block_count": config.n_layer,
        "mamba2.feed_forward_length": 0,
        "mamba2.attention.head_count": 0,
        "mamba2.attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "mamba2.ssm.conv_kernel": config.d_conv,
        "mamba2.ssm.inner_size": config.d_inner,
        "mamba2.ssm.state_size": config.d_state,
        "mamba2.ssm.time_step_rank": config.nheads,
        "mamba2.ssm.group_count": config.ngroups,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": _merges(tokenizer),
        "tokenizer.ggml.bos_token_id": tokenizer.eos_id,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_id,
        "tokenizer.ggml.add_bos_token": True,
        # Never sampled: tokens that are not text on their own, because a server answers invalid UTF-8 with an error.
        "tokenizer.ggml.suppress_tokens": [i for i, spelling in enumerate(spellings) if not _is_text(spelling)],
    }
    return {**values, "tokenizer.chat_template": chat} if chat else values


def tensors(config: Mamba2Config, weights: dict[str, Tensor], kind: str) -> dict[str, np.ndarray]:
    """All tensors of the file, from weights under our names; embeddings and projections are of `kind`, one of KINDS.

    Rows whose length is not a multiple of 32 stay float16 in "q8_0". Raises UserError for a model that llama.cpp does
    not support, and for weights that are too large for float16.
    """
    check_supported(config)

    def plain(name: str) -> np.ndarray:
        return weights[name].detach().cpu().float().numpy()

    def matrix(name: str, rows: int | None = None) -> np.ndarray:
        full = plain(name)[:rows]
        if kind == "f32":
            return full
        if kind == "q8_0" and full.shape[-1] % BLOCK == 0:
            return quantize_q8_0(full)
        if np.abs(full).max() > np.finfo(np.float16).max:
            raise UserError(f"{name} has weights too large for float16; export with --type f32")
        return full.astype(np.float16)

    found = {"token_embd.weight": matrix("backbone.embedding.weight", config.vocab_size)}
    if not config.tie_embeddings:
        found["output.weight"] = matrix("lm_head.weight", config.vocab_size)
    found["output_norm.weight"] = plain("backbone.norm_f.weight")
    for i in range(config.n_layer):
        ours, theirs = f"backbone.layers.{i}.", f"blk.{i}."
        mixer = f"{ours}mixer."
        bias = plain(f"{mixer}conv1d.bias") if config.conv_bias else np.zeros(config.conv_dim, np.float32)
        found |= {
            f"{theirs}attn_norm.weight": plain(f"{ours}norm.weight"),
            f"{theirs}ssm_in.weight": matrix(f"{mixer}in_proj.weight"),
            f"{theirs}ssm_conv1d.weight": plain(f"{mixer}conv1d.weight")[:, 0],  # (conv_dim, d_conv)
            f"{theirs}ssm_conv1d.bias": bias,
            f"{theirs}ssm_dt.bias": plain(f"{mixer}dt_bias"),
            f"{theirs}ssm_a": (-weights[f"{mixer}A_log"].detach().cpu().float().exp()).numpy()[:, None],
            f"{theirs}ssm_d": plain(f"{mixer}D")[:, None],
            f"{theirs}ssm_norm.weight": plain(f"{mixer}norm.weight").reshape(config.ngroups, -1),
            f"{theirs}ssm_out.weight": matrix(f"{mixer}out_proj.weight"),
        }
    return found


def check_supported(config: Mamba2Config) -> None:
    """Raises UserError for a shape that llama.cpp's Mamba-2 does not have."""
    why = ""
    if config.proj_bias:
        why = "biases on its projections (proj_bias)"
    elif config.norm_before_gate:
        why = "its norm before the gate (norm_before_gate)"
    elif config.ngroups > 1 and not config.norm_per_group:
        why = f"one norm over {config.ngroups} groups (norm_per_group false)"
    if why:
        raise UserError(f"this model has {why}, which llama.cpp's Mamba-2 does not have; it cannot be exported")


def inexact(tokenizer: WordTokenizer) -> str:
    """Why llama.cpp would not read every text as this tokenizer does; "" where it does."""
    if tokenizer.pattern != "llama3":
        return f'llama.cpp does not cut text as the pattern "{tokenizer.pattern}" does'
    for a, b in permutations(tokenizer.special_words, 2):
        if any(a.endswith(b[:n]) for n in range(1, min(len(a), len(b)))):
            return f"the special words {a!r} and {b!r} can overlap, and llama.cpp takes the longer one first"
    for word in tokenizer.special_words:
        if (text := _meaning(word)) not in (None, word):
            return f"llama.cpp would also read {text!r} as the special word {word!r}"
    return ""


def _visible(spelling: bytes) -> str:
    return spelling.decode("latin-1").translate(_TO_ALPHABET)


def _is_text(spelling: bytes) -> bool:
    return spelling.decode("utf-8", "ignore").encode() == spelling


def _meaning(word: str) -> str | None:
    """The text that a token listed as `word` stands for among the ordinary ones; None if that is not text."""
    try:
        return bytes(_FROM_ALPHABET[c] for c in word).decode()
    except (KeyError, UnicodeDecodeError):
        return None


def _merges(tokenizer: WordTokenizer) -> list[str]:
    """The merge rules that join the bytes of each character in the vocabulary, from its first byte on.

    Every intermediate result is a token too, because llama.cpp drops a rule whose result is not.
    """
    if tokenizer.pattern != "llama3":
        return []
    characters = [_visible(word.encode()) for word in tokenizer.words if len(word) == 1]
    return list(dict.fromkeys(f"{c[:i]} {c[i]}" for c in characters for i in range(1, len(c))))
