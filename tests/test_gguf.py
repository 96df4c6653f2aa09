"""The exported file holds the model and its vocabulary, as the package gguf reads them; what cannot be exported exactly
is refused in one line. What llama.cpp makes of the file is in test_llama_cpp.py."""

import dataclasses
import json
import math
import time
from itertools import pairwise
from pathlib import Path

import forked
import gguf as reference
import modelfile
import numpy as np
import pytest
from exported_runs import TEXTS, make_model, make_tokenizer, save_run

from mamba2_min import export
from mamba2_min.checkpoints import gguf, llama_cpp
from mamba2_min.config import Mamba2Config
from mamba2_min.data.patterns import PIECES
from mamba2_min.data.tokenizer import WordTokenizer
from mamba2_min.errors import UserError
from mamba2_min.finetune.conversations import TEMPLATES, Conversation, Message, tokenize
from mamba2_min.models.mamba2 import Mamba2LM
from mamba2_min.settings import PRESETS

ROOT = Path(__file__).parent.parent
SHAPES = [
    {},
    {"tie_embeddings": False, "pad_vocab_size_multiple": 16},
    {"ngroups": 2, "conv_bias": False},
    {"d_model": 40, "headdim": 20, "expand": 1, "d_conv": 3, "n_layer": 1},  # rows of 40 are no multiple of 32
]


def random(*shape):
    return np.random.default_rng(0).standard_normal(shape, np.float32)


METADATA = {
    "general.architecture": "mamba2",
    "a string": "née \x00 “x”",
    "an integer": 2**32 - 1,
    "a float": 1e-5,
    "yes": True,
    "no": False,
    "strings": ["a", "", "é" * 100],
    "no strings": [],
    "integers": [1, -2, 3],
}


class TestFile:
    def test_there_and_back(self, tmp_path):
        x = random(3, 64)
        tensors = {"a": x, "b": x.astype(np.float16), "c": gguf.quantize_q8_0(x), "d": x[0, :5], "e": x[:, None, :7]}
        gguf.write_gguf(tmp_path / "x.gguf", METADATA, tensors)
        metadata, found = gguf.read_gguf(tmp_path / "x.gguf")
        assert metadata == {**METADATA, "a float": float(np.float32(1e-5))}
        assert list(found) == list(tensors)
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
            assert found[name].tobytes() == tensor.tobytes()

    def test_the_package_gguf_reads_the_same(self, tmp_path):
        x = random(5, 96)
        tensors = {"a": x[:, :7], "b": x.astype(np.float16), "c": gguf.quantize_q8_0(x), "d": x[0]}
        gguf.write_gguf(tmp_path / "x.gguf", METADATA, tensors)
        reader = reference.GGUFReader(tmp_path / "x.gguf")
        for key, value in METADATA.items():
            found = reader.fields[key].contents()
            assert found == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value), key
        assert [t.name for t in reader.tensors] == list(tensors)
        for t in reader.tensors:
            mine = tensors[t.name]
            numbers = gguf.dequantize_q8_0(mine) if mine.dtype == gguf.Q8_0 else mine
            assert tuple(reversed(t.shape.tolist())) == numbers.shape
            assert np.array_equal(reference.quants.dequantize(t.data, t.tensor_type), numbers)

    def test_numbers_in_eight_bits_are_those_of_the_package(self):
        x = np.concatenate(
            [random(4, 320), np.zeros((1, 320), np.float32), random(3, 320) * 1e-30, random(2, 320) * 1e4]
        )
        x[0, :32] = np.arange(32) - 15.5  # halves, to be rounded
        mine = gguf.quantize_q8_0(x)
        theirs = reference.quants.quantize(x, reference.GGMLQuantizationType.Q8_0)
        assert mine.tobytes() == theirs.tobytes()
        back = gguf.dequantize_q8_0(mine)
        largest = np.abs(x).reshape(-1, 10, 32).max(-1).repeat(32, -1)
        assert (np.abs(back - x) <= largest / 127 * 0.51 + largest * 2**-11 + 1e-7).all()

    def test_damage_is_one_line(self, tmp_path):
        path = tmp_path / "x.gguf"
        gguf.write_gguf(path, METADATA, {"a": random(3, 5)})
        whole = path.read_bytes()
        sizes = [*range(0, len(whole) - 64, 7), len(whole) - 60]
        damaged = [whole[:size] for size in sizes] + [b"GGUF" + b"\xff" * 100, b"no model", b"GGML" + whole[4:]]
        for content in damaged:
            path.write_bytes(content)
            with pytest.raises(UserError, match="not a GGUF file") as caught:
                gguf.read_gguf(path)
            assert "\n" not in str(caught.value)
        with pytest.raises(UserError, match="cannot read"):
            gguf.read_gguf(tmp_path / "absent")

    def test_it_counts_when_it_was_read_back(self, tmp_path, monkeypatch):
        path = tmp_path / "x.gguf"
        gguf.write_gguf(path, {"a": 1}, {"a": random(3, 5)})
        before = path.read_bytes()
        read = gguf.read_gguf

        def misread(name):
            metadata, tensors = read(name)
            return metadata, {key: value + 1 for key, value in tensors.items()}

        monkeypatch.setattr(gguf, "read_gguf", misread)
        with pytest.raises(UserError, match="not read back"):
            gguf.write_gguf(path, {"a": 2}, {"a": random(3, 5)})
        assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]

    @pytest.mark.parametrize("bad", [np.zeros((2, 2)), np.zeros((2, 2), np.int32), random(1, 1, 1, 1, 1)])
    def test_what_the_format_cannot_hold(self, tmp_path, bad):
        with pytest.raises(ValueError):
            gguf.write_gguf(tmp_path / "x.gguf", {}, {"a": bad})
        assert not list(tmp_path.iterdir())


