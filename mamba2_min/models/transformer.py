"""A Transformer to compare with: token ids in, logits and a cache that grows with every token out.

    ids ─► embedding ─►(+)────────────────►(+)──────────────►(+)─► ... ─► norm_f ─► lm_head ─► logits
                        └► norm ─► attention ─┘└► norm ─► SwiGLU ─┘

It is today's usual decoder: RMSNorm before each part, rotary positions (arXiv:2104.09864), causal attention by
`scaled_dot_product_attention`, a SwiGLU (arXiv:2002.05202), no biases, a tied head. Everything around the layers is
`Mamba2LM`'s: initialisation, loss, trainer, completer. So what differs between two runs is the architecture alone.

Sizes are matched as the Mamba papers match theirs (arXiv:2405.21060, section 9.2): one Transformer layer, attention of
4 d^2 parameters and an MLP of about 8 d^2, does the work of two Mamba-2 layers of about 6 d^2 each.
`TransformerConfig.matching` halves the layers and gives the SwiGLU the width that makes the parameters equal.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mamba2_min import files, validate
from mamba2_min.checkpoints import checkpoint
from mamba2_min.config import LARGEST_SIZE, Mamba2Config
from mamba2_min.errors import UserError
from mamba2_min.models.base import Backbone, LanguageModel, RMSNorm, register_state
from mamba2_min.models.bypass import Watch, forwards, is_plain
from mamba2_min.models.evaluating import evaluating
from mamba2_min.models.init import init_transformer
from mamba2_min.models.inputs import check_step
from mamba2_min.ops.autograd import widest

_ARCHITECTURE = "transformer"  # in a saved config, so that it is not taken for a Mamba-2's
_FF_MULTIPLE = 8  # widths of the SwiGLU: a bfloat16 row then fills whole 16-byte loads
_BLOCK = 256  # the least number of tokens by which a cache grows


@dataclass(frozen=True)
class TransformerConfig:
    """The hyper-parameters of a `TransformerLM`. Impossible values raise ValueError."""

    vocab_size: int
    d_model: int = 256
    n_layer: int = 2
    headdim: int = 64  # channels a head
    d_ff: int = 768  # width of the SwiGLU
    rope_base: float = 10_000.0  # the slowest rotation takes 2 pi times this many tokens
    dropout: float = 0.0  # on what each attention and each SwiGLU adds to the residual stream
    tie_embeddings: bool = True
    pad_vocab_size_multiple: int = 1
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "n_layer", "headdim", "d_ff", "pad_vocab_size_multiple"):
            validate.integer(name, getattr(self, name), 1, LARGEST_SIZE)
        validate.boolean("tie_embeddings", self.tie_embeddings)
        for name in ("rope_base", "dropout", "norm_eps"):
            validate.number(name, getattr(self, name), 0, math.inf)
        if self.d_model % self.headdim or self.headdim % 2:
            raise ValueError(f"headdim must be even and divide d_model = {self.d_model}, and {self.headdim} does not")
        if self.dropout >= 1:
            raise ValueError(f"dropout must lie in [0, 1), not {self.dropout}")

    @classmethod
    def matching(cls, mamba: Mamba2Config, n_layer: int | None = None) -> TransformerConfig:
        """The Transformer of the same d_model, vocabulary and, within 1% for usual sizes, number of parameters.

        n_layer: half the Mamba-2's unless given; with as many, the SwiGLU is only about 0.8 d_model wide.
        Raises ValueError where d_model is odd or the layers leave nothing for the SwiGLU.
        """
        n_layer = n_layer or -(-mamba.n_layer // 2)
        d = mamba.d_model
        even = [width for width in range(2, d + 1, 2) if d % width == 0]
        if not even:
            raise ValueError(f"rotary positions need an even d_model, and {d} is odd")
        shape = cls(
            vocab_size=mamba.vocab_size,
            d_model=d,
            n_layer=n_layer,
            d_ff=1,
            dropout=mamba.dropout,
            headdim=min(even, key=lambda width: abs(width - 64)),
            tie_embeddings=mamba.tie_embeddings,
            pad_vocab_size_multiple=mamba.pad_vocab_size_multiple,
            norm_eps=mamba.norm_eps,
        )
        width = 1 + (mamba.num_parameters() - shape.num_parameters()) / (3 * d * n_layer)
        if width < 1:
            raise ValueError(f"attention alone, in {n_layer} layers, has more parameters than the whole Mamba-2")
        multiple = _FF_MULTIPLE if width >= _FF_MULTIPLE else 1
        return dataclasses.replace(shape, d_ff=multiple * round(width / multiple))

    @property
    def n_head(self) -> int:
        return self.d_model // self.headdim

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: vocab_size rounded up to a multiple of pad_vocab_size_multiple."""
        return -(-self.vocab_size // self.pad_vocab_size_multiple) * self.pad_vocab_size_multiple

    def num_parameters(self) -> int:
        """Parameters of the model, counted from the shapes alone."""
        d = self.d_model
        layer = 4 * d * d + 3 * d * self.d_ff + 2 * d
        heads = 1 if self.tie_embeddings else 2
        return heads * self.padded_vocab_size * d + self.n_layer * layer + d

    def to_dict(self) -> dict[str, Any]:
        return {"architecture": _ARCHITECTURE, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TransformerConfig:
        """The config that `to_dict` gave. Raises ValueError for another architecture's or for unknown keys."""
        values = dict(values)
        if values.pop("architecture", None) != _ARCHITECTURE:
            raise ValueError("this is not the config of a Transformer")
        unknown = values.keys() - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(f"unknown config keys {sorted(unknown)}")
        return cls(**values)


@register_state
@dataclass(eq=False)
class KVCache:
    """What a Transformer remembers of the tokens so far: all of them, in keys and values.

    keys, values: a tensor (b, h, capacity, headdim) per layer, of which the first `length` tokens count.
    begin: (b,), where each row's current document begins; what precedes is not seen. None: at 0 in every row.
    """

    keys: list[Tensor]
    values: list[Tensor]
    length: int = 0
    begin: Tensor | None = None

    @property
    def batch(self) -> int:
        return len(self.keys[0])

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.keys, *self.values))

    def clone(self) -> KVCache:
        return self._map(Tensor.clone)

    def detach(self) -> KVCache:
        """The same numbers without their history: what is carried from window to window."""
        return self._map(Tensor.detach)

    def _map(self, change: Callable[[Tensor], Tensor]) -> KVCache:
        begin = None if self.begin is None else change(self.begin)
        return KVCache([change(t) for t in self.keys], [change(t) for t in self.values], self.length, begin)


