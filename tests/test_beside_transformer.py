"""Mamba-2 beside a Transformer: sizes, rewinding, crossing points and tables. Nothing here asserts a speed."""

from __future__ import annotations

import pytest
import torch

from benchmarks import beside_transformer, harness, peers, scan_lengths, seed_table
from benchmarks.harness import OURS, Options
from mamba2_min import Mamba2LM

OPTIONS = Options(rounds=3, warmup=1, memory=False)


def test_crossing_points_are_found_between_the_lengths():
    lengths = [100, 1000, 10_000]
    found = scan_lengths.crossing("x", lengths, [10.0, 100.0, 1000.0], [1.0, 100.0 / 10**0.5 * 10**0.5, 1e4])
    assert found.length == pytest.approx(1000) and "about 1,000 tokens" in str(found)
    linear, quadratic = [l * 1.0 for l in lengths], [l * l / 3000 for l in lengths]
    assert scan_lengths.crossing("x", lengths, linear, quadratic).length == pytest.approx(3000)
    assert "at every length" in str(scan_lengths.crossing("x", lengths, [1, 1, 1], [2, 2, 2]))
    assert "does not overtake" in str(scan_lengths.crossing("x", lengths, [1, 1, 3], [2, 2, 2]))


def test_the_fft_convolves_causally():
    u, k = torch.randn(2, 20, 3, 4), torch.randn(3, 4, 20)
    by_hand = torch.stack([sum(k[..., t - s] * u[:, s] for s in range(t + 1)) for t in range(20)], dim=1)
    torch.testing.assert_close(scan_lengths.convolve(u, k), by_hand, rtol=1e-4, atol=1e-4)


def test_tiny_llama_and_the_mamba_beside_it_have_the_published_size():
    shape = beside_transformer.TINY_LLAMA
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    assert sum(p.numel() for p in llama.parameters()) == 1_100_048_384
    assert beside_transformer.MAMBA_1B.num_parameters() == pytest.approx(1_100_048_384, rel=0.02)


def test_models_with_copied_layers_are_whole():
    config = peers.TINY
    model = beside_transformer.with_copied_layers(Mamba2LM, config, "cpu", torch.float32)
    weights = model.state_dict()
    assert all(torch.isfinite(t).all() for t in weights.values())
    assert torch.equal(weights["backbone.layers.0.mixer.A_log"], weights["backbone.layers.1.mixer.A_log"])
    assert model.lm_head.weight is model.backbone.embedding.weight


def test_both_peers_read_write_and_are_rewound():
    setting = beside_transformer.QUICK["tiny-b2-after300"]
    names = [OURS, "transformer", *(["transformers-llama"] if beside_transformer._has_transformers() else [])]
    (result,) = beside_transformer.measure({"tiny-b2-after300": setting}, names, Options(rounds=2, warmup=1), 60)
    for name in names:
        peer = result["peers"][name]
        assert len(peer["seconds"]) == 2 and peer["first_token_rows"] == 2
    assert result["peers"]["transformer"]["state_bytes"] == 2 * 300 * 2 * 64 * 4 * setting.llama["num_hidden_layers"]
    table = seed_table.beside_table([result])
    assert "TINY, b 2, after 300 tokens" in table and table.count("\n") == 2 + len(names)
    (late,) = beside_transformer.measure({"tiny": setting}, [OURS], Options(rounds=1, warmup=1), -1)
    assert late["peers"][OURS]["skipped"].startswith("left out")


def test_a_table_of_lengths_names_the_crossings():
    results = []
    for l in (100, 1000, 10_000):
        entries = {OURS: harness.timed([l * 1e-5]), "attention": harness.timed([l * l * 1e-8])}
        about = {"l": l, "b": 1, "h": 8, "backward": False}
        results.append(harness.measurement("scan_lengths", f"l{l}", about, OPTIONS, entries))
    table = seed_table.crossing_table(results)
    assert "tokens, forward" in table and "the scan overtakes attention at about 1,000 tokens" in table


def test_a_peer_that_breaks_is_a_line_of_the_result(monkeypatch):
    def broken(name, setting, options):
        raise TypeError("no such argument")

    monkeypatch.setattr(beside_transformer, "build", broken)
    setting = beside_transformer.QUICK["tiny-b1-after10"]
    (result,) = beside_transformer.measure({"tiny": setting}, [OURS], Options(rounds=1, warmup=1), 60)
    assert result["peers"][OURS]["skipped"] == "failed: TypeError: no such argument"
