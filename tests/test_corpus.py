"""The data: what is read, how it is split, and that each epoch's batches hold every target exactly once."""

import os
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba2_min.data.corpus import load_corpus
from mamba2_min.data.documents import Document, read_documents
from mamba2_min.data.split import split_documents
from mamba2_min.data.tokenizer import WordTokenizer
from mamba2_min.data.windows import Windows, validation_windows
from mamba2_min.errors import UserError
from mamba2_min.ops.loss import IGNORE

DATA = Path(__file__).parents[2] / "shared" / "data"


def write(folder, files):
    """Writes {relative path: text or bytes} below `folder`, and returns it."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def texts(documents):
    return [document.text for document in documents]


def many(n):
    return [Document(f"Document {i} tells of thing {i * i}.", f"{i}.md#1") for i in range(n)]


class TestRead:
    def test_md_and_txt_below_the_folder_by_relative_path(self, tmp_path):
        write(tmp_path, {"b.md": "two", "a/z.txt": "one", "c/d/e.MD": "three", "x.json": "{}", "y": "no suffix"})
        documents = read_documents(tmp_path)
        assert [(d.source, d.text) for d in documents] == [
            ("a/z.txt#1", "one"),
            ("b.md#1", "two"),
            ("c/d/e.MD#1", "three"),
        ]

    def test_one_file_of_any_name(self, tmp_path):
        write(tmp_path, {"story": "told", "README.md": "read"})
        assert read_documents(tmp_path / "story") == [Document("told", "story#1")]
        assert texts(read_documents(str(tmp_path / "README.md"))) == ["read"]

    def test_relative_path(self, tmp_path, monkeypatch):
        monkeypatch.chdir(write(tmp_path, {"data/a.md": "one", "README.md": "no", "b.md": "two"}))
        assert [d.source for d in read_documents(".")] == ["b.md#1", "data/a.md#1"]
        assert [d.source for d in read_documents("data/../data/")] == ["a.md#1"]

    def test_what_is_left_out(self, tmp_path):
        kept = {"a.md": "1", "sub/README.md": "2", "sub/license.txt": "3"}
        skipped = {"README.md": "x", "License.txt": "x", "LICENSE.md": "x", ".a.md": "x", ".git/b.md": "x"}
        write(tmp_path, {**kept, **skipped})
        (tmp_path / "folder.md").mkdir()
        assert texts(read_documents(tmp_path)) == ["1", "2", "3"]

    def test_symbolic_links_are_not_followed_and_counted(self, tmp_path):
        inside = write(tmp_path / "inside", {"a.md": "here"})
        outside = write(tmp_path / "outside", {"secret.md": "there"})
        (inside / "link.md").symlink_to(outside / "secret.md")
        (inside / "folder").symlink_to(outside, target_is_directory=True)
        (inside / "loop").symlink_to(inside, target_is_directory=True)
        notes = []
        assert texts(read_documents(inside, notes=notes)) == ["here"]
        assert notes == ["3 symbolic links not followed"]
        (tmp_path / "data").symlink_to(inside, target_is_directory=True)  # the folder itself may be one
        assert texts(read_documents(tmp_path / "data")) == ["here"]

    def test_bom_line_ends_and_white_space_at_the_ends(self, tmp_path):
        write(tmp_path, {"a.txt": b"\xef\xbb\xbf \r\n one\r\n\r\ntwo \r\n\r\n"})
        assert texts(read_documents(tmp_path)) == ["one\n\ntwo"]
        assert texts(read_documents(tmp_path, strip=False)) == [" \n one\n\ntwo \n\n"]

    @pytest.mark.parametrize(
        "content",
        [
            "one<end>two<end>",
            "one<end>\ntwo<end>\n\n",
            "one\n<end>\ntwo",
            "one\n\n  <|endoftext|>\ntwo\n<|endoftext|>\n",
            "<end>one<end> <end>\r\n<end>two",
        ],
    )
    def test_several_documents_in_a_file(self, tmp_path, content):
        write(tmp_path, {"a.md": content})
        assert read_documents(tmp_path) == [Document("one", "a.md#1"), Document("two", "a.md#2")]

    def test_other_markers_stay(self, tmp_path):
        write(tmp_path, {"a.md": "ask<start>answer <eos> < end > the end<end>"})
        assert texts(read_documents(tmp_path)) == ["ask<start>answer <eos> < end > the end"]

    def test_empty_files_are_skipped_and_counted(self, tmp_path):
        write(tmp_path, {"a.md": "", "b.md": " \n\t", "c.md": "<end>\n<end>", "d.md": "text", "e.md": "\ufeff"})
        notes = []
        assert texts(read_documents(tmp_path, notes=notes)) == ["text"]
        assert notes == ["4 files without text skipped"]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"caf\xe9 au lait", r"bad\.md is not UTF-8: byte 0xE9 at offset 3"),
            ("text".encode("utf-16-le"), r"bad\.md is not UTF-8: .*UTF-16"),
            (b"\xef\xbb\xbfabc\xc3", r"bad\.md is not UTF-8: byte 0xC3 at offset 6"),
            (b"\xed\xa0\x80", r"bad\.md is not UTF-8"),  # a lone surrogate
        ],
    )
    def test_not_utf8(self, tmp_path, content, message):
        write(tmp_path, {"good.md": "good", "bad.md": content})
        with pytest.raises(UserError, match=message) as caught:
            read_documents(tmp_path)
        assert "\n" not in str(caught.value)

    def test_nothing_there(self, tmp_path):
        with pytest.raises(UserError, match="absent"):
            read_documents(tmp_path / "absent")
        with pytest.raises(UserError, match="no such file"):
            read_documents("a\0b")
        with pytest.raises(UserError, match=r"no documents in .*: looked for \.md and \.txt"):
            read_documents(tmp_path)
        write(tmp_path, {"a.json": "[]", "README.md": "read me"})
        with pytest.raises(UserError, match="no documents"):
            read_documents(tmp_path)
        write(tmp_path, {"blank.txt": "\n\n"})
        for path in (tmp_path, tmp_path / "blank.txt"):
            with pytest.raises(UserError, match="no documents"):
                read_documents(path)

    def test_a_file_or_a_folder_that_cannot_be_read(self, tmp_path, monkeypatch):
        write(tmp_path, {"a.md": "text", "sub/b.md": "text"})
        refuse = PermissionError(13, "Permission denied", str(tmp_path / "sub"))

        def deny(*_):
            raise refuse

        real_open = os.open
        with monkeypatch.context() as patch:  # not by mode bits, which do not stop root
            patch.setattr(os, "open", lambda path, *a: deny() if str(path).endswith("a.md") else real_open(path, *a))
            with pytest.raises(UserError, match=r"cannot read .*a\.md: Permission denied"):
                read_documents(tmp_path)
        scandir = os.scandir
        with monkeypatch.context() as patch:
            patch.setattr(os, "scandir", lambda path: deny() if str(path).endswith("sub") else scandir(path))
            with pytest.raises(UserError, match=r"cannot read the folder .*sub: Permission denied"):
                read_documents(tmp_path)

    def test_key_is_of_the_text_alone(self):
        assert Document("a", "x.md#1").key == Document("a", "y.md#2").key != Document("b", "x.md#1").key


class TestSplit:
    def test_about_the_fraction_and_each_document_once_in_order(self):
        documents = many(2000)
        for fraction in (0.05, 0.1, 0.5):
            train, validation, notes = split_documents(documents, fraction)
            assert abs(len(validation) / 2000 - fraction) < 0.03
            left_over = iter(validation)
            in_training = set(train)
            assert [d if d in in_training else next(left_over) for d in documents] == documents
            assert len(train) + len(validation) == len(documents)
            assert notes == []

    def test_a_larger_fraction_only_adds(self):
        small, large = (set(texts(split_documents(many(500), f).validation)) for f in (0.1, 0.2))
        assert small < large

    def test_adding_renaming_moving_moves_no_other(self):
        documents = many(300)
        validation = set(texts(split_documents(documents).validation))
        renamed = [Document(d.text, f"new/{i}.txt#3") for i, d in enumerate(reversed(documents))]
        assert set(texts(split_documents(renamed).validation)) == validation
        more = [*many(400)[300:], *documents]
        assert set(texts(split_documents(more).validation)) & set(texts(documents)) == validation
        assert set(texts(split_documents(documents[:200]).validation)) == validation & set(texts(documents[:200]))

    def test_is_the_same_on_every_machine(self):
        assert [d.source for d in split_documents(many(40)).validation] == ["29.md#1", "33.md#1"]

    def test_duplicates_are_on_the_same_side(self):
        documents = [Document(d.text, f"copy{k}/{d.source}") for k in range(3) for d in many(100)]
        train, validation, _ = split_documents(documents)
        assert len(train) + len(validation) == 300
        assert not set(texts(train)) & set(texts(validation))

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.text("ab c.\n", min_size=1).filter(str.strip), min_size=1, max_size=5), st.floats(0.01, 0.99))
    def test_few_documents(self, contents, fraction):
        documents = [Document(text.strip(), f"{i}.md#1") for i, text in enumerate(contents)]
        if len(set(texts(documents))) == 1 and len(documents[0].text) < 2:
            with pytest.raises(UserError, match="too short"):
                split_documents(documents, fraction)
            return
        train, validation, notes = split_documents(documents, fraction)
        assert all(text.strip() for text in texts(train) + texts(validation))
        assert train and validation
        if len(set(texts(documents))) > 1:
            assert not set(texts(train)) & set(texts(validation))
            assert len(train) + len(validation) == len(documents)
        else:
            assert "only one document" in notes[0]

    def test_one_side_empty_takes_the_smallest_hash(self):
        documents = many(3)
        smallest = min(documents, key=lambda d: d.key)
        for fraction in (1e-9, 1 - 1e-9):
            train, validation, notes = split_documents(documents, fraction)
            assert validation == [smallest]
            assert len(train) == 2
            assert notes == ["with 3 documents the validation part is one document"]

    @pytest.mark.parametrize(
        ("text", "head", "tail"),
        [
            ("word " * 180 + "end.\n\n" + "Next one. " * 9 + "Done.", "end.", "Next one."),  # paragraph
            ("word " * 180 + "end.” Next " + "word " * 18 + "done", "end.”", "Next word"),  # sentence
            ("word " * 200 + "done", "word", "word"),  # word
            ("x" * 1000, "x" * 900, "x" * 100),  # none of them
        ],
    )
    def test_a_single_document_is_cut_near_its_last_tenth(self, text, head, tail):
        (train,), (validation,), notes = split_documents([Document(text, "a.md#1")])
        assert train.text.endswith(head) and validation.text.startswith(tail)
        assert "".join(text.split()) == "".join((train.text + validation.text).split())
        assert 0.05 < len(validation.text) / len(text) < 0.15
        assert notes[0].startswith("only one document: its last ")

    def test_copies_of_a_single_document_are_one(self):
        train, validation, _ = split_documents([Document("One. Two.", f"{i}.md#1") for i in range(3)])
        assert texts(train) == ["One."] and texts(validation) == ["Two."]

    def test_a_large_single_document_is_cut_quickly(self):
        start = time.perf_counter()
        split_documents([Document("Some words here.\n\n" * 200_000, "a.md#1")])
        assert time.perf_counter() - start < 5

    @pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
    def test_bad_fraction(self, fraction):
        with pytest.raises(UserError, match="between 0 and 1"):
            split_documents(many(3), fraction)

    def test_no_documents(self):
        with pytest.raises(UserError):
            split_documents([])


class TestLoad:
    def folder(self, tmp_path, n=60):
        return write(tmp_path / "data", {f"{d.source[:-5]}.md": d.text for d in many(n)})

    def test_streams_are_the_documents_with_the_end_after_each(self, tmp_path):
        folder = self.folder(tmp_path)
        corpus = load_corpus(folder)
        train, validation, _ = split_documents(read_documents(folder))
        for tokens, size, documents in (
            (corpus.train, corpus.train_bytes, train),
            (corpus.validation, corpus.validation_bytes, validation),
        ):
            assert tokens.dtype == torch.int32 and tokens.ndim == 1
            expected = [i for d in documents for i in [*corpus.tokenizer.encode(d.text), corpus.tokenizer.eos_id]]
            assert tokens.tolist() == expected
            assert size == sum(len(text.encode()) + 1 for text in texts(documents))
            assert corpus.tokenizer.decode(tokens.tolist()) == "".join(texts(documents))
        assert (corpus.train_documents, corpus.validation_documents) == (len(train), len(validation))
        assert corpus.documents == 60 and corpus.words == 60 * 6
        assert corpus.train_words == 6 * len(train)

    def test_the_vocabulary_knows_the_training_part_alone(self, tmp_path):
        folder = self.folder(tmp_path)
        train, validation, _ = split_documents(read_documents(folder))
        words = set(load_corpus(folder, min_count=1).tokenizer.words)
        assert words == set(WordTokenizer.train(texts(train)).words)
        assert not words >= set(WordTokenizer.train(texts(validation)).words)

    def test_a_word_seen_once_stays_bytes_unless_asked_for(self, tmp_path):
        write(tmp_path, {"a.md": "so it was once, and so it was. And so it was."})
        assert " once" not in load_corpus(tmp_path).tokenizer.words
        assert " once" in load_corpus(tmp_path, min_count=1).tokenizer.words
        assert len(load_corpus(tmp_path, vocab_size=258).tokenizer) == 258

    def test_special_words_where_the_documents_hold_them(self, tmp_path):
        folder = write(tmp_path, {"a.md": "".join(f"ask {i}<start>answer {i}<end>\n" for i in range(50))})
        corpus = load_corpus(folder)
        assert corpus.tokenizer.special_words == ("<start>",)
        start = corpus.tokenizer.encode("<start>", allow_special=True)[0]
        assert (corpus.train == start).sum() == corpus.train_documents
        assert (corpus.train == corpus.tokenizer.eos_id).sum() == corpus.train_documents
        assert load_corpus(folder, special_words=()).tokenizer.special_words == ()
        assert load_corpus(self.folder(tmp_path / "x")).tokenizer.special_words == ()

    def test_a_given_tokenizer_is_used_as_it_is(self, tmp_path):
        tok = WordTokenizer.train(["Document thing"], special_words=["<start>"])
        corpus = load_corpus(self.folder(tmp_path), vocab_size=300, tokenizer=tok)
        assert corpus.tokenizer is tok

    def test_text_that_looks_like_an_end_is_no_end(self, tmp_path):
        write(tmp_path, {f"{i}.md": f"Text {i} with <eos> and </s> and \0 in it." for i in range(20)})
        corpus = load_corpus(tmp_path)
        assert (corpus.train == 0).sum() == corpus.train_documents

    def test_validation_path(self, tmp_path):
        folder = self.folder(tmp_path)
        write(folder, {"held/out.md": "Held out text.", "held/copy.md": many(1)[0].text})
        corpus = load_corpus(folder, val_path=folder / "held")
        assert (corpus.train_documents, corpus.validation_documents) == (59, 2)
        assert corpus.notes == ["3 documents left out of training: in the validation part as well"]
        with pytest.raises(UserError, match="nothing to train on"):
            load_corpus(folder, val_path=folder)
        with pytest.raises(UserError, match="absent"):
            load_corpus(folder, val_path=folder / "absent")

    def test_digest(self, tmp_path):
        folder = self.folder(tmp_path)
        same = [load_corpus(folder).digest, load_corpus(str(folder)).digest]
        (folder / "3.md").rename(folder / "59x.md")  # another order
        other = [load_corpus(folder).digest, load_corpus(folder, val_fraction=0.4).digest]
        other += [load_corpus(folder, min_count=1).digest]
        assert len(set(same)) == 1 and len({*same, *other}) == 4

    def test_notes_say_what_was_done(self, tmp_path):
        write(tmp_path, {"a.md": "Only this. And that.", "b.md": ""})
        assert len(load_corpus(tmp_path).notes) == 2

    @pytest.mark.parametrize("text", ["ab", "a b", "One two three four five six seven eight nine ten."])
    def test_almost_nothing_is_a_corpus(self, tmp_path, text):
        write(tmp_path, {"a.md": text})
        corpus = load_corpus(tmp_path)
        assert len(corpus.train) >= 2 and len(corpus.validation) >= 2
        inputs, targets = next(Windows(corpus.train, context=256, batch_size=4))
        assert inputs.shape == targets.shape == (4, len(corpus.train) - 1)
        assert list(validation_windows(corpus.validation, 256))

    def test_nothing_is_not(self, tmp_path):
        write(tmp_path, {"a.md": "x"})
        with pytest.raises(UserError, match="too short"):
            load_corpus(tmp_path)

    def test_vocabulary_too_small(self, tmp_path):
        with pytest.raises(UserError, match="256 bytes"):
            load_corpus(self.folder(tmp_path), vocab_size=100)

    def test_wikitext_has_the_published_counts(self):
        folder = DATA / "wikitext-2"
        if not folder.is_dir():
            pytest.skip("needs WikiText-2 in ../shared/data/wikitext-2")
        corpus = load_corpus(folder / "train.txt", pattern="whitespace", val_path=folder / "valid.txt")
        assert len(corpus.tokenizer) == 33_278
        assert (len(corpus.train), len(corpus.validation)) == (2_088_628, 217_646)
        assert corpus.train_bytes == (folder / "train.txt").stat().st_size
        assert corpus.validation_bytes == (folder / "valid.txt").stat().st_size

    def test_llama_stories(self):
        folder = DATA / "llama-stories"
        if not folder.is_dir():
            pytest.skip("needs the stories in ../shared/data/llama-stories")
        start = time.perf_counter()
        corpus = load_corpus(folder)
        assert time.perf_counter() - start < 15  # 1.0 s on an idle machine
        assert corpus.documents == 1000
        assert corpus.validation_documents == 103
        assert corpus.tokenizer.special_words == ("<start>",)
        assert corpus.notes == []
        assert (corpus.train == 0).sum() == 897


def epoch_of(windows):
    """The batches of one whole epoch, with a batch size of one window."""
    batches = [next(windows)]  # only now a finished epoch gives way to the next
    epoch = windows.epoch
    while windows.epochs < epoch + 1:
        batches.append(next(windows))
    return batches


def pairs(batches):
    """How often each (input, target) pair occurs, padding left out. With tokens 0, 1, 2, ... these are positions."""
    count = Counter()
    for inputs, targets in batches:
        keep = targets != IGNORE
        count.update(zip(inputs[keep].tolist(), targets[keep].tolist(), strict=True))
    return count


class TestWindows:
    @pytest.mark.parametrize("context", [1, 2, 7, 16, 99, 100, 101, 5000])
    @pytest.mark.parametrize("length", [2, 3, 16, 17, 100, 101])
    def test_every_epoch_has_every_target_exactly_once(self, length, context):
        windows = Windows(torch.arange(length, dtype=torch.int32), context, batch_size=1, seed=3)
        for _ in range(4):
            assert pairs(epoch_of(windows)) == {(i, i + 1): 1 for i in range(length - 1)}

    @settings(max_examples=60, deadline=None)
    @given(st.integers(2, 80), st.integers(1, 100), st.integers(1, 9), st.integers(0, 2**63))
    def test_in_batches_too_what_an_epoch_leaves_over_begins_the_next(self, length, context, batch, seed):
        tokens = torch.arange(length)
        single = Windows(tokens, context, 1, seed)
        windows = Windows(tokens, context, batch, seed)
        for _ in range(5):
            inputs, targets = next(windows)
            assert inputs.shape == targets.shape == (batch, min(context, length - 1))
            assert inputs.dtype == targets.dtype == torch.int64
            expected = [next(single) for _ in range(batch)]
            assert inputs.equal(torch.cat([pair[0] for pair in expected]))
            assert targets.equal(torch.cat([pair[1] for pair in expected]))
        assert windows.epochs == single.epochs

    def test_rows_are_consecutive_tokens_and_padding_is_on_the_right(self):
        windows = Windows(torch.arange(10, 113), context=8, batch_size=1)
        for inputs, targets in islice(windows, 100):
            kept = int((targets != IGNORE).sum())
            assert kept > 0
            assert targets[0, :kept].equal(inputs[0, :kept] + 1)
            assert inputs[0, :kept].equal(torch.arange(kept) + inputs[0, 0])
            assert (targets[0, kept:] == IGNORE).all() and (inputs[0, kept:] == 0).all()

    def test_phase_and_order_are_new_in_each_epoch(self):
        windows = Windows(torch.arange(1001), context=10, batch_size=1)
        epochs = [[int(inputs[0, 0]) for inputs, _ in epoch_of(windows)] for _ in range(8)]
        assert len({tuple(epoch) for epoch in epochs}) == 8
        assert len({frozenset(epoch) for epoch in epochs}) > 3  # the phase, apart from the order
        assert all(epoch != sorted(epoch) for epoch in epochs)

    def test_seed_decides_all(self):
        def first(seed):
            return [b[0].tolist() for b in islice(Windows(torch.arange(500), 16, 4, seed), 20)]

        assert first(1) == first(1) != first(2)

    @settings(max_examples=40, deadline=None)
    @given(st.integers(2, 60), st.integers(1, 20), st.integers(1, 7), st.integers(0, 30), st.integers(0, 99))
    def test_resume_is_exact(self, length, context, batch, steps, seed):
        tokens = torch.arange(length)
        one = Windows(tokens, context, batch, seed)
        for _ in range(steps):
            next(one)
        state = one.state_dict()
        two = Windows(tokens, context, batch, seed=12345)
        two.load_state_dict(state)
        assert two.state_dict() == state and two.epochs == one.epochs
        for _ in range(5):
            for a, b in zip(next(one), next(two), strict=True):
                assert a.equal(b)
        assert one.state_dict() == two.state_dict() != state

    def test_state_is_plain_numbers(self):
        state = Windows(torch.arange(100), 8, 2, seed=7).state_dict()
        assert state == {"seed": 7, "epoch": 0, "position": 0, "context": 8, "tokens": 100}

    def test_a_place_in_other_data_is_refused(self):
        state = Windows(torch.arange(100), 8, 2).state_dict()
        with pytest.raises(UserError, match="tokens were 100, now 90"):
            Windows(torch.arange(90), 8, 2).load_state_dict(state)
        with pytest.raises(UserError, match="context were 8, now 9"):
            Windows(torch.arange(100), 9, 2).load_state_dict(state)
        for damaged in ({}, {**state, "epoch": "1"}, {**state, "position": 99}, {**state, "more": 1}):
            with pytest.raises(UserError, match="damaged"):
                Windows(torch.arange(100), 8, 2).load_state_dict(damaged)

    def test_shorter_than_the_context_says_so(self):
        windows = Windows(torch.arange(20), context=256, batch_size=3)
        assert windows.context == 19
        assert windows.note == "context 256 shortened to 19: the training part has 20 tokens"
        assert Windows(torch.arange(257), 256, 3).note is None

    @pytest.mark.parametrize("length", [0, 1])
    def test_nothing_to_learn_from(self, length):
        with pytest.raises(UserError, match=f"{length} token"):
            Windows(torch.arange(length), 8, 2)

    @pytest.mark.parametrize(("context", "batch"), [(0, 1), (1, 0), (-5, 1)])
    def test_bad_sizes(self, context, batch):
        with pytest.raises(ValueError):
            Windows(torch.arange(9), context, batch)

    def test_is_fast(self):
        windows = Windows(torch.zeros(1_000_000, dtype=torch.int32), context=256, batch_size=64)
        start = time.perf_counter()
        for _ in range(100):
            next(windows)
        assert time.perf_counter() - start < 3  # 0.1 s on an idle machine


class TestValidationWindows:
    @pytest.mark.parametrize("context", [1, 2, 5, 9, 10, 11, 100])
    @pytest.mark.parametrize("length", [2, 3, 10, 11])
    def test_in_order_each_target_once(self, length, context):
        batches = list(validation_windows(torch.arange(length, dtype=torch.int32), context))
        assert torch.cat([inputs for inputs, _ in batches], dim=1).tolist() == [list(range(length - 1))]
        assert torch.cat([targets for _, targets in batches], dim=1).tolist() == [list(range(1, length))]
        assert all(inputs.dtype == targets.dtype == torch.int64 for inputs, targets in batches)
        assert all(inputs.shape == targets.shape == (1, context) for inputs, targets in batches[:-1])

    def test_with_a_start_the_first_token_is_a_target(self):
        batches = list(validation_windows(torch.tensor([5, 6, 7], dtype=torch.int32), 2, start_id=0))
        assert [(inputs.tolist(), targets.tolist()) for inputs, targets in batches] == [
            ([[0, 5]], [[5, 6]]),
            ([[6]], [[7]]),
        ]

    def test_the_targets_are_the_bytes_that_are_counted(self, tmp_path):
        write(tmp_path, {f"{i}.md": f"Text {i}, é." for i in range(30)})
        corpus = load_corpus(tmp_path)
        tok = corpus.tokenizer
        targets = [i for _, t in validation_windows(corpus.validation, 7, tok.eos_id) for i in t[0].tolist()]
        assert corpus.validation_bytes == sum(len(tok.token_bytes(i)) or 1 for i in targets)

    def test_bad_input(self):
        with pytest.raises(ValueError):
            validation_windows(torch.arange(9), 0)
        for tokens in (torch.arange(0), torch.arange(1)):
            with pytest.raises(UserError, match="nothing to validate"):
                validation_windows(tokens, 8)
        assert len(list(validation_windows(torch.tensor([3]), 8, start_id=0))) == 1
