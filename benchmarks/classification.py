"""Sorting texts: a small Mamba-2 beside GPT-Neo of equal size and equal pretraining, and beside counted words.

    python -m benchmarks.classification --data DIR --workers 8 --threads 2
    python -m benchmarks.classification --data DIR --share 0.02 --epochs 1 --pretrain-steps 20     does it run here?

DIR holds banking77/{train,test}.csv, sms_spam/SMSSpamCollection, sms_spam/{train,validation,test}.csv and
llama-stories/, as published. Each row of the result is one task, model, method and seed. A row that is in the results
already is left out, so that a benchmark that was stopped goes on; --only names the rows to make (--list shows them).
They are made in the order of --only, all of the first seed before those of the second, so that a benchmark that is cut
off has one figure of everything rather than three of something.

Both models get the same vocabulary, the same pretraining (llama-stories and the texts of the training parts), the same
trainer, batches, epochs, number of tried learning rates, and the same means against learning the texts by heart.
`full` trains every weight, `lora` has r 16, alpha 32 and dropout 0.1 on every projection of a block, `state` trains the
first state alone, `scratch` skips the pretraining; `lora-seen` also trains those rows of the table of words that the
training texts have (`finetune --lora-tokens seen`); `mamba2-two` is the mean of two models. A table for the spelling of
words, a million numbers, is added to the embeddings, and every method trains it; `-words` is without.

Nothing is chosen by the loss on held-out texts: the weights of the last step are tested, once. With a few thousand
texts that loss is lowest after a few epochs, as the model grows too sure of itself, and yet the labels get better to
the end (docs/LOG.md). A twentieth of the training part is held out all the same, for studies of the learning rate.

`tfidf` is TF-IDF with logistic regression: of words with scikit-learn's defaults, and of words and letters with what is
known to work well.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import as_completed
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import harness
from mamba2_min import devices, files
from mamba2_min.checkpoints import checkpoint
from mamba2_min.config import Mamba2Config
from mamba2_min.data.documents import read_documents
from mamba2_min.data.tokenizer import WordTokenizer
from mamba2_min.data.windows import Windows
from mamba2_min.evaluation.perplexity import Score
from mamba2_min.finetune.classifier import POOLS, Classifier
from mamba2_min.finetune.initial_state import TunedStateLM
from mamba2_min.finetune.labels import LabelData, Sample
from mamba2_min.finetune.lora import LoRAConfig, add_lora, trainable
from mamba2_min.finetune.sorting import Sorting, score
from mamba2_min.finetune.spelling import Spelling
from mamba2_min.finetune.token_rows import train_rows
from mamba2_min.models.mamba2 import Mamba2LM
from mamba2_min.ops.loss import IGNORE
from mamba2_min.settings import Settings
from mamba2_min.training.task import ModelFiles, Task
from mamba2_min.training.trainer import Trainer

TASKS = ("banking77", "banking77-10", "sms", "sms-book")
# -two: the mean of two models, MEMBERS; -words: without the spelling, whose table every method trains, lora too;
# -mean, -last: what the head reads instead of POOL
MODELS = ("mamba2", "mamba2-two", "mamba2-words", "mamba2-mean", "mamba2-last", "gpt-neo", "gpt-neo-words")
METHODS = ("scratch", "full", "lora", "lora-seen", "state")
PRETRAINED = METHODS[1:]
POOL = "mean+max"
# What helps a small model with a few thousand texts, for both families.
WORD_DROPOUT, EMA = 0.15, 0.995
# (spelling, consistency): the first is the model alone, for both families; the second knows words by their ids alone.
MEMBERS = ((8192, 0.0), (0, 2.0))
BASELINES = ("tfidf-default", "tfidf-best")
WIDTH, LAYERS = 128, 2
LORA = {"mamba2": ("in_proj", "out_proj"), "gpt-neo": ("q_proj", "k_proj", "v_proj", "out_proj", "c_fc", "c_proj")}
RATES = {"scratch": 4e-3, "full": 2e-3, "lora": 5e-3, "lora-seen": 5e-3, "state": 2e-2}
RATES_OF_FEW = {"full": 4e-3}  # ten texts a label: better on the held-out texts too than 2e-3 and 1e-3 (docs/LOG.md)
CONTEXT = 128  # tokens of a pretraining window

Texts = list[tuple[str, str]]  # (text, label)


@dataclasses.dataclass(frozen=True)
class Options:
    """How every row is made. Small and picklable: workers get it."""

    data: Path
    work: Path
    device: str
    threads: int
    precision: str
    share: float
    epochs: int
    pretrain_steps: int
    lr: float | None


def read_table(path: Path, text: str, label: str) -> Texts:
    rows = csv.DictReader(files.read_text(path, 1 << 30, "utf-8-sig").splitlines())
    return [(row[text].strip(), row[label].strip()) for row in rows]


def read_task(task: str, data: Path, share: float, seed: int) -> tuple[Texts, Texts, Texts]:
    """The training, validation and test part of a task; with `share`, of so much of the data."""
    if task.startswith("banking77"):
        train = read_table(data / "banking77/train.csv", "text", "category")
        test = read_table(data / "banking77/test.csv", "text", "category")
    elif task == "sms-book":
        train, validation, test = (
            [(t, {"0": "ham", "1": "spam"}.get(label, label)) for t, label in _book(data / f"sms_spam/{part}.csv")]
            for part in ("train", "validation", "test")
        )
        return _part(train, share), _part(validation, share), _part(test, share)
    else:
        lines = files.read_text(data / "sms_spam/SMSSpamCollection", 1 << 30, "utf-8").splitlines()
        texts = list(dict.fromkeys((t.strip(), label) for label, _, t in (line.partition("\t") for line in lines)))
        random.Random(0).shuffle(texts)  # one split for all seeds
        train, test = texts[len(texts) // 5 :], texts[: len(texts) // 5]
    draw = random.Random(seed)
    draw.shuffle(train)
    if task == "banking77-10":
        few: Texts = []
        rest: Texts = []
        for text, label in train:
            (few if sum(label == other for _, other in few) < 10 else rest).append((text, label))
        return _part(few, share), _part(rest[:385], share), _part(test, share)
    train = _part(train, share)
    held_out = max(len(train) // 20, 1)
    return train[held_out:], train[:held_out], _part(test, share)


def _book(path: Path) -> Texts:
    header = files.read_text(path, 1 << 30, "utf-8-sig").splitlines()[0].split(",")
    label = next(name for name in header if name.strip().lower() == "label")
    text = next(name for name in header if name.strip().lower() == "text")
    return read_table(path, text, label)


def _part(texts: Texts, share: float) -> Texts:
    return texts[: max(int(len(texts) * share), min(len(texts), 40))]


class InMemory(ModelFiles):
    """The best weights, in memory: nothing of a benchmark's models goes to disk."""

    best = ()
    kept: dict[str, Tensor]

    def prepare(self, out: Path, model: Any) -> None: ...

    def unwrapped(self, model: Any) -> Any:
        return model

    def save(self, out: Path, model: Any) -> None:
        self.kept = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    def load(self, out: Path, model: nn.Module) -> None:
        model.load_state_dict(self.kept)


