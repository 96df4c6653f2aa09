"""The benchmarks' arithmetic and their writer, on made numbers. Nothing here asserts a speed."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
import time
from pathlib import Path

import forked
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import (
    decode,
    document_cost,
    harness,
    memory,
    peers,
    scan,
    seed_table,
    several_gpus,
    train_step,
    versions,
)
from benchmarks.harness import FLOOR, OURS, Options, Unavailable
from mamba2_min.ops.loss import linear_cross_entropy
from mamba2_min.ssd import ssd_chunked

OPTIONS = Options(rounds=3, warmup=1, memory=False)


def made(setting="small-b8-l256", length=256, benchmark="train_step", seconds=None, **about):
    """A measurement with made seconds."""
    seconds = seconds or {OURS: [0.5, 0.4, 0.6], "transformers-mamba2": [2.0, 2.0, 1.8], FLOOR: [0.3, 0.2, 0.3]}
    entries = {name: harness.timed(values, tokens=8 * length) for name, values in seconds.items()}
    entries[OURS]["peak_bytes"] = 250_000_000 * length // 256
    entries["mamba_ssm"] = {"skipped": "runs on a GPU only"}
    about = {"batch": 8, "length": length, "model": {"d_model": 256, "n_layer": 4}, **about}
    return harness.measurement(benchmark, setting, about, OPTIONS, entries)


def test_each_benchmark_is_imported_without_the_folder_of_the_tests():
    assert forked.status_of(forked.fork(_import_benchmarks)) == 0


def _import_benchmarks():
    sys.path[:] = [folder for folder in sys.path if Path(folder).name != "tests"]
    for file in sorted((forked.ROOT / "benchmarks").rglob("*.py")):
        if file.stem != "__init__":
            importlib.import_module(".".join(file.relative_to(forked.ROOT).with_suffix("").parts))


def test_ratios_are_taken_round_by_round():
    result = made()
    assert harness.ratio(result, "transformers-mamba2") == pytest.approx(4.0)  # of 4, 5 and 3
    assert harness.ratio(result, FLOOR) == pytest.approx(0.5)  # of 0.6, 0.5 and 0.5
    assert harness.ratio(result, OURS) == 1.0
    assert harness.ratio(result, "mamba_ssm") is None
    assert harness.ratio(result, "nobody") is None


def test_spread_is_median_and_quartiles():
    assert harness.spread([5.0, 1.0, 2.0, 4.0, 3.0]) == (2.0, 3.0, 4.0)
    assert harness.spread([7.0]) == (7.0, 7.0, 7.0)
    entry = harness.timed([2.0, 4.0, 6.0], things=2, tokens=10)
    assert entry == {"seconds": [1.0, 2.0, 3.0], "median": 2.0, "quartiles": [1.5, 2.5], "tokens_per_second": 5.0}


def test_peers_take_turns_and_none_is_always_first():
    order = []
    works = {name: lambda name=name: order.append(name) for name in "abc"}
    seconds = harness.take_turns(works, OPTIONS)
    assert "".join(order) == "abc" + "bca" + "cab" + "abc"
    assert {name: len(values) for name, values in seconds.items()} == dict.fromkeys("abc", 3)
    assert harness.take_turns({}, OPTIONS) == {}


def test_a_peer_that_cannot_run_says_why():
    def prepare(name, setting, options):
        if name == "absent":
            raise Unavailable("not installed")
        return (lambda: None), {"fact": setting}

    entries = harness.compare(["absent", "present"], "here", OPTIONS, None, prepare, things=2, tokens=3)
    assert entries["absent"] == {"skipped": "not installed"}
    assert entries["present"]["fact"] == "here" and len(entries["present"]["seconds"]) == 3


def hold(megabytes: int) -> int:
    meter = harness.MemoryMeter("cpu")
    earlier = torch.ones(3 * megabytes * 250_000)  # before the meter is started, and gone
    del earlier
    meter.start()
    tensor = torch.ones(megabytes * 250_000)
    del tensor
    return meter.peak()


def fail() -> None:
    raise MemoryError


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux can forget an earlier peak")
def test_peak_memory_is_what_was_held_at_once():
    assert harness.in_fresh_process(hold, 200) == pytest.approx(200e6, rel=0.1)


@pytest.mark.slow
def test_out_of_memory_is_a_result_and_no_crash():
    with pytest.raises(Unavailable, match="out of memory"):
        harness.in_fresh_process(fail)


def test_results_say_what_is_needed_to_repeat_them(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_step.py", "--threads", "2", "--out", "/home/someone/x", "--out=/y"])
    result = made()
    assert result["command"] == "python -m benchmarks.train_step --threads 2"
    assert result["versions"]["torch"] == torch.__version__
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", result["date"])
    assert set(result["machine"]) == {"cpu", "architecture", "threads", "memory_gb", "system"}


def test_saving_replaces_the_setting_and_keeps_the_others(tmp_path):
    for length in (4096, 256, 1024):
        path = harness.save(made(f"l{length}", length), tmp_path)
    again = made("l1024", 1024, seconds={OURS: [9.0], "transformers-mamba2": [9.0], FLOOR: [9.0]})
    assert harness.save(again, tmp_path) == path == tmp_path / "train_step-cpu.json"
    results = harness.load(path)
    assert [r["setting"] for r in results] == ["l256", "l1024", "l4096"]
    assert results[1] == json.loads(json.dumps(again))
    unusual = again | {"about": again["about"] | {"precision": "bf16"}}
    assert harness.save(unusual, tmp_path).name == "train_step-cpu-bf16.json"
    assert harness.load(tmp_path / "none.json") == []


def test_a_table_replaces_what_stands_between_its_markers(tmp_path):
    harness.save(made(), tmp_path)
    text = "# Title\n<!-- benchmark:train_step-cpu -->\nold\n<!-- /benchmark:train_step-cpu -->\nend\n"
    new, missing = seed_table.rewrite(text, tmp_path)
    assert missing == []
    assert new.startswith("# Title\n<!-- benchmark:train_step-cpu -->\n\n| ") and new.endswith("-->\nend\n")
    rows = [line for line in new.splitlines() if line.startswith("|")]
    assert rows[2] == "| d 256, 4 layers, b 8, l 256 | **mamba2_min** | 4,100 (3,720 to 4,550) | 1.00 | 250 MB |"
    assert rows[3].startswith("|  | `transformers` Mamba2 | 1,020 (1,020 to 1,080) | 4.00 |")
    assert rows[4].startswith("|  | matrix products alone | 6,830 ") and "| 0.50 |" in rows[4]
    assert len(rows) == 5  # nothing is said of a peer that only another machine can run
    assert "2 threads; " in new and "median of 3 rounds" in new and "python -m benchmarks.train_step" in new
    assert seed_table.rewrite(new, tmp_path) == (new, [])


def test_a_table_without_memory_has_no_column_for_it():
    result = made()
    assert seed_table.row_table([result]).splitlines()[0].endswith("| its time / ours | peak memory |")
    del result["peers"][OURS]["peak_bytes"]
    table = seed_table.row_table([result]).splitlines()
    assert table[0].endswith("| its time / ours |") and table[2].endswith("| 1.00 |")


def test_faults_have_a_table_and_a_figure(tmp_path):
    for name, survived in (("training", 7), ("generating", 5)):
        peers = {"kill": {"faults": 7, "survived": survived}, "full disk": {"faults": 2, "survived": 2}}
        harness.save(harness.measurement("faults", name, {"seed": 0}, OPTIONS, peers), tmp_path)
    text = "<!-- benchmark:faults-cpu -->\n<!-- /benchmark:faults-cpu -->\n"
    text += "| <!-- figure:faults-cpu --><!-- /figure:faults-cpu --> |"
    new, _ = seed_table.rewrite(text, tmp_path)
    assert "|  | kill | full disk |" in new and "| training | 7 of 7 | 2 of 2 |" in new and "rounds" not in new
    assert new.endswith("| <!-- figure:faults-cpu -->16 of 18<!-- /figure:faults-cpu --> |")
    assert seed_table.rewrite(new, tmp_path) == (new, [])
    assert seed_table.rewrite(text, tmp_path / "none") == (text, ["faults-cpu", "faults-cpu"])


def test_only_some_settings_can_be_asked_for(tmp_path):
    harness.save(made("small-x"), tmp_path)
    harness.save(made("base-x", d_model=768), tmp_path)
    text = "<!-- benchmark:train_step-cpu/small -->\n<!-- /benchmark:train_step-cpu/small -->"
    new, _ = seed_table.rewrite(text, tmp_path)
    assert new.count("mamba2_min**") == 1


def test_a_table_without_results_is_left_as_it_is(tmp_path):
    text = "<!-- benchmark:decode-cuda -->\nold\n<!-- /benchmark:decode-cuda -->"
    assert seed_table.rewrite(text, tmp_path) == (text, ["decode-cuda"])


def test_the_tables_of_the_documents_are_those_of_the_results():
    documents = [forked.ROOT / "README.md", *sorted((forked.ROOT / "docs").glob("*.md"))]
    texts = {path.name: path.read_text(encoding="utf-8") for path in documents}
    assert sum("<!-- benchmark:" in text for text in texts.values()) >= 2  # the check reads something
    for name, text in texts.items():
        new, missing = seed_table.rewrite(text, forked.ROOT / "benchmarks" / "results")
        assert (new == text, missing) == (True, []), f"{name}: run python -m benchmarks.seed_table"


def test_lengths_make_a_row_each_and_a_picture(tmp_path):
    for length in (1024, 256, 512):
        path = harness.save(made(f"small-b8-l{length}", length, "memory"), tmp_path)
    results = harness.load(path)
    table = seed_table.length_table(results)
    assert table.splitlines()[0] == "|  | **mamba2_min** | `transformers` Mamba2 |"
    assert table.splitlines()[2] == "| d 256, 4 layers, b 8, l 256 | 4,100/s; 250 MB | 1,020/s |"
    assert "1 GB" in table.splitlines()[4]
    picture = tmp_path / "images" / "memory.png"
    assert seed_table.plot(results, picture)
    assert 1_000 < picture.stat().st_size < 150_000
    assert not seed_table.plot(results[:2], tmp_path / "too_few.png")
    other_batch = made("small-b1-l128", 128, "memory", batch=1)
    assert not seed_table.plot([*results, other_batch], tmp_path / "mixed.png")


def test_rates_of_one_model_make_a_picture_though_batches_differ(tmp_path):
    few = [made(f"small-b{2048 // l}-l{l}", l, batch=2048 // l) for l in (1024, 256)]
    other = made("base-b2-l512", 512, batch=2, model={"d_model": 768, "n_layer": 4})
    assert not seed_table.plot_rates([*few, other], tmp_path / "it.png")  # three lengths, but not of one model
    three = [*few, other, made("small-b4-l512", 512, batch=4)]
    assert seed_table.plot_rates(three, tmp_path / "it.png")
    assert 1_000 < (tmp_path / "it.png").stat().st_size < 150_000


def test_writer_as_a_command(tmp_path, monkeypatch, capsys):
    harness.save(made(), tmp_path)
    document = tmp_path / "README.md"
    document.write_text("<!-- benchmark:train_step-cpu -->\n<!-- /benchmark:train_step-cpu -->\n")
    where = ["--results", str(tmp_path), "--documents", str(document), "--images", str(tmp_path)]
    for flags, status, said in ((["--check"], 1, "out of date: README.md"), ([], 0, "written"), (["--check"], 0, "")):
        monkeypatch.setattr(sys, "argv", ["seed_table", *where, *flags])
        assert seed_table.main() == status
        assert said in capsys.readouterr().out
    assert "mamba2_min" in document.read_text()


def test_committed_results_name_no_machine():
    for path in harness.RESULTS.glob("*.json"):
        assert not re.search(r"/(home|work|tmp|root|Users)\b", path.read_text()), path.name


@pytest.mark.parametrize(("value", "text"), [(4096, "4,100"), (99.96, "100"), (0.01234, "0.0123"), (123456, "123,000")])
def test_numbers_have_three_digits(value, text):
    assert seed_table.number(value) == text


def test_sizes_have_units():
    assert [seed_table.size(n) for n in (None, 0, 2_500_000, 22_500_000_000)] == ["", "0 MB", "2.5 MB", "22.5 GB"]


def test_a_peer_that_would_take_too_much_is_left_out():
    assert memory.can_go_on({"peak_bytes": 10**9}, 2, limit_gb=2)
    assert not memory.can_go_on({"peak_bytes": 10**9}, 2, limit_gb=1.9)
    assert not memory.can_go_on({"skipped": "out of memory"}, 1, limit_gb=100)


def test_plain_scan_is_the_same_map():
    setting = scan.Setting(2, 96, 3, p=8, n=4, q=32)
    inputs = [t.detach().double().requires_grad_() for t in scan.inputs_of(setting, OPTIONS)]
    dy = torch.randn(2, 96, 3, 8, dtype=torch.float64)
    plain, ours = (scan.scan_of(name, setting)(*inputs) for name in ("plain-autograd", "mamba2_min"))
    torch.testing.assert_close(plain, ours, rtol=1e-9, atol=1e-9)
    for got, wanted in zip(*(torch.autograd.grad(y, inputs, dy) for y in (plain, ours)), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-8)


def test_plain_scan_takes_what_a_gpu_gives_it():
    setting = scan.Setting(1, 64, 2, p=8, n=4, q=32)
    x, dt, A, B, C, D = scan.inputs_of(setting, OPTIONS)
    plain = scan.scan_of("plain-autograd", setting)(x.bfloat16(), dt, A, B.bfloat16(), C.bfloat16(), D)
    assert plain.dtype == torch.bfloat16
    exact = ssd_chunked(x, dt, A, B, C, D)[0]
    assert (plain - exact).abs().max() < 0.05 * exact.abs().max()


def test_kept_bytes_are_those_beyond_the_inputs():
    x = torch.randn(1000, requires_grad=True)
    assert scan.kept_bytes(lambda: x * x, [x]) == 0
    assert scan.kept_bytes(lambda: x.exp(), [x]) == 4000  # its own result
    assert scan.kept_bytes(lambda: x.exp().exp(), [x]) == 8000


def test_floor_has_the_products_of_the_model():
    """Its multiplications are those of every matrix parameter, once forward and twice backward."""
    setting = train_step.QUICK["tiny-b2-l48"]
    c = setting.config
    matrices = c.n_layer * c.d_model * (c.d_in_proj + c.d_inner) + c.vocab_size * c.d_model
    with FlopCounterMode(display=False) as counter:
        train_step.floor_of(setting, OPTIONS)()
    assert counter.get_total_flops() == 3 * 2 * setting.tokens * matrices


@pytest.mark.parametrize(
    "name",
    ["mamba2_min", "transformer", "transformer-deep", pytest.param("transformers-mamba2", marks=pytest.mark.slow)],
)
def test_a_peer_has_the_mamba2s_size_and_learns(name):
    setting = train_step.QUICK["tiny-b2-l48"]
    ids, targets = train_step.batch_of(setting, "cpu")
    peer = build(name)
    assert peers.parameters(peer.model) == pytest.approx(setting.config.num_parameters(), rel=0.02)
    step = train_step.step_of(peer, ids, targets, OPTIONS)
    before = peer.loss(ids, targets).item()
    for _ in range(5):
        step()
    assert peer.loss(ids, targets).item() < before


@pytest.mark.parametrize(
    "name", ["mamba2_min", "transformer", pytest.param("transformers-mamba2", marks=pytest.mark.slow)]
)
def test_a_peer_steps_to_what_it_would_have_read(name):
    peer = build(name)
    peer.model.eval()
    ids = torch.randint(499, (2, 12))
    with torch.no_grad():
        wanted, _ = peer.prefill(ids)
        _, state = peer.prefill(ids[:, :-1])
        got, state = peer.step(ids[:, -1], state)
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)
    assert peer.state_bytes(state) > 0


def build(name):
    try:
        return peers.build(name, peers.TINY, "cpu")
    except Unavailable as reason:
        pytest.skip(str(reason))


def test_decoding_can_be_wound_back():
    peer = peers.build("transformer", peers.TINY, "cpu")
    prompt = torch.randint(499, (1, 20))
    with torch.no_grad():
        logits, state = peer.prefill(prompt)
        ids = logits.argmax(-1)
        first, _ = peer.step(ids, state)
        assert peer.state_bytes(state) >= 21 * 2 * peer.model.config.n_layer * 64 * 4
        peer.rewind(state, 20)
        again, _ = peer.step(ids, state)
    assert torch.equal(first, again)


def test_peers_compute_the_loss_of_their_logits():
    peer = peers.build("mamba2_min", peers.TINY, "cpu")
    ids = torch.randint(499, (2, 16))
    hidden, _ = peer.model.hidden(ids)
    torch.testing.assert_close(peer.loss(ids, ids), linear_cross_entropy(hidden, peer.model.lm_head.weight, ids))


@pytest.mark.parametrize("kind", ["int8", "bf16"])
def test_narrow_weights_are_a_peer_of_the_same_size(kind):
    peer, usual = build(f"mamba2_min+{kind}"), build("mamba2_min")
    assert peers.parameters(peer.model) == peers.parameters(usual.model) == peers.TINY.num_parameters()
    ids = torch.randint(499, (2, 12))
    wanted, _ = usual.prefill(ids)
    _, state = peer.prefill(ids[:, :-1])
    got, _ = peer.step(ids[:, -1], state)
    assert 1e-5 < (got - wanted).norm() / wanted.norm() < 3e-2
    assert seed_table.label(f"mamba2_min+{kind}") == f"**mamba2_min**, {kind}"
    with pytest.raises(Unavailable, match="on a CPU only"):
        peers.build(f"mamba2_min+{kind}", peers.TINY, "cuda")


def test_a_narrow_peer_decodes(capsys, monkeypatch):
    names = ["mamba2_min", "mamba2_min+int8"]
    monkeypatch.setattr(Options, "prepare", lambda options: None)  # which is for the whole process
    monkeypatch.setattr(sys, "argv", ["decode", "--quick", "--no-memory", "--peers", *names])
    decode.main()
    shown = capsys.readouterr().out
    assert shown.count("mamba2_min+int8") == 2 and "nan" not in shown


@pytest.mark.parametrize(
    "name",
    [
        "nobody",
        "mamba2_min+fast",
        "mamba_ssm+compile",
        "transformer+int8",
        "transformer+compile+bf16state",
        "mamba_ssm+bf16state",
    ],
)
def test_unknown_peers_are_refused(name):
    with pytest.raises(ValueError, match=r"unknown|has no|no such suffix|steps that are compiled"):
        peers.build(name, peers.TINY, "cpu")


def test_every_bundled_document_costs_something_and_none_is_turned_down():
    result = document_cost.measure("bundled", 12, OPTIONS)
    assert result["about"]["documents"] == 12 and result["about"]["refused"] == 0
    assert 0 < result["peers"]["own work"]["median"] < 1


def test_unknown_settings_end_in_one_line(capsys):
    args = harness.parser("train_step", "", ["a"]).parse_args(["--settings", "nothing"])
    with pytest.raises(SystemExit, match="no setting nothing; there are tiny-b2-l48"):
        harness.choose(train_step.QUICK, args)


def test_two_versions_take_turns(tmp_path, monkeypatch):
    turns = []

    def turn(checkout, setting, threads, processor_time):
        turns.append(checkout)
        return 0.5 if checkout == tmp_path else 0.4

    monkeypatch.setattr(versions, "turn", turn)
    result = versions.measure("train-tiny", versions.QUICK["train-tiny"], tmp_path, 2, 1)
    assert turns == [tmp_path, versions.ROOT, versions.ROOT, tmp_path]
    assert result["about"]["ratio"] == pytest.approx(1.25) and result["peers"]["now"]["median"] == 0.4
    assert str(tmp_path) not in json.dumps(result)


@pytest.mark.slow
def test_a_turn_is_a_process_of_its_own():
    for setting in versions.QUICK.values():
        assert versions.turn(versions.ROOT, setting, 1) > 0
    with pytest.raises(SystemExit, match=r"the package in .* failed: "):
        versions.turn(versions.ROOT, {**versions.QUICK["train-tiny"], "config": {"vocab_size": 0}}, 1)


def test_processes_are_compared_round_by_round():
    alone = [{"seconds": [2.0, 2.0], "peaks": [7], "reports": []}, {"seconds": [4.0, 4.0], "peaks": [9], "reports": []}]
    many = [{"seconds": [1.0, 9.0, 1.0], "peaks": [1, 2], "reports": []}, {"skipped": "out of memory"}]
    assert several_gpus.times_as_fast(many, alone, (300, 100)) == 6
    assert several_gpus.times_as_fast(many[1:], alone, (300, 100)) is None
    assert several_gpus.entry(many, 300) == {"skipped": "out of memory"}
    found = several_gpus.entry(alone, 300)
    assert (found["median"], found["tokens_per_second"], found["peak_bytes"]) == (3, 100, 9)


def test_a_side_that_fails_or_takes_too_long_costs_itself_alone():
    job = {"device": "nowhere", "threads": 1, "precision": "float32", "shape": "tiny", "stretches": 1, "sharded": False}
    assert "nowhere" in several_gpus.launch(job, 1, time.monotonic() + 60)["skipped"]
    assert several_gpus.launch(job, 2, 0.0) == {"skipped": "it exceeded its time limit"}


@pytest.mark.parametrize(
    "text, value",
    [
        ("d_model=64", 64),
        ("dropout=0.1", 0.1),
        ("graph=true", True),
        ("optimizer=muon", "muon"),
        ('optimizer="muon"', "muon"),
        ("a=b=1", None),
        ("lr", None),
        ("lr=", None),
    ],
)
def test_an_assignment_is_a_name_and_a_value_of_json_or_a_word(text, value):
    if value is None:
        with pytest.raises(argparse.ArgumentTypeError, match="NAME=VALUE"):
            harness.assignment(text)
    else:
        assert harness.assignment(text) == (text.partition("=")[0], value)
