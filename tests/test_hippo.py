"""HiPPO, held to the facts the papers state and to the mathematics that any reader can redo."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from mamba2_min import hippo


@pytest.mark.parametrize("nheads", [1, 2, 3, 17])
def test_hippo_heads_are_s4d_real(nheads):
    A = hippo.s4d_real_A(nheads)
    assert A.dtype == torch.float32
    assert A.tolist() == [-(h + 1) for h in range(nheads)]
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


def test_a_generator_makes_the_heads_repeatable():
    def draw(seed):
        g = torch.Generator().manual_seed(seed)
        return torch.cat([hippo.a_log_init(5, "uniform", g), hippo.dt_bias_init(5, 1e-3, 0.1, 1e-4, g)])

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
