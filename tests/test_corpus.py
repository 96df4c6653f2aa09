"""From a folder to tensors: the streams, the vocabulary, what is told, and corpora as people have them."""

import time
from pathlib import Path

import pytest
import torch
from corpora import many, texts, write

from mamba2_min.data.corpus import load_corpus
from mamba2_min.data.documents import read_documents
from mamba2_min.data.split import split_documents
from mamba2_min.data.tokenizer import WordTokenizer
from mamba2_min.data.windows import Windows, validation_windows
from mamba2_min.errors import UserError

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
