"""Narrower weights for writing text: a token reads every weight once, so that narrower weights take less time.

    int8    a row w of a matrix is integers q from -127 to 127 and one scale s: w ~ s q, |w - s q| <= s / 2
    bf16    a float32 cut to 8 digits: |w - w'| <= |w| / 256

The matrices become narrow: projections, embedding, head. All vectors (norms, A, dt, the convolution), the state and the
activations stay float32. A narrow product rounds its inputs and results to bf16 and sums in float32. A quantized model
writes text on a CPU; it can be neither trained nor saved.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mamba2_min import validate
from mamba2_min.checkpoints import checkpoint
from mamba2_min.errors import UserError
from mamba2_min.inference import stepping  # noqa: F401  the fast forms of `Mamba2LM.step`
from mamba2_min.models.bypass import forwards, is_plain
from mamba2_min.models.mamba2 import Mamba2LM

KINDS = ("int8", "bf16")

_FEW_ROWS = 8  # for more, it is faster to widen the weight than to use the int8 product
_NARROWED = ("embedding", "lm_head", "in_proj", "out_proj")
_PLAIN = forwards(nn.Linear, nn.Embedding)
_MULTIPLE = 16  # PyTorch's int8 product is right only for a number of columns that is a multiple of it
_PART = 1024  # rows that are converted at a time, so that no second float matrix exists


class Int8Matrix(nn.Module):
    """A matrix (rows, columns) as integers and one scale per row."""

    row_wise = True
    numbers: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor):
        super().__init__()
        self.columns = weight.shape[1]
        # The product takes its scales as bf16. They are rounded first, and the integers are chosen for the rounded
        # scales: 127 max / 127 (1 + 2^-8) still rounds to 127.
        scale = (weight.detach().float().abs().amax(1) / 127).bfloat16()
        scale = torch.where(scale > 0, scale, 1.0)  # of a row of zeros
        numbers = torch.zeros(len(weight), self.columns + -self.columns % _MULTIPLE, dtype=torch.int8)
        for part in range(0, len(weight), _PART):
            rows = slice(part, part + _PART)
            quotient = weight.detach()[rows].float() / scale[rows, None].float()
            numbers[rows, : self.columns] = quotient.round_().clamp_(-127, 127).to(torch.int8)
        self.register_buffer("numbers", numbers)
        self.register_buffer("scale", scale)

    def rows(self, ids: Tensor) -> Tensor:
        """ids (...) -> float32 (..., columns)"""
        return self.numbers[ids][..., : self.columns].float().mul_(self.scale[ids][..., None])

    def widened(self) -> Tensor:
        """The float32 matrix (rows, columns) that this one stands for."""
        return self.numbers[:, : self.columns].float().mul_(self.scale[:, None])

    def product(self, x: Tensor) -> Tensor:
        """x (b, columns) -> x W^T, (b, rows) float32"""
        if len(x) > _FEW_ROWS:
            return F.linear(x.float(), self.widened())
        if x.shape[1] != self.numbers.shape[1]:
            x = F.pad(x, (0, self.numbers.shape[1] - x.shape[1]))
        return torch._weight_int8pack_mm(x.bfloat16(), self.numbers, self.scale).float()


class Bf16Matrix(nn.Module):
    """A matrix (rows, columns) in bf16."""

    row_wise = True
    numbers: Tensor

    def __init__(self, weight: Tensor):
        super().__init__()
        self.register_buffer("numbers", weight.detach().bfloat16())

    def rows(self, ids: Tensor) -> Tensor:
        """ids (...) -> float32 (..., columns)"""
        return self.numbers[ids].float()

    def widened(self) -> Tensor:
        """The float32 matrix (rows, columns) that this one stands for."""
        return self.numbers.float()

    def product(self, x: Tensor) -> Tensor:
        """x (b, columns) -> x W^T, (b, rows) float32"""
        x = x.bfloat16()
        if len(x) == 1:  # PyTorch has a product for one row, which is twice as fast
            return torch.mv(self.numbers, x[0])[None].float()
        return F.linear(x, self.numbers).float()


class NarrowLinear(nn.Module):
    """nn.Linear with a narrow matrix: (..., in_features) -> float32 (..., out_features)."""

    row_wise = True
    bias: Tensor | None

    def __init__(self, matrix: Int8Matrix | Bf16Matrix, bias: Tensor | None):
        super().__init__()
        self.matrix = matrix
        self.register_buffer("bias", None if bias is None else bias.detach().float())

    @property
    def weight(self) -> Tensor:
        """The float32 weight that the matrix stands for, made at each call."""
        return self.matrix.widened()

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 2:
            return self(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
        out = self.matrix.product(x)
        return out if self.bias is None else out.add_(self.bias)

    def _save_to_state_dict(self, *args: Any) -> None:
        raise UserError("a quantised model is not saved: the model that it was made from has more digits")


class NarrowEmbedding(nn.Module):
    """nn.Embedding with a narrow matrix."""

    row_wise = True

    def __init__(self, matrix: Int8Matrix | Bf16Matrix):
        super().__init__()
        self.matrix = matrix

    def forward(self, ids: Tensor) -> Tensor:
        return self.matrix.rows(ids)


@torch.no_grad()
def quantize(model: Mamba2LM, kind: str) -> Mamba2LM:
    """Makes a model's matrices narrow in place, one after the other, and returns the model in evaluation mode.

    kind: "int8" or "bf16"; anything else is a ValueError. Raises UserError where the model is not on a CPU, one of its
    projections is not a plain nn.Linear (an adapter, a hook), or this PyTorch has no product for that kind.
    """
    validate.one_of("kind", kind, KINDS)
    device = model.backbone.norm_f.weight.device.type
    if device != "cpu":
        raise UserError(f"{kind} weights are for a CPU, not for {device}; take the device cpu")
    _check_product(kind)
    for name, module in model.named_modules():
        if name.endswith(_NARROWED) and not is_plain(module, _PLAIN):
            raise UserError(f"{name} is not a plain layer, and would lose what it adds: merge adapters, remove hooks")
    narrow = Int8Matrix if kind == "int8" else Bf16Matrix
    model.float()
    tied = model.lm_head.weight is model.backbone.embedding.weight
    matrix = narrow(model.lm_head.weight)
    embedding = matrix if tied else narrow(model.backbone.embedding.weight)
    model.backbone.register_module("embedding", NarrowEmbedding(embedding))
    model.register_module("lm_head", NarrowLinear(matrix, model.lm_head.bias))
    for block in model.backbone.blocks:
        for name in ("in_proj", "out_proj"):
            linear = getattr(block.mixer, name)
            setattr(block.mixer, name, NarrowLinear(narrow(linear.weight), linear.bias))
    return model.requires_grad_(False).eval()


def load_quantized(folder: str | Path, kind: str) -> Mamba2LM:
    """`Mamba2LM.from_pretrained` and `quantize`, with no more float32 weights in memory than the file has."""
    config, weights = checkpoint.load_model(folder)
    with torch.device("meta"):  # shapes alone
        model = Mamba2LM(config, seed=0)
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, assign=True)
    del weights
    if config.tie_embeddings:
        model.lm_head.weight = model.backbone.embedding.weight
    return quantize(model, kind)


def _check_product(kind: str) -> None:
    """Tries the smallest product, so that a missing one is reported in one line before any matrix is converted."""
    try:
        matrix: Any = (Int8Matrix if kind == "int8" else Bf16Matrix)(torch.ones(_MULTIPLE, _MULTIPLE))
        matrix.product(torch.ones(1, _MULTIPLE))
    except (AttributeError, NotImplementedError, RuntimeError) as error:
        other = "bf16" if kind == "int8" else "none"
        raise UserError(f"this PyTorch ({torch.__version__}) has no {kind} product here; take {other}") from error
