"""HiPPO: how a state of fixed size remembers a signal of any length. The theory that notebook 1 walks through.

1. A state that remembers. Keep the first N coefficients of everything heard so far, in an orthonormal basis of
   polynomials: the best N numbers for drawing it again (`project`, `reconstruct`).
2. LegS. With Legendre polynomials stretched over the whole past [0, t], those coefficients obey c' = (A c + B u) / t:
   the memory can be updated while listening, and the signal itself forgotten (`legs`, `legs_memory`). S4 leaves out
   1/t: x' = A x + B u is the same memory in the clock log t, where the past fades as exp(-age) instead of being
   stretched ("exponentially warped", arXiv:2206.12037).
3. Normal plus low rank. A is triangular and its eigenvectors are useless in floating point, but A + P Pᵀ is normal:
   a unitary V makes it diagonal, every real part is -1/2, and only the frequencies differ (`legs_nplr`).
4. Diagonal. S4D drops P and keeps the frequencies, or a simple law for them (`s4d_legs_A`, `s4d_inv_A`, `s4d_lin_A`),
   or keeps A's own eigenvalues, which are real: -(1 .. N), S4D-Real. That last one is what Mamba-2 uses: hippo.py.

Glossary: N size of the state; u input signal; x, c state; A (N, N), B (N,) continuous, as in x' = A x + B u; A_bar,
B_bar discrete, as in x_k = A_bar x_(k-1) + B_bar u_k; dt time step; P low-rank factor; V eigenvectors; T samples of a
signal. Signs are S4's: A includes the minus sign, so stable means a negative real part. Results are float64 or
complex128.

Sources: HiPPO, arXiv:2008.07669; S4, arXiv:2111.00396; S4D, arXiv:2206.11893; How to Train Your HiPPO,
arXiv:2206.12037; Mamba, arXiv:2312.00752.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from mamba2_min.ssd.hippo import check_count


def legs(N: int) -> tuple[Tensor, Tensor]:
    """HiPPO-LegS: A (N, N) and B (N,), such that c' = (A c + B u) / t keeps u's Legendre coefficients over [0, t].

    A[n, k] = -sqrt(2n + 1) sqrt(2k + 1) below the diagonal, -(n + 1) on it and 0 above; B[n] = sqrt(2n + 1).
    A is triangular, so its eigenvalues are its diagonal: -1, -2 .. -N.
    A bad N is a ValueError. Source: arXiv:2008.07669, Theorem 2, equation (3); with this sign, arXiv:2111.00396, (2).
    """
    check_count("N", N)
    B = torch.sqrt(2 * torch.arange(N, dtype=torch.float64) + 1)
    A = -torch.tril(torch.outer(B, B), diagonal=-1) - torch.diag(torch.arange(1, N + 1, dtype=torch.float64))
    return A, B


def legs_nplr(N: int) -> tuple[Tensor, Tensor, Tensor]:
    """LegS split into normal plus low-rank, A = V diag(eigenvalues) V* - P Pᵀ: P (N,), eigenvalues (N,), V (N, N).

    P[n] = sqrt(n + 1/2). Eigenvalues, complex and by rising imaginary part, come in conjugate pairs with real part
    -1/2. V is unitary, so going to its coordinates and back loses nothing; A's own eigenvectors have entries up to
    2^(4N/3) (Lemma 3.2).
    A bad N is a ValueError. Source: arXiv:2111.00396, section 3.2, Theorem 1, equation (6).
    """
    A, _ = legs(N)
    P = torch.sqrt(torch.arange(N, dtype=torch.float64) + 0.5)
    skew = A + torch.outer(P, P) + 0.5 * torch.eye(N, dtype=torch.float64)
    # -i times a skew-symmetric matrix is Hermitian, and eigh, unlike eig, gives real frequencies and an orthonormal V
    frequencies, V = torch.linalg.eigh(-1j * skew)
    return P, torch.complex(torch.full_like(frequencies, -0.5), frequencies), V


def s4d_legs_A(N: int) -> Tensor:
    """S4D-LegS: the eigenvalues of LegS's normal part, one of each conjugate pair, ((N + 1) // 2,) complex.

    Fastest first, imaginary parts not negative. P is dropped, and yet, with B halved, the state becomes LegS's own as N
    grows (Theorem 3).
    A bad N is a ValueError. Source: arXiv:2206.11893, S4D-LegS and Theorem 3.
    """
    _, eigenvalues, _ = legs_nplr(N)
    # for odd N one eigenvalue is real: its frequency is 0, and eigh leaves it a rounding error of either sign
    frequencies = eigenvalues.imag.flip(0)[: (N + 1) // 2].clamp(min=0)
    return torch.complex(torch.full_like(frequencies, -0.5), frequencies)


def s4d_inv_A(N: int) -> Tensor:
    """S4D-Inv: A[n] = -1/2 + i (N / π) (N / (2n + 1) - 1), ((N + 1) // 2,) complex, fastest first.

    N is the size of the real state that the conjugate pairs make up. S4D-LegS's highest frequencies tend to this law.
    A bad N is a ValueError. Source: arXiv:2206.11893, S4D-Inv.
    """
    check_count("N", N)
    n = torch.arange((N + 1) // 2, dtype=torch.float64)
    return torch.complex(torch.full_like(n, -0.5), N / math.pi * (N / (2 * n + 1) - 1))


def s4d_lin_A(N: int) -> Tensor:
    """S4D-Lin: A[n] = -1/2 + i π n, ((N + 1) // 2,) complex, slowest first: damped waves, evenly spaced.

    N is the size of the real state that the conjugate pairs make up. A bad N is a ValueError.
    Source: arXiv:2206.11893, S4D-Lin.
    """
    check_count("N", N)
    n = torch.arange((N + 1) // 2, dtype=torch.float64)
    return torch.complex(torch.full_like(n, -0.5), math.pi * n)


def gbt(A: Tensor, B: Tensor, dt: float | Tensor, alpha: float = 0.5) -> tuple[Tensor, Tensor]:
    """The generalised bilinear transform of A (N, N), B (N,) at step dt (...): A_bar (..., N, N), B_bar (..., N).

    The slope is taken 1 - alpha at the old state and alpha at the new: 0 is Euler, which can explode; 1 is backward
    Euler; 1/2 is bilinear, the only one of second order. With alpha >= 1/2 a stable system stays stable at any dt.
    Shapes that do not fit, numbers that are not finite, a dt that is not positive, or alpha outside [0, 1]: ValueError.
    An unstable A with an eigenvalue at 1 / (alpha dt) has no transform: torch.linalg.LinAlgError.
    """
    A, B = _check_system(A, B, diagonal=False)
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1], not {alpha}")
    dt = _check_dt(dt)[..., None, None]
    identity = torch.eye(len(A), dtype=A.dtype)
    both = torch.linalg.solve(
        identity - alpha * dt * A, torch.cat([identity + (1 - alpha) * dt * A, dt * B[:, None]], dim=-1)
    )
    return both[..., :-1], both[..., -1]


def bilinear(A: Tensor, B: Tensor, dt: float | Tensor) -> tuple[Tensor, Tensor]:
    """A_bar = (I - dt A / 2)⁻¹ (I + dt A / 2), B_bar = (I - dt A / 2)⁻¹ dt B; shapes and errors as in `gbt`.

    Source: arXiv:2111.00396, equation (3).
    """
    return gbt(A, B, dt, alpha=0.5)


def zoh(A: Tensor, B: Tensor, dt: float | Tensor) -> tuple[Tensor, Tensor]:
    """Zero-order hold of A (N, N), B (N,) at step dt (...): A_bar (..., N, N), B_bar (..., N); exact for a held input.

    A_bar = exp(dt A) and B_bar = (dt A)⁻¹ (exp(dt A) - I) dt B, the second without the inverse, which a singular A does
    not have and a small dt spoils: both are blocks of one exponential, exp(dt [[A, B], [0, 0]]).
    Shapes that do not fit, numbers that are not finite, or a dt that is not positive: ValueError.
    Source: arXiv:2312.00752, equation (4).
    """
    A, B = _check_system(A, B, diagonal=False)
    held = torch.zeros(len(A) + 1, len(A) + 1, dtype=A.dtype)  # the input as one more state, which never moves
    held[:-1, :-1], held[:-1, -1] = A, B
    both = _expm(_check_dt(dt)[..., None, None] * held)
    return both[..., :-1, :-1], both[..., :-1, -1]


def bilinear_diagonal(A: Tensor, B: Tensor, dt: float | Tensor) -> tuple[Tensor, Tensor]:
    """`bilinear` for a diagonal A (N,), real or complex, B (N,), dt (...): A_bar, B_bar (..., N). Errors as there."""
    A, B = _check_system(A, B, diagonal=True)
    dt = _check_dt(dt)[..., None]
    return (1 + dt * A / 2) / (1 - dt * A / 2), dt * B / (1 - dt * A / 2)


def zoh_diagonal(A: Tensor, B: Tensor, dt: float | Tensor) -> tuple[Tensor, Tensor]:
    """`zoh` for a diagonal A (N,), real or complex, B (N,), dt (...): A_bar, B_bar (..., N). Errors as there.

    A_bar = exp(dt A), B_bar = expm1(dt A) / A * B, and dt B where A is 0. Mamba-2 keeps this A_bar and takes dt B for
    B_bar, which is its limit for small dt.
    """
    A, B = _check_system(A, B, diagonal=True)
    dt = _check_dt(dt)[..., None]
    still = A == 0
    return torch.exp(dt * A), torch.where(still, dt, torch.expm1(dt * A) / torch.where(still, 1, A)) * B


def legendre_basis(N: int, points: Tensor) -> Tensor:
    """The first N Legendre polynomials, shifted to [0, 1] and orthonormal there, at points (M,): (M, N).

    p_n(s) = sqrt(2n + 1) P_n(2s - 1). A point is a fraction of the past: 0 is its beginning and 1 is now.
    A bad N, or a point outside [0, 1], is a ValueError.
    """
    check_count("N", N)
    points = torch.as_tensor(points, dtype=torch.float64)
    if points.ndim != 1 or not bool(((points >= 0) & (points <= 1)).all()):
        raise ValueError("points must be a row of numbers in [0, 1], fractions of the past: 0 its beginning, 1 now")
    return _legendre(N, 2 * points - 1) * torch.sqrt(2 * torch.arange(N, dtype=torch.float64) + 1)


def project(signal: Tensor, N: int) -> Tensor:
    """The coefficients (..., N) of a sampled signal (..., T) on the first N of `legendre_basis`: what LegS should hold.

    The T samples are held, each for 1/T of the past, and each piece is integrated exactly. For a smooth signal, sample
    the middles of the pieces: holding then costs an error of order 1/T² in a coefficient.
    A bad N, or a signal that is empty or not finite, is a ValueError.
    """
    check_count("N", N)
    signal = _check_signal(signal)
    T = signal.shape[-1]
    # ∫ P_n = (P_(n+1) - P_(n-1)) / (2n + 1), with P_(-1) = -1 so that ∫ P_0 = x + 1; halved, since ds = dx / 2
    P = _legendre(N + 1, 2 * torch.arange(T + 1, dtype=torch.float64) / T - 1)
    below = torch.cat([-torch.ones(T + 1, 1, dtype=torch.float64), P[:, : N - 1]], dim=1)
    integral = (P[:, 1:] - below) / (2 * torch.sqrt(2 * torch.arange(N, dtype=torch.float64) + 1))  # (T + 1, N)
    return signal @ integral.diff(dim=0)


def project_function(f: Callable[[Tensor], Tensor], N: int, t: float = 1.0, nodes: int | None = None) -> Tensor:
    """The coefficients (N,) of a function over its past [0, t], by Gauss–Legendre quadrature, not from samples.

    `f` takes times (nodes,) and gives values (nodes,). Exact if f is a polynomial of degree at most 2 nodes - N; more
    nodes (the default is 2N + 64) for an f that wiggles more than the N polynomials do.
    A bad N, t or nodes, or values of another shape, is a ValueError.
    """
    check_count("N", N)
    nodes = 2 * N + 64 if nodes is None else nodes
    check_count("nodes", nodes)
    if not 0 < t < math.inf:
        raise ValueError(f"t must be positive and finite, not {t}")
    x, weights = (torch.from_numpy(array) for array in np.polynomial.legendre.leggauss(nodes))
    points = (x + 1) / 2
    values = torch.as_tensor(f(t * points), dtype=torch.float64)
    if values.shape != points.shape:
        raise ValueError(f"f must give one value a time: {tuple(points.shape)}, not {tuple(values.shape)}")
    return (weights / 2 * values) @ legendre_basis(N, points)


def legs_memory(signal: Tensor, N: int, method: str = "zoh") -> Tensor:
    """LegS listening: the coefficients after each sample of signal (..., T), as (..., T, N), each from the last alone.

    Row k is the memory of samples 0 .. k, so it is `project(signal[..., : k + 1], N)`: up to rounding with "zoh", up to
    an error of second order with "bilinear" and of first with "backward" and "euler". Euler's explodes in the first N
    samples; where N is large it never recovers. `reconstruct` draws the past again from any row.

    c' = (A c + B u) / t has a constant matrix in the clock log t, where sample k lasts log(1 + 1/k): there is no step
    size to choose, and a signal twice as slow leaves the same memory (Proposition 3). Euler with 1/k in place of
    log(1 + 1/k) is equation (4).
    A bad N or method, or a signal that is empty or not finite, is a ValueError.
    Source: arXiv:2008.07669, Theorem 2, equations (3) and (4).
    """
    discretize = {
        "zoh": zoh,
        "bilinear": bilinear,
        "backward": lambda A, B, dt: gbt(A, B, dt, alpha=1.0),
        "euler": lambda A, B, dt: gbt(A, B, dt, alpha=0.0),
    }
    if method not in discretize:
        raise ValueError(f"method must be one of {', '.join(discretize)}, not {method!r}")
    A, B = legs(N)
    signal = _check_signal(signal)
    T = signal.shape[-1]
    c = torch.zeros(*signal.shape[:-1], N, dtype=torch.float64)
    c[..., 0] = signal[..., 0]  # the first sample, held, is a constant
    memory = [c]
    for start in range(1, T, 256):  # the matrices of all steps at once would be T N² numbers
        k = torch.arange(start, min(start + 256, T), dtype=torch.float64)
        for step, A_bar, B_bar in zip(k.long(), *discretize[method](A, B, torch.log1p(1 / k)), strict=True):
            c = c @ A_bar.T + signal[..., step, None] * B_bar
            memory.append(c)
    return torch.stack(memory, dim=-2)


def reconstruct(coefficients: Tensor, points: Tensor) -> Tensor:
    """The signal (..., M) that coefficients (..., N) remember, at points (M,): fractions of the past, 0 oldest, 1 now.

    It is the polynomial of degree N - 1 nearest to the past in the mean square. The error for a past with k bounded
    derivatives falls as N^(1/2 - k); of an edge, the polynomial keeps a ripple.
    A point outside [0, 1], or a scalar for coefficients, is a ValueError. Source: arXiv:2008.07669, Proposition 6.
    """
    coefficients = torch.as_tensor(coefficients, dtype=torch.float64)
    if coefficients.ndim < 1:
        raise ValueError("coefficients must have a last dimension of size N")
    return coefficients @ legendre_basis(coefficients.shape[-1], points).T


def _legendre(N: int, x: Tensor) -> Tensor:
    """P_0 .. P_(N-1) at x (M,) in [-1, 1], as (M, N), by (n + 1) P_(n+1) = (2n + 1) x P_n - n P_(n-1)."""
    P = [torch.ones_like(x), x]
    for n in range(1, N - 1):
        P.append(((2 * n + 1) * x * P[n] - n * P[n - 1]) / (n + 1))
    return torch.stack(P[:N], dim=-1)


def _expm(M: Tensor) -> Tensor:
    """exp(M) of matrices (..., N, N): Taylor's series of M / 2^s, of norm at most 1, then squared s times.

    torch.linalg.matrix_exp of a single float64 matrix of norm near 0.05 is off by 2e-10 (pytorch/pytorch#196592, seen
    up to version 2.14), where a zero-order hold should be exact.
    """
    s = torch.linalg.matrix_norm(M, ord=1).clamp(min=1).log2().ceil()[..., None, None]
    M = M / 2**s
    powers = [torch.eye(M.shape[-1], dtype=M.dtype), M, M @ M, M @ M @ M]
    M4 = powers[2] @ powers[2]
    E = torch.zeros_like(M)
    for i in (16, 12, 8, 4, 0):  # Horner in M^4: 20 terms, of which the first left out is below 1 / 20! = 4e-19
        E = E @ M4 + sum(power / math.factorial(i + j) for j, power in enumerate(powers))
    for done in range(int(s.max())):
        E = torch.where(done < s, E @ E, E)
    return E


def _check_system(A: Tensor, B: Tensor, diagonal: bool) -> tuple[Tensor, Tensor]:
    """A and B in one dtype, float64 or complex128, once they are finite and their shapes fit."""
    A, B = torch.as_tensor(A), torch.as_tensor(B)
    dtype = torch.complex128 if A.is_complex() or B.is_complex() else torch.float64
    if B.ndim != 1 or A.shape != (B.shape if diagonal else (len(B), len(B))):
        wanted = "A (N,)" if diagonal else "A (N, N)"
        raise ValueError(f"{wanted} and B (N,) must fit, not {tuple(A.shape)} and {tuple(B.shape)}")
    if not bool(torch.isfinite(A).all()) or not bool(torch.isfinite(B).all()):
        raise ValueError("A and B must be finite everywhere")
    return A.to(dtype), B.to(dtype)


def _check_dt(dt: float | Tensor) -> Tensor:
    dt = torch.as_tensor(dt, dtype=torch.float64)
    if not bool(((dt > 0) & torch.isfinite(dt)).all()):
        raise ValueError("dt, the step in time, must be positive and finite")
    return dt


def _check_signal(signal: Tensor) -> Tensor:
    signal = torch.as_tensor(signal, dtype=torch.float64)
    if signal.ndim < 1 or signal.shape[-1] < 1 or not bool(torch.isfinite(signal).all()):
        raise ValueError("the signal must be at least one sample long, in its last dimension, and finite everywhere")
    return signal
