"""Fine-tuning from end to end: by the trainer, resumed to the bit, its files read back, its commands in one line."""

import dataclasses
import json
import math
import resource
import signal
import tempfile
import zlib
from pathlib import Path

import forked
import pytest
import torch
from instruments import relative_error

from mamba2_min import Completer, Mamba2Config, Mamba2LM, Sampler, UserError, WordTokenizer
from mamba2_min.classify import classify, classify_together, load_all
from mamba2_min.classify import load as load_classifier
from mamba2_min.finetune import adapter, labels, run
from mamba2_min.finetune.__main__ import build_parser
from mamba2_min.finetune.chat import load_chat, split
from mamba2_min.finetune.classifier import ABSENT, POOLS, Classifier, divergence
from mamba2_min.finetune.conversations import TEMPLATES, TURNS, conversation, prompt_ids, tokenize
from mamba2_min.finetune.load import load_completer, template_of
from mamba2_min.finetune.lora import LoRAConfig
from mamba2_min.finetune.packing import batches_of, lay_out
from mamba2_min.finetune.sorting import SortingScore, make_classifier, pad, score
from mamba2_min.finetune.spec import METHODS, FinetuneSettings, plan
from mamba2_min.finetune.spelling import Spelling, parts_of
from mamba2_min.finetune.sweep import sweep
from mamba2_min.finetune.talk import Chat
from mamba2_min.finetune.talk import load as load_talk
from mamba2_min.finetune.talk import save as save_talk
from mamba2_min.merge import merge
from mamba2_min.models.mamba2 import Mamba2Backbone
from mamba2_min.training.trainer import Trainer

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
ANIMALS = ["cat", "dog", "cow", "hen", "fox", "owl", "pig", "bee"]
SOUNDS = ["purrs", "barks", "moos", "clucks", "yips", "hoots", "grunts", "hums"]
PAIRS = [
    {"prompt": f"What does the {a} do?", "completion": f"The {a} {s}."} for a, s in zip(ANIMALS, SOUNDS, strict=True)
]
TEXTS = [
    {
        "text": f"{opening} the {a} {s} {where}.",
        "label": "loud" if s in ("barks", "moos", "hoots", "clucks") else "soft",
    }
    for opening in ("Today", "At night", "In spring")
    for a, s in zip(ANIMALS, SOUNDS, strict=True)
    for where in ("here", "outside", "at home", "by the door")
]


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch):
    """loss.png takes longer than these trainings; test_faults.py and test_screen.py look at it."""
    monkeypatch.setattr(Trainer, "_draw", lambda self: None)


@pytest.fixture
def base(tmp_path):
    """The folder of a small untrained model that knows the words."""
    texts = [TURNS.written("user", p["prompt"]) + TURNS.written("assistant", p["completion"]) for p in PAIRS]
    texts += [t["text"] for t in TEXTS]
    tokenizer = WordTokenizer.train(texts, min_count=1)
    model = Mamba2LM(Mamba2Config(len(tokenizer), d_model=32, n_layer=2, d_state=8, headdim=16, chunk_size=16), seed=0)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save(tmp_path / "base" / "tokenizer.json")
    return tmp_path / "base"


def spec_of(base, data, out, resume=False, **changes):
    overrides = {
        "model": str(base),
        "data": str(data),
        "context": 64,
        "batch_size": 4,
        "max_steps": 12,
        "eval_every": 4,
        "save_every": 3,
        "warmup_steps": 2,
        "precision": "float32",
        **changes,
    }
    return plan(out, overrides, resume=resume)


def finetune(base, data, out, resume=False, **changes):
    return run.finetune(spec_of(base, data, out, resume, **changes), out, CPU, again="", quiet=True)


def same_files(a, b, names):
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in names)


KINDS = [("chat", "full"), ("chat", "lora"), ("chat", "state"), ("classify", "full"), ("classify", "lora")]


@pytest.mark.parametrize(
    ("task", "method", "tokens"),
    [*((*kind, "none") for kind in KINDS), ("chat", "lora", "seen")],
    ids=lambda value: value,
)
def test_it_learns_and_resumes_to_the_bit(base, tmp_path, monkeypatch, task, method, tokens):
    """Ended by an error in the middle of a step, and resumed: the same metrics and the same best as without."""
    data = write_lines(tmp_path / "data.jsonl", PAIRS if task == "chat" else TEXTS)
    changes = {"task": task, "method": method, "lora_tokens": tokens, "lora_dropout": 0.1, "val_fraction": 0.3}
    result = finetune(base, data, tmp_path / "whole", **changes)
    assert result.step == 12 and result.best is not None
    losses = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    validation = [record["loss"] for record in losses if record["split"] == "validation"]
    assert validation[-1] < validation[0]

    step, steps = Trainer._step, []

    def killed(trainer):
        if len(steps) == 8:
            raise RuntimeError("killed")
        steps.append(0)
        step(trainer)

    monkeypatch.setattr(Trainer, "_step", killed)
    with pytest.raises(RuntimeError, match="killed"):
        finetune(base, data, tmp_path / "parts", **changes)
    monkeypatch.undo()
    finetune(base, data, tmp_path / "parts", resume=True, **changes)
    best = {"full": ["model.pt"], "lora": [adapter.WEIGHTS], "state": [adapter.WEIGHTS]}[method]
    names = ["metrics.jsonl", *([labels.HEAD, labels.LABELS] if task == "classify" else []), *best]
    if method == "full":  # a zip archive has times in it
        names.remove("model.pt")
        a, b = (torch.load(tmp_path / n / "model.pt", weights_only=True) for n in ("whole", "parts"))
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert same_files(tmp_path / "whole", tmp_path / "parts", names)


