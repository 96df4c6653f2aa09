"""HiPPO: how a state remembers, and what of it is left in one head of Mamba-2."""

from __future__ import annotations

import math

import torch


def s4d_real_A(nheads: int) -> torch.Tensor:
    """S4D-Real across the heads: A_h = -(h + 1), (h,) float32, in units of 1/time.

    It is the diagonal of the triangular HiPPO-LegS matrix, with one entry, so one time scale, a head.
    A bad `nheads` is a ValueError. Source: arXiv:2206.11893 (S4D), S4D-Real.
    """
    _check_count("nheads", nheads)
    return -torch.arange(1, nheads + 1, dtype=torch.float32)


def a_log_init(nheads: int, a_init: str, generator: torch.Generator | None = None) -> torch.Tensor:
    """A head's `A_log` = log(-A) at the start, (h,) float32, so that A = -exp(A_log) < 0 whatever training does.

    "hippo" is S4D-Real, A_h = -(h + 1); "uniform" draws -A from U(1, 16), as the official Mamba-2 does.
    Any other `a_init`, or a bad `nheads`, is a ValueError.
    """
    _check_count("nheads", nheads)
    if a_init == "hippo":
        return torch.log(-s4d_real_A(nheads))
    if a_init == "uniform":
        return torch.log(1 + 15 * torch.rand(nheads, dtype=torch.float32, generator=generator))
    raise ValueError(f'a_init must be "hippo" or "uniform", not {a_init!r}')


def inverse_softplus(dt: torch.Tensor) -> torch.Tensor:
    """The x with softplus(x) = dt > 0, same shape and dtype: log(exp(dt) - 1), written so that no dt overflows.

    exp(dt) - 1 = exp(dt) (1 - exp(-dt)), hence dt + log(-expm1(-dt)): exp(dt) is never formed, and expm1 keeps the
    digits that 1 - exp(-dt) loses when dt is small. A dt that is not positive is a ValueError.
    """
    if not bool((dt > 0).all()):
        raise ValueError("softplus gives positive numbers only: every dt must be above 0")
    return dt + torch.log(-torch.expm1(-dt))


def dt_bias_init(
    nheads: int, dt_min: float, dt_max: float, dt_init_floor: float, generator: torch.Generator | None = None
) -> torch.Tensor:
    """A head's `dt_bias` at the start, (h,) float32: softplus(dt_bias) is log-uniform in [dt_min, dt_max], floored.

    dt is the step in time that a token takes before its content has a say. After the floor it lies in
    [max(dt_min, dt_init_floor), dt_max], but for the rounding of float32. Limits that are not positive and finite, or
    out of order, are a ValueError.
    """
    _check_count("nheads", nheads)
    if not 0 < dt_min <= dt_max < math.inf:
        raise ValueError(f"0 < dt_min <= dt_max must hold, not dt_min {dt_min}, dt_max {dt_max}")
    if not 0 < dt_init_floor <= dt_max:
        raise ValueError(f"dt_init_floor must lie in (0, dt_max], not {dt_init_floor}")
    low, high = math.log(dt_min), math.log(dt_max)
    # float64 until the end: in float32, exp(log(dt)) alone would miss dt by more than the final rounding does
    dt = torch.exp(low + (high - low) * torch.rand(nheads, dtype=torch.float64, generator=generator))
    return inverse_softplus(dt.clamp(min=dt_init_floor)).to(torch.float32)


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
