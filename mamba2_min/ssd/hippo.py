"""How A and dt start: HiPPO's time scales, one per head.

Each head of Mamba-2 has one decay rate A < 0 and one step size dt > 0 per token, and its state fades by exp(dt A) at
each token. So dt A sets how long the head remembers: about 1 / (|A| dt) tokens (`memory_length`).

HiPPO (arXiv:2008.07669) asks which state of N numbers remembers a signal best, and finds a matrix A whose eigenvalues
are -1, -2, .., -N: N time scales. S4D-Real (arXiv:2206.11893) keeps the eigenvalues alone. Mamba-2 has room for one per
head, so head h starts with A_h = -(h + 1) (`a_log_init`), and dt says how many tokens a unit of time lasts
(`dt_bias_init`). How HiPPO leads to these numbers is in legs.py and in notebook 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def s4d_real_A(nheads: int) -> Tensor:
    """S4D-Real, one time scale per head: A_h = -(h + 1), (h,) float32, in units of 1/time.

    Raises ValueError for a bad `nheads`.
    """
    check_count("nheads", nheads)
    return -torch.arange(1, nheads + 1, dtype=torch.float32)


def a_log_init(nheads: int, a_init: str, generator: torch.Generator | None = None) -> Tensor:
    """`A_log` = log(-A) at the start, (h,) float32, so that A = -exp(A_log) < 0 whatever training does.

    a_init: "hippo" is S4D-Real, A_h = -(h + 1); "uniform" draws -A from U(1, 16), as the official Mamba-2 does.
    Raises ValueError for any other `a_init`, or a bad `nheads`.
    """
    check_count("nheads", nheads)
    if a_init == "hippo":
        return torch.log(-s4d_real_A(nheads))
    if a_init == "uniform":
        return torch.log(1 + 15 * torch.rand(nheads, dtype=torch.float32, generator=generator))
    raise ValueError(f'a_init must be "hippo" or "uniform", not {a_init!r}')


def dt_bias_init(
    nheads: int, dt_min: float, dt_max: float, dt_init_floor: float, generator: torch.Generator | None = None
) -> Tensor:
    """`dt_bias` at the start, (h,) float32: softplus(dt_bias), a head's typical dt, is log-uniform in [dt_min, dt_max].

    It is at least dt_init_floor. A token's own contribution to dt is added before softplus.
    Raises ValueError for limits that are not positive and finite, or out of order.
    """
    check_count("nheads", nheads)
    if not 0 < dt_min <= dt_max < math.inf:
        raise ValueError(f"0 < dt_min <= dt_max must hold, not dt_min {dt_min}, dt_max {dt_max}")
    if not 0 < dt_init_floor <= dt_max:
        raise ValueError(f"dt_init_floor must lie in (0, dt_max], not {dt_init_floor}")
    low, high = math.log(dt_min), math.log(dt_max)
    # In float32, exp(log(dt)) would miss dt by more than the final rounding does.
    dt = torch.exp(low + (high - low) * torch.rand(nheads, dtype=torch.float64, generator=generator))
    return _inverse_softplus(dt.clamp(min=dt_init_floor)).to(torch.float32)


def inverse_softplus(dt: Tensor) -> Tensor:
    """The x with softplus(x) = dt, same shape and dtype. Raises ValueError where a dt is not positive."""
    if not bool((dt > 0).all()):
        raise ValueError("softplus gives positive numbers only: every dt must be above 0")
    return _inverse_softplus(dt)


def _inverse_softplus(dt: Tensor) -> Tensor:
    """log(exp(dt) - 1) = dt + log(1 - exp(-dt)): nothing overflows, and expm1 keeps the digits of a small dt."""
    return dt + torch.log(-torch.expm1(-dt))


def memory_length(A: Tensor | float, dt: Tensor | float) -> Tensor:
    """The tokens after which a head has forgotten all but 1/e of its state, 1 / (|A| dt), float64.

    A < 0 and dt > 0, scalars or tensors that broadcast. With S4D-Real and dt in [0.001, 0.1], that is from 1000 tokens
    (A = -1, dt = 0.001) down to one (A = -10, dt = 0.1). Raises ValueError for other signs.
    """
    A, dt = torch.as_tensor(A, dtype=torch.float64), torch.as_tensor(dt, dtype=torch.float64)
    if not bool((A < 0).all()) or not bool((dt > 0).all()):
        raise ValueError("a head forgets only if A < 0 and dt > 0")
    return 1 / (-A * dt)


def check_count(name: str, value: int) -> None:
    """Raises ValueError where `value` is not an integer >= 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, not {value!r}")