@pytest.mark.parametrize(("task", "method"), [*KINDS, ("classify", "scratch")])
def test_dropout_of_channels_and_words_ends_with_pretraining(base, tmp_path, task, method):
    """It is for a corpus that is read dozens of times (`--recipe many-epochs`); an adapter still fits its base."""
    config = Mamba2LM.from_pretrained(base).config
    Mamba2LM(dataclasses.replace(config, embedding_dropout=0.3, variational_dropout=0.5), seed=0).save_pretrained(base)
    data, out = write_lines(tmp_path / "data.jsonl", PAIRS if task == "chat" else TEXTS), tmp_path / "run"
    spec = spec_of(base, data, out, task=task, method=method, val_fraction=0.3, lora_dropout=0.0)
    model = run.prepare(spec, out).model.train()
    (backbone,) = [module for module in model.modules() if isinstance(module, Mamba2Backbone)]
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(backbone(ids)[0], backbone(ids)[0])
    if (task, method) == ("chat", "lora"):
        finetune(base, data, out, task=task, method=method, val_fraction=0.3)
        assert load_completer(base, out, CPU).model.config.variational_dropout == 0.5


@pytest.mark.parametrize("method", [{"method": "full"}, {"method": "lora", "lora_targets": "in_proj,lm_head"}], ids=str)
def test_sorting_leaves_a_head_of_the_models_own_alone(base, tmp_path, method):
    """It is not read: no gradient reaches it, and nothing of it is needed to resume."""
    config = dataclasses.replace(Mamba2LM.from_pretrained(base).config, tie_embeddings=False)
    model = Mamba2LM(config, seed=0)
    model.save_pretrained(base)
    data, out = write_lines(tmp_path / "data.jsonl", TEXTS), tmp_path / "run"
    finetune(base, data, out, task="classify", val_fraction=0.3, max_steps=4, **method)
    spec = plan(out, {"max_steps": 6}, resume=True, accept=("max_steps",))
    assert run.finetune(spec, out, CPU, again="", quiet=True).step == 6
    if method["method"] == "full":
        trained = torch.load(out / "model.pt", weights_only=True)
        assert torch.equal(trained["lm_head.weight"], model.lm_head.weight)
        assert not torch.equal(trained["backbone.embedding.weight"], model.backbone.embedding.weight)


def test_every_example_of_a_few_is_learnt_by_heart_and_ended(base, tmp_path):
    """Answers are reproduced word for word, and end with the end token."""
    data = write_lines(tmp_path / "data.jsonl", PAIRS)
    tokenizer = WordTokenizer.load(base / "tokenizer.json")
    spec = spec_of(
        base, data, tmp_path / "out", method="full", lr=1e-2, max_steps=120, eval_every=120, val_fraction=0.1
    )
    run.finetune(spec, tmp_path / "out", CPU, again="", quiet=True)
    completer = Completer.load(tmp_path / "out")
    learnt = load_chat(data, tokenizer, None, 0.1).train_talks
    template = template_of(tmp_path / "out", tokenizer)
    for talk in learnt:
        chat = Chat(completer, Sampler(temperature=0), 20, (), template)
        completer.remember(None)
        answer = "".join(chat.reply(talk.messages[0].content, 20, Sampler(temperature=0), ()))
        assert (answer, completer.stopped_by) == (talk.messages[1].content, "end")


def test_a_turn_reads_nothing_twice_and_equals_the_whole(base):
    """Two turns through the carried state give the logits of one pass over everything."""
    tokenizer = WordTokenizer.load(base / "tokenizer.json")
    completer = Completer.load(base)
    first, second = (prompt_ids(tokenizer, TURNS, p["prompt"]) for p in PAIRS[:2])
    said = list(completer.reply(first, 5, Sampler(temperature=0)))
    assert said and completer.stats.prompt_tokens == len(first) + 1
    list(completer.reply(second, 1, Sampler(temperature=0)))
    answer = tokenizer.encode("".join(said))
    whole = [tokenizer.eos_id, *first, *answer, tokenizer.eos_id, *second]
    with torch.no_grad():
        logits = completer.model(torch.tensor([whole]))[0][0, -1]
    assert relative_error(completer._session.logits, logits) < 1e-4
    assert completer.stats.prompt_tokens <= len(second) + 2


def test_a_conversation_is_saved_and_loaded(base, tmp_path):
    completer, other = Completer.load(base), Completer.load(base)
    chat = Chat(completer, Sampler(temperature=0), 8, (), TURNS)
    with pytest.raises(UserError, match="no conversation yet"):
        save_talk(completer, tmp_path / "talk.pt")
    list(chat.reply("What does the cat do?", 8, Sampler(temperature=0), ()))
    save_talk(completer, tmp_path / "talk.pt")
    load_talk(other, tmp_path / "talk.pt")
    again = Chat(other, Sampler(temperature=0), 8, (), TURNS)
    question = ("What does the dog do?", 8, Sampler(temperature=0), ())
    assert "".join(chat.reply(*question)) == "".join(again.reply(*question))
    torch.save({"conv": [], "ssm": [], "unread": 0, "tokenizer": ""}, tmp_path / "bad.pt")
    with pytest.raises(UserError, match="not a conversation with this model"):
        load_talk(other, tmp_path / "bad.pt")