class NextToken(Task):
    """The next token in windows of the training and of the validation tokens: for models without a state too."""

    def __init__(self, train: Tensor, validation: Tensor, tokenizer: WordTokenizer):
        self.train, self.validation, self.tokenizer, self.files = train, validation, tokenizer, InMemory()

    @property
    def digest(self) -> str:
        return "0" * 64

    @property
    def validation_size(self) -> tuple[int, int]:
        return len(self.validation) - 1, len(self.validation) - 1

    def batches(self, settings: Settings) -> Windows:
        return Windows(self.train, settings.context, settings.batch_size, settings.seed)

    @torch.no_grad()
    def evaluate(self, model: Any, autocast: AbstractContextManager) -> Score:
        model.eval()
        device, nats, tokens = next(model.parameters()).device, 0.0, 0
        for part in self.validation[: 64 * CONTEXT + 1].unfold(0, CONTEXT + 1, CONTEXT).long().split(16):
            with autocast:
                nats += float(model.loss(part[:, :-1].to(device), part[:, 1:].to(device))) * part[:, 1:].numel()
            tokens += part[:, 1:].numel()
        return Score(nats, tokens, tokens)


class GPTNeoLM(nn.Module):
    """GPT-Neo as the trainer sees a language model. One id more than the vocabulary is padding."""

    recompute = False
    config = SimpleNamespace(to_dict=lambda: {"family": "gpt-neo"})

    def __init__(self, vocab_size: int, seed: int):
        super().__init__()
        from transformers import GPTNeoForCausalLM

        torch.manual_seed(seed)
        self.inner = GPTNeoForCausalLM(gpt_neo_config(vocab_size))

    def loss(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        logits = self.inner(input_ids).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE)


