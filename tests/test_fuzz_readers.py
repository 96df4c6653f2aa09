"""Whatever a file holds, its reader gives what was asked for or says in one line why not; and never runs it.

Each reader gets a few hundred inputs here and 10,000 under `slow`: arbitrary bytes, arbitrary JSON, and files of its
own with something in them changed.
"""

import copy
import io
import json
import os
import pickle
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_runs import SHAPE, make_trainer, write_documents

from mamba2_min import files
from mamba2_min.checkpoints import checkpoint
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
        assert tokenizer.pattern != "words" or tokenizer.decode(tokenizer.encode(text)) == text

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


def test_an_archive_that_inflates_is_not_read(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"x": torch.zeros(1 << 20)}, path)
    packed = io.BytesIO()
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for record in source.infolist():
            target.writestr(record.filename, source.read(record))
    path.write_bytes(packed.getvalue())
    refused("model.pt is compressed", checkpoint.load_tensors, path)


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
    corpus = load_corpus(tmp_path)
    assert corpus.train_bytes + corpus.validation_bytes > 0.99 * megabytes * 1_000_000
    assert int(corpus.train.max()) < len(corpus.tokenizer)