def test_a_chat_speaks_of_requests_and_answers(base, monkeypatch, capsys):
    completer = Completer.load(base)
    chat = Chat(completer, Sampler(temperature=0), 3, (), TURNS)
    lines = iter(["What does the cat do?", "/continue", "/reset", "/continue", "/help", "/quit"])
    monkeypatch.setattr("mamba2_min.inference.terminal.LineEditor.read", lambda self, prompt: next(lines))
    chat.run()
    said = capsys.readouterr().out
    assert "Ask something, or /help" in said and "Any other line is a request." in said
    assert said.index("/continue   ") < said.index("/load   ") < said.index("Any other line")
    assert said.count("cut at the length; /continue goes on") == 2 and "document begins" not in said
    assert "forgotten" in said and "there is nothing to continue yet" in said
    completer.stopped_by = "end"
    completer.remember(*(completer.model.initial_state(1), 0))
    chat.answer("/continue")
    assert "the answer is complete" in capsys.readouterr().out


@pytest.mark.parametrize("tokens", ["none", "bytes"])
def test_merging_gives_an_ordinary_run(base, tmp_path, tokens):
    data = write_lines(tmp_path / "data.jsonl", PAIRS)
    finetune(base, data, tmp_path / "lora", method="lora", val_fraction=0.3, lora_tokens=tokens)
    trained = adapter.read_config(tmp_path / "lora").get("trainable_token_indices")
    assert trained == (None if tokens == "none" else {"embeddings": list(range(257))})
    assert merge(tmp_path / "lora", tmp_path / "merged") < 1e-5
    adapted = load_completer(base, tmp_path / "lora", CPU)
    merged = Completer.load(tmp_path / "merged")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert relative_error(merged.model(ids)[0], adapted.model(ids)[0]) < 1e-5
    assert template_of(tmp_path / "merged", merged.tokenizer) == TURNS
    with pytest.raises(UserError, match="already holds a model"):
        merge(tmp_path / "lora", tmp_path / "merged")


def test_an_adapter_of_another_base_is_refused(base, tmp_path):
    data = write_lines(tmp_path / "data.jsonl", PAIRS)
    finetune(base, data, tmp_path / "lora", method="lora", val_fraction=0.3)
    other = Mamba2LM.from_pretrained(base)
    with torch.no_grad():
        other.backbone.layers[0].mixer.D += 1
    other.save_pretrained(base)
    with pytest.raises(UserError, match="another base model"):
        merge(tmp_path / "lora", tmp_path / "merged")
    with pytest.raises(UserError, match="another base model"):
        load_completer(base, tmp_path / "lora", CPU)