class GPTNeoSorter(nn.Module):
    """GPTNeoForSequenceClassification as the trainer sees a Classifier: its head reads the last token."""

    recompute = False
    config = SimpleNamespace(to_dict=lambda: {"family": "gpt-neo"})
    word_dropout, consistency, label_smoothing = WORD_DROPOUT, MEMBERS[0][1], 0.1
    loss, _without_words, _spelled = Classifier.loss, Classifier._without_words, Classifier._spelled

    def __init__(self, vocab_size: int, labels: int, seed: int, spelling: Spelling | None):
        super().__init__()
        from transformers import GPTNeoForSequenceClassification

        torch.manual_seed(seed)
        self.inner = GPTNeoForSequenceClassification(gpt_neo_config(vocab_size, num_labels=labels))
        self.spelling = spelling
        self.register_buffer("class_weights", torch.ones(labels), persistent=False)

    def forward(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """As GPTNeoForSequenceClassification, which reads the last token of a text, from embeddings with a spelling."""
        seen = self._without_words(input_ids, mask) if self.training else input_ids
        embeds = self.inner.transformer.wte(seen)
        if self.spelling is not None:
            embeds = embeds + self._spelled(input_ids, seen, mask)
        hidden = self.inner.transformer(inputs_embeds=embeds, attention_mask=mask.long()).last_hidden_state
        return self.inner.score(hidden[torch.arange(len(mask), device=mask.device), mask.sum(1) - 1])


def gpt_neo_config(vocab_size: int, **more: Any) -> Any:
    """Half the layers, since each has attention and a full MLP: the parameters are those of the Mamba-2 within 3%."""
    from transformers import GPTNeoConfig

    half = LAYERS // 2
    return GPTNeoConfig(
        vocab_size=vocab_size + 1,
        hidden_size=WIDTH,
        num_layers=half,
        attention_types=[[["global"], half]],
        num_heads=4,
        max_position_embeddings=512,
        resid_dropout=0.1,
        embed_dropout=0.1,
        attention_dropout=0.1,
        classifier_dropout=0.1,
        pad_token_id=vocab_size,
        bos_token_id=0,
        eos_token_id=0,
        **more,
    )


def mamba2_config(vocab_size: int) -> Mamba2Config:
    return Mamba2Config(vocab_size, d_model=WIDTH, n_layer=LAYERS, d_state=32, headdim=32, dropout=0.1)


def prepared(o: Options) -> tuple[WordTokenizer, Tensor, Tensor]:
    """The vocabulary and the pretraining's tokens: stories, and the training texts of all tasks. Made once, kept."""
    folder = o.work / f"words-{o.share:g}"
    if files.is_file(folder / "tokens.pt"):
        tokens = checkpoint.load_tensors(folder / "tokens.pt")
        return WordTokenizer.load(folder / "tokenizer.json"), tokens["train"], tokens["validation"]
    documents = _part([(d.text, "") for d in read_documents(o.data / "llama-stories")], o.share)
    held_out, stories = documents[::20], [d for k, d in enumerate(documents) if k % 20]
    own = [t for task in ("banking77", "sms") for t in read_task(task, o.data, o.share, 0)[0]]
    random.Random(0).shuffle(own)
    texts = [text for text, _ in [*stories, *own]]
    random.Random(1).shuffle(texts)
    tokenizer = WordTokenizer.train(texts, 8192, 2, "llama3", ())
    made = [
        torch.tensor([i for text in part for i in (*tokenizer.encode(text), tokenizer.eos_id)], dtype=torch.int32)
        for part in (texts, [text for text, _ in held_out])
    ]
    files.make_folder(folder)
    tokenizer.save(folder / "tokenizer.json")
    checkpoint.save_tensors(folder / "tokens.pt", {"train": made[0], "validation": made[1]})
    return tokenizer, made[0], made[1]


def train(model: nn.Module, task: Task, o: Options, **settings: Any) -> tuple[Score, float, float]:
    """Trains with the trainer of this package; the best loss, its seconds and tokens per second."""
    asked = {"patience": 0, "warmup_steps": 100, "save_every": 10**6, "log_every": 10**6, "precision": o.precision}
    tokens = [0, 0.0]

    def report(event: str, values: dict[str, Any]) -> None:
        if event == "step":
            tokens[0] += values["tokens"]
            tokens[1] += values["seconds"]

    with tempfile.TemporaryDirectory() as out:
        trainer = Trainer(model, task, Settings(**{**asked, **settings}), out, o.device, report=report)  # type: ignore[arg-type]
        trainer._draw = lambda: None  # type: ignore[method-assign]
        result = trainer.train()
    if result.reason == "signal" or result.best is None:
        raise KeyboardInterrupt if result.signal else RuntimeError("no finite loss")
    return result.best, trainer.seconds, tokens[0] / max(tokens[1], 1e-9)


def pretrain(family: str, o: Options) -> dict[str, Any]:
    """Pretrains a family's model, or finds that it was done, in o.work: what came out."""
    folder = o.work / f"{family}-{o.share:g}-{o.pretrain_steps}"
    if files.is_file(folder / "about.json"):
        return files.load_json(folder / "about.json")
    tokenizer, tokens, validation = prepared(o)
    model = Mamba2LM(mamba2_config(len(tokenizer)), seed=0) if family == "mamba2" else GPTNeoLM(len(tokenizer), 0)
    steps = o.pretrain_steps
    best, seconds, speed = train(
        model,
        NextToken(tokens, validation, tokenizer),
        o,
        context=CONTEXT,
        batch_size=16,
        max_steps=steps,
        eval_every=max(steps // 4, 1),
        lr=4e-3,
        weight_decay=0.3,
        graph=o.device == "cuda",
    )
    about = {
        "row": f"pretraining/{family}",
        "parameters": sum(p.numel() for p in model.parameters()),
        "loss": best.loss,
        "steps": steps,
        "tokens": steps * 16 * CONTEXT,
        "seconds": seconds,
        "tokens_per_second": speed,
    }
    files.make_folder(folder)
    checkpoint.save_tensors(folder / "weights.pt", {n: t.cpu() for n, t in model.state_dict().items()})
    files.save_json(folder / "about.json", about)
    return about


def split_name(model: str) -> tuple[str, str]:
    """The family of a model, and what its head reads: "mamba2-last" is "mamba2" and "last"."""
    family = "gpt-neo" if model.startswith("gpt-neo") else "mamba2"
    pool = model.removeprefix(family).lstrip("-")
    return family, pool if pool in POOLS else POOL


class Together(nn.Module):
    """The logarithm of the mean of the probabilities of several classifiers, as `classify` with several folders."""

    def __init__(self, members: list[nn.Module]):
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        return torch.stack([member(input_ids, mask).float().softmax(-1) for member in self.members]).mean(0).log()


def sorter(
    model: str, method: str, data: LabelData, tokenizer: WordTokenizer, seed: int, o: Options, member: int = 0
) -> nn.Module:
    """A classifier, with the pretrained weights unless it is from scratch, and adapters where the method is lora."""
    labels = len(data.names)
    family, pool = split_name(model)
    size, (buckets, consistency) = len(tokenizer), MEMBERS[member] if not model.endswith("-words") else (0, 0.0)
    spelling = Spelling(tokenizer, WIDTH, buckets, seed) if buckets else None
    weights = {}
    if method != "scratch":
        pretrain(family, o)
        weights = checkpoint.load_tensors(o.work / f"{family}-{o.share:g}-{o.pretrain_steps}" / "weights.pt")
    lora = LoRAConfig(16, 32.0, 0.1, LORA[family])
    if family == "mamba2":
        lm = Mamba2LM(mamba2_config(size), seed=seed)
        if weights:
            checkpoint.load_weights(lm, weights, "the pretraining")
        if method.startswith("lora"):
            add_lora(lm, lora, seed)
            if method == "lora-seen":
                train_rows(lm, {i for sample in data.train for i in sample.ids.tolist()})
        elif method == "state":
            lm = TunedStateLM.of(lm)
        return Classifier(lm, labels, pool, None, 0.1, 0.2, seed, WORD_DROPOUT, consistency, spelling)
    neo = GPTNeoSorter(size, labels, seed, spelling)
    if weights:
        body = {n.removeprefix("inner.transformer."): t for n, t in weights.items() if "transformer." in n}
        neo.inner.transformer.load_state_dict(body)
    if method == "lora":
        add_lora(neo.inner.transformer, lora, seed)
    return neo


def begin(o: Options) -> None:
    """Settles a worker's threads, and which GPU it has where there are several."""
    torch.set_num_threads(o.threads)
    devices.keep_freed_memory()
    if o.device == "cuda":
        torch.cuda.set_device(os.getpid() % torch.cuda.device_count())


def learn(task: str, model: str, method: str, seed: int, o: Options) -> dict[str, Any]:
    """One row: fine-tunes a classifier and scores it on the test part."""
    begin(o)
    tokenizer, _, _ = prepared(o)
    parts = read_task(task, o.data, o.share, seed)
    names = sorted({label for _, label in parts[0]})
    kept = [[(t, label) for t, label in part if label in names] for part in parts]
    samples = [
        [Sample(torch.tensor([tokenizer.eos_id, *tokenizer.encode(t)]), names.index(label)) for t, label in part]
        for part in kept
    ]
    data = LabelData(samples[0], samples[1], names)
    epochs = o.epochs * (3 if task in ("banking77-10", "sms-book") else 1)  # as many steps where texts are few
    per_epoch = -(-len(samples[0]) // 32)
    lr = o.lr or (RATES | RATES_OF_FEW if task == "banking77-10" else RATES)[method]
    nets: list[nn.Module] = []
    loss, seconds = 0.0, 0.0
    for member in range(len(MEMBERS) if model == "mamba2-two" else 1):
        net = sorter(model, method, data, tokenizer, seed, o, member)
        steps = max(per_epoch * epochs, 1)
        last, took, speed = train(
            net,
            Sorting(data, tokenizer, InMemory()),  # type: ignore[arg-type]
            o,
            context=CONTEXT,
            batch_size=32,
            max_steps=steps,
            eval_every=steps,
            lr=lr,
            weight_decay=0.3,
            ema_decay=EMA,
            seed=seed,
        )
        nets.append(net)
        loss, seconds = loss + last.loss, seconds + took
    net = Together(nets) if len(nets) > 1 else nets[0]
    autocast = devices.autocast(torch.device(o.device), devices.pick_precision(o.precision, torch.device(o.device)))
    validation, test = (score(net, part, len(names), autocast) for part in samples[1:])  # type: ignore[arg-type]
    missing = len(parts[2]) - len(samples[2])  # of a small share of the data: labels that training never saw
    trained, everything = trainable(net)
    return {
        "row": f"{task}/{model}/{method}/{seed}",
        "accuracy": test.accuracy * len(samples[2]) / (len(samples[2]) + missing),
        "macro_f1": test.macro_f1,
        **({"spam_f1": test.f1[names.index("spam")]} if "spam" in names else {}),
        "validation_accuracy": validation.accuracy,
        "validation_loss": loss / len(nets),
        "trained_parameters": trained,
        "parameters": everything,
        "lr": lr,
        "epochs": epochs,
        "weights": "last",
        "texts": [len(part) for part in parts],
        "device": o.device,
        "seconds": seconds,
        "tokens_per_second": speed,
    }


def count_words(task: str, kind: str, seed: int, o: Options) -> dict[str, Any]:
    """One row of the baseline. The validation part is trained on: nothing is chosen by it."""
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.metrics import accuracy_score, f1_score
        from sklearn.pipeline import make_pipeline, make_union
    except ImportError:
        sys.exit('error: the baseline needs scikit-learn: pip install "mamba2-min[bench]"')
    train_part, validation, test = read_task(task, o.data, o.share, seed)
    if task != "banking77-10":
        train_part = train_part + validation
    began = time.perf_counter()
    if kind == "tfidf-default":
        model = make_pipeline(TfidfVectorizer(), LogisticRegression(max_iter=1000))
    else:
        words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
        letters = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True)
        model = make_pipeline(make_union(words, letters), LogisticRegression(C=30, max_iter=2000))
    model.fit(*zip(*train_part, strict=True))
    truth = [label for _, label in test]
    given = list(model.predict([text for text, _ in test]))
    spam = {"spam_f1": f1_score(truth, given, pos_label="spam")} if task.startswith("sms") else {}
    return {
        "row": f"{task}/{kind}/-/{seed}",
        "accuracy": accuracy_score(truth, given),
        "macro_f1": f1_score(truth, given, average="macro"),
        **spam,
        "seconds": time.perf_counter() - began,
    }


def make(row: str, o: Options) -> dict[str, Any]:
    task, model, method, seed = row.split("/")
    done = count_words(task, model, int(seed), o) if model in BASELINES else learn(task, model, method, int(seed), o)
    return {key: float(value) if isinstance(value, float) else value for key, value in done.items()}


def rows(seeds: list[int]) -> Iterator[str]:
    for task in TASKS:
        yield from (f"{task}/{kind}/-/{seed}" for kind in BASELINES for seed in (seeds if "-10" in task else seeds[:1]))
        for model in MODELS:
            for method in METHODS:
                if split_name(model)[1] != POOL and method != "full":
                    continue  # the head's question is asked once
                if model == "mamba2-two" and method not in ("scratch", "full"):
                    continue
                if model.endswith("-words") and method not in ("full", "lora", "lora-seen"):
                    continue
                if model.startswith("gpt-neo") and method in ("state", "lora-seen"):
                    continue  # it has no state, and its head no table of words
                yield from (f"{task}/{model}/{method}/{seed}" for seed in seeds)


def in_turn(found: Iterable[str], only: list[str], seeds: list[int]) -> list[str]:
    """The rows that hold one of the texts in `only`: those of the first seed first, and then in the order of `only`."""

    def turn(row: str) -> tuple[int, int]:
        return seeds.index(int(row.rpartition("/")[2])), next(k for k, text in enumerate(only) if text in row)

    return sorted((row for row in found if any(text in row for text in only)), key=turn)


def summary(found: list[dict[str, Any]]) -> str:
    """A line per task, model and method: the mean over seeds, and the lowest and highest."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for one in found:
        groups.setdefault(one["row"].rpartition("/")[0], []).append(one)
    lines = [f"{'':34}{'accuracy':>18}{'spam F1':>10}{'trained':>12}{'minutes':>9}{'tokens/s':>10}{'seeds':>6}"]
    for name, some in groups.items():
        if "accuracy" not in some[0]:
            continue
        values = sorted(100 * one["accuracy"] for one in some)
        mean = f"{sum(values) / len(values):.2f} ({values[0]:.1f}-{values[-1]:.1f})"
        spam = [one["spam_f1"] for one in some if "spam_f1" in one]
        lines.append(
            f"{name:34}{mean:>18}{f'{sum(spam) / len(spam):.3f}' if spam else '':>10}"
            f"{some[0].get('trained_parameters', 0):>12,}{sum(one['seconds'] for one in some) / len(some) / 60:>9.1f}"
            f"{some[0].get('tokens_per_second', 0):>10,.0f}{len(some):>6}"
        )
    return "\n".join(lines)


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", type=Path, required=True, metavar="DIR", help="the folder of the data sets")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--threads", type=int, default=2, help="CPU threads of a worker (%(default)s)")
    p.add_argument("--workers", type=int, default=1, help="rows at a time (%(default)s)")
    p.add_argument("--precision", choices=("float32", "bf16"), default="float32", help="(%(default)s)")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument(
        "--only", nargs="+", default=[""], metavar="TEXT", help="rows that hold one of these texts, in this order"
    )
    p.add_argument("--lr", type=float, help="another peak learning rate, for a study; put --out elsewhere")
    p.add_argument("--epochs", type=int, default=12, help="passes over the training texts (%(default)s)")
    p.add_argument("--pretrain-steps", type=int, default=2000, help="of 2,048 tokens (%(default)s)")
    p.add_argument("--share", type=float, default=1.0, help="of the data, to try it (%(default)s)")
    p.add_argument("--work", type=Path, default=Path("runs/classification"), help="what is kept between calls")
    p.add_argument("--out", type=Path, help="the JSON (benchmarks/results/classification-DEVICE.json)")
    p.add_argument("--list", action="store_true", help="print the rows and stop")
    args = p.parse_args()
    out = args.out or (
        harness.RESULTS / f"classification-{args.device}.json" if args.share == 1 else args.work / "part.json"
    )
    wanted = in_turn(rows(args.seeds), args.only, args.seeds)
    result = files.load_json(out) if files.is_file(out) else {"rows": []}
    done = {one["row"] for one in result["rows"]}
    left = [row for row in wanted if row not in done]
    if args.list:
        print(*(f"{row}{'  done' if row in done else ''}" for row in wanted), sep="\n")
        return 0
    o = Options(
        args.data.resolve(),
        args.work.resolve(),
        args.device,
        args.threads,
        args.precision,
        args.share,
        args.epochs,
        args.pretrain_steps,
        args.lr,
    )
    machine = harness.machine(harness.Options(device=args.device, threads=args.threads))
    about = {"benchmark": "classification", "workers": args.workers, "machine": machine}

    def keep(one: dict[str, Any]) -> None:
        result["rows"] = [*(r for r in result["rows"] if r["row"] != one["row"]), one]
        files.make_folder(out.parent)
        files.save_json(out, {**about, "versions": harness.versions(), "rows": result["rows"]})
        print(f"{time.strftime('%H:%M:%S')} {json.dumps(one)}", flush=True)

    print(f"{len(left)} rows to make, {len(wanted) - len(left)} are there; results go to {out}", flush=True)
    with harness.pool(args.workers) as pool:
        if left:  # before the rows, which then find it done
            pool.submit(_prepare, o).result()
            families = {split_name(row.split("/")[1])[0] for row in left if row.split("/")[2] in PRETRAINED}
            for one in as_completed([pool.submit(_pretrain, family, o) for family in sorted(families)]):
                keep(one.result())
        for one in as_completed([pool.submit(make, row, o) for row in left]):
            keep(one.result())
    print(summary(result["rows"]))
    return 0


def _prepare(o: Options) -> None:
    prepared(o)


def _pretrain(family: str, o: Options) -> dict[str, Any]:
    begin(o)
    return pretrain(family, o)


if __name__ == "__main__":
    sys.exit(main())
