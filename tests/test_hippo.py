"""HiPPO, held to the facts the papers state and to the mathematics that any reader can redo."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba2_min.ssd import hippo, legs

ODD_SIZES = [1, 2, 3, 17, 64]


def waves(s: torch.Tensor) -> torch.Tensor:
    """A smooth signal on [0, 1]: three and five periods on a parabola, root mean square 0.86."""
    return torch.sin(6 * math.pi * s) + 0.5 * torch.cos(10 * math.pi * s + 1) + s**2


def middles(T: int) -> torch.Tensor:
    return (torch.arange(T, dtype=torch.float64) + 0.5) / T


def rms(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item()


def stable_system(N: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    A = torch.randn(N, N, dtype=torch.float64, generator=g)
    return A - (1 + torch.linalg.eigvals(A).real.max()) * torch.eye(N), torch.randn(N, dtype=torch.float64, generator=g)


# LegS, whole, split and diagonal


def test_legs_of_four_is_the_matrix_printed_in_the_papers():
    A, B = legs.legs(4)
    r3, r5, r7, r15, r21, r35 = (math.sqrt(k) for k in (3, 5, 7, 15, 21, 35))
    expected = -torch.tensor([[1, 0, 0, 0], [r3, 2, 0, 0], [r5, r15, 3, 0], [r7, r21, r35, 4]], dtype=torch.float64)
    torch.testing.assert_close(A, expected, rtol=1e-15, atol=0)
    torch.testing.assert_close(B, torch.tensor([1, r3, r5, r7], dtype=torch.float64), rtol=1e-15, atol=0)


@pytest.mark.parametrize("N", ODD_SIZES)
def test_legs_eigenvalues_are_minus_one_to_minus_n(N):
    A, B = legs.legs(N)
    assert A.dtype == B.dtype == torch.float64
    assert torch.equal(A, A.tril())
    assert A.diagonal().tolist() == [-(n + 1) for n in range(N)]


@pytest.mark.parametrize("N", ODD_SIZES)
def test_normal_part_is_normal_with_real_part_minus_a_half(N):
    A, _ = legs.legs(N)
    P, _, _ = legs.legs_nplr(N)
    normal = A + torch.outer(P, P)
    torch.testing.assert_close(normal @ normal.T, normal.T @ normal, rtol=1e-13, atol=1e-10)
    # normal and with symmetric part -I/2: that is what "every real part is -1/2" means, seen without any eigenvalue
    torch.testing.assert_close((normal + normal.T) / 2, -0.5 * torch.eye(N, dtype=torch.float64), rtol=0, atol=1e-13)
    torch.testing.assert_close(
        torch.linalg.eigvals(normal).real, torch.full((N,), -0.5, dtype=torch.float64), rtol=0, atol=1e-11
    )


@pytest.mark.parametrize("N", ODD_SIZES)
def test_nplr_recomposes_legs(N):
    A, _ = legs.legs(N)
    P, eigenvalues, V = legs.legs_nplr(N)
    assert (eigenvalues.real == -0.5).all()
    torch.testing.assert_close(V @ V.mH, torch.eye(N, dtype=torch.complex128), rtol=0, atol=1e-12)
    recomposed = (V * eigenvalues) @ V.mH - torch.outer(P, P)
    torch.testing.assert_close(recomposed, A.to(torch.complex128), rtol=0, atol=1e-10)


def test_legs_own_eigenvectors_are_the_reason_for_nplr():
    _, V = torch.linalg.eig(legs.legs(32)[0])
    assert torch.linalg.cond(V) > 1e12


@pytest.mark.parametrize("N", ODD_SIZES)
def test_s4d_legs_keeps_one_of_each_conjugate_pair(N):
    _, eigenvalues, _ = legs.legs_nplr(N)
    half = legs.s4d_legs_A(N)
    assert half.shape == ((N + 1) // 2,) and (half.real == -0.5).all() and (half.imag >= 0).all()
    whole = torch.cat([half, half[: N // 2].conj()]).imag.sort().values
    torch.testing.assert_close(whole, eigenvalues.imag, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("N", ODD_SIZES)
def test_s4d_lin_and_inv_are_their_formulas(N):
    for n, (lin, inv) in enumerate(zip(legs.s4d_lin_A(N).tolist(), legs.s4d_inv_A(N).tolist(), strict=True)):
        assert lin == pytest.approx(-0.5 + 1j * math.pi * n)
        assert inv == pytest.approx(-0.5 + 1j * N / math.pi * (N / (2 * n + 1) - 1))


def test_s4d_inv_is_the_law_of_the_highest_frequencies():
    off = [abs((legs.s4d_inv_A(N)[:4].imag / legs.s4d_legs_A(N)[:4].imag) - 1).max().item() for N in (16, 64, 256)]
    assert off[0] > 2 * off[1] > 4 * off[2]
    assert off[2] < 0.03


def test_without_p_and_with_half_of_b_the_state_becomes_that_of_legs():
    def miss(N):
        A, B = legs.legs(N)
        _, eigenvalues, V = legs.legs_nplr(N)
        held = legs.zoh(A, B, 1.0)[1]
        diagonal = V @ legs.zoh_diagonal(eigenvalues, V.mH @ (B / 2).to(V.dtype), 1.0)[1]
        return (held - diagonal)[:4].abs().max().item()

    assert miss(16) > 5e-3 and miss(256) < 5e-4


@pytest.mark.parametrize("N", ODD_SIZES)
def test_time_invariant_legs_hears_exponentially_warped_legendre_polynomials(N):
    A, B = legs.legs(N)
    age = torch.linspace(0.01, 4, 9, dtype=torch.float64)
    kernel = legs.zoh(A, B, age)[0] @ B
    warped = torch.exp(-age)[:, None] * legs.legendre_basis(N, torch.exp(-age))
    torch.testing.assert_close(kernel, warped, rtol=0, atol=1e-11)


# From continuous to discrete time


@pytest.mark.parametrize("N", ODD_SIZES)
def test_zoh_is_exact_for_a_held_input(N):
    A, B = stable_system(N)
    g = torch.Generator().manual_seed(1)
    u, dt = torch.randn(5, dtype=torch.float64, generator=g), 0.3
    # the exact solution in A's own coordinates, one scalar equation x' = a x + b u each
    a, V = torch.linalg.eig(A)
    b = torch.linalg.solve(V, B.to(V.dtype))
    x, exact = torch.zeros(N, dtype=torch.float64), torch.zeros(N, dtype=torch.complex128)
    A_bar, B_bar = legs.zoh(A, B, dt)
    for held in u:
        x = A_bar @ x + B_bar * held
        exact = torch.exp(a * dt) * exact + (torch.exp(a * dt) - 1) / a * b * held
    torch.testing.assert_close(x, (V @ exact).real, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close((V @ exact).imag, torch.zeros_like(x), rtol=0, atol=1e-11)


def test_zoh_keeps_every_digit_at_every_norm():
    for angle in torch.logspace(-6, 2, 100, dtype=torch.float64):
        turn = legs.zoh(torch.tensor([[0.0, -1.0], [1.0, 0.0]]), torch.zeros(2), angle)[0]
        expected = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).reshape(2, 2)
        torch.testing.assert_close(turn, expected, rtol=0, atol=1e-15 * max(2.0, angle.item()))


def test_zoh_of_a_singular_system():
    A = torch.tensor([[0.0, 1.0], [0.0, 0.0]])  # a mass that is pushed: position, speed
    A_bar, B_bar = legs.zoh(A, torch.tensor([0.0, 1.0]), 0.5)
    torch.testing.assert_close(A_bar, torch.tensor([[1, 0.5], [0, 1]], dtype=torch.float64), rtol=1e-15, atol=0)
    torch.testing.assert_close(B_bar, torch.tensor([0.125, 0.5], dtype=torch.float64), rtol=1e-15, atol=0)


@pytest.mark.parametrize("dt", [1e-12, 1e-8, 1e-3])
def test_a_small_step_keeps_its_digits(dt):
    A, B = torch.tensor([-2.0, -1.0, 0.0]), torch.tensor([1.0, -3.0, 2.0])
    series = dt + A.double() * dt**2 / 2 + A.double() ** 2 * dt**3 / 6
    for _, B_bar in (legs.zoh(torch.diag(A), B, dt), legs.zoh_diagonal(A, B, dt)):
        torch.testing.assert_close(B_bar, B.double() * series, rtol=max(1e-14, dt**3), atol=0)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.complex_numbers(max_magnitude=5, allow_subnormal=False), min_size=1, max_size=5), st.floats(1e-6, 2))
def test_diagonal_discretisations_equal_the_matrix_ones(diagonal, dt):
    A = torch.tensor([complex(-abs(a.real), a.imag) for a in diagonal], dtype=torch.complex128)
    B = torch.linspace(1, 2, len(A), dtype=torch.float64)
    for of_matrix, of_diagonal in ((legs.zoh, legs.zoh_diagonal), (legs.bilinear, legs.bilinear_diagonal)):
        A_bar, B_bar = of_matrix(torch.diag(A), B, dt)
        a_bar, b_bar = of_diagonal(A, B, dt)
        torch.testing.assert_close(torch.diag(a_bar), A_bar, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(b_bar, B_bar, rtol=1e-11, atol=1e-14)


def test_real_diagonal_stays_real():
    A, B = hippo.s4d_real_A(4), torch.ones(4)
    for a_bar, b_bar in (legs.zoh_diagonal(A, B, 0.1), legs.bilinear_diagonal(A, B, 0.1)):
        assert a_bar.dtype == b_bar.dtype == torch.float64
    torch.testing.assert_close(legs.zoh_diagonal(A, B, 1e-9)[1], torch.full((4,), 1e-9, dtype=torch.float64))


@pytest.mark.parametrize(("alpha", "order"), [(0.0, 1), (0.5, 2), (1.0, 1)])
def test_order_of_accuracy(alpha, order):
    A, B = stable_system(3)
    exact = legs.zoh(A, B, 1.0)[1]

    def miss(steps):
        A_bar, B_bar = legs.gbt(A, B, 1 / steps, alpha)
        x = torch.zeros(3, dtype=torch.float64)
        for _ in range(steps):
            x = A_bar @ x + B_bar
        return torch.linalg.vector_norm(x - exact).item()

    assert miss(128) / miss(256) == pytest.approx(2**order, rel=0.05)


def test_bilinear_is_the_formula_and_is_stable_at_any_step():
    A, B = legs.legs(8)
    I = torch.eye(8, dtype=torch.float64)
    A_bar, B_bar = legs.bilinear(A, B, 0.2)
    torch.testing.assert_close(A_bar, torch.linalg.inv(I - 0.1 * A) @ (I + 0.1 * A), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(B_bar, torch.linalg.inv(I - 0.1 * A) @ (0.2 * B), rtol=1e-12, atol=1e-13)
    assert torch.linalg.eigvals(legs.bilinear(A, B, 1e3)[0]).abs().max() < 1


def test_many_steps_at_once_are_each_step_alone():
    A, B = legs.legs(5)
    dt = torch.tensor([[0.1, 0.2, 0.3]])
    systems = [(legs.zoh, A), (legs.bilinear, A)]
    systems += [(legs.zoh_diagonal, A.diagonal()), (legs.bilinear_diagonal, A.diagonal())]
    for method, matrix in systems:
        A_bar, B_bar = method(matrix, B, dt)
        assert A_bar.shape == (1, 3, *matrix.shape) and B_bar.shape == (1, 3, 5)
        torch.testing.assert_close((A_bar[0, 1], B_bar[0, 1]), method(matrix, B, dt[0, 1]), rtol=1e-13, atol=1e-15)


# A signal, its coefficients, and the signal again


@pytest.mark.parametrize("N", ODD_SIZES)
def test_basis_is_orthonormal_and_ends_at_b(N):
    for n in {0, N // 2, N - 1}:
        onto_all = legs.project_function(lambda s, n=n: legs.legendre_basis(N, s)[:, n], N)
        torch.testing.assert_close(onto_all, torch.eye(N, dtype=torch.float64)[n], rtol=0, atol=1e-12)
    _, B = legs.legs(N)
    ends = legs.legendre_basis(N, torch.tensor([0.0, 1.0]))
    signs = (-1.0) ** torch.arange(N)
    torch.testing.assert_close(ends, torch.stack([signs * B, B]), rtol=1e-13, atol=0)


def test_basis_is_the_legendre_polynomials():
    s = torch.linspace(0, 1, 11, dtype=torch.float64)
    x = 2 * s - 1
    expected = torch.stack([torch.ones_like(x), x, (3 * x**2 - 1) / 2, (5 * x**3 - 3 * x) / 2], dim=1)
    torch.testing.assert_close(legs.legendre_basis(4, s), expected * torch.tensor([1, 3, 5, 7]).double().sqrt())


def test_reconstruction_error_falls_with_n_as_stated():
    points = torch.linspace(0, 1, 1001, dtype=torch.float64)
    stated = {8: 0.6, 16: 0.1, 24: 2e-4, 32: 1e-8, 64: 1e-11}  # root mean square, for `waves`
    for N, bound in stated.items():
        error = rms(legs.reconstruct(legs.project_function(waves, N), points) - waves(points))
        assert bound / 20 < error < bound or (N == 64 and error < bound)


@pytest.mark.parametrize("N", ODD_SIZES)
def test_a_polynomial_is_remembered_exactly(N):
    points = torch.linspace(0, 1, 7, dtype=torch.float64)

    def f(s):
        return (s - 0.3) ** (N - 1)

    torch.testing.assert_close(legs.reconstruct(legs.project_function(f, N), points), f(points), rtol=0, atol=1e-12)


def test_projection_of_samples_tends_to_that_of_the_function():
    exact = legs.project_function(waves, 16)
    errors = [(legs.project(waves(middles(T)), 16) - exact).abs().max().item() for T in (250, 500)]
    assert errors[0] < 3e-4
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.05)


def test_a_function_over_a_longer_past():
    exact = legs.project_function(waves, 12)
    torch.testing.assert_close(legs.project_function(lambda x: waves(x / 7), 12, t=7.0), exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("N", ODD_SIZES)
def test_listening_equals_projecting_all_that_was_heard(N):
    g = torch.Generator().manual_seed(N)
    u = torch.randn(270, dtype=torch.float64, generator=g)  # noise, and more than one block of steps
    memory = legs.legs_memory(u, N)
    assert memory.shape == (270, N)
    for heard in (1, 2, 3, 17, 256, 257, 270):
        torch.testing.assert_close(memory[heard - 1], legs.project(u[:heard], N), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("method", "order"), [("bilinear", 2), ("backward", 1), ("euler", 1)])
def test_online_equals_quadrature_to_the_discretisation_error(method, order):
    def miss(T):
        u = waves(middles(T))
        return torch.linalg.vector_norm(legs.legs_memory(u, 16, method)[-1] - legs.project(u, 16)).item()

    assert miss(1000) < (2e-4 if order == 2 else 0.05)
    assert miss(500) / miss(1000) == pytest.approx(2**order, rel=0.15)


def test_euler_explodes_first():
    u = waves(middles(100))
    after_20 = legs.project(u[:20], 32)
    assert torch.linalg.vector_norm(legs.legs_memory(u, 32, "euler")[19] - after_20) > 1e12
    assert torch.linalg.vector_norm(legs.legs_memory(u, 32, "bilinear")[19] - after_20) < 0.02


def test_reconstruction_from_listening():
    points = torch.linspace(0, 1, 1001, dtype=torch.float64)
    memory = legs.legs_memory(waves(middles(1000)), 32)
    assert rms(legs.reconstruct(memory[-1], points) - waves(points)) < 1e-4
    assert rms(legs.reconstruct(memory[499], points) - waves(points / 2)) < 1e-4  # half way, the past is half as long


def test_a_slower_signal_leaves_the_same_memory():
    u = waves(middles(60))
    fast, slow = legs.legs_memory(u, 17), legs.legs_memory(u.repeat_interleave(3), 17)
    torch.testing.assert_close(slow[2::3], fast, rtol=0, atol=1e-12)


def test_signals_in_batches_and_from_plain_lists():
    u = torch.randn(2, 3, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    memory = legs.legs_memory(u, 5)
    drawn = legs.reconstruct(memory, torch.linspace(0, 1, 11))
    assert memory.shape == (2, 3, 20, 5) and drawn.shape == (2, 3, 20, 11)
    torch.testing.assert_close(memory[1, 2], legs.legs_memory(u[1, 2].tolist(), 5))
    torch.testing.assert_close(legs.project(u, 5)[1, 2], legs.project(u[1, 2].tolist(), 5))
    torch.testing.assert_close(legs.legs_memory([7], 3), torch.tensor([[7.0, 0, 0]], dtype=torch.float64))


# What is left of it in a head of Mamba-2


@pytest.mark.parametrize("nheads", ODD_SIZES)
def test_hippo_heads_are_s4d_real(nheads):
    A = hippo.s4d_real_A(nheads)
    assert A.dtype == torch.float32
    assert A.tolist() == legs.legs(nheads)[0].diagonal().tolist()
    torch.testing.assert_close(-torch.exp(hippo.a_log_init(nheads, "hippo")), A)


def test_uniform_heads_fill_one_to_sixteen():
    A_log = hippo.a_log_init(20_000, "uniform", torch.Generator().manual_seed(0))
    A = -torch.exp(A_log)
    assert A_log.dtype == torch.float32
    assert -16.001 < A.min() < -15.9 and -1.1 < A.max() <= -0.999
    assert A.mean().item() == pytest.approx(-8.5, abs=0.1)
    assert A.var().item() == pytest.approx(15**2 / 12, rel=0.03)


def test_dt_is_log_uniform_and_within_its_limits():
    bias = hippo.dt_bias_init(20_000, 1e-3, 0.1, 1e-4, torch.Generator().manual_seed(0))
    dt = F.softplus(bias)
    assert bias.dtype == torch.float32
    assert dt.min() >= 1e-3 * (1 - 1e-6) and dt.max() <= 0.1 * (1 + 1e-6)
    # Kolmogorov–Smirnov against the straight line: 1.63 / sqrt(n) is the 1 % point
    u = (torch.log(dt.double()) - math.log(1e-3)).div(math.log(0.1) - math.log(1e-3)).sort().values
    assert (u - (torch.arange(20_000) + 0.5) / 20_000).abs().max() < 1.63 / math.sqrt(20_000)


def test_dt_floor_holds():
    dt = F.softplus(hippo.dt_bias_init(1000, 1e-6, 0.1, 1e-2, torch.Generator().manual_seed(0)))
    assert dt.min().item() == pytest.approx(1e-2, rel=1e-6)
    assert dt.max() <= 0.1 * (1 + 1e-6)


def test_a_range_of_one_point_is_that_point():
    dt = F.softplus(hippo.dt_bias_init(3, 0.05, 0.05, 1e-4))
    torch.testing.assert_close(dt, torch.full((3,), 0.05), rtol=1e-6, atol=0)


def test_a_generator_makes_the_heads_repeatable():
    def draw(seed):
        g = torch.Generator().manual_seed(seed)
        return torch.cat([hippo.a_log_init(5, "uniform", g), hippo.dt_bias_init(5, 1e-3, 0.1, 1e-4, g)])

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_heads_can_be_laid_out_without_memory():
    with torch.device("meta"):
        assert hippo.a_log_init(4, "hippo").is_meta and hippo.dt_bias_init(4, 1e-3, 0.1, 1e-4).is_meta


def test_inverse_softplus_in_float32_at_both_extremes():
    dt = torch.logspace(-30, 3, 200)
    back = F.softplus(hippo.inverse_softplus(dt))
    assert back.dtype == torch.float32 and torch.isfinite(hippo.inverse_softplus(dt)).all()
    # x = log(dt) for a small dt, and rounding x moves dt by |x| parts in 1.7e7
    torch.testing.assert_close(back, dt, rtol=1e-5, atol=0)
    naive = torch.log(torch.exp(dt) - 1)
    assert torch.isinf(naive[dt < 1e-8]).all() and torch.isinf(naive[dt > 100]).all()


def test_memory_length_is_where_a_state_has_decayed_by_e():
    A, dt = hippo.s4d_real_A(8), torch.tensor([[1e-3], [0.1]])
    tokens = hippo.memory_length(A, dt)
    assert tokens.shape == (2, 8)
    torch.testing.assert_close(torch.exp(dt * A * tokens), torch.full((2, 8), math.exp(-1), dtype=torch.float64))
    assert hippo.memory_length(-1, 1e-3).item() == pytest.approx(1000)
    assert hippo.memory_length(-10, 0.1).item() == pytest.approx(1)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        *[
            (lambda f=f, N=N: f(N), "integer >= 1")
            for f in (legs.legs, legs.legs_nplr, legs.s4d_legs_A, legs.s4d_inv_A, legs.s4d_lin_A, hippo.s4d_real_A)
            for N in (0, -3, 2.0, True)
        ],
        (lambda: hippo.a_log_init(0, "hippo"), "nheads"),
        (lambda: hippo.a_log_init(4, "lin"), "a_init"),
        (lambda: hippo.dt_bias_init(0, 1e-3, 0.1, 1e-4), "nheads"),
        (lambda: hippo.dt_bias_init(4, 0.0, 0.1, 1e-4), "dt_min"),
        (lambda: hippo.dt_bias_init(4, 0.2, 0.1, 1e-4), "dt_min"),
        (lambda: hippo.dt_bias_init(4, 1e-3, math.inf, 1e-4), "dt_min"),
        (lambda: hippo.dt_bias_init(4, 1e-3, math.nan, 1e-4), "dt_min"),
        (lambda: hippo.dt_bias_init(4, 1e-3, 0.1, 0.2), "dt_init_floor"),
        (lambda: hippo.dt_bias_init(4, 1e-3, 0.1, 0.0), "dt_init_floor"),
        (lambda: hippo.inverse_softplus(torch.tensor([1.0, 0.0])), "above 0"),
        (lambda: hippo.inverse_softplus(torch.tensor([math.nan])), "above 0"),
        (lambda: hippo.memory_length(1.0, 0.1), "A < 0"),
        (lambda: hippo.memory_length(-1.0, 0.0), "dt > 0"),
        (lambda: legs.zoh(torch.eye(3), torch.ones(2), 0.1), r"A \(N, N\)"),
        (lambda: legs.bilinear(torch.ones(3), torch.ones(3), 0.1), r"A \(N, N\)"),
        (lambda: legs.zoh_diagonal(torch.eye(3), torch.ones(3), 0.1), r"A \(N,\)"),
        (lambda: legs.bilinear_diagonal(torch.ones(3), torch.ones(()), 0.1), r"A \(N,\)"),
        (lambda: legs.zoh(torch.eye(2) * math.nan, torch.ones(2), 0.1), "finite"),
        (lambda: legs.zoh_diagonal(torch.ones(2), torch.tensor([1.0, math.inf]), 0.1), "finite"),
        (lambda: legs.zoh(torch.eye(3), torch.ones(3), 0.0), "dt"),
        (lambda: legs.zoh_diagonal(torch.ones(3), torch.ones(3), math.nan), "dt"),
        (lambda: legs.bilinear(torch.eye(3), torch.ones(3), torch.tensor([0.1, math.inf])), "dt"),
        (lambda: legs.gbt(torch.eye(3), torch.ones(3), 0.1, alpha=1.5), "alpha"),
        (lambda: legs.legendre_basis(3, torch.tensor([0.5, 1.1])), r"\[0, 1\]"),
        (lambda: legs.legendre_basis(3, torch.tensor([math.nan])), r"\[0, 1\]"),
        (lambda: legs.legendre_basis(3, torch.tensor(0.5)), r"\[0, 1\]"),
        (lambda: legs.reconstruct(torch.tensor(1.0), torch.tensor([0.5])), "coefficients"),
        (lambda: legs.project(torch.zeros(0), 4), "at least one sample"),
        (lambda: legs.project(torch.tensor([1.0, math.inf]), 4), "finite"),
        (lambda: legs.project_function(torch.sin, 4, t=0.0), "t must be"),
        (lambda: legs.project_function(torch.sin, 4, nodes=0), "nodes"),
        (lambda: legs.project_function(lambda s: s[:3], 4), "one value a time"),
        (lambda: legs.legs_memory(torch.zeros(0), 4), "at least one sample"),
        (lambda: legs.legs_memory(torch.tensor(1.0), 4), "at least one sample"),
        (lambda: legs.legs_memory(torch.zeros(5), 0), "N must be"),
        (lambda: legs.legs_memory(torch.zeros(5), 4, "heun"), "zoh, bilinear, backward, euler"),
    ],
)
def test_bad_arguments_are_one_clear_line(call, says):
    with pytest.raises(ValueError, match=says) as caught:
        call()
    assert "\n" not in str(caught.value)