class TestSorting:
    @pytest.mark.parametrize("pool", POOLS)
    def test_left_right_and_no_padding_are_equal(self, base, pool):
        classifier = Classifier(Mamba2LM.from_pretrained(base).double(), 3, pool).double().eval()
        ids = torch.randint(40, (1, 9), generator=torch.Generator().manual_seed(0))
        for left, right in ((0, 0), (4, 0), (0, 5), (3, 2)):
            padded = torch.nn.functional.pad(ids, (left, right), value=7)
            mask = torch.nn.functional.pad(torch.ones_like(ids), (left, right)).bool()
            assert relative_error(classifier(padded, mask), classifier(ids)) < 1e-10
        with pytest.raises(ValueError, match="without a token"):
            classifier(ids, torch.zeros_like(ids).bool())

    def test_the_batch_changes_nothing(self, base):
        tokenizer = WordTokenizer.load(base / "tokenizer.json")
        classifier = Classifier(Mamba2LM.from_pretrained(base), 2).eval()
        samples = [labels.Sample(torch.tensor([0, *tokenizer.encode(t["text"])]), 0) for t in TEXTS[:7]]
        input_ids, _, seq_idx = pad(samples)
        with torch.no_grad():
            together = classifier(input_ids, seq_idx >= 0)
            alone = torch.cat([classifier(sample.ids[None]) for sample in samples])
        assert relative_error(together, alone) < 1e-5

    def test_what_is_measured(self):
        found = SortingScore(3.0, 10, 10, ((4, 1, 0), (2, 3, 0), (0, 0, 0)))
        assert found.accuracy == pytest.approx(0.7)
        assert found.f1[:2] == [pytest.approx(2 * 4 / (5 + 6)), pytest.approx(2 * 3 / (5 + 4))]
        assert found.macro_f1 == pytest.approx(sum(found.f1[:2]) / 2)

    def test_what_is_taken_for_what(self):
        found = SortingScore(3.0, 10, 10, ((4, 1, 0), (2, 3, 0), (0, 0, 0)))
        assert found.most_confused(["a", "b", "c"]) == ["b taken for a 2", "a taken for b 1"]

    def test_words_are_taken_away_in_training_alone(self, base):
        classifier = Classifier(Mamba2LM.from_pretrained(base), 2, word_dropout=0.4)
        seen = []
        classifier.model.backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        ids = torch.full((200, 30), 7)
        mask = torch.ones_like(ids).bool()
        mask[:, :5] = mask[:, 25:] = False
        classifier.train()(ids, mask)
        absent = seen[0] == ABSENT
        assert not absent[~mask].any() and not absent[:, 5].any() and set(seen[0].unique().tolist()) == {ABSENT, 7}
        assert absent[:, 6:25].float().mean().item() == pytest.approx(0.4, abs=0.03)
        classifier.eval()(ids, mask)
        assert torch.equal(seen[1], ids)

    def test_two_readings_are_compared(self, base):
        p, q = torch.tensor([[0.1, 0.9]]), torch.tensor([[0.6, 0.4]])
        by_hand = sum(a * math.log(a / b) for a, b in ((0.1, 0.6), (0.9, 0.4), (0.6, 0.1), (0.4, 0.9))) / 2
        assert divergence(p.log(), q.log()).item() == pytest.approx(by_hand, rel=1e-5)
        data = [labels.Sample(torch.tensor([0, 5, 9, 7]), 1), labels.Sample(torch.tensor([0, 8]), 0)]
        input_ids, targets, seq_idx = pad(data)
        losses = []
        for consistency in (0.0, 3.0):  # without dropout both readings are the same
            classifier = Classifier(Mamba2LM.from_pretrained(base), 2, consistency=consistency).train()
            losses.append(classifier.loss(input_ids, targets, seq_idx=seq_idx).item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)
        classifier.word_dropout = 0.5
        torch.manual_seed(0)
        different = classifier.loss(input_ids, targets, seq_idx=seq_idx)
        torch.manual_seed(0)
        classifier.consistency = 1e-9
        assert different > classifier.loss(input_ids, targets, seq_idx=seq_idx)
        different.backward()
        assert all(p.grad is not None for p in classifier.head.parameters())

    def test_weights_let_each_label_weigh_the_same(self, base):
        data = labels.LabelData([labels.Sample(torch.tensor([0, 5]), k) for k in (0, 0, 0, 1)], [], ["a", "b"])
        f = FinetuneSettings(model="x", data="y", task="classify", class_weights=True)
        classifier = make_classifier(Mamba2LM.from_pretrained(base), data, f, 0, WordTokenizer(["a"]))
        assert classifier.class_weights.tolist() == pytest.approx([4 / (2 * 3), 4 / (2 * 1)])
        input_ids, targets, seq_idx = pad(data.train)
        plain = torch.nn.functional.cross_entropy(classifier.eval()(input_ids), targets[:, -1], reduction="none")
        weighed = (plain * classifier.class_weights[targets[:, -1]]).mean()
        found = classifier.loss(input_ids, targets, seq_idx=seq_idx)
        assert found.item() == pytest.approx(weighed.item(), rel=1e-5)

    def test_from_a_table_to_labels_on_standard_output(self, base, tmp_path):
        table = tmp_path / "texts.csv"
        table.write_text("label,text\n" + "".join(f'{t["label"]},"{t["text"]}"\n' for t in TEXTS), encoding="utf-8")
        result = finetune(
            base, table, tmp_path / "out", task="classify", method="full", max_steps=80, eval_every=40, lr=1e-2
        )
        assert isinstance(result.best, SortingScore) and result.best.accuracy > 0.9
        assert (tmp_path / "out" / labels.CONFUSION).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        classifier, tokenizer, names = load_classifier(tmp_path / "out")
        assert names == ["loud", "soft"]
        given = list(classify(classifier, tokenizer, names, [t["text"] for t in TEXTS]))
        right = sum(name == t["label"] for (name, _), t in zip(given, TEXTS, strict=True)) / len(TEXTS)
        assert right > 0.9 and all(0.5 <= p <= 1 for _, p in given)
        done = command(
            "classify", "--model", tmp_path / "out", stdin="Today the dog barks here.\nAt night the bee hums.\n"
        )
        assert [line.split("\t")[0] for line in done.stdout.splitlines()] == ["loud", "soft"]

    def test_a_model_from_scratch_has_the_words_of_its_texts(self, base, tmp_path):
        table = [{**t, "text": f"{t['text']} {'zonk' if t['label'] == 'loud' else 'pling'}"} for t in TEXTS]
        data = write_lines(tmp_path / "a.jsonl", table)
        how = {"task": "classify", "method": "scratch", "max_steps": 60, "eval_every": 30, "lr": 1e-2}
        result = finetune(base, data, tmp_path / "out", **how, word_dropout=0.1, consistency=1.0, pool="mean+max")
        assert result.best.accuracy > 0.9
        classifier, tokenizer, names = load_classifier(tmp_path / "out")
        assert {" zonk", " pling"} <= set(tokenizer.words) and " purrs" in tokenizer.words
        assert " Who" not in tokenizer.words and classifier.config.vocab_size == len(tokenizer)
        texts = ["Today the dog barks here. zonk", "At night the cat purrs outside. pling"]
        assert [name for name, _ in classify(classifier, tokenizer, names, texts)] == ["loud", "soft"]
        before = (tmp_path / "out" / "model.pt").read_bytes()
        finetune(base, data, tmp_path / "out", True, **how, word_dropout=0.1, consistency=1.0, pool="mean+max")
        assert (tmp_path / "out" / "model.pt").read_bytes() == before

    def test_several_models_sort_together(self, base, tmp_path):
        """By the mean of their probabilities, each with its own words; other labels are refused."""
        data, how = write_lines(tmp_path / "a.jsonl", TEXTS), {"task": "classify", "max_steps": 8, "lr": 1e-2}
        finetune(base, data, tmp_path / "one", **how, method="full")
        finetune(base, data, tmp_path / "two", **how, method="scratch", seed=1, spelling=100)
        folders = [tmp_path / "one", tmp_path / "two"]
        texts = [t["text"] for t in TEXTS[:40]]
        sorters, names = load_all(folders)
        together = list(classify_together(sorters, names, texts))
        apart = [list(classify(*load_classifier(folder), texts)) for folder in folders]
        for (name, probability), *ones in zip(together, *apart, strict=True):
            of_name = [p if given == name else 1 - p for given, p in ones]  # there are two labels
            assert probability == pytest.approx(sum(of_name) / 2, abs=1e-5) and probability >= 0.5
        done = command("classify", "--model", *folders, stdin="Today the dog barks here.\n")
        assert done.returncode == 0 and done.stdout.split("\t")[0] in ("loud", "soft")
        other = write_lines(tmp_path / "b.jsonl", [{**t, "label": t["label"].upper()} for t in TEXTS])
        finetune(base, other, tmp_path / "three", **how, method="full")
        with pytest.raises(UserError, match="three has other labels than"):
            load_all([*folders, tmp_path / "three"])

    def test_a_score_does_not_change_the_modes(self, base):
        classifier = Classifier(Mamba2LM.from_pretrained(base), 2)
        classifier.model.backbone.layers[0].eval()
        classifier.head.train()
        before = [m.training for m in classifier.modules()]
        import contextlib

        score(classifier, [labels.Sample(torch.tensor([0, 5]), 1)], 2, contextlib.nullcontext())
        assert [m.training for m in classifier.modules()] == before


