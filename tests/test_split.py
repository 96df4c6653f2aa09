"""The split: by a hash of each text, a tenth of the bytes, and large documents cut where the hash fails."""

import time

import pytest
from corpora import many, prose, texts
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba2_min.data.documents import Document
from mamba2_min.data.split import cut, split_documents
from mamba2_min.errors import UserError


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


def size(documents):
    return sum(len(document.text.encode()) for document in documents)


def share(documents, fraction=0.1):
    train, validation, _ = split_documents(documents, fraction)
    return size(validation) / size([*train, *validation])


NOVEL = Document(prose("novel", 300_000), "novel.txt#1")
NOTES = [Document(prose(f"note {i}", 300), f"note{i}.md#1") for i in range(30)]


class TestBySize:
    """A tenth of the text, not of the number of documents."""

    @pytest.mark.parametrize("notes", [NOTES[:3], NOTES[:10], NOTES, NOTES[7:8]])
    @pytest.mark.parametrize("fraction", [0.05, 0.1, 0.3, 0.5])
    def test_a_novel_and_notes(self, notes, fraction):
        train, validation, told = split_documents([*notes[:2], NOVEL, *notes[2:]], fraction)
        assert share([NOVEL, *notes], fraction) == pytest.approx(fraction, rel=0.2)
        assert told[0].startswith("1 large document is cut at a paragraph, and the last part validates: novel.txt (")
        head, tail = (next(d for d in side if d.source == NOVEL.source) for side in (train, validation))
        assert head.text + "\n\n" + tail.text == NOVEL.text

    @pytest.mark.parametrize("count", [2, 3, 4, 5, 6, 9])
    def test_a_few_novels(self, count):
        novels = [Document(prose(f"n{i}", 40_000 + 10_000 * i), f"n{i}.txt#1") for i in range(count)]
        assert 0.05 <= share(novels) <= 0.2
        assert 0.05 <= share([*novels, *NOTES]) <= 0.2

    def test_every_document_is_on_one_side_or_cut(self):
        documents = [NOVEL, *NOTES]
        train, validation, _ = split_documents(documents)
        assert len(train) + len(validation) == len(documents) + 1
        together = "".join(sorted("".join(texts([*train, *validation])).replace("\n", "")))
        assert together == "".join(sorted("".join(texts(documents)).replace("\n", "")))

    def test_additions_move_no_other(self):
        """Neither the notes, which stay whole, nor the place where the novel is cut."""
        before = split_documents([NOVEL, *NOTES[:10]])
        for more in (NOTES[10:], [Document(prose("more", 20_000), "more.md#1")]):
            after = split_documents([*more, NOVEL, *NOTES[:10]])
            assert set(texts(before.train)) <= set(texts(after.train))
            assert set(texts(before.validation)) <= set(texts(after.validation))

    def test_a_reasonable_split_stays_what_it_was(self):
        documents = [Document(prose(f"d{i}", 8000), f"{i}.md#1") for i in range(40)]
        train, validation, notes = split_documents(documents)
        assert {d.key for d in validation} == {d.key for d in documents if int(d.key[:15], 16) / 16**15 < 0.1}
        assert len(train) + len(validation) == 40 and notes == []

    def test_small_documents_are_not_cut(self):
        documents = [Document(prose(f"d{i}", 1000 * (i + 1)), f"{i}.md#1") for i in range(3)]
        train, validation, _ = split_documents(documents)
        assert len(train) + len(validation) == 3

    def test_copies_are_cut_alike(self):
        train, validation, _ = split_documents([NOVEL, *NOTES[:3], NOVEL])
        assert not set(texts(train)) & set(texts(validation))
        assert 0.05 <= size(validation) / size([*train, *validation]) <= 0.2

    def test_a_long_text_without_a_boundary_near_the_cut(self):
        _, tail = cut(Document("Some words.\n\n" + "x" * 3_000_000 + "\n\nEnd.", "a.md#1"), 0.1)
        assert len(tail.text) / 3_000_000 == pytest.approx(0.1, rel=0.01)
        far = "word " * 400_000 + "\n\nEnd of it. " + "word " * 40_000  # the paragraph ends 100,000 characters before
        _, tail = cut(Document(far, "a.md#1"), 0.1)
        assert tail.text.startswith("End of it.")
