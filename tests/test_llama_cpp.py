"""llama.cpp itself runs an exported model: the same tokens of any text, the same probabilities, the same text.

`make test-llama` installs it and runs these; elsewhere they are skipped.
"""

import json
import random
import subprocess
import sys
import unicodedata

import modelfile
import numpy as np
import ollama
import pytest
import torch
from exported_runs import DOCUMENTS, TEXTS, make_model, make_tokenizer, save_run
from llama_cpp import LlamaCpp, OllamaStandIn, missing
from small_runs import ROOT, Training

from mamba2_min import export
from mamba2_min.checkpoints import gguf, llama_cpp
from mamba2_min.data.corpus import load_corpus
from mamba2_min.data.tokenizer import WordTokenizer
from mamba2_min.evaluation.perplexity import evaluate
from mamba2_min.finetune.conversations import TEMPLATES, conversation, tokenize
from mamba2_min.finetune.load import template_of
from mamba2_min.finetune.run import finetune
from mamba2_min.finetune.spec import plan
from mamba2_min.finetune.talk import Chat
from mamba2_min.inference.completer import Completer
from mamba2_min.merge import merge
from mamba2_min.models.mamba2 import Mamba2LM
from mamba2_min.ops.sampling import Sampler

pytestmark = [pytest.mark.llama, pytest.mark.skipif(bool(missing()), reason=missing())]

# One for each way in which a shape can differ: head and state sizes, groups, taps, width, depth, tied or not.
SHAPES = {
    "small": {},
    "untied, padded": {"tie_embeddings": False, "pad_vocab_size_multiple": 16},
    "two groups": {"ngroups": 2, "n_layer": 3},
    "a group a head": {"ngroups": 4, "d_state": 8},
    "no convolution bias": {"conv_bias": False, "d_conv": 2},
    "three taps, odd sizes": {"d_model": 40, "headdim": 20, "expand": 1, "d_conv": 3, "d_state": 24, "n_layer": 1},
    "as on a GPU": {"d_model": 64, "headdim": 64, "d_state": 128, "expand": 4},
    "one head, another epsilon": {"headdim": 64, "norm_eps": 1e-3},
}


def exported(folder, tokenizer, kind="f32", **shape):
    """The path of an exported model, and the model."""
    model = make_model(len(tokenizer), **shape)
    save_run(folder / "run", model, tokenizer)
    export.export(str(folder / "run"), str(folder / "out"), kind)
    return folder / "out" / "model.gguf", model