class TestSpelling:
    def test_parts(self):
        assert parts_of(" Cat") == ["<cat>", "<ca", "cat", "at>", "<cat", "cat>"]
        assert parts_of("?") == ["<?>"] and parts_of(" ") == ["<>"]

    @pytest.mark.parametrize("pattern", ["words", "llama3", "whitespace"])
    def test_it_is_the_mean_of_the_parts(self, pattern):
        """Also of a word that no vocabulary has, at each of its bytes; neighbours and padding change nothing."""
        tokenizer = WordTokenizer.train(["the cat sat"], min_count=1, pattern=pattern)
        spelling = Spelling(tokenizer, 4, 1000).double()

        def mean(word):
            rows = [1 + zlib.crc32(part.encode()) % 999 for part in parts_of(word)]
            return spelling.parts.weight[rows].mean(0)

        text = "the cat" if pattern == "whitespace" else "the cät, the xylophone sat"
        ids = torch.tensor([tokenizer.encode(text)])
        found = spelling(ids)[0]
        words = [piece for piece in tokenizer.pieces(text) for _ in tokenizer.piece_ids(piece)]
        words += ["<eos>"] * (len(found) - len(words))
        for vector, word in zip(found, words, strict=True):
            if word not in ("\n", "<eos>"):
                assert relative_error(vector, mean(word)) < 1e-12
        padded = torch.nn.functional.pad(ids, (2, 3)).repeat(2, 1)
        assert torch.equal(spelling(padded)[1, 2:-3], found)
        spelling(ids).sum().backward()
        assert not spelling.parts.weight.grad[0].any()

    @pytest.mark.parametrize("method", ["full", "lora", "scratch"])
    def test_from_a_table_to_labels(self, base, tmp_path, method):
        data = write_lines(tmp_path / "a.jsonl", TEXTS)
        how = {"task": "classify", "method": method, "max_steps": 60, "eval_every": 30, "lr": 1e-2}
        how |= {"spelling": 500, "word_dropout": 0.1}
        best = finetune(base, data, tmp_path / "out", **how).best
        classifier, tokenizer, names = load_classifier(tmp_path / "out", base)
        assert classifier.spelling.buckets == 500
        given = list(classify(classifier, tokenizer, names, [t["text"] for t in TEXTS]))
        right = sum(name == t["label"] for (name, _), t in zip(given, TEXTS, strict=True)) / len(TEXTS)
        assert best.accuracy > 0.8 and right > 0.8
        kept = (tmp_path / "out" / labels.HEAD).read_bytes()
        about = json.loads((tmp_path / "out" / labels.LABELS).read_text())
        finetune(base, data, tmp_path / "out", True, **how)  # it had ended: nothing changes
        assert (tmp_path / "out" / labels.HEAD).read_bytes() == kept
        for wrong in (1, -1, True, "x", 400):
            (tmp_path / "out" / labels.LABELS).write_text(json.dumps({**about, "spelling": wrong}))
            with pytest.raises(UserError):
                load_classifier(tmp_path / "out", base)

    def test_a_step_reads_equal_texts_padded_or_not(self, base):
        tokenizer = WordTokenizer.load(base / "tokenizer.json")
        model = Mamba2LM.from_pretrained(base)
        classifier = Classifier(model, 2, "mean+max", spelling=Spelling(tokenizer, 32, 200)).double().eval()
        ids = torch.tensor([[0, *tokenizer.encode("the qqq zz dog")]])
        padded = torch.nn.functional.pad(ids, (3, 2), value=70)
        mask = torch.nn.functional.pad(torch.ones_like(ids), (3, 2)).bool()
        assert relative_error(classifier(padded, mask), classifier(ids)) < 1e-10


