"""Whatever a file holds, its reader gives what was asked for or says in one line why not; and never runs it.

Each reader gets a few hundred inputs here and 10,000 under `slow`: arbitrary bytes, arbitrary JSON, and files of its
own with something in them changed.
"""

import collections
import copy
import functools
import io
import json
import math
import os
import pickle
import random
import subprocess
import sys
import warnings
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_runs import SHAPE, make_trainer, same, write_documents

from mamba2_min import files
from mamba2_min.checkpoints import checkpoint, pickles
from mamba2_min.config import Mamba2Config
from mamba2_min.data.corpus import load_corpus
from mamba2_min.data.tokenizer import WordTokenizer
from mamba2_min.errors import UserError
from mamba2_min.models.mamba2 import Mamba2LM
from mamba2_min.settings import DataSettings
from mamba2_min.training.metrics import MetricsLog, read_metrics
from mamba2_min.training.runs import RunSpec, read_plan
from mamba2_min.training.trainer import Trainer

# 10^12 heads, sizes that overflow, names that are nearly right: what a random value would seldom be.
ODD = st.sampled_from(
    [
        -1,
        0,
        1,
        2**31,
        2**63,
        10**12,
        10**400,
        0.5,
        1e308,
        -1e308,
        float("nan"),
        float("inf"),
        True,
        None,
        "",
        "words",
        "\x1b[2J",
        "../../etc/passwd",
        "\0",
        "é" * 50,
        [],
        {},
        [[]],
        "1",
        "train",
    ]
).map(copy.deepcopy)
JSON = st.recursive(
    ODD | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder after a few steps, and its data."""
    data = write_documents(tmp_path_factory.mktemp("data"))
    out = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_draw", lambda self: None)
        trainer = make_trainer(out, data, max_steps=4)
        trainer.train()
    values = DataSettings(str(data), vocab_size=None, min_count=1)
    RunSpec(values, {**SHAPE, "dropout": 0.1}, trainer.asked).save(out)
    return out, data


@st.composite
def changed(draw, value):
    """A JSON value with one to three of its parts, at any depth, replaced, renamed or taken away."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        at = value
        while isinstance(at, (dict, list)) and at:
            key = draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
            if isinstance(at[key], (dict, list)) and at[key] and draw(st.integers(0, 3)):
                at = at[key]
                continue
            action = draw(st.integers(0, 5))
            if action == 0:
                del at[key]
            elif action == 1 and isinstance(at, dict):
                at[draw(st.text(max_size=10))] = at.pop(key)
            else:
                at[key] = draw(JSON)
            break
    return value


@st.composite
def damaged(draw, content):
    """Bytes with a part cut off, overwritten, repeated or put in."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, max(len(content) - 1, 0)))
        length = draw(st.integers(1, 64))
        action = draw(st.integers(0, 3))
        if action == 0:
            del content[start:]
        elif action == 1:
            content[start : start + length] = draw(st.binary(min_size=length, max_size=length))
        elif action == 2:
            content[start:start] = content[start : start + length]
        else:
            del content[start : start + length]
    return bytes(content)


def fuzz(strategy, try_one, examples):
    """Runs `try_one` on so many examples; of all exceptions only a UserError of one line will do."""

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=examples < 1000,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def run_all(value):
        try:
            try_one(value)
        except UserError as error:
            assert str(error) and "\n" not in str(error)

    run_all()


thorough = pytest.mark.parametrize("examples", [200, pytest.param(10_000, marks=pytest.mark.slow)])


def as_bytes(value):
    return value if isinstance(value, bytes) else json.dumps(value).encode("utf-8", "surrogatepass")


def inputs(path):
    """Everything that a JSON file might hold."""
    content = path.read_bytes()
    return st.binary(max_size=200) | JSON | changed(json.loads(content)) | damaged(content)


@thorough
def test_the_tokenizer_reader(run, tmp_path, examples):
    path = tmp_path / "tokenizer.json"

    def try_one(value):
        path.write_bytes(as_bytes(value))
        tokenizer = WordTokenizer.load(path)
        text = "The owl, żółw 🦉 \x1b"
        assert tokenizer.pattern == "whitespace" or tokenizer.decode(tokenizer.encode(text)) == text

    fuzz(inputs(run[0] / "tokenizer.json"), try_one, examples)


@thorough
def test_the_tokenizer_of_given_words(examples):
    """Past the digest, which no accident gets by: words that are there twice, are empty, or are no words."""

    def try_one(words):
        try:
            tokenizer = WordTokenizer(words)
        except ValueError:
            return
        assert len(set(words)) == len(words) and len(tokenizer) == 257 + len(words)
        assert tokenizer.decode(range(1, len(tokenizer))) is not None

    fuzz(st.lists(JSON | st.text(max_size=3), max_size=8), try_one, examples)


@thorough
def test_the_config_reader(run, tmp_path, examples):
    (tmp_path / "model.pt").write_bytes((run[0] / "model.pt").read_bytes())

    def try_one(value):
        (tmp_path / "config.json").write_bytes(as_bytes(value))
        config, weights = checkpoint.load_model(tmp_path)
        assert weights["backbone.embedding.weight"].shape == (config.padded_vocab_size, config.d_model)

    fuzz(inputs(run[0] / "config.json"), try_one, examples)


@thorough
def test_config_values(examples):
    names = list(Mamba2Config(vocab_size=300).to_dict())

    def try_one(values):
        try:
            config = Mamba2Config.from_dict(values)
        except ValueError:
            return
        assert config.num_parameters() > 0

    fuzz(st.dictionaries(st.sampled_from(names) | st.text(max_size=8), ODD | st.integers(1, 512)), try_one, examples)


@thorough
def test_the_settings_reader(run, tmp_path, examples):
    def try_one(value):
        (tmp_path / "settings.json").write_bytes(as_bytes(value))
        plan = read_plan(tmp_path)
        assert plan.training.batch_size >= 1 and isinstance(plan.data.data, str)

    fuzz(inputs(run[0] / "settings.json"), try_one, examples)


@thorough
def test_the_metrics_reader(run, tmp_path, examples):
    path = tmp_path / "metrics.jsonl"
    content = (run[0] / "metrics.jsonl").read_bytes()
    records = [json.loads(line) for line in content.splitlines()]

    def try_one(value):
        lines = value if isinstance(value, list) else [value]
        path.write_bytes(value if isinstance(value, bytes) else b"".join(as_bytes(line) + b"\n" for line in lines))
        log = MetricsLog(path)
        log.rewind(len(lines))
        for record in read_metrics(path):
            assert record["split"] in ("train", "validation") and record["step"] >= 0

    fuzz(st.binary(max_size=200) | JSON | changed(records) | damaged(content), try_one, examples)


@thorough
def test_the_checkpoint_reader(run, tmp_path, examples):
    path = tmp_path / "last.pt"
    content = (run[0] / "last.pt").read_bytes()
    whole = checkpoint.load_tensors(run[0] / "last.pt")

    def try_one(value):
        path.write_bytes(value)
        saved = checkpoint.load_tensors(path)
        assert not isinstance(saved, dict) or whole.keys() or saved

    fuzz(st.binary(max_size=200) | damaged(content), try_one, examples)


PARTS = st.sampled_from(
    [
        "model",
        "optimizer",
        "windows",
        "guard",
        "torch_rng",
        "step",
        "seconds",
        "pending",
        "records",
        "best",
        "best_step",
        "evaluated_step",
        "stale",
        "micro_batch",
        "settings",
        "config",
        "documents",
        "tokenizer",
        "environment",
    ]
)
VALUES = JSON | st.sampled_from([torch.zeros(3), torch.zeros(0), {"state": {}, "param_groups": []}, {"nats": 1.0}])


@pytest.mark.parametrize("examples", [100, pytest.param(10_000, marks=pytest.mark.slow)])
def test_what_a_training_goes_on_from(run, tmp_path, examples):
    """A checkpoint that is whole, of which parts are something else: a training either goes on or says why not."""
    out, data = run
    whole = checkpoint.load_tensors(out / "last.pt")
    corpus = load_corpus(data, tokenizer=WordTokenizer.load(out / "tokenizer.json"))
    model = Mamba2LM(Mamba2Config(vocab_size=len(corpus.tokenizer), dropout=0.1, **SHAPE), seed=0)
    asked = RunSpec(DataSettings(), {}, read_plan(out).training).training
    rng = torch.get_rng_state()

    def try_one(changes):
        saved = copy.deepcopy(whole)
        for part, inner, value in changes:
            if inner is not None and isinstance(saved[part], dict) and saved[part]:
                saved[part][sorted(saved[part], key=str)[inner % len(saved[part])]] = value
            else:
                saved[part] = value
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoint, "load_tensors", lambda path: saved)
            trainer = Trainer(model, corpus, asked, out, resume=True)
        assert trainer.step >= 0 and trainer.ended() is not None
        trainer.model.train()

    try:
        change = st.tuples(PARTS, st.none() | st.integers(0, 50), VALUES)
        fuzz(st.lists(change, min_size=1, max_size=2), try_one, examples)
    finally:
        torch.set_rng_state(rng)


ODD_VALUES = [
    *(None, True, False, 0, 1, -1, 2, 7, 2**31 - 1, 2**31, 2**62, 10**30, -(2**70), 0.5, -0.5, 1e308, -1e308, 1e30),
    *(math.nan, math.inf, -math.inf, "", "x", "a\nb", "\x1b[2J", "0" * 64, b"x", [], [1], [[]], {}, {"a": 1}, {1: 2}),
    *((), (1, 2), {1}, 1j, torch.zeros(()), torch.zeros(0), torch.zeros(3), torch.full((2, 2), math.nan)),
    *(torch.zeros(3, dtype=torch.int64), torch.zeros(5056, dtype=torch.uint8), torch.Size([2]), torch.float32),
    *(torch.zeros(1).expand(10**6), torch.zeros(2, 2).to_sparse(), [[1]] * 3),
]


def odd_values(old):
    """What a leaf, or a branch, may be replaced by: of other kinds, and of its own kind but wrong."""
    yield from ODD_VALUES
    if isinstance(old, torch.Tensor):
        yield from (
            torch.zeros_like(old),
            old.flatten()[:1],
            old[None],
            old.clone().requires_grad_(old.dtype.is_floating_point),
        )
        yield from (
            old.double(),
            old.half(),
            old.long(),
            old.to(torch.complex64),
            old.to("meta"),
            old.flip(0) if old.dim() else old,
        )
        yield torch.zeros((), dtype=old.dtype).expand(old.shape)
        if old.dtype.is_floating_point:
            yield from (
                old * math.nan,
                torch.full_like(old, 1e30),
                -old - 1,
                old.t() if old.dim() == 2 else old.clone(),
            )
        else:
            yield torch.full_like(old, 255)
    if isinstance(old, dict):
        for key in list(old)[:3]:
            rest = {k: v for k, v in old.items() if k != key}
            yield from (rest, {**rest, "odd": old[key]}, {**old, "odd": 1})
    if isinstance(old, list):
        yield from (old * 2, old[:-1], old * 100, tuple(old))


def places(value, path=()):
    """The path of every leaf and branch."""
    if path:
        yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, (list, tuple)) else ():
        yield from places(value[key], (*path, key))


def replaced(value, path, new):
    if not path:
        return new
    copied = dict(value) if isinstance(value, dict) else list(value)
    copied[path[0]] = replaced(value[path[0]], path[1:], new)
    return tuple(copied) if isinstance(value, tuple) else copied


@pytest.mark.parametrize("count", [40, pytest.param(None, marks=[pytest.mark.slow, pytest.mark.timeout(7200)])])
def test_each_leaf_of_last_pt_replaced(run, tmp_path, count):
    """Each leaf by each odd value, in the file, then four steps: taken, with finite weights, or refused in one line."""
    out, data = run
    whole = checkpoint.load_tensors(out / "last.pt")
    cases = [
        (path, new) for path in places(whole) for new in odd_values(functools.reduce(lambda v, k: v[k], path, whole))
    ]
    assert len(cases) > 5000
    contents = {path.name: path.read_bytes() for path in out.iterdir()}
    ended = collections.Counter()
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        patch.setattr(Trainer, "_draw", lambda self: None)
        for path, new in random.Random(0).sample(cases, count) if count else cases:
            for name, content in contents.items():
                (tmp_path / name).write_bytes(content)
            torch.save(replaced(whole, path, new), tmp_path / "last.pt")
            try:
                trainer = make_trainer(tmp_path, data, max_steps=8, resume=True)
                trainer.train()
            except UserError as error:
                assert str(error) and "\n" not in str(error), (path, new)
                ended["refused"] += 1
                continue
            assert all(tensor.isfinite().all() for tensor in trainer.model.state_dict().values()), (path, new)
            assert trainer.step >= 4 and math.isfinite(trainer.best.loss), (path, new)
            ended["trained"] += 1
    assert ended["refused"] > 3 * ended["trained"] > 0


# Files that mean harm


class Harm:
    """Runs a command when it is unpickled."""

    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return os.system, (f"touch {self.proof}",)


def refused(match, function, *args):
    with pytest.raises(UserError, match=match) as error:
        function(*args)
    assert "\n" not in str(error.value)


def test_a_hostile_pickle_is_not_run(run, tmp_path):
    proof = tmp_path / "proof"
    path = tmp_path / "model.pt"
    (tmp_path / "config.json").write_bytes((run[0] / "config.json").read_bytes())
    torch.save({"backbone.embedding.weight": Harm(proof)}, path)
    refused("holds something other than tensors", checkpoint.load_tensors, path)
    refused("holds something other than tensors", checkpoint.load_model, tmp_path)
    refused("holds something other than tensors", Mamba2LM.from_pretrained, tmp_path)
    path.write_bytes(pickle.dumps(Harm(proof)))
    refused("model.pt", checkpoint.load_tensors, path)
    assert not proof.exists()


# Archives that lie


@pytest.fixture
def unread(monkeypatch):
    """Whatever is tried, torch never gets to see the file."""
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch.load was called"))


def test_an_archive_that_inflates_is_not_read(tmp_path, unread):
    path = tmp_path / "model.pt"
    torch.save({"x": torch.zeros(1 << 20)}, path)
    path.write_bytes(compressed(path.read_bytes()))
    refused("model.pt is compressed", checkpoint.load_tensors, path)


def compressed(content):
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for record in source.infolist():
            target.writestr(record.filename, source.read(record))
    return packed.getvalue()


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def patched(content, at, replacement):
    at = at % len(content)
    return content[:at] + replacement + content[at + len(replacement) :]


def entry(content, number=0):
    """Where the central directory's entry of that number begins."""
    at = -1
    for _ in range(number + 1):
        at = content.index(b"PK\x01\x02", at + 1)
    return at


def decoy(content):
    """The directory of another archive, behind which its own end record points: the true one is compressed."""
    other = saved({"y": torch.zeros(2)})
    start = content.index(b"PK\x01\x02")
    return content[:start] + other[other.index(b"PK\x01\x02") :]


def plain_zip(*records, comment=b""):
    """An archive as zipfile writes it, without 64-bit fields: (name, content) each."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that are there twice
        with zipfile.ZipFile(file, "w") as archive:
            archive.comment = comment
            for name, content in records:
                archive.writestr(name, content)
    return file.getvalue()


BOMB, WHOLE = compressed(saved({"x": torch.zeros(1 << 20)})), saved({"x": torch.arange(4.0), "z": torch.ones(3)})
PICKLE = zipfile.ZipFile(io.BytesIO(WHOLE)).read("archive/data.pkl")
LIES = {
    **{f"an end record without {n} bytes": BOMB[:-n] for n in (1, 2, 4, 10, 18, 22)},
    "no end record": BOMB[: BOMB.rindex(b"PK\x05\x06")],
    "something behind the end": WHOLE + b"x",
    "a bomb behind the end": WHOLE + BOMB,
    "a bomb before the beginning": BOMB + WHOLE,
    "a decoy directory": decoy(BOMB),
    "an end record in a comment": patched(WHOLE, -2, b"\x16\0") + WHOLE[-22:],
    "a comment": plain_zip(("a/data.pkl", PICKLE), comment=b"hello"),
    "a locator that leads elsewhere": patched(WHOLE, -42 + 8, (5).to_bytes(8, "little")),
    "a longer 64-bit record": patched(WHOLE, -98 + 4, (45).to_bytes(8, "little")),
    "another number of entries": patched(WHOLE, -98 + 32, (3).to_bytes(8, "little")),
    "a directory elsewhere": patched(WHOLE, -98 + 48, (8).to_bytes(8, "little")),
    "a longer directory": patched(WHOLE, -98 + 40, (1 << 40).to_bytes(8, "little")),
    "two records of one name": plain_zip(("a/data.pkl", PICKLE), ("a/data.pkl", PICKLE)),
    "names that differ in case": plain_zip(("a/data.pkl", PICKLE), ("a/DATA.PKL", b"\x80\x02]."), ("a/version", b"3")),
    "two folders": plain_zip(("a/data.pkl", PICKLE), ("b/data.pkl", PICKLE)),
    "no folder": plain_zip(("data.pkl", PICKLE)),
    "no structure": plain_zip(("a/version", b"3")),
    "a storage that is missing": plain_zip(("a/data.pkl", PICKLE), ("a/version", b"3")),
    "a storage that is short": plain_zip(("a/data.pkl", PICKLE), ("a/data/0", b"1234"), ("a/data/1", b"0" * 12)),
    "a record that is compressed in its own words": patched(WHOLE, 8, b"\x08\0"),
    "a record that begins elsewhere": patched(WHOLE, entry(WHOLE) + 42, (64).to_bytes(4, "little")),
    "a record beyond the end": patched(WHOLE, entry(WHOLE, 5) + 20, (1 << 30).to_bytes(4, "little") * 2),
    "an encrypted record": patched(WHOLE, entry(WHOLE) + 8, b"\x01\x08"),
    "another name in the record": patched(WHOLE, 31, b"x"),
    "a thousand names of one record": plain_zip(("a/data.pkl", PICKLE), *[(f"a/data/{i}", b"") for i in range(1000)]),
}


@pytest.mark.parametrize("name", LIES)
def test_an_archive_that_lies_is_not_read(tmp_path, unread, name):
    path = tmp_path / "model.pt"
    path.write_bytes(LIES[name])
    refused("model.pt is (not a whole checkpoint|compressed)", checkpoint.load_tensors, path)


def test_records_that_overlap(tmp_path, unread):
    """A hundred entries of the directory for the bytes of one: a hundred times the file, in memory."""
    records = [("a/data.pkl", PICKLE), ("a/data/0", b"\0" * 100_000), *[(f"a/data/{i}", b"") for i in range(1, 100)]]
    content = plain_zip(*records)
    big = entry(content, 1)
    for number in range(2, 101):
        at = entry(content, number)
        content = patched(content, at + 16, content[big + 16 : big + 28])  # checksum and sizes
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    refused("not a whole checkpoint", checkpoint.load_tensors, path)


def test_the_format_of_before_2020(tmp_path, unread):
    """Its storages are made as long as they say: 1,210 bytes took 768 MB."""
    path = tmp_path / "model.pt"
    torch.save({"x": torch.zeros(3)}, path, _use_new_zipfile_serialization=False)
    refused("in torch's format of before 2020, which is not read here", checkpoint.load_tensors, path)


# Structures that grow


def packed(pickle_bytes, **storages):
    return plain_zip(
        ("a/data.pkl", pickle_bytes), *[(f"a/data/{k}", v) for k, v in storages.items()], ("a/version", b"3")
    )


def pickled(value):
    return packed(pickle.dumps(value, protocol=2))


def nested(depth, make):
    value = make(1)
    for _ in range(depth):
        value = make(value)
    return value


def doubled(depth):
    """A list of two of a list of two of ...: 2 ** depth values, in a few bytes each."""
    value = [1]
    for _ in range(depth):
        value = [value, value]
    return value


def circle():
    value = [1]
    value.append(value)
    return value


def with_attribute():
    value = collections.OrderedDict(a=1)
    value.keys = "not a method"
    return value


GROWING = {
    "lists that share lists": pickled({"pending": doubled(60)}),
    "dictionaries that share one": pickled([(one := {"a": 1}), one]),
    "tuples that share tuples": pickled(nested(20, lambda v: (v, v))),
    "a long tuple a thousand times": pickled([tuple(range(100))] + [(long := tuple(range(1000)))] + [long] * 1000),
    "a list in itself": pickled(circle()),
    "keys of one hash": pickled({i * ((1 << 61) - 1): 0 for i in range(2000)}),
    "tuples of one hash as keys": pickled({(-1, -2): 1}),
    "keys that are numbers": pickled({1.5: 1}),
    "a set": pickled({1, 2}),
    "many values": pickled([0] * 5000),
    "deep lists": packed(b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b"."),
    "deep dictionaries": pickled(nested(40, lambda v: {"a": v})),
    "deep tuples": packed(b"\x80\x02)" + b"\x85" * 50_000 + b"."),
    "an integer of a million digits": pickled({"step": 1 << 3_000_000}),
    "a memo of two thousand million": packed(b"\x80\x02]r\xff\xff\xff\x7f."),
    "an attribute in place of a method": pickled(with_attribute()),
    "a type": packed(b"\x80\x02ctorch\nFloatStorage\n."),
    "a function": packed(b"\x80\x02cos\nsystem\n."),
    "bytes": pickled({"a": b"\xff"}),
    "a size": pickled(torch.Size([2])),
    "an empty stack": packed(b"\x80\x02."),
    "an end without a beginning": packed(b"\x80\x02t."),
    "nothing": packed(b""),
    "a mark that is left": packed(b"\x80\x02](."),
    "an unknown place": packed(b"\x80\x02h\x05."),
    "a call of a list": packed(b"\x80\x02])R."),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", GROWING)
def test_a_structure_that_grows_is_not_built(tmp_path, unread, monkeypatch, name):
    monkeypatch.setattr(pickles, "MAX_VALUES", 4000)  # the true one takes seconds to reach
    path = tmp_path / "last.pt"
    path.write_bytes(GROWING[name])
    refused("last.pt (holds something other than tensors|is not a whole checkpoint)", checkpoint.load_tensors, path)


def tensor_pickle(items="K\x04", offset="K\0", shape="K\x02K\x02\x86", strides="K\x02K\x01\x86", grad="\x89", hooks=""):
    """The pickle of one tensor of a FloatStorage in record 0, with its parts as instructions."""
    storage = "(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu" + items + "tQ"
    hooks = "ccollections\nOrderedDict\n)R" + hooks
    text = "\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage + offset + shape + strides + grad + hooks + "tR."
    return packed(text.encode("latin-1"), **{"0": b"\0\0\x80?" * 4})


@pytest.mark.parametrize(
    "parts",
    [
        {"items": "K\x05"},  # more than the record has
        {"items": "K\x03"},
        {"items": "J\xff\xff\xff\xff"},
        {"offset": "K\x01"},  # ends behind the storage
        {"offset": "J\xff\xff\xff\xff"},
        {"shape": "K\x02K\x03\x86"},
        {"shape": "J\xff\xff\xff\x7fK\x02\x86", "strides": "K\0K\0\x86"},  # one number, 4 thousand million times
        {"strides": "J\xfe\xff\xff\xffK\x01\x86"},
        {"strides": "K\x01\x85"},
        {"shape": "X\x01\0\0\0a\x85"},
        {"shape": "]"},
        {"grad": "K\x01"},
        {"hooks": "K\x01K\x02s"},
    ],
    ids=str,
)
def test_a_tensor_that_claims_more_than_there_is(tmp_path, parts):
    path = tmp_path / "model.pt"
    path.write_bytes(tensor_pickle())
    assert torch.equal(checkpoint.load_tensors(path), torch.ones(2, 2))
    path.write_bytes(tensor_pickle(**parts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch.load was called"))
        refused("model.pt (holds something other|is not a whole checkpoint)", checkpoint.load_tensors, path)


def test_what_torch_saves_is_read(tmp_path):
    """Everything that a model, an optimizer or a run holds, and what other programs put into a state_dict."""
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(3)).sum().backward()
    optimizer.step()
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16]
    value = {
        "model": layer.state_dict(),  # an OrderedDict with its _metadata
        "optimizer": optimizer.state_dict(),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "dtypes": [torch.ones(2, 3).to(dtype) for dtype in (*dtypes, torch.int8, torch.uint8, torch.bool)],
        "views": [torch.arange(12.0).view(3, 4).t(), torch.arange(12.0)[3:5], torch.ones(()), torch.ones(0, 3)],
        "shared": [(one := torch.ones(3)), one, one[1:]],
        "plain": {
            "a": 1,
            "b": -1.5,
            "c": None,
            "d": True,
            "e": "żółw",
            "f": (1, (2, 3)),
            5: [],
            "g": 2**62,
            "h": -(2**63),
        },
        "betas": [(pair := (0.9, 0.99)), pair],
    }
    path = tmp_path / "x.pt"
    for save in (checkpoint.save_tensors, lambda path, value: torch.save(value, path)):
        save(path, value)
        read = checkpoint.load_tensors(path)
        assert same(read, torch.load(path, weights_only=True))
        assert read["plain"] == value["plain"]


def test_what_is_loaded_wants_no_gradient(tmp_path):
    """A stranger's carried state that did would end the first step."""
    wanting = torch.zeros(2, requires_grad=True)
    tree = {"a": [wanting, torch.nn.Parameter(torch.ones(3))], "b": {"c": torch.ones(1, requires_grad=True)}}
    torch.save(tree, tmp_path / "x.pt")
    found = checkpoint.load_tensors(tmp_path / "x.pt")
    assert not any(t.requires_grad for t in [*found["a"], found["b"]["c"]])
    assert same(found["a"][0], torch.zeros(2)) and torch.equal(found["a"][1], torch.ones(3))


@pytest.mark.parametrize(
    "value", [{"a": {1, 2}}, {"a": 1 << 64}, {"a": b"x"}, [(one := [1]), one], {"a": torch.float32}]
)
def test_what_is_not_read_is_not_written(tmp_path, value):
    path = tmp_path / "last.pt"
    checkpoint.save_tensors(path, {"old": 1})
    refused("last.pt was not written", checkpoint.save_tensors, path, value)
    assert checkpoint.load_tensors(path) == {"old": 1} and len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere an address space has no limit")
def test_memory_is_a_small_multiple_of_the_file(tmp_path):
    """Every lie and every growing structure, in a process that has 150 MB to spare."""
    contents = {**LIES, **GROWING}
    del contents["many values"], contents["keys of one hash"], contents["a long tuple a thousand times"]  # a few
    for number, content in enumerate(contents.values()):
        (tmp_path / f"{number}.pt").write_bytes(content)
    script = f"""
import resource, sys, pathlib
from mamba2_min.checkpoints import checkpoint
from mamba2_min.errors import UserError
room = 4096 * int(open("/proc/self/statm").read().split()[0]) + (150 << 20)
resource.setrlimit(resource.RLIMIT_AS, (room, room))
for path in sorted(pathlib.Path({str(tmp_path)!r}).iterdir()):
    try:
        checkpoint.load_tensors(path)
        print("read", path)
    except UserError:
        pass
print("done")
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert run.stdout == "done\n", run.stdout + run.stderr


def test_a_file_that_is_longer_than_its_config_asks_for(tmp_path, unread, run):
    """A sparse file costs nothing on disk, and all of its length in memory."""
    (tmp_path / "config.json").write_bytes((run[0] / "config.json").read_bytes())
    with open(tmp_path / "model.pt", "wb") as file:
        file.write(WHOLE[:4])
        file.truncate(1 << 40)
    refused("model.pt has 1,099,511,627,776 bytes, and at most", checkpoint.load_model, tmp_path)


def test_a_config_of_too_many_heads(tmp_path, run):
    values = json.loads((run[0] / "config.json").read_text())
    (tmp_path / "model.pt").write_bytes((run[0] / "model.pt").read_bytes())
    for change in ({"d_model": 8 * 10**12}, {"expand": 10**12}, {"n_layer": 1 << 24}, {"vocab_size": 1 << 24}):
        files.save_json(tmp_path / "config.json", {**values, **change})
        refused("config.json|model.pt", Mamba2LM.from_pretrained, tmp_path)


def test_a_tokenizer_with_words_twice_or_missing(tmp_path, run):
    values = json.loads((run[0] / "tokenizer.json").read_text())
    path = tmp_path / "tokenizer.json"
    good = values["words"]
    for words in ([*good, good[0]], good[1:], good[::-1], [None], ["a\ud800"]):
        path.write_text(json.dumps({**values, "words": words}))
        refused("tokenizer.json is no tokenizer", WordTokenizer.load, path)


def test_a_path_with_dots_writes_where_it_says(tmp_path, run):
    (tmp_path / "a").mkdir()
    RunSpec(DataSettings(), {}, read_plan(run[0]).training).save(tmp_path / "a" / ".." / "b")
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b"} and not list((tmp_path / "a").iterdir())


PIECES = {"words": b"word ", "one word": b"a", "signs": "👍🏽é\u202e".encode(), "nul": b"\0"}


@pytest.mark.parametrize("name", PIECES)
@pytest.mark.parametrize("megabytes", [1, pytest.param(30, marks=pytest.mark.slow)])
def test_a_document_of_one_long_line(tmp_path, megabytes, name):
    piece = PIECES[name]
    path = tmp_path / "a.md"
    path.write_bytes(b"x " + piece * (megabytes * 1_000_000 // len(piece)))
    if name == "nul":  # a file of zero bytes is not text, and training on it in silence helps nobody
        with pytest.raises(UserError, match=r"a\.md is not UTF-8: .*binary file"):
            load_corpus(tmp_path)
        return
    corpus = load_corpus(tmp_path)
    assert corpus.train_bytes + corpus.validation_bytes > 0.99 * megabytes * 1_000_000
    assert int(corpus.train.max()) < len(corpus.tokenizer)
