"""What every language model here can do, whatever its layers are: loss, prompt, generation.

A model defines its backbone, `step` and `initial_state`; the rest is here. The trainer, the completer and the
evaluation use nothing else, so that architectures can be compared by exchanging the model.
"""

from __future__ import annotations

import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from mamba2_min import validate
from mamba2_min.models.bypass import forwards, is_hooked, is_plain
from mamba2_min.models.called import cross_entropy_by_module
from mamba2_min.models.evaluating import evaluating
from mamba2_min.models.inputs import as_ids, check_inputs, one_prompt
from mamba2_min.ops.autograd import is_traced
from mamba2_min.ops.loss import linear_cross_entropy
from mamba2_min.ops.norm import rms_norm
from mamba2_min.ops.sampling import Sampler

_PREFILL_SLICE = 2048  # tokens of a prompt that are read at a time
_LINEAR = forwards(nn.Linear)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's two groups of parameters: matrices are decayed; vectors (A_log, D, dt_bias, norms, biases) and the
    convolution's taps, one vector per channel, never are, nor is a table of which some rows alone are trained."""
    parameters = [p for p in model.parameters() if p.requires_grad]

    def is_decayed(p: Tensor) -> bool:
        return p.dim() == 2 and not hasattr(p, "trained_rows")

    return [
        {"params": [p for p in parameters if is_decayed(p)], "weight_decay": weight_decay},
        {"params": [p for p in parameters if not is_decayed(p)], "weight_decay": 0.0},
    ]


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in float32 (arXiv:1910.07467)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Backbone(nn.Module):
    """Embedding, blocks and last norm, under the names of the official checkpoints. A model adds the `forward`."""

    recompute = False  # whether training computes each block again in the backward pass, instead of keeping it
    sharded = False  # whether the weights are divided among processes, and are whole within `loss_and_state`
    compiled: Mapping[type, Callable[..., Any]] = {}  # in training: each class of blocks with its compiled forward

    def __init__(self, config: Any, block: Callable[[Any], nn.Module]):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.padded_vocab_size, config.d_model)
        self.layers = nn.ModuleList(block(config) for _ in range(config.n_layer))
        self.norm_f = RMSNorm(config.d_model, config.norm_eps)

    def run_block(self, block: nn.Module, *args: Any) -> Any:
        """Calls a block: compiled, or with recomputation, if training asks for it. One with hooks is not compiled."""
        if not self.training or not (self.compiled or self.recompute):
            return block(*args)
        run: Callable[..., Any] = block
        forward = self.compiled.get(type(block))
        if forward is not None and not any(map(is_hooked, block.modules())):
            run = functools.partial(forward, block)
        return checkpoint(run, *args, use_reentrant=False) if self.recompute else run(*args)

    def __getstate__(self) -> dict[str, Any]:
        """A copy, or a file, is not compiled: compiled functions cannot be copied."""
        return {name: value for name, value in super().__getstate__().items() if name != "compiled"}