class TestData:
    def test_equal_requests_are_on_one_side_and_repeats_are_counted(self, base, tmp_path):
        again = [{**p, "completion": "Who knows?"} for p in PAIRS]
        data = write_lines(tmp_path / "data.jsonl", [*PAIRS, *again, *PAIRS[:3]])
        found = load_chat(data, WordTokenizer.load(base / "tokenizer.json"), None, 0.4)
        train, held_out = ({t.request_key for t in talks} for talks in (found.train_talks, found.validation_talks))
        assert not train & held_out and len(train | held_out) == len(PAIRS)
        assert any("3 repeated conversations" in note for note in found.notes)

    def test_nothing_is_held_out_where_all_are_to_be_learnt_by_heart(self, base, tmp_path):
        data, tokenizer = write_lines(tmp_path / "a.jsonl", PAIRS), WordTokenizer.load(base / "tokenizer.json")
        found = load_chat(data, tokenizer, None, 0)
        assert len(found.train) == len(found.validation) == len(PAIRS)
        assert any("nothing is held out" in note for note in found.notes)
        assert any("--val-fraction 0 holds nothing out" in note for note in load_chat(data, tokenizer).notes)

    def test_a_validation_file_takes_its_requests_out_of_training(self, base, tmp_path):
        data, other = write_lines(tmp_path / "a.jsonl", PAIRS), write_lines(tmp_path / "b.jsonl", PAIRS[:2])
        found = load_chat(data, WordTokenizer.load(base / "tokenizer.json"), other)
        assert (len(found.train), len(found.validation)) == (len(PAIRS) - 2, 2)
        with pytest.raises(UserError, match="the requests of all are in"):
            load_chat(data, WordTokenizer.load(base / "tokenizer.json"), data)

    def test_a_folder_of_request_and_answer_documents(self, base, tmp_path):
        folder = tmp_path / "documents"
        folder.mkdir()
        (folder / "a.md").write_text("What floats?<start>Ice floats.<end>What sinks?<start>A stone sinks.\n")
        write_lines(folder / "b.jsonl", PAIRS[:2])
        found = load_chat(folder, WordTokenizer.load(base / "tokenizer.json"), None, 0.4)
        assert len(found.train) + len(found.validation) == 4

    def test_files_are_found_as_for_training(self, base, tmp_path):
        """No link leads out of the folder, and nothing hidden is read."""
        outside = write_lines(tmp_path / "outside.jsonl", [{"prompt": "Secret?", "completion": "Yes."}])
        folder = tmp_path / "folder"
        (folder / ".trash").mkdir(parents=True)
        write_lines(folder / ".trash" / "old.jsonl", [{"prompt": "Old?", "completion": "Yes."}])
        (folder / "link.jsonl").symlink_to(outside)
        write_lines(folder / "a.jsonl", PAIRS[:3])
        found = load_chat(folder, WordTokenizer.load(base / "tokenizer.json"), None, 0.4)
        asked = {talk.messages[0].content for talk in [*found.train_talks, *found.validation_talks]}
        assert asked == {pair["prompt"] for pair in PAIRS[:3]}

    def test_the_split_does_not_move_under_additions(self):
        talks = [conversation(p, "x") for p in PAIRS]
        _, held_out = split(talks, 0.4)
        _, more = split([*talks, conversation({"prompt": "New?", "completion": "Yes."}, "x")], 0.4)
        assert {t.key for t in held_out} <= {t.key for t in more}

    def test_losses_are_those_of_each_conversation_alone(self, base):
        model, tokenizer = Mamba2LM.from_pretrained(base).double(), WordTokenizer.load(base / "tokenizer.json")
        examples = [tokenize(conversation(p, "x"), TEMPLATES["turns"], tokenizer) for p in PAIRS]
        task = run.Answers(examples[:2], examples, tokenizer)
        import contextlib

        found = task.evaluate(model, contextlib.nullcontext())
        with torch.no_grad():
            alone = [model.loss(e.ids[None, :-1], e.targets[None]) * int(e.learnt.sum()) for e in examples]
        assert found.nats == pytest.approx(float(sum(alone)), rel=1e-10)
        assert (found.tokens, found.n_bytes) == task.validation_size
        for room, rows in batches_of(examples, range(len(examples)), 32, 4):
            assert lay_out(examples, rows, room)[0].shape[1] == room


def command(name, *arguments, stdin=""):
    return forked.command("-m", f"mamba2_min.{name}", *arguments, stdin=stdin)


def test_words_that_the_model_does_not_know_are_told(base):
    """Counted by their bytes; what is one token, such as a full stop or a space, is known."""
    tokenizer = WordTokenizer.load(base / "tokenizer.json")

    def told(*texts):
        with tempfile.TemporaryDirectory() as folder:
            talks = [{"prompt": f"What does the {text} do?", "completion": "The cat."} for text in texts]
            return [n for n in load_chat(write_lines(Path(folder, "a.jsonl"), talks), tokenizer).notes if "bytes" in n]

    assert not told(*ANIMALS)
    assert not told(*(f"{animal}." for animal in ANIMALS))
    (note,) = told(*(f"{animal} qxqxqxqx" for animal in ANIMALS))
    said = len(" What does the cat qxqxqxqx do? The cat.")
    assert note.startswith(f"{9 / said:.0%} of the bytes are outside the model's vocabulary")


BAD = {
    "empty": ("", "line 1: not JSON|no conversations in|no records"),
    "not JSON": ("{", "line 1: not JSON"),
    "no answer": ('{"prompt": "a"}', "line 1: it needs .* it has prompt"),
    "unknown role": ('{"messages": [{"role": "robot", "content": "a"}]}', "line 1: the role robot is unknown"),
    "one conversation": ('{"prompt": "a", "completion": "b"}', "nothing to"),
}


