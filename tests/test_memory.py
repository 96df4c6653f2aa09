"""How much memory a training needs, how much there is, and what is said where that is too little."""

import dataclasses
import os
import re
import subprocess
import sys

import pytest
import torch
from small_runs import ROOT, SHAPE

from mamba2_min import devices
from mamba2_min.config import Mamba2Config
from mamba2_min.data.room import check_room
from mamba2_min.errors import UserError
from mamba2_min.settings import Settings
from mamba2_min.training import memory

MEASURE = """
import re, sys, tempfile
import torch
from mamba2_min import devices
from mamba2_min.config import Mamba2Config
from mamba2_min.data.corpus import Corpus
from mamba2_min.models.mamba2 import Mamba2LM
from mamba2_min.settings import Settings
from mamba2_min.training import memory
from mamba2_min.data.tokenizer import WordTokenizer
from mamba2_min.training.trainer import Trainer

def status(field):
    return 1024 * int(re.search(field + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

devices.keep_freed_memory()
torch.set_num_threads(1)
vocab_size, d_model, n_layer, d_state, batch, context = map(int, sys.argv[2:])
config = Mamba2Config(vocab_size, d_model, n_layer, d_state)
tokenizer = WordTokenizer([f"w{k}" for k in range(vocab_size - 257)])
tokens = torch.randint(vocab_size, (2 * batch * context,), dtype=torch.int32)
corpus = Corpus(tokenizer, tokens, tokens[:1000], len(tokens), 1000, 1, 1, 1, 1)
before = status("VmRSS")
with tempfile.TemporaryDirectory() as out:
    settings = Settings(context=context, batch_size=batch, max_steps=2, precision="float32", optimizer=sys.argv[1])
    Trainer(Mamba2LM(config, seed=0), corpus, settings, out).train()
print(status("VmHWM") - before, memory.training_memory(config, batch, context, optimizer=sys.argv[1]))
"""
USUAL = (3000, 128, 2, 64, 4, 256)
MORE = [
    (300, 64, 1, 16, 2, 32),
    (4000, 192, 3, 64, 8, 256),
    (8192, 256, 4, 64, 8, 256),
    (8192, 256, 4, 64, 32, 256),
    (8192, 256, 4, 64, 2, 1024),
    (30000, 64, 2, 64, 16, 512),
    (2000, 512, 8, 128, 4, 256),
    (1000, 256, 2, 256, 8, 1024),
    (1000, 128, 12, 64, 4, 512),
]
LARGE = (500, 512, 8, 64, 1, 16)  # beside its batch: a step of Muon takes more than the gradients


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="measured where the system keeps the peak")
@pytest.mark.parametrize(
    "optimizer, shape",
    [
        ("adamw", USUAL),
        ("muon", LARGE),
        *(pytest.param("adamw", shape, marks=pytest.mark.slow) for shape in (*MORE, LARGE)),
        *(pytest.param("muon", shape, marks=pytest.mark.slow) for shape in (USUAL, *MORE)),
    ],
)
def test_the_memory_that_is_announced_is_enough_and_not_much_more(optimizer, shape):
    command = [sys.executable, "-c", MEASURE, optimizer, *map(str, shape)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, timeout=300)
    peak, estimate = map(int, done.stdout.split())
    assert peak <= estimate <= 1.6 * peak, f"{shape}: {peak / 1e6:.0f} MB taken, {estimate / 1e6:.0f} MB announced"


def test_the_memory_that_is_announced_for_a_gpu_is_what_one_took():
    """130M parameters in bf16 on an H200, compiled: 16.3 GB (docs/LOG.md)."""
    config = Mamba2Config(vocab_size=50_288, d_model=768, n_layer=24, d_state=128, chunk_size=128)
    assert 16.3e9 <= memory.training_memory(config, 8, 2048, "cuda", precision="bf16") <= 1.6 * 16.3e9