class LanguageModel(nn.Module, ABC):
    """Token ids in, logits and a state out. A subclass sets `config` with a `vocab_size`, `backbone` and `lm_head`."""

    config: Any
    backbone: Backbone
    lm_head: nn.Linear

    @property
    def recompute(self) -> bool:
        """Whether training computes each block again in the backward pass, instead of keeping what it computed."""
        return self.backbone.recompute

    @recompute.setter
    def recompute(self, on: bool) -> None:
        self.backbone.recompute = on

    def compile_blocks(self, on: bool = True) -> None:
        """Has training compile one block, which all layers use, and on a GPU the loss. The compiler's errors come with
        the first batch. Inference has changing lengths and is not compiled."""
        classes: set[type[nn.Module]] = set(map(type, self.backbone.layers)) if on else set()
        self.backbone.compiled = {cls: torch.compile(cls.forward, dynamic=False) for cls in classes}

    def _build(
        self, config: Any, backbone: Callable[[Any], Backbone], init: Callable[[Any, torch.Generator], None], seed: Any
    ) -> None:
        """Sets `config`, `backbone` and `lm_head`, and has `init` draw their parameters: from `seed`, or from a seed
        that torch's own generator draws if None. Drawn on the CPU, the same seed gives the same weights everywhere."""
        if seed is None:
            seed = 0 if is_traced() else int(torch.randint(2**62, (), device="cpu"))
        self.config = config
        target = torch.get_default_device()
        # PyTorch's modules draw initial values of their own, which are replaced.
        with torch.device("meta" if target.type == "meta" else "cpu"), torch.random.fork_rng(devices=[]):
            self.backbone = backbone(config)
            self.lm_head = nn.Linear(config.d_model, config.padded_vocab_size, bias=False)
            if config.tie_embeddings:
                self.lm_head.weight = self.backbone.embedding.weight
            init(self, torch.Generator("cpu").manual_seed(seed))
        if target.type not in ("cpu", "meta"):
            self.to(target)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LanguageModel:
        """What `to`, `half`, `to_empty` and the like do. Where PyTorch makes new parameters, a tied head stays tied."""
        tied = _is_tied(self)
        super()._apply(fn, recurse)
        if tied:
            self.lm_head.weight = self.backbone.embedding.weight
        return self

    @abstractmethod
    def step(self, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        """One token per row, ids (b,): logits (b, vocab_size) and the state, which is changed in place and returned."""

    @abstractmethod
    def initial_state(self, batch: int = 1) -> Any:
        """The state before any token."""

    def start(self, batch: int) -> Any:
        """The state from which `forward` begins a text where it is given none; None: as if nothing had been read."""
        return None

    def hidden(
        self,
        input_ids: Tensor | None = None,
        state: Any = None,
        seq_idx: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        """What the head reads: (b, l, d_model) after the last norm, and the state. Arguments as for `forward`."""
        input_ids, shape = check_inputs(input_ids, inputs_embeds, self.config)
        if seq_idx is not None and seq_idx.shape != shape:
            raise ValueError(f"seq_idx must be {tuple(shape)}, as the input is, not {tuple(seq_idx.shape)}")
        if state is None:
            state = self.start(shape[0])
        elif not hasattr(state, "batch"):
            raise ValueError(f"state must be one that an earlier call returned, not a {type(state).__name__}")
        elif state.batch != shape[0]:
            raise ValueError(f"the state has {state.batch} rows, and the input {shape[0]}")
        return self.backbone(input_ids, state, seq_idx, inputs_embeds)

    def forward(
        self,
        input_ids: Tensor | None = None,
        state: Any = None,
        seq_idx: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        """Logits (b, l, vocab_size) for every next token, and the state after the last.

        input_ids (b, l), integers, l >= 1, or instead of them inputs_embeds (b, l, d_model), what the embedding would
        give; a `state` that an earlier call returned is continued exactly. seq_idx (b, l): documents packed in a row do
        not see each other; padding is a document of its own.
        Raises ValueError for ids outside the vocabulary or arguments of the wrong shape or type.
        """
        hidden, state = self.hidden(input_ids, state, seq_idx, inputs_embeds)
        return self.lm_head(hidden)[..., : self.config.vocab_size], state

    def loss(
        self,
        input_ids: Tensor | None,
        targets: Tensor,
        state: Any = None,
        seq_idx: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Mean cross-entropy in nats over the targets (b, l) that are not -100. The logits are never held together.

        The other arguments and the errors are those of `forward`; ValueError for targets outside the vocabulary too.
        """
        return self.loss_and_state(input_ids, targets, state, seq_idx, inputs_embeds)[0]

    def loss_and_state(
        self,
        input_ids: Tensor | None,
        targets: Tensor,
        state: Any = None,
        seq_idx: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        reduction: str = "mean",
    ) -> tuple[Tensor, Any]:
        """`loss`, and the state after the last token; reduction "sum" is the sum over the targets that count."""
        targets, size = as_ids(targets, "targets"), self.config.vocab_size
        if self.is_called():
            logits, state = self(input_ids, state, seq_idx, inputs_embeds)
            return cross_entropy_by_module(nn.Identity(), logits, targets, size, reduction), state
        hidden, state = self.hidden(input_ids, state, seq_idx, inputs_embeds)
        head = self.lm_head
        if is_plain(head, _LINEAR) and head.bias is None:
            compiled = self.training and bool(self.backbone.compiled)
            return linear_cross_entropy(hidden, head.weight, targets, size, reduction, compiled), state
        return cross_entropy_by_module(head, hidden, targets, size, reduction), state

    @torch.no_grad()
    def prefill(
        self,
        input_ids: Tensor | None = None,
        state: Any = None,
        seq_idx: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        """Reads a prompt (b, l): the last logits (b, vocab_size) and the state. Arguments and errors as for `forward`.

        It is read in slices, which bounds the memory (in one piece if there is seq_idx), and in evaluation mode:
        without dropout, as `step` reads what follows.
        """
        input_ids, shape = check_inputs(input_ids, inputs_embeds, self.config)
        step = _PREFILL_SLICE if seq_idx is None else shape[1]
        with evaluating(self):
            for start in range(0, shape[1], step):
                part = slice(start, start + step)
                ids, embeds = (t if t is None else t[:, part] for t in (input_ids, inputs_embeds))
                logits, state = _last_logits(self, ids, state, seq_idx, embeds)
        return logits, state

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

        Temperature 0 takes the likeliest. A token costs what `step` costs. Raises ValueError for an empty prompt, more
        than one prompt, an id outside the vocabulary, or impossible sampling values.
        """
        sampler = Sampler(temperature, top_k, top_p, min_p, repeat_penalty, seed)
        validate.integer("max_new_tokens", max_new_tokens, 0, 2**63 - 1)
        history = one_prompt(prompt_ids)
        return self._generate(history, max_new_tokens, sampler, frozenset(stop_ids))

    @torch.no_grad()
    def _generate(
        self, history: list[int], max_new_tokens: int, sampler: Sampler, stop_ids: frozenset[int]
    ) -> Iterator[int]:
        logits, state = self.prefill(torch.tensor([history], device=self.ids_device))
        for k in range(max_new_tokens):
            token = sampler.pick(logits[0], history)
            if token in stop_ids:
                return
            yield token
            history.append(token)
            if k + 1 < max_new_tokens:
                logits, state = self.step(torch.tensor([token], device=self.ids_device), state)

    @property
    def ids_device(self) -> torch.device:
        """Where ids go: to the weights, or to the CPU where those are offloaded, and hooks move both to each other."""
        device = next(self.parameters()).device
        return torch.device("cpu") if device.type == "meta" else device

    def is_called(self) -> bool:
        """Whether the model as a whole has to be called, because a call does more than `hidden` and the head."""
        return (is_hooked(self) and not self.backbone.sharded) or type(self).forward is not LanguageModel.forward


def _is_tied(model: LanguageModel) -> bool:
    """Whether the head and the embedding are ordinary modules and share their weight."""
    head, embedding = model.lm_head, model.backbone.embedding
    return isinstance(head, nn.Linear) and isinstance(embedding, nn.Embedding) and head.weight is embedding.weight


def _last_logits(
    model: LanguageModel, input_ids: Tensor | None, state: Any, seq_idx: Tensor | None, inputs_embeds: Tensor | None
) -> tuple[Tensor, Any]:
    """The logits after the last token, (b, vocab_size), and the state. No others are computed if that can be helped."""
    if model.is_called():
        logits, state = model(input_ids, state, seq_idx, inputs_embeds)
        return logits[:, -1], state
    hidden, state = model.hidden(input_ids, state, seq_idx, inputs_embeds)
    return model.lm_head(hidden[:, -1:])[:, 0, : model.config.vocab_size], state


def register_state(cls: type) -> type:
    """Has PyTorch treat a dataclass of tensors as a container (torch.func, torch.export, DDP), and load it from a file
    of torch.save without being allowed to run code."""
    names = [field.name for field in dataclasses.fields(cls)]
    pytree.register_pytree_node(
        cls,
        lambda state: ([getattr(state, name) for name in names], None),
        lambda values, _: cls(*values),
        serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
        flatten_with_keys_fn=lambda state: ([(pytree.GetAttrKey(name), getattr(state, name)) for name in names], None),
    )
    torch.serialization.add_safe_globals([cls])
    return cls
