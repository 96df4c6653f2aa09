"""What every language model here can do, whatever its layers are: loss, prompt, generation.

A model gives `hidden`, `step` and `initial_state`; the rest follows. The trainer, the completer and the evaluation use
nothing else, so that an architecture is compared with another by exchanging the model alone.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mamba2_min.ops.loss import linear_cross_entropy
from mamba2_min.ops.sampling import Sampler

_PREFILL_SLICE = 2048  # tokens of a prompt that are read at a time


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's two groups of parameters: matrices are decayed; vectors (A_log, D, dt_bias, norms, biases) and the
    convolution's taps, one vector per channel, never are."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() == 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() != 2], "weight_decay": 0.0},
    ]


class LanguageModel(nn.Module, ABC):
    """Token ids in, logits and a state out. A subclass sets `config`, with a `vocab_size`, and `lm_head`."""

    config: Any
    lm_head: nn.Linear
    recompute = False  # whether training computes each block again in the backward pass, instead of keeping it
    _compiled: Callable | None = None  # a block's forward

    def compile_blocks(self, on: bool = True) -> None:
        """Has one block compiled, for all layers to use while training, and the loss on a GPU. At the first batch, that
        is: an error of the compiler comes then. What is not training, with its changing lengths, is not compiled."""
        self._compiled = torch.compile(type(self.backbone.layers[0]).forward, dynamic=False) if on else None

    def _run_block(self, block: nn.Module, *args: Any) -> Any:
        if not self.training or (self._compiled is None and not self.recompute):
            return block(*args)
        run = block if self._compiled is None else functools.partial(self._compiled, block)
        return checkpoint(run, *args, use_reentrant=False) if self.recompute else run(*args)

    def _build(
        self, config: Any, backbone: type[nn.Module], init: Callable[[Any, torch.Generator], None], seed: int | None
    ) -> None:
        """Sets `config`, `backbone` and `lm_head`, and has `init` draw their parameters: from `seed`, or from a seed
        that torch's own generator draws if None."""
        if seed is None:
            seed = int(torch.randint(2**62, ()))
        self.config = config
        with torch.random.fork_rng(devices=[]):  # PyTorch's modules draw numbers of their own, which nobody will see
            self.backbone = backbone(config)
            self.lm_head = nn.Linear(config.d_model, config.padded_vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight
        init(self, torch.Generator().manual_seed(seed))

    @abstractmethod
    def hidden(self, input_ids: Tensor, state: Any = None, seq_idx: Tensor | None = None) -> tuple[Tensor, Any]:
        """What the head reads: (b, l, d_model) after the last norm, and the state. Arguments as for `forward`."""

    @abstractmethod
    def step(self, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        """One token a row, ids (b,): logits (b, vocab_size) and the state, which is changed in place and returned."""

    @abstractmethod
    def initial_state(self, batch: int = 1) -> Any:
        """The state before any token."""

    def forward(self, input_ids: Tensor, state: Any = None, seq_idx: Tensor | None = None) -> tuple[Tensor, Any]:
        """Logits (b, l, vocab_size) for every next token, and the state after the last.

        input_ids (b, l) int64, l >= 1; a `state` that an earlier call returned is continued exactly. seq_idx (b, l):
        documents packed in a row do not see each other; padding is a document of its own.
        Raises ValueError for ids outside the vocabulary or of the wrong shape.
        """
        hidden, state = self.hidden(input_ids, state, seq_idx)
        return self.lm_head(hidden)[..., : self.config.vocab_size], state

    def loss(self, input_ids: Tensor, targets: Tensor, state: Any = None, seq_idx: Tensor | None = None) -> Tensor:
        """Mean cross-entropy in nats over the targets (b, l) that are not -100. The logits are never held."""
        hidden, _ = self.hidden(input_ids, state, seq_idx)
        compiled = self.training and self._compiled is not None
        return linear_cross_entropy(hidden, self.lm_head.weight, targets, self.config.vocab_size, compiled=compiled)

    @torch.no_grad()
    def prefill(self, input_ids: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Reads a prompt (b, l) in slices, to bound what is held at a time: the last logits (b, v), the state."""
        training = self.training
        self.eval()  # a prompt is read without dropout, as `step` reads what follows it
        try:
            for part in input_ids.split(_PREFILL_SLICE, dim=1):
                hidden, state = self.hidden(part, state)
        finally:
            self.train(training)
        return self.lm_head(hidden[:, -1])[:, : self.config.vocab_size], state

    @torch.no_grad()
    def generate(
        self,
        prompt_ids: Sequence[int],
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repeat_penalty: float = 1.0,
        seed: int | None = None,
        stop_ids: Sequence[int] = (),
    ) -> Iterator[int]:
        """Yields up to max_new_tokens ids that continue prompt_ids, until one of stop_ids, which is not yielded.

        Temperature 0 takes the likeliest. What a token costs is what `step` costs.
        Raises ValueError for an empty prompt, an id outside the vocabulary, or impossible sampling values.
        """
        sampler = Sampler(temperature, top_k, top_p, min_p, repeat_penalty, seed)
        history = list(prompt_ids)
        if not history:
            raise ValueError("the prompt is empty; start a document with its end-of-document token")
        return self._generate(history, max_new_tokens, sampler, frozenset(stop_ids))

    @torch.no_grad()
    def _generate(self, history: list[int], max_new_tokens: int, sampler: Sampler, stop_ids: frozenset[int]):
        device = next(self.parameters()).device
        logits, state = self.prefill(torch.tensor([history], device=device))
        for k in range(max_new_tokens):
            token = sampler.pick(logits[0], history)
            if token in stop_ids:
                return
            yield token
            history.append(token)
            if k + 1 < max_new_tokens:
                logits, state = self.step(torch.tensor([token], device=device), state)

    def _check_ids(self, ids: Tensor) -> None:
        if ids.dim() != 2 or ids.shape[1] < 1:
            raise ValueError(f"input_ids must be (b, l) with l >= 1, not {tuple(ids.shape)}")
        if ids.device.type != "cpu" or not ids.numel():
            return  # on a GPU the check would wait for the device; there the embedding's own assertion stands guard
        if not 0 <= int(ids.min()) <= int(ids.max()) < self.config.vocab_size:
            raise ValueError(f"input_ids must lie in [0, {self.config.vocab_size}), the vocabulary")