def test_too_little_memory_says_what_to_lower_and_to_what(monkeypatch):
    config = Mamba2Config(vocab_size=1000, **SHAPE)
    settings = Settings(context=4096, batch_size=64)
    device = torch.device("cpu")
    need = memory.training_memory(config, 64, 4096)
    least = memory.training_memory(config, 1, 1)
    monkeypatch.setattr(devices, "free_memory", lambda device: (need + least) // 2)
    with pytest.raises(UserError) as error:
        memory.check_memory(config, settings, device)
    says = str(error.value)
    lower = re.search(r"lower --batch-size from 64 to (\d+) or --context from 4096 to (\d+); --batch-size auto", says)
    assert lower, says
    batch, context = map(int, lower.groups())
    memory.check_memory(config, dataclasses.replace(settings, batch_size=batch), device)
    memory.check_memory(config, dataclasses.replace(settings, context=context), device)
    for more in ({"batch_size": batch + 1}, {"context": context + 1}):  # as much as there is room for
        with pytest.raises(UserError):
            memory.check_memory(config, dataclasses.replace(settings, **more), device)
    auto = memory.fit_to_memory(config, dataclasses.replace(settings, adapt_micro_batch=True), device)
    assert batch / 2 < auto.micro_batch <= batch and auto.batch_size == 64
    memory.check_memory(config, settings, device, ignore=True)
    monkeypatch.setattr(devices, "free_memory", lambda device: least // 2)
    with pytest.raises(UserError, match="the model alone is too large; lower --d-model, --n-layer or --vocab-size"):
        memory.check_memory(config, settings, device)
    monkeypatch.setattr(devices, "free_memory", lambda device: None)
    assert memory.check_memory(config, settings, device)[1] == ""


# Reading


def test_documents_that_do_not_fit_are_refused_unread(tmp_path, monkeypatch):
    huge = tmp_path / "a.md"
    huge.touch()
    os.truncate(huge, 10**9)  # a thousand million NULs in one line, which take no room on the disk
    monkeypatch.setattr(devices, "free_host_memory", lambda: 8 * 10**9)
    for path in (tmp_path, huge):
        with pytest.raises(UserError) as error:
            check_room(path, None)
        assert str(error.value).startswith(
            "the documents are 1.0 GB: reading them takes about 16.0 GB, and 8.0 GB is free; "
            "add --max-documents-bytes 500000000 to train on a part"
        )
    monkeypatch.setattr(devices, "free_host_memory", lambda: 25 * 10**9)
    check_room(tmp_path, None)
    check_room(tmp_path, tmp_path)
    monkeypatch.setattr(devices, "free_host_memory", lambda: 19 * 10**9)
    with pytest.raises(UserError, match=r"the documents are 2\.0 GB"):
        check_room(tmp_path, tmp_path)  # training and validation documents
    monkeypatch.setattr(devices, "free_host_memory", lambda: 8 * 10**9)
    check_room(tmp_path, max_bytes=5 * 10**8)  # as the message says


def test_files_that_are_not_read_need_no_memory(tmp_path, monkeypatch):
    (tmp_path / "a.md").write_text("Some notes, beside a film.")
    for name in ("film.mp4", "notes.md.zip", "README.md", ".hidden.md", ".trash/b.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, 10**9)
    (tmp_path / "link.md").symlink_to(tmp_path / "film.mp4")
    monkeypatch.setattr(devices, "free_host_memory", lambda: 10**6)
    check_room(tmp_path, None)


# Control groups


MEMINFO = "MemTotal:       16000000 kB\nMemFree:          500000 kB\nMemAvailable:    8000000 kB\n"
V2 = {"memory.max": "4000000000", "memory.current": "3900000000", "memory.stat": "anon 500000000\n"}
V1 = {"memory.limit_in_bytes": "4000000000", "memory.usage_in_bytes": "3900000000", "memory.stat": "rss 500000000\n"}
CACHE2 = "inactive_file 2000000000\nactive_file 1000000000\nslab_reclaimable 100000000\nshmem 7\n"
CACHE1 = "total_inactive_file 2000000000\ntotal_active_file 1000000000\ninactive_file 5\n"
UNLIMITED = {"memory.max": "max", "memory.current": "3900000000", "memory.stat": CACHE2}
UNLIMITED1 = {**V1, "memory.limit_in_bytes": "9223372036854771712"}
# What is in sys/fs/cgroup, what proc/self/cgroup says, and how much is then free.
GROUPS = {
    "none": ({}, None, 8_192_000_000),
    "no limit": ({"": UNLIMITED}, "0::/", 8_192_000_000),
    "a limit": ({"": V2}, "0::/", 100_000_000),
    "a limit, and most of it is cache": ({"": {**V2, "memory.stat": CACHE2}}, "0::/", 3_200_000_000),
    "over the limit": ({"": {**V2, "memory.current": "5000000000"}}, "0::/", 0),
    "no statistics": ({"": {**V2, "memory.stat": "?"}}, "0::/", 100_000_000),
    "the process's own group": ({"a.slice/b.scope": V2}, "0::/a.slice/b.scope", 100_000_000),
    "a group around it": ({"a.slice": V2, "a.slice/b.scope": UNLIMITED}, "0::/a.slice/b.scope", 100_000_000),
    "another's group": ({"c.slice": V2}, "0::/a.slice", 8_192_000_000),
    "version 1, no limit": ({"memory": UNLIMITED1}, "4:memory:/", 8_192_000_000),
    "version 1": ({"memory": V1}, "4:cpu,memory:/docker/7c2", 100_000_000),
    "version 1, cache": ({"memory": {**V1, "memory.stat": CACHE1}}, "4:memory:/docker/7c2", 3_100_000_000),
    "version 1, own group": ({"memory/docker/7c2": V1}, "5:cpu:/\n4:memory:/docker/7c2", 100_000_000),
    "nonsense": ({"": {"memory.max": "x", "memory.current": ""}}, "?\n::\n", 8_192_000_000),
}


@pytest.mark.parametrize("name", GROUPS)
def test_a_container_may_use_its_limit_and_its_cache_counts_as_free(tmp_path, name):
    groups, own, expected = GROUPS[name]
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text(MEMINFO)
    if own is not None:
        (tmp_path / "proc" / "self" / "cgroup").write_text(own + "\n")
    for group, files in groups.items():
        folder = tmp_path / "sys" / "fs" / "cgroup" / group
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            (folder / file).write_text(text + "\n")
    assert devices.free_host_memory(tmp_path) == expected


def test_a_system_that_does_not_tell(tmp_path):
    assert devices.free_host_memory(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: much\n")
    assert devices.free_host_memory(tmp_path) is None