class Attention(nn.Module):
    """Causal self-attention with rotary positions: (b, l, d_model) -> (b, l, d_model)."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.qkv_proj = nn.Linear(config.d_model, 3 * config.d_model, bias=False)
        self.out_proj = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(
        self, x: Tensor, past: tuple[Tensor, Tensor] | None, rotation: tuple[Tensor, Tensor], mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`past`: keys and values (b, h, past, headdim) before x. Returns also those of past and x together.

        mask (b or 1, 1, l, past + l): True where a token may look; None: causal, and there is no past.
        """
        q, k, v = self._project(x, rotation)
        if past is not None:
            k, v = (torch.cat([old.to(new.dtype), new], dim=2) for old, new in zip(past, (k, v), strict=True))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.out_proj(y.transpose(1, 2).flatten(2)), k, v

    def step(
        self, x: Tensor, keys: Tensor, values: Tensor, at: int, rotation: tuple[Tensor, Tensor], mask: Tensor | None
    ) -> Tensor:
        """One token, x (b, d_model), which is written into the cache at place `at`."""
        q, k, v = self._project(x[:, None], rotation)
        keys[:, :, at], values[:, :, at] = k[:, :, 0], v[:, :, 0]
        seen = keys[:, :, : at + 1].to(q.dtype), values[:, :, : at + 1].to(q.dtype)
        y = F.scaled_dot_product_attention(q, *seen, attn_mask=mask)
        return self.out_proj(y.flatten(1))

    def _project(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.qkv_proj(x).unflatten(-1, (3, -1, self.config.headdim))  # (b, l, 3, h, headdim)
        qk = rotate(qkv[:, :, :2], *rotation)
        q, k = qk.unbind(2)
        return q.transpose(1, 2), k.transpose(1, 2), qkv[:, :, 2].transpose(1, 2)


def rotary_angles(positions: Tensor, headdim: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine (l, 1, 1, headdim / 2) of each position's rotations, the fastest one radian a token."""
    speeds = base ** (-torch.arange(0, headdim, 2, device=positions.device, dtype=positions.dtype) / headdim)
    angles = torch.outer(positions, speeds)[:, None, None]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates channel i of (..., headdim) together with channel i + headdim / 2 (arXiv:2104.09864, equation 34).

    The product of a rotated query and a rotated key then depends on how far apart they are, not on where they stand.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1).to(x.dtype)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), gate and up as one projection."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.gate_up_proj = nn.Linear(config.d_model, 2 * config.d_ff, bias=False)
        self.out_proj = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.out_proj(F.silu(gate) * up)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), with dropout on what is added."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = Attention(config)
        self.norm2 = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = SwiGLU(config)
        self.dropout = config.dropout

    def forward(self, x, past, rotation, mask):
        out, keys, values = self.mixer(self.norm(x), past, rotation, mask)
        x = x + F.dropout(out, self.dropout, self.training)
        return x + F.dropout(self.mlp(self.norm2(x)), self.dropout, self.training), keys, values

    def step(self, x, keys, values, at, rotation, mask):
        x = x + self.mixer.step(self.norm(x), keys, values, at, rotation, mask)
        return x + self.mlp(self.norm2(x))