@pytest.mark.parametrize(("content", "message"), BAD.values(), ids=BAD)
def test_bad_conversations_are_one_line(base, tmp_path, content, message):
    (tmp_path / "data.jsonl").write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        finetune(base, tmp_path / "data.jsonl", tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out" / "model.pt").exists()


BAD_TEXTS = {
    "one class": ("text,label\na,x\nb,x\n", "has 1 label"),
    "no column": ("text,class\na,x\n", "no column is called 'label'"),
    "cells": ("text,label\na,x,y\n", "line 2: 3 cells"),
    "an empty text": ("text,label\n ,x\n", "line 2: text is empty"),
    "two labels": ("text,label\na,x\na,y\n", "line 3: this text has the label 'y', and 'x' in"),
    "a tab": ('text,label\na,"x\ty"\nb,z\nc,z\n', "holds a tab"),
    "a quote that is not closed": ('text,label\n"a,x\n', "line 2: a quotation mark that is never closed"),
}


@pytest.mark.parametrize(("content", "message"), BAD_TEXTS.values(), ids=BAD_TEXTS)
def test_bad_tables_are_one_line(base, tmp_path, content, message):
    (tmp_path / "data.csv").write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        finetune(base, tmp_path / "data.csv", tmp_path / "out", task="classify", val_fraction=0.3)
    assert "\n" not in str(caught.value)


class TestEncoding:
    """Files of records are decoded as documents are: a mark decides, then UTF-8, then what is asked for."""

    TABLE = "text,label\nun café,drink\nune crêpe,meal\n"

    @pytest.mark.parametrize(
        ("written", "asked"), [("utf-8-sig", None), ("utf-16", None), ("cp1252", "cp1252"), ("utf-8", "cp1252")]
    )
    def test_a_table(self, tmp_path, written, asked):
        (tmp_path / "a.csv").write_text(self.TABLE, encoding=written)
        found = labels.read_texts(tmp_path / "a.csv", encoding=asked)
        assert [(text, label) for text, label, _ in found] == [("un café", "drink"), ("une crêpe", "meal")]

    def test_conversations_in_a_file_and_in_a_folder(self, base, tmp_path):
        folder = tmp_path / "talks"
        folder.mkdir()
        for name, said in (("a.jsonl", "un café"), ("b.jsonl", "une crêpe")):
            record = json.dumps({"prompt": said, "completion": "voilà"}, ensure_ascii=False)
            (folder / name).write_text(record, encoding="cp1252")
        (folder / "c.md").write_text("un thé<start>voilà", encoding="cp1252")
        tokenizer = WordTokenizer.load(base / "tokenizer.json")
        talks = load_chat(folder, tokenizer, None, 0, "cp1252").train_talks
        assert [talk.messages[0].content for talk in talks] == ["un café", "une crêpe", "un thé"]
        alone = load_chat(folder / "a.jsonl", tokenizer, folder / "b.jsonl", encoding="cp1252")
        assert alone.validation_talks[0].messages[0].content == "une crêpe"

    def test_what_it_may_be_is_said(self, base, tmp_path):
        (tmp_path / "a.csv").write_text(self.TABLE, encoding="cp1252")
        with pytest.raises(UserError, match=r"a.csv is not UTF-8: byte 0xE9 at offset .*add --encoding cp1252"):
            finetune(base, tmp_path / "a.csv", tmp_path / "out", task="classify")
        with pytest.raises(UserError, match="no encoding 'cp99'"):
            finetune(base, tmp_path / "a.csv", tmp_path / "out", task="classify", encoding="cp99")
        (tmp_path / "a.csv").write_bytes(b"%PDF-1.4 text,label")
        with pytest.raises(UserError, match="looks like a PDF"):
            finetune(base, tmp_path / "a.csv", tmp_path / "out", task="classify", encoding="cp1252")

    def test_it_reaches_the_run(self, base, tmp_path):
        accented = [{**record, "text": record["text"] + " café"} for record in TEXTS]
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in accented)
        (tmp_path / "a.jsonl").write_text(lines, encoding="cp1252")
        how = {"task": "classify", "encoding": "cp1252", "max_steps": 1}
        ready = run.prepare(spec_of(base, tmp_path / "a.jsonl", tmp_path / "out", **how), tmp_path / "out")
        sample = ready.task.data.train[0]
        assert ready.task.tokenizer.decode(sample.ids.tolist()).endswith("café")


def test_a_label_that_training_never_saw(base, tmp_path):
    train, other = (
        write_lines(tmp_path / "a.jsonl", TEXTS),
        write_lines(tmp_path / "b.jsonl", [{"text": "x", "label": "odd"}]),
    )
    with pytest.raises(UserError, match="line 1: the label 'odd' does not occur"):
        finetune(base, train, tmp_path / "out", task="classify", val_data=str(other))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_targets": "q_proj"}, "no projection is called 'q_proj'"),
        ({"lora_targets": "lm_head"}, "tied to the embedding"),
        ({"method": "scratch"}, "is for --task classify"),
        ({"lora_r": 0}, "lora_r must be an integer"),
        ({"spelling": 1}, "at least 2 vectors"),
        ({"word_dropout": 1.0}, "word_dropout must be below 1"),
        ({"model": "nowhere"}, "nowhere is not a folder"),
    ],
)
def test_bad_settings_are_one_line(base, tmp_path, changes, message):
    data = write_lines(tmp_path / "data.jsonl", PAIRS)
    with pytest.raises(UserError, match=message):
        finetune(base, data, tmp_path / "out", **changes)


