"""Functions within kernels, for those of several files."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def softplus(v):
    """log(1 + exp(v)), to the last digits also where it is small: log(1 + e) = 2 artanh(e / (2 + e)), e <= 1."""
    e = tl.exp(-tl.abs(v))
    s = e / (2 + e)
    q = s * s
    series = 1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13 + q * (1 / 15)))))))
    return tl.maximum(v, 0.0) + 2 * s * series


@triton.jit
def softplus_slope(v):
    """The derivative of softplus where its value is v > 0: 1 - exp(-v), by a series where v is small."""
    near = v * (1 - v / 2 * (1 - v / 3 * (1 - v / 4 * (1 - v / 5 * (1 - v / 6)))))
    return tl.where(v < 0.25, near, 1 - tl.exp(-v))