class TestModel:
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("kind", llama_cpp.KINDS)
    def test_tensors(self, shape, kind):
        model = make_model(301, **shape)
        c, weights = model.config, model.state_dict()
        found = llama_cpp.tensors(c, weights, kind)
        mixer = "backbone.layers.0.mixer."

        def numbers(name):
            tensor = found[name]
            assert tensor.dtype == np.float32 or name.split(".")[-2] in ("token_embd", "output", "ssm_in", "ssm_out")
            return gguf.dequantize_q8_0(tensor) if tensor.dtype == gguf.Q8_0 else tensor.astype(np.float32)

        tolerance = {"f32": 0, "f16": 2**-11, "q8_0": 0.02}[kind]
        for name, expected in {
            "token_embd.weight": weights["backbone.embedding.weight"][:301],
            "blk.0.ssm_in.weight": weights[f"{mixer}in_proj.weight"],
            "blk.0.ssm_out.weight": weights[f"{mixer}out_proj.weight"],
        }.items():
            scale = np.abs(expected.numpy()).max()
            assert np.allclose(numbers(name), expected.numpy(), rtol=tolerance, atol=tolerance * scale)
        exact = {
            "output_norm.weight": weights["backbone.norm_f.weight"],
            "blk.0.attn_norm.weight": weights["backbone.layers.0.norm.weight"],
            "blk.0.ssm_conv1d.weight": weights[f"{mixer}conv1d.weight"][:, 0],
            "blk.0.ssm_dt.bias": weights[f"{mixer}dt_bias"],
            "blk.0.ssm_a": -weights[f"{mixer}A_log"].exp()[:, None],
            "blk.0.ssm_d": weights[f"{mixer}D"][:, None],
            "blk.0.ssm_norm.weight": weights[f"{mixer}norm.weight"].view(c.ngroups, -1),
        }
        for name, expected in exact.items():
            assert found[name].dtype == np.float32 and np.array_equal(found[name], expected.numpy()), name
        bias = weights[f"{mixer}conv1d.bias"].numpy() if c.conv_bias else np.zeros(c.conv_dim)
        assert np.array_equal(found["blk.0.ssm_conv1d.bias"], bias)
        assert ("output.weight" in found) is not c.tie_embeddings
        assert len(found) == 2 + (not c.tie_embeddings) + 9 * c.n_layer

    def test_nothing_else_than_the_config_says(self):
        c = make_model(301, ngroups=2).config
        metadata = llama_cpp.metadata(c, make_tokenizer(), "f16")
        assert {key[7:]: value for key, value in metadata.items() if key.startswith("mamba2.")} == {
            "context_length": 2**20,
            "embedding_length": 32,
            "block_count": 2,
            "feed_forward_length": 0,
            "attention.head_count": 0,
            "attention.layer_norm_rms_epsilon": c.norm_eps,
            "ssm.conv_kernel": 4,
            "ssm.inner_size": 64,
            "ssm.state_size": 16,
            "ssm.time_step_rank": c.nheads,
            "ssm.group_count": 2,
        }

    @pytest.mark.parametrize(
        ("shape", "name"),
        [
            ({"proj_bias": True}, "proj_bias"),
            ({"norm_before_gate": True}, "norm_before_gate"),
            ({"ngroups": 2, "norm_per_group": False}, "norm_per_group"),
        ],
    )
    def test_what_llama_cpp_does_not_have_is_refused(self, shape, name):
        with pytest.raises(UserError, match=name) as caught:
            llama_cpp.check_supported(Mamba2Config(300, **{"d_model": 32, "headdim": 16, **shape}))
        assert "\n" not in str(caught.value)
        llama_cpp.check_supported(Mamba2Config(300, d_model=32, headdim=16, ngroups=1, norm_per_group=False))

    def test_weights_too_large_for_float16(self):
        model = make_model(301)
        model.backbone.layers[1].mixer.out_proj.weight.data[0, 0] = 1e5
        with pytest.raises(UserError, match=r"layers\.1\.mixer\.out_proj\.weight .* --type f32"):
            llama_cpp.tensors(model.config, model.state_dict(), "f16")