@pytest.mark.parametrize("method", METHODS)
def test_help_shows_the_defaults_of_fine_tuning(tmp_path, method):
    """They are not those of train.py."""
    said = " ".join(build_parser().format_help().split())
    settings = plan(tmp_path / "run", {"model": "base", "data": "data", "task": "classify", "method": method}).training
    assert f"{method} {settings.lr:g}" in said.split("peak learning rate")[1].split(")")[0]
    for text, value in {
        "tokens per window": settings.context,
        "steps between validations": settings.eval_every,
        "steps of linear warm-up": settings.warmup_steps,
        "on matrices only": settings.weight_decay,
    }.items():
        assert f"{text} ({value:g})" in said
    assert "--carry-state" not in said and "--validate" not in said  # which would change nothing


def test_commands_end_in_one_line(base, tmp_path):
    for arguments in (
        ("finetune", "--model", base, "--data", tmp_path / "none.jsonl", "--out", tmp_path / "out"),
        ("finetune", "--data", "x"),
        ("merge", "--adapter", base, "--out", tmp_path / "out"),
        ("classify", "--model", base),
    ):
        done = command(*arguments, stdin="")
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_a_run_is_not_replaced_and_not_resumed_with_other_settings(base, tmp_path):
    data = write_lines(tmp_path / "data.jsonl", PAIRS)
    finetune(base, data, tmp_path / "out", val_fraction=0.3)
    with pytest.raises(UserError, match="already holds a run"):
        spec_of(base, data, tmp_path / "out")
    with pytest.raises(UserError, match="--lora-r was 16 when"):
        spec_of(base, data, tmp_path / "out", resume=True, lora_r=4, val_fraction=0.3)


def test_a_conversation_longer_than_memory_is_one_line(base, tmp_path, monkeypatch):
    long = {"prompt": "What does the cat do?", "completion": "The cat purrs. " * 200}
    data = write_lines(tmp_path / "data.jsonl", [*PAIRS, long])
    monkeypatch.setattr("mamba2_min.devices.free_memory", lambda device: 220 << 20)
    with pytest.raises(
        UserError, match=r"data.jsonl, line 9 \(.* tokens\), takes 1,024 tokens; leave it out"
    ) as caught:
        finetune(base, data, tmp_path / "out", val_fraction=0.0)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    finetune(base, write_lines(data, PAIRS), tmp_path / "out", val_fraction=0.0, max_steps=1)


def test_a_base_that_moved_is_named(base, tmp_path):
    data = write_lines(tmp_path / "data.jsonl", PAIRS)
    finetune(base, data, tmp_path / "lora", method="lora", val_fraction=0.3, max_steps=1)
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="which is not a folder here; name it") as caught:
        merge(tmp_path / "lora", tmp_path / "merged")
    assert str(base) in str(caught.value) and not (tmp_path / "merged").exists()
    assert merge(tmp_path / "lora", tmp_path / "merged", tmp_path / "elsewhere") < 1e-5


def test_a_full_disk_leaves_the_adapter_that_was_there(base, tmp_path, monkeypatch):
    """The limit on a file's size stands for a disk without room: the second save finds none."""
    data = write_lines(tmp_path / "data.jsonl", PAIRS)
    finetune(base, data, tmp_path / "lora", method="lora", val_fraction=0.0, max_steps=4)
    before = (tmp_path / "lora" / adapter.WEIGHTS).read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
        model = adapter.load_adapter(tmp_path / "lora", Mamba2LM.from_pretrained(base))
        with pytest.raises(UserError, match="File too large; the one from before is unchanged") as caught:
            adapter.save_adapter(tmp_path / "lora", model, base, LoRAConfig(), "0" * 64)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "lora" / adapter.WEIGHTS).read_bytes() == before


def test_a_sweep_writes_through_no_link(base, tmp_path):
    data = write_lines(tmp_path / "data.jsonl", PAIRS)
    (tmp_path / "outside").mkdir()
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "full-0.01").symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match=r"full-0\.01 is a link, and links are not written through"):
        sweep(spec_of(base, data, tmp_path / "sweep", val_fraction=0.0, max_steps=1), [1e-2], tmp_path / "sweep", CPU)
    assert not any((tmp_path / "outside").iterdir())


def test_a_sweep_leaves_a_table_and_a_picture(base, tmp_path, capsys):
    data = write_lines(tmp_path / "data.jsonl", PAIRS)
    spec = spec_of(base, data, tmp_path / "sweep", val_fraction=0.0, max_steps=2, eval_every=2)
    assert sweep(spec, [1e-3, 1e-2, 1e-2], tmp_path / "sweep", CPU) == 0
    found = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert [(r["method"], r["lr"]) for r in found] == [(m, lr) for m in ("full", "lora") for lr in (1e-3, 1e-2)]
    assert all(r["loss"] > 0 and r["best_step"] == 2 for r in found)
    assert (tmp_path / "sweep" / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    lines = capsys.readouterr().out.splitlines()
    header = next(k for k, line in enumerate(lines) if line.split() == ["learning", "rate", "full", "lora"])
    assert [line.split()[0] for line in lines[header + 1 : header + 3]] == ["0.001", "0.01"]
    assert "".join(lines[header + 1 : header + 3]).count("*") == 2  # the best of each method