class TestTokens:
    """Ids of every kind of text, in vocabularies that know all, some and none of its words."""

    def agree(self, folder, tokenizer, texts):
        model = make_model(len(tokenizer), d_model=8, headdim=8, n_layer=1, d_state=8)
        values = llama_cpp.metadata(model.config, tokenizer, "f32")
        gguf.write_gguf(folder / "x.gguf", values, llama_cpp.tensors(model.config, model.state_dict(), "f32"))
        with LlamaCpp(folder / "x.gguf") as llama:
            for i in range(0, len(texts), 2000):
                part = texts[i : i + 2000]
                for text, ids in zip(part, llama.tokenize(part), strict=True):
                    assert ids == tokenizer.encode(text, allow_special=True), repr(text)

    def test_documents(self, tmp_path):
        texts = [path.read_text() for path in sorted(DOCUMENTS.rglob("*.md"))]
        texts += [path.read_text() for path in sorted(ROOT.glob("docs/*.md"))] + TEXTS
        self.agree(tmp_path, make_tokenizer(texts, min_count=2, vocab_size=2000), texts)
        self.agree(tmp_path, make_tokenizer(texts), texts)

    def test_every_assigned_code_point(self, tmp_path):
        """Between letters, digits and punctuation: where llama.cpp classed one otherwise, it would cut otherwise."""
        assigned = [chr(c) for c in range(0x110000) if unicodedata.category(chr(c)) not in ("Cn", "Cs")]
        texts = [f"a{c}b 1{c}2 .{c}." for c in assigned]
        for part in range(4):
            self.agree(tmp_path, make_tokenizer(texts[part::4]), texts[part::4])

    def test_fuzzed_texts(self, tmp_path):
        draw = random.Random(0)
        assigned = [chr(c) for c in range(0x110000) if unicodedata.category(chr(c)) not in ("Cn", "Cs")]
        signs = [*" \n\t\r'’s.1_éx\u0301😀我ि<\0\x1c\x85\u3000½٣Ⅷ-\"(ค戒ÉtLveD"]
        known = [*"我爱你ครับéñ’—😀🙂\u0301ि", " cat", "don", "'t", ".\n\n", "1984", " 我爱"]
        tokenizer = WordTokenizer(known, ["<start>", "<|x|>", "<|x"], "llama3")
        parts = [*known, *tokenizer.special_words, "<end of document>", "don't", "ไทย"]

        def text():
            kinds = draw.choice([[assigned], [signs], [parts, signs], [assigned, signs, parts]])
            return "".join(draw.choice(draw.choice(kinds)) for _ in range(draw.randrange(60)))

        self.agree(tmp_path, tokenizer, [text() for _ in range(10_000)])

    def test_hostile_texts(self, tmp_path):
        tokenizer = make_tokenizer(special_words=["<start>"])
        typed = ["<end of document>", "<eos>", "</s>", "<|endoftext|>", "<|im_end|>", "[EOS]", "<0x00>", "\0"]
        texts = ["", " ", "\n", "\r\n\r\n", *typed, *[f" a {t}{t} b" for t in typed]]
        texts += [
            "x" * 100_000,
            " " * 50_000 + "x",
            "'" * 9999,
            "e" + "\u0301" * 9999,
            "\U0010ffff\ufffe\uffff",
            "<start" * 999,
        ]
        self.agree(tmp_path, tokenizer, texts)
        assert not any(tokenizer.eos_id in tokenizer.encode(text, allow_special=True) for text in texts)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_probabilities_and_greedy_text(tmp_path, shape):
    """float32: every probability of every next token within 1e-4, and 200 greedy tokens the same."""
    tokenizer = make_tokenizer()
    path, model = exported(tmp_path, tokenizer, **shape)
    ids = [0, *tokenizer.encode("The cat said: <start>“我爱你” — naïve 戒", allow_special=True)]
    with LlamaCpp(path) as llama:
        theirs = np.array(llama.probabilities(ids))
        text = llama.generate(ids, 200)
    with torch.no_grad():
        ours = model(torch.tensor([ids]))[0][0].softmax(-1).numpy()
    assert theirs.shape == ours.shape == (len(ids), len(tokenizer))
    assert np.abs(theirs - ours).max() < 1e-4
    allowed = torch.tensor(llama.suppressed)
    generated, (logits, state) = [], model.prefill(torch.tensor([ids]))
    while len(generated) < 200:
        token = int(logits[0].index_fill(0, allowed, -torch.inf).argmax())
        if token == 0:
            break
        generated.append(token)
        logits, state = model.step(torch.tensor([token]), state)
    assert text == generated


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of train.py, short but no longer random: its folder, and the validation tokens that it never saw."""
    folder = tmp_path_factory.mktemp("trained")
    flags = ["--pattern", "llama3", "--preset", "tiny", "--context", 128, "--max-steps", 60, "--warmup-steps", 10]
    said = folder / "said.txt"
    training = Training("--data", DOCUMENTS, "--out", folder / "run", *flags, said=said)
    assert training.wait(280) == 0, training.text()
    tokenizer = WordTokenizer.load(folder / "run" / "tokenizer.json")
    return folder / "run", load_corpus(DOCUMENTS, tokenizer=tokenizer)


@pytest.mark.parametrize(("kind", "tolerance"), [("f32", 1e-5), ("f16", 2e-4), ("q8_0", 1e-3)])
def test_perplexity_of_the_validation_text(tmp_path, trained, kind, tolerance):
    run, corpus = trained
    tokens = corpus.validation[:2000]
    score = evaluate(Mamba2LM.from_pretrained(run), tokens, 1, start_id=0)
    export.export(str(run), str(tmp_path), kind)
    with LlamaCpp(tmp_path / "model.gguf") as llama:
        loss = llama.nats([0, *tokens.tolist()]) / score.tokens
    assert np.exp(loss) == pytest.approx(score.perplexity, rel=tolerance)


def test_no_completion_is_invalid_utf8(tmp_path):
    """A server answers invalid UTF-8 with an error. A model that has learnt nothing writes bytes all the time."""
    tokenizer = make_tokenizer(min_count=2)
    path, _ = exported(tmp_path, tokenizer)
    with LlamaCpp(path) as llama:
        texts = [llama.generate([0], 20, temperature=1.0, seed=seed) for seed in range(1000)]
    written = {i for ids in texts for i in ids}
    assert len(written) > 0.9 * (len(tokenizer) - len(llama.suppressed)) and not written & {*llama.suppressed}
    for ids in texts:
        tokenizer.decode_bytes(ids).decode("utf-8")  # strictly


def test_an_approximate_export_reads_text_as_it_was_told(tmp_path):
    """What `--approximate` measures is what llama.cpp does with such a file."""
    texts = [path.read_text() for path in sorted(DOCUMENTS.rglob("*.md"))[:40]] + TEXTS
    tokenizer = make_tokenizer(texts, "words")
    save_run(tmp_path / "run", make_model(len(tokenizer)), tokenizer)
    export.export(str(tmp_path / "run"), str(tmp_path / "out"), approximate=True)
    with LlamaCpp(tmp_path / "out" / "model.gguf") as llama:
        for text, ids in zip(texts, llama.tokenize(texts), strict=True):
            assert ids == tokenizer.recut("llama3").encode(text, allow_special=True)


def conversations(draw, parts, count):
    """Conversations of one to four turns, some after a system message, with contents drawn from `parts`."""
    made = []
    for _ in range(count):
        roles = ["system"] * draw.randrange(2) + ["user", "assistant"] * draw.randrange(1, 5)
        contents = ["".join(draw.choices(parts, k=draw.randrange(1, 12))).strip() or "So." for _ in roles]
        made.append([{"role": role, "content": text} for role, text in zip(roles, contents, strict=True)])
    return made


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_has_the_tokens_that_fine_tuning_trains_on(tmp_path, name):
    """By the template in the file, by the Modelfile's, and when the next answer is asked for."""
    tokenizer = make_tokenizer([*TEXTS, "User: a\nAssistant: b"])
    save_run(tmp_path / "run", make_model(len(tokenizer)), tokenizer)
    (tmp_path / "run" / "settings.json").write_text(json.dumps({"chat": {"template": name}}))
    export.export(str(tmp_path / "run"), str(tmp_path / "out"))
    go = modelfile.template((tmp_path / "out" / "Modelfile").read_text())
    signs = "aéI我ค😀 \n\t'\"-.?!:{}%<>19½"
    parts = [*signs, "cat", "User:", "\n\n", "“Well,” ", " don't", "{{ x }}", "{% if %}", "  "]
    with LlamaCpp(tmp_path / "out" / "model.gguf") as llama:
        for messages in conversations(random.Random(0), parts, 300):
            talk = conversation({"messages": messages}, "here")
            trained = tokenize(talk, TEMPLATES[name], tokenizer).ids.tolist()
            # A server's answer begins with the space that the model writes, and comes back so in the next turn.
            before = TEMPLATES[name].before_answer
            said = [{**m, "content": before * (m["role"] == "assistant") + m["content"]} for m in messages]
            rendered = [modelfile.render(go, each) for each in (messages, said)]
            assert [llama.conversation(each) for each in (messages, said)] == [trained] * 2, messages
            assert [[0, *ids] for ids in llama.tokenize(rendered)] == [trained] * 2, messages
            answer = len(tokenizer.encode(TEMPLATES[name].written("assistant", messages[-1]["content"]))) + 1
            assert llama.conversation(said[:-1]) == trained[:-answer], messages