def byte_pair_encode(metadata, piece):
    """How llama.cpp spells a piece, from the file alone: a token, or its bytes joined by the rules, lowest rank first.

    What is joined but is not a token is dropped.
    """
    ids = {text: i for i, text in enumerate(metadata["tokenizer.ggml.tokens"])}
    ranks = {tuple(rule.split(" ", 1)): i for i, rule in enumerate(metadata["tokenizer.ggml.merges"])}
    alphabet = metadata["tokenizer.ggml.tokens"][1:257]
    parts = [alphabet[byte] for byte in piece.encode()]
    if "".join(parts) in ids:
        return [ids["".join(parts)]]
    while pairs := [(ranks[pair], i) for i, pair in enumerate(pairwise(parts)) if pair in ranks]:
        i = min(pairs)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return [ids[part] for part in parts if part in ids]


class TestVocabulary:
    CONFIG = Mamba2Config(300)

    def metadata(self, tokenizer):
        return llama_cpp.metadata(self.CONFIG, tokenizer, "f32")

    def test_tokens_are_the_bytes_that_they_stand_for(self):
        tok = make_tokenizer()
        found = self.metadata(tok)
        tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
        assert len(tokens) == len(types) == len(set(tokens)) == len(tok)
        assert (tokens[0], types[0]) == ("<end of document>", 5)
        assert (tokens[257], types[257]) == ("<start>", 4)
        byte_of = {text: bytes([value]) for value, text in enumerate(tokens[1:257])}
        for i in (*range(1, 257), *range(258, len(tok))):
            assert b"".join(byte_of[c] for c in tokens[i]) == tok.token_bytes(i) and types[i] == 1
        assert [tokens[1 + value] for value in b"a~ \n\x00\xad\xff"] == ["a", "~", "Ġ", "Ċ", "Ā", "Ń", "ÿ"]
        assert found["tokenizer.ggml.bos_token_id"] == found["tokenizer.ggml.eos_token_id"] == 0
        assert found["tokenizer.ggml.add_bos_token"] is True

    def test_byte_pair_encoding_spells_as_encode_does(self):
        known = make_tokenizer(min_count=2)
        assert {"我", "ค"} <= {*known.words} or {"我", "ั"} <= {*known.words}
        assert len(known) > 257 + 1 + len(known.words)  # there are beginnings
        draw = np.random.default_rng(0)
        signs = [*"".join(TEXTS), *"戒ขÉ😂🙀’ aZ", *map(chr, draw.integers(0x80, 0xD000, 300))]
        for tok in (known, make_tokenizer(), make_tokenizer(["plain ASCII"])):
            found = self.metadata(tok)
            for _ in range(300):
                text = "".join(draw.choice(signs, 12))
                ids = [i for piece in PIECES["llama3"](text) for i in byte_pair_encode(found, piece)]
                assert ids == tok.encode(text)
        assert found["tokenizer.ggml.merges"] == []

    def test_what_is_not_text_alone_is_never_sampled(self):
        tok = make_tokenizer(min_count=2)
        suppressed = self.metadata(tok)["tokenizer.ggml.suppress_tokens"]
        assert {*range(129, 257)} <= {*suppressed}
        for i in range(len(tok)):
            assert ("\ufffd" in tok.decode([i])) is (i in suppressed)

    @pytest.mark.parametrize(
        ("words", "specials"),
        [([" cat"], ["Ġcat"]), ([], ["Ã"]), (["é"], ["Ã©"]), (["a"], []), ([], ["<"]), ([], [llama_cpp.END])],
    )
    def test_two_tokens_of_one_spelling_are_refused(self, words, specials):
        with pytest.raises(UserError, match="two tokens would be listed as"):
            self.metadata(WordTokenizer(words, specials, "llama3"))

    def test_whitespace_is_refused(self):
        with pytest.raises(UserError, match="whitespace"):
            self.metadata(WordTokenizer(["a"], pattern="whitespace"))

    @pytest.mark.parametrize(
        ("specials", "reason"),
        [
            ([], ""),
            (["<start>", "<|user|>", "<|a|>"], ""),
            (["<a", "<a>", "x<a>"], ""),  # one within another: the longest wins in both
            (["<né>", "ไทย", "a b"], ""),
            (["<a>", "a>b"], "can overlap"),
            (["Ġcat"], "would also read ' cat'"),
        ],
    )
    def test_special_words_that_llama_cpp_would_read_in_another_way(self, specials, reason):
        assert reason in llama_cpp.inexact(WordTokenizer([" dog"], specials, "llama3"))
        assert bool(llama_cpp.inexact(WordTokenizer([" dog"], specials, "llama3"))) is bool(reason)
        assert '"words"' in llama_cpp.inexact(WordTokenizer([" dog"], specials))


