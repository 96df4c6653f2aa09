"""How the parameters of a new model are drawn."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mamba2_min.ssd.hippo import a_log_init, dt_bias_init

if TYPE_CHECKING:
    from mamba2_min.models.mamba2 import Mamba2LM
    from mamba2_min.models.transformer import TransformerLM


@torch.no_grad()
def init_mamba2(model: Mamba2LM, generator: torch.Generator) -> None:
    """Draws every parameter of a new model.

    parameter          drawn from                       why
    embedding, head    N(0, 0.02)                       logits start small, so the loss starts at log(vocab_size)
    in_proj            U(+-1/sqrt(d_model))             outputs of variance 1/3 from inputs of variance 1
    out_proj           U(+-1/sqrt(d_inner))/sqrt(n_layer)  the residual stream keeps its scale, however deep (GPT-2)
    conv1d             U(+-1/sqrt(d_conv))              the same, over its taps
    A_log              S4D-Real or log U(1, 16)         ssd/hippo.py: one time scale per head
    dt_bias            softplus^-1 of log-uniform dt    a head's step, and so its memory, from 10 to 1000 tokens
    D, norms           1                                the skip and the scales start neutral
    biases             0 (in_proj, out_proj)            nothing to learn from yet
    """
    c = model.config
    model.backbone.embedding.weight.normal_(0, 0.02, generator=generator)
    if not c.tie_embeddings:
        model.lm_head.weight.normal_(0, 0.02, generator=generator)
    for block in model.backbone.blocks:
        mixer = block.mixer
        _uniform(mixer.in_proj.weight, c.d_model, generator)
        _uniform(mixer.out_proj.weight, c.d_inner * c.n_layer, generator)
        for projection in (mixer.in_proj, mixer.out_proj):
            if projection.bias is not None:
                projection.bias.zero_()
        for taps in mixer.conv1d.parameters():  # the weight, and the bias if there is one
            _uniform(taps, c.d_conv, generator)
        mixer.A_log.copy_(a_log_init(c.nheads, c.a_init, generator))
        mixer.dt_bias.copy_(dt_bias_init(c.nheads, c.dt_min, c.dt_max, c.dt_init_floor, generator))
        for ones in (mixer.D, mixer.norm.weight, block.norm.weight):
            ones.fill_(1)
    model.backbone.norm_f.weight.fill_(1)


@torch.no_grad()
def init_transformer(model: TransformerLM, generator: torch.Generator) -> None:
    """Draws every parameter of a new model by the rules of `init_mamba2`.

    Embedding N(0, 0.02), projections U(+-1/sqrt(inputs)), norms 1; the projections that end on the residual stream, two
    a layer, are divided by sqrt(2 n_layer).
    """
    model.backbone.embedding.weight.normal_(0, 0.02, generator=generator)
    if not model.config.tie_embeddings:
        model.lm_head.weight.normal_(0, 0.02, generator=generator)
    ends = 2 * model.config.n_layer
    for block in model.backbone.blocks:
        for first, last in ((block.mixer.qkv_proj, block.mixer.out_proj), (block.mlp.gate_up_proj, block.mlp.out_proj)):
            _uniform(first.weight, first.in_features, generator)
            _uniform(last.weight, last.in_features * ends, generator)


def _uniform(parameter: Tensor, inputs: int, generator: torch.Generator) -> None:
    """U(+-1/sqrt(inputs))"""
    bound = 1 / math.sqrt(inputs)
    parameter.uniform_(-bound, bound, generator=generator)