def test_a_fine_tuned_run_answers_as_in_a_chat_here(tmp_path, trained):
    """Turn after turn the same text, to the end of each answer: an adapter, merged, with its template."""
    animals = ["cat", "dog", "cow", "hen", "fox", "owl"]
    pairs = [{"prompt": f"What is a {a}?", "completion": f"The {a} is an animal, and it's old."} for a in animals]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    chosen = {"model": str(trained[0]), "data": str(tmp_path / "pairs.jsonl"), "method": "lora", "lora_dropout": 0.0}
    steps = {"max_steps": 60, "eval_every": 60, "batch_size": 8, "context": 64, "patience": 0, "precision": "float32"}
    spec = plan(tmp_path / "chat", {**chosen, **steps})
    finetune(spec, tmp_path / "chat", torch.device("cpu"), again="", quiet=True)
    merge(tmp_path / "chat", tmp_path / "merged")
    export.export(str(tmp_path / "merged"), str(tmp_path / "out"))

    completer = Completer.load(tmp_path / "merged")
    chat = Chat(completer, Sampler(0), 60, (), template_of(tmp_path / "merged", completer.tokenizer))
    messages = []
    with OllamaStandIn(tmp_path / "out") as server:
        client = ollama.Client(server.url)
        for animal in animals[:3]:
            request = f"What is a {animal}?"
            messages.append({"role": "user", "content": request})
            parts = [*client.chat("mine", messages, stream=True, options={"temperature": 0, "num_predict": 60})]
            theirs = "".join(part.message.content for part in parts)
            ours = "".join(chat.reply(request, 60, Sampler(0), ()))
            assert completer.stopped_by == "end" and parts[-1].done_reason == "stop"
            assert theirs == chat.template.before_answer + ours and len(ours) > 5
            messages.append({"role": "assistant", "content": theirs})


def test_the_data_generator_asks_an_exported_model(tmp_path, trained):
    """The circle: a model of our own writes documents for the next one, through Ollama's protocol."""
    export.export(str(trained[0]), str(tmp_path / "mine"))
    bounds = ["--min-words", "5", "--max-words", "3000", "--num-predict", "2000"]
    wanted = ["--documents", "3", "--out", str(tmp_path / "made"), *bounds]
    with OllamaStandIn(tmp_path / "mine") as server:
        done = subprocess.run(
            [sys.executable, "data_generator.py", "--model", "mine", "--host", server.url, *wanted],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=240,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    texts = [path.read_text() for path in (tmp_path / "made").glob("*.md")]
    assert len(texts) == 3 and all(len(text.split()) >= 5 for text in texts)