class TransformerBackbone(Backbone):
    """Everything before the head: (b, l) -> (b, l, d_model) after the last norm, and the cache."""

    def __init__(self, config: TransformerConfig):
        super().__init__(config, Block)

    def forward(
        self,
        input_ids: Tensor | None,
        state: KVCache | None = None,
        seq_idx: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> tuple[Tensor, KVCache]:
        x = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        b, l, _ = x.shape
        past, begin = (0, None) if state is None else (state.length, state.begin)
        mask, begin = _visible(past, b, l, begin, seq_idx, x.device)
        rotation = self.rotation(past, l, x)
        new = KVCache([], [], past + l, begin)
        for i, block in enumerate(self.layers):
            before = (state.keys[i][:, :, :past], state.values[i][:, :, :past]) if state is not None and past else None
            x, keys, values = self.run_block(block, x, before, rotation, mask)
            new.keys.append(keys)
            new.values.append(values)
        return self.norm_f(x), new

    @property
    def blocks(self) -> list[Block]:
        """The layers, as what they were built of."""
        return cast(list[Block], list(self.layers))

    def rotation(self, start: int, l: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Angles of the places start to start + l, in digits that late ones need, then in those of the activations."""
        positions = torch.arange(start, start + l, device=x.device, dtype=widest(x.device))
        cos, sin = rotary_angles(positions, self.config.headdim, self.config.rope_base)
        kept = torch.promote_types(x.dtype, torch.float32)
        return cos.to(kept), sin.to(kept)


class TransformerLM(LanguageModel):
    """The language model, with the interface of `Mamba2LM`. Its state is a `KVCache`.

    `config` fixes its shape; `seed` draws its parameters, or torch's own generator if None.
    """

    backbone: TransformerBackbone

    def __init__(self, config: TransformerConfig, seed: int | None = None):
        super().__init__()
        self._build(config, TransformerBackbone, init_transformer, seed)

    def initial_state(self, batch: int = 1) -> KVCache:
        """The state before any token: an empty cache."""
        c, dtype, device = self.config, self.lm_head.weight.dtype, self.ids_device
        empty = [torch.empty(batch, c.n_head, 0, c.headdim, dtype=dtype, device=device) for _ in range(2 * c.n_layer)]
        return KVCache(empty[: c.n_layer], empty[c.n_layer :])

    @torch.no_grad()
    def step(self, ids: Tensor, state: KVCache) -> tuple[Tensor, KVCache]:
        """One token per row, ids (b,): logits (b, vocab_size) and the state, which is changed in place and returned.

        Raises ValueError for ids outside the vocabulary or not as many as the state's rows.
        """
        ids = check_step(ids, state.batch, self.config.vocab_size)
        if not self._is_plain(state):
            with evaluating(self):
                logits, new = self(ids[:, None], state)
            state.keys[:], state.values[:], state.length, state.begin = new.keys, new.values, new.length, new.begin
            return logits[:, 0], state
        at = state.length
        if at >= state.keys[0].shape[2]:
            _grow(state)
        mask = None
        if state.begin is not None:
            mask = (torch.arange(at + 1, device=ids.device) >= state.begin[:, None])[:, None, None]
        x = self.backbone.embedding(ids)
        rotation = self.backbone.rotation(at, 1, x)
        for i, block in enumerate(self.backbone.blocks):
            x = block.step(x, state.keys[i], state.values[i], at, rotation, mask)
        state.length += 1
        return self.lm_head(self.backbone.norm_f(x))[:, : self.config.vocab_size], state

    def _is_plain(self, state: KVCache) -> bool:
        """Whether `step` may go around the modules."""
        watch = _watches.get(state)
        if watch is None or not watch.sees_no_change(self):
            if not all(is_plain(module, _KNOWN) for module in self.modules()):
                return False
            _watches[state] = Watch(self)
        return True

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> TransformerLM:
        """The model that `save_pretrained` or `train.py` left in a folder. Raises UserError where it cannot be read."""
        folder = Path(folder)
        try:
            config = TransformerConfig.from_dict(files.load_json(folder / checkpoint.CONFIG))
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{folder / checkpoint.CONFIG}: {error}") from error
        model = cls(config)
        checkpoint.load_weights(model, checkpoint.load_tensors(folder / checkpoint.WEIGHTS), folder)
        return model.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json and model.pt. Raises UserError where the folder cannot be written."""
        checkpoint.save_model(folder, self.config, self.state_dict())


_KNOWN = forwards(
    TransformerLM, TransformerBackbone, Block, Attention, SwiGLU, RMSNorm, nn.Linear, nn.Embedding, nn.ModuleList
)
_watches: WeakKeyDictionary[KVCache, Watch] = WeakKeyDictionary()  # of the model with which a text is written


def _visible(
    past: int, b: int, l: int, begin: Tensor | None, seq_idx: Tensor | None, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Which of past + l tokens each of the last l may look at, and where each row's last document begins.

    The mask is None where it is the causal one from the first token on: attention then needs none in memory.
    """
    if seq_idx is None and begin is None and past == 0:
        return None, None
    at = torch.arange(past + l, device=device)
    causal = at <= at[past:, None]  # (l, past + l)
    if seq_idx is None and begin is None:
        return causal[None, None], None
    begins = torch.zeros(b, l, dtype=torch.int64, device=device)  # of each token's document
    if begin is not None:
        begins += begin[:, None]
    if seq_idx is not None:
        starts = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))  # the first token goes on with the past
        begins = torch.where(starts, at[past:], begins).cummax(1).values
    return (causal & (at >= begins[..., None]))[:, None], begins[:, -1]


def _grow(state: KVCache) -> None:
    """Makes room for more tokens: half as many again, so that all the copying together stays in proportion."""
    room = max(_BLOCK, state.length // 2)
    for tensors in (state.keys, state.values):
        for i, old in enumerate(tensors):
            tensors[i] = F.pad(old[:, :, : state.length], (0, 0, 0, room))
