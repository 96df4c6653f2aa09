"""From a folder to tensors: the streams, the vocabulary, what is told, and corpora as people have them."""

import random
import time
from pathlib import Path

import pytest
import torch
from corpora import many, prose, texts, write

from mamba2_min import files
from mamba2_min.data import stream
from mamba2_min.data.corpus import corpus_of, load_corpus
from mamba2_min.data.documents import read_documents
from mamba2_min.data.split import split_documents
from mamba2_min.data.tokenizer import WordTokenizer
from mamba2_min.data.windows import Windows, validation_windows
from mamba2_min.errors import UserError
from mamba2_min.settings import DataSettings
from mamba2_min.training.runs import read_plan

DATA = Path(__file__).parents[2] / "shared" / "data"


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

    @pytest.mark.parametrize("pattern", ["words", "llama3", "whitespace"])
    def test_a_long_document_has_the_same_tokens_as_if_cut_at_once(self, tmp_path, monkeypatch, pattern):
        text = (
            prose(0, 30_000).replace("the ", "the  ").replace("a ", "a\t") + " é 日本語 'quoted' \n\n\n  end 1234 ..."
        )
        write(tmp_path, {"a.txt": text, "b.txt": "One more."})
        whole = load_corpus(tmp_path, pattern=pattern)
        for length in (1, 7, 100):
            monkeypatch.setattr(stream, "_LENGTH", length)
            parts = load_corpus(tmp_path, pattern=pattern)
            assert parts.digest == whole.digest and parts.words == whole.words
            assert parts.train_bytes == whole.train_bytes

    def test_a_special_word_of_the_validation_part_alone_is_none(self, tmp_path):
        write(tmp_path / "train", {f"{i}.md": f"Document {i} tells." for i in range(5)})
        write(tmp_path / "held", {"a.md": "Ask <start>answer"})
        corpus = load_corpus(tmp_path / "train", val_path=tmp_path / "held")
        assert corpus.tokenizer.special_words == ()
        assert corpus.validation.tolist() == [*corpus.tokenizer.encode("Ask <start>answer"), 0]

    def test_what_is_outside_the_vocabulary(self, tmp_path):
        draw, plain = random.Random(0), "The same words again and again. " * 100
        files = {f"{i}.md": f"{plain}{i}" for i in range(20)} | {"odd.md": "Xylophon Quagga Zeppelin " + "unique" * 60}
        corpus = load_corpus(write(tmp_path, files))
        assert 0 < corpus.outside < 0.02
        assert corpus.coverage.startswith(
            f"{corpus.outside:.1%} of the bytes are outside the vocabulary, most of all in "
        )
        write(tmp_path, {"odd.md": " ".join("".join(draw.choices("abcdefgh", k=9)) for _ in range(300))})
        corpus = load_corpus(tmp_path)
        assert corpus.worst[0] == "odd.md" and corpus.worst[1] > 0.5
        # Of a long file in two parts, each byte counts once.
        ids = corpus.train.tolist() + corpus.validation.tolist()
        assert corpus.outside <= sum(1 <= i <= 256 for i in ids) / (corpus.train_bytes + corpus.validation_bytes)

    def test_settings_of_a_run(self, tmp_path):
        write(tmp_path, {f"{i}.txt": f"Café {i} and more words.".encode("cp1252") for i in range(40)})
        data = DataSettings(data=str(tmp_path), encoding="cp1252", max_documents_bytes=300, pattern="words")
        corpus = corpus_of(data)
        assert corpus.digest == load_corpus(tmp_path, 8192, encoding="cp1252", max_bytes=300).digest
        assert corpus.train_bytes + corpus.validation_bytes < 330
        assert corpus_of(data, corpus.tokenizer).tokenizer is corpus.tokenizer


LICENCE = "This book is for the use of anyone anywhere, at no cost and with almost no restrictions."