def run_export(*arguments):
    return forked.command("-m", "mamba2_min.export", *arguments)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    tok = make_tokenizer()
    return save_run(tmp_path_factory.mktemp("run"), make_model(len(tok)), tok)


class TestCommand:
    def test_writes_two_files_and_says_what_follows(self, run, tmp_path):
        out = tmp_path / "to here" / "mine"
        done = run_export("--model", run, "--out", out, "--type", "q8_0")
        assert done.returncode == 0 and not done.stderr
        assert sorted(path.name for path in out.iterdir()) == ["Modelfile", "model.gguf"]
        lines = done.stdout.splitlines()
        assert lines[-4].split(maxsplit=1)[1] == f"ollama create mine -f '{out}/Modelfile'"
        assert lines[-3].strip() == "ollama run mine 'Once upon a time'"
        assert lines[-2].split(maxsplit=1)[1].startswith(f"llama-completion -m '{out}/model.gguf' ")
        text = (out / "Modelfile").read_text()
        assert text.startswith('FROM ./model.gguf\nTEMPLATE """{{ .Prompt }}"""\n')
        values = {name: float(*value) for name, value in modelfile.parameters(text).items()}
        off = {"top_k": 0, "top_p": 1, "min_p": 0.1, "repeat_penalty": 1}
        assert values == {"temperature": 0.8, **off, "num_ctx": 2**20}
        reader = reference.GGUFReader(out / "model.gguf")
        assert reader.fields["general.file_type"].contents() == 7
        assert {t.tensor_type.name for t in reader.tensors} == {"F32", "Q8_0"}

    @pytest.mark.parametrize(("folder", "name"), [("My stories", "My-stories"), ("ü", "mine"), ("_v1.2", "v1.2")])
    def test_the_name_is_one_that_ollama_takes(self, run, tmp_path, capsys, folder, name):
        export.export(str(run), str(tmp_path / folder))
        assert f"ollama create {name} -f " in capsys.readouterr().out

    def test_a_request_is_answered_with_its_template(self, run, tmp_path, capsys):
        export.export(str(run), str(tmp_path), template="request")
        assert 'TEMPLATE """{{ .Prompt }}<start>"""' in (tmp_path / "Modelfile").read_text()
        assert "--template" not in capsys.readouterr().out
        export.export(str(run), str(tmp_path))
        assert "--template request" in capsys.readouterr().out

    def test_request_needs_documents_with_requests(self, tmp_path):
        tok = make_tokenizer(["a cat"], special_words=())
        run = save_run(tmp_path / "run", make_model(len(tok)), tok)
        with pytest.raises(UserError, match="<start>"):
            export.export(str(run), str(tmp_path / "out"), template="request")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("name", ["turns", "request"])
    def test_a_chat_run_gets_its_template(self, tmp_path, name):
        """Rendered by Jinja, the file's template gives the tokens that fine-tuning trains on."""
        jinja2 = pytest.importorskip("jinja2")
        tok = make_tokenizer(["User: a\nAssistant: b<start>", *TEXTS])
        run = save_run(tmp_path / "run", make_model(len(tok)), tok)
        settings = json.loads((run / "settings.json").read_text())
        (run / "settings.json").write_text(json.dumps({**settings, "chat": {"template": name}}))
        export.export(str(run), str(tmp_path / "out"))
        metadata, _ = gguf.read_gguf(tmp_path / "out" / "model.gguf")
        said = [
            ("system", "Be kind."),
            ("user", "Who?"),
            ("assistant", "A cat."),
            ("user", "Why?"),
            ("assistant", "So."),
        ]
        loose = jinja2.Environment()
        talk = Conversation(tuple(Message(*message) for message in said))
        trained = tokenize(talk, TEMPLATES[name], tok).ids.tolist()
        go = modelfile.template((tmp_path / "out" / "Modelfile").read_text())
        strict = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
        for before in ("", " "):  # a server's answer comes back as the model wrote it
            messages = [{"role": r, "content": before * (r == "assistant") + content} for r, content in said]
            texts = [environment.from_string(metadata["tokenizer.chat_template"]) for environment in (strict, loose)]
            texts = [text.render(messages=messages, add_generation_prompt=True) for text in texts]
            if not before or name == "turns":
                texts.append(modelfile.render(go, messages))
            for text in texts:
                ids = [0]
                for part in text.removesuffix(llama_cpp.END).split(llama_cpp.END):
                    ids += [*tok.encode(part, allow_special=True), 0]
                assert ids == trained
        assert metadata["tokenizer.ggml.token_type"][0] == 3  # text becomes it
        assert metadata["tokenizer.ggml.tokens"][metadata["tokenizer.ggml.eos_token_id"]] == llama_cpp.END  # it stops
        export.export(str(run), str(tmp_path / "text"), template="text")
        metadata, _ = gguf.read_gguf(tmp_path / "text" / "model.gguf")
        assert "tokenizer.chat_template" not in metadata and metadata["tokenizer.ggml.token_type"][0] == 5

    def test_chat_needs_a_run_that_takes_turns(self, run, tmp_path):
        with pytest.raises(UserError, match="not fine-tuned on turns"):
            export.export(str(run), str(tmp_path / "out"), template="chat")
        tok = make_tokenizer()
        other = save_run(tmp_path / "other", make_model(len(tok)), tok)
        for bad in ('"shouting"', '{"template": "shouting"}', '{"template": ["shouting"]}'):
            (other / "settings.json").write_text(f'{{"chat": {bad}}}')
            with pytest.raises(UserError, match=r"the chat template .*shouting.*; there are turns, request"):
                export.export(str(other), str(tmp_path / "out"))

    def test_an_inexact_tokenizer_is_refused_unless_approximate(self, tmp_path):
        data = tmp_path / "data"
        data.mkdir()
        for k in range(30):
            (data / f"{k}.md").write_text(
                f"The cat didn't sleep in 19{k + 10}. “Well,” said the dog’s friend.\n\nThe end."
            )
        tok = make_tokenizer([path.read_text() for path in data.iterdir()], "words", ())
        run = save_run(tmp_path / "run", make_model(len(tok)), tok, data)
        out = tmp_path / "out"
        done = run_export("--model", run, "--out", out)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and not out.exists()
        assert '"words"' in done.stderr and "--approximate" in done.stderr
        done = run_export("--model", run, "--out", out, "--approximate")
        assert done.returncode == 0, done.stderr
        cost = next(line for line in done.stdout.splitlines() if line.startswith("cost"))
        share = float(cost.split()[1].rstrip("%"))
        before, after = (float(word) for word in cost.split() if word.replace(".", "").isdigit() and "." in word)
        assert 5 < share < 95 and math.isfinite(before) and before != after
        metadata, _ = gguf.read_gguf(out / "model.gguf")
        assert len(metadata["tokenizer.ggml.tokens"]) == len(tok) and metadata["tokenizer.ggml.merges"] == []

    def test_the_cost_is_not_measured_where_the_documents_are_gone(self, tmp_path, capsys):
        tok = make_tokenizer(pattern="words")
        run = save_run(tmp_path / "run", make_model(len(tok)), tok, tmp_path / "gone")
        export.export(str(run), str(tmp_path / "out"), approximate=True)
        assert "not measured: no such file or folder" in capsys.readouterr().out

    def test_different_share_counts_tokens_at_their_places(self):
        tok = WordTokenizer([" ab", " a"])

        @dataclasses.dataclass
        class Stream:
            validation: object

        def stream(*ids):
            import torch

            return Stream(torch.tensor(ids, dtype=torch.int32))

        a, b = 1 + ord("a"), 1 + ord("b")
        assert export.different_share(tok, stream(257, 0), stream(257, 0)) == 0
        assert export.different_share(tok, stream(257, 257, 0), stream(258, b, 257, 0)) == 0.5
        assert export.different_share(tok, stream(257, 0), stream(33, a, b, 0)) == 0.75

    @pytest.mark.parametrize(
        ("preset", "parameters", "most"), [("small", 3.8e6, 2), pytest.param("base", 130e6, 10, marks=pytest.mark.slow)]
    )
    def test_the_export_takes_seconds(self, tmp_path, preset, parameters, most):
        """In processor time, reading the file back included."""
        words = [f" w{i}" for i in range(8192 - 257 if preset == "small" else 52_000)]
        tok = WordTokenizer(words, pattern="llama3")
        model = Mamba2LM(Mamba2Config(len(tok), **PRESETS[preset]))
        assert model.config.num_parameters() > parameters
        run = save_run(tmp_path / "run", model, tok)
        before = time.process_time()
        export.export(str(run), str(tmp_path / "out"))
        assert time.process_time() - before < most

    def test_an_adapter_is_to_be_merged_first(self, run, tmp_path):
        folder = tmp_path / "adapter"
        folder.mkdir()
        (folder / "adapter_config.json").write_text("{}")
        with pytest.raises(UserError, match=r"mamba2_min\.merge --adapter"):
            export.export(str(folder), str(tmp_path / "out"))

    def test_bad_input_is_one_line(self, run, tmp_path):
        tok = make_tokenizer()
        other = save_run(tmp_path / "other", make_model(len(tok)), tok)
        make_tokenizer(["another"]).save(other / "tokenizer.json")
        with pytest.raises(UserError, match="tokens and the model"):
            export.export(str(other), str(tmp_path / "out"))
        (other / "tokenizer.json").unlink()
        (tmp_path / "file").write_text("in the way")
        for model, out in (
            (tmp_path / "absent", tmp_path / "out"),
            (other, tmp_path / "out"),
            (run, tmp_path / "file"),
        ):
            with pytest.raises(UserError) as caught:
                export.export(str(model), str(out))
            assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()