class TestRepeats:
    def folder(self, tmp_path):
        books = {f"{i}.txt": f"{LICENCE}\n\n{prose(i, 5000)}\n \n{LICENCE}  \n" for i in range(6)}
        return write(tmp_path, books | {"rhyme.txt": "Short.\n\nShort.\n\n" + prose(7, 500)})

    def test_are_reported_and_dropped_if_asked(self, tmp_path):
        folder = self.folder(tmp_path)
        kept, dropped = load_corpus(folder), load_corpus(folder, drop_repeats=True)
        (note,) = [note for note in kept.notes if "paragraph" in note and "large" not in note]
        size = 6 * len(LICENCE)
        told = f'1 paragraph in 3 or more documents each, {size} bytes, such as "{LICENCE[:40]}..." in 6: '
        assert note == told + "--drop-repeats leaves them out"
        assert told + "left out" in dropped.notes
        for corpus, found in ((kept, True), (dropped, False)):
            for tokens in (corpus.train, corpus.validation):
                assert (LICENCE in corpus.tokenizer.decode(tokens.tolist())) == found
        text = dropped.tokenizer.decode(dropped.train.tolist())
        assert prose(1, 5000)[:300] in text or prose(2, 5000)[:300] in text

    def test_dropping_moves_no_document(self, tmp_path):
        folder = self.folder(tmp_path)
        first = load_corpus(folder, drop_repeats=True)
        write(folder, {f"new{i}.txt": f"{prose(1, 5000)[:200]}\n\n{LICENCE}\n\n{i}" for i in range(3)})
        assert first.validation_documents <= load_corpus(folder, drop_repeats=True).validation_documents

    def test_line_by_line_without_empty_lines(self, tmp_path):
        write(tmp_path, {f"{i}.txt": f"Line {i} of its own.\n{LICENCE}\nAnother line {i}." for i in range(5)})
        corpus = load_corpus(tmp_path, drop_repeats=True, min_count=1)
        assert "Line 3 of its own.\nAnother line 3." in corpus.tokenizer.decode(
            corpus.train.tolist() + corpus.validation.tolist()
        )

    def test_nothing_else_there(self, tmp_path):
        write(tmp_path, {f"{i}.txt": LICENCE for i in range(5)})
        with pytest.raises(UserError, match="all their paragraphs repeat"):
            load_corpus(tmp_path, drop_repeats=True)


ODD = {
    "a.md": "---\ntitle: A\n---\nThe first note has a head.\n",
    "b.txt": "One page.\fThe next page.\rAn old line end. \0 And a zero.\n",
    "c.md": "A picture: ![x](data:image/png;base64," + "iVBORw0KGgo" * 20 + ")\n",
    "d.txt": "A novel. " * 2000,
    "chat.jsonl": '{"text": "a record"}\n',
    "e.md": "One.<end>Two.<|endoftext|>",
    "u.txt": "Sixteen bits.".encode("utf-16-le"),
}


class TestOldRuns:
    """A run of the first version is resumed with the documents, and the split, that it began with."""

    def test_rules_of_the_first_version(self, tmp_path):
        """The digests are those that the first version gave."""
        corpus = load_corpus(write(tmp_path / "odd", ODD), min_count=1, rules=1)
        assert corpus.digest == "ddf711ceeff0169be397b984d3c4c5324bcbcf215b66e2edabcefaf000788a6b"
        assert corpus.notes == ["with 7 documents the validation part is one document"]
        shelf = {"novel.txt": prose(0, 60_000)} | {f"n{i}.md": prose(i, 200) for i in range(1, 4)}
        corpus = load_corpus(write(tmp_path / "shelf", shelf), rules=1)
        assert corpus.digest == "d9a787d8653d2784b4148839c1739a0f6c7249f9e58af6020596da61550686b5"
        assert load_corpus(tmp_path / "shelf").digest != corpus.digest

    def test_the_bundled_documents_are_read_as_ever(self):
        for rules in (1, 2):
            corpus = load_corpus(Path(__file__).parent.parent / "training_data" / "varied", rules=rules)
            assert corpus.digest[:16] == "38771fd0db24aa1a" and corpus.notes == []

    def test_settings_without_rules_are_of_the_first_version(self, tmp_path):
        saved = {"data": {"data": "d", "val_data": None, "vocab_size": 99, "min_count": 1, "pattern": "words"}}
        saved["data"]["val_fraction"] = 0.1
        files.save_json(tmp_path / "settings.json", {**saved, "model": {}, "training": {}})
        assert read_plan(tmp_path).data.rules == 1
        assert DataSettings().rules == 2
